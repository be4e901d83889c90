/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program of each type that does nothing: what a run costs before any work is done. */
#include "kernel.h"
#include <bpf/bpf_helpers.h>

SEC("xdp")
int empty_xdp(void *context __attribute__((unused)))
{
	return 2; /* XDP_PASS */
}

SEC("tc")
int empty_sched_cls(void *context __attribute__((unused)))
{
	return -1; /* TC_ACT_UNSPEC */
}

SEC("raw_tracepoint/xdp_exception")
int empty_raw_tracepoint(void *context __attribute__((unused)))
{
	return 0;
}

SEC("syscall")
int empty_syscall(void *context __attribute__((unused)))
{
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
