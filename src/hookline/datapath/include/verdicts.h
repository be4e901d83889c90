/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a program decided and why: counted per CPU, named from BTF. */
#pragma once

#include "kernel.h"

/* Why a packet was refused: dropped, or answered with a refusal. Names are what a user reads:
 * REASON_NO_BACKEND is shown as "no_backend". */
enum drop_reason {
	REASON_NONE,
	REASON_MALFORMED_IPV4,
	REASON_MALFORMED_IPV6,
	REASON_MALFORMED_L4,
	REASON_FRAGMENT,	     /* for a service address; its port is not known */
	REASON_UNSUPPORTED_PROTOCOL, /* for a service address, neither TCP nor UDP */
	REASON_NO_SERVICE,	     /* for a service address, on a port that no service has */
	REASON_NO_BACKEND,	     /* the service has none */
	REASON_NO_NAT_PORT,	     /* every port tried is in use towards that backend */
	REASON_CONNECTIONS_FULL,     /* the connection table took no entry */
	REASON_NO_ROUTE,	     /* to the backend, or back to the client */
	REASON_FORWARDING_DISABLED,  /* ip_forward or its IPv6 twin is 0 on this node */
	REASON_TOO_BIG,		     /* for the MTU of the link it would leave by */
	REASON_NO_METADATA, /* no neighbour yet, and the driver has no room to say so to the TC program */
	REASON_INTERNAL,    /* tables that contradict each other: XDP_ABORTED */
	REASON_COUNT,
};

#define VERDICTS 5

struct tally {
	__u64 packets;
	__u64 bytes;
};

struct metrics {
	struct tally verdicts[VERDICTS]; /* by enum xdp_action */
	struct tally reasons[REASON_COUNT];
	struct tally replies; /* rewritten at the uplink's egress */
	struct tally handed;  /* handed to the stack to resolve a neighbour */
	struct tally
		answered; /* refused with a reset or "port unreachable": counted under their reason, too */
};
