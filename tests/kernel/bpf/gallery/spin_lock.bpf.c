// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A lock that, one way out, is not given back.
#include "types.h"

struct bpf_spin_lock {
	__u32 val;
};
struct guarded {
	struct bpf_spin_lock lock;
	__u64 count;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct guarded);
} table SEC(".maps");

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct guarded *value = bpf_map_lookup_elem(&table, &zero);
	if (!value)
		return XDP_PASS;
	bpf_spin_lock(&value->lock);
	value->count++;
#ifdef MENDED
	bpf_spin_unlock(&value->lock);
#endif
	return XDP_PASS; // refused
}
