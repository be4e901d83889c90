// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A record of a ring is reserved and, one way out, neither submitted nor discarded.
#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

SEC("xdp") int example(struct xdp_md *ctx)
{
	__u64 *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0); // reserved
	if (!event)
		return XDP_PASS;
	if (ctx->ingress_ifindex == 1) {
#ifdef MENDED
		bpf_ringbuf_discard(event, 0);
#endif
		return XDP_DROP;
	}
	*event = ctx->rx_queue_index;
	bpf_ringbuf_submit(event, 0);
	return XDP_PASS;
}
