"""Where packets go next: the kernel's choice of a route, the uplink, neighbours kept resolved."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal, TypeAlias

from hookline.net._errors import NetworkError
from hookline.net._links import interface_index
from hookline.net._netlink import NTF_EXT_MANAGED, Address, Netlink, delete_neighbour, manage_neighbour

RouteKind: TypeAlias = Literal["local", "unicast", "unreachable"]

_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENOENT})
_LOCAL, _UNICAST = 2, 1
_MAIN_TABLE = 254
_STATES = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel would send to an address.

    ``gateway`` is None where the destination is on the interface's own link. Without a way, ``kind`` is
    ``unreachable``, ``interface`` empty and the rest None.
    """

    interface: str
    gateway: Address | None
    source: Address | None
    kind: RouteKind


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour: its state as ``ip neigh`` names it, and whether the kernel itself keeps it resolved."""

    address: Address
    interface: str
    mac: str
    state: str
    managed: bool


def route_to(address: Address) -> Route:
    """How packets to an address leave the calling thread's network namespace."""
    unreachable = Route("", None, None, "unreachable")
    with Netlink() as netlink:
        try:
            answer = netlink.route(address)
        except NetworkError as error:
            if error.errno in _NO_ROUTE:
                return unreachable
            raise
    if answer["type"] not in (_LOCAL, _UNICAST):
        return unreachable
    source = answer.get_attr("RTA_PREFSRC")
    return Route(
        interface=_name(answer.get_attr("RTA_OIF")),
        gateway=_gateway(answer),
        source=ip_address(source) if source else None,
        kind="local" if answer["type"] == _LOCAL else "unicast",
    )


def default_interface() -> str:
    """The interface of the default route of the calling thread's network namespace, IPv4's first.

    Raises:
        NetworkError: There is no default route.
    """
    with Netlink() as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            defaults = [
                (route.get_attr("RTA_PRIORITY") or 0, route.get_attr("RTA_OIF"))
                for route in netlink.routes(family)
                if route["dst_len"] == 0
                and route["table"] == _MAIN_TABLE
                and route["type"] == _UNICAST
                and route.get_attr("RTA_OIF")
            ]
            if defaults:
                return _name(min(defaults)[1])
    raise NetworkError(
        "cannot tell which interface is the uplink",
        why="there is no default route",
        remedy="name it in a NodeConfig: spec.interfaces: [{name: eth0, role: uplink}]",
    )


def keep_resolved(address: Address, interface: str | int) -> None:
    """Have the kernel keep a neighbour's link-layer address resolved, always (NTF_EXT_MANAGED).

    The kernel asks at once and again before the entry grows stale, whether or not anything is sent there. See
    ``include/uapi/linux/neighbour.h``; Linux 5.16.

    Raises:
        NetworkError: There is no such interface.
    """
    index = interface_index(interface)
    with Netlink() as netlink:
        netlink.apply([manage_neighbour(address, index)])


def forget(address: Address, interface: str | int) -> None:
    """Remove a neighbour, also one that is kept resolved; nothing happens where there is none.

    Raises:
        NetworkError: There is no such interface.
    """
    index = interface_index(interface)
    with Netlink() as netlink:
        netlink.apply([delete_neighbour(address, index)])


def neighbours() -> list[Neighbour]:
    """The neighbours that the calling thread's network namespace knows of."""
    with Netlink() as netlink:
        entries = netlink.neighbours()
    found = []
    for entry in entries:
        address = entry.get_attr("NDA_DST")
        if address is None or entry["family"] not in (socket.AF_INET, socket.AF_INET6):
            continue
        found.append(
            Neighbour(
                address=ip_address(address),
                interface=_name(entry["ifindex"]),
                mac=entry.get_attr("NDA_LLADDR") or "",
                state=_STATES.get(entry["state"], "none"),
                managed=bool((entry.get_attr("NDA_FLAGS_EXT") or 0) & NTF_EXT_MANAGED),
            )
        )
    return found


def _gateway(answer: Any) -> Address | None:
    gateway = answer.get_attr("RTA_GATEWAY")
    if gateway:
        return ip_address(gateway)
    via = answer.get_attr("RTA_VIA")  # a next hop of the other family
    return ip_address(via["addr"]) if via else None


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)
