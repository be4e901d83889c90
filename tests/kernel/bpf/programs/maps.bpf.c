// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A map of each type, and a program that reads what Python put there and writes something back.
#include "types.h"

// Numbers of enum bpf_map_type that types.h does not name.
#define TYPE_PERF_EVENT_ARRAY	   4
#define TYPE_STACK_TRACE	   7
#define TYPE_CGROUP_ARRAY	   8
#define TYPE_ARRAY_OF_MAPS	   12
#define TYPE_HASH_OF_MAPS	   13
#define TYPE_DEVMAP		   14
#define TYPE_SOCKMAP		   15
#define TYPE_CPUMAP		   16
#define TYPE_XSKMAP		   17
#define TYPE_SOCKHASH		   18
#define TYPE_REUSEPORT_SOCKARRAY   20
#define TYPE_CGROUP_STORAGE	   19
#define TYPE_PERCPU_CGROUP_STORAGE 21
#define TYPE_QUEUE		   22
#define TYPE_STACK		   23
#define TYPE_SK_STORAGE		   24
#define TYPE_DEVMAP_HASH	   25
#define TYPE_TASK_STORAGE	   29
#define TYPE_BLOOM_FILTER	   30
#define CREATE_STORAGE		   1

struct bpf_sock {
	__u32 bound_dev_if, family, type, protocol, mark, priority, src_ip4, src_ip6[4], src_port;
};

struct value {
	__u64 number;
	__u16 words[2];
};

struct prefix {
	__u32 length;
	__u8 address[4];
};

struct device {
	__u32 index;
	__s32 program;
};

#define MAP(NAME, TYPE, KEY, VALUE, SIZE, FLAGS) \
	struct {                                 \
		__uint(type, TYPE);              \
		__type(key, KEY);                \
		__type(value, VALUE);            \
		__uint(max_entries, SIZE);       \
		__uint(map_flags, FLAGS);        \
	} NAME SEC(".maps")

MAP(plain_hash, BPF_MAP_TYPE_HASH, __u32, struct value, 64, 0);
MAP(plain_array, BPF_MAP_TYPE_ARRAY, __u32, struct value, 64, 0);
MAP(cpu_hash, BPF_MAP_TYPE_PERCPU_HASH, __u32, struct value, 64, 0);
MAP(cpu_array, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct value, 64, 0);
MAP(lru_hash, BPF_MAP_TYPE_LRU_HASH, __u32, struct value, 64, 0);
MAP(cpu_lru, BPF_MAP_TYPE_LRU_PERCPU_HASH, __u32, struct value, 64, 0);
MAP(routes, BPF_MAP_TYPE_LPM_TRIE, struct prefix, struct value, 64, BPF_F_NO_PREALLOC);
MAP(sockets, TYPE_SOCKMAP, __u32, __u64, 4, 0);
MAP(sockets_by_hash, TYPE_SOCKHASH, __u32, __u64, 4, 0);
MAP(narrow_sockets, TYPE_SOCKHASH, __u32, __u32, 4, 0);
MAP(devices, TYPE_DEVMAP, __u32, struct device, 4, 0);
MAP(devices_by_hash, TYPE_DEVMAP_HASH, __u32, struct device, 4, 0);
MAP(narrow_devices, TYPE_DEVMAP, __u32, __u32, 4, 0);
MAP(cpus, TYPE_CPUMAP, __u32, struct device, 4, 0);
MAP(xsks, TYPE_XSKMAP, __u32, __u32, 4, 0);
MAP(group, TYPE_REUSEPORT_SOCKARRAY, __u32, __u64, 4, 0);
MAP(perf_events, TYPE_PERF_EVENT_ARRAY, __u32, __u32, 4, 0);
MAP(cgroups, TYPE_CGROUP_ARRAY, __u32, __u32, 4, 0);
MAP(stacks, TYPE_STACK_TRACE, __u32, __u64[16], 64, 0);
MAP(jumps, BPF_MAP_TYPE_PROG_ARRAY, __u32, __u32, 4, 0);

#define KEYLESS(NAME, TYPE)                  \
	struct {                             \
		__uint(type, TYPE);          \
		__type(value, struct value); \
		__uint(max_entries, 4);      \
	} NAME SEC(".maps")

KEYLESS(line, TYPE_QUEUE);
KEYLESS(pile, TYPE_STACK);
KEYLESS(filter, TYPE_BLOOM_FILTER);

#define STORAGE(NAME, TYPE)                           \
	struct {                                      \
		__uint(type, TYPE);                   \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__type(key, int);                     \
		__type(value, struct value);          \
	} NAME SEC(".maps")

STORAGE(of_socket, TYPE_SK_STORAGE);
STORAGE(of_task, TYPE_TASK_STORAGE);

#define OF_CGROUP(NAME, TYPE)                \
	struct {                             \
		__uint(type, TYPE);          \
		__type(key, __u64);          \
		__type(value, struct value); \
	} NAME SEC(".maps")

OF_CGROUP(of_cgroup, TYPE_CGROUP_STORAGE);
OF_CGROUP(of_cgroup_by_cpu, TYPE_PERCPU_CGROUP_STORAGE);

struct inner {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct value);
	__uint(max_entries, 8);
};

struct inner first SEC(".maps");

struct {
	__uint(type, TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 4);
	__array(values, struct inner);
} outer_array SEC(".maps") = {.values = {[1] = &first}};

struct {
	__uint(type, TYPE_HASH_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 4);
	__array(values, struct inner);
} outer_hash SEC(".maps");

__u32 chosen = 0;
__u32 egress_runs = 0;
__u32 cpu_runs = 0;
__u32 cpu_ran_on = 0;

// What to do, in memory that Python sees: the key to read, what was there, the key to write and what to
// write.
struct job {
	struct value found;
	struct value given;
	__u32 read_key;
	__u32 write_key;
	__s64 result;
} job = {};

#define EXCHANGE(NAME)                                                                     \
	SEC("tc") int exchange_##NAME(struct __sk_buff *skb)                               \
	{                                                                                  \
		__u32 key = job.read_key;                                                  \
		struct value *value = bpf_map_lookup_elem(&NAME, &key), given = job.given; \
		if (value)                                                                 \
			job.found = *value;                                                \
		key = job.write_key;                                                       \
		job.result = bpf_map_update_elem(&NAME, &key, &given, 0);                  \
		return value != 0;                                                         \
	}

EXCHANGE(plain_hash)
EXCHANGE(plain_array)
EXCHANGE(cpu_hash)
EXCHANGE(cpu_array)
EXCHANGE(lru_hash)
EXCHANGE(cpu_lru)

SEC("tc") int exchange_routes(struct __sk_buff *skb)
{
	struct prefix key = {32, {10, 1, 2, job.read_key}};
	struct value *value = bpf_map_lookup_elem(&routes, &key), given = job.given;
	if (value)
		job.found = *value;
	key.length = 24;
	key.address[2] = job.write_key;
	job.result = bpf_map_update_elem(&routes, &key, &given, 0);
	return value != 0;
}

#define EXCHANGE_INNER(NAME)                                                \
	SEC("tc") int exchange_##NAME(struct __sk_buff *skb)                \
	{                                                                   \
		__u32 key = job.read_key, entry = 7;                        \
		struct value given = job.given;                             \
		void *inner = bpf_map_lookup_elem(&NAME, &key);             \
		if (!inner)                                                 \
			return 0;                                           \
		struct value *value = bpf_map_lookup_elem(inner, &entry);   \
		if (value)                                                  \
			job.found = *value;                                 \
		entry = 8;                                                  \
		job.result = bpf_map_update_elem(inner, &entry, &given, 0); \
		return 1 + (value != 0);                                    \
	}

EXCHANGE_INNER(outer_array)
EXCHANGE_INNER(outer_hash)

#define EXCHANGE_ENDS(NAME)                                       \
	SEC("tc") int exchange_##NAME(struct __sk_buff *skb)      \
	{                                                         \
		struct value found = {}, given = job.given;       \
		int empty = bpf_map_pop_elem(&NAME, &found) != 0; \
		job.found = found;                                \
		job.result = bpf_map_push_elem(&NAME, &given, 0); \
		return !empty;                                    \
	}

EXCHANGE_ENDS(line)
EXCHANGE_ENDS(pile)

SEC("tc") int exchange_filter(struct __sk_buff *skb)
{
	struct value wanted = job.found, given = job.given;
	int absent = bpf_map_peek_elem(&filter, &wanted) != 0;
	job.result = bpf_map_push_elem(&filter, &given, 0);
	return !absent;
}

// Finds a socket in either map, gives its local port as the mark, counts in its storage, and copies it to
// key 3.
SEC("tc") int look_at_socket(struct __sk_buff *skb)
{
	__u32 key = 1, copy = 3;
	struct bpf_sock *socket = bpf_map_lookup_elem(&sockets, &key);
	if (!socket)
		return TC_ACT_SHOT;
	skb->mark = socket->src_port;
	struct value *value = bpf_sk_storage_get(&of_socket, socket, 0, CREATE_STORAGE);
	if (value)
		value->number++;
	bpf_map_update_elem(&sockets_by_hash, &copy, socket, 0);
	bpf_sk_release(socket);
	return TC_ACT_OK;
}

SEC("raw_tp/sched_switch") int look_at_task(void *ctx)
{
	struct value *value = bpf_task_storage_get(&of_task, bpf_get_current_task_btf(), 0, CREATE_STORAGE);
	if (!value)
		return 2;
	value->number++;
	return 0;
}

SEC("raw_tp/sched_switch") int in_cgroup(void *ctx)
{
	return bpf_current_task_under_cgroup(&cgroups, 2);
}

SEC("raw_tp/sched_switch") int take_stack(void *ctx)
{
	return bpf_get_stackid(ctx, &stacks, 0);
}

#define REDIRECT(NAME)                                       \
	SEC("xdp") int to_##NAME(struct xdp_md *ctx)         \
	{                                                    \
		return bpf_redirect_map(&NAME, 2, XDP_PASS); \
	}

REDIRECT(devices)
REDIRECT(devices_by_hash)
REDIRECT(narrow_devices)
REDIRECT(xsks)

SEC("xdp") int to_cpus(struct xdp_md *ctx)
{
	return bpf_redirect_map(&cpus, chosen, XDP_PASS);
}

SEC("xdp/devmap") int at_egress(struct xdp_md *ctx)
{
	__sync_fetch_and_add(&egress_runs, 1);
	return XDP_PASS;
}

SEC("xdp/cpumap") int at_cpu(struct xdp_md *ctx)
{
	cpu_ran_on = bpf_get_smp_processor_id();
	__sync_fetch_and_add(&cpu_runs, 1);
	return XDP_DROP;
}

SEC("xdp") int jump(struct xdp_md *ctx)
{
	bpf_tail_call(ctx, &jumps, 2);
	return XDP_PASS;
}

SEC("xdp") int landed(struct xdp_md *ctx)
{
	return XDP_DROP;
}

#define COUNT_OF(NAME)                                                   \
	SEC("cgroup_skb/egress") int count_##NAME(struct __sk_buff *skb) \
	{                                                                \
		struct value *value = bpf_get_local_storage(&NAME, 0);   \
		__sync_fetch_and_add(&value->number, 1);                 \
		return 1;                                                \
	}

COUNT_OF(of_cgroup)
COUNT_OF(of_cgroup_by_cpu)

SEC("xdp") int emit(struct xdp_md *ctx)
{
	__u64 number = 0x1122334455667788;
	return bpf_perf_event_output(ctx, &perf_events, 0xffffffff, &number, sizeof(number)) ? XDP_DROP
											     : XDP_PASS;
}

SEC("sk_reuseport") int choose(struct sk_reuseport_md *ctx)
{
	return bpf_sk_select_reuseport(ctx, &group, &chosen, 0) ? 0 : 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
