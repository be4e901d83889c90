// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A program on a cgroup answers with something else than no (0) or yes (1).
#include "types.h"

SEC("cgroup/connect4") int example(void *ctx)
{
#ifdef MENDED
	return bpf_get_prandom_u32() & 1;
#else
	return bpf_get_prandom_u32(); // refused
#endif
}

char _license[] SEC("license") = "GPL";
