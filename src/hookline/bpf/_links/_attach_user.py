"""Onto the functions of programs and libraries: uprobes, one by one or many by one link."""

from __future__ import annotations

import ctypes
import errno as errnos
import os
from collections.abc import Sequence
from pathlib import Path

from hookline.bpf import features
from hookline.bpf._arguments import c_text, cookie_number, process_number
from hookline.bpf._errors import BpfError, FeatureMissing
from hookline.bpf._links._elf_symbols import Executable, find_file
from hookline.bpf._links._link import Link, create, expect_type, made
from hookline.bpf._links._perf import check_probe, link_event, open_event, probe_source
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType

__all__ = ["attach_uprobe", "attach_uprobe_multi"]

_MULTI_RETURNS = 1
_PATTERN = frozenset("*?[")


def attach_uprobe(
    program: ProgramHandle,
    path: str | os.PathLike[str],
    function: str | int,
    *,
    offset: int,
    pid: int | None,
    returns: bool,
    cookie: int,
) -> Link:
    """Make a uprobe's link; see `Program.attach_uprobe`."""
    if pid is not None:
        process_number(pid)
    file = find_file(path)
    where = f"{file}:{function if isinstance(function, str) else hex(function)}"
    expect_type(program, where, "kprobe")
    check_probe(program, where, None)
    place = _in_file(file, _place(file, function, returns) + offset)
    kind, config = probe_source("uprobe", returns=returns)
    text = c_text(file.absolute(), "path")
    what = f"cannot attach program {program.name!r} to {where}"
    try:
        event = open_event(
            kind,
            config,
            what=what,
            config1=ctypes.addressof(text),
            config2=place,
            pid=-1 if pid is None else pid,
            cpu=0 if pid is None else -1,
        )
    except BpfError as error:
        if error.errno == errnos.ESRCH and pid is not None:
            raise BpfError(
                what,
                errno=errnos.ESRCH,
                why=f"there is no process {pid}",
                remedy="leave pid out, or name one that lives",
            ) from None
        raise
    return link_event(program, event, where, cookie)


def attach_uprobe_multi(
    program: ProgramHandle,
    path: str | os.PathLike[str],
    functions: str | Sequence[str | int],
    *,
    pid: int | None,
    returns: bool,
    cookie: int,
) -> Link:
    """Make one link on many functions; see `Program.attach_uprobe_multi`."""
    if pid is not None:
        process_number(pid)
    file = find_file(path)
    where = f"{file}:{functions if isinstance(functions, str) else f'{len(functions)} functions'}"
    expect_type(program, where, "kprobe")
    check_probe(program, where, AttachType.TRACE_UPROBE_MULTI)
    places = _places(file, functions, returns)
    offsets = (ctypes.c_uint64 * len(places))(*places)
    cookies = (ctypes.c_uint64 * len(places))(*[cookie_number(cookie)] * len(places))
    text = c_text(file.absolute(), "path")
    result = create(
        program,
        0,
        AttachType.TRACE_UPROBE_MULTI,
        0,
        "QQQQIII4x",
        ctypes.addressof(text),
        ctypes.addressof(offsets),
        0,
        ctypes.addressof(cookies) if cookie else 0,
        len(places),
        _MULTI_RETURNS if returns else 0,
        pid or 0,
    )
    if result < 0 and features.attach("uprobe.multi").answer is features.Answer.NO:
        raise FeatureMissing("uprobe.multi", minimum_kernel="6.6", errno=-result, remedy="use attach_uprobe")
    if result == -errnos.ESRCH:
        raise BpfError(
            f"cannot attach program {program.name!r} to {where}",
            errno=errnos.ESRCH,
            why=f"there is no process {pid}",
        )
    return Link(made(result, program, where))


def _place(file: Path, function: str | int, returns: bool) -> int:
    if isinstance(function, int) and not returns:
        return function
    executable = Executable(file)
    _refuse_go(executable, returns)
    return function if isinstance(function, int) else executable.offset_of(function)


def _in_file(file: Path, offset: int) -> int:
    size = file.stat().st_size
    if not 0 <= offset < size:
        raise BpfError(
            f"there is no instruction at offset {offset:#x} of {file}",
            errno=errnos.EINVAL,
            why=f"it has {size} bytes",
        )
    return offset


def _places(file: Path, functions: str | Sequence[str | int], returns: bool) -> list[int]:
    executable = Executable(file)
    _refuse_go(executable, returns)
    if isinstance(functions, str):
        if not _PATTERN & set(functions):
            return [executable.offset_of(functions)]
        found = list(executable.matching(functions).values())
    else:
        found = [f if isinstance(f, int) else executable.offset_of(f) for f in functions]
    if not found:
        raise BpfError(
            f"no function of {file} matches {functions!r}",
            errno=errnos.ENOENT,
            remedy="nm and nm -D list what it has",
        )
    return [_in_file(file, place) for place in found]


def _refuse_go(executable: Executable, returns: bool) -> None:
    if returns and executable.is_go:
        raise BpfError(
            f"a uretprobe would crash {executable.path}",
            why="it is a Go program: its stacks move, and a changed return address would point to nowhere",
            remedy="put uprobes on the function's return instructions: offsets of its ret",
        )
