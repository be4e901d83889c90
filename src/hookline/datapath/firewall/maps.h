/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The firewall's maps and tunables. Sizes are defaults; those of maps with banks are for both together. */
#pragma once

#include "policies.h"
#include "ring.h"
#include "verdicts.h"

/* Set before load. Seconds that a connection may be silent. */
const volatile __u32 tcp_new_s = 60;
const volatile __u32 tcp_open_s = 28800;
const volatile __u32 tcp_closing_s = 3600;
const volatile __u32 tcp_closed_s = 60;
const volatile __u32 udp_new_s = 30;
const volatile __u32 udp_open_s = 120;
const volatile __u32 sctp_open_s = 3600;
const volatile __u32 icmp_s = 30;
const volatile __u32 other_s = 120;
const volatile __u32 cut_s = 30; /* of a connection that is cut, other than TCP's: from then on */
/* Verdicts that are told, for each CPU: nanoseconds for one, and how many nanoseconds' worth at once. */
const volatile __u64 verdict_interval_ns = 100000;
const volatile __u64 verdict_depth_ns = 100000000;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct active);
} active SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * 4096);
	__type(key, struct endpoint_key);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * 65536);
	__type(key, struct identity_key);
	__type(value, struct identity);
} identities SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * 131072);
	__type(key, struct rule_key);
	__type(value, struct rule);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * 256);
	__type(key, struct own_address_key);
	__type(value, __u32);
} own_addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct track_key);
	__type(value, struct track);
} tracked SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

/* A power of two, so that a mask bounds them. */
#define REASONS_ROOM 32
_Static_assert(POLICY_REASONS <= REASONS_ROOM, "a reason has no place in the counters");

struct firewall_metrics {
	struct tally reasons[DIRECTIONS][REASONS_ROOM];
	__u64 suppressed; /* verdicts that were not told, since there were too many */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct firewall_metrics);
} firewall_metrics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct tally);
} rule_counts SEC(".maps");

/* Up to when each CPU has spent its verdicts. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} verdict_limits SEC(".maps");

RING(verdicts, 1 << 20);
