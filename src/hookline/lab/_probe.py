"""A probe: one question from inside a member's network namespace, and who answered it."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookline.lab._errors import ProbeFailed
from hookline.lab._inside import open_sockets
from hookline.model.names import Address, Protocol
from hookline.net import inside

_QUESTION = b"hookline probe\n"
_LONGEST_ANSWER = 4096
_REASONS = {
    errno.ECONNREFUSED: (
        "refused",
        "the connection was refused: nothing listens there, or the service has no backend that takes it",
    ),
    errno.EHOSTUNREACH: ("unreachable", "there is no route to the address: no member and no service has it"),
    errno.ENETUNREACH: ("unreachable", "there is no route to the address: no member and no service has it"),
    errno.EACCES: ("unreachable", "the address is prohibited by a router"),
    errno.ECONNRESET: ("closed", "the connection was reset"),
    errno.EPIPE: ("closed", "the connection was closed"),
    errno.ETIMEDOUT: ("timeout", "the connection attempt timed out"),
}
_REMEDY = (
    "hookline explain --from A --to B:PORT --node lab/LAB shows what decides about it, and what stops it"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """An answer to a probe.

    Attributes:
        answered_by: The first line of the answer: the name of the member, from one of the lab's servers.
        source: Who asked.
        target: Who was asked, as it was written.
        address: The address that was asked, ``port`` and ``protocol`` with it.
        connected_ns: From the first packet to the open connection; 0 for UDP.
        answered_ns: From the first packet to the answer.
    """

    answered_by: str
    source: str
    target: str
    address: Address
    port: int
    protocol: Protocol
    connected_ns: int
    answered_ns: int

    def as_dict(self) -> dict[str, Any]:
        """The probe as plain values, times in nanoseconds."""
        return {
            "answered_by": self.answered_by,
            "from": self.source,
            "to": self.target,
            "address": str(self.address),
            "port": self.port,
            "protocol": self.protocol,
            "connected_ns": self.connected_ns,
            "answered_ns": self.answered_ns,
        }


def probe(
    namespace: Path,
    address: Address,
    port: int,
    protocol: Protocol,
    *,
    source: str,
    target: str,
    timeout: float,
    group: str = "",
) -> Probe:
    """Ask from inside a namespace, with a socket of a cgroup where one is named, and wait for the answer.

    Raises:
        ProbeFailed: There is none; the error says why.
    """
    what = f"{source} gets no answer from {target} ({_at(address, port)}/{protocol})"
    if protocol == "sctp":
        raise ProbeFailed(what, why="probes speak TCP and UDP", reason="unreachable", remedy="use tcp or udp")
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    if group:
        (handle,) = open_sockets(namespace, group, [(family, kind)])
    else:
        with inside(namespace):
            handle = socket.socket(family, kind)
    with handle:
        begun = time.perf_counter_ns()
        deadline = time.monotonic() + timeout
        connected = 0
        try:
            handle.settimeout(timeout)
            handle.connect((str(address), port))
            if protocol == "tcp":
                connected = time.perf_counter_ns() - begun
            handle.sendall(_QUESTION)
            answer = _first_line(handle, deadline, protocol)
        except TimeoutError:
            stage = "it is connected, but no answer came" if connected else "nothing came back"
            raise ProbeFailed(
                what,
                why=f"{stage} within {timeout:g} s",
                reason="timeout",
                remedy="hookline explain shows what decides about it"
                if connected
                else "try a longer --timeout",
            ) from None
        except OSError as error:
            reason, why = _REASONS.get(error.errno or 0, ("unreachable", error.strerror or str(error)))
            raise ProbeFailed(what, why=why, reason=reason, remedy=_REMEDY) from None
        answered = time.perf_counter_ns() - begun
    if not answer and protocol == "tcp":
        raise ProbeFailed(
            what, why="the connection was closed without an answer", reason="closed", remedy=_REMEDY
        )
    return Probe(
        answer.decode(errors="replace").strip(), source, target, address, port, protocol, connected, answered
    )


def _first_line(handle: socket.socket, deadline: float, protocol: Protocol) -> bytes:
    if protocol == "udp":
        return handle.recv(_LONGEST_ANSWER).partition(b"\n")[0]
    answer = b""
    while b"\n" not in answer and len(answer) < _LONGEST_ANSWER:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        handle.settimeout(remaining)
        data = handle.recv(_LONGEST_ANSWER)
        if not data:
            break
        answer += data
    return answer.partition(b"\n")[0]


def _at(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
