// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A field of the context that this type of program may not write.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
#ifdef MENDED
	volatile __u32 index = ctx->ingress_ifindex;
	index++;
#else
	ctx->ingress_ifindex = 7; // refused
#endif
	return XDP_PASS;
}
