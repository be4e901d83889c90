/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Session affinity: a client of a service that asks for it keeps its backend, as long as it makes a new
 * connection now and then and the backend takes new ones. XDP knows a client by its address, the programs of
 * this node's sockets by its network namespace: client_of_netns().
 *
 * The map only has to remember what has changed. A client's first choice is by a hash of the client and the
 * pool, so that every CPU and every node that meets it at once, or has forgotten it, finds the same backend
 * as long as the table is the same.
 */
#pragma once

#include "maps.h"
#include "select.h"

/* How late a client's last use may be written: a second, or an eighth of a short timeout. */
#define AFFINITY_STEP_NS 1000000000ULL

/* Whether a backend that a client had takes its next connection. */
static __always_inline bool takes_new(const struct affinity *affinity)
{
	__u32 row = affinity->backend;
	const struct backend *backend = bpf_map_lookup_elem(&backends, &row);

	return backend && backend->flags & BACKEND_ACTIVE && backend->generation == affinity->generation &&
	       (backend->state == BACKEND_STATE_STARTING || backend->state == BACKEND_STATE_ACTIVE);
}

/* The backend's row for a client's new connection to a service with session affinity, which has a table; 0
 * when the tables contradict each other. Not static: the verifier walks through it once for each program. */
__noinline int affine_backend(const struct service *service, const struct address *client)
{
	/* The verifier asks; every caller gives both. */
	if (!service || !client)
		return 0;

	struct affinity_key key = {.client = *client, .pool = service->pool};
	struct affinity *known = bpf_map_lookup_elem(&affinity, &key);
	__u64 now = bpf_ktime_get_coarse_ns();
	__u64 limit = service->affinity_seconds * 1000000000ULL;
	__u64 step = limit / 8 < AFFINITY_STEP_NS ? limit / 8 : AFFINITY_STEP_NS;

	if (known) {
		/* Copied before it is judged: an LRU map gives entries away at any time. */
		struct affinity had = *known;
		/* Signed: another CPU may have used it since this one read the clock. */
		__s64 silent = now - had.last_used_ns;

		if (silent <= (__s64)limit && takes_new(&had)) {
			if (silent > (__s64)step)
				known->last_used_ns = now;
			return had.backend;
		}
	}

	const __be32 *words = client->words;
	__u64 hash = hash_seed;

	hash = mix(hash ^ pair(words[0], words[1]));
	hash = mix(hash ^ pair(words[2], words[3]));
	hash = mix(hash ^ service->pool);

	__u32 row = select_backend(service, hash);
	const struct backend *backend = bpf_map_lookup_elem(&backends, &row);

	if (!backend)
		return 0;

	struct affinity chosen = {.backend = row, .generation = backend->generation, .last_used_ns = now};

	/* Replaced whole: no reader sees one backend's row with another's generation. An LRU map takes it
	 * always. */
	bpf_map_update_elem(&affinity, &key, &chosen, BPF_ANY);
	return row;
}

/* The backend's row for a new connection, or 0 when the tables contradict each other. `hash` chooses where
 * each connection is placed anew. */
static __always_inline __u32 choose_backend(const struct service *service, const struct address *client,
					    __u32 hash)
{
	if (service->affinity_seconds)
		return affine_backend(service, client);
	return select_backend(service, hash);
}

/* The client that all sockets of a network namespace are: no packet has an address of
 * ffff:ffff:ffff:ffff::/64. */
static __always_inline struct address client_of_netns(__u64 cookie)
{
	return (struct address){.words = {0xffffffff, 0xffffffff, cookie >> 32, cookie}};
}
