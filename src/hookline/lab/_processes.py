"""Processes of a lab: known by number and start time, because numbers are used again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection
from dataclasses import dataclass

_STARTED = 19  # field 22 of /proc/PID/stat, counted from behind the command's name
_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its number and its start time in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has a number now, None where none has."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else cls(pid, int(fields[_STARTED]))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self


def end(process: Process, *, reap: bool = False) -> None:
    """End a process, gently first, and wait until it is gone. Nothing happens to one that is gone.

    Args:
        process: Which.
        reap: Also collect its exit status if it is a child of this process that nothing else waits for.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        for how in (signal.SIGTERM, signal.SIGKILL):
            if not process.alive:  # read after the descriptor was opened: it means this very process
                break
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, how)
            select.select([descriptor], [], [], _GRACE_S)
    finally:
        os.close(descriptor)
    if reap:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def in_namespaces(namespaces: Collection[tuple[int, int]]) -> list[Process]:
    """The processes whose network namespace is one of these (device, inode), this one left out."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            status = os.stat(f"/proc/{name}/ns/net")
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in namespaces:
            process = Process.of(int(name))
            if process is not None:
                found.append(process)
    return found
