// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A helper is given a length that may be negative, or more than the room there is.
#include "types.h"

SEC("raw_tp/sys_enter") int example(struct bpf_raw_tracepoint_args *ctx)
{
	char room[64] = {};
	int length = ctx->args[1];
#ifdef MENDED
	length &= 63;
#endif
	return bpf_probe_read_kernel(room, length, (void *)ctx->args[0]); // refused
}

char _license[] SEC("license") = "GPL";
