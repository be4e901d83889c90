/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Writing new addresses and ports into a packet, its checksums kept right: in XDP by hand, in TC by the
 * helpers. */
#pragma once

#include "checksum.h"
#include "connections.h"

#define TTL_STEP bpf_htons(0x0100) /* the TTL is the upper octet of its 16-bit word */

/* Puts the addresses and ports of `to` into the packet, whose present ones are `packet->flow`. Returns -1
 * where the packet is not as it was parsed (the verifier's fear; it does not happen). */
static __always_inline int xdp_translate(struct xdp_md *ctx, const struct packet *packet,
					 const struct connection *to)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	const struct flow *from = &packet->flow;
	__u32 offset = packet->l4_offset;
	__u64 addresses = 0;

	/* One's complement sums of what the pseudo-header loses and gains (RFC 9293, 3.1; RFC 8200, 8.1). An
	 * IPv4 address' first three words are the same on both sides and cancel out. */
	for (int i = 0; i < 4; i++) {
		addresses = checksum_replace(addresses, from->source.words[i], to->source.words[i]);
		addresses = checksum_replace(addresses, from->destination.words[i], to->destination.words[i]);
	}

	if (packet->ipv6) {
		struct ipv6hdr *ip = data + L3_OFFSET;

		/* Both addresses are written. */
		if ((void *)(ip + 1) > data_end)
			return -1;
		__builtin_memcpy(ip->saddr, &to->source, sizeof(ip->saddr));
		__builtin_memcpy(ip->daddr, &to->destination, sizeof(ip->daddr));
	} else {
		struct iphdr *ip = data + L3_OFFSET;

		/* Both addresses and the header's checksum are written. */
		if ((void *)(ip + 1) > data_end)
			return -1;
		ip->saddr = to->source.words[3];
		ip->daddr = to->destination.words[3];
		ip->check = checksum_finish(checksum_start(ip->check) + addresses);
	}

	/* The verifier's bound, as in the parser. */
	if (offset > L4_OFFSET_MAX)
		return -1;
	offset = bounded_l4(offset);

	__u64 sum = addresses;

	sum = checksum_replace(sum, from->source_port, to->source_port);
	sum = checksum_replace(sum, from->destination_port, to->destination_port);
	/* checksum_replace complements 32 bits of a 16-bit port: the upper half adds 0xffff, which is 0 in
	 * one's complement. */

	if (from->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + offset;

		/* Ports and checksum are written. */
		if ((void *)(tcp + 1) > data_end)
			return -1;
		tcp->source = to->source_port;
		tcp->dest = to->destination_port;
		tcp->check = checksum_finish(checksum_start(tcp->check) + sum);
		return 0;
	}

	struct udphdr *udp = data + offset;

	/* Ports and checksum are written. */
	if ((void *)(udp + 1) > data_end)
		return -1;
	udp->source = to->source_port;
	udp->dest = to->destination_port;
	/* RFC 768: 0 says there is none; one that comes out as 0 is sent as its other form. */
	if (udp->check) {
		__sum16 check = checksum_finish(checksum_start(udp->check) + sum);

		udp->check = check ? check : 0xffff;
	}
	return 0;
}

/* Takes one hop off the packet's life. */
static __always_inline int xdp_decrement_ttl(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;

	if (packet->ipv6) {
		struct ipv6hdr *ip = data + L3_OFFSET;

		/* The hop limit is written. */
		if ((void *)(ip + 1) > data_end)
			return -1;
		ip->hop_limit--;
		return 0;
	}

	struct iphdr *ip = data + L3_OFFSET;

	/* The TTL and the checksum are written. */
	if ((void *)(ip + 1) > data_end)
		return -1;
	ip->ttl--;
	ip->check = checksum_finish(checksum_replace(checksum_start(ip->check), TTL_STEP, 0));
	return 0;
}

/* The same as xdp_translate for a socket buffer, whose checksum may still be the sending card's to finish. */
static __always_inline int skb_translate(struct __sk_buff *skb, const struct packet *packet,
					 const struct connection *to)
{
	const struct flow *from = &packet->flow;
	bool tcp = from->protocol == IPPROTO_TCP;
	__u32 offset = packet->l4_offset;
	__u32 check = offset + (tcp ? 16 : 6); /* of the checksum in the TCP or UDP header */
	__u64 mangled = tcp ? 0 : BPF_F_MARK_MANGLED_0;
	__be16 ports[2] = {to->source_port, to->destination_port};

	__s64 addresses = bpf_csum_diff((__be32 *)&from->source, 2 * sizeof(struct address),
					(__be32 *)&to->source, 2 * sizeof(struct address), 0);
	if (addresses < 0)
		return -1;
	if (bpf_l4_csum_replace(skb, check, 0, addresses, BPF_F_PSEUDO_HDR | mangled))
		return -1;
	if (bpf_l4_csum_replace(skb, check, *(__u32 *)&from->source_port, *(__u32 *)ports, 4 | mangled))
		return -1;
	if (bpf_skb_store_bytes(skb, offset, ports, sizeof(ports), 0))
		return -1;

	if (packet->ipv6) {
		/* The two addresses stand side by side in the header as in the row. */
		return bpf_skb_store_bytes(skb, L3_OFFSET + 8, &to->source, 2 * sizeof(struct address), 0);
	}
	if (bpf_l3_csum_replace(skb, L3_OFFSET + 10, 0, addresses, 0))
		return -1;

	__be32 pair[2] = {to->source.words[3], to->destination.words[3]};

	return bpf_skb_store_bytes(skb, L3_OFFSET + 12, pair, sizeof(pair), 0);
}
