"""Starting the lab's server, and giving it orders."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hookline.lab._errors import LabError
from hookline.lab._plan import Member
from hookline.lab._processes import Process
from hookline.lab.server import CONTROL, LEASH

_ANSWER_WITHIN_S = 30.0
_WORD = b"k"


@dataclass(frozen=True, slots=True)
class Counts:
    """What a server has seen.

    Attributes:
        tcp_accepted: Connections taken.
        tcp_requests: Lines and HTTP requests answered.
        tcp_closed: Connections ended in order, by either side.
        tcp_reset: Connections ended by an error, mostly the peer's reset.
        udp_received: Datagrams received, each of which was answered.
    """

    tcp_accepted: int = 0
    tcp_requests: int = 0
    tcp_closed: int = 0
    tcp_reset: int = 0
    udp_received: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def tcp_open(self) -> int:
        """Connections that are open now."""
        return self.tcp_accepted - self.tcp_closed - self.tcp_reset

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """What the lab's servers have seen: by member (``default/a``) and port (``8080/tcp``).

    Members that were removed keep theirs.
    """

    members: dict[str, dict[str, Counts]]

    def of(self, endpoint: str) -> Counts:
        """The sum over the ports of a member; zeros for one without ports."""
        return sum(self.members.get(endpoint, {}).values(), Counts())

    @property
    def totals(self) -> Counts:
        """The sum over all members."""
        return sum((self.of(endpoint) for endpoint in self.members), Counts())

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values: ``{"members": {NAME: {PORT: {…}}}, "totals": {…}}``."""
        return {
            "members": {
                name: {port: counts.as_dict() for port, counts in ports.items()}
                for name, ports in self.members.items()
            },
            "totals": self.totals.as_dict(),
        }


class Leash:
    """A server that was just started: it ends with this process, until it is let go."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor

    def let_go(self) -> None:
        """Let the server outlive this process, which has written down its number."""
        os.write(self._descriptor, _WORD)


@contextmanager
def start(name: str, folder: Path) -> Iterator[Leash]:
    """Start a lab's server, detached from the terminal; its control socket takes orders at once.

    At the end of the ``with`` block the server ends too, unless it was let go.
    """
    path = socket_path(folder)
    path.unlink(missing_ok=True)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    log = os.open(folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        control.bind(str(path))
        control.listen(16)
        os.set_inheritable(control.fileno(), True)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "hookline.lab.server", name],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reading, LEASH),
                (os.POSIX_SPAWN_DUP2, control.fileno(), CONTROL),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
        process = Process.of(pid)
        if process is None:
            raise LabError(f"the server of lab {name} ended at once", why=_log(folder))
        yield Leash(process, writing)
    finally:
        for descriptor in (reading, writing, log):
            os.close(descriptor)
        control.close()


class Client:
    """Gives orders to a lab's server, over one connection.

    Raises:
        LabError: The server is gone, or refuses the order.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder

    def add(self, members: Iterable[Member]) -> None:
        """Listen on the ports of these members."""
        self._order(
            {
                "do": "add",
                "members": [
                    {
                        "name": member.endpoint,
                        "netns": str(member.netns),
                        "ports": [
                            (port.port, port.protocol) for port in member.ports if port.protocol != "sctp"
                        ],
                    }
                    for member in members
                    if member.ports
                ],
            }
        )

    def remove(self, endpoints: Iterable[str]) -> None:
        """Close the ports and connections of these members."""
        self._order({"do": "remove", "members": list(endpoints)})

    def counts(self) -> ServerCounts:
        """What the servers have seen since the lab was made or the counts were reset."""
        answer = self._order({"do": "counts"})
        return ServerCounts(
            {
                name: {port: Counts(**counts) for port, counts in ports.items()}
                for name, ports in answer["counts"].items()
            }
        )

    def reset(self) -> None:
        """Begin all counts at zero."""
        self._order({"do": "reset"})

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as handle:
                handle.settimeout(_ANSWER_WITHIN_S)
                handle.connect(str(socket_path(self._folder)))
                handle.sendall(json.dumps(order).encode() + b"\n")
                with handle.makefile("rb") as answers:
                    line = answers.readline()
        except OSError as error:
            raise self._gone(error.strerror or str(error)) from None
        if not line:
            raise self._gone("it closed the connection")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LabError(f"the server of lab {self._name} cannot {order['do']}", why=answer["error"])
        return answer

    def _gone(self, why: str) -> LabError:
        return LabError(
            f"the server of lab {self._name} does not answer",
            why=f"{why}; its log ends: {_log(self._folder)}",
            remedy=f"hookline lab down --name {self._name}, then up again",
        )


def socket_path(folder: Path) -> Path:
    """The server's control socket."""
    return folder / "server.sock"


def _log(folder: Path) -> str:
    """The last line of the server's log."""
    try:
        lines = (folder / "server.log").read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return lines[-1] if lines else "(empty)"
