// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A byte of the packet is read, and the packet may be shorter.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u8 *data = (void *)(long)ctx->data;
#ifdef MENDED
	if (data + 14 > (__u8 *)(long)ctx->data_end)
		return XDP_PASS;
#endif
	return data[12] == 8 ? XDP_PASS : XDP_DROP; // refused
}
