/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Sending a packet to a machine beyond this node: next hop, layer-2 addresses, the way out. */
#pragma once

#include "maps.h"
#include "translate.h"

#define HANDOVER_MAGIC 0x486f6f6bU /* "Hook" */

/* What XDP tells the TC program of a packet whose next hop has no layer-2 address yet. XDP metadata holds 32
 * octets. */
struct handover {
	__u32 magic;
	__u32 ifindex;
	struct bpf_redir_neigh next_hop;
};

struct route {
	long outcome; /* BPF_FIB_LKUP_RET_…, or negative */
	struct bpf_fib_lookup parameters;
};

static __always_inline void find_route(struct xdp_md *ctx, const struct packet *packet,
				       const struct address *source, const struct address *destination,
				       struct route *route)
{
	struct bpf_fib_lookup *fib = &route->parameters;

	fib->ifindex = ctx->ingress_ifindex;
	fib->l4_protocol = packet->flow.protocol;
	fib->tot_len = check_mtu ? packet->l3_length : 0;
	if (packet->ipv6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->source, source, sizeof(*source));
		__builtin_memcpy(fib->destination, destination, sizeof(*destination));
	} else {
		fib->family = AF_INET;
		fib->source[0] = source->words[3];
		fib->destination[0] = destination->words[3];
	}
	route->outcome = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
}

static __always_inline enum drop_reason route_refusal(const struct route *route)
{
	switch (route->outcome) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return REASON_NONE;
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return REASON_FORWARDING_DISABLED;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return REASON_TOO_BIG;
	default:
		return REASON_NO_ROUTE;
	}
}

/* Leaves the packet to the TC program `resolve`, behind metadata that says where it must go. */
static __always_inline int hand_over(struct xdp_md *ctx, const struct route *route)
{
	/* Taken before the packet moves: the pointers below are void after it. */
	const struct bpf_fib_lookup *fib = &route->parameters;

	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct handover)))
		return -1;

	struct handover *handover = (void *)(long)ctx->data_meta;

	/* The metadata just made lies before the packet. */
	if ((void *)(handover + 1) > (void *)(long)ctx->data)
		return -1;
	handover->magic = HANDOVER_MAGIC;
	handover->ifindex = fib->ifindex;
	handover->next_hop.nh_family = fib->family; /* an IPv4 route may lead through an IPv6 neighbour */
	__builtin_memcpy(handover->next_hop.address, fib->destination, sizeof(fib->destination));
	return 0;
}

/* The verdict that sends a packet out of an interface. */
static __always_inline int leave_by(struct xdp_md *ctx, __u32 ifindex)
{
	/* veth_xdp_flush() wakes the peer after XDP_TX only where the peer has an XDP program of its own:
	 * without one the packet lies in its ring until another packet comes. A redirect to the same
	 * interface wakes it. */
	if (ifindex == ctx->ingress_ifindex && !tx_by_redirect)
		return XDP_TX;
	return bpf_redirect(ifindex, 0);
}

/* Writes the layer-2 addresses and says which verdict sends the packet. */
static __always_inline int send(struct xdp_md *ctx, const struct route *route)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;

	/* Both layer-2 addresses are written. */
	if ((void *)(ethernet + 1) > data_end)
		return XDP_ABORTED;
	__builtin_memcpy(ethernet->h_dest, route->parameters.dmac, sizeof(ethernet->h_dest));
	__builtin_memcpy(ethernet->h_source, route->parameters.smac, sizeof(ethernet->h_source));
	return leave_by(ctx, route->parameters.ifindex);
}
