// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// One program for each kind of hook. Each counts its own hits, and lets pass what it meets.
#include "hooks.h"

// Events of other processes are not counted.
const volatile __u32 only_process = 0;
const volatile __u64 system_call = 0;

MAP(hits, BPF_MAP_TYPE_ARRAY, enum hook, __u64, HOOKS, 0);
MAP(sockets, BPF_MAP_TYPE_SOCKMAP, __u32, __u32, 8, 0);
MAP(numbers, BPF_MAP_TYPE_HASH, __u32, __u64, 8, 0);

static __always_inline void hit(__u32 hook)
{
	__u64 *count = bpf_map_lookup_elem(&hits, &hook);
	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline void hit_by_us(__u32 hook)
{
	if (bpf_get_current_pid_tgid() >> 32 == only_process)
		hit(hook);
}

#define EVERY(NAME, SECTION, CONTEXT, RESULT)    \
	SEC(SECTION) int on_##NAME(CONTEXT *ctx) \
	{                                        \
		hit(HOOK_##NAME);                \
		return RESULT;                   \
	}

#define OURS(NAME, SECTION)                   \
	SEC(SECTION) int on_##NAME(void *ctx) \
	{                                     \
		hit_by_us(HOOK_##NAME);       \
		return 0;                     \
	}

// As OURS, where the attachment has a cookie.
#define PROBE(NAME, SECTION)                                                    \
	SEC(SECTION) int on_##NAME(void *ctx)                                   \
	{                                                                       \
		__u32 hook = HOOK_##NAME;                                       \
		__u64 cookie = bpf_get_attach_cookie(ctx);                      \
		if (cookie)                                                     \
			bpf_map_update_elem(&numbers, &hook, &cookie, BPF_ANY); \
		hit_by_us(HOOK_##NAME);                                         \
		return 0;                                                       \
	}

// The kernel's code

PROBE(tracepoint, "tracepoint/syscalls/sys_enter_getppid")
PROBE(kprobe, "ksyscall/getppid")
PROBE(kretprobe, "kretprobe")
PROBE(kprobe_multi, "kprobe.multi")
PROBE(kretprobe_multi, "kretprobe.multi")
OURS(fentry, "fentry")
OURS(fexit, "fexit")
OURS(fmod_ret, "fmod_ret")
OURS(lsm, "lsm/socket_create")
PROBE(uprobe, "uprobe/libc.so.6:a64l")
PROBE(uretprobe, "uretprobe")
PROBE(uprobe_multi, "uprobe.multi")
PROBE(uretprobe_multi, "uretprobe.multi")

SEC("raw_tp/sys_enter") int on_raw_tracepoint(__u64 *ctx)
{
	if (ctx[1] == system_call)
		hit_by_us(HOOK_raw_tracepoint);
	return 0;
}

SEC("tp_btf/sys_enter") int on_tp_btf(__u64 *ctx)
{
	if (ctx[1] == system_call)
		hit_by_us(HOOK_tp_btf);
	return 0;
}

SEC("perf_event") int on_perf_event(void *ctx)
{
	hit(HOOK_perf_event);
	return 0;
}

SEC("lsm_cgroup/socket_create") int on_lsm_cgroup(void *ctx)
{
	hit(HOOK_lsm_cgroup);
	return 1;
}

// A function, and what replaces it

__noinline int decide(struct xdp_md *ctx)
{
	volatile int verdict = XDP_PASS;
	return ctx ? verdict : XDP_ABORTED;
}

SEC("xdp") int on_xdp(struct xdp_md *ctx)
{
	hit(HOOK_xdp);
	return decide(ctx);
}

SEC("freplace") int on_freplace(struct xdp_md *ctx)
{
	hit(HOOK_freplace);
	return XDP_DROP;
}

// Iterators

SEC("iter/task") int on_iter_task(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	if (!task)
		return 0;
	hit(HOOK_iter_task);
	BPF_SEQ_PRINTF(ctx->meta->seq, "%d %d\n", task->tgid, task->pid);
	return 0;
}

SEC("iter/bpf_map_elem") int on_iter_map(struct bpf_iter__bpf_map_elem *ctx)
{
	__u32 *key = ctx->key;
	__u64 *value = ctx->value;
	if (!key || !value)
		return 0;
	hit(HOOK_iter_map);
	bpf_seq_write(ctx->meta->seq, value, sizeof(*value));
	return 0;
}

SEC("iter/cgroup") int on_iter_cgroup(struct bpf_iter__cgroup *ctx)
{
	struct cgroup *cgroup = ctx->cgroup;
	if (!cgroup)
		return 0;
	hit(HOOK_iter_cgroup);
	BPF_SEQ_PRINTF(ctx->meta->seq, "%llu\n", cgroup->kn->id);
	return 0;
}

SEC("iter/tcp") int on_iter_tcp(struct bpf_iter__tcp *ctx)
{
	if (ctx->sk_common)
		hit(HOOK_iter_tcp);
	return 0;
}

// Interfaces

EVERY(tc, "tc", struct __sk_buff, TC_ACT_OK)
EVERY(tcx_ingress, "tcx/ingress", struct __sk_buff, TC_ACT_OK)
EVERY(tcx_egress, "tcx/egress", struct __sk_buff, TC_ACT_OK)
EVERY(netkit_primary, "netkit/primary", struct __sk_buff, NETKIT_PASS)
EVERY(netkit_peer, "netkit/peer", struct __sk_buff, NETKIT_PASS)
EVERY(netfilter, "netfilter", void, NF_ACCEPT)

// Network namespaces

EVERY(sk_lookup, "sk_lookup", void, SK_PASS)
EVERY(flow_dissector, "flow_dissector", struct __sk_buff, FLOW_DISSECTOR_CONTINUE)

// Sockets

EVERY(socket_filter, "socket", struct __sk_buff, -1)
EVERY(sk_reuseport, "sk_reuseport", void, SK_PASS)
EVERY(sk_msg, "sk_msg", void, SK_PASS)
EVERY(sk_skb_verdict, "sk_skb", struct __sk_buff, SK_PASS)
EVERY(sk_skb_stream_parser, "sk_skb/stream_parser", struct __sk_buff, ctx->len)
EVERY(sk_skb_stream_verdict, "sk_skb/stream_verdict", struct __sk_buff, SK_PASS)

// Cgroups

EVERY(cgroup_ingress, "cgroup_skb/ingress", struct __sk_buff, 1)
EVERY(cgroup_egress, "cgroup_skb/egress", struct __sk_buff, 1)
EVERY(cgroup_skb, "cgroup/skb", struct __sk_buff, 1)
EVERY(sock_create, "cgroup/sock_create", void, 1)
EVERY(sock_release, "cgroup/sock_release", void, 1)
EVERY(bind4, "cgroup/bind4", void, 1)
EVERY(bind6, "cgroup/bind6", void, 1)
EVERY(post_bind4, "cgroup/post_bind4", void, 1)
EVERY(post_bind6, "cgroup/post_bind6", void, 1)
EVERY(connect4, "cgroup/connect4", void, 1)
EVERY(connect6, "cgroup/connect6", void, 1)
EVERY(connect_unix, "cgroup/connect_unix", void, 1)
EVERY(sendmsg4, "cgroup/sendmsg4", void, 1)
EVERY(sendmsg6, "cgroup/sendmsg6", void, 1)
EVERY(recvmsg4, "cgroup/recvmsg4", void, 1)
EVERY(recvmsg6, "cgroup/recvmsg6", void, 1)
EVERY(getpeername4, "cgroup/getpeername4", void, 1)
EVERY(getpeername6, "cgroup/getpeername6", void, 1)
EVERY(getsockname4, "cgroup/getsockname4", void, 1)
EVERY(getsockname6, "cgroup/getsockname6", void, 1)
EVERY(sysctl, "cgroup/sysctl", void, 1)

SEC("cgroup/dev") int on_device(struct bpf_cgroup_dev_ctx *ctx)
{
	if (ctx->major == 1 && ctx->minor == 5)
		hit(HOOK_device);
	return 1;
}

SEC("cgroup/getsockopt") int on_getsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->level == SOL_IP && ctx->optname == IP_TOS)
		hit(HOOK_getsockopt);
	return 1;
}

SEC("cgroup/setsockopt") int on_setsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->level == SOL_IP && ctx->optname == IP_TOS)
		hit(HOOK_setsockopt);
	return 1;
}

SEC("sockops") int on_sock_ops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == ACTIVE_ESTABLISHED || ctx->op == PASSIVE_ESTABLISHED)
		hit(HOOK_sock_ops);
	return 1;
}

SEC("syscall") int on_syscall(struct sum *sum)
{
	hit(HOOK_syscall);
	sum->total = sum->x + sum->y;
	return 7;
}

char _license[] SEC("license") = "Dual BSD/GPL";
