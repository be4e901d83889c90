"""Trial loads: the smallest program or map of a kind is made and closed at once; nothing is attached."""

from __future__ import annotations

import ctypes
import errno as errnos
import functools
import mmap
import os
import re
import struct
from typing import NamedTuple

from hookline.bpf import _rights, _syscall
from hookline.bpf._errors import ENOTSUPP, BpfError
from hookline.bpf._objects import _libbpf
from hookline.bpf._syscall import AttachType, Command
from hookline.bpf.features import _helpers
from hookline.bpf.features._finding import Finding, no, refused, unknown, yes

__all__ = ["function_id", "helper", "map_type", "opened", "program_type", "tracing"]

# No descriptor has this number, no interface this index: what names it changes nothing.
NOWHERE = 0x7FFFFFFF

_RETURN_0 = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
_LOG_BYTES = 16384
_SLEEPABLE = 1 << 4

NETWORK = ("CAP_BPF", "CAP_NET_ADMIN")
TRACING = ("CAP_BPF", "CAP_PERFMON")
# The expected attach type without which these types are not loaded.
_ATTACH_TYPES = {
    "cgroup_sock": AttachType.CGROUP_INET_SOCK_CREATE,
    "cgroup_sock_addr": AttachType.CGROUP_INET4_CONNECT,
    "cgroup_sockopt": AttachType.CGROUP_GETSOCKOPT,
    "sk_lookup": AttachType.SK_LOOKUP,
    "netfilter": AttachType.NETFILTER,
}
PROGRAM_RELEASES = {
    "socket_filter": "3.19", "kprobe": "4.1", "sched_cls": "4.1", "sched_act": "4.1", "tracepoint": "4.7",
    "xdp": "4.8", "perf_event": "4.9", "cgroup_skb": "4.10", "cgroup_sock": "4.10", "lwt_in": "4.10",
    "lwt_out": "4.10", "lwt_xmit": "4.10", "sock_ops": "4.13", "sk_skb": "4.14", "cgroup_device": "4.15",
    "sk_msg": "4.17", "raw_tracepoint": "4.17", "cgroup_sock_addr": "4.17", "lwt_seg6local": "4.18",
    "lirc_mode2": "4.18", "sk_reuseport": "4.19", "flow_dissector": "4.20", "cgroup_sysctl": "5.2",
    "raw_tracepoint_writable": "5.2", "cgroup_sockopt": "5.3", "tracing": "5.5", "struct_ops": "5.6",
    "ext": "5.6", "lsm": "5.7", "sk_lookup": "5.9", "syscall": "5.14", "netfilter": "6.4",
}  # fmt: skip
PROGRAM_CONFIG = {
    "kprobe": ("CONFIG_BPF_EVENTS",),
    "tracepoint": ("CONFIG_BPF_EVENTS",),
    "perf_event": ("CONFIG_BPF_EVENTS",),
    "raw_tracepoint": ("CONFIG_BPF_EVENTS",),
    "raw_tracepoint_writable": ("CONFIG_BPF_EVENTS",),
    "tracing": ("CONFIG_BPF_EVENTS", "CONFIG_DEBUG_INFO_BTF"),
    "lsm": ("CONFIG_BPF_LSM", "CONFIG_DEBUG_INFO_BTF"),
    "struct_ops": ("CONFIG_BPF_JIT", "CONFIG_DEBUG_INFO_BTF"),
    "ext": ("CONFIG_BPF_JIT", "CONFIG_DEBUG_INFO_BTF"),
    "lirc_mode2": ("CONFIG_BPF_LIRC_MODE2",),
    "lwt_in": ("CONFIG_LWTUNNEL_BPF",),
    "lwt_out": ("CONFIG_LWTUNNEL_BPF",),
    "lwt_xmit": ("CONFIG_LWTUNNEL_BPF",),
    "lwt_seg6local": ("CONFIG_IPV6_SEG6_BPF",),
    "netfilter": ("CONFIG_NETFILTER_BPF_LINK",),
    **dict.fromkeys(
        ("cgroup_skb", "cgroup_sock", "sock_ops", "cgroup_device", "cgroup_sock_addr", "cgroup_sysctl",
         "cgroup_sockopt"),
        ("CONFIG_CGROUP_BPF",),
    ),
}  # fmt: skip

MAP_RELEASES = {
    "hash": "3.19", "array": "3.19", "prog_array": "4.2", "perf_event_array": "4.3", "percpu_hash": "4.6",
    "percpu_array": "4.6", "stack_trace": "4.6", "cgroup_array": "4.8", "lru_hash": "4.10",
    "lru_percpu_hash": "4.10", "lpm_trie": "4.11", "array_of_maps": "4.12", "hash_of_maps": "4.12",
    "devmap": "4.14", "sockmap": "4.14", "cpumap": "4.15", "xskmap": "4.18", "sockhash": "4.18",
    "cgroup_storage": "4.19", "reuseport_sockarray": "4.19", "percpu_cgroup_storage": "4.20", "queue": "4.20",
    "stack": "4.20", "sk_storage": "5.2", "devmap_hash": "5.4", "struct_ops": "5.6", "ringbuf": "5.8",
    "inode_storage": "5.10", "task_storage": "5.11", "bloom_filter": "5.16", "user_ringbuf": "6.1",
    "cgrp_storage": "6.2", "arena": "6.9",
}  # fmt: skip
MAP_CONFIG = {
    "xskmap": ("CONFIG_XDP_SOCKETS",),
    "cgroup_array": ("CONFIG_CGROUPS",),
    "cgroup_storage": ("CONFIG_CGROUP_BPF",),
    "percpu_cgroup_storage": ("CONFIG_CGROUP_BPF",),
    "cgrp_storage": ("CONFIG_CGROUPS",),
    "inode_storage": ("CONFIG_BPF_LSM",),
    "perf_event_array": ("CONFIG_PERF_EVENTS",),
    "stack_trace": ("CONFIG_PERF_EVENTS",),
    "struct_ops": ("CONFIG_BPF_JIT", "CONFIG_DEBUG_INFO_BTF"),
    "arena": ("CONFIG_MMU", "CONFIG_BPF_JIT"),
}
_NO_PREALLOC, _MMAPABLE = 1 << 0, 1 << 10
_PAGE = mmap.PAGESIZE


class _MapShape(NamedTuple):
    """The smallest map of a type, or an impossible one that only a kernel with the type gets to refuse."""

    key: int = 4
    value: int = 4
    entries: int = 1
    flags: int = 0
    inner: int = 0
    # A storage's value is typed, and too large: E2BIG comes after the type is known and before its BTF is.
    typed: bool = False
    kernel_type: int = 0


_SHAPES = {
    "lpm_trie": _MapShape(key=8, flags=_NO_PREALLOC),
    "stack_trace": _MapShape(value=8),
    "array_of_maps": _MapShape(inner=NOWHERE),
    "hash_of_maps": _MapShape(inner=NOWHERE),
    "cgroup_storage": _MapShape(key=16, value=8, entries=0),
    "percpu_cgroup_storage": _MapShape(key=16, value=8, entries=0),
    "reuseport_sockarray": _MapShape(value=8),
    "queue": _MapShape(key=0),
    "stack": _MapShape(key=0),
    "bloom_filter": _MapShape(key=0),
    "ringbuf": _MapShape(key=0, value=0, entries=_PAGE),
    "user_ringbuf": _MapShape(key=0, value=0, entries=_PAGE),
    "arena": _MapShape(key=0, value=0, flags=_MMAPABLE),
    "struct_ops": _MapShape(kernel_type=1),
    **dict.fromkeys(
        ("sk_storage", "inode_storage", "task_storage", "cgrp_storage"),
        _MapShape(value=1 << 20, entries=0, flags=_NO_PREALLOC, typed=True),
    ),
}


class Trial(NamedTuple):
    """What the kernel made of a trial load: its result, and its verifier's log."""

    errno: int
    log: str


def load(
    number: int, code: bytes = _RETURN_0, attach_type: int = 0, function: int = 0, flags: int = 0
) -> Trial:
    """Load a program and close it at once."""
    result, log = _load(number, code, attach_type, function, flags)
    if result >= 0:
        os.close(result)
    return Trial(max(0, -result), log)


def opened(number: int, attach_type: int = 0) -> int:
    """A descriptor of a program that returns 0, or the negative errno. The caller closes it."""
    return _load(number, _RETURN_0, attach_type, 0, 0)[0]


def _load(number: int, code: bytes, attach_type: int, function: int, flags: int) -> tuple[int, str]:
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attr = _syscall.attributes(
        "IIQQIIQIIQQIIIIQIIQIIII",
        number,
        len(code) // 8,
        _syscall.address(instructions),
        _syscall.address(licence),
        1,
        _LOG_BYTES,
        _syscall.address(log),
        _kernel_version() if number == _number("kprobe") else 0,
        flags,
        0,
        0,
        0,
        attach_type,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        function,
        0,
        0,
    )
    with _syscall.signals_held():
        result = _syscall.call(Command.PROG_LOAD, attr)
    return result, log.value.decode(errors="replace")


@functools.cache
def function_id(name: str, attach_type: int) -> int:
    """The number in the kernel's BTF of a function, tracepoint or LSM hook; 0 where there is none."""
    with _libbpf.messages():
        return max(0, int(_libbpf.library().libbpf_find_vmlinux_btf_id(name.encode(), attach_type)))


@functools.cache
def program_type(name: str) -> Finding:
    """Whether programs of a type can be loaded."""
    number = _number(name)
    feature = f"program type {name}"
    capabilities = _rights.for_programs([name])
    if name in ("tracing", "lsm"):
        kind, place = ("tp_btf", "sched_switch") if name == "tracing" else ("lsm", "file_open")
        return _renamed(tracing(kind, place), feature)
    if name == "struct_ops":
        return _refusal_is_yes(feature, load(number, function=1), capabilities, "is not a supported struct")
    if name == "ext":
        trial = load(number, function=1)
        return _refusal_is_yes(feature, trial, capabilities, "Cannot replace kernel functions")
    trial = load(number, attach_type=_ATTACH_TYPES.get(name, 0), flags=_SLEEPABLE if name == "syscall" else 0)
    if not trial.errno:
        return yes(feature, "one was loaded")
    if trial.errno == errnos.EPERM:
        return refused(feature, *capabilities)
    if trial.errno == errnos.EINVAL and not trial.log.strip():
        return no(feature, "the kernel does not know it")
    return unknown(feature, _said(trial))


_TRACING_KINDS = {
    "tp_btf": ("tracing", AttachType.TRACE_RAW_TP),
    "fentry": ("tracing", AttachType.TRACE_FENTRY),
    "fexit": ("tracing", AttachType.TRACE_FEXIT),
    "fmod_ret": ("tracing", AttachType.MODIFY_RETURN),
    "iter": ("tracing", AttachType.TRACE_ITER),
    "lsm": ("lsm", AttachType.LSM_MAC),
    "lsm_cgroup": ("lsm", AttachType.LSM_CGROUP),
}


@functools.cache
def tracing(kind: str, place: str) -> Finding:
    """Whether a program for a kernel function, a typed tracepoint, an iterator or an LSM hook can be loaded.

    Only a load with a real function tells: the kernel's policy speaks after the function is found.
    """
    type_name, attach_type = _TRACING_KINDS[kind]
    # LSM_CGROUP hooks have the names of LSM_MAC ones; libbpf 1.1 knows the prefix of the latter only.
    lookup = AttachType.LSM_MAC if kind == "lsm_cgroup" else attach_type
    function = function_id(place, lookup)
    if not function:
        if not os.path.exists("/sys/kernel/btf/vmlinux"):
            return no(kind, "the kernel has no types of its own (CONFIG_DEBUG_INFO_BTF)")
        return no(kind, f"the kernel's types have no {place} to attach to")
    trial = load(_number(type_name), attach_type=attach_type, function=function)
    if not trial.errno:
        return yes(kind, f"one was loaded for {place}")
    if trial.errno == errnos.EPERM:
        return refused(kind, *TRACING)
    if trial.errno in (errnos.EINVAL, ENOTSUPP, errnos.EOPNOTSUPP):
        return no(kind, _said(trial))
    return unknown(kind, _said(trial))


@functools.cache
def map_type(name: str) -> Finding:
    """Whether maps of a type can be made."""
    number = _known(name, _syscall.MAP_TYPES, "map type")
    feature = f"map type {name}"
    shape = _SHAPES.get(name, _MapShape())
    typed = 1 if shape.typed else 0
    attr = _syscall.attributes(
        "IIIIIIIQQIIIII",
        number,
        shape.key,
        shape.value,
        shape.entries,
        shape.flags,
        shape.inner,
        0,
        0,
        0,
        0,
        0,
        typed,
        typed,
        shape.kernel_type,
    )
    result = _syscall.call(Command.MAP_CREATE, attr)
    if result >= 0:
        os.close(result)
        return yes(feature, "one was made")
    if result == -errnos.EPERM:
        return refused(feature, *_rights.for_maps([name]))
    if result in (-errnos.E2BIG, -errnos.EBADF, -ENOTSUPP):
        return yes(feature, "the kernel knows it, and refuses the probe for its size or its inner map")
    if result == -errnos.EINVAL:
        return no(feature, "the kernel does not know it")
    return unknown(feature, os.strerror(-result))


@functools.cache
def helper(program: str, wanted: str | int) -> Finding:
    """Whether programs of a type may call a helper."""
    number = _number(program)
    helper_number = _helpers.number_of(wanted)
    feature = f"helper {_helpers.name_of(helper_number)} in {program} programs"
    capabilities = _rights.for_programs([program])
    attach_type, function = _ATTACH_TYPES.get(program, 0), 0
    if program in ("tracing", "lsm"):
        kind, place = ("tp_btf", "sched_switch") if program == "tracing" else ("lsm", "file_open")
        attach_type = _TRACING_KINDS[kind][1]
        function = function_id(place, attach_type)
    elif program in ("struct_ops", "ext"):
        return unknown(feature, f"{program} programs have the helpers of what they are made for")
    call = struct.pack("<BBhi", 0x85, 0, 0, helper_number) + _RETURN_0
    flags = _SLEEPABLE if program == "syscall" else 0
    trial = load(number, call, attach_type, function, flags)
    if not trial.errno:
        return yes(feature, "a program that calls it was loaded")
    if re.search(r"invalid func|unknown func|program of this type cannot use helper", trial.log):
        return no(feature, _last(trial.log))
    if trial.log.strip() and trial.errno in (errnos.EINVAL, errnos.EACCES, errnos.EPERM):
        return yes(feature, "the verifier knows it, and asks for its arguments")
    if trial.errno == errnos.EPERM:
        return refused(feature, *capabilities)
    if not program_type(program):
        return no(feature, f"the kernel has no program type {program}")
    return unknown(feature, _said(trial))


def _refusal_is_yes(feature: str, trial: Trial, capabilities: tuple[str, ...], words: str) -> Finding:
    """For types that cannot be loaded alone: the words that only a kernel with the type answers with."""
    if words in trial.log:
        return yes(feature, "the kernel knows it, and refuses the probe for its target")
    if trial.errno == errnos.EPERM:
        return refused(feature, *capabilities)
    if trial.errno == errnos.EINVAL and not trial.log.strip():
        return no(feature, "the kernel does not know it")
    return unknown(feature, _said(trial))


def _renamed(finding: Finding, feature: str) -> Finding:
    return Finding(feature, finding.answer, finding.why, capability=finding.capability, policy=finding.policy)


def _said(trial: Trial) -> str:
    return _last(trial.log) or (
        "the kernel does not support it (ENOTSUPP)" if trial.errno == ENOTSUPP else os.strerror(trial.errno)
    )


def _last(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    return lines[-1].strip() if lines else ""


def _number(program: str) -> int:
    return _known(program, _syscall.PROGRAM_TYPES, "program type")


def _known(name: str, names: list[str], kind: str) -> int:
    from hookline.bpf._types._codec import unknown_name

    if name not in names[1:]:
        raise unknown_name(kind, name, names[1:], "eBPF")
    return names.index(name)


def _kernel_version() -> int:
    """LINUX_VERSION_CODE, which kernels before 5.0 compare for kprobe programs."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", os.uname().release)
    if not found:
        raise BpfError(f"the kernel's release {os.uname().release!r} is not a version")
    major, minor, patch = map(int, found.groups())
    return major << 16 | minor << 8 | min(patch, 255)
