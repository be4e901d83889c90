// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A helper for socket buffers, called where there is none yet.
#include "types.h"

#ifdef MENDED
SEC("tc") int example(struct __sk_buff *ctx)
#else
SEC("xdp") int example(struct xdp_md *ctx)
#endif
{
	__u8 byte = 1;
	bpf_skb_store_bytes((void *)ctx, 0, &byte, 1, 0); // refused
	return 0;
}
