/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Making connections: the rows of the connection table for a new flow. */
#pragma once

#include "affinity.h"
#include "maps.h"
#include "select.h"

/* Ports tried for one connection before it is refused. */
#define NAT_PORT_TRIES 32

static __always_inline struct backend *backend_of(const struct connection *connection)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &connection->backend);

	/* The row may have been given to another backend since. */
	if (backend && backend->flags & BACKEND_ACTIVE && backend->generation == connection->generation)
		return backend;
	return NULL;
}

static __always_inline bool is_expired(const struct connection *connection, __u8 protocol, __u64 now)
{
	__u64 limit = connection->flags & CONNECTION_CLOSING ? closed_ns
		      : protocol == IPPROTO_TCP		     ? tcp_idle_ns
							     : udp_idle_ns;

	/* Signed: another CPU may have seen a packet since this one read the clock. */
	return (__s64)(now - connection->last_seen_ns) > (__s64)limit;
}

/* Notes that a packet of the connection went by. Not static: the verifier walks through it once, whoever
 * calls. */
__noinline int touch(struct connection *connection, const struct packet *packet)
{
	/* The verifier asks; no caller gives none. */
	if (!connection || !packet)
		return 0;

	__u64 now = bpf_ktime_get_coarse_ns();
	bool reset = packet->tcp_flags & TCP_RST;

	if (packet->tcp_flags & (TCP_FIN | TCP_RST) && !(connection->flags & CONNECTION_CLOSING))
		connection->flags |= CONNECTION_CLOSING;
	/* A line of memory that is not written stays in every CPU's cache. */
	if (now - connection->last_seen_ns <= 1000000000ULL && !reset)
		return 0;
	connection->last_seen_ns = now;
	if (connection->kind == CONNECTION_DSR)
		return 0;

	/* The other direction's row: it may be silent for long without the connection being idle, and a reset
	 * ends both. */
	struct flow key = {
		.source = connection->destination,
		.destination = connection->source,
		.source_port = connection->destination_port,
		.destination_port = connection->source_port,
		.protocol = packet->flow.protocol,
	};
	struct connection *other = bpf_map_lookup_elem(&connections, &key);

	/* It may have become another connection's since. */
	if (!other || other->destination_port != packet->flow.source_port ||
	    other->source_port != packet->flow.destination_port ||
	    !address_equal(&other->destination, &packet->flow.source) ||
	    !address_equal(&other->source, &packet->flow.destination))
		return 0;
	other->last_seen_ns = now;
	if (reset)
		other->flags |= CONNECTION_CLOSING;
	return 0;
}

/* The row for replies: keyed by the flow that the backend will answer with. */
static __always_inline void reply_row(const struct packet *packet, const struct connection *forward,
				      struct flow *key, struct connection *reply)
{
	key->source = forward->destination;
	key->source_port = forward->destination_port;
	key->destination = forward->source;
	key->destination_port = forward->source_port;
	key->protocol = packet->flow.protocol;

	*reply = *forward;
	reply->source = packet->flow.destination;
	reply->source_port = packet->flow.destination_port;
	reply->destination = packet->flow.source;
	reply->destination_port = packet->flow.source_port;
}

/* Takes a source port towards the backend by writing the reply row under it: one of nat's, or where the
 * client's address stays, first the client's own. A client may use that for another service with the same
 * backend, too. */
static __always_inline enum drop_reason take_source_port(const struct packet *packet,
							 struct connection *forward, __u32 hash, __u64 now)
{
	bool local = forward->kind == CONNECTION_LOCAL;
	__u32 range = nat_port_max - nat_port_min + 1;
	/* Not the bits that chose the backend, or each backend would use a part of the range only. */
	__u32 start = mix(hash);
	struct flow key = {};
	struct connection reply;

	forward->source_port = 0;
	reply_row(packet, forward, &key, &reply);
	reply.kind = local ? CONNECTION_LOCAL_REPLY : CONNECTION_NAT_REPLY;

	__be16 port = local ? packet->flow.source_port : bpf_htons(nat_port_min + start % range);

	for (int i = 0; i < NAT_PORT_TRIES; i++, port = bpf_htons(nat_port_min + ((start + i) % range))) {
		key.destination_port = port;

		struct connection *taken = bpf_map_lookup_elem(&connections, &key);

		if (taken) {
			/* Our own flow's, of an earlier connection or whose forward row was evicted; or one
			 * that is over. */
			bool ours = taken->service == reply.service &&
				    taken->destination_port == reply.destination_port &&
				    address_equal(&taken->destination, &reply.destination);
			if (!ours && !is_expired(taken, key.protocol, now))
				continue;
		}
		if (!bpf_map_update_elem(&connections, &key, &reply, taken ? BPF_ANY : BPF_NOEXIST)) {
			forward->source_port = port;
			return REASON_NONE;
		}
	}
	return REASON_NO_NAT_PORT;
}

/* Chooses a backend and writes the connection's rows. `connection` is filled in. */
static __always_inline enum drop_reason
open_connection(const struct packet *packet, const struct service *service, struct connection *connection)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 hash = flow_hash(&packet->flow);
	__u32 row = choose_backend(service, &packet->flow.source, hash);
	struct backend *backend = bpf_map_lookup_elem(&backends, &row);

	/* Another pool's: the row was given away while this program held the table. */
	if (!backend || !(backend->flags & BACKEND_ACTIVE) || backend->pool != service->pool)
		return REASON_INTERNAL;

	connection->destination = backend->address;
	connection->destination_port = backend->port;
	connection->source = packet->flow.source;
	connection->source_port = packet->flow.source_port;
	connection->backend = row;
	connection->generation = backend->generation;
	connection->service = service->id;
	connection->flags = packet->tcp_flags & (TCP_FIN | TCP_RST) ? CONNECTION_CLOSING : 0;
	connection->last_seen_ns = now;

	if (backend->flags & BACKEND_LOCAL) {
		connection->kind = CONNECTION_LOCAL;
	} else if (backend->flags & BACKEND_DSR) {
		connection->kind = CONNECTION_DSR;
	} else {
		connection->kind = CONNECTION_NAT;
		connection->source = backend->source;
	}
	if (connection->kind != CONNECTION_DSR) {
		enum drop_reason reason = take_source_port(packet, connection, hash, now);

		if (reason != REASON_NONE)
			return reason;
	}

	if (bpf_map_update_elem(&connections, &packet->flow, connection, BPF_ANY))
		return REASON_CONNECTIONS_FULL;
	return REASON_NONE;
}

/* Whether a packet of a known flow must be given a backend anew. */
static __always_inline bool needs_backend(const struct connection *connection, const struct packet *packet)
{
	if (packet->flow.protocol == IPPROTO_TCP) {
		/* Only the start of a connection may go elsewhere: a client that uses its port again, or one
		 * whose backend was removed or went down before it answered. */
		if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
			return false;
		if (connection->flags & CONNECTION_CLOSING)
			return true;
	}

	const struct backend *backend = backend_of(connection);

	/* One that drains keeps what it has. */
	return !backend || backend->state == BACKEND_STATE_DOWN;
}
