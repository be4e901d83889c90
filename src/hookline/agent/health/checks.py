"""One health check: a question to a backend, and what its answer says.

Every check opens a connection or socket of its own in the calling thread's network namespace and leaves nothing behind. HTTP is
read by h11 over asyncio's own streams, gRPC is spoken by grpclib (`_grpc`), both imported at their first use.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from hookline.model import HealthCheck, octets_of

Outcome = Literal["passed", "failed", "undecided"]

OWN_TROUBLE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
)
"""What this machine lacks says nothing of a backend."""

REASONS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "closed",
    errno.EPIPE: "closed",
    errno.ECONNABORTED: "closed",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ETIMEDOUT: "timeout",
}
STALL_SECONDS = 0.05
LONGEST_DATAGRAM = 65535
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Backend:
    """Whom to ask.

    Attributes:
        port: The backend's own; a check may ask at another.
        service: The service's reference; with its port and protocol what a command is told.
    """

    address: IPv4Address | IPv6Address
    port: int
    service: str = ""
    service_port: str = ""
    protocol: str = "TCP"

    @property
    def host(self) -> str:
        """The address as a URL has it."""
        return f"[{self.address}]" if self.address.version == 6 else str(self.address)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check.

    Attributes:
        outcome: ``undecided``: it could not be made, for a reason that is not the backend's.
        reason: One word, the same for the same cause: ``timeout``, ``refused``, ``status``, …
        detail: More of it, for people.
        seconds: How long it took.
    """

    outcome: Outcome
    reason: str
    detail: str = ""
    seconds: float = 0.0


class CheckError(Exception):
    """A check's answer is not the wanted one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


async def check(how: HealthCheck, backend: Backend) -> Result:
    """Asks a backend once. Never raises, except when it is cancelled; never takes longer than the timeout, by much.

    A timeout that is noticed late, since this process was kept from running, decides nothing: the answer may have been there.
    """
    loop = asyncio.get_running_loop()
    begun = time.monotonic()
    deadline = loop.time() + how.timeout_seconds
    try:
        async with asyncio.timeout_at(deadline):
            await _ask(how, backend)
        result = Result("passed", "passed")
    except TimeoutError as error:
        if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT and loop.time() < deadline:
            result = Result("failed", "timeout", "the kernel gave up")
        elif loop.time() - deadline > max(STALL_SECONDS, how.timeout_seconds / 5):
            result = Result("undecided", "stalled", "this process was kept from running")
        elif _is_silent(how):
            result = Result("passed", "passed")
        else:
            result = Result("failed", "timeout", f"no answer within {how.timeout_seconds:g} s")
    except CheckError as error:
        result = Result("failed", error.reason, error.detail)
    except ssl.SSLCertVerificationError as error:
        result = Result("failed", "certificate", error.verify_message)
    except ssl.SSLError as error:
        result = Result("failed", "tls", error.reason or str(error))
    except OSError as error:
        outcome: Outcome = "undecided" if error.errno in OWN_TROUBLE else "failed"
        result = Result(outcome, REASONS.get(error.errno or 0, "error"), error.strerror or str(error))
    except Exception as error:  # a check that has a bug must not take its supervisor along
        result = Result("undecided", "error", f"{type(error).__name__}: {error}")
    return Result(result.outcome, result.reason, result.detail, time.monotonic() - begun)


async def _ask(how: HealthCheck, backend: Backend) -> None:
    port = how.port or backend.port
    match how.type:
        case "tcp":
            await _tcp(backend, port)
        case "udp":
            await _udp(how, backend, port)
        case "http" | "https":
            from hookline.agent.health import _http

            await _http.ask(how, backend, port)
        case "grpc":
            from hookline.agent.health import _grpc

            await _grpc.ask(how, backend, port)
        case "command":
            from hookline.agent.health import _command

            await _command.run(how, backend)


def _is_silent(how: HealthCheck) -> bool:
    """Whether no answer is the answer: nothing is sent, so nothing is expected, and only an ICMP error says otherwise."""
    return how.type == "udp" and not how.send and how.expect is None


async def _tcp(backend: Backend, port: int) -> None:
    """A connection that is made is enough."""
    with _socket(backend, socket.SOCK_STREAM) as handle:
        # Closed by a reset: thousands of checks leave no port waiting.
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        await asyncio.get_running_loop().sock_connect(handle, (str(backend.address), port))


async def _udp(how: HealthCheck, backend: Backend, port: int) -> None:
    """A datagram there, one back. The socket is connected, so the kernel hands it ICMP's refusals."""
    with _socket(backend, socket.SOCK_DGRAM) as handle:
        handle.connect((str(backend.address), port))
        handle.send(octets_of(how.send))
        answer = await asyncio.get_running_loop().sock_recv(handle, LONGEST_DATAGRAM)
    wanted = octets_of(how.expect) if how.expect is not None else b""
    if not answer.startswith(wanted):
        raise CheckError("mismatch", f"the answer begins with {answer[: max(16, len(wanted))]!r}")


def _socket(backend: Backend, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if backend.address.version == 6 else socket.AF_INET
    return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
