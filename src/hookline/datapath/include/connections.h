/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The connection table: a flow as it arrives, and what becomes of its packets.
 *
 * A connection that is translated has two rows, one for each direction, which name each other: the addresses
 * that one row writes are the key of the other, turned around. One table serves all CPUs, since the two
 * directions may be received by different ones.
 */
#pragma once

#include "packet.h"

enum connection_kind {
	CONNECTION_NONE,
	CONNECTION_NAT,	  /* to a backend beyond this node: both ends rewritten */
	CONNECTION_DSR,	  /* to a backend beyond this node: destination says where, nothing is rewritten */
	CONNECTION_LOCAL, /* to a backend on this node: destination rewritten, the stack delivers */
	CONNECTION_NAT_REPLY,	/* from a backend beyond this node */
	CONNECTION_LOCAL_REPLY, /* from a backend on this node, met at the uplink's egress */
};

enum connection_flags {
	CONNECTION_CLOSING = 1, /* a FIN or RST went by */
};

struct connection {
	struct address source; /* what the packet's addresses and ports become */
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u32 backend;
	__u16 generation; /* of the backend's row, when the connection was made */
	__u8 kind;
	__u8 flags;
	__u32 service;	    /* row in service_metrics */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC_COARSE, written at most once a second */
};
