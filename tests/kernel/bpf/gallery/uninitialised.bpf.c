// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A register is read that nobody wrote.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u64 sum = 0;
#ifdef MENDED
	asm volatile("r7 = 1" ::: "r7");
#endif
	asm volatile("%0 += r7" : "+r"(sum)); // refused
	return sum ? XDP_PASS : XDP_DROP;
}
