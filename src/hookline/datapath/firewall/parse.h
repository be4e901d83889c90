/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a packet is to the firewall: its connection, and what of its headers matters to that one.
 *
 * Most packets are TCP or UDP right behind a plain IP header, and read in place (parse_plain). All others are
 * read by copies (parse_rest), which finds headers that do not lie in the linear part of a socket buffer,
 * too: a sender could otherwise hide its ports there.
 */
#pragma once

#include "maps.h"

enum kind {
	KIND_FLOW,	     /* the key is whole */
	KIND_UNTRACKED,	     /* ICMP that neither asks nor answers: the key is whole, and there is no row */
	KIND_ICMP_ERROR,     /* the same, and it quotes a packet at quoted_offset */
	KIND_LATER_FRAGMENT, /* the key has no ports */
	KIND_MANY_HEADERS,   /* the key has no ports and no protocol */
	KIND_TINY_FRAGMENT,
	KIND_BAD_CHAIN, /* IPv6, its extension headers are not whole */
	KIND_BAD_L4,
	/* Without addresses to go by, or for the link alone: from here on. */
	KIND_MAPPED, /* IPv6 with an address that stands for one of IPv4: none is sent so */
	KIND_VLAN,   /* a tag is left, though the kernel took one off */
	KIND_LINK,   /* neighbour discovery and the like: of this link alone */
	KIND_ARP,
	KIND_NOT_IP,
	KIND_BAD_IPV4,
	KIND_BAD_IPV6,
	KIND_REST, /* not known yet: for parse_rest */
};

/* A packet on its way. */
struct subject {
	struct track_key key;
	__u32 generation;
	__u32 length;
	__u32 quoted_offset;
	__be32 fragment_id;
	__u8 direction;
	__u8 host; /* its local end is the node itself */
	__u8 kind;
	__u8 tcp_flags;
	__u8 opens; /* asks for a connection: never a part of an earlier one in the other direction */
	__u8 first_fragment; /* of several */
	__u8 fragment_protocol;
	__u8 exempt;  /* sent by the node itself, or in its name */
	__u8 hairpin; /* came by the interface that it leaves by */
	__u8 answers; /* agrees to a connection: enum answer */
	__u8 spoofed; /* its source is not where it came from */
	__u8 pad;
};

/* SCTP's end answers an INIT even in the middle of an association, and goes on with that unless the other one
 * goes on, too (RFC 9260, 5.2): for a row that is allowed its COOKIE ACK counts, for one that is cut, which
 * lets nothing else through, the INIT ACK. */
enum answer {
	ANSWER_FIRST = 1,
	ANSWER_LAST = 2,
};

#define ICMP_ECHOREPLY	  0
#define ICMP_UNREACH	  3
#define ICMP_SOURCEQUENCH 4
#define ICMP_ECHO	  8
#define ICMP_TIMXCEED	  11
#define ICMP_PARAMPROB	  12
#define ICMP6_ECHO	  128
#define ICMP6_ECHOREPLY	  129
#define MLD_QUERY	  130
#define MLD_DONE	  132
#define ND_ROUTER_SOLICIT 133
#define ND_REDIRECT	  137
#define MLD2_REPORT	  143
#define ETH_P_ARP	  0x0806
#define IPPROTO_SCTP	  132
#define SCTP_INIT	  1
#define SCTP_INIT_ACK	  2
#define SCTP_COOKIE_ACK	  11
#define IPPROTO_DCCP	  33
#define IPPROTO_UDPLITE	  136
#define ETH_P_8021Q	  0x8100
#define ETH_P_8021AD	  0x88a8

#define IP_OFFSET_MASK	  0x1fff
#define IP_MORE_FRAGMENTS 0x2000

static __always_inline void set_ends(struct subject *subject, __u8 direction, __be16 source_port,
				     __be16 destination_port)
{
	subject->key.local_port = direction == DIRECTION_EGRESS ? source_port : destination_port;
	subject->key.remote_port = direction == DIRECTION_EGRESS ? destination_port : source_port;
}

static __always_inline struct address *source_of(struct track_key *key, __u8 direction)
{
	return direction == DIRECTION_EGRESS ? &key->local : &key->remote;
}

static __always_inline struct address *destination_of(struct track_key *key, __u8 direction)
{
	return direction == DIRECTION_EGRESS ? &key->remote : &key->local;
}

/* Such an address in an IPv6 header would have IPv4's rows. */
static __always_inline bool is_mapped(const __be32 *words)
{
	return !words[0] && !words[1] && words[2] == IPV4_MAPPED;
}

/* TCP or UDP right behind an IP header without options, whole and in the linear part; KIND_REST for all else.
 */
static __always_inline enum kind parse_plain(struct __sk_buff *skb, struct subject *subject, __u8 direction)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip = data + L3_OFFSET;
	struct ipv6hdr *ipv6 = data + L3_OFFSET;
	__u32 length = subject->length - L3_OFFSET;
	struct udphdr *udp;
	__s32 room; /* behind the IP header, as that says */
	__u8 protocol;

	/* Both fixed headers end before it: an IPv4 packet with 8 octets behind its header, an IPv6 header.
	 */
	if ((void *)(ip + 1) + sizeof(*udp) > data_end)
		return KIND_REST;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP)) {
		/* Version 4, no options. */
		if (*(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_OFFSET_MASK))
			return KIND_REST;
		room = bpf_ntohs(ip->tot_len) - sizeof(*ip);
		if (room + sizeof(*ip) > length)
			return KIND_REST;
		address_from_ipv4(source_of(&subject->key, direction), ip->saddr);
		address_from_ipv4(destination_of(&subject->key, direction), ip->daddr);
		protocol = ip->protocol;
		udp = (void *)(ip + 1);
	} else if (ethernet->h_proto == bpf_htons(ETH_P_IPV6)) {
		/* Ports are read behind the header. */
		if ((void *)(ipv6 + 1) + sizeof(*udp) > data_end)
			return KIND_REST;
		room = bpf_ntohs(ipv6->payload_len);
		if (ipv6->version != 6 || room + sizeof(*ipv6) > length || is_mapped(ipv6->saddr) ||
		    is_mapped(ipv6->daddr))
			return KIND_REST;
		address_from_ipv6(source_of(&subject->key, direction), ipv6->saddr);
		address_from_ipv6(destination_of(&subject->key, direction), ipv6->daddr);
		protocol = ipv6->nexthdr;
		udp = (void *)(ipv6 + 1);
	} else {
		return KIND_REST;
	}

	if (protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = (void *)udp;

		/* Its flags are read. */
		if ((void *)(tcp + 1) > data_end || room < (__s32)sizeof(*tcp))
			return KIND_REST;
		subject->tcp_flags = tcp->flags;
	} else if (protocol != IPPROTO_UDP || room < (__s32)sizeof(*udp)) {
		return KIND_REST;
	}
	subject->key.protocol = protocol;
	set_ends(subject, direction, udp->source, udp->dest);
	return KIND_FLOW;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       protocol == IPPROTO_UDPLITE || protocol == IPPROTO_DCCP;
}

static __always_inline bool is_icmp(__u8 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

/* What is read of the header behind IP. */
struct l4 {
	__be16 source_port;
	__be16 destination_port;
	__u8 flags; /* TCP's */
	__u8 type;  /* ICMP's, or of SCTP's first chunk */
};

/* Reads it; -1 where it is not whole before `end`. Of a quoted packet only the first 8 octets need be there.
 */
static __always_inline int read_l4(struct __sk_buff *skb, __u32 offset, __u32 end, __u8 protocol, bool quoted,
				   struct l4 *l4)
{
	__u32 needed = protocol == IPPROTO_TCP && !quoted    ? sizeof(struct tcphdr)
		       : protocol == IPPROTO_SCTP && !quoted ? 12
							     : 8;
	__u8 octets[16] = {};

	if (offset + needed > end && (has_ports(protocol) || is_icmp(protocol)))
		return -1;

	switch (protocol) {
	case IPPROTO_TCP:
		if (quoted ? bpf_skb_load_bytes(skb, offset, octets, 8)
			   : bpf_skb_load_bytes(skb, offset, octets, 14))
			return -1;
		l4->flags = octets[13];
		break;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
		if (bpf_skb_load_bytes(skb, offset, octets, 8))
			return -1;
		break;
	case IPPROTO_SCTP:
		if (quoted ? bpf_skb_load_bytes(skb, offset, octets, 8)
			   : bpf_skb_load_bytes(skb, offset, octets, 12))
			return -1;
		if (!quoted)
			bpf_skb_load_bytes(skb, offset + 12, &l4->type, 1);
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if (bpf_skb_load_bytes(skb, offset, octets, 8))
			return -1;
		l4->type = octets[0];
		/* The identifier of an echo. */
		__builtin_memcpy(&l4->source_port, octets + 4, 2);
		l4->destination_port = l4->source_port;
		return 0;
	default:
		return 0;
	}
	__builtin_memcpy(&l4->source_port, octets, 2);
	__builtin_memcpy(&l4->destination_port, octets + 2, 2);
	return 0;
}

/* A position behind the fixed IPv6 header. */
struct walk {
	__u32 offset;
	__be32 fragment_id;
	__u16 fragment; /* offset and flag, as in the header; 0 for a whole packet */
	__u8 next;
	__u8 fragment_protocol;
	__u8 many; /* headers than are followed */
};

/* RFC 8200, 4: extension headers are walked up to the first one that is none, or behind the header of a
 * fragment that is not the first. The limits are those of packet.h, which reads in place. */
__noinline int walk_extensions(struct __sk_buff *skb, struct walk *walk)
{
	__u8 octets[8];

	if (!skb || !walk)
		return -1;
	/* Unrolled: Linux 6.1 takes a loop whose end is a call for one without an end. */
#pragma unroll
	for (int i = 0; i <= EXTENSION_HEADERS_MAX; i++) {
		__u8 next = walk->next;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return 0;
		if (i == EXTENSION_HEADERS_MAX)
			break;
		if (bpf_skb_load_bytes(skb, walk->offset, octets, sizeof(octets)))
			return -1;
		walk->next = octets[0];
		if (next == IPPROTO_FRAGMENT) {
			walk->offset += 8;
			walk->fragment = ((octets[2] << 8) | octets[3]) & 0xfff9;
			walk->fragment_protocol = octets[0];
			__builtin_memcpy(&walk->fragment_id, octets + 4, 4);
			if (walk->fragment & 0xfff8)
				return 0;
		} else if (next == IPPROTO_AH) {
			walk->offset += (octets[1] + 2) * 4;
		} else {
			walk->offset += (octets[1] + 1) * 8;
		}
	}
	walk->many = true;
	return 0;
}

static __always_inline bool is_link_local(const struct address *address)
{
	return (address->words[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* RFC 4861: a hop limit of 255 says that no router was passed; RFC 2710: listeners' messages have 1. A link's
 * own addresses on one side say that no router will be. */
static __always_inline bool is_link_message(struct subject *subject, __u8 direction, __u8 type, __u8 hops)
{
	struct address *source = source_of(&subject->key, direction);
	struct address *destination = destination_of(&subject->key, direction);
	bool unspecified = !(source->words[0] | source->words[1] | source->words[2] | source->words[3]);

	if (!(is_link_local(source) || unspecified || is_link_local(destination) ||
	      (destination->words[0] & bpf_htonl(0xffff0000)) == bpf_htonl(0xff020000)))
		return false;
	if (type >= ND_ROUTER_SOLICIT && type <= ND_REDIRECT)
		return hops == 255;
	return hops == 1 && ((type >= MLD_QUERY && type <= MLD_DONE) || type == MLD2_REPORT);
}

static __always_inline enum kind icmp_kind(struct subject *subject, __u8 direction, const struct l4 *l4,
					   __u32 offset, __u8 hops)
{
	bool six = subject->key.protocol == IPPROTO_ICMPV6;

	if (l4->type == (six ? ICMP6_ECHO : ICMP_ECHO) ||
	    l4->type == (six ? ICMP6_ECHOREPLY : ICMP_ECHOREPLY)) {
		subject->opens = l4->type == (six ? ICMP6_ECHO : ICMP_ECHO);
		set_ends(subject, direction, l4->source_port, l4->destination_port);
		return KIND_FLOW;
	}
	subject->quoted_offset = offset + sizeof(struct icmphdr);
	if (six && is_link_message(subject, direction, l4->type, hops))
		return KIND_LINK;
	if (six ? l4->type >= 1 && l4->type <= 4
		: l4->type == ICMP_UNREACH || l4->type == ICMP_SOURCEQUENCH || l4->type == ICMP_TIMXCEED ||
			    l4->type == ICMP_PARAMPROB)
		return KIND_ICMP_ERROR;
	return KIND_UNTRACKED;
}

/* Everything that parse_plain left. */
static __always_inline enum kind parse_rest(struct __sk_buff *skb, struct subject *subject)
{
	__u8 direction = subject->direction, hops;
	__u32 length = subject->length - L3_OFFSET, end;
	struct walk walk = {};
	struct l4 l4 = {};
	__be16 type;
	int broken = 0;

	subject->tcp_flags = 0;
	if (bpf_skb_load_bytes(skb, L3_OFFSET - sizeof(type), &type, sizeof(type)))
		return KIND_NOT_IP;
	if (type == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &ip, sizeof(ip)))
			return KIND_BAD_IPV4;

		__u32 header = ip.ihl * 4, total = bpf_ntohs(ip.tot_len);

		/* What the kernel's own receive path refuses (ip_rcv_core). A super-packet of more than 64
		 * KiB says 0. */
		if (!total && length > 0xffff)
			total = length;
		if (ip.version != 4 || header < sizeof(ip) || total < header || total > length)
			return KIND_BAD_IPV4;
		end = L3_OFFSET + total;
		address_from_ipv4(source_of(&subject->key, direction), ip.saddr);
		address_from_ipv4(destination_of(&subject->key, direction), ip.daddr);
		walk.offset = L3_OFFSET + header;
		walk.next = ip.protocol;
		walk.fragment =
			bpf_ntohs(ip.frag_off) << 3 | (ip.frag_off & bpf_htons(IP_MORE_FRAGMENTS) ? 1 : 0);
		walk.fragment_id = ip.id;
		walk.fragment_protocol = ip.protocol;
		hops = ip.ttl;
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, L3_OFFSET, &ip, sizeof(ip)))
			return KIND_BAD_IPV6;
		if (ip.version != 6 || sizeof(ip) + bpf_ntohs(ip.payload_len) > length)
			return KIND_BAD_IPV6;
		end = L3_OFFSET + sizeof(ip) + bpf_ntohs(ip.payload_len);
		/* The same, with a jumbo payload. */
		if (end == L3_OFFSET + sizeof(ip) && length > 0xffff)
			end = subject->length;
		address_from_ipv6(source_of(&subject->key, direction), ip.saddr);
		address_from_ipv6(destination_of(&subject->key, direction), ip.daddr);
		walk.offset = L3_OFFSET + sizeof(ip);
		walk.next = ip.nexthdr;
		hops = ip.hop_limit;
		if (is_mapped(ip.saddr) || is_mapped(ip.daddr))
			return KIND_MAPPED;
		broken = walk_extensions(skb, &walk);
	} else {
		if (type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD))
			return KIND_VLAN;
		return type == bpf_htons(ETH_P_ARP) ? KIND_ARP : KIND_NOT_IP;
	}

	subject->first_fragment = walk.fragment && !(walk.fragment & 0xfff8);
	subject->fragment_id = walk.fragment_id;
	subject->fragment_protocol = walk.fragment_protocol;
	if (broken)
		return KIND_BAD_CHAIN;
	if (walk.many)
		return KIND_MANY_HEADERS;
	subject->key.protocol = walk.next;
	if (walk.fragment & 0xfff8) {
		/* One of 8 octets into TCP's header would replace its flags behind our back. */
		if (walk.next == IPPROTO_TCP && (walk.fragment & 0xfff8) == 8)
			return KIND_TINY_FRAGMENT;
		return KIND_LATER_FRAGMENT;
	}
	if (read_l4(skb, walk.offset, end, walk.next, false, &l4))
		return KIND_BAD_L4;
	if (walk.next == (type == bpf_htons(ETH_P_IP) ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return icmp_kind(subject, direction, &l4, walk.offset, hops);
	/* The other family's ICMP is a protocol as any other. */
	if (walk.next == IPPROTO_ICMP || walk.next == IPPROTO_ICMPV6)
		return KIND_FLOW;
	subject->tcp_flags = l4.flags;
	if (walk.next == IPPROTO_SCTP) {
		subject->opens = l4.type == SCTP_INIT;
		subject->answers = l4.type == SCTP_INIT_ACK	? ANSWER_FIRST
				   : l4.type == SCTP_COOKIE_ACK ? ANSWER_LAST
								: 0;
	}
	set_ends(subject, direction, l4.source_port, l4.destination_port);
	return KIND_FLOW;
}

/* The connection that an ICMP error speaks of: the packet that it quotes went the other way. Returns -1 where
 * that has no ports to be known by. */
__noinline int parse_quoted(struct __sk_buff *skb, const struct subject *subject, struct subject *quoted)
{
	struct walk walk = {};
	struct l4 l4 = {};
	__u8 direction;

	if (!skb || !subject || !quoted)
		return -1;
	direction = !subject->direction;
	walk.offset = subject->quoted_offset;

	if (subject->key.protocol == IPPROTO_ICMP) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, walk.offset, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return -1;
		address_from_ipv4(source_of(&quoted->key, direction), ip.saddr);
		address_from_ipv4(destination_of(&quoted->key, direction), ip.daddr);
		if (ip.frag_off & bpf_htons(IP_OFFSET_MASK))
			return -1;
		walk.offset += ip.ihl * 4;
		walk.next = ip.protocol;
	} else {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, walk.offset, &ip, sizeof(ip)) || ip.version != 6 ||
		    is_mapped(ip.saddr) || is_mapped(ip.daddr))
			return -1;
		address_from_ipv6(source_of(&quoted->key, direction), ip.saddr);
		address_from_ipv6(destination_of(&quoted->key, direction), ip.daddr);
		walk.offset += sizeof(ip);
		walk.next = ip.nexthdr;
		if (walk_extensions(skb, &walk) || walk.many || walk.fragment & 0xfff8)
			return -1;
	}
	if (read_l4(skb, walk.offset, subject->length, walk.next, true, &l4))
		return -1;
	quoted->key.protocol = walk.next;
	quoted->key.interface = subject->key.interface;
	quoted->generation = subject->generation;
	quoted->host = subject->host;
	set_ends(quoted, direction, l4.source_port, l4.destination_port);
	return 0;
}
