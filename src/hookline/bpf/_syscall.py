"""The bpf(2) system call, by its number, with our own constants.

Debian 12's headers and libbpf describe Linux 6.1; newer commands and attach types are declared here, so that
one build of Hookline serves every kernel. Attributes are packed by hand: the kernel takes any prefix of
``union bpf_attr`` and reads the rest as zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import operator
import os
import platform
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum, IntFlag
from typing import SupportsIndex

from hookline.bpf._errors import BpfError, failure

__all__ = ["AttachType", "Command", "Flag", "attributes", "call", "checked", "interface_index", "name_of"]


class Command(IntEnum):
    """``enum bpf_cmd``."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    RAW_TRACEPOINT_OPEN = 17
    BTF_LOAD = 18
    BTF_GET_FD_BY_ID = 19
    TASK_FD_QUERY = 20
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    MAP_FREEZE = 22
    BTF_GET_NEXT_ID = 23
    MAP_LOOKUP_BATCH = 24
    MAP_LOOKUP_AND_DELETE_BATCH = 25
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    ENABLE_STATS = 32
    ITER_CREATE = 33
    LINK_DETACH = 34
    TOKEN_CREATE = 36


class AttachType(IntEnum):
    """``enum bpf_attach_type`` of Linux 6.18; each name without its ``BPF_``."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET_SOCK_CREATE = 2
    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_PARSER = 4
    SK_SKB_STREAM_VERDICT = 5
    CGROUP_DEVICE = 6
    SK_MSG_VERDICT = 7
    CGROUP_INET4_BIND = 8
    CGROUP_INET6_BIND = 9
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_INET4_POST_BIND = 12
    CGROUP_INET6_POST_BIND = 13
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    LIRC_MODE2 = 16
    FLOW_DISSECTOR = 17
    CGROUP_SYSCTL = 18
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_GETSOCKOPT = 21
    CGROUP_SETSOCKOPT = 22
    TRACE_RAW_TP = 23
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    MODIFY_RETURN = 26
    LSM_MAC = 27
    TRACE_ITER = 28
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    CGROUP_INET4_GETSOCKNAME = 31
    CGROUP_INET6_GETSOCKNAME = 32
    XDP_DEVMAP = 33
    CGROUP_INET_SOCK_RELEASE = 34
    XDP_CPUMAP = 35
    SK_LOOKUP = 36
    XDP = 37
    SK_SKB_VERDICT = 38
    SK_REUSEPORT_SELECT = 39
    SK_REUSEPORT_SELECT_OR_MIGRATE = 40
    PERF_EVENT = 41
    TRACE_KPROBE_MULTI = 42
    LSM_CGROUP = 43
    STRUCT_OPS = 44
    NETFILTER = 45
    TCX_INGRESS = 46
    TCX_EGRESS = 47
    TRACE_UPROBE_MULTI = 48
    CGROUP_UNIX_CONNECT = 49
    CGROUP_UNIX_SENDMSG = 50
    CGROUP_UNIX_RECVMSG = 51
    CGROUP_UNIX_GETPEERNAME = 52
    CGROUP_UNIX_GETSOCKNAME = 53
    NETKIT_PRIMARY = 54
    NETKIT_PEER = 55
    TRACE_KPROBE_SESSION = 56
    TRACE_UPROBE_SESSION = 57


class Flag(IntFlag):
    """Flags of links, of XDP attachment and of test runs; the kernel gives each command its own bits."""

    REPLACE = 1 << 2
    BEFORE = 1 << 3
    AFTER = 1 << 4
    LINK = 1 << 13
    XDP_GENERIC = 1 << 1
    XDP_NATIVE = 1 << 2
    XDP_OFFLOAD = 1 << 3
    TEST_XDP_LIVE_FRAMES = 1 << 1
    MMAPABLE = 1 << 10
    NO_PREALLOC = 1 << 0
    MAP_READ_ONLY_FOR_PROGRAMS = 1 << 7


# The kernel's names, as bpftool prints them; the position is the number.
PROGRAM_TYPES = [
    "unspec",
    "socket_filter",
    "kprobe",
    "sched_cls",
    "sched_act",
    "tracepoint",
    "xdp",
    "perf_event",
    "cgroup_skb",
    "cgroup_sock",
    "lwt_in",
    "lwt_out",
    "lwt_xmit",
    "sock_ops",
    "sk_skb",
    "cgroup_device",
    "sk_msg",
    "raw_tracepoint",
    "cgroup_sock_addr",
    "lwt_seg6local",
    "lirc_mode2",
    "sk_reuseport",
    "flow_dissector",
    "cgroup_sysctl",
    "raw_tracepoint_writable",
    "cgroup_sockopt",
    "tracing",
    "struct_ops",
    "ext",
    "lsm",
    "sk_lookup",
    "syscall",
    "netfilter",
]

MAP_TYPES = [
    "unspec",
    "hash",
    "array",
    "prog_array",
    "perf_event_array",
    "percpu_hash",
    "percpu_array",
    "stack_trace",
    "cgroup_array",
    "lru_hash",
    "lru_percpu_hash",
    "lpm_trie",
    "array_of_maps",
    "hash_of_maps",
    "devmap",
    "sockmap",
    "cpumap",
    "xskmap",
    "sockhash",
    "cgroup_storage",
    "reuseport_sockarray",
    "percpu_cgroup_storage",
    "queue",
    "stack",
    "sk_storage",
    "devmap_hash",
    "struct_ops",
    "ringbuf",
    "inode_storage",
    "task_storage",
    "bloom_filter",
    "user_ringbuf",
    "cgrp_storage",
    "arena",
]

LINK_TYPES = [
    "unspec",
    "raw_tracepoint",
    "tracing",
    "cgroup",
    "iter",
    "netns",
    "xdp",
    "perf_event",
    "kprobe_multi",
    "struct_ops",
    "netfilter",
    "tcx",
    "uprobe_multi",
    "netkit",
    "sockmap",
]


def name_of(names: list[str], number: int) -> str:
    """The kernel's name for a number, or the number where this Hookline does not know it yet."""
    return names[number] if 0 <= number < len(names) else f"type {number}"


_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "s390x": 351, "ppc64le": 361}
_NUMBER = _NUMBERS.get(platform.machine(), 280)

_libc = ctypes.CDLL(None, use_errno=True)
_syscall: Callable[..., int] = _libc.syscall
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong]
_libc.syscall.restype = ctypes.c_long


Attributes = ctypes.Array[ctypes.c_char]


def attributes(layout: str, *values: int) -> Attributes:
    """Pack a prefix of ``union bpf_attr``; the kernel's answers are read back from the same buffer."""
    try:
        packed = struct.pack("=" + layout, *values)
    except struct.error:
        raise _out_of_range(layout, values) from None
    return ctypes.create_string_buffer(packed, len(packed))


def _out_of_range(layout: str, values: tuple[int, ...]) -> BpfError:
    """The error for a number that the kernel's field does not hold."""
    for code, value in zip(re.findall("[IQ]", layout), values, strict=True):
        bits = 32 if code == "I" else 64
        if not isinstance(value, SupportsIndex):
            return BpfError(f"{value!r} is no whole number", errno=errnos.EINVAL)
        if not 0 <= operator.index(value) < 1 << bits:
            break
    return BpfError(
        f"{value} is out of range",
        errno=errnos.EINVAL,
        why=f"the kernel takes {bits} bits here: 0 to {(1 << bits) - 1}",
    )


# A crash stays a crash, with its traceback.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


@contextlib.contextmanager
def signals_held(*, stoppable: bool = False) -> Iterator[None]:
    """Let this thread's signals wait while the block runs: the kernel gives up long calls for any of them.

    Args:
        stoppable: Those that ask the process to stop do not wait.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        held = signal.valid_signals() - _FAULTS - (_STOPPING if stoppable else set())
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The kernel writes into their attributes and buffers how far it came: they cannot simply be made again.
_UNREPEATABLE = {
    Command.PROG_TEST_RUN,
    Command.MAP_LOOKUP_BATCH,
    Command.MAP_LOOKUP_AND_DELETE_BATCH,
    Command.MAP_UPDATE_BATCH,
    Command.MAP_DELETE_BATCH,
}


def call(command: Command, attr: Attributes) -> int:
    """Call bpf(2); returns its result, or the negative errno.

    Calls that a signal interrupts are made again, as Python does for its own (PEP 475). Trial runs and batches,
    of which a part may be done, answer -EINTR.
    """
    while True:
        result = _syscall(_NUMBER, command, attr, len(attr))
        if result >= 0:
            return result
        errno = ctypes.get_errno()
        if errno != errnos.EINTR or command in _UNREPEATABLE:
            return -errno


def checked(
    command: Command, attr: Attributes, what: str, *, capability: str = "CAP_BPF", remedy: str = ""
) -> int:
    """Call bpf(2) and raise for a refusal.

    Raises:
        NotPermitted: EPERM; `capability` names what it takes.
        BpfError: Any other errno; `what` says what failed.
    """
    result = call(command, attr)
    if result < 0:
        raise failure(-result, what, capability=capability, remedy=remedy)
    return result


def address(buffer: ctypes.Array[ctypes.c_char] | ctypes.Structure | None) -> int:
    """Where a ctypes buffer is, for a pointer inside the attributes; 0 for none."""
    return 0 if buffer is None else ctypes.addressof(buffer)


def info(fd: int, structure: ctypes.Structure, what: str) -> None:
    """Fill an info structure for a descriptor (BPF_OBJ_GET_INFO_BY_FD)."""
    attr = attributes("IIQ", fd, ctypes.sizeof(structure), address(structure))
    checked(Command.OBJ_GET_INFO_BY_FD, attr, f"cannot read the kernel's description of {what}")


def fd_by_id(command: Command, number: int, what: str) -> int:
    """A new descriptor for a kernel id; raises `BpfError` with ENOENT where there is none."""
    title = f"cannot open {what} with id {number}"
    result = call(command, attributes("III", number, 0, 0)) if 0 <= number < 1 << 32 else -errnos.ENOENT
    if result == -errnos.ENOENT:
        remedy = {
            "a program": "hookline programs list shows all, bpf.programs() yields them",
            "a map": "hookline maps list shows all, bpf.maps() yields them",
        }.get(what, "look again: what refers to it may be gone")
        raise BpfError(title, errno=errnos.ENOENT, why="nothing loaded has this id", remedy=remedy)
    if result < 0:
        raise failure(-result, title, capability="CAP_SYS_ADMIN")
    return result


def interface_index(interface: str | int) -> int:
    """The index of an interface in this thread's network namespace.

    Raises:
        BpfError: There is no such interface.
    """
    try:
        if isinstance(interface, str):
            return socket.if_nametoindex(interface)
        socket.if_indextoname(interface)
    except (OSError, OverflowError, ValueError):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise BpfError(
            f"there is no interface {interface!r} in this network namespace",
            errno=errnos.ENODEV,
            remedy=f"it has {names}" if names else "it has none",
        ) from None
    return interface


def interface_name(index: int) -> str:
    """The name of an interface of this thread's network namespace, or its index where it has none there."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def possible_cpus() -> int:
    """How many CPUs the kernel may ever bring up: per-CPU values have one slot for each."""
    global _possible_cpus
    if not _possible_cpus:
        with open("/sys/devices/system/cpu/possible") as file:
            ranges = [part.split("-") for part in file.read().strip().split(",")]
        _possible_cpus = sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
    return _possible_cpus


_possible_cpus = 0


def closed_quietly(fd: int) -> None:
    """Close a descriptor from a finaliser, where nobody can answer an error."""
    with contextlib.suppress(OSError):
        os.close(fd)
