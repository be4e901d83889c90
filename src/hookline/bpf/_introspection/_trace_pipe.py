"""The trace pipe: what programs write with ``bpf_printk``, as it comes."""

from __future__ import annotations

import contextlib
import errno as errnos
import os
import re
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hookline.bpf._errors import BpfError, failure
from hookline.bpf._owner import Owner
from hookline.bpf.pin import TRACEFS, ensure_tracefs

__all__ = ["TraceLine", "TracePipe", "trace_pipe"]

_EVENT = TRACEFS / "events/bpf_trace/bpf_trace_printk/enable"
_LINE = re.compile(
    r"\s*(?P<task>.+?)-(?P<process>\d+)\s+(?:\([^)]*\)\s+)?\[(?P<cpu>\d+)\]\s+(?:\S+\s+)?(?P<time>\d+\.\d+): "
    r"(?P<event>\w+): (?P<text>.*)"
)
_LOST = re.compile(r"CPU:(?P<cpu>\d+) \[LOST (?P<lost>\d+) EVENTS\]")


@dataclass(frozen=True)
class TraceLine:
    """A line of the trace pipe.

    Attributes:
        text: What the program wrote; the whole line where it is laid out in another way.
        task: The name of the task that ran, at most 15 characters.
        process: Its thread's number.
        cpu: Where it ran.
        time_s: Seconds of the trace clock, as a rule since the machine started.
        event: ``"bpf_trace_printk"``, or the name of another tracer's event: the pipe is everyone's.
        lost: How many lines the kernel threw away on this CPU before this one was read (the line has no text then).
    """

    text: str
    task: str = ""
    process: int = 0
    cpu: int = 0
    time_s: float = 0.0
    event: str = ""
    lost: int = 0


class TracePipe(Owner):
    """An open trace pipe: an iterator over its lines. Reading takes them out: there is one reader.

    Args:
        seconds: When to end; None: never.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._rest = b""
        self._fd = -1
        ensure_tracefs()
        try:
            self._fd = os.open(TRACEFS / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise _refused(error) from None
        # The kernel does the same when a program that prints is loaded, in newer kernels a moment later.
        with contextlib.suppress(OSError):
            _EVENT.write_text("1")

    def __iter__(self) -> Iterator[TraceLine]:
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                if line.strip():
                    yield parse(line.decode(errors="replace"))
            if not self._more():
                return

    def close(self) -> None:
        """Give the pipe back; closing twice is no error."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _more(self) -> bool:
        """Wait for more bytes; False when the time is over or the pipe closed."""
        while self._fd >= 0:
            left = None if self._end is None else self._end - time.monotonic()
            if left is not None and left <= 0:
                return False
            waiting = select.poll()
            waiting.register(self._fd, select.POLLIN)
            waiting.poll(None if left is None else left * 1000)
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _refused(error) from None
            if data:
                self._rest += data
                return True
            # Empty: tracing is switched off, or was read by somebody else.
            time.sleep(0.05)
        return False


def trace_pipe(seconds: float | None = None) -> TracePipe:
    """Open the trace pipe (mounting tracefs where it is not): what programs write with ``bpf_printk``.

        with bpf.trace_pipe(seconds=10) as lines:
            for line in lines:
                print(line.task, line.text)

    Raises:
        BpfError: Somebody else reads it.
        NotPermitted: CAP_SYS_ADMIN is missing.
    """
    return TracePipe(seconds)


def parse(line: str) -> TraceLine:
    """A line as the kernel writes it (Documentation/trace/ftrace.rst)."""
    lost = _LOST.match(line)
    if lost:
        return TraceLine("", cpu=int(lost["cpu"]), lost=int(lost["lost"]))
    found = _LINE.match(line)
    if not found:
        return TraceLine(line.rstrip())
    return TraceLine(
        found["text"].rstrip(),
        found["task"].strip(),
        int(found["process"]),
        int(found["cpu"]),
        float(found["time"]),
        found["event"],
    )


def _refused(error: OSError) -> BpfError:
    what = "cannot read the trace pipe"
    if error.errno == errnos.EBUSY:
        return BpfError(
            what,
            errno=errnos.EBUSY,
            why="somebody else is reading it, and every line goes to one reader only",
            remedy="fuser /sys/kernel/tracing/trace_pipe names the process",
        )
    if error.errno in (errnos.EACCES, errnos.EPERM):
        return failure(errnos.EPERM, what, capability="CAP_SYS_ADMIN")
    return BpfError(what, errno=error.errno or 0, remedy="hookline doctor shows whether tracefs is mounted")
