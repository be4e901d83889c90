"""perf_event_open(2): the events that tracepoints, probes and clocks are, for a program to be put on.

An event's link holds the event, so the descriptor made here is closed as soon as there is a link.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import fcntl
import os
import platform
import struct
from pathlib import Path

from hookline.bpf._arguments import cookie_number
from hookline.bpf._errors import BpfError, FeatureMissing, failure
from hookline.bpf._links._link import Link, create, made
from hookline.bpf._links._link_info import attach_type_name
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType

__all__ = ["SOFTWARE", "TRACEPOINT", "link_event", "online_cpus", "open_event", "probe_source"]

SOFTWARE, TRACEPOINT = 1, 2
"""``enum perf_type_id``."""

_NUMBERS = {"x86_64": 298, "s390x": 331, "ppc64le": 319}
_NUMBER = _NUMBERS.get(platform.machine(), 241)
_SOURCES = Path("/sys/bus/event_source/devices")
_FREQUENCY = 1 << 10  # the attribute's bit "freq"
_CLOSE_ON_EXEC = 1 << 3
_ENABLE = 0x2400
# struct perf_event_attr up to config2: PERF_ATTR_SIZE_VER1.
_ATTRIBUTES = struct.Struct("=IIQQQQQIIQQ")


def open_event(
    kind: int,
    config: int,
    *,
    what: str,
    config1: int = 0,
    config2: int = 0,
    frequency_hz: int = 0,
    period: int = 0,
    pid: int = -1,
    cpu: int = 0,
) -> int:
    """Open a perf event; `pid` and `cpu` of -1 are any.

    Raises:
        NotPermitted: CAP_PERFMON is missing (EPERM, EACCES).
        BpfError: The kernel refuses; `what` says what for.
    """
    attributes = ctypes.create_string_buffer(
        _ATTRIBUTES.pack(
            kind,
            _ATTRIBUTES.size,
            config,
            frequency_hz or period,
            0,
            0,
            _FREQUENCY if frequency_hz else 0,
            1,
            0,
            config1,
            config2,
        ),
        _ATTRIBUTES.size,
    )
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    result = function(
        ctypes.c_long(_NUMBER),
        attributes,
        ctypes.c_int(pid),
        ctypes.c_int(cpu),
        ctypes.c_int(-1),
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )
    if result >= 0:
        return int(result)
    errno = ctypes.get_errno()
    raise failure(errnos.EPERM if errno == errnos.EACCES else errno, what, capability="CAP_PERFMON")


def link_event(program: ProgramHandle, event: int, where: str, cookie: int = 0) -> Link:
    """Put a program on an event, which is closed here, and let it begin."""
    try:
        result = create(program, event, AttachType.PERF_EVENT, 0, "Q", cookie_number(cookie))
        link = Link(made(result, program, where))
        try:
            fcntl.ioctl(event, _ENABLE, 0)
        except OSError as error:
            link.close()
            raise failure(error.errno or 0, f"cannot start the event of {where}") from None
        return link
    finally:
        os.close(event)


def probe_source(name: str, *, returns: bool) -> tuple[int, int]:
    """The type and configuration of the kernel's kprobes or uprobes.

    Raises:
        FeatureMissing: The kernel has none.
    """
    folder = _SOURCES / name
    try:
        kind = int((folder / "type").read_text())
        bit = int((folder / "format" / "retprobe").read_text().strip().removeprefix("config:"))
    except OSError:
        raise FeatureMissing(
            f"{name}s",
            errno=errnos.ENOENT,
            why=f"{folder} is not there: it was built without CONFIG_{name.upper()}_EVENTS",
            remedy="use fentry or a tracepoint" if name == "kprobe" else "",
        ) from None
    return kind, 1 << bit if returns else 0


def online_cpus() -> list[int]:
    """The CPUs that are running now."""
    with open("/sys/devices/system/cpu/online") as file:
        ranges = [part.split("-") for part in file.read().strip().split(",")]
    return [cpu for part in ranges for cpu in range(int(part[0]), int(part[-1]) + 1)]


def check_probe(program: ProgramHandle, where: str, multi: AttachType | None) -> None:
    """Refuse a kprobe or uprobe program that was loaded for another way of attaching."""
    expected = program.expected_attach_type
    wanted = multi if multi is not None else 0
    if expected is None or expected == wanted:
        return
    raise BpfError(
        f"cannot attach program {program.name!r} to {where}",
        errno=errnos.EINVAL,
        why=f"it was loaded for {attach_type_name(expected) if expected else 'single probes'}",
        remedy=f"before the load: expect_attach_type({program.name!r}, {wanted})",
    )
