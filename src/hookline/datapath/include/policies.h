/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The firewall's layouts: what the control plane writes and the programs read. Python takes them from BTF.
 *
 * Rows of `endpoints`, `identities`, `rules` and `own_addresses` stand in one of two banks. The programs read
 * the bank that `active.generation` names, by its lowest bit; a change is written into the other one and
 * shown by one store of the next generation. So no packet is judged by half a change.
 */
#pragma once

#include "packet.h"

/* As the pod sees it, or the node where the row is its own: what comes to it, and what it sends. */
enum policy_direction {
	DIRECTION_INGRESS,
	DIRECTION_EGRESS,
	DIRECTIONS,
};

/* Identities below FIRST_CLASS are said here, the others are classes of addresses. */
enum policy_identity {
	IDENTITY_ANY = 0,   /* in keys of rules only */
	IDENTITY_WORLD = 1, /* an address without a row */
	IDENTITY_NODE = 2,  /* this node's own */
	IDENTITY_FIRST_CLASS = 16,
};

enum policy_verdict {
	VERDICT_ALLOW,
	VERDICT_DENY,
	VERDICT_AUDIT, /* passed, and an audited policy would have denied it */
};

/* Why a packet passed or not. Names are what a user reads: POLICY_NO_RULE is shown as "no_rule". */
enum policy_reason {
	POLICY_NONE,
	/* Passed. */
	POLICY_ESTABLISHED,   /* of a connection that was allowed */
	POLICY_RULE,	      /* a new connection, and a rule allows it */
	POLICY_NOT_ISOLATED,  /* no policy is for this direction of the pod */
	POLICY_DEFAULT_ALLOW, /* no rule, and the node's default verdict is to allow */
	POLICY_NODE,	      /* between a pod and its own node */
	POLICY_SELF,	      /* from the pod to itself */
	POLICY_RELATED,	      /* an ICMP error about a connection that was allowed */
	POLICY_ADOPTED,	      /* a reply of a connection that is older than the firewall */
	POLICY_LINK,	      /* ARP, neighbour discovery, multicast listeners: of the link alone */
	POLICY_AUDITED,	      /* allowed, but not by the audited policies */
	/* Dropped: from here on. */
	POLICY_NO_RULE,		 /* isolated, and no rule allows it */
	POLICY_CUT,		 /* of a connection that was allowed once */
	POLICY_SPOOFED_SOURCE,	 /* from where that address is not */
	POLICY_UNKNOWN_ENDPOINT, /* from or to an interface that has no row */
	POLICY_NOT_IP,		 /* neither IP nor ARP, and the pod is isolated */
	POLICY_MALFORMED_IPV4,
	POLICY_MALFORMED_IPV6,
	POLICY_MALFORMED_L4,
	POLICY_EXTENSION_HEADERS, /* more than are followed: its ports are not known, and the pod is isolated
				   */
	POLICY_TINY_FRAGMENT,	  /* RFC 1858: one that would overwrite TCP's flags */
	POLICY_UNKNOWN_FRAGMENT,  /* its first fragment was not seen, and without ports no rule allows it */
	POLICY_INTERNAL,	  /* maps that are not there */
	POLICY_VLAN, /* a tag behind the one that the kernel took off: it is not seen what is in it */
	POLICY_REASONS,
};

#define POLICY_FIRST_DROP POLICY_NO_RULE

/* Which generation is in force, and the settings that may change while programs run. */
struct active {
	__u32 generation;     /* its lowest bit is the bank */
	__u32 sample;	      /* of new allowed connections one in so many is told; 0: none */
	__u64 adopt_until_ns; /* CLOCK_MONOTONIC: until then replies of older connections are adopted */
	/* For the control plane alone. */
	__u64 digest;	  /* of the object and its tunables */
	__u64 flipped_ns; /* CLOCK_MONOTONIC: when this generation came */
};

struct endpoint_key {
	__u32 bank;
	__u32 interface; /* index; 0: the node itself */
};

struct endpoint {
	__u32 rules[DIRECTIONS];	/* rule set; 0: not isolated in that direction */
	__u32 audit[DIRECTIONS];	/* rule set with the audited policies too; 0: none of these */
	__u8 default_allow[DIRECTIONS]; /* what no rule allows passes nevertheless */
	__u8 pad[6];
};

/* Bits of keys that always count: the bank; the bank, the set and the identity. */
#define IDENTITY_KEY_BITS 32
#define RULE_KEY_BITS	  96

struct identity_key {
	__u32 prefix_bits;
	__u32 bank;
	struct address address;
};

struct identity {
	__u32 identity;
	__u32 interface; /* of the pod of this node that has the address; 0: none */
};

struct rule_key {
	__u32 prefix_bits; /* 96: any protocol; 104: any port; up to 120 */
	__u32 bank;
	__u32 set;
	__u32 identity;
	__u8 protocol;
	__u8 port[2]; /* network byte order; of a packet without ports 0, which no port's prefix has */
	__u8 pad;
};

struct rule {
	__u32 rule;   /* row in rule_counts */
	__u8 verdict; /* enum policy_verdict */
	__u8 pad[3];
};

/* Only packets with one of these at the node's end are judged as the node's own. */
struct own_address_key {
	__u32 bank;
	struct address address;
};

/* A connection by its ends: the pod's is the local one, whoever sends, so both directions have one row. */
struct track_key {
	struct address local;
	struct address remote;
	__be16 local_port; /* of an echo: its identifier, in both */
	__be16 remote_port;
	__u8 protocol;
	__u8 pad[3];
	__u32 interface; /* as in endpoint_key */
};

enum track_state {
	TRACK_NEW,     /* packets in one direction only */
	TRACK_REPLIED, /* TCP: answered, and the answer not yet acknowledged */
	TRACK_OPEN,    /* packets in both */
	TRACK_CLOSING, /* TCP: one end has said FIN */
	TRACK_CLOSED,  /* TCP: both have, or one said RST */
};

enum track_flags {
	/* A packet in that direction may change the row, whatever its TCP flags: 1 << enum policy_direction.
	 */
	TRACK_WATCH_INGRESS = 1 << DIRECTION_INGRESS,
	TRACK_WATCH_EGRESS = 1 << DIRECTION_EGRESS,
	TRACK_FIN_INGRESS = 4 << DIRECTION_INGRESS,
	TRACK_FIN_EGRESS = 4 << DIRECTION_EGRESS,
	TRACK_CUT = 16,	   /* not allowed any more */
	TRACK_EXEMPT = 32, /* no policy is asked: the node's own, or what it forwards in its own name */
	/* An end asked for a connection the other way round, and was allowed to; if the other one agrees,
	 * that is what the row is about from then on. */
	TRACK_ASKED = 64,
	TRACK_ASKED_EXEMPT = 128, /* no policy had to allow it */
};

struct track {
	__u64 last_seen_ns; /* CLOCK_MONOTONIC_COARSE, written at most once a second */
	__u32 generation;   /* by which it was judged last */
	__u32 rule;	    /* that allowed it; 0: none had to */
	__u32 timeout_s;    /* silent for longer, it is over */
	__u8 direction;	    /* of its first packet */
	__u8 state;
	__u8 flags;
	__u8 pad;
};

struct fragment_key {
	struct address source;
	struct address destination;
	__be32 id;
	__u32 interface;
	__u8 protocol; /* as the IP or fragment header has it */
	__u8 pad[3];
};

struct fragment {
	__u64 seen_ns; /* CLOCK_MONOTONIC_COARSE */
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol; /* behind all extension headers */
	__u8 pad[3];
};

/* What is told of a packet: one record of the ring `verdicts`. */
struct verdict {
	__u64 at_ns; /* CLOCK_MONOTONIC */
	struct address local;
	struct address remote;
	__be16 local_port;
	__be16 remote_port;
	__u32 interface; /* the packet's */
	__u32 rule;
	__u32 generation;
	__u32 identity; /* of the remote end; 0: it was not asked */
	__u32 bytes;
	__u8 protocol;
	__u8 direction;
	__u8 verdict;
	__u8 reason;
	__u8 tcp_flags;
	__u8 host; /* the local end is the node itself */
	__u8 pad[2];
};
