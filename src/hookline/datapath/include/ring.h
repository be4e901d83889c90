/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A ring buffer that counts what it loses. The kernel does not count records that find no room; these macros
 * do, per CPU, in a second map beside the ring, which Python's Ring finds by its name and sums as
 * `ring.lost`.
 *
 *	struct event { __u64 at_ns; __u32 bytes, reason; };
 *	const struct event *unused_event __attribute__((unused));  // brings the struct into BTF
 *	RING(events, 1 << 20);                                     // bytes: a power of two, whole pages
 *
 *	struct event *event = ring_reserve(events, sizeof(*event));
 *	if (!event)
 *		return 0;                                          // counted in events_lost
 *	event->at_ns = bpf_ktime_get_ns();
 *	ring_submit(event);                                        // or ring_discard(event)
 *
 *	ring_output(events, &event, sizeof(event));                // by copy, of any size
 *
 * The header needs nothing but libbpf's bpf_helpers.h, and can be copied into any project.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

#include <bpf/bpf_helpers.h>

/* Numbers of enum bpf_map_type, not its names: the includer may or may not have declared these. */
#define RING_TYPE_RINGBUF      27
#define RING_TYPE_PERCPU_ARRAY 6

/* The map NAME and its counter NAME_lost. */
#define RING(NAME, BYTES)                             \
	struct {                                      \
		__uint(type, RING_TYPE_RINGBUF);      \
		__uint(max_entries, BYTES);           \
	} NAME SEC(".maps");                          \
	struct {                                      \
		__uint(type, RING_TYPE_PERCPU_ARRAY); \
		__uint(max_entries, 1);               \
		__type(key, __u32);                   \
		__type(value, __u64);                 \
	} NAME##_lost SEC(".maps")

/* A program that interrupts another on the same CPU counts too, so the addition is atomic. */
static __attribute__((always_inline, unused)) inline void ring_count_lost(void *counter)
{
	__u32 first = 0;
	__u64 *count = bpf_map_lookup_elem(counter, &first);
	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Room for SIZE bytes, which must be constant, or NULL. What is reserved must be submitted or discarded. */
#define ring_reserve(NAME, SIZE)                                            \
	({                                                                  \
		void *ring_place = bpf_ringbuf_reserve(&(NAME), (SIZE), 0); \
		if (!ring_place)                                            \
			ring_count_lost(&NAME##_lost);                      \
		ring_place;                                                 \
	})

#define ring_submit(RECORD)  bpf_ringbuf_submit((RECORD), 0)
#define ring_discard(RECORD) bpf_ringbuf_discard((RECORD), 0)

/* Copies SIZE bytes in; 0, or a negative error number. */
#define ring_output(NAME, RECORD, SIZE)                                              \
	({                                                                           \
		long ring_result = bpf_ringbuf_output(&(NAME), (RECORD), (SIZE), 0); \
		if (ring_result)                                                     \
			ring_count_lost(&NAME##_lost);                               \
		ring_result;                                                         \
	})
