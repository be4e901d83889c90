/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Saying no: what a client is told at once when a service has no backend for it, as a host would tell it
 * whose port is closed. A TCP segment gets a reset (RFC 9293, 3.10.7.1), a UDP datagram "port unreachable"
 * (RFC 792, RFC 1812; RFC 4443). The answer is written into the packet's own frame and goes back the way it
 * came.
 *
 * Nobody is answered who did not ask for himself alone: RFC 1122, 3.2.2, and RFC 4443, 2.4, keep errors from
 * answering groups and senders that are no single host. Fragments and ICMP never come here. No answer is
 * larger than what it answers but for the 28 or 48 octets of an error's headers.
 */
#pragma once

#include "checksum.h"
#include "forward.h"
#include "maps.h"
#include "tokens.h"

#define ANSWER_TTL	64
/* RFC 1812, 4.3.2.3: an error is at most 576 octets; RFC 4443, 2.4: 1280. Their own headers are part of it.
 */
#define QUOTED_IPV4_MAX (576 - sizeof(struct iphdr) - sizeof(struct icmphdr))
#define QUOTED_IPV6_MAX (1280 - sizeof(struct ipv6hdr) - sizeof(struct icmphdr))

#define ICMP_DEST_UNREACH   3
#define ICMP_PORT_UNREACH   3
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PORT_UNREACH 4
#define PRECEDENCE_INTERNET 0xc0 /* RFC 1812, 4.3.2.5: errors have precedence 6 */
#define DONT_FRAGMENT	    bpf_htons(0x4000)
#define TCP_HEADER_ONLY	    (5 << 4)

/* Whether an address can only be one host's. */
static __always_inline bool is_one_host(const struct address *address, bool ipv6)
{
	if (ipv6) {
		/* The unspecified address, loopback and all other specials below ::/64; ff00::/8. */
		return (address->words[0] || address->words[1]) &&
		       (address->words[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000);
	}

	__u32 first = bpf_ntohl(address->words[3]) >> 24;

	/* 0/8 is this network, 127/8 loopback, all from 224 on groups, reserved and broadcast. */
	return first != 0 && first != 127 && first < 224;
}

/* The answer's Ethernet and IP headers; what follows them has `length` octets. Returns -1 where the frame is
 * too short, which it was made not to be. */
static __always_inline int write_answer(struct xdp_md *ctx, const struct packet *packet, __u8 protocol,
					__u8 tos, __u32 length, const struct ethhdr *came)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;

	/* The verifier's bound: both headers are written. */
	if (data + L3_OFFSET + sizeof(struct ipv6hdr) > data_end)
		return -1;
	__builtin_memcpy(ethernet->h_dest, came->h_source, sizeof(ethernet->h_dest));
	__builtin_memcpy(ethernet->h_source, came->h_dest, sizeof(ethernet->h_source));
	ethernet->h_proto = came->h_proto;

	if (packet->ipv6) {
		struct ipv6hdr *ip = data + L3_OFFSET;

		*(__be32 *)ip = bpf_htonl(6 << 28);
		ip->payload_len = bpf_htons(length);
		ip->nexthdr = protocol;
		ip->hop_limit = ANSWER_TTL;
		__builtin_memcpy(ip->saddr, &packet->flow.destination, sizeof(ip->saddr));
		__builtin_memcpy(ip->daddr, &packet->flow.source, sizeof(ip->daddr));
		return 0;
	}

	struct iphdr *ip = data + L3_OFFSET;

	*(__u8 *)ip = 0x45;
	ip->tos = tos;
	ip->tot_len = bpf_htons(sizeof(*ip) + length);
	ip->id = 0; /* RFC 6864: means nothing where the packet may not be cut */
	ip->frag_off = DONT_FRAGMENT;
	ip->ttl = ANSWER_TTL;
	ip->protocol = protocol;
	ip->check = 0;
	ip->saddr = packet->flow.destination.words[3];
	ip->daddr = packet->flow.source.words[3];
	ip->check = checksum_finish((__u32)bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0));
	return 0;
}

/* The sum of the pseudo-header, the same in both directions. An IPv4 address' first three words add 0xffff,
 * which is 0 in one's complement. */
static __always_inline __u64 pseudo_header(const struct flow *flow, __u8 protocol, __u32 length)
{
	__u64 sum = (__u64)bpf_htonl(protocol) + bpf_htonl(length);

	for (int i = 0; i < 4; i++)
		sum += (__u64)flow->source.words[i] + flow->destination.words[i];
	return sum;
}

/* Makes the frame a reset of the segment that it holds. */
static __always_inline int write_reset(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	__u32 offset = packet->l4_offset;
	__u32 header = L3_OFFSET + (packet->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	struct ethhdr *ethernet = data;

	/* The verifier's bound, as in the parser. */
	if (offset > L4_OFFSET_MAX)
		return -1;
	offset = bounded_l4(offset);

	struct tcphdr *came = data + offset;

	/* Both headers are read. */
	if ((void *)(ethernet + 1) > data_end || (void *)(came + 1) > data_end)
		return -1;

	struct ethhdr link = *ethernet;
	__u8 flags = came->flags;
	__be32 seq = came->ack_seq, ack = 0;
	__u8 answer = TCP_RST;

	if (!(flags & TCP_ACK)) {
		/* All that the segment takes of the sequence space is acknowledged. */
		__u32 length = packet->l3_length + L3_OFFSET - offset - (came->offset >> 4) * 4;

		length += !!(flags & TCP_SYN) + !!(flags & TCP_FIN);
		seq = 0;
		ack = bpf_htonl(bpf_ntohl(came->seq) + length);
		answer = TCP_RST | TCP_ACK;
	}

	/* Never longer than it was: no options, no extension headers, no padding. */
	if (bpf_xdp_adjust_tail(ctx, (int)(header + sizeof(struct tcphdr)) - (int)(data_end - data)))
		return -1;
	if (write_answer(ctx, packet, IPPROTO_TCP, 0, sizeof(struct tcphdr), &link))
		return -1;

	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;

	struct tcphdr *tcp = data + header;

	/* The whole header is written. */
	if ((void *)(tcp + 1) > data_end)
		return -1;
	tcp->source = packet->flow.destination_port;
	tcp->dest = packet->flow.source_port;
	tcp->seq = seq;
	tcp->ack_seq = ack;
	tcp->offset = TCP_HEADER_ONLY;
	tcp->flags = answer;
	tcp->window = 0;
	tcp->check = 0;
	tcp->urg_ptr = 0;
	tcp->check = checksum_finish(pseudo_header(&packet->flow, IPPROTO_TCP, sizeof(*tcp)) +
				     (__u32)bpf_csum_diff(NULL, 0, (__be32 *)tcp, sizeof(*tcp), 0));
	return 0;
}

#define SUMMED_AT_ONCE 64

/* The sum of all from `offset`, at most L4_OFFSET_MAX, to the packet's end, folded to 16 bits. Not static:
 * the verifier walks through the loops once, and not on through what every one of their ends leads to. */
__noinline int sum_to_end(struct xdp_md *ctx, __u32 offset)
{
	void *data_end = (void *)(long)ctx->data_end;
	void *at = (void *)(long)ctx->data + bounded_l4(offset);
	__u32 whole = 0;

	/* The verifier's bounds on both loops: what is quoted at most with the error's own header, and less
	 * than one round of the first. */
	for (int i = 0; i < (1280 - (int)sizeof(struct ipv6hdr)) / SUMMED_AT_ONCE; i++) {
		if (at + SUMMED_AT_ONCE > data_end)
			break;
		whole = bpf_csum_diff(NULL, 0, at, SUMMED_AT_ONCE, whole);
		at += SUMMED_AT_ONCE;
	}

	__u64 sum = whole;

	for (int i = 0; i < SUMMED_AT_ONCE / 4; i++) {
		if (at + 4 > data_end)
			break;
		sum += *(__u32 *)at;
		at += 4;
	}
	if (at + 2 <= data_end) {
		sum += *(__u16 *)at;
		at += 2;
	}
	/* An odd octet is the first of a pair whose second is 0. */
	if (at + 1 <= data_end)
		sum += bpf_htons(*(__u8 *)at << 8);
	return (__u16)~checksum_finish(sum);
}

/* Makes the frame an error that quotes the datagram which it holds. */
static __always_inline int write_unreachable(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	__u32 room = packet->ipv6 ? QUOTED_IPV6_MAX : QUOTED_IPV4_MAX;
	__u32 quoted = packet->l3_length < room ? packet->l3_length : room;
	__u32 header =
		(packet->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) + sizeof(struct icmphdr);

	/* The layer-2 header is read. */
	if ((void *)(ethernet + 1) > data_end)
		return -1;

	struct ethhdr link = *ethernet;

	/* What is not quoted goes: padding, and what is too much. */
	if (bpf_xdp_adjust_tail(ctx, (int)(L3_OFFSET + quoted) - (int)(data_end - data)) ||
	    bpf_xdp_adjust_head(ctx, -(int)header))
		return -1;
	if (write_answer(ctx, packet, packet->ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP, PRECEDENCE_INTERNET,
			 sizeof(struct icmphdr) + quoted, &link))
		return -1;

	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;

	struct icmphdr *icmp = data + L3_OFFSET + header - sizeof(struct icmphdr);

	/* The whole header is written. */
	if ((void *)(icmp + 1) > data_end)
		return -1;
	icmp->type = packet->ipv6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
	icmp->code = packet->ipv6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
	icmp->check = 0;
	icmp->unused = 0;

	__u64 sum = (__u32)sum_to_end(ctx, L3_OFFSET + header - sizeof(struct icmphdr));

	if (packet->ipv6)
		sum += pseudo_header(&packet->flow, IPPROTO_ICMPV6, sizeof(struct icmphdr) + quoted);
	icmp->check = checksum_finish(sum);
	return 0;
}

/* Answers a packet for a service that has no backend for it. Returns the verdict: XDP_DROP where no answer is
 * due or none may be sent now. Not static: the verifier walks through it once, by itself. */
__noinline int reject(struct xdp_md *ctx, const struct packet *packet)
{
	__u32 zero = 0;
	struct answer_limits *limits = bpf_map_lookup_elem(&answer_limits, &zero);
	struct metrics *metrics = metrics_here();

	/* The verifier asks; every caller gives a packet, and both maps have the row. */
	if (!packet || !limits || !metrics)
		return XDP_ABORTED;

	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	bool tcp = packet->flow.protocol == IPPROTO_TCP;

	/* The layer-2 destination is read. */
	if ((void *)(ethernet + 1) > data_end)
		return XDP_ABORTED;
	/* Sent to a group: who else got it, has answered as well. */
	if (ethernet->h_dest[0] & 1 || !is_one_host(&packet->flow.source, packet->ipv6) ||
	    address_equal(&packet->flow.source, &packet->flow.destination))
		return XDP_DROP;
	if (tcp && packet->tcp_flags & TCP_RST)
		return XDP_DROP;
	if (!take_token(tcp ? &limits->reset_ns : &limits->unreachable_ns,
			tcp ? reset_interval_ns : unreachable_interval_ns,
			tcp ? reset_depth_ns : unreachable_depth_ns))
		return XDP_DROP;
	/* What fails here has changed the packet: it must go nowhere. */
	if (tcp ? write_reset(ctx, packet) : write_unreachable(ctx, packet))
		return XDP_DROP;
	count(&metrics->answered, packet->l3_length);
	return leave_by(ctx, ctx->ingress_ifindex);
}
