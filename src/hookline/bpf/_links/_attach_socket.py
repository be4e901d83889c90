"""Onto sockets: single ones, also another process's, and those that a socket map holds.

A socket holds its program itself. What is kept here refers to the socket without keeping it open: its end is its
owner's affair, and an attachment to a socket that is closed has nothing left to take off.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from hookline.bpf import _syscall
from hookline.bpf._arguments import number, one_of, process_number
from hookline.bpf._errors import BpfError, LinkChanged, failure
from hookline.bpf._links._group import HeldByTarget
from hookline.bpf._links._link import Link, create, expect_type
from hookline.bpf._maps._map import Map
from hookline.bpf._programs._handle import ProgramHandle
from hookline.bpf._syscall import AttachType, Command

__all__ = ["MapAttachment", "SocketAttachment", "attach_socket", "attach_socket_of", "attach_sockmap"]

_PIDFD_GETFD = 438  # the same on every machine
_OPTIONS = {"socket_filter": (50, 27), "sk_reuseport": (52, 68)}  # SO_ATTACH_*, SO_DETACH_*
_MAP_KINDS = {
    "verdict": AttachType.SK_SKB_VERDICT,
    "stream_verdict": AttachType.SK_SKB_STREAM_VERDICT,
    "stream_parser": AttachType.SK_SKB_STREAM_PARSER,
}
_SOCKET_MAPS = ("sockmap", "sockhash")

_Opened = Callable[[], contextlib.AbstractContextManager[int | None]]


class SocketAttachment(HeldByTarget):
    """A program on one socket."""

    def __init__(self, kind: str, what: str, opened: _Opened, held: int | None = None) -> None:
        super().__init__("socket", what)
        self._kind = kind
        self._opened = opened
        self._held = held

    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program in one step; every packet meets either the old one or the new one.

        Raises:
            BpfError: `expected` was given (the kernel does not tell a socket's program), or the socket is gone.
        """
        what = f"cannot put program {new.name!r} on {self._what}"
        if expected is not None:
            raise BpfError(what, why="the kernel does not tell which program a socket has")
        expect_type(new, self._what, self._kind)
        with self._opened() as fd:
            if fd is None:
                raise BpfError(what, errno=errnos.EBADF, why="the socket is closed")
            _put(new, fd, self._what)

    def _take_off(self) -> None:
        with self._opened() as fd:
            if fd is None:
                return
            try:
                _option(fd, _OPTIONS[self._kind][1], 0)
            except OSError as error:
                if error.errno != errnos.ENOENT:
                    raise failure(error.errno or 0, f"cannot take the program off {self._what}") from None

    def _let_go(self) -> None:
        if self._held is not None:
            _syscall.closed_quietly(self._held)
            self._held = None


class MapAttachment(HeldByTarget):
    """A program on a socket map, for kernels before 6.10, which have no link for it."""

    def __init__(self, program: ProgramHandle, target: Map, attach_type: AttachType) -> None:
        super().__init__("sockmap", f"map {target.name!r}")
        self._attach_type = attach_type
        self._map = os.dup(target.fd)
        self._program = program.duplicate()

    def update(self, new: ProgramHandle, *, expected: ProgramHandle | None = None) -> None:
        """Replace the program in one step. The check of `expected` is another.

        Raises:
            LinkChanged: Another program than the expected one is in.
        """
        if expected is not None and expected.id != self._program.id:
            raise LinkChanged(
                f"{self._what} does not hold program {expected.name!r} (id {expected.id})",
                errno=errnos.EPERM,
                why=f"it holds program id {self._program.id}; nothing was changed",
            )
        _checked_attach(new, self._map, self._attach_type, self._what)
        old, self._program = self._program, new.duplicate()
        old.close()

    def _take_off(self) -> None:
        attr = _syscall.attributes("IIII", self._map, self._program.fd, self._attach_type, 0)
        result = _syscall.call(Command.PROG_DETACH, attr)
        if result < 0 and result != -errnos.ENOENT:
            raise failure(
                -result, f"cannot take the program off {self._what}", capability="CAP_NET_ADMIN CAP_BPF"
            )

    def _let_go(self) -> None:
        if self._map >= 0:
            _syscall.closed_quietly(self._map)
            self._map = -1
            self._program.close()


def attach_socket(program: ProgramHandle, target: socket.socket | int) -> SocketAttachment:
    """Attach to one of this process's sockets; see `Program.attach_socket`."""
    number = target if isinstance(target, int) else target.fileno()
    what = f"socket {number}"
    expect_type(program, what, *_OPTIONS)
    inode = _inode(number)
    if inode is None:
        raise BpfError(
            f"cannot attach program {program.name!r} to {what}", errno=errnos.EBADF, why="it is closed"
        )
    _put(program, number, what)

    @contextmanager
    def opened() -> Iterator[int | None]:
        # The number may be another file's by now.
        yield number if _inode(number) == inode else None

    return SocketAttachment(program.type, what, opened)


def attach_socket_of(program: ProgramHandle, pid: int, fd: int) -> SocketAttachment:
    """Attach to another process's socket; see `Program.attach_socket_of`."""
    what = f"socket {fd} of process {pid}"
    expect_type(program, what, *_OPTIONS)
    number(fd, "descriptor", 0, (1 << 31) - 1)
    try:
        process = os.pidfd_open(process_number(pid))
    except OSError as error:
        raise BpfError(f"there is no process {pid}", errno=error.errno or 0) from None
    inode: int | None = None

    @contextmanager
    def opened() -> Iterator[int | None]:
        # Fetched only for the moment: a descriptor of ours would keep the socket open.
        copy = _fetch(process, fd)
        try:
            yield copy if copy >= 0 and (inode is None or _inode(copy) == inode) else None
        finally:
            if copy >= 0:
                os.close(copy)

    try:
        copy = _fetch(process, fd)
        if copy < 0:
            remedy = "see /proc/PID/fd for its descriptors" if copy == -errnos.EBADF else ""
            refusal = f"cannot take {what}"
            raise failure(-copy, refusal, capability="CAP_SYS_PTRACE", remedy=remedy)
        try:
            inode = _inode(copy)
            _put(program, copy, what)
        finally:
            os.close(copy)
    except BaseException:
        os.close(process)
        raise
    return SocketAttachment(program.type, what, opened, held=process)


def attach_sockmap(
    program: ProgramHandle,
    target: Map,
    kind: Literal["verdict", "stream_verdict", "stream_parser"] | None,
) -> Link | MapAttachment:
    """Attach to a socket map; see `Program.attach_sockmap`."""
    where = f"map {target.name!r}"
    expect_type(program, where, "sk_msg", "sk_skb")
    what = f"cannot attach program {program.name!r} to {where}"
    if target.type not in _SOCKET_MAPS:
        raise BpfError(
            what, errno=errnos.EINVAL, why=f"it is a {target.type}, and a sockmap or sockhash is wanted"
        )
    attach_type = AttachType.SK_MSG_VERDICT
    chosen = None if kind is None else one_of(_MAP_KINDS, kind, "kind of sk_skb program")
    if program.type == "sk_skb":
        attach_type = chosen or AttachType(program.expected_attach_type or AttachType.SK_SKB_VERDICT)
    elif chosen is not None:
        raise BpfError(what, why="the kinds are those of sk_skb programs, and it is an sk_msg program")
    result = create(program, target.fd, attach_type)
    if result >= 0:
        return Link(result)
    if result != -errnos.EINVAL:
        remedy = "another link holds it: update that one" if result == -errnos.EBUSY else ""
        raise failure(-result, what, capability="CAP_NET_ADMIN CAP_BPF", remedy=remedy)
    # Before Linux 6.10 there is no such link, and the map holds the program.
    _checked_attach(program, target.fd, attach_type, where)
    return MapAttachment(program, target, attach_type)


def _checked_attach(program: ProgramHandle, target: int, attach_type: AttachType, where: str) -> None:
    attr = _syscall.attributes("IIII", target, program.fd, attach_type, 0)
    what = f"cannot attach program {program.name!r} to {where}"
    _syscall.checked(Command.PROG_ATTACH, attr, what, capability="CAP_NET_ADMIN CAP_BPF")


def _put(program: ProgramHandle, fd: int, what: str) -> None:
    try:
        _option(fd, _OPTIONS[program.type][0], program.fd)
    except OSError as error:
        why = {
            errnos.EPERM: "its owner locked its filter (SO_LOCK_FILTER), or holds another right to it",
            errnos.ENOTSOCK: "it is no socket",
            errnos.EINVAL: "sk_reuseport programs want a bound socket with SO_REUSEPORT",
        }.get(error.errno or 0, "")
        raise BpfError(
            f"cannot attach program {program.name!r} to {what}", errno=error.errno or 0, why=why
        ) from None


def _option(fd: int, option: int, value: int) -> None:
    function = ctypes.CDLL(None, use_errno=True).setsockopt
    packed = struct.pack("=i", value)
    if function(fd, socket.SOL_SOCKET, option, packed, len(packed)) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def _fetch(process: int, fd: int) -> int:
    """A copy of another process's descriptor, or the negative errno."""
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    result = function(ctypes.c_long(_PIDFD_GETFD), ctypes.c_int(process), ctypes.c_int(fd), ctypes.c_uint(0))
    return int(result) if result >= 0 else -ctypes.get_errno()


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except (OSError, OverflowError):
        return None
