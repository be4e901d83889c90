// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A map's value is used, and the key may not be there.
#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u32 key = ctx->ingress_ifindex;
	__u64 *count = bpf_map_lookup_elem(&counts, &key);
#ifdef MENDED
	if (!count)
		return XDP_PASS;
#endif
	*count += 1; // refused
	return XDP_PASS;
}
