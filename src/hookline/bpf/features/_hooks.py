"""Hooks and other abilities, each asked for in a way that changes nothing.

Where a hook is taken by a link, the probe asks for a link to something that does not exist: a kernel with the
hook misses the thing (ENODEV, EBADF, EFAULT), one without the hook does not understand the question (EINVAL).
"""

from __future__ import annotations

import errno as errnos
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hookline.bpf import _syscall
from hookline.bpf._errors import lacking
from hookline.bpf._syscall import AttachType, Command, Flag
from hookline.bpf.features import _kernel, _loading
from hookline.bpf.features._finding import Finding, no, refused, unknown, yes
from hookline.bpf.features._loading import NETWORK, NOWHERE, TRACING

__all__ = ["HOOKS", "Hook", "kfunc", "native_xdp"]

_EVENT_SOURCES = Path("/sys/bus/event_source/devices")


@dataclass(frozen=True)
class Hook:
    """One thing to probe for.

    Attributes:
        minimum_kernel: The first release that has it.
        config: The options of the kernel's configuration that it takes.
        probe: Finds out.
    """

    minimum_kernel: str
    config: tuple[str, ...]
    probe: Callable[[], Finding]


def _queried(name: str, attach_type: AttachType, target: int = NOWHERE) -> Finding:
    """Ask who is attached to something that does not exist (BPF_PROG_QUERY)."""
    attr = _syscall.attributes("IIIIQI4xQ", target, attach_type, 0, 0, 0, 0, 0)
    result = _syscall.call(Command.PROG_QUERY, attr)
    if result in (0, -errnos.ENODEV, -errnos.EBADF):
        return yes(name, "the kernel looks for the target")
    if result == -errnos.EINVAL:
        return no(name, "the kernel does not know the hook")
    if result == -errnos.EPERM:
        return refused(name, "CAP_NET_ADMIN")
    return unknown(name, os.strerror(-result))


def _linked(
    name: str, program: str, attach_type: AttachType, known: set[int], more: str = "", *values: int
) -> Finding:
    """Ask for a link to something that does not exist (BPF_LINK_CREATE)."""
    number = _syscall.PROGRAM_TYPES.index(program)
    fd = _loading.opened(number, attach_type)
    rights = TRACING if program in ("kprobe", "perf_event") else NETWORK
    if fd == -errnos.EPERM:
        return refused(name, *rights)
    if fd < 0:
        # The attach type is checked when some types are loaded.
        return no(name, "the kernel does not know the hook")
    try:
        attr = _syscall.attributes("IIII" + more, fd, NOWHERE, attach_type, 0, *values)
        result = _syscall.call(Command.LINK_CREATE, attr)
    finally:
        os.close(fd)
    if result >= 0:
        os.close(result)
        return unknown(name, "the kernel made a link to nothing")
    if -result in known:
        return yes(name, "the kernel looks for the target")
    if result in (-errnos.EINVAL, -errnos.EOPNOTSUPP):
        return no(name, "the kernel does not know the hook")
    if result == -errnos.EPERM:
        return refused(name, *rights)
    return unknown(name, os.strerror(-result))


def _event_source(name: str) -> Finding:
    """kprobe and uprobe are event sources (perf_event_open(2)), each with a folder where the kernel has it."""
    if not _EVENT_SOURCES.is_dir():
        return unknown(name, "sysfs is not mounted at /sys")
    if (_EVENT_SOURCES / name / "type").exists():
        return yes(name, f"{_EVENT_SOURCES / name} is there")
    return no(name, f"{_EVENT_SOURCES} has no {name}")


def _multi(name: str, attach_type: AttachType) -> Finding:
    """kprobe_multi and uprobe_multi, asked with an address that cannot be read."""
    if attach_type is AttachType.TRACE_KPROBE_MULTI:
        # flags, count, symbols, addresses, cookies
        return _linked(name, "kprobe", attach_type, {errnos.EFAULT}, "IIQQQ", 0, 1, 0, 1, 0)
    # path, offsets, reference counters, cookies, count, flags, process
    return _linked(name, "kprobe", attach_type, {errnos.EFAULT}, "QQQQIII4x", 1, 1, 0, 0, 1, 0, 0)


def _program(name: str, kind: str) -> Finding:
    found = _loading.program_type(kind)
    return Finding(name, found.answer, found.why, capability=found.capability, policy=found.policy)


def _lsm() -> Finding:
    """Programs of type lsm load, and the kernel was started with "bpf" among its security modules."""
    loads = _loading.tracing("lsm", "file_open")
    if not loads:
        return loads
    active = _kernel.security_modules()
    if active is None:
        # Before Linux 6.8 only securityfs says, which takes CAP_SYS_ADMIN to read where it is not mounted.
        if lacking("CAP_SYS_ADMIN"):
            return refused("lsm", "CAP_SYS_ADMIN")
        return unknown("lsm", "the kernel does not say which security modules are active")
    if "bpf" not in active:
        return no(
            "lsm", f"bpf is not among the active security modules ({','.join(active)}): start with lsm=…,bpf"
        )
    return yes("lsm", "a program was loaded, and bpf is among the active security modules")


def _live_frames() -> Finding:
    """Asked with a batch that is too large: the flag is known where that is what the kernel minds."""
    fd = _loading.opened(_syscall.PROGRAM_TYPES.index("xdp"))
    if fd == -errnos.EPERM:
        return refused("live frames", *NETWORK)
    if fd < 0:
        return unknown("live frames", os.strerror(-fd))
    try:
        attr = _syscall.attributes(
            "IIIIQQIIIIQQIII4x", fd, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, Flag.TEST_XDP_LIVE_FRAMES, 0, 1 << 20
        )
        result = _syscall.call(Command.PROG_TEST_RUN, attr)
    finally:
        os.close(fd)
    if result == -errnos.E2BIG:
        return yes("live frames", "the kernel knows the flag, and refuses the probe's batch")
    if result == -errnos.EINVAL:
        return no("live frames", "the kernel does not know the flag")
    if result == -errnos.EPERM:
        return refused("live frames", *NETWORK)
    return unknown("live frames", os.strerror(-result) if result else "the kernel ran the probe")


def _token() -> Finding:
    result = _syscall.call(Command.TOKEN_CREATE, _syscall.attributes("II", 0, NOWHERE))
    if result == -errnos.EBADF:
        return yes("token", "the kernel looks for the file system")
    if result == -errnos.EINVAL:
        return no("token", "the kernel does not know the command")
    if result == -errnos.EPERM:
        return refused("token", "CAP_BPF")
    return unknown("token", os.strerror(-result))


def kfunc(name: str) -> Finding:
    if not os.access("/sys/kernel/btf/vmlinux", os.R_OK):
        return unknown(name, "the kernel's own types cannot be read (/sys/kernel/btf/vmlinux)")
    if _loading.function_id(name, AttachType.TRACE_FENTRY):
        return yes(name, "the kernel's types have it")
    return no(name, "the kernel's types do not have it")


def _tracefs(name: str) -> Finding:
    """Tracepoints need no mount, only CONFIG_TRACEPOINTS, which brings the event source."""
    if not _EVENT_SOURCES.is_dir():
        return unknown(name, "sysfs is not mounted at /sys")
    if (_EVENT_SOURCES / "tracepoint" / "type").exists():
        return yes(name, f"{_EVENT_SOURCES / 'tracepoint'} is there")
    return no(name, f"{_EVENT_SOURCES} has no tracepoint")


def native_xdp(interface: str | int) -> Finding:
    """Whether an interface's driver runs XDP programs itself, as the driver declares it (Linux 6.3)."""
    from hookline.bpf.features import _netdev

    index = _syscall.interface_index(interface)
    feature = f"native XDP on {_syscall.interface_name(index)}"
    try:
        declared = _netdev.xdp_features(index)
    except OSError as error:
        return unknown(feature, f"only an attempt tells: {error.strerror or error}")
    if declared & 1:
        return yes(feature, "its driver declares it")
    return no(feature, "its driver does not declare it; generic XDP works on every interface")


_TRAMPOLINE = (
    "CONFIG_BPF_EVENTS",
    "CONFIG_BPF_JIT",
    "CONFIG_DEBUG_INFO_BTF",
    "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
)
_CGROUP = ("CONFIG_CGROUP_BPF",)
_CGROUP_HOOKS = {
    "cgroup_skb/ingress": ("4.10", AttachType.CGROUP_INET_INGRESS),
    "cgroup_skb/egress": ("4.10", AttachType.CGROUP_INET_EGRESS),
    "cgroup/sock_create": ("4.10", AttachType.CGROUP_INET_SOCK_CREATE),
    "cgroup/sock_release": ("5.9", AttachType.CGROUP_INET_SOCK_RELEASE),
    "cgroup/dev": ("4.15", AttachType.CGROUP_DEVICE),
    "cgroup/sysctl": ("5.2", AttachType.CGROUP_SYSCTL),
    "cgroup/getsockopt": ("5.3", AttachType.CGROUP_GETSOCKOPT),
    "cgroup/setsockopt": ("5.3", AttachType.CGROUP_SETSOCKOPT),
    "cgroup/bind4": ("4.17", AttachType.CGROUP_INET4_BIND),
    "cgroup/bind6": ("4.17", AttachType.CGROUP_INET6_BIND),
    "cgroup/post_bind4": ("4.17", AttachType.CGROUP_INET4_POST_BIND),
    "cgroup/post_bind6": ("4.17", AttachType.CGROUP_INET6_POST_BIND),
    "cgroup/connect4": ("4.17", AttachType.CGROUP_INET4_CONNECT),
    "cgroup/connect6": ("4.17", AttachType.CGROUP_INET6_CONNECT),
    "cgroup/connect_unix": ("6.7", AttachType.CGROUP_UNIX_CONNECT),
    "cgroup/sendmsg4": ("4.18", AttachType.CGROUP_UDP4_SENDMSG),
    "cgroup/sendmsg6": ("4.18", AttachType.CGROUP_UDP6_SENDMSG),
    "cgroup/recvmsg4": ("5.2", AttachType.CGROUP_UDP4_RECVMSG),
    "cgroup/recvmsg6": ("5.2", AttachType.CGROUP_UDP6_RECVMSG),
    "cgroup/getpeername4": ("5.8", AttachType.CGROUP_INET4_GETPEERNAME),
    "cgroup/getpeername6": ("5.8", AttachType.CGROUP_INET6_GETPEERNAME),
    "cgroup/getsockname4": ("5.8", AttachType.CGROUP_INET4_GETSOCKNAME),
    "cgroup/getsockname6": ("5.8", AttachType.CGROUP_INET6_GETSOCKNAME),
    "sockops": ("4.13", AttachType.CGROUP_SOCK_OPS),
}


def _tracing(kind: str, place: str) -> Callable[[], Finding]:
    return functools.partial(_loading.tracing, kind, place)


HOOKS: dict[str, Hook] = {
    # Packets
    "xdp": Hook("4.8", (), functools.partial(_program, "xdp", "xdp")),
    "live frames": Hook("5.18", (), _live_frames),
    "tcx": Hook("6.6", ("CONFIG_NET_XGRESS",), functools.partial(_queried, "tcx", AttachType.TCX_INGRESS)),
    "clsact": Hook(
        "4.5", ("CONFIG_NET_CLS_ACT",), functools.partial(_kernel.module, "sch_ingress", "CONFIG_NET_SCH_INGRESS")
    ),
    "netkit": Hook("6.7", ("CONFIG_NETKIT",), functools.partial(_queried, "netkit", AttachType.NETKIT_PRIMARY)),
    "netfilter": Hook(
        "6.4", ("CONFIG_NETFILTER_BPF_LINK",), functools.partial(_program, "netfilter", "netfilter")
    ),
    "socket_filter": Hook("3.19", (), functools.partial(_program, "socket_filter", "socket_filter")),
    # Tracing
    "kprobe": Hook("4.1", ("CONFIG_KPROBES", "CONFIG_KPROBE_EVENTS"), functools.partial(_event_source, "kprobe")),
    "kprobe.multi": Hook(
        "5.18", ("CONFIG_FPROBE",), functools.partial(_multi, "kprobe.multi", AttachType.TRACE_KPROBE_MULTI)
    ),
    "uprobe": Hook("4.1", ("CONFIG_UPROBES", "CONFIG_UPROBE_EVENTS"), functools.partial(_event_source, "uprobe")),
    "uprobe.multi": Hook(
        "6.6",
        ("CONFIG_UPROBES", "CONFIG_BPF_EVENTS"),
        functools.partial(_multi, "uprobe.multi", AttachType.TRACE_UPROBE_MULTI),
    ),
    "tracepoint": Hook("4.7", ("CONFIG_BPF_EVENTS",), functools.partial(_tracefs, "tracepoint")),
    "raw_tracepoint": Hook(
        "4.17", ("CONFIG_BPF_EVENTS",), functools.partial(_program, "raw_tracepoint", "raw_tracepoint")
    ),
    "tp_btf": Hook("5.5", ("CONFIG_BPF_EVENTS", "CONFIG_DEBUG_INFO_BTF"), _tracing("tp_btf", "sched_switch")),
    "fentry": Hook("5.5", _TRAMPOLINE, _tracing("fentry", "do_nanosleep")),
    "fexit": Hook("5.5", _TRAMPOLINE, _tracing("fexit", "do_nanosleep")),
    "fmod_ret": Hook("5.7", _TRAMPOLINE, _tracing("fmod_ret", "security_file_open")),
    "iter": Hook("5.8", ("CONFIG_BPF_EVENTS", "CONFIG_DEBUG_INFO_BTF"), _tracing("iter", "task")),
    "lsm": Hook("5.7", ("CONFIG_BPF_LSM", *_TRAMPOLINE), _lsm),
    "freplace": Hook("5.6", ("CONFIG_BPF_JIT", "CONFIG_DEBUG_INFO_BTF"), functools.partial(_program, "freplace", "ext")),
    "perf_event": Hook("4.9", ("CONFIG_PERF_EVENTS",), functools.partial(_program, "perf_event", "perf_event")),
    "perf links": Hook(
        "5.15",
        ("CONFIG_PERF_EVENTS",),
        functools.partial(_linked, "perf links", "perf_event", AttachType.PERF_EVENT, {errnos.EBADF}),
    ),
    # Sockets
    "sk_lookup": Hook("5.9", (), functools.partial(_program, "sk_lookup", "sk_lookup")),
    "sk_msg": Hook("4.17", (), functools.partial(_program, "sk_msg", "sk_msg")),
    "sk_skb": Hook("4.14", (), functools.partial(_program, "sk_skb", "sk_skb")),
    "sockmap links": Hook(
        "6.10",
        (),
        functools.partial(_linked, "sockmap links", "sk_msg", AttachType.SK_MSG_VERDICT, {errnos.EBADF}),
    ),
    **{
        name: Hook(minimum, _CGROUP, functools.partial(_queried, name, attach_type))
        for name, (minimum, attach_type) in _CGROUP_HOOKS.items()
    },
    # What programs may use
    "ring buffer": Hook("5.8", (), functools.partial(_loading.map_type, "ringbuf")),
    "arena": Hook("6.9", ("CONFIG_MMU", "CONFIG_BPF_JIT"), functools.partial(_loading.map_type, "arena")),
    "bpf_loop": Hook("5.17", (), functools.partial(_loading.helper, "xdp", "bpf_loop")),
    "open-coded iterators": Hook("6.4", ("CONFIG_DEBUG_INFO_BTF",), functools.partial(kfunc, "bpf_iter_num_new")),
    "bpf_sock_destroy": Hook(
        "6.5", ("CONFIG_INET", "CONFIG_DEBUG_INFO_BTF"), functools.partial(kfunc, "bpf_sock_destroy")
    ),
    "token": Hook("6.9", (), _token),
}  # fmt: skip
