/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services for the sockets of this node: the address is exchanged when the application says it, not in each
 * packet.
 *
 *   connect4/6      the service's address becomes a backend's before the kernel connects
 *   sendmsg4/6      the same for each datagram of a socket that is not connected
 *   recvmsg4/6      a datagram of a backend is shown as the service's
 *   getpeername4/6  so is the peer of a connected socket
 *
 * They run for the sockets that were made in the node's cgroup or below it, in the context of the process
 * that calls, with the socket locked. The tables are those that XDP reads. What is no service's is left as it
 * is.
 *
 * An IPv4-mapped address of an IPv6 socket (::ffff:a.b.c.d) is written as it is in the tables, so such a
 * socket needs no code of its own. The kernel asks the IPv4 program when such a socket sends a datagram, and
 * the IPv6 program when it connects or receives.
 */
#pragma once

#include "affinity.h"
#include "maps.h"
#include "peers.h"
#include "pods.h"
#include "select.h"

#define DNS_PORT 53

/* Backends tried for a datagram socket until one is no other service's of the same socket. */
#define CHOICES 4

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct peers);
} datagrams SEC(".maps");

/* Two rows for each peer. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct peer_key);
	__type(value, struct peer);
} spilled_peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct pod_key);
	__type(value, struct pod);
} pods SEC(".maps");

/* Sums over the node; the services' and backends' own are in their metrics. */
struct socket_metrics {
	__u64 connected;  /* connections that were given a backend */
	__u64 associated; /* pairs of a datagram socket and a service that were given one */
	__u64 captured;	  /* DNS queries' sockets that were given a resolver */
	__u64 refused_no_backend;
	__u64 refused_no_resolver; /* the resolver has no address of that family */
	__u64 refused_no_memory;   /* the kernel had no storage for the socket */
	__u64 refused_internal;	   /* tables that contradict each other */
	__u64 spilled;		   /* peers moved out of a socket's storage */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct socket_metrics);
} socket_metrics SEC(".maps");

/* What a program answers the kernel. */
enum {
	SOCKET_REFUSED = 0,
	SOCKET_PROCEED = 1,
};

enum choice {
	CHOICE_NONE,	/* not ours */
	CHOICE_REFUSED, /* the error is set */
	CHOICE_MADE,
	CHOICE_OPEN, /* a service's: a backend is still to be chosen */
};

/* XDP may interrupt a program of a process on the same CPU: only one instruction counts for both. */
static __always_inline void count_one(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

static __always_inline struct socket_metrics *socket_metrics_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&socket_metrics, &zero);
}

#define COUNT_SOCKET(member)                                         \
	do {                                                         \
		struct socket_metrics *here = socket_metrics_here(); \
                                                                     \
		if (here)                                            \
			count_one(&here->member);                    \
	} while (0)

static __always_inline enum choice refuse_socket(int error)
{
	bpf_set_retval(-error);
	return CHOICE_REFUSED;
}

static __always_inline bool is_from(const struct peer *peer, const struct address *address, __be16 port)
{
	return peer->protocol && peer->port == port && address_equal(&peer->address, address);
}

static __always_inline bool is_for(const struct peer *peer, const struct address *address, __be16 port)
{
	return peer->protocol && peer->asked_port == port && address_equal(&peer->asked, address);
}

static __always_inline bool is_loopback(const struct address *address)
{
	const __be32 *words = address->words;

	if (words[0] || words[1])
		return false;
	return words[2] == IPV4_MAPPED ? (words[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000)
				       : !words[2] && words[3] == bpf_htonl(1);
}

/* The service's row for this node's sockets, else the one that is for all. */
static __always_inline struct service *service_for_socket(struct service_key *key, __u64 netns)
{
	struct service *service;

	key->scope = SCOPE_INSIDE;
	service = bpf_map_lookup_elem(&services, key);
	/* A pod's loopback is its own: the host's node ports are not there. Without a socket the cookie is
	 * the first namespace's. */
	if (service && is_loopback(&key->address) && netns != bpf_get_netns_cookie(NULL))
		return NULL;
	if (service && service->flags & SERVICE_REDIRECT) {
		struct pod_key pod = {.netns = netns, .pool = service->pool};

		/* What takes the place of a service must still reach the service itself. */
		if (bpf_map_lookup_elem(&pods, &pod))
			service = NULL;
	}
	if (service)
		return service;
	key->scope = SCOPE_ANY;
	return bpf_map_lookup_elem(&services, key);
}

/* Whether a pod's queries go to a resolver: the key is changed to that one's address. */
static __always_inline enum choice capture(struct service_key *key, __u64 netns)
{
	struct pod_key own = {.netns = netns};
	struct pod *pod;
	struct resolver *resolver;

	if (key->port != bpf_htons(DNS_PORT))
		return CHOICE_NONE;
	pod = bpf_map_lookup_elem(&pods, &own);
	if (!pod || !(pod->flags & POD_CAPTURE_DNS))
		return CHOICE_NONE;

	bool ipv4 = key->address.words[0] == 0 && key->address.words[1] == 0 &&
		    key->address.words[2] == IPV4_MAPPED;

	resolver = ipv4 ? &pod->resolvers[0] : &pod->resolvers[1];
	if (!resolver->port) {
		COUNT_SOCKET(refused_no_resolver);
		return refuse_socket(ECONNREFUSED);
	}
	key->address = resolver->address;
	key->port = resolver->port;
	return CHOICE_MADE;
}

/* What a socket asks for with `key`, by what is wanted now: a service, whose row is copied since its memory
 * may become another row's at any time, or a resolver that is none's. What was asked is noted in `peer`. */
static __always_inline enum choice look_up(struct bpf_sock_addr *ctx, struct service_key *key,
					   struct peer *peer, struct service *service)
{
	__u64 netns = bpf_get_netns_cookie(ctx);

	peer->asked = key->address;
	peer->asked_port = key->port;
	peer->protocol = key->protocol;

	enum choice captured = capture(key, netns);

	if (captured == CHOICE_REFUSED)
		return captured;

	const struct service *found = service_for_socket(key, netns);

	if (found) {
		*service = *found;
		return CHOICE_OPEN;
	}
	peer->address = key->address;
	peer->port = key->port;
	return captured;
}

/* Gives a socket one of a service's backends. */
static __always_inline enum choice choose_peer(struct bpf_sock_addr *ctx, const struct service *service,
					       __u32 hash, struct peer *peer)
{
	struct service_metrics *counters = bpf_map_lookup_elem(&service_metrics, &service->id);

	if (!service->table_size) {
		COUNT_SOCKET(refused_no_backend);
		if (counters)
			count_one(&counters->drops);
		return refuse_socket(ECONNREFUSED);
	}

	struct address client = client_of_netns(bpf_get_netns_cookie(ctx));
	__u32 row = choose_backend(service, &client, hash);
	struct backend *backend = bpf_map_lookup_elem(&backends, &row);

	if (!backend || !(backend->flags & BACKEND_ACTIVE) || backend->pool != service->pool) {
		COUNT_SOCKET(refused_internal);
		if (counters)
			count_one(&counters->drops);
		return refuse_socket(ECONNREFUSED);
	}
	peer->address = backend->address;
	peer->port = backend->port;
	peer->backend = row;
	peer->generation = backend->generation;
	peer->service = service->id;
	peer->pool = service->pool;
	return CHOICE_MADE;
}

/* A connection, or a datagram socket's first datagram to a service. */
static __always_inline void count_chosen(const struct peer *peer)
{
	struct service_metrics *service;
	struct backend_metrics *backend;

	if (!peer->backend) {
		COUNT_SOCKET(captured);
		return;
	}
	service = bpf_map_lookup_elem(&service_metrics, &peer->service);
	if (service)
		count_one(&service->connections);
	backend = bpf_map_lookup_elem(&backend_metrics, &peer->backend);
	if (backend)
		count_one(&backend->connections);
}

static __always_inline enum choice connect_socket(struct bpf_sock_addr *ctx, struct service_key *key,
						  struct peer *peer)
{
	enum choice choice = CHOICE_NONE;
	struct service service = {};
	struct peer *stored;

	key->port = ctx->user_port;
	key->protocol = ctx->protocol;
	if (ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP)
		choice = look_up(ctx, key, peer, &service);
	if (choice == CHOICE_OPEN)
		choice = choose_peer(ctx, &service, bpf_get_prandom_u32(), peer);
	/* A connected datagram socket that is refused another peer keeps the one that it has. */
	if (choice == CHOICE_REFUSED)
		return choice;
	if (choice == CHOICE_NONE) {
		stored = bpf_sk_storage_get(&sockets, ctx->sk, NULL, 0);
		/* Of an earlier connect(): nothing may find the socket by what it was given then. */
		if (stored)
			*stored = (struct peer){};
		return choice;
	}
	stored = bpf_sk_storage_get(&sockets, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!stored) {
		COUNT_SOCKET(refused_no_memory);
		return refuse_socket(ENOMEM);
	}
	*stored = *peer;
	if (peer->backend)
		COUNT_SOCKET(connected);
	count_chosen(peer);
	return choice;
}

/* The peer that a socket is connected to. connect() with AF_UNSPEC asks no program: such a socket is told by
 * its state. */
static __always_inline struct peer *connection_of(struct bpf_sock_addr *ctx)
{
	struct peer *peer = bpf_sk_storage_get(&sockets, ctx->sk, NULL, 0);

	if (peer && peer->protocol == IPPROTO_UDP && ctx->sk->state != TCP_ESTABLISHED)
		return NULL;
	return peer;
}

/* Whether the backend of an earlier datagram still takes them. */
static __always_inline bool is_usable(const struct peer *peer)
{
	struct backend *backend;

	/* A resolver is none's. */
	if (!peer->backend)
		return false;
	backend = bpf_map_lookup_elem(&backends, &peer->backend);
	return backend && backend->flags & BACKEND_ACTIVE && backend->generation == peer->generation &&
	       backend->state != BACKEND_STATE_DOWN;
}

static __always_inline void spill(struct bpf_sock_addr *ctx, struct peer *peer)
{
	struct peer_key key = {
		.socket = bpf_get_socket_cookie(ctx),
		.address = peer->asked,
		.port = peer->asked_port,
	};

	peer->socket = (__u32)key.socket;
	bpf_map_update_elem(&spilled_peers, &key, peer, BPF_ANY);
	key.address = peer->address;
	key.port = peer->port;
	key.reply = 1;
	bpf_map_update_elem(&spilled_peers, &key, peer, BPF_ANY);
	COUNT_SOCKET(spilled);
}

/* A copy: the row may become another socket's at any time, so it is the copy that says whose it is. */
static __always_inline bool spilled_peer(struct bpf_sock_addr *ctx, const struct address *address,
					 __be16 port, bool reply, struct peer *copy)
{
	struct peer_key key = {
		.socket = bpf_get_socket_cookie(ctx),
		.address = *address,
		.port = port,
		.reply = reply,
	};

	const struct peer *found = bpf_map_lookup_elem(&spilled_peers, &key);

	if (!found)
		return false;
	*copy = *found;
	return copy->socket == (__u32)key.socket &&
	       (reply ? is_from(copy, address, port) : is_for(copy, address, port));
}

/* Whether another service of this socket has the same backend: nothing in its answers says which was asked.
 */
static __always_inline bool is_shared(const struct peers *known, const struct peer *peer)
{
	for (int i = 0; i < PEERS; i++)
		if (is_from(&known->rows[i], &peer->address, peer->port) &&
		    !is_for(&known->rows[i], &peer->asked, peer->asked_port))
			return true;
	return false;
}

/* Puts a peer into the socket's storage: in the place of the same service's, or of the oldest. */
static __always_inline bool store_peer(struct bpf_sock_addr *ctx, struct peers *known, struct peer *peer)
{
	if (!known)
		known = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!known)
		return false;

	peer->last_use = ++known->uses;
	for (int i = 0; i < PEERS; i++) {
		if (is_for(&known->rows[i], &peer->asked, peer->asked_port)) {
			known->rows[i] = *peer;
			return true;
		}
	}

	struct peer *oldest = &known->rows[known->next & (PEERS - 1)];

	known->next++;
	if (oldest->protocol) {
		spill(ctx, oldest);
		known->spilled = 1;
	}
	*oldest = *peer;
	return true;
}

/* Whether an earlier datagram's peer is this one's, too: a resolver's address, or one of the service's
 * backends that still takes datagrams. */
static __always_inline bool is_same(const struct peer *earlier, const struct peer *peer, enum choice choice,
				    const struct service *service)
{
	if (choice == CHOICE_OPEN)
		return earlier->pool == service->pool && is_usable(earlier);
	return !earlier->backend && is_from(earlier, &peer->address, peer->port);
}

static __always_inline enum choice send_datagram(struct bpf_sock_addr *ctx, struct service_key *key,
						 struct peer *peer)
{
	struct peers *known = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, 0);
	struct peer *earlier = NULL;
	struct peer *connected = connection_of(ctx);
	struct service service = {};
	struct peer copy = {};
	bool spilled = false;
	enum choice choice;

	key->port = ctx->user_port;
	key->protocol = IPPROTO_UDP;
	/* The kernel takes answers to a connected socket from its peer alone. */
	if (connected && is_for(connected, &key->address, key->port) && is_usable(connected)) {
		*peer = *connected;
		return CHOICE_MADE;
	}
	/* Each time, also where the earlier backend is well: what is wanted may have changed. */
	choice = look_up(ctx, key, peer, &service);
	if (choice == CHOICE_NONE || choice == CHOICE_REFUSED)
		return choice;
	if (known) {
		for (int i = 0; i < PEERS; i++)
			if (is_for(&known->rows[i], &peer->asked, peer->asked_port))
				earlier = &known->rows[i];
		if (!earlier && known->spilled &&
		    spilled_peer(ctx, &peer->asked, peer->asked_port, false, &copy)) {
			earlier = &copy;
			spilled = true;
		}
	}
	if (known && earlier && is_same(earlier, peer, choice, &service)) {
		*peer = *earlier;
		if (spilled)
			store_peer(ctx, known, peer);
		else
			earlier->last_use = ++known->uses;
		return CHOICE_MADE;
	}

	if (choice == CHOICE_OPEN) {
		/* By the socket and not by chance: also a socket whose peer was forgotten goes where it went.
		 */
		__u64 hash = mix(mix(hash_seed ^ bpf_get_socket_cookie(ctx)) ^
				 pair(peer->asked.words[3], peer->asked_port));

		for (int i = 0; i < CHOICES; i++, hash = mix(hash)) {
			choice = choose_peer(ctx, &service, hash, peer);
			if (choice != CHOICE_MADE)
				return choice;
			if (!known || !is_shared(known, peer))
				break;
		}
	}
	if (!store_peer(ctx, known, peer)) {
		COUNT_SOCKET(refused_no_memory);
		return refuse_socket(ENOMEM);
	}
	if (peer->backend)
		COUNT_SOCKET(associated);
	count_chosen(peer);
	return CHOICE_MADE;
}

/* What the application calls the address that it sees; NULL for an address that is no peer's. */
static __always_inline struct peer *connected_peer(struct bpf_sock_addr *ctx, const struct address *address)
{
	struct peer *peer = connection_of(ctx);

	return peer && is_from(peer, address, ctx->user_port) ? peer : NULL;
}

static __always_inline struct peer *datagram_peer(struct bpf_sock_addr *ctx, const struct address *address,
						  struct peer *copy)
{
	struct peer *peer = connected_peer(ctx, address);
	__be16 port = ctx->user_port;

	if (peer)
		return peer;

	struct peers *known = bpf_sk_storage_get(&datagrams, ctx->sk, NULL, 0);

	if (!known)
		return NULL;
	/* Where several have the same backend: the one that was asked last. */
	for (int i = 0; i < PEERS; i++)
		if (is_from(&known->rows[i], address, port) &&
		    (!peer || (__s32)(known->rows[i].last_use - peer->last_use) > 0))
			peer = &known->rows[i];
	if (peer)
		return peer;
	return known->spilled && spilled_peer(ctx, address, port, true, copy) ? copy : NULL;
}

static __always_inline void read_ipv4(struct bpf_sock_addr *ctx, struct address *address)
{
	address_from_ipv4(address, ctx->user_ip4);
}

static __always_inline void read_ipv6(struct bpf_sock_addr *ctx, struct address *address)
{
	address->words[0] = ctx->user_ip6[0];
	address->words[1] = ctx->user_ip6[1];
	address->words[2] = ctx->user_ip6[2];
	address->words[3] = ctx->user_ip6[3];
}

static __always_inline void write_ipv4(struct bpf_sock_addr *ctx, const struct address *address, __be16 port)
{
	ctx->user_ip4 = address->words[3];
	ctx->user_port = port;
}

static __always_inline void write_ipv6(struct bpf_sock_addr *ctx, const struct address *address, __be16 port)
{
	ctx->user_ip6[0] = address->words[0];
	ctx->user_ip6[1] = address->words[1];
	ctx->user_ip6[2] = address->words[2];
	ctx->user_ip6[3] = address->words[3];
	ctx->user_port = port;
}

/* The kernel takes a program of one family for one hook, and the verifier refuses the other family's address:
 * so each function is there twice. */
#define SOCKET_PROGRAMS(VERSION)                                                   \
	SEC("cgroup/connect" #VERSION)                                             \
	int connect##VERSION(struct bpf_sock_addr *ctx)                            \
	{                                                                          \
		struct service_key key = {};                                       \
		struct peer peer = {};                                             \
                                                                                   \
		read_ipv##VERSION(ctx, &key.address);                              \
		enum choice choice = connect_socket(ctx, &key, &peer);             \
                                                                                   \
		if (choice == CHOICE_MADE)                                         \
			write_ipv##VERSION(ctx, &peer.address, peer.port);         \
		return choice == CHOICE_REFUSED ? SOCKET_REFUSED : SOCKET_PROCEED; \
	}                                                                          \
                                                                                   \
	SEC("cgroup/sendmsg" #VERSION)                                             \
	int sendmsg##VERSION(struct bpf_sock_addr *ctx)                            \
	{                                                                          \
		struct service_key key = {};                                       \
		struct peer peer = {};                                             \
                                                                                   \
		read_ipv##VERSION(ctx, &key.address);                              \
		enum choice choice = send_datagram(ctx, &key, &peer);              \
                                                                                   \
		if (choice == CHOICE_MADE)                                         \
			write_ipv##VERSION(ctx, &peer.address, peer.port);         \
		return choice == CHOICE_REFUSED ? SOCKET_REFUSED : SOCKET_PROCEED; \
	}                                                                          \
                                                                                   \
	SEC("cgroup/recvmsg" #VERSION)                                             \
	int recvmsg##VERSION(struct bpf_sock_addr *ctx)                            \
	{                                                                          \
		struct address address;                                            \
		struct peer copy = {};                                             \
                                                                                   \
		read_ipv##VERSION(ctx, &address);                                  \
		struct peer *peer = datagram_peer(ctx, &address, &copy);           \
                                                                                   \
		if (peer)                                                          \
			write_ipv##VERSION(ctx, &peer->asked, peer->asked_port);   \
		return SOCKET_PROCEED;                                             \
	}                                                                          \
                                                                                   \
	SEC("cgroup/getpeername" #VERSION)                                         \
	int getpeername##VERSION(struct bpf_sock_addr *ctx)                        \
	{                                                                          \
		struct address address;                                            \
                                                                                   \
		read_ipv##VERSION(ctx, &address);                                  \
		struct peer *peer = connected_peer(ctx, &address);                 \
                                                                                   \
		if (peer)                                                          \
			write_ipv##VERSION(ctx, &peer->asked, peer->asked_port);   \
		return SOCKET_PROCEED;                                             \
	}

SOCKET_PROGRAMS(4)
SOCKET_PROGRAMS(6)
