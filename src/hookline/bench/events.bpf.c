/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A producer for measuring how fast a ring is read: one run of `produce` writes any number of 64-byte events.
 */
#include "kernel.h"
#include "ring.h"

#define EVENTS_BYTES (1 << 24) /* 233,016 events */

struct event {
	__u64 number;
	__u64 words[7];
};

const struct event *unused_event __attribute__((unused));

RING(events, EVENTS_BYTES);

/* The program's context. */
struct order {
	__u64 first; /* the first event's number */
	__u32 count; /* at most 8,388,608: bpf_loop's limit */
	__u32 lost;  /* out: how many found no room */
};

struct progress {
	__u64 first;
	__u32 lost;
};

static long produce_one(__u64 index, struct progress *progress)
{
	struct event *event = ring_reserve(events, sizeof(*event));

	if (!event) {
		progress->lost++;
		return 0;
	}
	event->number = progress->first + index;
	for (int i = 0; i < 7; i++)
		event->words[i] = index;
	ring_submit(event);
	return 0;
}

SEC("syscall")
int produce(struct order *order)
{
	struct progress progress = {.first = order->first};

	bpf_loop(order->count, produce_one, &progress, 0);
	order->lost = progress.lost;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
