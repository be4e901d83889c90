// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// The packet's beginning is kept in a variable of 32 bits.
#include "types.h"

SEC("xdp")
int example(struct xdp_md *ctx)
{
#ifdef MENDED
	void *volatile data = (void *)(long)ctx->data;
#else
	volatile int data = ctx->data; // refused
#endif
	return data ? XDP_PASS : XDP_DROP;
}

char _license[] SEC("license") = "GPL";
