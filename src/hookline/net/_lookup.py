"""Many route lookups at once: the kernel's answer for each of thousands of addresses.

The same question as `route_to`'s, RTM_GETROUTE of rtnetlink(7), asked by the hundred over one socket. pyroute2's objects take
about a millisecond for each answer, which for a service mesh's ten thousand backends is ten seconds.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from hookline.net._errors import NetworkError
from hookline.net._netlink import Address
from hookline.net._routes import Route

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_ERROR = struct.Struct("=i")
_INDEX = struct.Struct("=I")

_ADDRESS = struct.Struct("=4BI")  # struct ifaddrmsg

_REQUEST, _DUMP = 1, 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTM_GETROUTE = 26
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_VIA = 1, 4, 5, 7, 18
_UNICAST, _LOCAL = 1, 2
_AT_ONCE = 64
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENOENT})
_UNREACHABLE = Route("", None, None, "unreachable")


def routes_to(addresses: Iterable[Address]) -> dict[Address, Route]:
    """How packets to each address leave the calling thread's network namespace.

    Raises:
        NetworkError: The kernel refuses the question itself.
    """
    wanted = list(dict.fromkeys(addresses))
    names: dict[int, str] = {}
    found: dict[Address, Route] = {}
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as netlink:
        netlink.bind((0, 0))
        for start in range(0, len(wanted), _AT_ONCE):
            batch = wanted[start : start + _AT_ONCE]
            netlink.send(b"".join(_question(number, address) for number, address in enumerate(batch)))
            left = len(batch)
            while left:
                for kind, number, body in _messages(netlink.recv(1 << 16)):
                    found[batch[number]] = _answer(kind, body, names, batch[number])
                    left -= 1
    return found


def own_addresses(link_local_of: Iterable[str] = ()) -> frozenset[Address]:
    """All addresses of the calling thread's network namespace, those of the loopback interface too.

    Args:
        link_local_of: IPv6's link-local addresses are those of these interfaces only: every interface has one.

    Raises:
        NetworkError: The kernel refuses the question.
    """
    found: set[Address] = set()
    linked = set(link_local_of)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as netlink:
        netlink.bind((0, 0))
        netlink.send(
            _HEADER.pack(_HEADER.size + _ADDRESS.size, _RTM_GETADDR, _DUMP, 0, 0) + bytes(_ADDRESS.size)
        )
        while True:
            for kind, _, body in _messages(netlink.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return frozenset(found)
                if kind == _NLMSG_ERROR:
                    raise NetworkError("cannot list addresses", why=os.strerror(-_ERROR.unpack_from(body)[0]))
                values = dict(_attributes(body[_ADDRESS.size :]))
                octets = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
                if not octets:
                    continue
                address = _unpacked(octets)
                index = _ADDRESS.unpack_from(body)[4]
                if address.version == 6 and address.is_link_local and _name(index) not in linked:
                    continue
                found.add(address)


def _question(number: int, address: Address) -> bytes:
    packed = address.packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    length = _HEADER.size + _ROUTE.size + _ATTRIBUTE.size + len(packed)
    return (
        _HEADER.pack(length, _RTM_GETROUTE, _REQUEST, number, 0)
        + _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
        + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST)
        + packed
    )


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of each message."""
    place = 0
    while place < len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, place)
        yield kind, number, data[place + _HEADER.size : place + length]
        place += (length + 3) & ~3


def _answer(kind: int, body: bytes, names: dict[int, str], address: Address) -> Route:
    if kind == _NLMSG_ERROR:
        code = -_ERROR.unpack_from(body)[0]
        if code in _NO_ROUTE:
            return _UNREACHABLE
        raise NetworkError(f"cannot look up the route to {address}", why=errno.errorcode.get(code, str(code)))
    route_type = body[7]
    if route_type not in (_UNICAST, _LOCAL):
        return _UNREACHABLE
    interface = 0
    gateway: Address | None = None
    source: Address | None = None
    for attribute, value in _attributes(body[_ROUTE.size :]):
        if attribute == _RTA_OIF:
            interface = _INDEX.unpack(value)[0]
        elif attribute == _RTA_GATEWAY:
            gateway = _unpacked(value)
        elif attribute == _RTA_VIA:
            gateway = _unpacked(value[2:])  # after the family: a next hop of the other one
        elif attribute == _RTA_PREFSRC:
            source = _unpacked(value)
    if interface not in names:
        names[interface] = _name(interface)
    return Route(names[interface], gateway, source, "local" if route_type == _LOCAL else "unicast")


def _attributes(data: bytes) -> Sequence[tuple[int, bytes]]:
    found = []
    place = 0
    while place + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, place)
        if length < _ATTRIBUTE.size:
            break
        found.append((kind, data[place + _ATTRIBUTE.size : place + length]))
        place += (length + 3) & ~3
    return found


@lru_cache(maxsize=1024)
def _unpacked(value: bytes) -> IPv4Address | IPv6Address:
    """An address; thousands of answers name the same few gateways and sources."""
    return ip_address(value)


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)
