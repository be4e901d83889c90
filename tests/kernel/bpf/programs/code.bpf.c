// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Instructions of every class that a compiler makes: for the disassembler, beside bpftool and the verifier.
#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 16);
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 4);
	__uint(max_entries, 4);
} jumps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

__u64 total = 0;
__u32 words[4] = {};
const volatile __u32 limit = 100;

struct state {
	__u64 sum;
	__u32 rounds;
};

unsigned long long load_byte(void *skb, unsigned long long off) asm("llvm.bpf.load.byte");
unsigned long long load_half(void *skb, unsigned long long off) asm("llvm.bpf.load.half");
unsigned long long load_word(void *skb, unsigned long long off) asm("llvm.bpf.load.word");

static long step(__u32 index, void *data)
{
	struct state *state = data;
	state->sum += index * 3;
	state->rounds++;
	return index > 50;
}

__noinline int add_up(__u32 rounds)
{
	struct state state = {};
	bpf_loop(rounds, step, &state, 0);
	return state.sum;
}

static __noinline __u64 mixed(__u64 x, __u32 y)
{
	__u64 z = x * 7 + y;
	z ^= z >> 13;
	z = (z << 5) - (z & 0xffff);
	z = z / (y | 1) + z % ((x & 7) | 1);
	y = y * 5 - (y >> 3);
	y ^= y << 7;
	return z | (__u64)y << 32;
}

SEC("xdp") int arithmetic(struct xdp_md *ctx)
{
	__u32 key = ctx->ingress_ifindex;
	__u64 *found = bpf_map_lookup_elem(&table, &key);
	__u64 value = found ? *found : bpf_ktime_get_ns();
	value += mixed(value, key);
	words[key & 3] += __builtin_bswap32(key);
	__sync_fetch_and_add(&total, value);
	__u64 old = __sync_fetch_and_or(&total, 5);
	old ^= __sync_val_compare_and_swap(&total, old, value);
	old += __sync_lock_test_and_set(&total, 3);
	__sync_fetch_and_and(&words[1], 7);
	old += __sync_fetch_and_xor(&words[2], 9);
	if ((__s64)value < (__s64)old)
		value = -value;
	bpf_map_update_elem(&table, &key, &value, 0);
	bpf_map_delete_elem(&table, &key);
	return (__s32)value > (__s32)limit ? XDP_PASS : XDP_DROP;
}

SEC("tc") int calls(struct __sk_buff *skb)
{
	void *place = bpf_ringbuf_reserve(&ring, 8, 0);
	if (place) {
		*(__u64 *)place = add_up(skb->len);
		bpf_ringbuf_submit(place, 0);
	}
	bpf_skb_store_bytes(skb, 0, words, sizeof(words), 0);
	bpf_tail_call(skb, &jumps, 1);
	bpf_tail_call(skb, &jumps, skb->mark);
	return TC_ACT_OK;
}

SEC("socket") int packet(struct __sk_buff *skb)
{
	__u64 sum = load_byte(skb, 3) + load_half(skb, 4) + load_word(skb, skb->mark & 7);
	return __builtin_bswap64(sum) & 0xff;
}

// All comparisons and the stores that no compiler writes so.
SEC("syscall") int forms(void *ctx)
{
	asm volatile("r1 = 5;"
		     "r2 = 7;"
		     "if r1 == r2 goto +0;"
		     "if r1 != r2 goto +0;"
		     "if r1 > r2 goto +0;"
		     "if r1 >= r2 goto +0;"
		     "if r1 < r2 goto +0;"
		     "if r1 <= r2 goto +0;"
		     "if r1 s> r2 goto +0;"
		     "if r1 s>= r2 goto +0;"
		     "if r1 s< r2 goto +0;"
		     "if r1 s<= r2 goto +0;"
		     "if r1 & r2 goto +0;"
		     "if w1 == w2 goto +0;"
		     "if w1 s<= w2 goto +0;"
		     "if w1 & 7 goto +0;"
		     "if r1 s< -5 goto +0;"
		     "if w1 > 0xffffffff goto +0;"
		     "*(u8 *)(r10 - 1) = r1;"
		     "*(u16 *)(r10 - 4) = r1;"
		     "*(u32 *)(r10 - 8) = r1;"
		     "*(u64 *)(r10 - 16) = r1;"
		     "r3 = *(u8 *)(r10 - 1);"
		     "r3 = *(u16 *)(r10 - 4);"
		     "r3 = *(u32 *)(r10 - 8);"
		     "r3 = *(u64 *)(r10 - 16);"
		     "r3 = -r3;"
		     "w3 = -w3;"
		     "r3 s>>= 3;"
		     "w3 s>>= 3;"
		     "w3 s>>= w1;"
		     "r3 = be16 r3;"
		     "r3 = be32 r3;"
		     "r3 = be64 r3;"
		     "r3 = le16 r3;"
		     "r3 = le32 r3;"
		     "r3 = le64 r3;"
		     "r3 = 0x123456789abcdef0 ll;"
		     "r3 = -1 ll;"
		     "w3 = -1;"
		     "lock *(u64 *)(r10 - 16) += r1;"
		     "lock *(u32 *)(r10 - 8) |= w1;"
		     "goto +0;"
		     :
		     :
		     : "r1", "r2", "r3", "memory");
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
