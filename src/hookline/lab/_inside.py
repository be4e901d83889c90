"""Work inside a member of a lab: in its network namespace and, for nodes and pods, in its cgroup.

A thread enters a network namespace alone, a process enters a cgroup as a whole. So what has to be in a member's cgroup is
done by a process of its own: a command by the shell that moves and then becomes it, anything else by a fork of this
process. A socket keeps the cgroup of the process that opened it, which is why a probe needs the fork for opening only.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hookline.errors import HooklineError
from hookline.lab._errors import LabError
from hookline.net import cgroups, enter

Result = TypeVar("Result")

_MOVE = 'echo 0 > "$1" || exit 126; shift; exec "$@"'
_SOCKETS_PER_MESSAGE = 128  # the kernel passes 253 at most (SCM_MAX_FD)


def command_in(group: str, command: Sequence[str], environment: Mapping[str, str] | None) -> list[str]:
    """The command that moves into a cgroup and becomes the given one; the same process number, files and signals.

    Raises:
        LabError: There is no such command.
    """
    program = command[0]
    path = (environment if environment is not None else os.environ).get("PATH")
    if shutil.which(program, path=path) is None:
        there = os.path.isfile(program)
        raise LabError(
            f"cannot run {program}", why="it is not executable" if there else "No such file or directory"
        )
    return ["/bin/sh", "-c", _MOVE, "sh", str(cgroups.path(group) / "cgroup.procs"), *command]


def move(namespace: Path, group: str) -> None:
    """Move this process for good: the calling thread into a network namespace, all of it into a cgroup ("": stay).

    Raises:
        NetworkError: One of them is not there, or this user may not.
    """
    if group:
        cgroups.place(group)
    enter(namespace)


def call(namespace: Path, group: str, function: Callable[[], Result]) -> Result:
    """Run a function in a fork of this process that is inside, and return what it returns.

    The fork has this thread only. Result and exception come back pickled.

    Raises:
        LabError: The fork died, or what it returns cannot be pickled.
        BaseException: What the function raised.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, _forked() as child:
        if child == 0:
            ours.close()
            _answer(theirs, namespace, group, function)
        theirs.close()
        answer = _read_all(ours)
    if not answer:
        raise LabError("what ran inside the member ended without a result")
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    result: Result = value
    return result


def open_sockets(namespace: Path, group: str, wanted: Sequence[tuple[int, int]]) -> list[socket.socket]:
    """New sockets that are a member's: opened in its network namespace and cgroup.

    Args:
        namespace: The member's network namespace.
        group: Its cgroup; "": that of this process.
        wanted: For each socket its family and type.

    Raises:
        NetworkError: The namespace or cgroup is not there, or this user may not.
        OSError: The kernel gives no socket.
    """
    opened: list[socket.socket] = []
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs, _forked() as child:
            if child == 0:
                ours.close()
                _send_sockets(theirs, namespace, group, wanted)
            theirs.close()
            for begin in range(0, len(wanted), _SOCKETS_PER_MESSAGE):
                word, descriptors, _, _ = socket.recv_fds(ours, 1, _SOCKETS_PER_MESSAGE)
                opened += [socket.socket(fileno=number) for number in descriptors]
                if word != b"k" or len(opened) < min(begin + _SOCKETS_PER_MESSAGE, len(wanted)):
                    break
            answer = _read_all(ours)
        if answer:
            raise pickle.loads(answer)
        if len(opened) != len(wanted):
            raise LabError("no socket could be opened inside the member")
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened


def _send_sockets(
    to: socket.socket, namespace: Path, group: str, wanted: Sequence[tuple[int, int]]
) -> NoReturn:
    try:
        try:
            move(namespace, group)
            for begin in range(0, len(wanted), _SOCKETS_PER_MESSAGE):
                some = [
                    socket.socket(family, kind)
                    for family, kind in wanted[begin : begin + _SOCKETS_PER_MESSAGE]
                ]
                socket.send_fds(to, [b"k"], [one.fileno() for one in some])
                for one in some:
                    one.close()
        except (HooklineError, OSError) as error:
            to.sendall(b"e" + pickle.dumps(_portable(error)))
    finally:
        os._exit(0)


def _answer(to: socket.socket, namespace: Path, group: str, function: Callable[[], Any]) -> NoReturn:
    try:
        try:
            move(namespace, group)
            answer = pickle.dumps((True, function()))
        except BaseException as error:
            answer = pickle.dumps((False, _portable(error)))
        to.sendall(answer)
    finally:
        os._exit(0)


def _portable(error: BaseException) -> BaseException:
    """The error, or one of the same words where it does not survive pickling."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    except Exception:
        pass
    if isinstance(error, HooklineError):
        return LabError(error.what, why=error.why, remedy=error.remedy)
    text = "".join(traceback.format_exception_only(error)).strip()
    return LabError("what ran inside the member failed", why=text)


@contextlib.contextmanager
def _forked() -> Iterator[int]:
    """Fork; in the parent, wait for the child's end when the block is done, and end it when the block fails."""
    child = os.fork()
    try:
        yield child
    except BaseException:
        if child:
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        if child:
            os.waitpid(child, 0)


def _read_all(handle: socket.socket) -> bytes:
    parts = []
    while part := handle.recv(65536):
        parts.append(part)
    return b"".join(parts)
