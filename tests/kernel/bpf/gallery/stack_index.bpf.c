// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// An array on the stack is written at an index that may be anything.
#include "types.h"

SEC("tc")
int example(struct __sk_buff *skb)
{
	__u8 seen[16] = {};
	__u32 index = skb->mark;

#ifdef MENDED
	index &= 15;
#endif
	*(volatile __u8 *)&seen[index] = 1; // refused
	return *(volatile __u8 *)&seen[3];
}

char _license[] SEC("license") = "GPL";
