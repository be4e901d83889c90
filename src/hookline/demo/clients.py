"""The demo's clients: one process in a client's network namespace, many connections, everything counted.

Started as ``python -m hookline.demo.clients`` with one JSON line on standard input, `Order` as a mapping. It prints a JSON line
of `Counts` twice a second, and ends when its standard input does: it finishes what is under way and prints a last line with
``"final": true``. A connection is broken when it is reset or closed by the other side, gets another backend's name than the
first one, or waits longer than the patience for an answer. The process imports little and has no other thread, so that it
takes as much traffic as one core gives.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

PATIENCE_SECONDS = 2.0
REOPEN_SECONDS = 0.05
REPORT_SECONDS = 0.5
REQUEST = b"ping\n"
LINE_END = b"\n"


@dataclass(frozen=True, slots=True)
class Order:
    """What to do.

    Attributes:
        addresses: The service's, used in turn.
        long_lived: TCP connections that stay open until the end.
        short_lived: TCP connections at any time that are closed after `requests` requests and opened again.
        datagram_sockets: UDP sockets at any time; each is replaced after `requests` datagrams.
        pause_seconds: Between an answer and the next request on one connection.
    """

    addresses: list[str]
    tcp_port: int
    udp_port: int
    long_lived: int = 32
    short_lived: int = 32
    datagram_sockets: int = 16
    requests: int = 20
    pause_seconds: float = 0.004


@dataclass(slots=True)
class Counts:
    """What the clients have seen so far.

    Attributes:
        failed: Connections that could not be opened, by reason.
        broken: Connections that broke, by the backend that they were with.
        how: The same by how.
        answers: Requests answered, by backend; `datagrams_answered` likewise.
    """

    opened: int = 0
    open_now: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    how: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    datagrams_sent: int = 0
    datagrams_answered: Counter[str] = field(default_factory=Counter)
    datagrams_unanswered: int = 0


class Clients:
    """The loop over all sockets."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.counts = Counts()
        self.stopping = False
        self._epoll = select.epoll()
        self._flows: dict[int, Stream | Datagrams] = {}
        self._timers: list[tuple[float, int, int]] = []
        self._to_open: list[tuple[float, int, Stream | Datagrams]] = []
        self._serial = 0
        self._turn = 0

    def run(self) -> None:
        """Runs until standard input ends and everything under way is finished."""
        os.set_blocking(0, False)
        self._epoll.register(0, select.EPOLLIN)
        for number in range(self.order.long_lived + self.order.short_lived):
            Stream(self, long_lived=number < self.order.long_lived).open()
        for _ in range(self.order.datagram_sockets):
            Datagrams(self).open()
        report = time.monotonic() + REPORT_SECONDS
        while not (self.stopping and not self._flows):
            now = time.monotonic()
            due = min(queue[0][0] if queue else report for queue in (self._timers, self._to_open))
            for descriptor, events in self._epoll.poll(max(0.0, min(due, report) - now)):
                if descriptor == 0:
                    self._read_input()
                elif (flow := self._flows.get(descriptor)) is not None:
                    flow.ready(events)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, serial, descriptor = heapq.heappop(self._timers)
                flow = self._flows.get(descriptor)
                if flow is not None and flow.serial == serial:
                    flow.due()
            while self._to_open and self._to_open[0][0] <= now:
                _, _, flow = heapq.heappop(self._to_open)
                if not self.stopping:
                    flow.open()
            if now >= report:
                self.report()
                report = now + REPORT_SECONDS
        self.report(final=True)

    def report(self, *, final: bool = False) -> None:
        """Prints the counts."""
        self.counts.open_now = sum(
            isinstance(flow, Stream) and flow.connected for flow in self._flows.values()
        )
        counts = {entry.name: getattr(self.counts, entry.name) for entry in fields(self.counts)}
        print(json.dumps({**counts, "final": final}), flush=True)

    def next_address(self) -> str:
        """The service's addresses in turn."""
        self._turn += 1
        return self.order.addresses[self._turn % len(self.order.addresses)]

    def watch(self, flow: Stream | Datagrams, events: int) -> None:
        """Begins to look after a flow."""
        self._flows[flow.handle.fileno()] = flow
        self._epoll.register(flow.handle, events)

    def change(self, flow: Stream | Datagrams, events: int) -> None:
        """Waits for other events of it."""
        self._epoll.modify(flow.handle, events)

    def drop(self, flow: Stream | Datagrams) -> None:
        """Closes it."""
        if self._flows.pop(flow.handle.fileno(), None) is not None:
            self._epoll.unregister(flow.handle)
        flow.handle.close()

    def remind(self, flow: Stream | Datagrams, seconds: float) -> None:
        """Calls ``flow.due()`` after a while, unless it asks again before that."""
        self._serial += 1
        flow.serial = self._serial
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._serial, flow.handle.fileno()))

    def open_later(self, flow: Stream | Datagrams) -> None:
        """Opens a flow anew after a moment: one that fails at once must not keep the loop busy."""
        self._serial += 1
        heapq.heappush(self._to_open, (time.monotonic() + REOPEN_SECONDS, self._serial, flow))

    def _read_input(self) -> None:
        if os.read(0, 4096):
            return
        self._epoll.unregister(0)
        self.stopping = True
        for flow in list(self._flows.values()):
            flow.stop()


class Stream:
    """One TCP connection after another in one place."""

    def __init__(self, clients: Clients, *, long_lived: bool) -> None:
        self._clients = clients
        self._long_lived = long_lived
        self.serial = 0
        self.handle: socket.socket
        self.connected = False

    def open(self) -> None:
        """Opens a connection."""
        address = self._clients.next_address()
        self.handle = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        self.handle.setblocking(False)
        self.handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connected = False
        self._backend = ""
        self._waiting = False
        self._left = self._clients.order.requests
        self._text = b""
        result = self.handle.connect_ex((address, self._clients.order.tcp_port))
        if result not in (0, errno.EINPROGRESS):
            self._failed(result)
            return
        self._clients.watch(self, select.EPOLLOUT)
        self._clients.remind(self, PATIENCE_SECONDS)

    def ready(self, events: int) -> None:
        """Goes on after an event."""
        if not self.connected:
            error = self.handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._failed(error)
                return
            self.connected = True
            self._clients.counts.opened += 1
            self._clients.change(self, select.EPOLLIN)
            self._ask()
            return
        try:
            text = self.handle.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(errno.errorcode.get(error.errno or 0, "error"))
            return
        if not text:
            self._broken("closed by the other side")
            return
        self._text += text
        if self._text.endswith(LINE_END):
            self._answered(self._text.rstrip().decode(errors="replace"))

    def due(self) -> None:
        """The time of patience, or of the next request."""
        if not self.connected:
            self._failed(errno.ETIMEDOUT)
        elif self._waiting:
            self._broken("no answer")
        else:
            self._ask()

    def stop(self) -> None:
        """Ends at the next good moment."""
        if self.connected and not self._waiting:
            self._close()

    def _ask(self) -> None:
        self._waiting = True
        try:
            self.handle.send(REQUEST)
        except OSError as error:
            self._broken(errno.errorcode.get(error.errno or 0, "error"))
            return
        self._clients.remind(self, PATIENCE_SECONDS)

    def _answered(self, name: str) -> None:
        self._text = b""
        self._waiting = False
        if self._backend and name != self._backend:
            self._broken(f"answered by {name}")
            return
        self._backend = name
        self._clients.counts.answers[name] += 1
        self._left -= 1
        if self._clients.stopping or (not self._left and not self._long_lived):
            self._close()
            return
        self._clients.remind(self, self._clients.order.pause_seconds)

    def _close(self) -> None:
        self._clients.drop(self)
        self.connected = False
        if not self._clients.stopping:
            self.open()

    def _failed(self, error: int) -> None:
        self._clients.counts.failed[errno.errorcode.get(error, str(error))] += 1
        self._again()

    def _broken(self, how: str) -> None:
        self._clients.counts.broken[self._backend or "before the first answer"] += 1
        self._clients.counts.how[how] += 1
        self._again()

    def _again(self) -> None:
        self._clients.drop(self)
        self.connected = False
        self._clients.open_later(self)


class Datagrams:
    """One UDP socket after another in one place, one datagram under way at a time."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.serial = 0
        self.handle: socket.socket

    def open(self) -> None:
        """Opens a socket and sends its first datagram."""
        address = self._clients.next_address()
        self.handle = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.handle.setblocking(False)
        self.handle.connect((address, self._clients.order.udp_port))
        self._left = self._clients.order.requests
        self._clients.watch(self, select.EPOLLIN)
        self._ask()

    def ready(self, events: int) -> None:
        """Goes on after an event."""
        try:
            text = self.handle.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        self._waiting = False
        self._clients.counts.datagrams_answered[text.rstrip().decode(errors="replace")] += 1
        self._left -= 1
        if self._clients.stopping:
            self._clients.drop(self)
        elif not self._left:
            self._clients.drop(self)
            self.open()
        else:
            self._clients.remind(self, self._clients.order.pause_seconds)

    def due(self) -> None:
        """The time of patience, or of the next datagram."""
        if self._waiting:
            self._lost()
        else:
            self._ask()

    def stop(self) -> None:
        """Ends at the next good moment."""
        if not self._waiting:
            self._clients.drop(self)

    def _ask(self) -> None:
        self._waiting = True
        try:
            self.handle.send(REQUEST)
        except OSError:
            self._lost()
            return
        self._clients.counts.datagrams_sent += 1
        self._clients.remind(self, PATIENCE_SECONDS)

    def _lost(self) -> None:
        self._clients.counts.datagrams_unanswered += 1
        self._clients.drop(self)
        self._clients.open_later(self)


def main() -> None:
    """Reads the order and goes to work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo ends its clients itself
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    Clients(Order(**order)).run()


if __name__ == "__main__":
    main()
