/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The load balancer's maps and tunables. Sizes are defaults: the control plane sets them from NodeConfig. */
#pragma once

#include "connections.h"
#include "services.h"
#include "verdicts.h"

/* Set before load. */
const volatile __u32 hash_seed = 0x686b6c6e; /* the same on every node, so that all choose alike */
/* Source ports of nat: below Kubernetes' node ports, 30000 to 32767, and ip_local_port_range, so that neither
 * a node port nor a connection of the node's own can meet them. */
const volatile __u16 nat_port_min = 10240;
const volatile __u16 nat_port_max = 29999;
/* The ports of programs that ran here before with another range: their connections go on. Empty by default.
 */
const volatile __u16 earlier_port_min = 1;
const volatile __u16 earlier_port_max = 0;
const volatile __u8 tx_by_redirect = 0;		      /* 1 on veth: see send() */
const volatile __u8 check_mtu = 1;		      /* 0 where XDP is generic: it sees super-packets */
const volatile __u64 closed_ns = 10000000000ULL;      /* a closed connection's port may be taken after this */
const volatile __u64 tcp_idle_ns = 28800000000000ULL; /* an idle connection's, after this */
const volatile __u64 udp_idle_ns = 120000000000ULL;
/* Refusals that are sent, for each CPU: nanoseconds for one, and how many nanoseconds' worth at once. Errors
 * 1,000 a second and 250 at once, as few as Linux itself sends of them; resets 50,000 a second and 5,000 at
 * once. */
const volatile __u64 unreachable_interval_ns = 1000000;
const volatile __u64 unreachable_depth_ns = 250000000;
const volatile __u64 reset_interval_ns = 20000;
const volatile __u64 reset_depth_ns = 100000000;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct backend);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct maglev_page);
} maglev SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct flow);
	__type(value, struct connection);
} connections SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct metrics);
} metrics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct service_metrics);
} service_metrics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct backend_metrics);
} backend_metrics SEC(".maps");

/* Exceptions that the kernel reported of our own program, by enum xdp_action. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, VERDICTS);
	__type(key, __u32);
	__type(value, __u64);
} exceptions SEC(".maps");

/* Up to when each CPU has spent its refusals. */
struct answer_limits {
	__u64 unreachable_ns;
	__u64 reset_ns;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct answer_limits);
} answer_limits SEC(".maps");

struct settings {
	__u32 balance_id; /* of the program whose exceptions are counted */
	/* For the control plane alone. */
	__u16 nat_port_min; /* the smallest and the largest port that nat ever gave here */
	__u16 nat_port_max;
	__u64 digest; /* of the object and its tunables */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

static __always_inline struct metrics *metrics_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&metrics, &zero);
}

static __always_inline void count(struct tally *tally, __u32 bytes)
{
	tally->packets++;
	tally->bytes += bytes;
}
