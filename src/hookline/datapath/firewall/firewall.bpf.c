/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The firewall. Where a packet's fate is decided:
 *
 *   from_pod   TC ingress of a pod's host-side interface: what the pod sends
 *   to_pod     TC egress of the same: what comes to it
 *   from_wire  TC ingress of an uplink: what comes to the node itself
 *   to_wire    TC egress of an uplink: what the node itself sends
 *
 * A packet of a connection that this generation of policies has allowed passes after one lookup (filter);
 * all others are decided in decide(): parse.h says what they are, track.h what became of those before them,
 * judge.h what the policies say. What is not refused goes on to the next program of the hook.
 */
#include "judge.h"
#include "parse.h"
#include "tell.h"
#include "track.h"

/* Kept in BTF, whence Python has their names. */
const enum policy_reason *unused_policy_reason __attribute__((unused));
const enum policy_direction *unused_policy_direction __attribute__((unused));
const enum policy_verdict *unused_policy_verdict __attribute__((unused));
const enum track_state *unused_track_state __attribute__((unused));
const enum track_flags *unused_track_flags __attribute__((unused));

/* Whether an end of a packet is the node's. A function of its own, as all that look something up beside the
 * hot path: its key would be on the stack of the whole chain of calls. */
__noinline int is_own(const struct subject *subject, bool remote)
{
	struct own_address_key key = {};

	if (!subject)
		return false;
	key.bank = subject->generation & 1;
	key.address = remote ? subject->key.remote : subject->key.local;
	return bpf_map_lookup_elem(&own_addresses, &key) != NULL;
}

/* One that all on a link, or many, listen to. */
static __always_inline bool is_group(const struct address *address)
{
	if (!(address->words[0] | address->words[1]) && address->words[2] == IPV4_MAPPED)
		return (address->words[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
		       address->words[3] == bpf_htonl(0xffffffff);
	return (address->words[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/* Whether a packet on an uplink is the node's own. */
static __always_inline bool is_node_s(const struct subject *subject)
{
	return is_own(subject, false) ||
	       (subject->direction == DIRECTION_INGRESS && is_group(&subject->key.local));
}

/* Whether a packet from the wire claims to be the node's. */
static __always_inline bool is_node_s_source(struct __sk_buff *skb, const struct subject *subject)
{
	/* With metadata in front it is the load balancer's, which has the node's address by right. */
	return subject->direction == DIRECTION_INGRESS && is_own(subject, true) &&
	       (void *)(long)skb->data_meta + 1 > (void *)(long)skb->data;
}

/* Whether a packet to a pod has an address of a pod, or of the node, that it did not come from. */
__noinline int is_strange(struct __sk_buff *skb, const struct subject *subject)
{
	struct identity *remote;

	if (!skb || !subject || subject->direction != DIRECTION_INGRESS || !skb->ingress_ifindex)
		return false;
	remote = identity_of(&subject->key.remote, subject->generation & 1);
	if (!remote)
		return false;
	return remote->identity == IDENTITY_NODE ||
	       (remote->interface && remote->interface != skb->ingress_ifindex);
}

static __always_inline void fragment_key(const struct subject *subject, struct fragment_key *key)
{
	bool egress = subject->direction == DIRECTION_EGRESS;

	key->source = egress ? subject->key.local : subject->key.remote;
	key->destination = egress ? subject->key.remote : subject->key.local;
	key->id = subject->fragment_id;
	key->interface = subject->key.interface;
	key->protocol = subject->fragment_protocol;
}

#define REASSEMBLY_S 60 /* RFC 8200, 4.5 */

/* Gives a later fragment the ports of its first one; whether that was seen. */
__noinline int recall_fragment(struct subject *subject)
{
	struct fragment_key key = {};
	struct fragment *first;

	if (!subject)
		return false;
	fragment_key(subject, &key);
	first = bpf_map_lookup_elem(&fragments, &key);
	if (!first || (__s64)(bpf_ktime_get_coarse_ns() - first->seen_ns) > (__s64)(REASSEMBLY_S * SECOND))
		return false;
	subject->key.protocol = first->protocol;
	set_ends(subject, subject->direction, first->source_port, first->destination_port);
	return true;
}

__noinline int remember_fragment(const struct subject *subject)
{
	struct fragment_key key = {};
	struct fragment first = {};
	bool egress;

	if (!subject)
		return 0;
	egress = subject->direction == DIRECTION_EGRESS;
	fragment_key(subject, &key);
	first.seen_ns = bpf_ktime_get_coarse_ns();
	first.source_port = egress ? subject->key.local_port : subject->key.remote_port;
	first.destination_port = egress ? subject->key.remote_port : subject->key.local_port;
	first.protocol = subject->key.protocol;
	bpf_map_update_elem(&fragments, &key, &first, BPF_ANY);
	return 0;
}

/* A later fragment shall not have the ports of a first one that another has come after. */
__noinline int forget_fragment(const struct subject *subject)
{
	struct fragment_key key = {};

	if (!subject)
		return 0;
	fragment_key(subject, &key);
	bpf_map_delete_elem(&fragments, &key);
	return 0;
}

/* Whether an ICMP error is about a connection that is allowed. */
__noinline int is_related(struct __sk_buff *skb, const struct subject *subject)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct subject quoted = {};
	struct outcome outcome = {};
	struct track *track;

	if (!skb || !subject || parse_quoted(skb, subject, &quoted))
		return false;
	/* It tells the end that had sent it. Any router may, and what leaves is that end's own. */
	if (!address_equal(&subject->key.local, &quoted.key.local) ||
	    (subject->direction == DIRECTION_EGRESS &&
	     !address_equal(&subject->key.remote, &quoted.key.remote)))
		return false;
	track = find_track(&quoted.key, now);
	return track && renew(track, &quoted, &outcome, now);
}

/* What has no ports, or no address at all, to go by: it passes where the pod is not isolated. */
static __always_inline int without_connection(const struct subject *subject, int refusal)
{
	struct endpoint *endpoint = endpoint_of(subject);

	if (!endpoint)
		return POLICY_UNKNOWN_ENDPOINT;
	return endpoint->rules[subject->direction & 1] ? refusal : POLICY_NOT_ISOLATED;
}

static __always_inline int reason_for(struct __sk_buff *skb, struct subject *subject, struct outcome *outcome)
{
	int reason;

	if (subject->spoofed)
		return POLICY_SPOOFED_SOURCE;
	switch (subject->kind) {
	case KIND_ARP:
	case KIND_LINK:
		return POLICY_LINK;
	case KIND_NOT_IP:
		return without_connection(subject, POLICY_NOT_IP);
	case KIND_BAD_IPV4:
		return POLICY_MALFORMED_IPV4;
	case KIND_BAD_IPV6:
	case KIND_BAD_CHAIN:
	case KIND_MAPPED:
		return POLICY_MALFORMED_IPV6;
	case KIND_VLAN:
		return POLICY_VLAN;
	case KIND_BAD_L4:
		return POLICY_MALFORMED_L4;
	case KIND_TINY_FRAGMENT:
		return POLICY_TINY_FRAGMENT;
	case KIND_MANY_HEADERS:
		if (is_spoofed(subject))
			return POLICY_SPOOFED_SOURCE;
		return without_connection(subject, POLICY_EXTENSION_HEADERS);
	case KIND_ICMP_ERROR:
		if (is_spoofed(subject))
			return POLICY_SPOOFED_SOURCE;
		if (is_related(skb, subject))
			return POLICY_RELATED;
		return judge_new(subject, outcome);
	case KIND_UNTRACKED:
		return judge_new(subject, outcome);
	case KIND_LATER_FRAGMENT:
		if (recall_fragment(subject))
			break;
		/* A rule for all ports allows it, too. */
		reason = judge_new(subject, outcome);
		return reason == POLICY_NO_RULE ? POLICY_UNKNOWN_FRAGMENT : reason;
	}
	if (subject->key.protocol == IPPROTO_TCP) {
		__u8 flags = subject->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST);

		subject->opens = flags == TCP_SYN;
		subject->answers = flags == (TCP_SYN | TCP_ACK) ? ANSWER_FIRST | ANSWER_LAST : 0;
	}
	return follow(subject, outcome);
}

/* All packets but those that filter() lets pass at once. */
__noinline int decide(struct __sk_buff *skb, struct subject *subject)
{
	struct outcome outcome = {};
	__u32 direction, reason;

	if (!skb || !subject)
		return TC_ACT_SHOT;
	if (subject->kind == KIND_REST)
		subject->kind = parse_rest(skb, subject);
	if (subject->host) {
		if (!endpoint_of(subject))
			return TC_ACT_UNSPEC;
		/* What is not the node's own, or has no address, is for the stack to judge; a link's messages
		 * too. The kernel takes a tag of network 0 off and goes on to the next one: what is in there
		 * would not be seen again. */
		if (subject->kind == KIND_VLAN) {
			if (subject->direction == DIRECTION_EGRESS ||
			    (skb->vlan_present && skb->vlan_tci & 0xfff))
				return TC_ACT_UNSPEC;
		} else if (subject->kind >= KIND_LINK) {
			return TC_ACT_UNSPEC;
		} else if (subject->kind != KIND_MAPPED) {
			subject->spoofed = is_node_s_source(skb, subject);
			if (!subject->spoofed && !is_node_s(subject))
				return TC_ACT_UNSPEC;
		}
		/* What it forwards in its own name was its sender's to be judged. */
		subject->exempt = subject->direction == DIRECTION_EGRESS && skb->ingress_ifindex;
	} else {
		/* Sent by the node itself, which always reaches its pods. */
		subject->exempt = subject->direction == DIRECTION_INGRESS && !skb->ingress_ifindex;
		subject->hairpin = skb->ingress_ifindex == skb->ifindex;
		subject->spoofed = subject->kind < KIND_MAPPED && is_strange(skb, subject);
	}

	outcome.reason = reason_for(skb, subject, &outcome);
	if (subject->first_fragment) {
		if (subject->kind == KIND_FLOW && outcome.reason < POLICY_FIRST_DROP)
			remember_fragment(subject);
		else
			forget_fragment(subject);
	}
	direction = subject->direction;
	reason = outcome.audited && outcome.reason < POLICY_FIRST_DROP ? POLICY_AUDITED : outcome.reason;
	/* The verifier's bounds, which the compiler would leave out: it knows what those functions return. */
	asm volatile("%0 &= %1" : "+r"(direction) : "i"(DIRECTIONS - 1));
	asm volatile("%0 &= %1" : "+r"(reason) : "i"(REASONS_ROOM - 1));
	count_reason(direction, reason, subject->length);
	if (outcome.rule && outcome.reason < POLICY_FIRST_DROP)
		count_rule(outcome.rule, subject->length);
	tell(skb, subject, &outcome);
	return outcome.reason < POLICY_FIRST_DROP ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

static __always_inline int filter(struct __sk_buff *skb, __u8 direction, bool host)
{
	struct subject subject = {
		.length = skb->len,
		.direction = direction,
		.host = host,
	};
	__u32 zero = 0;
	struct active *settings = bpf_map_lookup_elem(&active, &zero);
	struct track *track;

	if (!settings)
		return TC_ACT_SHOT;
	/* Once: the whole packet is judged by one generation. */
	subject.generation = *(volatile __u32 *)&settings->generation;
	subject.key.interface = host ? 0 : skb->ifindex;
	subject.kind = parse_plain(skb, &subject, direction);
	if (subject.kind != KIND_FLOW)
		return decide(skb, &subject);
	if (host && !is_own(&subject, false)) {
		if (direction == DIRECTION_INGRESS &&
		    (is_group(&subject.key.local) || is_own(&subject, true)))
			return decide(skb, &subject);
		return TC_ACT_UNSPEC;
	}

	track = bpf_map_lookup_elem(&tracked, &subject.key);
	if (track && track->generation == subject.generation && !(track->flags & (1 << direction)) &&
	    !(subject.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) && is_alive(track)) {
		count_reason(direction, POLICY_ESTABLISHED, subject.length);
		count_rule(track->rule, subject.length);
		return TC_ACT_UNSPEC;
	}
	return decide(skb, &subject);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	return filter(skb, DIRECTION_EGRESS, false);
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	return filter(skb, DIRECTION_INGRESS, false);
}

SEC("tc")
int from_wire(struct __sk_buff *skb)
{
	return filter(skb, DIRECTION_INGRESS, true);
}

SEC("tc")
int to_wire(struct __sk_buff *skb)
{
	return filter(skb, DIRECTION_EGRESS, true);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
