"""Interfaces: which there are, how they are addressed, which offloads they have."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import TypeAlias

from hookline.net._errors import NetworkError, network_error
from hookline.net._netlink import Netlink

InterfaceAddress: TypeAlias = IPv4Interface | IPv6Interface

_SIOCETHTOOL = 0x8946
_SIOCGIFINDEX = 0x8933
_GET_TX_CHECKSUM, _SET_TX_CHECKSUM = 0x16, 0x17
_GET_TSO = 0x1E
_GET_GRO, _SET_GRO = 0x2B, 0x2C
_IFNAMSIZ = 16


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface.

    ``kind`` is ``veth``, ``bridge``, ``loopback`` and so on, empty for a physical one. ``master`` is the
    index of the bridge or bond that it is a port of, 0 for none.
    """

    name: str
    index: int
    kind: str
    mac: str
    mtu: int
    up: bool
    master: int
    addresses: tuple[InterfaceAddress, ...]


def interfaces() -> list[Interface]:
    """All interfaces of the calling thread's network namespace, in order of their index."""
    with Netlink() as netlink:
        links, entries = netlink.links(), netlink.addresses()
    addresses: dict[int, list[InterfaceAddress]] = {}
    for entry in entries:
        address = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
        addresses.setdefault(entry["index"], []).append(ip_interface(f"{address}/{entry['prefixlen']}"))
    return sorted(
        (
            Interface(
                name=link.get_attr("IFLA_IFNAME"),
                index=link["index"],
                kind=_kind(link),
                mac=link.get_attr("IFLA_ADDRESS") or "",
                mtu=link.get_attr("IFLA_MTU") or 0,
                up=bool(link["flags"] & 1),
                master=link.get_attr("IFLA_MASTER") or 0,
                addresses=tuple(addresses.get(link["index"], ())),
            )
            for link in links
        ),
        key=lambda interface: interface.index,
    )


def link_numbers(interface: str) -> dict[str, int]:
    """An interface's own number, ``ifindex``, that of the one it hangs on (a veth's other end, which may be in another network
    namespace), ``iflink``, that namespace's id here (`id_here`; -1: this one), ``netns``, and whether an XDP program is on it,
    ``xdp``; empty where there is no such interface.
    """
    with Netlink() as netlink:
        for link in netlink.links():
            if link.get_attr("IFLA_IFNAME") == interface:
                xdp = link.get_attr("IFLA_XDP")
                mode = xdp.get_attr("IFLA_XDP_ATTACHED") if xdp is not None else None
                place = link.get_attr("IFLA_LINK_NETNSID")
                return {
                    "netns": -1 if place is None else int(place),
                    "ifindex": int(link["index"]),
                    "iflink": int(link.get_attr("IFLA_LINK") or 0),
                    "xdp": int(mode not in (None, 0, "0", "XDP_ATTACHED_NONE")),
                }
    return {}


def interface_indexes(names: Iterable[str]) -> dict[str, int]:
    """The indexes of many interfaces of the calling thread's network namespace; 0 for one that is not there."""
    found = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        for name in names:
            request = struct.pack(f"{_IFNAMSIZ}si20x", os.fsencode(name), 0)
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFINDEX, request)
            except OSError:
                found[name] = 0
                continue
            found[name] = struct.unpack_from("=i", answer, _IFNAMSIZ)[0]
    return found


def interface_index(interface: str | int) -> int:
    """The index of an interface of the calling thread's network namespace.

    Raises:
        NetworkError: There is none of that name; those that there are are named.
    """
    if isinstance(interface, int):
        return interface
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        there = ", ".join(name for _, name in socket.if_nameindex())
        raise NetworkError(
            f"there is no interface {interface}",
            why=f"here are {there}",
            remedy="name one of these",
            errno=errno.ENODEV,
        ) from None


def set_offloads(interface: str, *, gro: bool | None = None, tx_checksum: bool | None = None) -> None:
    """Switch an interface's receive aggregation or transmit checksum offload, and see that it is as asked.

    Without transmit checksum offload there is no segmentation offload either: the kernel does both in
    software before it hands a packet over, so that whatever program sees it next sees it finished.

    Args:
        interface: An interface of the calling thread's network namespace. gro: Generic receive offload; on a
        veth it also makes the driver poll (NAPI), which XDP_REDIRECT needs. tx_checksum: Transmit checksum
        offload, of all protocols.

    Raises:
        NetworkError: The interface does not exist or does not obey.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        if gro is not None:
            _ethtool(handle, interface, _SET_GRO, int(gro))
            _expect(handle, interface, _GET_GRO, gro, "generic receive offload")
        if tx_checksum is not None:
            _ethtool(handle, interface, _SET_TX_CHECKSUM, int(tx_checksum))
            _expect(handle, interface, _GET_TX_CHECKSUM, tx_checksum, "transmit checksum offload")
            if not tx_checksum:
                _expect(handle, interface, _GET_TSO, False, "TCP segmentation offload")


@dataclass(frozen=True, slots=True)
class Offloads:
    """What an interface does for the stack."""

    gro: bool
    tx_checksum: bool
    tso: bool


def offloads(interface: str) -> Offloads:
    """What an interface of the calling thread's network namespace does for the stack.

    Raises:
        NetworkError: The interface does not exist.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        return Offloads(
            gro=bool(_ethtool(handle, interface, _GET_GRO)),
            tx_checksum=bool(_ethtool(handle, interface, _GET_TX_CHECKSUM)),
            tso=bool(_ethtool(handle, interface, _GET_TSO)),
        )


def _expect(handle: socket.socket, interface: str, command: int, wanted: bool, feature: str) -> None:
    if bool(_ethtool(handle, interface, command)) != wanted:
        raise NetworkError(
            f"cannot switch {'on' if wanted else 'off'} {feature} of {interface}",
            why="the driver keeps it as it is",
            remedy=f"ethtool -k {interface} shows which features are fixed",
        )


def _ethtool(handle: socket.socket, interface: str, command: int, value: int = 0) -> int:
    request = array.array("B", struct.pack("=II", command, value))
    address, _ = request.buffer_info()
    name = os.fsencode(interface)
    if len(name) >= _IFNAMSIZ:
        raise NetworkError(f"there is no interface {interface}", why="the name is too long for one")
    try:
        fcntl.ioctl(handle, _SIOCETHTOOL, struct.pack("16sP16x", name, address))
    except OSError as error:
        raise network_error(
            f"cannot read or set features of interface {interface}", error.errno or 0
        ) from None
    return int(struct.unpack_from("=I", request, 4)[0])


def _kind(link: object) -> str:
    info = link.get_attr("IFLA_LINKINFO")  # type: ignore[attr-defined]
    kind = info.get_attr("IFLA_INFO_KIND") if info else None
    if kind:
        return str(kind)
    return "loopback" if link["flags"] & 8 else ""  # type: ignore[index]
