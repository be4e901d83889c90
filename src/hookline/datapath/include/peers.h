/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is remembered of a socket whose application asked for one address and was given another.
 *
 * A socket that was connected has one peer, in its own storage (the map `sockets`), which ends with it. A
 * datagram socket that is not connected has as many as it sends to: the last ones in its storage
 * (`datagrams`), earlier ones in a table that all sockets share (`spilled_peers`).
 */
#pragma once

#include "packet.h"

struct peer {
	struct address asked;	/* what the application gave */
	struct address address; /* what it got instead: a backend's, or a resolver's */
	__be16 asked_port;
	__be16 port;
	__u32 backend;	  /* row in backends; 0 where it is none's: a resolver */
	__u16 generation; /* of that row */
	__u8 protocol;	  /* 0: there is no peer */
	__u8 pad;
	__u32 service;	/* row in service_metrics */
	__u32 last_use; /* of a datagram socket's: what `peers.uses` was then */
	__u32 socket;	/* of one in spilled_peers: the cookie's lower half */
	__u64 pool;	/* of the service; 0 where there is no backend */
};

/* Peers that a datagram socket keeps in its own storage. */
#define PEERS 4

struct peers {
	struct peer rows[PEERS];
	__u32 next;    /* the row that is written next */
	__u32 spilled; /* 1: earlier ones may be in spilled_peers */
	__u32 uses;    /* datagrams sent to peers */
	__u32 pad;
};

/* A peer of a socket by either of its addresses. */
struct peer_key {
	__u64 socket; /* cookie */
	struct address address;
	__be16 port;
	__u8 reply; /* 0: address is what was asked for; 1: where replies come from */
	__u8 pad[5];
};

/* The load balancer's; what else is loaded takes its place with the same one. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct peer);
} sockets SEC(".maps");
