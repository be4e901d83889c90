// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// The kernel's types and numbers that hooks.bpf.c needs, and the counters' places.
#pragma once

#include "types.h"

enum hook {
	HOOK_tracepoint,
	HOOK_kprobe,
	HOOK_kretprobe,
	HOOK_kprobe_multi,
	HOOK_kretprobe_multi,
	HOOK_fentry,
	HOOK_fexit,
	HOOK_fmod_ret,
	HOOK_lsm,
	HOOK_uprobe,
	HOOK_uretprobe,
	HOOK_uprobe_multi,
	HOOK_uretprobe_multi,
	HOOK_raw_tracepoint,
	HOOK_tp_btf,
	HOOK_perf_event,
	HOOK_lsm_cgroup,
	HOOK_xdp,
	HOOK_freplace,
	HOOK_iter_task,
	HOOK_iter_map,
	HOOK_iter_cgroup,
	HOOK_iter_tcp,
	HOOK_tc,
	HOOK_tcx_ingress,
	HOOK_tcx_egress,
	HOOK_netkit_primary,
	HOOK_netkit_peer,
	HOOK_netfilter,
	HOOK_sk_lookup,
	HOOK_flow_dissector,
	HOOK_socket_filter,
	HOOK_sk_reuseport,
	HOOK_sk_msg,
	HOOK_sk_skb_verdict,
	HOOK_sk_skb_stream_parser,
	HOOK_sk_skb_stream_verdict,
	HOOK_cgroup_ingress,
	HOOK_cgroup_egress,
	HOOK_cgroup_skb,
	HOOK_sock_create,
	HOOK_sock_release,
	HOOK_bind4,
	HOOK_bind6,
	HOOK_post_bind4,
	HOOK_post_bind6,
	HOOK_connect4,
	HOOK_connect6,
	HOOK_connect_unix,
	HOOK_sendmsg4,
	HOOK_sendmsg6,
	HOOK_recvmsg4,
	HOOK_recvmsg6,
	HOOK_getpeername4,
	HOOK_getpeername6,
	HOOK_getsockname4,
	HOOK_getsockname6,
	HOOK_sysctl,
	HOOK_device,
	HOOK_getsockopt,
	HOOK_setsockopt,
	HOOK_sock_ops,
	HOOK_syscall,
	HOOKS,
};

enum { BPF_MAP_TYPE_SOCKMAP = 15, BPF_ANY = 0 };
enum { NETKIT_PASS = 0, NF_ACCEPT = 1, SK_PASS = 1, FLOW_DISSECTOR_CONTINUE = 129 };
enum { SOL_IP = 0, IP_TOS = 1 };
enum { ACTIVE_ESTABLISHED = 4, PASSIVE_ESTABLISHED = 5 };

#define MAP(NAME, TYPE, KEY, VALUE, SIZE, FLAGS) \
	struct {                                 \
		__uint(type, TYPE);              \
		__type(key, KEY);                \
		__type(value, VALUE);            \
		__uint(max_entries, SIZE);       \
		__uint(map_flags, FLAGS);        \
	} NAME SEC(".maps")

struct sum {
	__u32 x, y, total;
};

struct bpf_cgroup_dev_ctx {
	__u32 access_type, major, minor;
};

struct bpf_sockopt {
	__u64 sk, optval, optval_end;
	__s32 level, optname, optlen, retval;
};

struct bpf_sock_ops {
	__u32 op;
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct task_struct {
	int pid, tgid;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

struct bpf_iter__bpf_map_elem {
	struct bpf_iter_meta *meta;
	void *map;
	void *key;
	void *value;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct bpf_iter__cgroup {
	struct bpf_iter_meta *meta;
	struct cgroup *cgroup;
};

struct sock_common;

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

#pragma clang attribute pop

#include <bpf/bpf_tracing.h>
