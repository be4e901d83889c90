"""Onto the kernel's own code: tracepoints, kprobes, BTF-typed tracing and LSM hooks, clocks."""

from __future__ import annotations

import ctypes
import difflib
import errno as errnos
import fnmatch
import functools
import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hookline.bpf import _syscall, features
from hookline.bpf._arguments import c_text, cookie_number, number, one_of, path_text, process_number
from hookline.bpf._errors import ENOTSUPP, BpfError, FeatureMissing, NotPermitted, failure
from hookline.bpf._links._group import LinkGroup
from hookline.bpf._links._link import Link, create, expect_type, made
from hookline.bpf._links._perf import (
    SOFTWARE,
    TRACEPOINT,
    check_probe,
    link_event,
    online_cpus,
    open_event,
    probe_source,
)
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType, Command

__all__ = [
    "SOFTWARE_EVENTS",
    "attach_kprobe",
    "attach_kprobe_multi",
    "attach_perf_event",
    "attach_raw_tracepoint",
    "attach_tracepoint",
    "attach_tracing",
    "system_call",
    "tracefs",
]

SOFTWARE_EVENTS = {
    "cpu-clock": 0,
    "task-clock": 1,
    "page-faults": 2,
    "context-switches": 3,
    "cpu-migrations": 4,
    "minor-faults": 5,
    "major-faults": 6,
    "alignment-faults": 7,
    "emulation-faults": 8,
}
"""``enum perf_sw_ids``: events that every machine has."""

_CLOCKS = ("cpu-clock", "task-clock")
_MULTI_RETURNS = 1
_PATTERN = frozenset("*?[")
_SYSTEM_CALL_PREFIX = {
    "x86_64": "__x64_sys_",
    "aarch64": "__arm64_sys_",
    "riscv64": "__riscv_sys_",
    "s390x": "__s390x_sys_",
}


# Tracepoints


def attach_raw_tracepoint(program: ProgramHandle, name: str) -> Link:
    """Make a raw tracepoint link; see `Program.attach_raw_tracepoint`."""
    expect_type(program, f"the raw tracepoint {name!r}", "raw_tracepoint", "raw_tracepoint_writable")
    text = c_text(name, "raw tracepoint")
    attr = _syscall.attributes("QI4x", _syscall.address(text), program.fd)
    result = _syscall.call(Command.RAW_TRACEPOINT_OPEN, attr)
    if result >= 0:
        return Link(result)
    what = f"cannot attach program {program.name!r} to the raw tracepoint {name!r}"
    if result == -errnos.ENOENT:
        raise BpfError(
            what,
            errno=errnos.ENOENT,
            why="there is none of that name",
            remedy="see /sys/kernel/tracing/events",
        )
    raise failure(-result, what, capability="CAP_BPF CAP_PERFMON")


def attach_tracepoint(program: ProgramHandle, name: str, cookie: int) -> Link:
    """Make a tracepoint's link; see `Program.attach_tracepoint`."""
    where = f"tracepoint {name!r}"
    expect_type(program, where, "tracepoint")
    event = open_event(
        TRACEPOINT,
        _tracepoint_number(name),
        what=f"cannot attach program {program.name!r} to {where}",
    )
    return link_event(program, event, where, cookie)


def tracefs() -> Path:
    """Where tracefs is mounted.

    Raises:
        BpfError: Nowhere that this process sees.
        NotPermitted: It is mounted, and only root may read it.
    """
    for place in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if os.path.isdir(f"{place}/events"):
            return Path(place)
        if os.path.ismount(place) and not os.access(place, os.R_OK | os.X_OK):
            raise NotPermitted(
                "cannot read what the kernel can trace",
                capability="CAP_PERFMON",
                why=f"{place} is readable by root alone",
                remedy="run it as root",
            )
    raise BpfError(
        "tracefs is not mounted",
        why="the kernel's tracepoints and functions are listed there",
        remedy="mount -t tracefs tracefs /sys/kernel/tracing, or bpf.ensure_tracefs()",
    )


def _tracepoint_number(name: str) -> int:
    events = tracefs() / "events"
    group, slash, event = name.partition("/")
    if not slash and ":" in name:
        group, _, event = name.partition(":")
    path_text(name, "tracepoint")
    if not group or not event or "/" in event:
        raise BpfError(
            f"{name!r} is no tracepoint",
            remedy="write GROUP/NAME, such as sched/sched_switch",
            why="a tracepoint has a group and a name",
        )
    try:
        return int((events / group / event / "id").read_text())
    except OSError as error:
        if error.errno in (errnos.EACCES, errnos.EPERM):
            raise failure(errnos.EPERM, f"cannot read {events}", capability="CAP_PERFMON") from None
    there = (events / group).is_dir()
    names = sorted(os.listdir(events / group)) if there else sorted(os.listdir(events))
    close = difflib.get_close_matches(event if there else group, names, 1, 0.5)
    meant = f"{group}/{close[0]}" if there and close else f"{close[0]}/…" if close else ""
    raise BpfError(
        f"there is no tracepoint {name!r}",
        errno=errnos.ENOENT,
        remedy=f"did you mean {meant}? See {events}" if meant else f"see {events}",
        why=f"group {group} has none of that name" if there else f"there is no group {group}",
    )


# Probes of kernel functions


def system_call(name: str) -> str:
    """The kernel function of a system call on this machine, for kprobes."""
    return _SYSTEM_CALL_PREFIX.get(platform.machine(), "sys_") + name


def attach_kprobe(program: ProgramHandle, function: str, *, offset: int, returns: bool, cookie: int) -> Link:
    """Make a kprobe's link; see `Program.attach_kprobe`."""
    where = f"function {function!r}" + (f"+{offset:#x}" if offset else "")
    expect_type(program, where, "kprobe")
    check_probe(program, where, None)
    kind, config = probe_source("kprobe", returns=returns)
    what = f"cannot attach program {program.name!r} to {where}"
    if returns and offset:
        raise BpfError(
            what,
            why="a return has no offset in the function",
            remedy="leave the offset out, or probe the entry: kprobe:FUNCTION+OFFSET",
        )
    text = c_text(function, "function of the kernel")
    number(offset, "offset in a function", 0, (1 << 63) - 1)
    try:
        event = open_event(kind, config, what=what, config1=ctypes.addressof(text), config2=offset)
    except BpfError as error:
        raise _no_function(error, function, what, offset) from None
    return link_event(program, event, where, cookie)


def attach_kprobe_multi(
    program: ProgramHandle, functions: str | Sequence[str], *, returns: bool, cookie: int
) -> Link:
    """Make one link on many functions; see `Program.attach_kprobe_multi`."""
    where = f"functions {functions!r}" if isinstance(functions, str) else f"{len(functions)} functions"
    expect_type(program, where, "kprobe")
    check_probe(program, where, AttachType.TRACE_KPROBE_MULTI)
    names = _matching(functions) if isinstance(functions, str) else list(functions)
    if not names:
        raise BpfError(
            f"no function of the kernel matches {functions!r}",
            errno=errnos.ENOENT,
            remedy=f"see {tracefs()}/available_filter_functions",
        )
    texts = [c_text(name, "function of the kernel") for name in names]
    symbols = (ctypes.c_uint64 * len(names))(*(ctypes.addressof(text) for text in texts))
    cookies = (ctypes.c_uint64 * len(names))(*[cookie_number(cookie)] * len(names))
    result = create(
        program,
        0,
        AttachType.TRACE_KPROBE_MULTI,
        0,
        "IIQQQ",
        _MULTI_RETURNS if returns else 0,
        len(names),
        ctypes.addressof(symbols),
        0,
        ctypes.addressof(cookies) if cookie else 0,
    )
    what = f"cannot attach program {program.name!r} to {where}"
    if result < 0 and (found := features.attach("kprobe.multi")).answer is features.Answer.NO:
        raise FeatureMissing("kprobe.multi", errno=-result, why=found.why, remedy="use attach_kprobe")
    if result in (-errnos.ENOENT, -errnos.ESRCH):
        unknown = [name for name in names if name not in _functions()]
        raise _no_function(BpfError(what, errno=-result), unknown[0] if unknown else names[0], what, 0)
    return Link(made(result, program, where))


@functools.lru_cache(maxsize=1)
def _functions() -> frozenset[str]:
    """The functions of the kernel that can be probed."""
    try:
        lines = (tracefs() / "available_filter_functions").read_text().splitlines()
    except OSError as error:
        raise failure(
            errnos.EPERM if error.errno == errnos.EACCES else error.errno or 0,
            "cannot list the kernel's functions",
            capability="CAP_SYS_ADMIN",
        ) from None
    return frozenset(line.split()[0] for line in lines if line)


def _matching(pattern: str) -> list[str]:
    if not _PATTERN & set(pattern):
        return [pattern]
    return sorted(fnmatch.filter(_functions(), pattern))


def _no_function(error: BpfError, function: str, what: str, offset: int) -> BpfError:
    """A refusal, told as a missing function where that is the reason."""
    if error.errno == errnos.EILSEQ:
        return BpfError(
            what,
            errno=error.errno,
            why=f"no instruction begins at {offset:#x}",
            remedy="choose the offset of an instruction: objdump -d, or offset 0",
        )
    if error.errno not in (errnos.ENOENT, errnos.ESRCH, errnos.EADDRNOTAVAIL, errnos.EINVAL):
        return error
    try:
        names = _functions()
    except BpfError:
        return error
    if function in names:
        return error
    # Of the tens of thousands, those that begin alike: comparing all takes a second.
    alike = [name for name in names if name[:2] == function[:2]]
    close = difflib.get_close_matches(function, alike, 1, 0.8)
    return BpfError(
        what,
        errno=error.errno,
        why="the kernel has no such function, or inlined it, or keeps it from being probed",
        remedy=f"did you mean {close[0]}?" if close else "see /proc/kallsyms",
    )


# Typed tracing


def attach_tracing(program: ProgramHandle) -> Link:
    """Attach where the program was loaded for; see `Program.attach_tracing`."""
    where = program.section or "what it was loaded for"
    expect_type(program, where, "tracing", "lsm", "ext")
    if program.expected_attach_type == AttachType.TRACE_ITER:
        raise BpfError(
            f"program {program.name!r} is an iterator",
            remedy="use attach_iterator",
            why="it is run by reading it, not by an event",
        )
    attr = _syscall.attributes("QI4x", 0, program.fd)
    result = _syscall.call(Command.RAW_TRACEPOINT_OPEN, attr)
    what = f"cannot attach program {program.name!r} to {where}"
    if result in (-errnos.EOPNOTSUPP, -ENOTSUPP):
        raise FeatureMissing(
            f"{where.partition('/')[0]} hooks on this processor", errno=-result, remedy="use a kprobe"
        )
    if result == -errnos.EBUSY:
        raise BpfError(
            what,
            errno=-result,
            why="another tracer holds the function: ftrace, or a live patch",
            remedy="end that tracer, or attach to another function",
        )
    return Link(made(result, program, where))


# Clocks and counters


def attach_perf_event(
    program: ProgramHandle,
    event: str,
    *,
    frequency_hz: int,
    period: int,
    pid: int | None,
    cpus: Sequence[int] | None,
    cookie: int,
) -> LinkGroup:
    """Sample by a software event; see `Program.attach_perf_event`."""
    where = f"perf event {event!r}"
    expect_type(program, where, "perf_event")
    config = one_of(SOFTWARE_EVENTS, event, "software event")
    what = f"cannot attach program {program.name!r} to {where}"
    if frequency_hz and period:
        raise BpfError(what, why="how often is given by frequency_hz or by period, and both were given")
    number(frequency_hz, "frequency in hertz", 0, (1 << 63) - 1)
    number(period, "period", 0, (1 << 63) - 1)
    if not (frequency_hz or period):
        frequency_hz, period = (100, 0) if event in _CLOCKS else (0, 1)
    if frequency_hz > _highest_rate_hz():
        raise BpfError(
            what,
            errno=errnos.EINVAL,
            why=f"the kernel samples {_highest_rate_hz()} times per second at most",
            remedy="sysctl kernel.perf_event_max_sample_rate sets that",
        )
    chosen = _cpus(cpus, what)
    process = -1 if pid is None else process_number(pid)
    with ExitStack() as undo:
        links = []
        for cpu in chosen:
            opened = open_event(
                SOFTWARE,
                config,
                what=what,
                frequency_hz=frequency_hz,
                period=period,
                pid=process,
                cpu=cpu,
            )
            links.append(undo.enter_context(link_event(program, opened, where, cookie)))
        undo.pop_all()
    return LinkGroup(links)


def _highest_rate_hz() -> int:
    return int(Path("/proc/sys/kernel/perf_event_max_sample_rate").read_text())


def _cpus(given: Sequence[int] | None, what: str) -> list[int]:
    """The CPUs to sample, all of them by default."""
    online = online_cpus()
    if given is None:
        return online
    absent = [cpu for cpu in given if cpu not in online]
    if absent or not given:
        why = f"CPU {absent[0]} is not there, or offline" if absent else "no CPU was given"
        remedy = f"online are {', '.join(map(str, online))}; None stands for all"
        raise BpfError(what, errno=errnos.EINVAL, why=why, remedy=remedy)
    return list(given)
