// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Packets and bytes that this machine sent and received, for each flow. */
#include "packet.h"

struct count {
	__u64 packets;
	__u64 bytes;
};

struct counts {
	struct count sent;
	struct count received;
};

/* A flow as this machine sends it: its own address is the source. When the map is full, the least recently
 * used go. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__type(key, struct flow);
	__type(value, struct counts);
	__uint(max_entries, 65536);
} flows SEC(".maps");

static __always_inline struct flow reversed(const struct flow *flow)
{
	struct flow other = {
		.source = flow->destination,
		.destination = flow->source,
		.source_port = flow->destination_port,
		.destination_port = flow->source_port,
		.protocol = flow->protocol,
	};
	return other;
}

static __always_inline int count(struct __sk_buff *skb, bool received)
{
	struct packet packet = {};
	struct counts none = {};

	if (parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet) != PARSED_FLOW)
		return TC_ACT_UNSPEC;

	struct flow flow = received ? reversed(&packet.flow) : packet.flow;
	struct counts *counts = bpf_map_lookup_elem(&flows, &flow);

	if (!counts) {
		bpf_map_update_elem(&flows, &flow, &none, BPF_NOEXIST);
		counts = bpf_map_lookup_elem(&flows, &flow);
		if (!counts)
			return TC_ACT_UNSPEC;
	}
	struct count *side = received ? &counts->received : &counts->sent;

	side->packets += 1;
	side->bytes += skb->len;
	return TC_ACT_UNSPEC; /* whoever comes next on the hook decides */
}

SEC("tc")
int count_received(struct __sk_buff *skb)
{
	return count(skb, true);
}

SEC("tc")
int count_sent(struct __sk_buff *skb)
{
	return count(skb, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
