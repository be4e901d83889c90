/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The layouts that the control plane writes and the programs read. Python takes them from BTF.
 *
 * Rows are written in an order that never shows a program half a change: a backend before any table that
 * names it, a table before the service that points to it, the service in one update. Removal goes the other
 * way. A table's pages are never rewritten while a service points to them.
 */
#pragma once

#include "packet.h"

/* Whose packets and connections a row is for. */
enum service_scope {
	SCOPE_ANY = 0,	  /* all: what XDP reads, and a socket of this node where it has no row of its own */
	SCOPE_INSIDE = 1, /* sockets of this node's pods and of the node itself */
};

/* One row for every address, port, protocol and scope that is balanced, and one with port and protocol 0 for
 * the address. */
struct service_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 scope;
};

enum service_flags {
	SERVICE_ADDRESS = 1,  /* the row with port and protocol 0 */
	SERVICE_NODE_OWN = 2, /* the address is the node's own: what no service takes is the stack's */
	SERVICE_MODULO = 4,   /* slot by remainder, not by Maglev */
	SERVICE_REDIRECT = 8, /* scope INSIDE: not for the pods that are its backends: see pods.h */
};

struct service {
	__u32 id;	  /* row in service_metrics */
	__u32 table_page; /* first page in maglev */
	__u32 table_size; /* slots; 0 when there is no backend */
	__u32 flags;
	__u32 affinity_seconds; /* how long a client that is silent keeps its backend; 0: each connection anew
				 */
	__u32 reserved;
	__u64 pool; /* the backends that this row and its sisters share */
	/* For the control plane alone, so that it can adopt what it finds. */
	__u64 fingerprint; /* of all that the table was built from */
};

enum backend_flags {
	BACKEND_ACTIVE = 1, /* the row is in use: row 0 never is */
	BACKEND_LOCAL = 2,  /* on this node: rewritten and passed to the stack */
	BACKEND_DSR = 4,    /* sent to its layer-2 address, unchanged above */
};

/* A backend's life. Tables hold only those that take new connections; the state is for what exists already.
 */
enum backend_state {
	BACKEND_STATE_NONE,
	BACKEND_STATE_STARTING, /* takes a growing share of new connections */
	BACKEND_STATE_ACTIVE,
	BACKEND_STATE_DRAINING, /* connections stay, no client is bound to it any longer */
	BACKEND_STATE_DOWN,	/* as draining, and flows that can move do */
};

struct backend {
	struct address address;
	struct address source; /* of this node, towards it: what nat puts in the client's place */
	__be16 port;
	__u16 generation; /* counts the reuses of this row */
	__u16 flags;
	__u8 state; /* changes in place: it is the same backend */
	__u8 reserved;
	__u64 pool; /* the services that share the row */
};

/* Slots are kept in pages, so that one map holds the tables of all services, each of its own size. */
#define MAGLEV_PAGE_BITS  10
#define MAGLEV_PAGE_SLOTS (1 << MAGLEV_PAGE_BITS)

struct maglev_page {
	__u32 backends[MAGLEV_PAGE_SLOTS];
};

/* Which backend a client has, of a service with session affinity. */
struct affinity_key {
	struct address client; /* or for this node's sockets their network namespace: affinity.h */
	__u64 pool;
};

struct affinity {
	__u32 backend;
	__u16 generation; /* of the backend's row */
	__u16 reserved;
	__u64 last_used_ns; /* CLOCK_MONOTONIC_COARSE, written at most once a second */
};

struct service_metrics {
	__u64 connections;
	__u64 packets;
	__u64 bytes;
	__u64 drops;
};

struct backend_metrics {
	__u64 connections;
	__u64 packets;
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
};
