// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// One empty program of each type that needs nothing of the kernel but its type.
#include "types.h"

#define EMPTY(section, name, verdict)    \
	SEC(section) int name(void *ctx) \
	{                                \
		return verdict;          \
	}

EMPTY("socket", a_socket_filter, 0)
EMPTY("xdp", a_xdp, 2)
EMPTY("tc", a_sched_cls, 0)
EMPTY("action", a_sched_act, 0)
EMPTY("lwt_in", a_lwt_in, 0)
EMPTY("lwt_xmit", a_lwt_xmit, 0)
EMPTY("cgroup_skb/egress", a_cgroup_skb, 1)
EMPTY("cgroup/sock_create", a_cgroup_sock, 1)
EMPTY("cgroup/connect4", a_cgroup_sock_addr, 1)
EMPTY("cgroup/getsockopt", a_cgroup_sockopt, 1)
EMPTY("cgroup/sysctl", a_cgroup_sysctl, 1)
EMPTY("cgroup/dev", a_cgroup_device, 1)
EMPTY("sockops", a_sock_ops, 1)
EMPTY("sk_msg", a_sk_msg, 1)
EMPTY("sk_skb/stream_verdict", a_sk_skb, 1)
EMPTY("sk_lookup", a_sk_lookup, 1)
EMPTY("sk_reuseport", a_sk_reuseport, 1)
EMPTY("flow_dissector", a_flow_dissector, 0)
EMPTY("syscall", a_syscall, 0)
EMPTY("kprobe/do_nanosleep", a_kprobe, 0)
EMPTY("tp/sched/sched_switch", a_tracepoint, 0)
EMPTY("raw_tp/sched_switch", a_raw_tracepoint, 0)
EMPTY("perf_event", a_perf_event, 0)
EMPTY("tp_btf/sched_switch", a_tracing, 0)

char _license[] SEC("license") = "GPL";
