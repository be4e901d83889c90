/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program of each type that does nothing: what every measurement is held against. */
#include "kernel.h"
#include <bpf/bpf_helpers.h>

SEC("xdp")
int empty_xdp(struct xdp_md *ctx __attribute__((unused)))
{
	return XDP_PASS;
}

SEC("tc")
int empty_sched_cls(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_UNSPEC;
}

SEC("raw_tracepoint/xdp_exception")
int empty_raw_tracepoint(void *ctx __attribute__((unused)))
{
	return 0;
}

SEC("syscall")
int empty_syscall(void *ctx __attribute__((unused)))
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
