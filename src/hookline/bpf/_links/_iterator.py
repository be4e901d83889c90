"""Iterators: programs that write text or bytes about each object of a kind, for whoever reads them."""

from __future__ import annotations

import ctypes
import errno as errnos
import io
import os
import struct
from typing import TYPE_CHECKING, Literal

from hookline.bpf import _syscall
from hookline.bpf._arguments import one_of, process_number
from hookline.bpf._errors import BpfError
from hookline.bpf._links._attach_cgroup import open_cgroup
from hookline.bpf._links._link import Link, create, expect_type, made
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType, Command

if TYPE_CHECKING:
    from hookline.bpf._maps._map import Map

__all__ = ["CgroupOrder", "Iterator", "attach_iterator"]

CgroupOrder = Literal["self", "descendants", "descendants-last", "ancestors"]
_TAKES = {
    "bpf_map_elem": ("map",),
    "bpf_sk_storage_map": ("map",),
    "cgroup": ("cgroup",),
    "task": ("process", "thread"),
    "task_file": ("process", "thread"),
    "task_vma": ("process", "thread"),
}
_ORDERS = {"self": 1, "descendants": 2, "descendants-last": 3, "ancestors": 4}


class Iterator(Link):
    """An iterator's link. Each `open` walks all objects anew; a pinned one is read as a file, too."""

    def open(self) -> io.BufferedReader:
        """Begin a walk: a binary file that ends after the last object.

        Network objects are those of the calling thread's network namespace.

        Raises:
            BpfError: The kernel refuses.
        """
        attr = _syscall.attributes("II", self.fd, 0)
        fd = _syscall.checked(Command.ITER_CREATE, attr, "cannot start the iterator", capability="CAP_BPF")
        return io.BufferedReader(io.FileIO(fd))

    def read(self) -> bytes:
        """All that one walk writes."""
        with self.open() as file:
            return file.read()

    def text(self) -> str:
        """All that one walk writes, as text."""
        return self.read().decode(errors="replace")


def attach_iterator(
    program: ProgramHandle,
    *,
    map: Map | None,
    process: int | None,
    thread: int | None,
    cgroup: str | os.PathLike[str] | None,
    order: CgroupOrder,
) -> Iterator:
    """Make an iterator's link; see `Program.attach_iterator`."""
    where = program.section or "its iterator"
    expect_type(program, where, "tracing")
    given = {"map": map, "process": process, "thread": thread, "cgroup": cgroup}
    _check_target(program, [name for name, target in given.items() if target is not None])
    how = one_of(_ORDERS, order, "order of cgroups")
    opened = -1
    if map is not None:
        target = struct.pack("=I", map.fd)
    elif cgroup is not None:
        opened = open_cgroup(cgroup)
        target = struct.pack("=IIQ", how, opened, 0)
    elif process is not None:
        target = struct.pack("=III", 0, process_number(process), 0)
    elif thread is not None:
        target = struct.pack("=III", process_number(thread), 0, 0)
    else:
        target = b""
    # The kernel takes the whole union or nothing.
    buffer = ctypes.create_string_buffer(target.ljust(16, b"\0"), 16) if target else None
    try:
        result = create(
            program,
            0,
            AttachType.TRACE_ITER,
            0,
            "QI4x",
            _syscall.address(buffer),
            len(buffer) if buffer else 0,
        )
    finally:
        if opened >= 0:
            os.close(opened)
    if result in (-errnos.EINVAL, -errnos.EBADF) and "map" in program.section:
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=-result,
            why="it iterates over the entries of one map"
            if map is None
            else f"it does not iterate over a {map.type}, or not with these sizes of keys and values",
            remedy="say which: attach_iterator(map=…)" if map is None else "",
        )
    return Iterator(made(result, program, where))


def _check_target(program: ProgramHandle, given: list[str]) -> None:
    """The kernel would take a map's descriptor for a thread's number, or ignore what it does not expect."""
    if len(given) > 1:
        raise BpfError(f"program {program.name!r} cannot iterate over more than one of its targets")
    kind = program.section.partition("/")[2]
    takes = _TAKES.get(kind, ())
    if kind and given and given[0] not in takes:
        raise BpfError(
            f"program {program.name!r} cannot iterate over one {given[0]}",
            errno=errnos.EINVAL,
            why=f"an iterator of {kind} takes {' or '.join(takes) if takes else 'no target'}",
        )
