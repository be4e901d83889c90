/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connections: what becomes of a packet by what came before it.
 *
 * One row is for both directions of a connection and remembers in which it began. Packets of either pass as
 * long as the policies allow that beginning. A row that was judged by an earlier generation is judged anew by
 * its next packet; where it is not allowed any more it stays, cut, so that the other end's packets are not
 * taken for the beginning of a connection of their own.
 */
#pragma once

#include "judge.h"

#define SECOND 1000000000ULL

static __always_inline __u32 timeout_of(__u8 protocol, __u8 state)
{
	if (protocol == IPPROTO_TCP) {
		if (state == TRACK_OPEN)
			return tcp_open_s;
		if (state == TRACK_CLOSING)
			return tcp_closing_s;
		return state == TRACK_CLOSED ? tcp_closed_s : tcp_new_s;
	}
	if (is_icmp(protocol))
		return icmp_s;
	if (protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
		return other_s;
	if (state == TRACK_NEW)
		return udp_new_s;
	return protocol == IPPROTO_UDP ? udp_open_s : sctp_open_s;
}

/* Which directions' packets may change a row in that state. */
static __always_inline __u8 watched(__u8 state, __u8 direction)
{
	if (state == TRACK_NEW)
		return 1 << !direction;
	return state == TRACK_REPLIED ? 1 << direction : 0;
}

#define TRACK_WATCH (TRACK_WATCH_INGRESS | TRACK_WATCH_EGRESS)

static __always_inline void set_state(struct track *track, __u8 protocol, __u8 state)
{
	track->state = state;
	track->timeout_s = timeout_of(protocol, state);
	track->flags = (track->flags & ~(TRACK_WATCH | TRACK_CUT)) | watched(state, track->direction);
}

static __always_inline void cut(struct track *track, __u8 protocol, __u64 now)
{
	track->flags |= TRACK_CUT | TRACK_WATCH;
	/* Until its ends have given up: a SYN is judged anew all the same. */
	track->timeout_s = protocol == IPPROTO_TCP ? tcp_open_s : cut_s;
	track->last_seen_ns = now;
}

/* A packet of a connection that is allowed. */
static __always_inline void step(struct track *track, const struct subject *subject, __u64 now)
{
	__u8 protocol = subject->key.protocol, state = track->state, next = state;
	bool first = (subject->direction & 1) == (track->direction & 1);

	if (protocol != IPPROTO_TCP) {
		if (state == TRACK_NEW && !first)
			next = TRACK_OPEN;
	} else if (subject->tcp_flags & TCP_RST) {
		next = TRACK_CLOSED;
	} else if (subject->tcp_flags & TCP_FIN) {
		__u8 both = TRACK_FIN_INGRESS | TRACK_FIN_EGRESS;

		track->flags |= TRACK_FIN_INGRESS << (subject->direction & 1);
		next = (track->flags & both) == both ? TRACK_CLOSED : TRACK_CLOSING;
		if (state == TRACK_CLOSED)
			next = TRACK_CLOSED;
	} else if (state == TRACK_NEW && !first) {
		next = TRACK_REPLIED;
	} else if (state == TRACK_REPLIED && first && !(subject->tcp_flags & TCP_SYN)) {
		next = TRACK_OPEN;
	}
	if (next != state)
		set_state(track, protocol, next);
	else if (now - track->last_seen_ns < SECOND)
		return;
	track->last_seen_ns = now;
}

/* Puts a new connection into the table. */
static __always_inline void open_track(const struct track_key *key, const struct subject *subject,
				       const struct outcome *outcome, __u8 direction, __u8 state, __u64 now)
{
	struct track track = {
		.last_seen_ns = now,
		.generation = subject->generation,
		.rule = outcome->rule,
		.direction = direction,
		.flags = subject->exempt ? TRACK_EXEMPT : 0,
	};

	set_state(&track, subject->key.protocol, state);
	if (subject->key.protocol == IPPROTO_TCP && state == TRACK_NEW) {
		if (subject->tcp_flags & TCP_RST)
			set_state(&track, subject->key.protocol, TRACK_CLOSED);
	}
	/* An LRU map always has room: it takes the place of the one that was used least lately. */
	bpf_map_update_elem(&tracked, key, &track, BPF_ANY);
}

/* Brings a row to this generation; whether its connection is allowed. */
__noinline int renew(struct track *track, const struct subject *subject, struct outcome *outcome, __u64 now)
{
	__u8 protocol;
	int reason = POLICY_NODE;

	if (!track || !subject || !outcome)
		return false;
	protocol = subject->key.protocol;
	if (track->generation == subject->generation)
		return !(track->flags & TRACK_CUT);
	if (!(track->flags & TRACK_EXEMPT))
		reason = judge(subject, track->direction, outcome);
	track->generation = subject->generation;
	outcome->fresh = outcome->audited;
	if (reason >= POLICY_FIRST_DROP) {
		if (!(track->flags & TRACK_CUT))
			cut(track, protocol, now);
		return false;
	}
	/* Of one that is cut: which rule had allowed it. */
	if (!(track->flags & TRACK_EXEMPT))
		track->rule = outcome->rule;
	if (track->flags & TRACK_CUT)
		set_state(track, protocol, track->state);
	return true;
}

/* A row that is not over; NULL where there is none. */
static __always_inline struct track *find_track(const struct track_key *key, __u64 now)
{
	struct track *track = bpf_map_lookup_elem(&tracked, key);

	/* Another CPU's clock may be a little ahead. */
	if (!track || (__s64)(now - track->last_seen_ns) > (__s64)(track->timeout_s * SECOND))
		return NULL;
	return track;
}

/* Notes that a packet came. Returns whether the connection was not over. */
static __always_inline bool is_alive(struct track *track)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__s64 silent = now - track->last_seen_ns;

	if (silent < (__s64)SECOND)
		return true;
	if (silent > (__s64)(track->timeout_s * SECOND))
		return false;
	track->last_seen_ns = now;
	return true;
}

/* Judges a packet as the first one of a connection in its own direction. */
__noinline int judge_new(const struct subject *subject, struct outcome *outcome)
{
	int reason;

	if (!subject || !outcome)
		return POLICY_INTERNAL;
	if (!subject->host && !endpoint_of(subject))
		return POLICY_UNKNOWN_ENDPOINT;
	if (is_spoofed(subject))
		return POLICY_SPOOFED_SOURCE;
	if (subject->exempt)
		return POLICY_NODE;
	reason = judge(subject, subject->direction, outcome);
	outcome->fresh = true;
	return reason;
}

#define TRACK_WAS_ASKED (TRACK_ASKED | TRACK_ASKED_EXEMPT)

/* Makes a row that of the connection that was asked for the other way round. Returns whether policies allow
 * it still. */
static __always_inline bool turn_round(struct track *track, const struct subject *subject,
				       struct outcome *outcome, __u64 now)
{
	__u8 flags = track->flags & TRACK_ASKED_EXEMPT ? TRACK_EXEMPT : 0;

	track->flags &= ~TRACK_WAS_ASKED;
	outcome->rule = 0;
	if (!flags && judge(subject, !(subject->direction & 1), outcome) >= POLICY_FIRST_DROP)
		return false;
	track->direction = !(subject->direction & 1);
	track->flags = flags;
	track->rule = outcome->rule;
	track->generation = subject->generation;
	track->last_seen_ns = now;
	set_state(track, subject->key.protocol,
		  subject->key.protocol == IPPROTO_TCP ? TRACK_REPLIED : TRACK_OPEN);
	return true;
}

/* A packet whose connection is known by its key: why it passes or not. */
__noinline int follow(const struct subject *subject, struct outcome *outcome)
{
	__u64 now = bpf_ktime_get_coarse_ns(), until = 0;
	struct track *track;
	struct track_key key;
	bool allowed = false, reverse;
	int reason;

	if (!subject || !outcome)
		return POLICY_INTERNAL;
	/* Linux 6.1 takes a key from the stack, and from no other function's. */
	key = subject->key;
	track = find_track(&key, now);
	if (track) {
		allowed = renew(track, subject, outcome, now);
		reverse = (subject->direction & 1) != (track->direction & 1);
		if (!reverse && track->flags & TRACK_WAS_ASKED &&
		    subject->answers & (allowed ? ANSWER_LAST : ANSWER_FIRST) &&
		    turn_round(track, subject, outcome, now))
			return POLICY_ESTABLISHED;
		if (allowed && !(subject->opens && (reverse || track->state >= TRACK_CLOSING))) {
			step(track, subject, now);
			outcome->rule = track->rule;
			return POLICY_ESTABLISHED;
		}
		/* What asks for a connection the other way round is judged by itself. That it asked makes it
		 * none: its end may be in the middle of this one, and goes on with it. */
		if (subject->opens && reverse) {
			outcome->audited = false;
			reason = judge_new(subject, outcome);
			if (reason < POLICY_FIRST_DROP && !is_icmp(subject->key.protocol)) {
				track->flags = (track->flags & ~TRACK_WAS_ASKED) |
					       (subject->exempt ? TRACK_ASKED_EXEMPT : TRACK_ASKED);
				if (subject->key.protocol == IPPROTO_TCP)
					track->last_seen_ns = now;
			}
			return reason;
		}
		/* Only what asks for a new connection is judged as one, and TCP says so. */
		if (!allowed && !(subject->key.protocol == IPPROTO_TCP && subject->opens)) {
			if (subject->key.protocol == IPPROTO_TCP && now - track->last_seen_ns >= SECOND)
				track->last_seen_ns = now;
			outcome->rule = track->rule;
			return POLICY_CUT;
		}
	}

	outcome->audited = false;
	reason = judge_new(subject, outcome);
	if (reason < POLICY_FIRST_DROP) {
		open_track(&key, subject, outcome, subject->direction, TRACK_NEW, now);
		return reason;
	}
	if (reason != POLICY_NO_RULE || subject->key.protocol != IPPROTO_TCP || subject->tcp_flags & TCP_SYN)
		return reason;

	/* It may be a reply of a connection that is older than the firewall. */
	__u32 zero = 0;
	struct active *settings = bpf_map_lookup_elem(&active, &zero);

	if (settings)
		until = settings->adopt_until_ns;
	if (now >= until || judge(subject, !subject->direction, outcome) >= POLICY_FIRST_DROP)
		return reason;
	open_track(&key, subject, outcome, !subject->direction, TRACK_OPEN, now);
	return POLICY_ADOPTED;
}
