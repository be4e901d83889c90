// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A pointer is multiplied, which makes sense of no pointer.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u64 place = (__u64)ctx;
#ifdef MENDED
	place = ctx->rx_queue_index;
#endif
	asm volatile("%0 *= 3" : "+r"(place)); // refused
	return place == 7 ? XDP_DROP : XDP_PASS;
}
