"""Pins: files in bpffs that keep a map, a program or a link alive without a process.

A pin is one more reference. The kernel frees an object when its last reference goes: descriptors of living
processes, pins, and what other objects hold (a link holds its program, a program its maps). Whoever dies,
even by ``kill -9``, drops only its descriptors; pins stay until they are removed or the machine restarts. But a bpffs
mounted by a command that has mounts of its own (``ip netns exec``, ``unshare --mount``) goes with that command, and all
pins with it: `check_lasting` refuses such a place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import os
from pathlib import Path

from hookline.bpf import _syscall
from hookline.bpf._arguments import c_text, path_text
from hookline.bpf._errors import BpfError, NotPermitted, failure
from hookline.bpf._syscall import Command

__all__ = [
    "BPFFS",
    "TRACEFS",
    "check_lasting",
    "directory",
    "ensure_bpffs",
    "ensure_tracefs",
    "get",
    "location",
    "put",
    "remove",
]

BPFFS = Path("/sys/fs/bpf")
TRACEFS = Path("/sys/kernel/tracing")
_LIST = f"find {BPFFS} -type f lists the pins"
_MAGIC = {"bpf": 0xCAFE4A11, "tracefs": 0x74726163}


def ensure_bpffs(path: Path = BPFFS) -> bool:
    """Mount bpffs at its usual place unless it is; returns whether it had to be mounted."""
    return _ensure("bpf", path)


def ensure_tracefs(path: Path = TRACEFS) -> bool:
    """Mount tracefs at its usual place unless it is; returns whether it had to be mounted."""
    return _ensure("tracefs", path)


def check_lasting(path: str | os.PathLike[str] = BPFFS) -> None:
    """Refuse a place for pins that nobody outside this process's mount namespace sees: it goes with that.

    What is outside is asked of the processes that started this one; where none of them may be looked at, nothing is refused.

    Raises:
        BpfError: It is such a place, or bpffs has yet to be mounted there.
    """
    place = Path(path).absolute()
    mounts = _mounts_outside()
    if mounts is None:
        return
    existing = next(p for p in (place, *place.parents) if p.exists())
    number = existing.stat().st_dev
    if _magic(existing) == _MAGIC["bpf"] and f"{os.major(number)}:{os.minor(number)}" in mounts:
        return
    raise BpfError(
        f"pins at {place} would not stay",
        why="this command has mounts of its own, as ip netns exec and unshare --mount give, and no other process sees "
        "its BPF file system",
        remedy="enter the network namespace alone: nsenter --net=/run/netns/NAME hookline …",
    )


def directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory for pins (mode 0700), with its parents, and return it.

    Raises:
        BpfError: It is not under a mounted bpffs.
    """
    wanted = location(path)
    existing = _existing(wanted)
    if _magic(existing) != _MAGIC["bpf"]:
        raise BpfError(
            f"{wanted} is not in a BPF file system",
            why=f"{existing} is of another kind",
            remedy=f"mount -t bpf bpf {BPFFS}",
        )
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise failure(error.errno or 0, f"cannot make {wanted}", capability="CAP_SYS_ADMIN") from None
    return wanted


def location(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a pin, there or not.

    Raises:
        BpfError: bpffs takes no such name: it has a dot, which the kernel refuses without a reason (EPERM).
    """
    place = Path(path_text(path, "pin")).absolute()
    existing = _existing(place)
    dotted = [name for name in place.relative_to(existing).parts if "." in name]
    if dotted and _magic(existing) == _MAGIC["bpf"]:
        raise BpfError(
            f"{place} cannot be a pin",
            errno=errnos.EINVAL,
            why=f"bpffs takes no names with a dot, as {dotted[0]!r} is",
            remedy="write another character in its place",
        )
    return place


def put(fd: int, path: str | os.PathLike[str], what: str) -> Path:
    """Pin a descriptor's object at a path; parents are made.

    Raises:
        BpfError: The path is taken, or is not in bpffs.
    """
    place = location(path)
    directory(place.parent)
    name = c_text(place, "pin")
    result = _syscall.call(Command.OBJ_PIN, _syscall.attributes("QII", _syscall.address(name), fd, 0))
    if result == -errnos.EEXIST:
        raise BpfError(
            f"cannot pin {what} at {place}",
            errno=errnos.EEXIST,
            why="something is pinned there",
            remedy="adopt what is there with from_pin, or remove it first",
        )
    if result < 0:
        raise failure(-result, f"cannot pin {what} at {place}", capability="CAP_BPF")
    return place


def get(path: str | os.PathLike[str], kind: str) -> int:
    """A new descriptor for what is pinned at a path.

    Args:
        path: The pin.
        kind: What it must be: ``"map"``, ``"program"`` or ``"link"``.

    Raises:
        BpfError: Nothing is pinned there, or something else is.
    """
    place = location(path)
    name = c_text(place, "pin")
    result = _syscall.call(Command.OBJ_GET, _syscall.attributes("QII", _syscall.address(name), 0, 0))
    if result < 0:
        raise _no_pin(place, -result)
    found = _kind(result)
    if found != kind:
        os.close(result)
        raise BpfError(
            f"the pin {place} holds a {found}",
            errno=errnos.EINVAL,
            why=f"a {kind} is wanted",
            remedy=f"name the pin of a {kind}: {_LIST}",
        )
    return result


def _no_pin(place: Path, errno: int) -> BpfError:
    """Why a path could not be opened as a pin."""
    if errno == errnos.EPERM:
        return NotPermitted(f"cannot open the pin {place}", capability="CAP_BPF")
    if errno == errnos.ENOENT:
        return BpfError(f"nothing is pinned at {place}", errno=errno, remedy=_LIST)
    with contextlib.suppress(OSError, BpfError):  # where it may not be looked at, the kernel's answer is all
        inside = _magic(place) == _MAGIC["bpf"]
        if place.is_dir():
            pins = sorted(str(path) for path in place.rglob("*") if path.is_file()) if inside else []
            remedy = f"name one of {', '.join(pins)}" if pins else _LIST
            return BpfError(f"{place} is no pin", errno=errno, why="it is a directory", remedy=remedy)
        if not inside:
            why = "it is a file of another file system, and pins are in bpffs"
            return BpfError(f"{place} is no pin", errno=errno, why=why, remedy=_LIST)
    return BpfError(f"cannot open the pin {place}", errno=errno, remedy=_LIST)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a pin; what it kept alive goes with the last reference. A pin that is gone is no error."""
    try:
        location(path).unlink(missing_ok=True)
    except OSError as error:
        raise failure(error.errno or 0, f"cannot remove the pin {path}", capability="CAP_SYS_ADMIN") from None


def _existing(path: Path) -> Path:
    """A path, or the nearest of its parents that is there and may be looked at."""
    for place in (path, *path.parents):
        # bpffs answers EPERM for a name with a dot, and EACCES comes from a folder that may not be entered.
        with contextlib.suppress(OSError):
            place.stat()
            return place
    return Path("/")


def _kind(fd: int) -> str:
    target = os.readlink(f"/proc/self/fd/{fd}")
    for text, kind in (("bpf-map", "map"), ("bpf-prog", "program"), ("link", "link")):
        if text in target:
            return kind
    return target


def _ensure(kind: str, path: Path) -> bool:
    if path.is_dir() and _magic(path) == _MAGIC[kind]:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    name = kind.encode()
    if libc.mount(name, os.fsencode(path), name, ctypes.c_ulong(0), None) != 0:
        errno = ctypes.get_errno()
        what = f"cannot mount {kind} at {path}"
        if errno == errnos.EPERM:
            raise NotPermitted(what, capability="CAP_SYS_ADMIN")
        raise BpfError(what, errno=errno, remedy=f"mount -t {kind} {kind} {path}")
    return True


def _mounts_outside() -> set[str] | None:
    """The device numbers of what is mounted where this process comes from; None where its mount namespace is the same.

    That is the first process of those that started this one, each the next, which this user may look at.
    """
    process, mounts, outside = os.getpid(), os.stat("/proc/self/ns/mnt").st_ino, None
    while process:
        folder = Path(f"/proc/{process}")
        try:
            different = os.stat(folder / "ns/mnt").st_ino != mounts
            outside = {line.split()[2] for line in _lines(folder / "mountinfo")} if different else None
        except OSError:
            pass
        try:
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return outside


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _magic(path: Path) -> int:
    """The file system's number (statfs(2), ``f_type``)."""
    buffer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        raise failure(ctypes.get_errno(), f"cannot look at {path}", capability="CAP_SYS_ADMIN")
    return int(buffer[0]) & 0xFFFFFFFF
