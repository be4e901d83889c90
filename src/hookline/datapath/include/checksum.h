/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Incremental update of the Internet checksum, RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). */
#pragma once

#include "kernel.h"

static __always_inline __u64 checksum_start(__sum16 check)
{
	return (__u16)~check;
}

static __always_inline __u64 checksum_replace(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __sum16 checksum_finish(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__sum16)~sum;
}
