"""What is loaded in the whole system, ours or not, by the kernel's ids. Needs CAP_SYS_ADMIN."""

from __future__ import annotations

import errno as errnos
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._links import _link_info
from hookline.bpf._links._link_info import LinkInfo
from hookline.bpf._maps import _map
from hookline.bpf._maps._map import MapDefinition
from hookline.bpf._programs import _info
from hookline.bpf._programs._info import ProgramInfo
from hookline.bpf._syscall import Command
from hookline.bpf._types import _kernel_types
from hookline.bpf._types._kernel_types import BtfInfo

__all__ = ["btfs", "every", "links", "maps", "program_name", "programs", "run_statistics"]

_Described = TypeVar("_Described")


def programs() -> Iterator[ProgramInfo]:
    """Every program in the kernel."""
    return every(Command.PROG_GET_NEXT_ID, Command.PROG_GET_FD_BY_ID, "a program", _info.describe)


def maps() -> Iterator[MapDefinition]:
    """Every map in the kernel."""
    return every(Command.MAP_GET_NEXT_ID, Command.MAP_GET_FD_BY_ID, "a map", _map.describe)


def links() -> Iterator[LinkInfo]:
    """Every link in the kernel."""
    return every(Command.LINK_GET_NEXT_ID, Command.LINK_GET_FD_BY_ID, "a link", _link_info.describe)


def btfs() -> Iterator[BtfInfo]:
    """Every set of types in the kernel: its own, its modules', and those that came with programs and maps."""
    return every(Command.BTF_GET_NEXT_ID, Command.BTF_GET_FD_BY_ID, "BTF", _kernel_types.describe)


def program_name(program_id: int) -> str:
    """The name of a program, or ``"?"`` where it is gone."""
    try:
        fd = _syscall.fd_by_id(Command.PROG_GET_FD_BY_ID, program_id, "a program")
    except BpfError:
        return "?"
    try:
        return _info.describe(fd).name
    finally:
        os.close(fd)


@contextmanager
def run_statistics() -> Iterator[None]:
    """Let the kernel count every program's runs and nanoseconds while the block runs (about 20 ns a run).

    `ProgramInfo.run_time_ns` and `ProgramInfo.run_count` grow meanwhile; read them before and after.
    """
    attr = _syscall.attributes("I", 0)
    fd = _syscall.checked(
        Command.ENABLE_STATS, attr, "cannot switch run-time statistics on", capability="CAP_SYS_ADMIN"
    )
    try:
        yield
    finally:
        os.close(fd)


def every(
    following: Command, opening: Command, what: str, describe: Callable[[int], _Described]
) -> Iterator[_Described]:
    """Every object of one kind, described; what goes away meanwhile is left out."""
    number = 0
    while True:
        attr = _syscall.attributes("III", number, 0, 0)
        result = _syscall.call(following, attr)
        if result == -errnos.ENOENT:
            return
        if result < 0:
            raise failure(
                -result, f"cannot list what is loaded, looking for {what}", capability="CAP_SYS_ADMIN"
            )
        number = struct.unpack_from("=I", attr, 4)[0]
        try:
            fd = _syscall.fd_by_id(opening, number, what)
        except BpfError as error:
            if error.errno in (errnos.ENOENT, errnos.EAGAIN):
                # It went away meanwhile, or is a link that is just being made.
                continue
            raise
        try:
            described = describe(fd)
        finally:
            os.close(fd)
        yield described
