"""Many probes at once between the members of a lab: who reaches whom, on any port, over TCP, UDP and SCTP.

One process and one loop has both ends of every probe: the sockets that ask, and listeners that it opens in the targets' network
namespaces on whatever ports are asked for. So it sees both what came back and whether anything came through at all:

- ``allow``: the target answered. TCP: the handshake, and a nonce that came back; UDP: the nonce; SCTP: an INIT ACK.
- ``deny``: nothing arrived at the target, and nothing came back. A TCP target is watched by a packet socket, which sees an
  opening packet (SYN) also where its answer is lost on the way back.
- ``unanswered``: something arrived, and no answer came back. No policy asks for that.
- ``refused`` and ``unreachable``: an error came back. Nothing here denies in that way.

All is on one machine, where a packet takes microseconds: a probe that has heard nothing when the loop has been quiet for a
while is given up. Whatever arrives of it afterwards is still noticed, as long as its target is there (`Heard.late`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import resource
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from hookline.lab import _sctp
from hookline.lab._errors import LabError
from hookline.lab._inside import open_sockets
from hookline.lab._plan import Family, Member
from hookline.model.names import Address, Protocol
from hookline.net import inside

if TYPE_CHECKING:
    from hookline.lab._lab import Lab

Outcome: TypeAlias = Literal["allow", "deny", "unanswered", "refused", "unreachable"]
_Key: TypeAlias = tuple[str, int]

QUIET_S = 0.1
"""Nothing was heard for so long: nobody is on the way any more."""
_LONGEST_S = 10.0
_AT_ONCE = 1024
_FIRST_PORT, _LAST_PORT = 33000, 60999  # above node ports, below what the kernel gives out last
_OPEN_FILES = 16384
_NONCE_BYTES = 16
_BACKLOG = 4096
_CHUNK = 65536
_NO_LINGER = struct.pack("ii", 1, 0)
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_SO_ATTACH_FILTER = 26
_ETHERTYPES: dict[Family, int] = {4: 0x0800, 6: 0x86DD}
_IPV6_HEADER = 40
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EPROTO, errno.ENOPROTOOPT})
_LOST = frozenset({errno.ENOBUFS, errno.EAGAIN})

# Classic BPF over a packet from its IP header: opening packets of TCP (SYN without ACK), not later fragments.
_LDB, _LDH, _LDB_X, _LDX_HEADER, _AND, _JEQ, _JSET, _RET = 0x30, 0x28, 0x50, 0xB1, 0x54, 0x15, 0x45, 0x06
_OPENING: dict[Family, list[tuple[int, int, int, int]]] = {
    4: [
        (_LDB, 0, 0, 9),
        (_JEQ, 0, 7, socket.IPPROTO_TCP),
        (_LDH, 0, 0, 6),
        (_JSET, 5, 0, 0x1FFF),
        (_LDX_HEADER, 0, 0, 0),
        (_LDB_X, 0, 0, 13),
        (_AND, 0, 0, 0x12),
        (_JEQ, 0, 1, 0x02),
        (_RET, 0, 0, 128),
        (_RET, 0, 0, 0),
    ],
    6: [
        (_LDB, 0, 0, 6),
        (_JEQ, 0, 4, socket.IPPROTO_TCP),
        (_LDB, 0, 0, _IPV6_HEADER + 13),
        (_AND, 0, 0, 0x12),
        (_JEQ, 0, 1, 0x02),
        (_RET, 0, 0, 128),
        (_RET, 0, 0, 0),
    ],
}


@dataclass(frozen=True, slots=True)
class Question:
    """A probe from a member to another.

    Attributes:
        port: The target's, on which it is listened.
        via: The address and port that are asked where these are not the target's own: a service's, whose packets the target gets.
    """

    source: str
    target: str
    port: int
    protocol: Protocol
    family: Family
    via: tuple[Address, int] | None = None


@dataclass(slots=True)
class Heard:
    """What became of a probe.

    Attributes:
        why: The outcome in words.
        port: From which it was asked.
        late: It was given up, and then something of it arrived at the target.
    """

    outcome: Outcome
    why: str
    port: int
    late: bool = False

    @property
    def reached(self) -> bool:
        """Whether something came through to the target, early or late."""
        return self.late or self.outcome in ("allow", "unanswered")


class Prober:
    """Asks; opens listeners as they are needed, and keeps them until it is closed. Of one thread only.

    Args:
        lab: The lab, whose own servers must not have the ports that are asked for (``lab.up(serve=False)``).
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._places: dict[str, _Place] = {}
        self._flights: dict[_Key, _Flight] = {}
        self._by_nonce: dict[bytes, _Flight] = {}
        self._next_port = _FIRST_PORT
        self._word = secrets.token_bytes(_NONCE_BYTES - 8)
        self._serial = 0
        self._heard_at = 0.0
        self._waiting = 0
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < _OPEN_FILES:
            most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))

    def close(self) -> None:
        """Closes every socket."""
        for endpoint in list(self._places):
            self.forget(endpoint)
        self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, questions: Sequence[Question], *, quiet_s: float = QUIET_S) -> list[Heard]:
        """Asks all of these at once, and says in their order what became of each.

        Args:
            questions: Who asks whom.
            quiet_s: Seconds without any sign of life after which those that heard nothing are given up.

        Raises:
            LabError: A member is not there, or has no address of the family, or a port cannot be listened on.
        """
        heard: list[Heard] = []
        for begin in range(0, len(questions), _AT_ONCE):
            heard += self._ask_some(questions[begin : begin + _AT_ONCE], quiet_s)
        return heard

    def settle(self, quiet_s: float = QUIET_S) -> None:
        """Waits for what may still arrive of probes that were given up, until it has been quiet for so long."""
        self._heard_at = time.monotonic()
        self._wait(quiet_s, until_answered=False)

    def forget(self, endpoint: str) -> None:
        """Closes what belongs to a member, which is about to be removed."""
        place = self._places.pop(endpoint, None)
        if place is not None:
            place.close()

    # -- the loop

    def watch(self, handle: socket.socket, ready: Callable[[int], None], events: int = _READ) -> None:
        """Calls ``ready`` whenever a socket has one of these events."""
        self._ready[handle.fileno()] = ready
        self._epoll.register(handle.fileno(), events)

    def rewatch(self, handle: socket.socket, events: int) -> None:
        """Waits for other events of a socket."""
        self._epoll.modify(handle.fileno(), events)

    def drop(self, handle: socket.socket) -> None:
        """Closes a socket that is watched."""
        if self._ready.pop(handle.fileno(), None) is not None:
            self._epoll.unregister(handle.fileno())
        handle.close()

    def arrived(self, nonce: bytes) -> None:
        """A nonce came through to a listener."""
        flight = self._by_nonce.get(nonce)
        if flight is not None:
            self._note(flight)

    def seen(self, at: Member, protocol: str, port: int, address: Address, to_port: int) -> None:
        """A member saw an opening packet from this port to this address and port; a node sees what it forwards, too."""
        flight = self._flights.get((protocol, port))
        if flight is not None and (flight.target, flight.address, flight.question.port) == (
            at,
            address,
            to_port,
        ):
            self._note(flight)

    def answered(self, port: int, kind: _sctp.Kind, tag: int) -> None:
        """An SCTP packet that carries this tag came back to this port."""
        flight = self._flights.get(("sctp", port))
        if flight is not None and flight.tag == tag and flight.heard is None:
            if kind == "init-ack":
                flight.end("allow", "an INIT ACK came back")
            elif kind == "abort":
                flight.end("refused", "an ABORT came back")

    def ended(self) -> None:
        """A probe has its outcome."""
        self._heard_at = time.monotonic()
        self._waiting -= 1

    def _note(self, flight: _Flight) -> None:
        flight.has_arrived = True
        self._heard_at = time.monotonic()
        if flight.heard is not None and flight.heard.outcome == "deny":
            flight.heard.late = True

    def _ask_some(self, questions: Sequence[Question], quiet_s: float) -> list[Heard]:
        flights = [self._flight(question) for question in questions]
        for flight in flights:
            self.place(flight.target).listen(flight.question)
        by_source: dict[str, list[_Flight]] = {}
        for flight in flights:
            by_source.setdefault(flight.source.endpoint, []).append(flight)
        try:
            for mine in by_source.values():
                self._open(self.place(mine[0].source), mine)
            self._waiting = len(flights)
            self._heard_at = time.monotonic()
            for flight in flights:
                flight.send()
            self._heard_at = time.monotonic()
            self._wait(quiet_s, until_answered=True)
        finally:
            for flight in flights:
                flight.close()
        return [flight.result() for flight in flights]

    def _open(self, place: _Place, flights: Sequence[_Flight]) -> None:
        """Opens what asks. What goes to a service's address is of the member's cgroup too, where the node's programs are."""
        of_services = [one for one in flights if one.question.via is not None]
        wanted = [one.socket_kind for one in of_services]
        group = self._lab.cgroup(place.member.endpoint)
        opened = open_sockets(place.member.netns, group, wanted) if wanted and group else []
        for flight, handle in zip(of_services, opened, strict=bool(opened)):
            flight.open(place, handle)
        with inside(place.member.netns):
            for flight in flights:
                if not opened or flight.question.via is None:
                    flight.open(place)

    def _wait(self, quiet_s: float, *, until_answered: bool) -> None:
        end = time.monotonic() + _LONGEST_S
        while self._waiting or not until_answered:
            now = time.monotonic()
            left = min(self._heard_at + quiet_s, end) - now
            events = self._epoll.poll(max(0.0, left))
            for descriptor, what in events:
                ready = self._ready.get(descriptor)
                if ready is not None:  # else closed by an earlier event of this round
                    ready(what)
            if not events and left <= 0:
                return

    def place(self, member: Member) -> _Place:
        """A member's sockets."""
        place = self._places.get(member.endpoint)
        if place is None or place.member != member:
            self.forget(member.endpoint)
            place = self._places[member.endpoint] = _Place(self, member)
        return place

    def _flight(self, question: Question) -> _Flight:
        source, target = self._lab.member(question.source), self._lab.member(question.target)
        self._serial += 1
        nonce = self._word + self._serial.to_bytes(8, "big")
        flight = _Flight(
            self,
            question,
            source,
            target,
            _address(source, question.family),
            _address(target, question.family),
            nonce,
        )
        self._by_nonce[nonce] = flight
        return flight

    def take_port(self, flight: _Flight) -> int:
        """A port that no probe of late had, noted as this one's."""
        port = self._next_port
        self._next_port = port + 1 if port < _LAST_PORT else _FIRST_PORT
        key = (flight.question.protocol, port)
        before = self._flights.pop(key, None)
        if before is not None:
            self._by_nonce.pop(before.nonce, None)
        self._flights[key] = flight
        return port


class _Flight:
    """A probe under way."""

    __slots__ = (
        "_handle",
        "_prober",
        "address",
        "asked",
        "has_arrived",
        "heard",
        "nonce",
        "origin",
        "port",
        "question",
        "source",
        "tag",
        "target",
    )

    def __init__(
        self,
        prober: Prober,
        question: Question,
        source: Member,
        target: Member,
        origin: Address,
        address: Address,
        nonce: bytes,
    ) -> None:
        self._prober, self.question = prober, question
        self.source, self.target, self.origin, self.address = source, target, origin, address
        self.asked = question.via or (address, question.port)
        self.nonce = nonce
        self.tag = int.from_bytes(nonce[-4:], "big") | 0x80000000
        self.port = 0
        self.has_arrived = False
        self.heard: Heard | None = None
        self._handle: socket.socket | None = None

    @property
    def socket_kind(self) -> tuple[int, int]:
        """Family and type of the socket that asks."""
        kind = socket.SOCK_STREAM if self.question.protocol == "tcp" else socket.SOCK_DGRAM
        return _domain(self.question.family), kind

    def open(self, place: _Place, handle: socket.socket | None = None) -> None:
        """Opens what asks, in the source's network namespace, unless it is given; nothing is sent yet."""
        protocol = self.question.protocol
        if protocol == "sctp":
            place.raw(self.question.family)
            self.port = self._prober.take_port(self)
            return
        handle = handle if handle is not None else socket.socket(*self.socket_kind)
        self._handle = handle
        handle.setblocking(False)
        if protocol == "tcp":
            # A reset at the end: no connection lingers, however many probes there are.
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            self.port = self._prober.take_port(self)
            try:
                handle.bind((str(self.origin), self.port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # a listener has it
                    raise LabError(
                        f"{self.source.endpoint} cannot ask from {self.origin}",
                        why=error.strerror or str(error),
                    ) from None

    def send(self) -> None:
        """Sends the first packet."""
        handle = self._handle
        if handle is None:
            self._send_init()
            return
        try:
            handle.connect((str(self.asked[0]), self.asked[1]))
            if self.question.protocol == "udp":
                handle.send(self.nonce)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error.errno or 0)
            return
        self._prober.watch(handle, self._take, _WRITE if self.question.protocol == "tcp" else _READ)

    def _send_init(self) -> None:
        handle = self._prober.place(self.source).raw(self.question.family)
        try:
            handle.sendto(
                _sctp.init(self.port, self.asked[1], self.tag),
                (str(self.asked[0]), 0),
            )
        except OSError as error:
            self._failed(error.errno or 0)

    def _take(self, events: int) -> None:
        handle = self._handle
        if handle is None or self.heard is not None:
            return
        try:
            number = handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._failed(number)
                return
            if events & _WRITE and self.question.protocol == "tcp":
                handle.send(self.nonce)
                self._prober.rewatch(handle, _READ)
                return
            data = handle.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(error.errno or 0)
            return
        if data == self.nonce:
            self.end("allow", "the nonce came back")
        else:
            self.end("unanswered", f"what came back was not what was sent: {len(data)} octets")

    def _failed(self, number: int) -> None:
        if number in _LOST:
            return
        text = errno.errorcode.get(number, str(number))
        self.end("refused" if number in _REFUSED else "unreachable", f"the kernel said {text}")

    def end(self, outcome: Outcome, why: str) -> None:
        """Notes the outcome."""
        if self.heard is None:
            self.heard = Heard(outcome, why, self.port)
            self._prober.ended()
        self.close()

    def close(self) -> None:
        """Sends no more; what arrives is still noticed."""
        if self._handle is not None:
            self._prober.drop(self._handle)
            self._handle = None

    def result(self) -> Heard:
        """What became of it, now that the waiting is over."""
        if self.heard is None:
            self.heard = (
                Heard("unanswered", "something arrived, and no answer came back", self.port)
                if self.has_arrived
                else Heard("deny", "nothing arrived", self.port)
            )
        return self.heard


class _Place:
    """A member's sockets: listeners on its ports, packet sockets that see what arrives, raw sockets for SCTP."""

    def __init__(self, prober: Prober, member: Member) -> None:
        self.member = member
        self._prober = prober
        self._listeners: dict[tuple[int, Protocol, Family], socket.socket] = {}
        self._associations: set[tuple[int, Family]] = set()
        self._taps: dict[Family, socket.socket] = {}
        self._raw: dict[Family, socket.socket] = {}
        self._connections: set[socket.socket] = set()

    def listen(self, question: Question) -> None:
        """Listens on the port that a question is for, where nobody does yet."""
        port, protocol, family = question.port, question.protocol, question.family
        if protocol == "sctp":
            with inside(self.member.netns) if family not in self._raw else contextlib.nullcontext():
                self.raw(family)
            self._associations.add((port, family))
            return
        if (port, protocol, family) in self._listeners:
            return
        with inside(self.member.netns):
            if protocol == "tcp" and family not in self._taps:
                self._tap(family)
            self._listeners[port, protocol, family] = self._open_listener(port, protocol, family)

    def raw(self, family: Family) -> socket.socket:
        """The raw socket of SCTP, opened at its first use; the thread is in the member's network namespace then."""
        handle = self._raw.get(family)
        if handle is None:
            handle = socket.socket(_domain(family), socket.SOCK_RAW, _sctp.PROTOCOL)
            handle.setblocking(False)
            handle.bind((str(_address(self.member, family)), 0))
            self._raw[family] = handle
            self._prober.watch(handle, lambda events: self._take_raw(family))
        return handle

    def close(self) -> None:
        """Closes everything."""
        handles = (
            *self._listeners.values(),
            *self._taps.values(),
            *self._raw.values(),
            *self._connections,
        )
        for handle in handles:
            self._prober.drop(handle)

    def _tap(self, family: Family) -> None:
        handle = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETHERTYPES[family]))
        handle.setblocking(False)
        _attach_filter(handle, _OPENING[family])
        for _ in _received(handle):
            pass  # what came before the filter was there
        self._taps[family] = handle
        self._prober.watch(handle, lambda events: self._take_opening(family))

    def _take_opening(self, family: Family) -> None:
        for data in _datagrams(self._taps[family]):
            if family == 4:
                at, to = (data[0] & 15) * 4, ip_address(data[16:20])
            else:
                at, to = _IPV6_HEADER, ip_address(data[24:40])
            source, destination = struct.unpack_from("!HH", data, at)
            self._prober.seen(self.member, "tcp", source, to, destination)

    def _take_raw(self, family: Family) -> None:
        handle = self._raw[family]
        for data, peer in _received(handle):
            body = data[(data[0] & 15) * 4 :] if family == 4 else data
            packet = _sctp.read(body)
            if packet is None:
                continue
            if packet.kind != "init":
                self._prober.answered(packet.destination, packet.kind, packet.verification)
                continue
            address = _address(self.member, family)
            self._prober.seen(self.member, "sctp", packet.source, address, packet.destination)
            listening = (packet.destination, family) in self._associations
            with contextlib.suppress(OSError):
                handle.sendto(_sctp.answer(packet, listening=listening), (peer[0], 0))

    def _open_listener(self, port: int, protocol: Protocol, family: Family) -> socket.socket:
        handle = socket.socket(
            _domain(family), socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        )
        try:
            handle.setblocking(False)
            if family == 6:
                handle.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            handle.bind((str(_address(self.member, family)), port))
            if protocol == "tcp":
                handle.listen(_BACKLOG)
                self._prober.watch(handle, lambda events: self._accept(handle))
            else:
                self._prober.watch(handle, lambda events: self._echo_datagrams(handle))
        except OSError as error:
            handle.close()
            raise LabError(
                f"{self.member.endpoint} cannot listen on {port}/{protocol}",
                why=error.strerror or str(error),
            ) from None
        return handle

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                handle, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise LabError(
                        "no more files can be open", why=error.strerror or "", remedy="raise ulimit -n"
                    ) from None
                continue  # it ended before it was taken
            handle.setblocking(False)
            self._connections.add(handle)
            self._prober.watch(handle, self._echo(handle))

    def _echo(self, handle: socket.socket) -> Callable[[int], None]:
        def take(events: int) -> None:
            try:
                data = handle.recv(_CHUNK)
                if data:
                    self._prober.arrived(data)
                    handle.send(data)
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
            self._connections.discard(handle)
            self._prober.drop(handle)

        return take

    def _echo_datagrams(self, handle: socket.socket) -> None:
        for data, peer in _received(handle):
            self._prober.arrived(data)
            with contextlib.suppress(OSError):
                handle.sendto(data, peer)


def _address(member: Member, family: Family) -> Address:
    address = member.address(family)
    if address is None:
        raise LabError(f"{member.endpoint} has no IPv{family} address")
    return address


def _domain(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family == 4 else socket.AF_INET6


def _received(handle: socket.socket) -> Iterator[tuple[bytes, Any]]:
    while True:
        try:
            yield handle.recvfrom(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            continue  # an ICMP error for an earlier answer


def _datagrams(handle: socket.socket) -> Iterator[bytes]:
    for data, _ in _received(handle):
        yield data


def _attach_filter(handle: socket.socket, instructions: Iterable[tuple[int, int, int, int]]) -> None:
    """Attaches a program of classic BPF (struct sock_fprog, include/uapi/linux/filter.h)."""
    code = b"".join(struct.pack("HBBI", *one) for one in instructions)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HL", len(code) // 8, ctypes.addressof(held))
    handle.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
