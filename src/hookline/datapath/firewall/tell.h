/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counting packets by reason and by rule, and telling of them in the ring. */
#pragma once

#include "judge.h"
#include "tokens.h"

const struct verdict *unused_verdict __attribute__((unused));

static __always_inline void count_reason(__u32 direction, __u32 reason, __u32 bytes)
{
	__u32 zero = 0;
	struct firewall_metrics *metrics = bpf_map_lookup_elem(&firewall_metrics, &zero);

	if (!metrics)
		return;
	metrics->reasons[direction][reason].packets++;
	metrics->reasons[direction][reason].bytes += bytes;
}

static __always_inline void count_rule(__u32 rule, __u32 bytes)
{
	struct tally *tally = bpf_map_lookup_elem(&rule_counts, &rule);

	if (!tally)
		return;
	tally->packets++;
	tally->bytes += bytes;
}

/* Whether one more record may be written now. */
static __always_inline bool may_tell(void)
{
	__u32 zero = 0;
	__u64 *spent = bpf_map_lookup_elem(&verdict_limits, &zero);
	struct firewall_metrics *metrics = bpf_map_lookup_elem(&firewall_metrics, &zero);

	if (!spent || !metrics)
		return false;
	if (take_token(spent, verdict_interval_ns, verdict_depth_ns))
		return true;
	metrics->suppressed++;
	return false;
}

/* Drops and audited packets are told, and of new connections one in so many. */
__noinline int tell(struct __sk_buff *skb, const struct subject *subject, const struct outcome *outcome)
{
	bool dropped;

	if (!skb || !subject || !outcome)
		return 0;
	dropped = outcome->reason >= POLICY_FIRST_DROP;
	if (!dropped && !outcome->audited) {
		__u32 zero = 0;
		struct active *settings = bpf_map_lookup_elem(&active, &zero);
		__u32 sample = settings ? settings->sample : 0;

		if (!outcome->fresh || !sample || bpf_get_prandom_u32() % sample)
			return 0;
	}
	if (!may_tell())
		return 0;

	struct verdict *verdict = ring_reserve(verdicts, sizeof(*verdict));

	if (!verdict)
		return 0;
	verdict->at_ns = bpf_ktime_get_ns();
	verdict->local = subject->key.local;
	verdict->remote = subject->key.remote;
	verdict->local_port = subject->key.local_port;
	verdict->remote_port = subject->key.remote_port;
	verdict->interface = skb->ifindex;
	verdict->rule = outcome->rule;
	verdict->generation = subject->generation;
	verdict->identity = outcome->identity;
	verdict->bytes = subject->length;
	verdict->protocol = subject->key.protocol;
	verdict->direction = subject->direction;
	verdict->verdict = dropped ? VERDICT_DENY : outcome->audited ? VERDICT_AUDIT : VERDICT_ALLOW;
	verdict->reason = outcome->reason;
	verdict->tcp_flags = subject->tcp_flags;
	verdict->host = subject->host;
	verdict->pad[0] = 0;
	verdict->pad[1] = 0;
	ring_submit(verdict);
	return 0;
}
