/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sockets whose application asked for a service: which there are, and the end of those whose backend is gone.
 *
 *   list_sockets  iterator over the records of sockets: writes a struct live_socket for each connection
 *   destroy_tcp   iterator over a network namespace's TCP sockets: ends those of a doomed backend
 *   destroy_udp   the same for UDP
 *
 * Loaded when it is needed and never pinned. A socket is taken for a backend's only if its own record names
 * the backend's row and generation, and it is connected to the very address that the record says. One that is
 * not connected, one that listens, and one of a program that connected to the same address by itself are
 * never touched.
 */
#include "peers.h"
#include "sock.h"

#include <bpf/bpf_core_read.h>

#define TCP_CLOSE  7
#define TCP_LISTEN 10

struct doomed_key {
	__u32 backend;
	__u16 generation;
	__u16 pad;
};

struct doomed {
	struct address address;
	__be16 port;
	__u16 pad[3];
	__u64 tcp; /* sockets ended */
	__u64 udp;
	__u64 failed;
};

/* Backends whose sockets are to end. Its size is set to their number. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct doomed_key);
	__type(value, struct doomed);
} doomed SEC(".maps");

struct live_socket {
	__u64 cookie;
	struct address local;
	struct address remote;
	struct address asked;
	__u64 pool;
	__u32 netns; /* inode of its network namespace */
	__u32 backend;
	__u32 service;
	__u16 generation;
	__u16 family;
	__be16 local_port;
	__be16 remote_port;
	__be16 asked_port;
	__u8 protocol;
	__u8 state;
};

const struct live_socket *unused_live_socket __attribute__((unused));

extern int bpf_sock_destroy(struct sock_common *socket) __ksym __weak;

/* Set before load where the kernel has that function (Linux 6.5); elsewhere the verifier must not meet the
 * call. */
const volatile __u8 has_sock_destroy = 0;

static __always_inline void remote_address(struct sock_common *socket, struct address *address)
{
	if (socket->skc_family == AF_INET) {
		address_from_ipv4(address, socket->skc_daddr);
		return;
	}
	address->words[0] = socket->skc_v6_daddr.in6_u.u6_addr32[0];
	address->words[1] = socket->skc_v6_daddr.in6_u.u6_addr32[1];
	address->words[2] = socket->skc_v6_daddr.in6_u.u6_addr32[2];
	address->words[3] = socket->skc_v6_daddr.in6_u.u6_addr32[3];
}

static __always_inline void local_address(struct sock_common *socket, struct address *address)
{
	if (socket->skc_family == AF_INET) {
		address_from_ipv4(address, socket->skc_rcv_saddr);
		return;
	}
	address->words[0] = socket->skc_v6_rcv_saddr.in6_u.u6_addr32[0];
	address->words[1] = socket->skc_v6_rcv_saddr.in6_u.u6_addr32[1];
	address->words[2] = socket->skc_v6_rcv_saddr.in6_u.u6_addr32[2];
	address->words[3] = socket->skc_v6_rcv_saddr.in6_u.u6_addr32[3];
}

/* Whether a socket is connected to the peer of its record. A datagram socket that is connected is in the
 * state of an established connection. */
static __always_inline bool is_connected_to(struct sock_common *socket, const struct peer *peer,
					    struct address *remote)
{
	__u8 state = socket->skc_state;

	/* A record without a protocol is of a connection that is over. */
	if (!peer->protocol || !peer->backend || state == TCP_CLOSE || state == TCP_LISTEN)
		return false;
	remote_address(socket, remote);
	return socket->skc_dport == peer->port && address_equal(remote, &peer->address);
}

SEC("iter/bpf_sk_storage_map")
int list_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *socket = ctx->sk;
	struct peer *peer = ctx->value;
	struct live_socket row = {};

	if (!socket || !peer || !is_connected_to(&socket->__sk_common, peer, &row.remote))
		return 0;
	local_address(&socket->__sk_common, &row.local);
	row.cookie = bpf_get_socket_cookie(socket);
	row.netns = BPF_CORE_READ(socket, __sk_common.skc_net.net, ns.inum);
	row.backend = peer->backend;
	row.generation = peer->generation;
	row.service = peer->service;
	row.pool = peer->pool;
	row.asked = peer->asked;
	row.asked_port = peer->asked_port;
	row.family = socket->__sk_common.skc_family;
	row.local_port = bpf_htons(socket->__sk_common.skc_num);
	row.remote_port = socket->__sk_common.skc_dport;
	row.protocol = peer->protocol;
	row.state = socket->__sk_common.skc_state;
	bpf_seq_write(ctx->meta->seq, &row, sizeof(row));
	return 0;
}

static __always_inline void destroy(struct sock_common *socket, __u8 protocol)
{
	struct peer *peer = bpf_sk_storage_get(&sockets, socket, NULL, 0);
	struct address remote;

	if (!peer || peer->protocol != protocol || !is_connected_to(socket, peer, &remote))
		return;

	struct doomed_key key = {.backend = peer->backend, .generation = peer->generation};
	struct doomed *row = bpf_map_lookup_elem(&doomed, &key);

	if (!row || row->port != peer->port || !address_equal(&row->address, &peer->address))
		return;
	if (!has_sock_destroy || bpf_sock_destroy(socket))
		row->failed++;
	else if (protocol == IPPROTO_TCP)
		row->tcp++;
	else
		row->udp++;
}

SEC("iter/tcp")
int destroy_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *socket = ctx->sk_common;

	if (socket)
		destroy(socket, IPPROTO_TCP);
	return 0;
}

SEC("iter/udp")
int destroy_udp(struct bpf_iter__udp *ctx)
{
	struct sock_common *socket = (struct sock_common *)ctx->udp_sk;

	if (socket)
		destroy(socket, IPPROTO_UDP);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
