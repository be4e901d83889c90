// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Every kind of map and C type that Hookline reads, and one program of each type that it runs.
#include "types.h"

enum colour { RED, GREEN = 5, BLUE = 0x80000000 };
enum signed_colour { DARK = -1, LIGHT = 1 };
enum wide { NARROW = 1, WIDE = 0x100000000ULL };
typedef __u16 port_t;
typedef char name_t[16];

struct inner {
	__u8 flag;
	__u32 number;
};

struct key {
	__u32 address;
	port_t port;
	__u8 protocol;
	// one byte of padding
};

struct value {
	__u8 first;
	__u64 counter;
	struct inner nested;
	struct inner pair[2];
	__u8 mac[6];
	char comm[16];
	name_t label;
	enum colour colour;
	enum signed_colour dark;
	enum wide wide;
	_Bool yes;
	__s16 negative;
	__u16 grid[2][3];
	union {
		__u32 v4;
		__u8 v6[16];
	};
	union {
		__u64 whole;
		__u32 halves[2];
	} named_union;
	const volatile __u32 *pointer;
	struct {
		__u16 a, b;
	} unnamed_type;
	__u8 last;
};

struct bits {
	__u32 low : 4;
	__u32 high : 28;
};

struct prefix {
	__u32 length;
	__u8 address[4];
};

struct config {
	__u32 low, high;
	__u8 mac[6];
};

const volatile __u32 port_min = 1024;
const volatile __u8 small = 1;
const volatile __u16 table[4] = {1, 2, 3, 4};
const volatile struct config config = {.low = 7};
const volatile _Bool wanted = 0;
const __u32 plain = 5;
__u64 seen = 0;
__u32 initial = 17;

#define MAP(NAME, TYPE, KEY, VALUE, SIZE, FLAGS) \
	struct {                                 \
		__uint(type, TYPE);              \
		__type(key, KEY);                \
		__type(value, VALUE);            \
		__uint(max_entries, SIZE);       \
		__uint(map_flags, FLAGS);        \
	} NAME SEC(".maps")

MAP(table_hash, BPF_MAP_TYPE_HASH, struct key, struct value, 64, 0);
MAP(words_hash, BPF_MAP_TYPE_HASH, __u32, __u64, 1000, 0);
MAP(lazy_hash, BPF_MAP_TYPE_HASH, __u32, __u64, 8, BPF_F_NO_PREALLOC);
MAP(words_array, BPF_MAP_TYPE_ARRAY, __u32, __u32, 10, 0);
MAP(odd_array, BPF_MAP_TYPE_ARRAY, __u32, struct prefix, 3, 0);
MAP(cpu_hash, BPF_MAP_TYPE_PERCPU_HASH, __u32, struct inner, 1000, 0);
MAP(cpu_array, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u32, 10, 0);
MAP(lru, BPF_MAP_TYPE_LRU_HASH, __u32, __u64, 128, 0);
MAP(cpu_lru, BPF_MAP_TYPE_LRU_PERCPU_HASH, __u32, __u64, 128, 0);
MAP(routes, BPF_MAP_TYPE_LPM_TRIE, struct prefix, __u32, 4, BPF_F_NO_PREALLOC);
MAP(seen_memory, BPF_MAP_TYPE_ARRAY, __u32, struct prefix, 5, BPF_F_MMAPABLE);
MAP(shared, BPF_MAP_TYPE_ARRAY, __u32, __u32, 5, BPF_F_MMAPABLE);
MAP(bitfields, BPF_MAP_TYPE_ARRAY, __u32, struct bits, 1, 0);
MAP(macs, BPF_MAP_TYPE_HASH, mac_t, __u32, 16, 0);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 4);
	__uint(max_entries, 4);
} jumps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, 8);
	__uint(value_size, 12);
	__uint(max_entries, 4);
} untyped SEC(".maps");

static __always_inline void count(void)
{
	__u32 key = 0;
	__u32 *counter = bpf_map_lookup_elem(&cpu_array, &key);
	if (counter)
		*counter += 1;
	__sync_fetch_and_add(&seen, 1);
}

SEC("xdp") int xdp_pass(struct xdp_md *ctx)
{
	count();
	return XDP_PASS;
}

SEC("xdp") int xdp_drop(struct xdp_md *ctx)
{
	count();
	return XDP_DROP;
}

// Answers the interface's index in four bytes put before the packet, and drops by a constant.
SEC("xdp") int xdp_grow(struct xdp_md *ctx)
{
	__u32 index = ctx->ingress_ifindex;
	if (bpf_xdp_adjust_head(ctx, -4))
		return XDP_ABORTED;
	void *data = (void *)(long)ctx->data;
	if (data + 4 > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(data, &index, 4);
	return wanted ? XDP_TX : port_min == 4242 ? XDP_DROP : XDP_PASS;
}

SEC("tc") int tc_mark(struct __sk_buff *skb)
{
	count();
	skb->mark = skb->ifindex + 1000 * skb->ingress_ifindex;
	return TC_ACT_OK;
}

SEC("tc") int tc_drop(struct __sk_buff *skb)
{
	count();
	return TC_ACT_SHOT;
}

SEC("tcx/ingress") int tcx_next(struct __sk_buff *skb)
{
	count();
	return -1;
}

struct arguments {
	__u32 x, y, sum;
};

SEC("syscall") int add(struct arguments *arguments)
{
	arguments->sum = arguments->x + arguments->y;
	return 3;
}

SEC("raw_tp/xdp_exception") int on_exception(struct bpf_raw_tracepoint_args *ctx)
{
	count();
	return 0;
}

SEC("raw_tp/sched_switch") int on_switch(__u64 *ctx)
{
	count();
	return ctx[0] == 7;
}

SEC("socket") int whole(struct __sk_buff *skb)
{
	return skb->len;
}

char _license[] SEC("license") = "Dual BSD/GPL";
