"""Sections of programs that newer libbpf knows, and the oldest that is served does not."""

from __future__ import annotations

from hookline.bpf._syscall import AttachType

__all__ = ["newer"]

_KPROBE, _SCHED_CLS, _NETFILTER = 2, 3, 32
_SOCK_ADDR = 18
_SLEEPABLE = 1 << 4
# By what they begin with: program type and expected attach type.
_SECTIONS = {
    "tcx/ingress": (_SCHED_CLS, AttachType.TCX_INGRESS),
    "tcx/egress": (_SCHED_CLS, AttachType.TCX_EGRESS),
    "netkit/primary": (_SCHED_CLS, AttachType.NETKIT_PRIMARY),
    "netkit/peer": (_SCHED_CLS, AttachType.NETKIT_PEER),
    "netfilter": (_NETFILTER, AttachType.NETFILTER),
    "uprobe.multi": (_KPROBE, AttachType.TRACE_UPROBE_MULTI),
    "uretprobe.multi": (_KPROBE, AttachType.TRACE_UPROBE_MULTI),
    "cgroup/connect_unix": (_SOCK_ADDR, AttachType.CGROUP_UNIX_CONNECT),
    "cgroup/sendmsg_unix": (_SOCK_ADDR, AttachType.CGROUP_UNIX_SENDMSG),
    "cgroup/recvmsg_unix": (_SOCK_ADDR, AttachType.CGROUP_UNIX_RECVMSG),
    "cgroup/getpeername_unix": (_SOCK_ADDR, AttachType.CGROUP_UNIX_GETPEERNAME),
    "cgroup/getsockname_unix": (_SOCK_ADDR, AttachType.CGROUP_UNIX_GETSOCKNAME),
}


def newer(section: str) -> tuple[int, int, int] | None:
    """Program type, expected attach type and load flags of such a section; None for others."""
    kind = section.partition("/")[0]
    found = _SECTIONS.get(section) or _SECTIONS.get(kind.removesuffix(".s"))
    return (*found, _SLEEPABLE if kind.endswith(".s") else 0) if found else None
