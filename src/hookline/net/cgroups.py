"""Cgroups (version 2): find their mount, make and remove groups, move processes into them.

Paths here are relative to the mount: ``""`` is its root, ``hookline/demo/node-1`` a group below it. Nothing but the
groups that are named is touched: no controller is switched on, and no limit is set.

A socket belongs to the cgroup of the process that opened it, for its whole life; who connects or sends with it later
does not matter. Source: ``cgroup_sk_alloc`` in the kernel's kernel/cgroup/cgroup.c, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from hookline.net._errors import NetworkError, NetworkNotPermitted

_PATIENCE_S = 2.0
_RETRY_S = 0.01
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def mount() -> Path | None:
    """Where cgroup v2 is mounted, as this process sees it; None where it is nowhere.

    With several mounts it is the first that shows the root of the hierarchy (or of the process's cgroup namespace).
    """
    found: Path | None = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] != "cgroup2":
                continue
            fields = before.split(" ")
            place = Path(_unescape(fields[4]))
            if fields[3] == "/":
                return place
            found = found or place
    return found


def path(group: str) -> Path:
    """The folder of a group.

    Raises:
        NetworkError: cgroup v2 is not mounted.
    """
    root = mount()
    if root is None:
        raise NetworkError(
            f"there is no cgroup {group or '/'}",
            why="/proc/self/mountinfo names no cgroup2 file system",
            remedy="mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )
    return root / group if group else root


def writable() -> bool:
    """Whether this process may make groups: cgroup v2 is mounted, for writing, and is this user's to change."""
    root = mount()
    if root is None or os.statvfs(root).f_flag & os.ST_RDONLY:
        return False
    return os.access(root / "cgroup.procs", os.W_OK)


def make(group: str) -> Path:
    """Make a group and those above it, where they are not there yet; return its folder.

    Raises:
        NetworkError: cgroup v2 is not mounted, or this user may not.
    """
    folder = path(group)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        except FileNotFoundError:
            if time.monotonic() >= deadline:  # else somebody removed an empty parent at this moment
                raise _error(f"cannot make the cgroup {group}", errno.ENOENT) from None
        except OSError as error:
            raise _error(f"cannot make the cgroup {group}", error.errno or 0) from None


def remove(group: str) -> bool:
    """Remove a group and those below it, from the bottom up; False where there is none.

    A process that has just ended may take a moment to leave: that is waited for. This very process is moved to the root
    of the mount. Others must be gone: see `processes`.

    Raises:
        NetworkError: Somebody is in one of the groups, or this user may not.
        ValueError: ``group`` is the root.
    """
    if not group:
        raise ValueError("the root cgroup stays")
    root = mount()
    if root is None or not (root / group).is_dir():
        return False
    for folder, _, _ in os.walk(root / group, topdown=False):
        _remove_one(Path(folder), root)
    return True


def processes(group: str) -> list[int]:
    """The numbers of the processes in a group and in those below it."""
    root = mount()
    found: list[int] = []
    if root is None:
        return found
    for folder, _, _ in os.walk(root / group):
        with contextlib.suppress(FileNotFoundError, OSError):
            found += [int(line) for line in (Path(folder) / "cgroup.procs").read_text().split()]
    return found


def place(group: str, pid: int = 0) -> None:
    """Move a process, with all its threads, into a group; 0 is this one. Its open sockets stay where they were opened.

    Raises:
        NetworkError: There is no such group or process, or this user may not.
    """
    procs = path(group) / "cgroup.procs"
    try:
        _write(procs, str(pid))
    except OSError as error:
        raise _error(
            f"cannot move process {pid or os.getpid()} to the cgroup {group or '/'}",
            error.errno or 0,
            why={errno.ENOENT: "there is no such cgroup", errno.ESRCH: "there is no such process"}.get(
                error.errno or 0, ""
            ),
        ) from None


def of(pid: int | None = None) -> str:
    """The group of a process (None: this one), relative to the root of the process's cgroup namespace; "" is the root.

    Raises:
        NetworkError: There is no such process, or the kernel has no cgroup v2.
    """
    who = "self" if pid is None else str(pid)
    try:
        lines = Path(f"/proc/{who}/cgroup").read_text().splitlines()
    except OSError as error:
        raise _error(f"cannot read the cgroup of process {who}", error.errno or 0) from None
    for line in lines:
        if line.startswith("0::/"):
            return line.removeprefix("0::/")
    raise NetworkError(f"process {who} has no cgroup", why="this kernel has no cgroup v2")


def _remove_one(folder: Path, root: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise _error(
                    f"cannot remove the cgroup {folder.relative_to(root)}",
                    error.errno or 0,
                    why="processes are in it" if error.errno == errno.EBUSY else "",
                    remedy=f"cat {folder}/cgroup.procs names them",
                ) from None
        for number in _numbers(folder / "cgroup.procs"):
            if number == os.getpid():
                with contextlib.suppress(OSError):
                    _write(root / "cgroup.procs", "0")
        time.sleep(_RETRY_S)


def _numbers(procs: Path) -> Iterator[int]:
    try:
        yield from map(int, procs.read_text().split())
    except OSError:
        return


def _write(file: Path, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _unescape(text: str) -> str:
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character)
    return text


def _error(what: str, number: int, *, why: str = "", remedy: str = "") -> NetworkError:
    why = why or os.strerror(number)
    if number in (errno.EPERM, errno.EACCES, errno.EROFS):
        return NetworkNotPermitted(
            what,
            why=f"{why}: cgroups belong to root, and may be mounted read-only in a container",
            remedy="run as root; in a container mount cgroup v2 for writing",
            errno=number,
        )
    return NetworkError(what, why=why, remedy=remedy, errno=number)
