// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Two functions whose stacks together have more than 512 bytes. One alone is refused by clang.
#include "types.h"

#ifdef MENDED
#define ROOM 100
#else
#define ROOM 300
#endif

static __noinline int inner(__u32 number)
{
	volatile char room[ROOM];
	room[number & 15] = 1;
	return room[(number >> 4) & 15];
}

SEC("xdp") int example(struct xdp_md *ctx)
{
	volatile char room[ROOM];
	room[ctx->rx_queue_index & 15] = 1;
	return inner(ctx->ingress_ifindex) + room[0] > 1 ? XDP_DROP : XDP_PASS; // refused
}
