/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Addresses, flows, and the parsing of a packet's headers into them: the same code for XDP and TC.
 *
 * An IPv4 address is kept as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2), so that one map serves both families.
 */
#pragma once

#include "kernel.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct address {
	__be32 words[4];
};

/* A five-tuple as it stands in the packet. Ports are 0 where the protocol has none or they are not known. */
struct flow {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

#define IPV4_MAPPED bpf_htonl(0xffff)

/* The layer-3 header of every packet that is parsed starts here: a tagged one is left to its VLAN device. */
#define L3_OFFSET sizeof(struct ethhdr)

/* No option or extension header chain that is followed reaches further: lets the verifier bound the offset.
 */
#define L4_OFFSET_MAX 255

/* Extension headers that are followed: a packet with more is one whose port is not known. */
#define EXTENSION_HEADERS_MAX 6

enum parsed {
	PARSED_NOT_IP,	/* nothing in the packet was understood */
	PARSED_FLOW,	/* TCP or UDP: everything below is set */
	PARSED_ADDRESS, /* another protocol or a fragment: only the addresses and the protocol are set */
	PARSED_BAD_IPV4,
	PARSED_BAD_IPV6,
	PARSED_BAD_L4, /* the addresses are set, the TCP or UDP header is not whole */
};

struct packet {
	struct flow flow;
	__u16 l4_offset;
	__u16 l3_length; /* octets from the layer-3 header on, as that header says */
	__u8 ipv6;
	__u8 fragment;
	__u8 ttl;
	__u8 tcp_flags;
};

static __always_inline bool address_equal(const struct address *a, const struct address *b)
{
	return a->words[3] == b->words[3] && a->words[2] == b->words[2] && a->words[1] == b->words[1] &&
	       a->words[0] == b->words[0];
}

static __always_inline void address_from_ipv4(struct address *address, __be32 ipv4)
{
	address->words[0] = 0;
	address->words[1] = 0;
	address->words[2] = IPV4_MAPPED;
	address->words[3] = ipv4;
}

static __always_inline void address_from_ipv6(struct address *address, const __be32 *words)
{
	address->words[0] = words[0];
	address->words[1] = words[1];
	address->words[2] = words[2];
	address->words[3] = words[3];
}

/* An offset that was compared with L4_OFFSET_MAX, in a form that Linux 6.1 can follow: the compiler may
 * compare one copy and use another from the stack, of which that verifier knows nothing. */
static __always_inline __u32 bounded_l4(__u32 offset)
{
	asm volatile("%0 &= %1" : "+r"(offset) : "i"(L4_OFFSET_MAX));
	return offset;
}

static __always_inline enum parsed parse_l4(void *data, void *data_end, struct packet *packet)
{
	__u32 offset = packet->l4_offset;

	/* The verifier's bound; every path that sets l4_offset stays below it. */
	if (offset > L4_OFFSET_MAX)
		return PARSED_BAD_L4;
	offset = bounded_l4(offset);

	if (packet->flow.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + offset;

		/* Ports, flags and checksum are read, and later written, within these 20 octets. */
		if ((void *)(tcp + 1) > data_end)
			return PARSED_BAD_L4;
		/* RFC 9293, 3.1: the data offset counts at least the fixed header, and lies in the packet. */
		__u32 header = (tcp->offset >> 4) * 4;
		if (header < sizeof(*tcp) || offset - L3_OFFSET + header > packet->l3_length)
			return PARSED_BAD_L4;
		packet->flow.source_port = tcp->source;
		packet->flow.destination_port = tcp->dest;
		packet->tcp_flags = tcp->flags;
		return PARSED_FLOW;
	}

	struct udphdr *udp = data + offset;

	/* Ports and checksum are read, and later written, within these 8 octets. */
	if ((void *)(udp + 1) > data_end)
		return PARSED_BAD_L4;
	/* RFC 768: the length counts its own header; what it claims lies in the packet. */
	__u32 length = bpf_ntohs(udp->len);
	if (length < sizeof(*udp) || offset - L3_OFFSET + length > packet->l3_length)
		return PARSED_BAD_L4;
	packet->flow.source_port = udp->source;
	packet->flow.destination_port = udp->dest;
	return PARSED_FLOW;
}

static __always_inline enum parsed parse_ipv4(void *data, void *data_end, __u32 length, struct packet *packet)
{
	struct iphdr *ip = data + L3_OFFSET;

	/* The fixed header is read below. */
	if ((void *)(ip + 1) > data_end)
		return PARSED_BAD_IPV4;

	__u32 header = ip->ihl * 4;
	__u32 total = bpf_ntohs(ip->tot_len);

	/* What the kernel's own receive path refuses (ip_rcv_core) is refused here. */
	if (ip->version != 4 || header < sizeof(*ip) || total < header || total > length)
		return PARSED_BAD_IPV4;

	address_from_ipv4(&packet->flow.source, ip->saddr);
	address_from_ipv4(&packet->flow.destination, ip->daddr);
	packet->flow.protocol = ip->protocol;
	packet->l3_length = total;
	packet->l4_offset = L3_OFFSET + header;
	packet->ttl = ip->ttl;
	/* More fragments follow, or this is not the first one. */
	packet->fragment = (ip->frag_off & bpf_htons(0x3fff)) != 0;

	if (packet->fragment || (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP))
		return PARSED_ADDRESS;
	return parse_l4(data, data_end, packet);
}

static __always_inline enum parsed parse_ipv6(void *data, void *data_end, __u32 length, struct packet *packet)
{
	struct ipv6hdr *ip = data + L3_OFFSET;

	/* The fixed header is read below. */
	if ((void *)(ip + 1) > data_end)
		return PARSED_BAD_IPV6;

	__u32 total = sizeof(*ip) + bpf_ntohs(ip->payload_len);

	if (ip->version != 6 || total > length)
		return PARSED_BAD_IPV6;

	address_from_ipv6(&packet->flow.source, ip->saddr);
	address_from_ipv6(&packet->flow.destination, ip->daddr);
	packet->ipv6 = true;
	packet->l3_length = total;
	packet->ttl = ip->hop_limit;

	__u32 offset = L3_OFFSET + sizeof(*ip);
	__u8 next = ip->nexthdr;

	/* RFC 8200, 4: extension headers are walked up to the first one that is none. */
	for (int i = 0; i < EXTENSION_HEADERS_MAX; i++) {
		if (next == IPPROTO_TCP || next == IPPROTO_UDP)
			break;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			break;

		/* The verifier's bound. A longer chain is left to others; behind it no port is known. */
		if (offset > L4_OFFSET_MAX) {
			packet->flow.protocol = next;
			return PARSED_ADDRESS;
		}
		__u8 *extension = data + offset;
		/* Next header, length and, in a fragment header, its flags are read within 8 octets. */
		if ((void *)(extension + 8) > data_end)
			return PARSED_BAD_IPV6;
		if (next == IPPROTO_FRAGMENT) {
			/* An atomic fragment (RFC 6946) is a whole packet. */
			if (((extension[2] << 8) | extension[3]) & 0xfff9) {
				packet->fragment = true;
				packet->flow.protocol = extension[0];
				return PARSED_ADDRESS;
			}
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (extension[1] + 2) * 4;
		} else {
			offset += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}

	packet->flow.protocol = next;
	if ((next != IPPROTO_TCP && next != IPPROTO_UDP) || offset > L4_OFFSET_MAX)
		return PARSED_ADDRESS;
	packet->l4_offset = offset;
	return parse_l4(data, data_end, packet);
}

/* Fills `packet`, which must be zeroed. `length` is the whole frame's, which data_end need not reach in TC.
 */
static __always_inline enum parsed parse(void *data, void *data_end, __u32 length, struct packet *packet)
{
	struct ethhdr *ethernet = data;

	/* Shorter than its Ethernet header: nothing of it can be read. */
	if ((void *)(ethernet + 1) > data_end)
		return PARSED_NOT_IP;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP))
		return parse_ipv4(data, data_end, length - L3_OFFSET, packet);
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(data, data_end, length - L3_OFFSET, packet);
	return PARSED_NOT_IP;
}
