/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The load balancer. Where a packet's fate is decided:
 *
 *   balance     XDP on the uplink: finds the service and the connection, rewrites, sends or passes
 *   resolve     TC ingress on the uplink: sends the few packets whose next hop had no layer-2 address in XDP
 *   reply       TC egress on the uplink: gives the replies of this node's own backends the service's address
 *   exceptions  raw tracepoint: what the kernel itself says of balance's aborted and unsendable packets
 *   build_maglev  syscall: fills a service's table when the control plane asks for it
 *   connect4 …  cgroup: this node's own sockets; see sockets.h
 *
 * XDP passes what is not ours, drops with a counted reason what cannot be served, transmits or redirects to
 * backends beyond this node, and aborts only when its own tables contradict each other. A packet for a
 * backend of this node is rewritten and passed, so that the stack, the pod's own programs and packet taps see
 * it.
 */
#include "connect.h"
#include "forward.h"
#include "maglev.h"
#include "maps.h"
#include "reject.h"
#include "select.h"
#include "sockets.h"
#include "translate.h"

#include <bpf/bpf_core_read.h>

/* Kept in BTF, whence Python has their names. */
const enum drop_reason *unused_drop_reason __attribute__((unused));
const enum connection_kind *unused_connection_kind __attribute__((unused));
const enum connection_flags *unused_connection_flags __attribute__((unused));
const enum service_flags *unused_service_flags __attribute__((unused));
const enum backend_flags *unused_backend_flags __attribute__((unused));
const enum backend_state *unused_backend_state __attribute__((unused));
const enum service_scope *unused_service_scope __attribute__((unused));
const enum pod_flags *unused_pod_flags __attribute__((unused));
const struct maglev_job *unused_maglev_job __attribute__((unused));
const struct handover *unused_handover __attribute__((unused));

/* A decision: a verdict, and where the packet is refused, the reason. */
struct decision {
	int verdict;
	enum drop_reason reason;
};

static __always_inline struct decision decide(int verdict)
{
	return (struct decision){.verdict = verdict};
}

static __always_inline struct decision refuse(enum drop_reason reason)
{
	return (struct decision){
		.verdict = reason == REASON_INTERNAL ? XDP_ABORTED : XDP_DROP,
		.reason = reason,
	};
}

/* Sends a packet beyond the node, rewritten where the connection says so. */
static __always_inline struct decision forward(struct xdp_md *ctx, const struct packet *packet,
					       const struct connection *connection)
{
	bool dsr = connection->kind == CONNECTION_DSR;
	struct route route = {};

	/* The stack answers with "time exceeded": the packet is still as it came. */
	if (packet->ttl <= 1)
		return decide(XDP_PASS);

	find_route(ctx, packet, dsr ? &packet->flow.source : &connection->source, &connection->destination,
		   &route);

	enum drop_reason refusal = route_refusal(&route);

	if (refusal != REASON_NONE)
		return refuse(refusal);
	if (!dsr && xdp_translate(ctx, packet, connection))
		return refuse(REASON_INTERNAL);
	if (xdp_decrement_ttl(ctx, packet))
		return refuse(REASON_INTERNAL);
	if (route.outcome == BPF_FIB_LKUP_RET_SUCCESS)
		return decide(send(ctx, &route));
	if (hand_over(ctx, &route))
		return refuse(REASON_NO_METADATA);

	struct metrics *metrics = metrics_here();

	if (metrics)
		count(&metrics->handed, packet->l3_length);
	return decide(XDP_PASS);
}

static __always_inline void count_backend(const struct connection *connection, __u32 bytes, bool opened,
					  bool reply)
{
	struct backend_metrics *metrics;

	if (!backend_of(connection))
		return;
	metrics = bpf_map_lookup_elem(&backend_metrics, &connection->backend);
	if (!metrics)
		return;
	if (reply) {
		metrics->reply_packets++;
		metrics->reply_bytes += bytes;
		return;
	}
	metrics->packets++;
	metrics->bytes += bytes;
	if (opened)
		metrics->connections++;
}

/* A packet for a service, its port known; `known` is the row of its flow, if there is one. */
static __always_inline struct decision serve(struct xdp_md *ctx, const struct packet *packet,
					     const struct service *service, struct connection *known)
{
	struct service_metrics *metrics = bpf_map_lookup_elem(&service_metrics, &service->id);
	struct connection fresh = {};
	struct connection *connection = known;
	bool opened = false;

	if (!metrics)
		return refuse(REASON_INTERNAL);

	if (!known || needs_backend(known, packet)) {
		enum drop_reason reason = REASON_NO_BACKEND;

		if (service->table_size)
			reason = open_connection(packet, service, &fresh);
		if (reason != REASON_NONE) {
			metrics->drops++;
			if (reason != REASON_NO_BACKEND)
				return refuse(reason);
			return (struct decision){.verdict = reject(ctx, packet), .reason = reason};
		}
		connection = &fresh;
		opened = true;
		metrics->connections++;
	} else {
		touch(known, packet);
	}

	metrics->packets++;
	metrics->bytes += packet->l3_length;
	count_backend(connection, packet->l3_length, opened, false);

	if (connection->kind == CONNECTION_LOCAL) {
		if (xdp_translate(ctx, packet, connection))
			return refuse(REASON_INTERNAL);
		return decide(XDP_PASS);
	}

	struct decision decision = forward(ctx, packet, connection);

	if (decision.reason != REASON_NONE)
		metrics->drops++;
	return decision;
}

/* What is for a service's address, but for no service. */
static __always_inline struct decision not_served(const struct packet *packet, enum parsed parsed)
{
	struct service_key key = {.address = packet->flow.destination};
	struct service *address = bpf_map_lookup_elem(&services, &key);

	if (!address || address->flags & SERVICE_NODE_OWN)
		return decide(XDP_PASS);
	if (parsed == PARSED_BAD_L4)
		return refuse(REASON_MALFORMED_L4);
	if (packet->fragment)
		return refuse(REASON_FRAGMENT);
	return refuse(parsed == PARSED_FLOW ? REASON_NO_SERVICE : REASON_UNSUPPORTED_PROTOCOL);
}

static __always_inline struct decision balance_packet(struct xdp_md *ctx, struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	enum parsed parsed = parse(data, data_end, data_end - data, packet);

	switch (parsed) {
	case PARSED_NOT_IP:
		return decide(XDP_PASS);
	case PARSED_BAD_IPV4:
		return refuse(REASON_MALFORMED_IPV4);
	case PARSED_BAD_IPV6:
		return refuse(REASON_MALFORMED_IPV6);
	case PARSED_ADDRESS:
	case PARSED_BAD_L4:
		return not_served(packet, parsed);
	case PARSED_FLOW:
		break;
	}

	struct service_key key = {
		.address = packet->flow.destination,
		.port = packet->flow.destination_port,
		.protocol = packet->flow.protocol,
	};
	struct service *service = bpf_map_lookup_elem(&services, &key);

	__u16 port = bpf_ntohs(packet->flow.destination_port);
	bool nat_port = (port >= nat_port_min && port <= nat_port_max) ||
			(port >= earlier_port_min && port <= earlier_port_max);

	if (service || nat_port) {
		struct connection *known = bpf_map_lookup_elem(&connections, &packet->flow);

		/* Before the service: where a node port lies among nat's earlier ports, the whole flow tells
		 * a reply from a client. */
		if (nat_port && known && known->kind == CONNECTION_NAT_REPLY) {
			touch(known, packet);
			count_backend(known, packet->l3_length, false, true);
			return forward(ctx, packet, known);
		}
		if (service) {
			/* Copied once: the row's memory may become another row's at any time. */
			struct service asked = *service;

			return serve(ctx, packet, &asked, known);
		}
	}
	return not_served(packet, parsed);
}

SEC("xdp")
int balance(struct xdp_md *ctx)
{
	struct packet packet = {};
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	__u64 bytes = data_end - data;
	struct metrics *metrics = metrics_here();
	struct decision decision = balance_packet(ctx, &packet);

	if (!metrics)
		return XDP_ABORTED;
	if (decision.verdict >= 0 && decision.verdict < VERDICTS)
		count(&metrics->verdicts[decision.verdict], bytes);
	if (decision.reason > REASON_NONE && decision.reason < REASON_COUNT)
		count(&metrics->reasons[decision.reason], bytes);
#ifdef HOOKLINE_DEBUG
	bpf_printk("hookline balance: verdict %d reason %d bytes %llu", decision.verdict, decision.reason,
		   bytes);
#endif
	return decision.verdict;
}

SEC("tc")
int resolve(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	struct handover *handover = (void *)(long)skb->data_meta;

	/* No metadata, or not ours. */
	if ((void *)(handover + 1) > data || handover->magic != HANDOVER_MAGIC)
		return TC_ACT_UNSPEC;

	struct bpf_redir_neigh next_hop = handover->next_hop;

	/* The stack finds the layer-2 address and keeps the packet until it has it. */
	return bpf_redirect_neigh(handover->ifindex, &next_hop, sizeof(next_hop), 0);
}

SEC("tc")
int reply(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct packet packet = {};

	if (parse(data, data_end, skb->len, &packet) != PARSED_FLOW)
		return TC_ACT_UNSPEC;

	struct connection *connection = bpf_map_lookup_elem(&connections, &packet.flow);

	if (!connection || connection->kind != CONNECTION_LOCAL_REPLY)
		return TC_ACT_UNSPEC;
	/* The flow that it was made for is over: this is another one, of a client that came to the pod
	 * directly. An open TCP connection may be silent for as long as it likes. */
	if ((packet.flow.protocol != IPPROTO_TCP || connection->flags & CONNECTION_CLOSING) &&
	    is_expired(connection, packet.flow.protocol, bpf_ktime_get_coarse_ns()))
		return TC_ACT_UNSPEC;

	struct metrics *metrics = metrics_here();
	struct connection to = *connection;

	touch(connection, &packet);
	count_backend(connection, packet.l3_length, false, true);
	if (skb_translate(skb, &packet, &to))
		return TC_ACT_SHOT;
	if (metrics)
		count(&metrics->replies, packet.l3_length);
	return TC_ACT_UNSPEC;
}

SEC("raw_tracepoint/xdp_exception")
int count_exceptions(struct bpf_raw_tracepoint_args *ctx)
{
	const struct bpf_prog *program = (const struct bpf_prog *)ctx->args[1];
	__u32 zero = 0, action = ctx->args[2];
	struct settings *ours = bpf_map_lookup_elem(&settings, &zero);
	__u64 *counter = bpf_map_lookup_elem(&exceptions, &action);

	if (ours && counter && BPF_CORE_READ(program, aux, id) == ours->balance_id)
		(*counter)++;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
