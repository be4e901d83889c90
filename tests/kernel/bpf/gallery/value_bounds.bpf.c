// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// An index into a map's value that may be too large.
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
	__u64 *values = bpf_map_lookup_elem(&table, &zero);
	if (!values)
		return XDP_PASS;
	__u32 index = ctx->rx_queue_index & 15;
#ifdef MENDED
	if (index >= 8)
		return XDP_PASS;
#endif
	return values[index] ? XDP_DROP : XDP_PASS; // refused
}
