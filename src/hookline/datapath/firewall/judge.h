/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whether policies allow a connection: the rows of one bank, and what is true without any. */
#pragma once

#include "parse.h"

/* What was found. */
struct outcome {
	__u32 rule;
	__u32 identity;
	__u8 reason;
	__u8 audited; /* an audited policy would have denied it */
	__u8 fresh;   /* a new connection, or one that was judged anew */
	__u8 pad;
};

static __always_inline struct endpoint *endpoint_of(const struct subject *subject)
{
	struct endpoint_key key = {
		.bank = subject->generation & 1,
		.interface = subject->key.interface,
	};

	return bpf_map_lookup_elem(&endpoints, &key);
}

static __always_inline struct identity *identity_of(const struct address *address, __u32 bank)
{
	struct identity_key key = {
		.prefix_bits = IDENTITY_KEY_BITS + 128,
		.bank = bank,
		.address = *address,
	};

	return bpf_map_lookup_elem(&identities, &key);
}

/* The rule of a set that is about such a packet; NULL where there is none. */
static __noinline struct rule *find_rule(const struct subject *subject, __u32 set, __u32 identity,
					 __be16 port)
{
	struct rule_key key = {};

	if (!subject)
		return NULL;
	key.prefix_bits = RULE_KEY_BITS + 24;
	key.bank = subject->generation & 1;
	key.set = set;
	key.identity = identity;
	key.protocol = subject->key.protocol;
	__builtin_memcpy(key.port, &port, sizeof(port));
	return bpf_map_lookup_elem(&rules, &key);
}

/* Whether a set allows it; the rule that decided, or 0. */
static __always_inline bool set_allows(const struct subject *subject, __u32 set, __u32 identity, __be16 port,
				       __u32 *number)
{
	struct rule *rule = find_rule(subject, set, identity, port);

	if (!rule)
		rule = find_rule(subject, set, IDENTITY_ANY, port);
	*number = rule ? rule->rule : 0;
	return rule && rule->verdict == VERDICT_ALLOW;
}

/* Judges a connection that began in `direction`, and says why; reasons from POLICY_FIRST_DROP on refuse it.
 */
__noinline int judge(const struct subject *subject, __u32 direction, struct outcome *outcome)
{
	struct endpoint *endpoint;
	struct identity *remote;
	__u32 set, audit, audit_rule;
	__u8 reason = POLICY_NO_RULE;
	__be16 port = 0;

	if (!subject || !outcome)
		return POLICY_INTERNAL;
	endpoint = endpoint_of(subject);
	if (!endpoint)
		return POLICY_UNKNOWN_ENDPOINT;
	direction &= 1;
	set = endpoint->rules[direction];
	audit = endpoint->audit[direction];
	outcome->rule = 0;
	if (!set && !audit)
		return POLICY_NOT_ISOLATED;

	remote = identity_of(&subject->key.remote, subject->generation & 1);
	outcome->identity = remote ? remote->identity : IDENTITY_WORLD;
	if (!subject->host && remote) {
		if (remote->identity == IDENTITY_NODE)
			return POLICY_NODE;
		/* Anybody else who claims the address comes by another interface. */
		if (remote->interface && remote->interface == subject->key.interface &&
		    (subject->direction == DIRECTION_EGRESS || subject->hairpin))
			return POLICY_SELF;
	}

	if (has_ports(subject->key.protocol))
		port = direction == DIRECTION_INGRESS ? subject->key.local_port : subject->key.remote_port;
	if (!set)
		reason = POLICY_NOT_ISOLATED;
	else if (set_allows(subject, set, outcome->identity, port, &outcome->rule))
		reason = POLICY_RULE;
	else if (endpoint->default_allow[direction])
		reason = POLICY_DEFAULT_ALLOW;
	if (reason != POLICY_NO_RULE && audit &&
	    !set_allows(subject, audit, outcome->identity, port, &audit_rule))
		outcome->audited = true;
	return reason;
}

/* Whether a packet from a pod has an address that is another's. A link's own address is nobody's. */
static __always_inline bool is_spoofed(const struct subject *subject)
{
	const struct address *source = &subject->key.local;
	struct identity *own;

	if (subject->host || subject->direction != DIRECTION_EGRESS || is_link_local(source))
		return false;
	own = identity_of(source, subject->generation & 1);
	return !own || own->interface != subject->key.interface;
}
