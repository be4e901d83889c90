/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How much is done of what costs: refusals that are sent, records that are told. */
#pragma once

#include "kernel.h"
#include <bpf/bpf_helpers.h>

/* A token bucket in one word: the time up to which tokens were spent. `interval` makes one token, a full
 * bucket holds `depth` nanoseconds of them. */
static __always_inline bool take_token(__u64 *spent, __u64 interval, __u64 depth)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u64 start = *spent;

	if (now > depth && start < now - depth)
		start = now - depth;
	if (start + interval > now)
		return false;
	*spent = start + interval;
	return true;
}
