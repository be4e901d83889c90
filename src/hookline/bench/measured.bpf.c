/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Five small programs around five maps: what rows of maps and rings are measured with, and an object to load.
 */
#include "kernel.h"
#include "ring.h"

#define ENTRIES 1024

struct counters {
	__u64 packets, bytes;
};

struct event {
	__u64 number, bytes;
	__u32 words[12];
};

const struct event *unused_event __attribute__((unused));

RING(mapped, 4096);
RING(called, 4096);

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, ENTRIES);
	__type(key, __u32);
	__type(value, struct counters);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES);
	__type(key, __u32);
	__type(value, struct counters);
} table SEC(".maps");

/* A program's context. */
struct job {
	__u32 count;  /* how much to do */
	__u32 called; /* fill: the ring that a callback reads, instead of the mapped one */
};

static void fill_in(struct event *event, __u64 number)
{
	event->number = number;
	event->bytes = number & 0xff;
#pragma unroll
	for (int i = 0; i < 12; i++)
		event->words[i] = i;
}

static long write_mapped(__u64 index, void *nothing __attribute__((unused)))
{
	struct event *event = ring_reserve(mapped, sizeof(*event));
	if (!event)
		return 1;
	fill_in(event, index);
	ring_submit(event);
	return 0;
}

static long write_called(__u64 index, void *nothing __attribute__((unused)))
{
	struct event *event = ring_reserve(called, sizeof(*event));
	if (!event)
		return 1;
	fill_in(event, index);
	ring_submit(event);
	return 0;
}

SEC("syscall")
int fill(struct job *job)
{
	if (job->called)
		bpf_loop(job->count, write_called, NULL, 0);
	else
		bpf_loop(job->count, write_mapped, NULL, 0);
	return 0;
}

static long count_flow(__u64 index, void *nothing __attribute__((unused)))
{
	__u32 key = index;
	struct counters one = {.packets = 1, .bytes = index};
	bpf_map_update_elem(&flows, &key, &one, BPF_ANY);
	return 0;
}

SEC("syscall")
int fill_flows(struct job *job)
{
	bpf_loop(job->count, count_flow, NULL, 0);
	return 0;
}

static void count(__u32 key, __u64 bytes)
{
	struct counters *found = bpf_map_lookup_elem(&flows, &key);
	struct counters first = {.packets = 1, .bytes = bytes};

	if (found) {
		found->packets += 1;
		found->bytes += bytes;
	} else {
		bpf_map_update_elem(&flows, &key, &first, BPF_NOEXIST);
	}
}

SEC("xdp")
int count_frames(struct xdp_md *ctx)
{
	count(ctx->ingress_ifindex, ctx->data_end - ctx->data);
	return XDP_PASS;
}

SEC("tc")
int count_packets(struct __sk_buff *skb)
{
	count(skb->ifindex, skb->len);
	return TC_ACT_UNSPEC;
}

SEC("socket")
int count_datagrams(struct __sk_buff *skb)
{
	count(skb->ifindex, skb->len);
	return -1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
