// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A loop that nothing ends: the verifier comes to the same place with nothing changed.
#include "types.h"

SEC("xdp") int example(struct xdp_md *ctx)
{
#ifdef MENDED
	for (int i = 0; i < 100; i++) {
		if (bpf_get_prandom_u32() == 7)
			break;
	}
#else
	while (bpf_get_prandom_u32() != 7) // refused
		;
#endif
	return XDP_PASS;
}
