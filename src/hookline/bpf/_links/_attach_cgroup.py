"""Onto a cgroup, for the processes in it and below it, and onto a network namespace."""

from __future__ import annotations

import errno as errnos
import fcntl
import os
from pathlib import Path

from hookline.bpf._arguments import path_text
from hookline.bpf._errors import BpfError, lacking
from hookline.bpf._links._link import Link, create, expect_type, made
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType

__all__ = [
    "CGROUP_HOOKS",
    "NETNS_HOOKS",
    "attach_cgroup",
    "attach_netns",
    "cgroup_folder",
    "open_cgroup",
    "open_netns",
]

CGROUP_HOOKS = {
    "ingress": AttachType.CGROUP_INET_INGRESS,
    "egress": AttachType.CGROUP_INET_EGRESS,
    "sock_create": AttachType.CGROUP_INET_SOCK_CREATE,
    "sock_release": AttachType.CGROUP_INET_SOCK_RELEASE,
    "sock_ops": AttachType.CGROUP_SOCK_OPS,
    "device": AttachType.CGROUP_DEVICE,
    "sysctl": AttachType.CGROUP_SYSCTL,
    "getsockopt": AttachType.CGROUP_GETSOCKOPT,
    "setsockopt": AttachType.CGROUP_SETSOCKOPT,
    "bind4": AttachType.CGROUP_INET4_BIND,
    "bind6": AttachType.CGROUP_INET6_BIND,
    "post_bind4": AttachType.CGROUP_INET4_POST_BIND,
    "post_bind6": AttachType.CGROUP_INET6_POST_BIND,
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "connect_unix": AttachType.CGROUP_UNIX_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "sendmsg_unix": AttachType.CGROUP_UNIX_SENDMSG,
    "recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "recvmsg_unix": AttachType.CGROUP_UNIX_RECVMSG,
    "getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
    "getpeername_unix": AttachType.CGROUP_UNIX_GETPEERNAME,
    "getsockname4": AttachType.CGROUP_INET4_GETSOCKNAME,
    "getsockname6": AttachType.CGROUP_INET6_GETSOCKNAME,
    "getsockname_unix": AttachType.CGROUP_UNIX_GETSOCKNAME,
    "lsm": AttachType.LSM_CGROUP,
}
"""The hooks of a cgroup by the names that sections give them."""

NETNS_HOOKS = {"sk_lookup": AttachType.SK_LOOKUP, "flow_dissector": AttachType.FLOW_DISSECTOR}
"""The hooks of a network namespace, which are also the program types' names."""

CGROUP_TYPES = (
    "cgroup_skb",
    "cgroup_sock",
    "cgroup_sock_addr",
    "cgroup_sockopt",
    "cgroup_device",
    "cgroup_sysctl",
    "sock_ops",
    "lsm",
)
_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000  # ioctl_ns(2)
_ONLY_HOOK = {
    "sock_ops": AttachType.CGROUP_SOCK_OPS,
    "cgroup_device": AttachType.CGROUP_DEVICE,
    "cgroup_sysctl": AttachType.CGROUP_SYSCTL,
}


def cgroup_folder() -> Path:
    """Where cgroup v2 is mounted.

    Raises:
        BpfError: It is mounted nowhere that this process sees.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split(" ")[4])
    raise BpfError(
        "there is no cgroup v2",
        why="/proc/self/mountinfo names no cgroup2 file system",
        remedy="mount -t cgroup2 none /sys/fs/cgroup",
    )


def open_cgroup(path: str | os.PathLike[str]) -> int:
    """A new descriptor of a cgroup's folder; a relative path begins where cgroup v2 is mounted.

    Raises:
        BpfError: There is none.
    """
    place = Path(path_text(path, "path of a cgroup"))
    if not place.is_absolute():
        place = cgroup_folder() / place
    try:
        return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BpfError(
            f"there is no cgroup {os.fspath(path)}",
            errno=error.errno or 0,
            remedy=f"cgroup v2 is at {cgroup_folder()}; mkdir makes a new one there",
        ) from None


def attach_cgroup(program: ProgramHandle, path: str | os.PathLike[str], attach_type: int | None) -> Link:
    """Make a cgroup link; see `Program.attach_cgroup`."""
    where = f"cgroup {os.fspath(path)}"
    expect_type(program, where, *CGROUP_TYPES)
    if attach_type is not None and attach_type not in CGROUP_HOOKS.values():
        raise BpfError(f"{attach_type} is no hook of a cgroup", remedy=f"there are {', '.join(CGROUP_HOOKS)}")
    kind = attach_type if attach_type is not None else program.expected_attach_type
    kind = _ONLY_HOOK.get(program.type, kind)
    if kind is None or (attach_type is None and program.section == "cgroup/skb"):
        told = "its section does not tell" if program.section else "the kernel does not tell"
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            why=f"a program of type {program.type} has several hooks there, and {told} which",
            remedy=f"give attach_type: {', '.join(CGROUP_HOOKS)}",
        )
    folder = open_cgroup(path)
    try:
        result = create(program, folder, kind)
    finally:
        os.close(folder)
    if result == -errnos.EBADF:
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=errnos.EBADF,
            why="it is no folder of cgroup v2",
            remedy=f"cgroup v2 is at {cgroup_folder()}",
        )
    if result == -errnos.EPERM and not lacking("CAP_NET_ADMIN", "CAP_BPF"):
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=errnos.EPERM,
            why="a program that does not share holds the hook there or above, attached without BPF_F_ALLOW_MULTI",
            remedy="bpftool cgroup tree shows it; its owner can attach it with multi",
        )
    return Link(made(result, program, where, capability="CAP_NET_ADMIN CAP_BPF", remedies=_CGROUP_REMEDIES))


_CGROUP_REMEDIES = {
    errnos.EINVAL: "its hook must be the one that it was loaded for",
    errnos.E2BIG: "a hook of a cgroup takes 64 programs",
}


def attach_netns(program: ProgramHandle, namespace: str | os.PathLike[str] | int | None) -> Link:
    """Make a network namespace's link; see `Program.attach_netns`."""
    where = "this network namespace" if namespace is None else f"network namespace {namespace}"
    expect_type(program, where, *NETNS_HOOKS)
    target = open_netns(namespace)
    try:
        result = create(program, target, NETNS_HOOKS[program.type])
    finally:
        os.close(target)
    if program.type == "flow_dissector" and -result in (errnos.EEXIST, errnos.E2BIG):
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=-result,
            why="it, or the first network namespace, has a flow dissector already; there can be only one",
            remedy="detach that one first: bpftool net list names it",
        )
    return Link(made(result, program, where, capability="CAP_NET_ADMIN CAP_BPF"))


def open_netns(namespace: str | os.PathLike[str] | int | None) -> int:
    """A new descriptor of a network namespace: a path, a name of ``ip netns``, a descriptor, or this one's.

    Raises:
        BpfError: There is none of that name, or it is something else.
    """
    place: Path | int = Path("/proc/thread-self/ns/net")
    if isinstance(namespace, int):
        place = namespace
    elif namespace is not None:
        place = Path(path_text(namespace, "network namespace"))
        if len(place.parts) == 1:
            place = Path("/run/netns") / place
    try:
        opened = (
            os.dup(place)
            if isinstance(place, int)
            else os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        )
    except OSError as error:
        raise BpfError(
            f"there is no network namespace {place}", errno=error.errno or 0, remedy="ip netns lists them"
        ) from None
    if not _is_netns(opened):
        os.close(opened)
        raise BpfError(f"{place} is no network namespace", errno=errnos.EINVAL, remedy="ip netns lists them")
    return opened


def _is_netns(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False
