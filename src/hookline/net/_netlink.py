"""A netlink socket that carries out many changes in one go, and the changes it can be asked for.

pyroute2 encodes and decodes the messages. The socket is our own for one reason: a lab of a hundred pods is
some thousand changes, and sending them in batches, with all acknowledgements read after, takes a tenth of the
time of one round trip each. A change that is the same in many namespaces is encoded once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeAlias

from hookline.net._errors import NetworkError, network_error
from hookline.net._namespaces import inside

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

ROUTE_PROTOCOL = 72
"""``proto`` of the routes that Hookline makes, so that ``ip route show proto 72`` lists them."""

NTF_EXT_MANAGED = 1

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x100, 0x200, 0x400, 0x300
_CAPPED, _ACK_TLVS = 0x100, 0x200
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30
_BATCH = 128
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER = 4 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """One encoded request. ``tolerated`` are the errnos that mean: as wanted already."""

    what: str
    message: bytes
    tolerated: frozenset[int] = frozenset()


class Netlink:
    """A routing netlink socket of one network namespace.

    Args:
        namespace: The namespace's file; None for the one that the calling thread is in.

    Raises:
        NetworkError: The namespace cannot be entered.
    """

    def __init__(self, namespace: Path | None = None) -> None:
        with inside(namespace):
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def apply(self, changes: Iterable[Change]) -> None:
        """Carry out changes in order. All are tried, also after one that fails.

        Raises:
            NetworkError: For the first that failed.
        """
        changes = list(changes)
        failure: NetworkError | None = None
        for start in range(0, len(changes), _BATCH):
            batch = changes[start : start + _BATCH]
            first = self._sequence + 1
            self._socket.send(b"".join(self._numbered(change.message) for change in batch))
            answered = 0
            while answered < len(batch):
                for kind, sequence, flags, body in self._receive():
                    if kind != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                        continue
                    answered += 1
                    number = -int(struct.unpack_from("=i", body)[0])
                    change = batch[sequence - first]
                    if number and number not in change.tolerated and failure is None:
                        failure = network_error(f"cannot {change.what}", number, why=_reason(flags, body))
        if failure is not None:
            raise failure

    def dump(self, kind: int, message: Any) -> list[Any]:
        """Everything of a kind: ``message`` is the request, and the class that decodes the answers."""
        return list(self._answers(_encode(message, kind, _DUMP), type(message)))

    def query(self, what: str, kind: int, message: Any) -> Any:
        """The one answer to a request.

        Raises:
            NetworkError: The kernel refused it.
        """
        for answer in self._answers(_encode(message, kind, 0), type(message), what):
            return answer
        raise NetworkError(f"cannot {what}", why="the kernel gave no answer")

    def links(self) -> list[Any]:
        """All interfaces, as pyroute2 decodes them."""
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

        return self.dump(_GETLINK, ifinfmsg())

    def addresses(self) -> list[Any]:
        """All interfaces' addresses, as pyroute2 decodes them."""
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

        return self.dump(_GETADDR, ifaddrmsg())

    def routes(self, family: int, protocol: int = 0) -> list[Any]:
        """The routes of a family, those of one ``protocol`` only if it is given, as pyroute2 decodes them."""
        from pyroute2.netlink.rtnl.rtmsg import rtmsg

        message = rtmsg()
        message["family"], message["proto"] = family, protocol
        return self.dump(_GETROUTE, message)

    def neighbours(self) -> list[Any]:
        """All neighbours, as pyroute2 decodes them."""
        from pyroute2.netlink.rtnl.ndmsg import ndmsg

        return self.dump(_GETNEIGH, ndmsg())

    def route(self, address: Address) -> Any:
        """The kernel's choice of a route to an address.

        Raises:
            NetworkError: There is none; ``errno`` says how.
        """
        from pyroute2.netlink.rtnl.rtmsg import rtmsg

        message = rtmsg()
        message["family"] = _family(address)
        message["dst_len"] = address.max_prefixlen
        message["attrs"] = [("RTA_DST", str(address))]
        return self.query(f"find a route to {address}", _GETROUTE, message)

    def _numbered(self, message: bytes) -> bytes:
        self._sequence += 1
        return message[:8] + struct.pack("=I", self._sequence) + message[12:]

    def _answers(self, message: bytes, decoder: type[Any], what: str = "read") -> Iterator[Any]:
        self._socket.send(self._numbered(message))
        wanted = self._sequence
        multipart = bool(_HEADER.unpack_from(message)[2] & _DUMP)
        while True:
            for kind, sequence, flags, body in self._receive():
                if sequence != wanted:
                    continue
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -int(struct.unpack_from("=i", body)[0])
                    raise network_error(f"cannot {what}", number, why=_reason(flags, body))
                answer = decoder(_HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body)
                answer.decode()
                yield answer
                if not multipart:
                    return

    def _receive(self) -> list[tuple[int, int, int, bytes]]:
        """The messages of one datagram: (type, sequence, flags, body)."""
        data = self._socket.recv(1 << 17)
        messages = []
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
            messages.append((kind, sequence, flags, data[position + _HEADER.size : position + length]))
            position += (length + 3) & ~3
        return messages


def add_veth(
    name: str, index: int, peer: str, peer_index: int, peer_namespace: int, *, mtu: int = 1500
) -> Change:
    """A pair of interfaces: ``name`` in the socket's namespace, ``peer`` in that of the descriptor given."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    peer_attributes = [("IFLA_IFNAME", peer), ("IFLA_NET_NS_FD", peer_namespace), ("IFLA_MTU", mtu)]
    data = {"attrs": [("VETH_INFO_PEER", {"index": peer_index, "attrs": peer_attributes})]}
    message["attrs"] = [
        ("IFLA_IFNAME", name),
        ("IFLA_MTU", mtu),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}),
    ]
    return Change(f"make the veth {name}", _encode(message, _NEWLINK, _ACK | _CREATE | _EXCL))


def add_bridge(name: str, index: int) -> Change:
    """A bridge without spanning tree and without multicast snooping: it forwards at once and everything."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    data = {"attrs": [("IFLA_BR_STP_STATE", 0), ("IFLA_BR_FORWARD_DELAY", 0), ("IFLA_BR_MCAST_SNOOPING", 0)]}
    message["attrs"] = [
        ("IFLA_IFNAME", name),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", data)]}),
    ]
    return Change(f"make the bridge {name}", _encode(message, _NEWLINK, _ACK | _CREATE | _EXCL))


@functools.lru_cache(maxsize=4096)
def set_up(index: int, *, master: int = 0) -> Change:
    """Switch an interface on, as a port of the bridge ``master`` if that is given."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    message["flags"] = message["change"] = 1  # IFF_UP
    message["attrs"] = [("IFLA_MASTER", master)] if master else []
    return Change(f"switch on interface {index}", _encode(message, _NEWLINK, _ACK))


@functools.lru_cache(maxsize=4096)
def delete_link(index: int) -> Change:
    """Remove an interface, and with a veth its other end."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    return Change(f"remove interface {index}", _encode(message, _DELLINK, _ACK), frozenset({errno.ENODEV}))


@functools.lru_cache(maxsize=16384)
def add_address(
    index: int, address: Address, prefix: int | None = None, *, link_scope: bool = False
) -> Change:
    """An address of an interface, usable at once (no duplicate address detection); /32 or /128 by default."""
    return Change(
        f"add the address {address} to interface {index}",
        _encode(_address_message(index, address, prefix, link_scope), _NEWADDR, _ACK | _CREATE | _REPLACE),
    )


@functools.lru_cache(maxsize=16384)
def delete_address(index: int, address: Address, prefix: int | None = None) -> Change:
    """Take an address from an interface."""
    return Change(
        f"remove the address {address} from interface {index}",
        _encode(_address_message(index, address, prefix, False), _DELADDR, _ACK),
        frozenset({errno.EADDRNOTAVAIL}),
    )


@functools.lru_cache(maxsize=16384)
def add_route(
    destination: Network,
    interface: int = 0,
    *,
    via: Address | None = None,
    source: Address | None = None,
) -> Change:
    """A route, in place of another to the same destination.

    Args:
        destination: Where to.
        interface: The interface's index; 0 makes the destination unreachable.
        via: The next hop, taken to be on the interface's link (``onlink``); None: the destination itself is.
        source: The address to send from.
    """
    message = _route_message(destination)
    message["proto"] = ROUTE_PROTOCOL
    message["type"] = 1 if interface else 7  # unicast, unreachable
    if interface and via is None and destination.version == 4:
        message["scope"] = 253  # link
    attributes: list[tuple[str, Any]] = list(message["attrs"])
    if interface:
        attributes.append(("RTA_OIF", interface))
    if via is not None:
        attributes.append(("RTA_GATEWAY", str(via)))
        message["flags"] = 4  # onlink
    if source is not None:
        attributes.append(("RTA_PREFSRC", str(source)))
    message["attrs"] = attributes
    return Change(f"add the route to {destination}", _encode(message, _NEWROUTE, _ACK | _CREATE | _REPLACE))


@functools.lru_cache(maxsize=16384)
def delete_route(destination: Network) -> Change:
    """Remove a route that Hookline made."""
    message = _route_message(destination)
    message["proto"] = ROUTE_PROTOCOL
    message["scope"] = 255  # nowhere: any
    return Change(
        f"remove the route to {destination}", _encode(message, _DELROUTE, _ACK), frozenset({errno.ESRCH})
    )


def manage_neighbour(address: Address, interface: int) -> Change:
    """A neighbour that the kernel itself keeps resolved (NTF_EXT_MANAGED, Linux 5.16)."""
    message = _neighbour_message(address, interface)
    message["attrs"] = [*message["attrs"], ("NDA_FLAGS_EXT", NTF_EXT_MANAGED)]
    return Change(f"keep {address} resolved", _encode(message, _NEWNEIGH, _ACK | _CREATE | _REPLACE))


def delete_neighbour(address: Address, interface: int) -> Change:
    """Forget a neighbour."""
    return Change(
        f"forget the neighbour {address}",
        _encode(_neighbour_message(address, interface), _DELNEIGH, _ACK),
        frozenset({errno.ENOENT, errno.ENODEV}),
    )


def _address_message(index: int, address: Address, prefix: int | None, link_scope: bool) -> Any:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    message = ifaddrmsg()
    message["family"] = _family(address)
    message["index"] = index
    message["prefixlen"] = address.max_prefixlen if prefix is None else prefix
    if address.version == 6:
        message["flags"] = 0x02  # nodad
    message["scope"] = 253 if link_scope or address.is_link_local else 0
    message["attrs"] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
    return message


def _route_message(destination: Network) -> Any:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message = rtmsg()
    message["family"] = _family(destination.network_address)
    message["dst_len"] = destination.prefixlen
    message["table"] = 254  # main
    message["attrs"] = [("RTA_DST", str(destination.network_address))] if destination.prefixlen else []
    return message


def _neighbour_message(address: Address, interface: int) -> Any:
    from pyroute2.netlink.rtnl.ndmsg import ndmsg

    message = ndmsg()
    message["family"] = _family(address)
    message["ifindex"] = interface
    message["attrs"] = [("NDA_DST", str(address))]
    return message


def _family(address: Address) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


def _encode(message: Any, kind: int, flags: int) -> bytes:
    message["header"]["type"] = kind
    message["header"]["flags"] = _REQUEST | flags
    message.encode()
    return bytes(message.data)


def _reason(flags: int, body: bytes) -> str:
    """The kernel's own words in an acknowledgement (NLMSGERR_ATTR_MSG), empty where it gives none."""
    if not flags & _ACK_TLVS:
        return ""
    position = 4 + (_HEADER.size if flags & _CAPPED else struct.unpack_from("=I", body, 4)[0])
    while position + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, position)
        if length < 4:
            break
        if kind & 0x3FFF == 1:
            return body[position + 4 : position + length].rstrip(b"\0").decode(errors="replace")
        position += (length + 3) & ~3
    return ""
