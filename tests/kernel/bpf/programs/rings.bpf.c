// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Rings, and programs that fill them when they are told to.
#include "../../../../src/hookline/datapath/include/ring.h"

struct event {
	__u64 number;
	__u32 cpu;
	__u32 kind;
	__u16 words[24];
};

struct odd {
	__u32 number;
	__u8 letters[5];
} __attribute__((packed));

struct bits {
	__u32 low : 4, high : 28;
};

const struct event *unused_event __attribute__((unused));
const struct odd *unused_odd __attribute__((unused));
const struct bits *unused_bits __attribute__((unused));

RING(events, 4096);
RING(mixed, 4096);

struct {
	__uint(type, 27);
	__uint(max_entries, 4096);
} uncounted SEC(".maps");

// A program's context: what to write, and how many of it found no room.
struct job {
	__u64 first;
	__u32 count;
	__u32 discard_every; // every so many records one is discarded; 0: none
	__u64 failed;
};

struct state {
	__u64 first;
	__u64 failed;
	__u32 discard_every;
};

static long write_event(__u64 index, struct state *state)
{
	struct event *event = ring_reserve(events, sizeof(*event));
	if (!event) {
		state->failed++;
		return 0;
	}
	event->number = state->first + index;
	event->cpu = bpf_get_smp_processor_id();
	event->kind = 7;
	for (int i = 0; i < 24; i++)
		event->words[i] = event->number + i;
	if (state->discard_every && index % state->discard_every == state->discard_every - 1)
		ring_discard(event);
	else
		ring_submit(event);
	return 0;
}

SEC("syscall") int fill(struct job *job)
{
	struct state state = {.first = job->first, .discard_every = job->discard_every};
	bpf_loop(job->count, write_event, &state, 0);
	job->failed = state.failed;
	return 0;
}

// Records of 1 to 64 bytes: record N has 1 + N % 64, and each of its bytes is N.
static long write_mixed(__u64 index, struct state *state)
{
	__u8 data[64];
	__u64 number = state->first + index;
	for (int i = 0; i < 64; i++)
		data[i] = number;
	if (ring_output(mixed, data, 1 + (number & 63)))
		state->failed++;
	return 0;
}

SEC("syscall") int fill_mixed(struct job *job)
{
	struct state state = {.first = job->first};
	bpf_loop(job->count, write_mixed, &state, 0);
	job->failed = state.failed;
	return 0;
}

SEC("syscall") int fill_odd(struct job *job)
{
	struct odd odd = {.number = job->first, .letters = "abcd"};
	job->failed = bpf_ringbuf_output(&uncounted, &odd, sizeof(odd), 0) != 0;
	return 0;
}

// Writes without waking anybody.
SEC("syscall") int fill_quietly(struct job *job)
{
	struct odd odd = {.number = job->first};
	job->failed = bpf_ringbuf_output(&uncounted, &odd, sizeof(odd), 1) != 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
