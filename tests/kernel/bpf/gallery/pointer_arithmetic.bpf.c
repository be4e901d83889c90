// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// An offset of which nothing is known is added to a map value's address.
#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64[8]);
} table SEC(".maps");

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *value = bpf_map_lookup_elem(&table, &zero);
	if (!value)
		return XDP_PASS;
	__u64 offset = bpf_ktime_get_ns();
	__u8 found;
#ifdef MENDED
	asm volatile("%0 &= 63" : "+r"(offset));
#endif
	asm volatile("%[value] += %[offset]" : [value] "+r"(value) : [offset] "r"(offset)); // refused
	asm volatile("%[found] = *(u8 *)(%[value] + 0)" : [found] "=r"(found) : [value] "r"(value));
	return found ? XDP_DROP : XDP_PASS;
}
