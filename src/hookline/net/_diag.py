"""The sockets of a network namespace that have a peer, and their end: sock_diag(7).

Read raw, as `_lookup` does: pyroute2's objects take a millisecond for each of what may be thousands of sockets.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from hookline.net._errors import NetworkError

Address = IPv4Address | IPv6Address

TCP, UDP = 6, 17
_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct(
    "=4BI48s"
)  # struct inet_diag_req_v2: family, protocol, extensions, padding, states, socket
_MESSAGE = struct.Struct(
    "=4B"
)  # struct inet_diag_msg begins: family, state, timer, retransmits; then the socket
_IDENTITY = struct.Struct("!HH16s16sI8s")  # struct inet_diag_sockid: ports, addresses, interface, cookie
_ERROR = struct.Struct("=i")
_BY_FAMILY, _DESTROY = 20, 21
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_FLAG_REQUEST, _FLAG_ACK, _FLAG_DUMP = 1, 4, 0x300
_TIME_WAIT, _CLOSE, _LISTEN = 6, 7, 10
_WITH_PEER = 0xFFF & ~(1 << _TIME_WAIT | 1 << _CLOSE | 1 << _LISTEN)


class SocketName(NamedTuple):
    """A socket as the kernel names it: its family, which for addresses of IPv4 may be IPv6's, and ``struct inet_diag_sockid``."""

    family: int
    protocol: int
    identity: bytes

    @classmethod
    def of(
        cls, family: int, protocol: int, local: tuple[bytes, int], remote: tuple[bytes, int], cookie: int
    ) -> SocketName:
        """From addresses of 16 bytes, IPv4's as ::ffff:a.b.c.d, with their ports, and the socket's cookie."""
        first, second = (
            octets[12:] + bytes(12) if family == socket.AF_INET else octets for octets, _ in (local, remote)
        )
        parts = struct.pack("=II", cookie & 0xFFFFFFFF, cookie >> 32)
        return cls(family, protocol, _IDENTITY.pack(local[1], remote[1], first, second, 0, parts))


class Connected(NamedTuple):
    """A socket with a peer.

    Attributes:
        protocol: 6 or 17.
        opened: Whether its own end asked for the connection, as far as ports tell: no socket here listens on its port.
    """

    protocol: int
    local: Address
    remote: Address
    local_port: int
    remote_port: int
    opened: bool
    name: SocketName


def connected_sockets(protocols: Iterable[int] = (TCP, UDP)) -> list[Connected]:
    """The sockets of the calling thread's network namespace that have a peer.

    Raises:
        NetworkError: The kernel refuses to list them.
    """
    found = []
    with _channel() as channel:
        for protocol in protocols:
            listening: set[int] = set()
            mine = []
            for family in (socket.AF_INET, socket.AF_INET6):
                states = _WITH_PEER | (1 << _LISTEN if protocol == TCP else 0)
                for state, identity in _dump(channel, family, protocol, states):
                    local_port, remote_port, local, remote, _, _ = _IDENTITY.unpack(identity)
                    if state == _LISTEN:
                        listening.add(local_port)
                    elif remote_port:
                        name = SocketName(family, protocol, identity)
                        mine.append(
                            (_address(family, local), _address(family, remote), local_port, remote_port, name)
                        )
            found += [
                Connected(protocol, local, remote, port, other, port not in listening, name)
                for local, remote, port, other, name in mine
            ]
    return found


def destroy_sockets(sockets: Iterable[SocketName]) -> tuple[int, Counter[str]]:
    """Ends sockets of the calling thread's network namespace; their applications see ECONNABORTED.

    Returns:
        How many were ended, and how many could not be, by reason. One that ended by itself meanwhile is neither.

    Raises:
        NetworkError: There is no way to ask.
    """
    ended, left = 0, Counter[str]()
    with _channel() as channel:
        for one in sockets:
            request = _REQUEST.pack(one.family, one.protocol, 0, 0, 0xFFFFFFFF, one.identity)
            flags = _FLAG_REQUEST | _FLAG_ACK
            channel.send(_HEADER.pack(_HEADER.size + len(request), _DESTROY, flags, 0, 0) + request)
            code = next(-_ERROR.unpack_from(body)[0] for _, body in _messages(channel.recv(1 << 16)))
            if code == 0:
                ended += 1
            elif code != errno.ENOENT:
                left[os.strerror(code)] += 1
    return ended, left


def _channel() -> socket.socket:
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG)
    except OSError as error:
        raise NetworkError("sockets cannot be listed", why=error.strerror or str(error)) from None


def _dump(channel: socket.socket, family: int, protocol: int, states: int) -> Iterator[tuple[int, bytes]]:
    """State and identity of each socket."""
    request = _REQUEST.pack(family, protocol, 0, 0, states, bytes(_IDENTITY.size))
    flags = _FLAG_REQUEST | _FLAG_DUMP
    channel.send(_HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, flags, 0, 0) + request)
    while True:
        for kind, body in _messages(channel.recv(1 << 16)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -_ERROR.unpack_from(body)[0]
                if code in (errno.ENOENT, errno.EINVAL):
                    return  # this kernel has no sockets of that kind
                raise NetworkError("sockets cannot be listed", why=os.strerror(code))
            yield body[1], body[_MESSAGE.size : _MESSAGE.size + _IDENTITY.size]


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, place)
        if length < _HEADER.size:
            return
        yield kind, data[place + _HEADER.size : place + length]
        place += (length + 3) & ~3


def _address(family: int, octets: bytes) -> Address:
    if family == socket.AF_INET:
        return IPv4Address(octets[:4])
    found = IPv6Address(octets)
    return found.ipv4_mapped or found
