/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which backend a new connection goes to. */
#pragma once

#include "maps.h"

static __always_inline __u64 mix(__u64 value)
{
	/* The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit in reaches every bit out.
	 */
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ULL;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebULL;
	return value ^ (value >> 31);
}

static __always_inline __u64 pair(__u32 high, __u32 low)
{
	return (__u64)high << 32 | low;
}

/* A hash of the five-tuple, the same on every node that has the same seed. */
static __always_inline __u32 flow_hash(const struct flow *flow)
{
	const __be32 *source = flow->source.words, *destination = flow->destination.words;
	__u64 hash = hash_seed;

	hash = mix(hash ^ pair(source[0], source[1]));
	hash = mix(hash ^ pair(source[2], source[3]));
	hash = mix(hash ^ pair(destination[0], destination[1]));
	hash = mix(hash ^ pair(destination[2], destination[3]));
	hash = mix(hash ^ pair((__u32)flow->source_port << 16 | flow->destination_port, flow->protocol));
	return hash;
}

/* The backend's row number, or 0 (never a backend) when the tables contradict each other. */
static __always_inline __u32 select_backend(const struct service *service, __u32 hash)
{
	__u32 size = service->table_size;
	__u32 slot = service->flags & SERVICE_MODULO ? hash % size : (__u64)hash * size >> 32;
	__u32 number = service->table_page + (slot >> MAGLEV_PAGE_BITS);
	struct maglev_page *page = bpf_map_lookup_elem(&maglev, &number);

	if (!page)
		return 0;
	return page->backends[slot & (MAGLEV_PAGE_SLOTS - 1)];
}
