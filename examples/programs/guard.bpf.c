// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A policy by the other end's address, obeyed on the way in (XDP) and on the way out (traffic control). */
#include "packet.h"

struct prefix {
	__u32 length; /* of an IPv4 address written as ::ffff:a.b.c.d: 96 more */
	struct address address;
};

struct rule {
	__u32 drop;
	__u64 packets; /* that met it */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct prefix);
	__type(value, struct rule);
	__uint(max_entries, 10000);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} policy SEC(".maps");

static __always_inline bool dropped(const struct address *address)
{
	struct prefix key = {.length = 128, .address = *address};
	struct rule *rule = bpf_map_lookup_elem(&policy, &key);

	if (!rule)
		return false;
	__sync_fetch_and_add(&rule->packets, 1);
	return rule->drop;
}

SEC("xdp")
int guard_in(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct packet packet = {};
	enum parsed found = parse(data, data_end, data_end - data, &packet);

	if (found != PARSED_FLOW && found != PARSED_ADDRESS)
		return XDP_PASS;
	return dropped(&packet.flow.source) ? XDP_DROP : XDP_PASS;
}

SEC("tc")
int guard_out(struct __sk_buff *skb)
{
	struct packet packet = {};
	enum parsed found = parse((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet);

	if (found != PARSED_FLOW && found != PARSED_ADDRESS)
		return TC_ACT_UNSPEC;
	return dropped(&packet.flow.destination) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
