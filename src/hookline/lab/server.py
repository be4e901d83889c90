"""The lab's servers: one process that listens on every declared port of every member, and answers with its
name.

Started by ``lab.up`` as ``python -m hookline.lab.server LAB``; descriptor 0 is the Unix socket on which it
takes orders, descriptor 3 the leash: a pipe from the process that makes the lab. It ends when the leash ends
without a word, so that a maker killed before it could write down this process's number leaves no process
behind.

TCP: every line received is answered by one line with the member's name; a connection whose first line is an
HTTP/1 request gets HTTP answers with the name as body. UDP: every datagram is answered by one, from the
address to which it was sent (which may be one on the loopback, that of a service: direct server return).

Orders and answers are one JSON object per line: ``{"do": "add", "members": [{"name", "netns", "ports"}]}``,
``{"do": "remove", "members": [NAME]}``, ``{"do": "counts"}``, ``{"do": "reset"}``. Counts of a member that
was removed stay. The process imports little, so that it is listening before the first namespace is there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hookline.net import NetworkError, inside

CONTROL, LEASH = 0, 3

_BACKLOG = 4096
_ACCEPTS_AT_ONCE = 256
_DATAGRAMS_AT_ONCE = 256
_LONGEST_REQUEST_LINE = 8192
_CHUNK = 65536
_PATIENCE_S = 5.0
_HTTP = re.compile(rb"[A-Z]+ \S+ HTTP/1\.([01])\r?\n")
_LENGTH = re.compile(rb"\r?\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r?\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r?\nconnection:[ \t]*close[ \t]*\r?\n", re.IGNORECASE)
_HEADERS_END = re.compile(rb"\r?\n\r?\n")
_IPV4_PKTINFO_SIZE, _IPV6_PKTINFO_SIZE = 12, 20
_IP_PKTINFO = 8
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_ERRORS_OF_A_PACKET = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMSGSIZE, errno.EPERM, errno.EINVAL}
)


class Counts:
    """What one port of one member has seen."""

    __slots__ = ("tcp_accepted", "tcp_closed", "tcp_requests", "tcp_reset", "udp_received")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin at zero."""
        self.tcp_accepted = self.tcp_requests = self.tcp_closed = self.tcp_reset = self.udp_received = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class Server:
    """The loop, and everything that it looks after."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._counts: dict[str, dict[str, Counts]] = {}
        self._open: dict[str, set[Listener | Connection | DatagramSocket]] = {}
        self._silent_until = 0.0

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            for descriptor, events in self._epoll.poll():
                ready = self._ready.get(descriptor)
                if ready is not None:  # else closed by an earlier event of this round
                    ready(events)

    def watch(self, handle: socket.socket | int, ready: Callable[[int], None], events: int = _READ) -> None:
        """Call ``ready`` whenever a descriptor has one of these events."""
        descriptor = handle if isinstance(handle, int) else handle.fileno()
        self._ready[descriptor] = ready
        self._epoll.register(descriptor, events)

    def rewatch(self, handle: socket.socket, events: int) -> None:
        """Wait for other events of a descriptor."""
        self._epoll.modify(handle.fileno(), events)

    def forget(self, handle: socket.socket | int) -> None:
        """No longer watch a descriptor, which is about to be closed."""
        descriptor = handle if isinstance(handle, int) else handle.fileno()
        del self._ready[descriptor]
        self._epoll.unregister(descriptor)

    def complain(self, what: str) -> None:
        """Write to the log, once a second at most."""
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + 1
            print(f"hookline: {what}", file=sys.stderr, flush=True)

    def order(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out an order, and return the answer."""
        match order.get("do"):
            case "add":
                for member in order["members"]:
                    self._add(member["name"], Path(member["netns"]), member["ports"])
                return {}
            case "remove":
                for name in order["members"]:
                    self._remove(name)
                return {}
            case "counts":
                return {"counts": self._read_counts()}
            case "reset":
                for ports in self._counts.values():
                    for counts in ports.values():
                        counts.reset()
                return {}
            case other:
                return {"error": f"there is no order {other!r}"}

    def _read_counts(self) -> dict[str, dict[str, dict[str, int]]]:
        return {
            name: {port: counts.as_dict() for port, counts in ports.items()}
            for name, ports in self._counts.items()
        }

    def _add(self, name: str, netns: Path, ports: list[tuple[int, str]]) -> None:
        counts = self._counts.setdefault(name, {})
        opened = self._open.setdefault(name, set())
        with inside(netns):
            sockets = [
                (port, protocol, _listen(family, port, protocol))
                for port, protocol in ports
                for family in _families()
            ]
        for port, protocol, handle in sockets:
            mine = counts.setdefault(f"{port}/{protocol}", Counts())
            kind = Listener if protocol == "tcp" else DatagramSocket
            opened.add(kind(self, handle, name, mine, opened))

    def _remove(self, name: str) -> None:
        for one in list(self._open.pop(name, ())):
            one.close()


class Listener:
    """A TCP port of a member, in one address family."""

    __slots__ = ("_answer", "_counts", "_handle", "_opened", "_server")

    def __init__(
        self, server: Server, handle: socket.socket, name: str, counts: Counts, opened: set[Any]
    ) -> None:
        self._server, self._handle, self._counts, self._opened = server, handle, counts, opened
        self._answer = f"{name}\n".encode()
        server.watch(handle, self._ready)

    def close(self) -> None:
        """Take no more connections."""
        self._server.forget(self._handle)
        self._handle.close()
        self._opened.discard(self)

    def _ready(self, events: int) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                handle, _ = self._handle.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._server.complain(f"{error.strerror}: connections wait")
                    return
                continue  # a connection that ended before it was taken
            handle.setblocking(False)
            self._counts.tcp_accepted += 1
            self._opened.add(Connection(self._server, handle, self._answer, self._counts, self._opened))


class Connection:
    """A TCP connection: lines in, the name out; or HTTP."""

    __slots__ = (
        "_answer",
        "_counts",
        "_ending",
        "_handle",
        "_http",
        "_input",
        "_opened",
        "_output",
        "_server",
    )

    def __init__(
        self, server: Server, handle: socket.socket, answer: bytes, counts: Counts, opened: set[Any]
    ) -> None:
        self._server, self._handle, self._answer, self._counts = server, handle, answer, counts
        self._opened = opened
        self._http: bool | None = None  # not known before the first line is complete
        self._input = b""
        self._output = b""
        self._ending = False
        server.watch(handle, self._ready)

    def close(self) -> None:
        """End the connection in order."""
        self._end("tcp_closed")

    def _end(self, how: str) -> None:
        setattr(self._counts, how, getattr(self._counts, how) + 1)
        self._server.forget(self._handle)
        self._handle.close()
        self._opened.discard(self)

    def _ready(self, events: int) -> None:
        try:
            if self._output:
                self._send(b"")
                return
            data = self._handle.recv(_CHUNK)
            if not data:
                self._ending = True
                self._send(self._last_answer())
            else:
                self._send(self._answer_to(data))
        except BlockingIOError:
            return
        except OSError:
            self._end("tcp_reset")

    def _answer_to(self, data: bytes) -> bytes:
        if self._http is None:
            self._input += data
            if b"\n" not in self._input and len(self._input) < _LONGEST_REQUEST_LINE:
                return b""
            self._http = _HTTP.match(self._input) is not None
            data, self._input = self._input, b""
        if self._http:
            return self._http_answers(data)
        lines = data.count(b"\n")
        self._counts.tcp_requests += lines
        self._input = (
            b"" if data.endswith(b"\n") else b"."
        )  # whether a line has begun; its text does not matter
        return self._answer * lines

    def _last_answer(self) -> bytes:
        """The answer to a last line without an end."""
        if not self._input or self._http:
            return b""
        self._counts.tcp_requests += 1
        return self._answer

    def _http_answers(self, data: bytes) -> bytes:
        self._input += data
        answers = []
        while not self._ending:
            end = _HEADERS_END.search(self._input)
            if end is None:
                self._ending = len(self._input) > _CHUNK
                break
            head = self._input[: end.end()]
            first = _HTTP.match(head)
            length = _LENGTH.search(head)
            whole = end.end() + (int(length[1]) if length else 0)
            if len(self._input) < whole:
                break
            self._input = self._input[whole:]
            self._counts.tcp_requests += 1
            self._ending = first is None or first[1] == b"0" or _CLOSE.search(head) is not None
            answers.append(self._http_answer(first is not None, head.startswith(b"HEAD ")))
        return b"".join(answers)

    def _http_answer(self, valid: bool, head: bool) -> bytes:
        status = b"200 OK" if valid else b"400 Bad Request"
        connection = b"close" if self._ending else b"keep-alive"
        return (
            b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: %b\r\n\r\n%b"
            % (
                status,
                len(self._answer),
                connection,
                b"" if head else self._answer,
            )
        )

    def _send(self, answer: bytes) -> None:
        waited = bool(self._output)
        self._output += answer
        if self._output:
            with contextlib.suppress(BlockingIOError):
                self._output = self._output[self._handle.send(self._output) :]
        if self._output and not waited:
            self._server.rewatch(self._handle, _WRITE)
        elif waited and not self._output:
            self._server.rewatch(self._handle, _READ)
        if self._ending and not self._output:
            self._end("tcp_closed")


class DatagramSocket:
    """A UDP port of a member, in one address family."""

    __slots__ = ("_answer", "_counts", "_handle", "_level", "_opened", "_server", "_space")

    def __init__(
        self, server: Server, handle: socket.socket, name: str, counts: Counts, opened: set[Any]
    ) -> None:
        self._server, self._handle, self._counts, self._opened = server, handle, counts, opened
        self._answer = [f"{name}\n".encode()]
        self._space = socket.CMSG_SPACE(_IPV6_PKTINFO_SIZE)
        server.watch(handle, self._ready)

    def close(self) -> None:
        """Receive no more."""
        self._server.forget(self._handle)
        self._handle.close()
        self._opened.discard(self)

    def _ready(self, events: int) -> None:
        handle = self._handle
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                _, ancillary, _, peer = handle.recvmsg(_CHUNK, self._space)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error for an earlier answer
            self._counts.udp_received += 1
            try:
                handle.sendmsg(self._answer, [_reply_from(one) for one in ancillary], 0, peer)
            except BlockingIOError:
                pass  # the socket's buffer is full: as the network would, lose it
            except OSError as error:
                if error.errno not in _ERRORS_OF_A_PACKET:
                    raise


class Orders:
    """The control socket and the connections to it."""

    def __init__(self, server: Server, handle: socket.socket) -> None:
        self._server, self._handle = server, handle
        handle.setblocking(False)
        server.watch(handle, self._ready)

    def _ready(self, events: int) -> None:
        try:
            handle, _ = self._handle.accept()
        except OSError:
            return
        handle.settimeout(_PATIENCE_S)
        received = bytearray()

        def take(events: int) -> None:
            try:
                received.extend(data := handle.recv(_CHUNK))
                while b"\n" in received:
                    line, _, rest = bytes(received).partition(b"\n")
                    received[:] = rest
                    handle.sendall(json.dumps(_answered(self._server, line)).encode() + b"\n")
            except OSError:
                data = b""
            if not data:
                self._server.forget(handle)
                handle.close()

        self._server.watch(handle, take)


def _answered(server: Server, line: bytes) -> dict[str, Any]:
    try:
        return server.order(json.loads(line))
    except (NetworkError, OSError, ValueError, KeyError, TypeError) as error:
        return {"error": str(error) or type(error).__name__}


def _families() -> list[socket.AddressFamily]:
    families = [socket.AF_INET]
    if os.path.isdir("/proc/sys/net/ipv6"):
        families.append(socket.AF_INET6)
    return families


def _listen(family: socket.AddressFamily, port: int, protocol: str) -> socket.socket:
    tcp = protocol == "tcp"
    handle = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    try:
        handle.setblocking(False)
        if family == socket.AF_INET6:
            handle.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if tcp:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif family == socket.AF_INET:
            handle.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            handle.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        handle.bind(("", port))
        if tcp:
            handle.listen(_BACKLOG)
    except BaseException:
        handle.close()
        raise
    return handle


def _reply_from(ancillary: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
    """From where a datagram was sent to, the packet information that sends the answer from there."""
    level, kind, data = ancillary
    if level == socket.IPPROTO_IP:  # struct in_pktinfo: interface, local address, destination in the header
        return level, kind, bytes(4) + data[8:_IPV4_PKTINFO_SIZE] + bytes(4)
    return level, kind, data[:16] + bytes(4)  # struct in6_pktinfo: address, interface


def _watch_leash(server: Server) -> None:
    def take(events: int) -> None:
        if not os.read(LEASH, 1):
            raise SystemExit("hookline: the process that made the lab ended before it was done")
        server.forget(LEASH)
        os.close(LEASH)

    server.watch(LEASH, take)


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = Server()
    control = socket.socket(fileno=CONTROL)
    Orders(server, control)
    _watch_leash(server)
    server.run()


if __name__ == "__main__":
    main()
