"""Which capabilities it takes to load programs of a type and to make maps of one.

``is_net_admin_prog_type()``, ``is_perfmon_prog_type()`` and ``map_create()`` in kernel/bpf/syscall.c of the Linux source.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["for_maps", "for_programs"]

_NETWORK = {
    "sched_cls", "sched_act", "xdp", "lwt_in", "lwt_out", "lwt_xmit", "lwt_seg6local", "sk_skb", "sk_msg",
    "flow_dissector", "cgroup_device", "cgroup_sock", "cgroup_sock_addr", "cgroup_sockopt", "cgroup_sysctl",
    "sock_ops", "lirc_mode2", "netfilter", "ext",
}  # fmt: skip
_TRACING = {
    "kprobe", "tracepoint", "perf_event", "raw_tracepoint", "raw_tracepoint_writable", "tracing", "lsm", "struct_ops",
    "ext",
}  # fmt: skip
_NETWORK_MAPS = {"sockmap", "sockhash", "devmap", "devmap_hash", "xskmap"}


def for_programs(types: Iterable[str]) -> tuple[str, ...]:
    """What it takes to load programs of these types."""
    kinds = set(types)
    return ("CAP_BPF", *["CAP_PERFMON"] * bool(kinds & _TRACING), *["CAP_NET_ADMIN"] * bool(kinds & _NETWORK))


def for_maps(types: Iterable[str]) -> tuple[str, ...]:
    """What it takes to make maps of these types."""
    return ("CAP_BPF", *["CAP_NET_ADMIN"] * bool(set(types) & _NETWORK_MAPS))
