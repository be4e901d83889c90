/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Building a Maglev table in the kernel (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
 * Balancer", NSDI 2016, 3.4): each backend in turn takes the first free slot of its own permutation of the
 * slots.
 *
 * A `syscall` program fills the pages in place. The control plane zeroes them, writes one maglev_candidate
 * for each backend, in an order that does not depend on how the backends were listed, and points the service
 * to the pages afterwards. `quota` carries the weight: a backend that has its share is unlinked from the ring
 * of turns.
 */
#pragma once

#include "maps.h"

#define MAGLEV_BACKENDS_MAX 16384

struct maglev_candidate {
	__u32 backend; /* row in backends */
	__u32 slot;    /* the next slot to try: at first the permutation's offset */
	__u32 skip;    /* from slot to slot, 1 … size - 1 */
	__u32 quota;   /* slots still to take */
	__u32 next;    /* whose turn comes after this one */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAGLEV_BACKENDS_MAX);
	__type(key, __u32);
	__type(value, struct maglev_candidate);
} maglev_candidates SEC(".maps");

/* The program's context: what to build. */
struct maglev_job {
	__u32 first_page;
	__u32 size; /* slots, a prime */
	__u32 last; /* the last candidate: the first turn is its next one's */
	__u32 free; /* out: slots left empty, 0 when the table is whole */
};

struct maglev_build {
	struct maglev_candidate *turn;
	__u32 first_page;
	__u32 size;
	__u32 previous;
	__u32 current;
	__u32 free;
};

#define MAGLEV_PROBES 8

static long maglev_step(__u32 index __attribute__((unused)), struct maglev_build *build)
{
	__u32 current = build->current;
	struct maglev_candidate *candidate = bpf_map_lookup_elem(&maglev_candidates, &current);

	if (!candidate)
		return 1;

	__u64 slot = candidate->slot;
	__u32 skip = candidate->skip, size = build->size;

	for (int i = 0; i < MAGLEV_PROBES; i++) {
		__u32 number = build->first_page + (slot >> MAGLEV_PAGE_BITS);
		struct maglev_page *page = bpf_map_lookup_elem(&maglev, &number);

		if (!page)
			return 1;

		__u32 *taken = &page->backends[slot & (MAGLEV_PAGE_SLOTS - 1)];

		/* 64 bits: two numbers below the size can pass 2^32 only if the size does, 2^17 if it is
		 * 65,537. */
		slot += skip;
		if (slot >= size)
			slot -= size;
		if (*taken)
			continue;

		*taken = candidate->backend;
		candidate->slot = slot;
		if (--build->free == 0)
			return 1;
		if (--candidate->quota == 0) {
			/* Out of the ring: the one before leads to the one after. */
			struct maglev_candidate *previous =
				bpf_map_lookup_elem(&maglev_candidates, &build->previous);
			if (!previous)
				return 1;
			previous->next = candidate->next;
		} else {
			build->previous = current;
		}
		build->current = candidate->next;
		return 0;
	}
	candidate->slot = slot;
	return 0;
}

SEC("syscall")
int build_maglev(struct maglev_job *job)
{
	__u32 key = job->last; /* a map's key cannot lie in the context */
	struct maglev_candidate *last = bpf_map_lookup_elem(&maglev_candidates, &key);

	if (!last || job->size == 0)
		return -1;

	struct maglev_build build = {
		.first_page = job->first_page,
		.size = job->size,
		.previous = key,
		.current = last->next,
		.free = job->size,
	};

	/* Eight probes a step: 2^23 steps are more than any prime size up to 65,537 can ask for. */
	bpf_loop(1 << 23, maglev_step, &build, 0);
	job->free = build.free;
	return build.free ? -1 : 0;
}
