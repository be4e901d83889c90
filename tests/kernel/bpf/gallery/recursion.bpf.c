// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A function that calls itself: the kernel's stack has no room for an unknown number of calls.
#include "types.h"

#ifdef MENDED
static __noinline __u32 digits(__u32 number)
{
	__u32 found = 1;
	for (int i = 0; i < 10 && number >= 10; i++) {
		number /= 10;
		found++;
	}
	return found;
}
#else
static __noinline __u32 digits(__u32 number)
{
	if (number < 10)
		return 1;
	return digits(number / 10) + bpf_get_prandom_u32(); // refused
}
#endif

SEC("xdp") int example(struct xdp_md *ctx)
{
	return digits(ctx->ingress_ifindex) > 3 ? XDP_DROP : XDP_PASS;
}
