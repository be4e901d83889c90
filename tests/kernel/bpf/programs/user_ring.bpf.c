// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Takes what user space wrote into a ring: sums it up, and remembers the last record.
#include "types.h"

#define TYPE_USER_RINGBUF 31

struct order {
	__u64 number;
	__u32 amount;
};

struct bpf_dynptr {
	__u64 opaque[2];
} __attribute__((aligned(8)));

struct {
	__uint(type, TYPE_USER_RINGBUF);
	__uint(max_entries, 4096);
} orders SEC(".maps");

const struct order *unused_order __attribute__((unused));
__u64 taken = 0;
__u64 sum = 0;
__u64 out_of_order = 0;
__u64 next = 0;

static long take(struct bpf_dynptr *record, void *ctx)
{
	struct order order;
	if (bpf_dynptr_read(&order, sizeof(order), record, 0, 0))
		return 1;
	taken++;
	sum += order.amount;
	out_of_order += order.number != next;
	next = order.number + 1;
	return 0;
}

SEC("syscall") int drain(void *ctx)
{
	return bpf_user_ringbuf_drain(&orders, take, 0, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
