// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A loop that ends, after more steps than the verifier is willing to walk.
#include "types.h"

#ifdef MENDED
#define ROUNDS 1000
#else
#define ROUNDS 1000000
#endif

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u32 sum = ctx->rx_queue_index;
	for (int i = 0; i < ROUNDS; i++) { // loop
		asm volatile("" : "+r"(sum));
		sum += i;
	}
	return sum & 1 ? XDP_DROP : XDP_PASS;
}
