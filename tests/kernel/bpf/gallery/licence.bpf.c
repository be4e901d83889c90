// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A helper that the kernel keeps for programs under the GPL, and a program that does not say that it is.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
	static const char layout[] = "seen";
	bpf_trace_printk(layout, sizeof(layout)); // refused
	return XDP_PASS;
}

#ifdef MENDED
char _license[] SEC("license") = "GPL";
#endif
