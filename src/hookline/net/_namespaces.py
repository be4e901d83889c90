"""Network namespaces: enter one for a while, make a named one, remove it.

Named namespaces are files in ``/run/netns``, as iproute2 keeps them, so ``ip netns`` shows and enters them
too. `inside` and `create` act on the calling thread only: other threads stay where they are.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from hookline.net._errors import NetworkNotPermitted, network_error

NETNS_DIR = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SHARED = 0x100000
_MNT_DETACH = 2
_SO_NETNS_COOKIE = 71
_OWN = "/proc/thread-self/ns/net"
_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_NETNSA_NSID, _NETNSA_FD = 1, 3


@contextmanager
def inside(namespace: Path | None) -> Iterator[None]:
    """Run the ``with`` block's thread in a network namespace, and come back however the block ends.

    Sockets opened, threads and processes started inside stay there. The block must not await: another task would run inside too.

    Args:
        namespace: The namespace's file, such as ``/run/netns/NAME`` or ``/proc/PID/ns/net``. None: stay.

    Raises:
        NetworkError: There is no such namespace, or it may not be entered.
    """
    if namespace is None:
        yield
        return
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        try:
            yield
        finally:
            _setns(before, "the network namespace that the thread came from")
    finally:
        os.close(before)


def enter(namespace: Path) -> None:
    """Move the calling thread to a network namespace for good (before ``exec``; else see `inside`).

    Raises:
        NetworkError: There is no such namespace, or it may not be entered.
    """
    try:
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise network_error(
            f"cannot enter the network namespace {namespace}",
            error.errno or 0,
            why="there is none of that name" if error.errno == errno.ENOENT else "",
            remedy="hookline lab list shows the labs that are up",
        ) from None
    try:
        _setns(descriptor, f"the network namespace {namespace}")
    finally:
        os.close(descriptor)


def create(name: str) -> Path:
    """Make a named network namespace, and return its file. Its loopback interface is down.

    Raises:
        NetworkError: The name is taken, or this user may not.
    """
    path = NETNS_DIR / name
    _share_directory()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    except FileExistsError:
        raise network_error(
            f"cannot make the network namespace {name}",
            errno.EEXIST,
            why="there is one of that name",
            remedy=f"ip netns delete {name}",
        ) from None
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc().unshare(_CLONE_NEWNET) != 0:
            raise network_error(f"cannot make the network namespace {name}", ctypes.get_errno())
        try:
            _mount(_OWN, path, _MS_BIND, f"cannot make the network namespace {name}")
        finally:
            _setns(before, "the network namespace that the thread came from")
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(before)
    return path


def delete(name: str) -> bool:
    """Remove a named network namespace, also one that was half made; False where there is none.

    The kernel takes it apart, with its links, once no process and no socket is left in it.

    Raises:
        NetworkError: This user may not.
    """
    path = NETNS_DIR / name
    while _libc().umount2(os.fsencode(path), _MNT_DETACH) == 0:
        pass  # more than one mount where the namespace was made twice
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise network_error(f"cannot remove the network namespace {name}", number)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise network_error(f"cannot remove the network namespace {name}", error.errno or 0) from None
    return True


def own_number() -> int:
    """The number (inode) of the network namespace that the calling thread is in, as ``lsns`` shows it."""
    return os.stat(_OWN).st_ino


def own_cookie() -> int:
    """The cookie of the network namespace that the calling thread is in: what programs know it by, never used again.

    Source: SO_NETNS_COOKIE, Linux 5.14.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def has_address(address: IPv4Address | IPv6Address) -> bool:
    """Whether the network namespace that the calling thread is in has an address."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((str(address), 0))
    except OSError:
        return False
    return True


def find(number: int) -> Path | None:
    """A file of the network namespace of this number: its name, or that of a process in it; None where there is neither.

    Raises:
        NetworkNotPermitted: It was not found, but there are processes whose namespace this one may not see.
    """
    own = os.stat(_OWN)
    hidden = 0
    processes = (Path("/proc") / name / "ns/net" for name in os.listdir("/proc") if name.isdecimal())
    for path in (*(NETNS_DIR / name for name in list_names()), *processes):
        try:
            found = path.stat()
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue  # it went meanwhile
        if (found.st_dev, found.st_ino) == (own.st_dev, number):
            return path
    if hidden:
        raise processes_hidden(f"cannot find network namespace {number}", hidden)
    return None


def namespaces_by_id() -> dict[int, Path]:
    """Files of the network namespaces that the calling thread's knows by an id (see `id_here`), by it."""
    found: dict[int, Path] = {}
    seen: set[int] = set()
    processes = (Path("/proc") / name / "ns/net" for name in os.listdir("/proc") if name.isdecimal())
    for path in (*(NETNS_DIR / name for name in list_names()), *processes):
        try:
            inode = path.stat().st_ino
            if inode not in seen:
                seen.add(inode)
                found.setdefault(id_here(path), path)
        except OSError:
            continue  # it went meanwhile, or may not be seen
    found.pop(-1, None)
    return found


def processes_hidden(what: str, number: int) -> NetworkNotPermitted:
    """The error for want of the right to see in which network namespaces others' processes are."""
    return NetworkNotPermitted(
        what,
        why=f"{number} processes do not show their network namespaces to this one, which lacks CAP_SYS_PTRACE",
        remedy="add CAP_SYS_PTRACE: as hookline-agent.service has it, or --cap-add SYS_PTRACE for a container",
        errno=errno.EACCES,
    )


def id_here(namespace: Path) -> int:
    """The id by which the calling thread's network namespace knows another (``link-netnsid`` of ``ip link``); -1: by none.

    Source: RTM_GETNSID, include/uapi/linux/net_namespace.h.

    Raises:
        OSError: There is no such namespace.
    """
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as asked:
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A header, a struct rtgenmsg with its padding, and the attribute NETNSA_FD.
            body = struct.pack("=4xHHi", 8, _NETNSA_FD, descriptor)
            asked.send(struct.pack("=IHHII", 16 + len(body), _RTM_GETNSID, 1, 1, 0) + body)
            answer = asked.recv(4096)
        finally:
            os.close(descriptor)
    length, kind = struct.unpack_from("=IH", answer)
    at = 20
    while kind == _RTM_NEWNSID and at + 8 <= length:
        size, attribute = struct.unpack_from("=HH", answer, at)
        if attribute == _NETNSA_NSID:
            return int(struct.unpack_from("=i", answer, at + 4)[0])
        at += max(4, size + 3 & ~3)
    return -1


def list_names(prefix: str = "") -> list[str]:
    """The names of all named network namespaces that begin with ``prefix``, in alphabetical order."""
    try:
        return sorted(name for name in os.listdir(NETNS_DIR) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def _share_directory() -> None:
    """Make ``/run/netns`` a shared mount point, as iproute2 does, so that both tools may add and remove."""
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory = os.fsencode(NETNS_DIR)
    if _libc().mount(b"", directory, b"none", _MS_SHARED | _MS_REC, None) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:
        raise network_error(f"cannot share {NETNS_DIR}", ctypes.get_errno())
    _mount(NETNS_DIR, NETNS_DIR, _MS_BIND | _MS_REC, f"cannot mount {NETNS_DIR}")
    _mount("", NETNS_DIR, _MS_SHARED | _MS_REC, f"cannot share {NETNS_DIR}")


def _mount(source: str | Path, target: Path, flags: int, what: str) -> None:
    if _libc().mount(os.fsencode(source), os.fsencode(target), b"none", flags, None) != 0:
        raise network_error(what, ctypes.get_errno())


def _setns(descriptor: int, what: str) -> None:
    if _libc().setns(descriptor, _CLONE_NEWNET) != 0:
        raise network_error(f"cannot enter {what}", ctypes.get_errno())


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
    ]
    libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
    libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
    libc.unshare.argtypes = [ctypes.c_int]
    return libc
