"""The map types whose keys or values stand for something else: programs, maps, sockets, devices, cgroups.

The kernel takes a descriptor where such a thing is put in, and answers a number of its own where it is read: a program's
or a map's id, a socket's cookie, an interface's index. What is given here may be the thing itself.

A socket in a sockmap or sockhash changes: ``ioctl(FIONREAD)`` on it answers 0 on some kernels (6.6.128+, 6.12.75+, 6.18.14+,
6.19+), as if nothing were there to read, unless the map also has a ``sk_skb`` verdict program, which may simply
pass everything: attach one beside any ``sk_msg`` program.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import numpy as np

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError

__all__ = ["OWNED", "SPECIAL", "default_dtype", "key", "value"]

OWNED = {"sk_storage", "task_storage", "inode_storage", "cgrp_storage"}
"""Maps whose entries belong to a socket, process, file or cgroup: a descriptor of it is the key."""

_DESCRIPTORS = {
    "prog_array": "a Program",
    "perf_event_array": "a perf event's descriptor",
    "cgroup_array": "a cgroup's path or descriptor",
    "array_of_maps": "a Map",
    "hash_of_maps": "a Map",
    "sockmap": "a socket",
    "sockhash": "a socket",
    "reuseport_sockarray": "a socket",
    "xskmap": "an AF_XDP socket",
}
_DEVICES = {"devmap", "devmap_hash"}
_WITH_PROGRAM = {"devmap": "ifindex", "devmap_hash": "ifindex", "cpumap": "queue_size"}
SPECIAL = {*OWNED, *_DESCRIPTORS, *_WITH_PROGRAM}


def default_dtype(kind: str, what: str, size: int) -> np.dtype[Any] | None:
    """The dtype that a map type gives to its value by itself; None where the C type decides.

    A device's or CPU's value is its interface's index or its queue's length, and the id of its own program or 0.
    """
    if what == "value" and kind in _WITH_PROGRAM and size == 8:
        return np.dtype([(_WITH_PROGRAM[kind], "u4"), ("program", "u4")])
    if what == "value" and kind == "stack_trace" and size % 8 == 0:
        return np.dtype(("u8", (size // 8,)))
    return None


def key(kind: str, given: Any, opened: ExitStack) -> Any:
    """A key as a plain number where the map's entries belong to something; `opened` closes what it took."""
    return _descriptor(given, f"the key of a {kind}", opened) if kind in OWNED else given


def value(kind: str, given: Any, size: int, opened: ExitStack) -> Any:
    """A value as plain numbers.

    Args:
        kind: The map's type.
        given: The thing, its descriptor, or a tuple of a device (name or index) or queue size and a `Program`.
        size: How many bytes the map's values have.
        opened: Closes what had to be opened.

    Raises:
        BpfError: It is no such thing, or the map's values have no room for a program.
    """
    if kind in _DESCRIPTORS:
        return _descriptor(given, _DESCRIPTORS[kind], opened)
    if kind not in _WITH_PROGRAM or isinstance(given, bytes):
        return given
    number, program = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if kind in _DEVICES and isinstance(number, str):
        number = _syscall.interface_index(number)
    if size == 8:
        return (number, _descriptor(program, "a Program", opened) if program is not None else 0)
    if program is not None:
        raise BpfError(
            f"this {kind} has no room for a program",
            why=f"its values have {size} bytes",
            remedy="give it values of 8: struct bpf_devmap_val or bpf_cpumap_val",
        )
    return number


def _descriptor(given: Any, wanted: str, opened: ExitStack) -> Any:
    if isinstance(given, str | os.PathLike):
        try:
            fd = os.open(given, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BpfError(
                f"cannot open {os.fspath(given)}",
                errno=error.errno or 0,
                remedy="name a path that is there and that this user may open",
            ) from None
        opened.callback(os.close, fd)
        return fd
    if hasattr(given, "fd"):
        return given.fd
    if hasattr(given, "fileno"):
        return given.fileno()
    try:
        return int(given)
    except (TypeError, ValueError):
        raise BpfError(
            f"{given!r} cannot be put there",
            why=f"{wanted} is wanted",
            remedy="give the thing itself, its descriptor, or its path",
        ) from None
