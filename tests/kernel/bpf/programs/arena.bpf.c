// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A list in an arena: the program allocates it, Python reads and changes it, the program sums it up.
#include "types.h"

#define __arena	   __attribute__((address_space(1)))
#define TYPE_ARENA 33
#define PAGES	   16
#define ANY_NODE   (-1)

struct node {
	struct node __arena *next;
	__u64 number;
};

struct {
	__uint(type, TYPE_ARENA);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, PAGES);
} shared SEC(".maps");

void __arena *bpf_arena_alloc_pages(void *map, void __arena *address, __u32 count, int node,
				    __u64 flags) __ksym __weak;
void bpf_arena_free_pages(void *map, void __arena *address, __u32 count) __ksym __weak;

struct node __arena *head;
__u64 sum = 0;
__u32 allocated = 0;

// Allocates a page and fills it with nodes 0, 1, 2 …, each before the last.
SEC("syscall") int build(void *ctx)
{
	struct node __arena *nodes = bpf_arena_alloc_pages(&shared, 0, 1, ANY_NODE, 0);
	if (!nodes)
		return 1;
	struct node __arena *last = 0;
	for (int i = 0; i < 100; i++) {
		nodes[i].number = i;
		nodes[i].next = last;
		last = &nodes[i];
	}
	head = last;
	return 0;
}

SEC("syscall") int add_up(void *ctx)
{
	// The verifier takes a program's arena from what it refers to.
	asm volatile("" : : "r"(&shared));
	struct node __arena *node = head;
	__u64 total = 0;
	for (int i = 0; i < 100 && node; i++) {
		total += node->number;
		node = node->next;
	}
	sum = total;
	return 0;
}

// Takes every page that is left.
SEC("syscall") int take_all(void *ctx)
{
	for (int i = 0; i < 2 * PAGES; i++) {
		if (!bpf_arena_alloc_pages(&shared, 0, 1, ANY_NODE, 0))
			break;
		allocated = i + 1;
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
