// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A write beyond the 512 bytes of a function's stack.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u64 number = ctx->rx_queue_index;
#ifdef MENDED
	asm volatile("*(u64 *)(r10 - 512) = %0" ::"r"(number));
#else
	asm volatile("*(u64 *)(r10 - 520) = %0" ::"r"(number)); // refused
#endif
	return XDP_PASS;
}
