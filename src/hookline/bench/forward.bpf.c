/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Small packets without a sender's cost, and their end: what rows of forwarding are measured with. */
#include "packet.h"

/* Set before load. */
const volatile __u32 leaves_by; /* interface */
const volatile __u32 flows = 1;
const volatile __u16 first_port = 1024;
const volatile __u8 headers[34]; /* Ethernet's and IPv4's */

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps"); /* sent, arrived */

/* Run with live frames: sends the frame again and again, each time of the next flow. It is UDP over IPv4
 * without a checksum. */
SEC("xdp")
int send_flows(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct udphdr *udp = data + L3_OFFSET + sizeof(struct iphdr);
	__u32 sent = 0;
	__u64 *count = bpf_map_lookup_elem(&counts, &sent);

	/* Its source port is written. */
	if (!count || (void *)(udp + 1) > data_end)
		return XDP_ABORTED;
	for (int i = 0; i < (int)sizeof(headers); i++)
		((__u8 *)data)[i] = headers[i];
	udp->source = bpf_htons(first_port + *count % flows);
	(*count)++;
	return bpf_redirect(leaves_by, 0);
}

SEC("tc")
int swallow(struct __sk_buff *skb)
{
	__u32 arrived = 1;
	__u64 *count = bpf_map_lookup_elem(&counts, &arrived);

	/* ARP goes on. */
	if (!count || skb->protocol != bpf_htons(ETH_P_IP))
		return TC_ACT_UNSPEC;
	(*count)++;
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
