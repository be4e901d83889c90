"""How a backend is reached from this node: by the stack, by its layer-2 address, or by address translation.

Decided by the kernel's own routes. XDP sends only what leaves by an uplink; whatever else the node can reach (its own
addresses, pods behind their veths, a bridge) is rewritten and left to the stack, where the pod's own programs see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal

from hookline import net
from hookline.control._errors import Conflict, ControlError
from hookline.control.pools import Pool
from hookline.datapath.loadbalancer.balancer import Tunables

Address = IPv4Address | IPv6Address

BACKEND_ACTIVE = 1
BACKEND_LOCAL = 2
BACKEND_DSR = 4


def packed(address: Address) -> bytes:
    """An address as the programs keep it: 16 octets, IPv4 as ::ffff:a.b.c.d."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a backend is, and what the programs do to reach it.

    Attributes:
        how: ``unreachable`` backends get no connections.
        flags: The row's flags.
        source: The node's address towards it, packed; zeros where none is needed.
        next_hop: The neighbour whose layer-2 address must be known, with its interface; None where the stack delivers.
        note: Why it is not what the service asked for; empty where it is.
    """

    how: Literal["local", "dsr", "nat", "unreachable"]
    flags: int = 0
    source: bytes = bytes(16)
    next_hop: tuple[str, str] | None = None
    forwarded: bool = False
    note: str = ""


class Placements:
    """Places backends by this node's routes, each address once.

    Args:
        uplinks: Names of the interfaces that XDP is on.
        routes_to: The kernel's answer to "which way"; `net.routes_to`.
    """

    def __init__(
        self,
        uplinks: frozenset[str],
        routes_to: Callable[[Iterable[Address]], Mapping[Address, net.Route]] = net.routes_to,
    ) -> None:
        self._uplinks = uplinks
        self._routes_to = routes_to
        self._routes: dict[Address, net.Route] = {}

    def learn(self, addresses: Iterable[Address]) -> None:
        """Looks up many addresses at once, which is much faster than one by one."""
        unknown = [address for address in addresses if address not in self._routes]
        if unknown:
            self._routes.update(self._routes_to(unknown))

    def route(self, address: Address) -> net.Route:
        """The route to an address, remembered."""
        if address not in self._routes:
            self.learn([address])
        return self._routes[address]

    def is_own(self, address: Address) -> bool:
        """Whether the address is one of the node's own."""
        return self.route(address).kind == "local"

    def place(self, address: Address, forwarding: Literal["nat", "dsr"]) -> Placement:
        """The placement of a backend of a service with this forwarding."""
        route = self.route(address)
        if route.kind == "unreachable":
            return Placement("unreachable", note="the node has no route to it")
        if route.kind == "local":
            return Placement("local", BACKEND_ACTIVE | BACKEND_LOCAL)
        if route.interface not in self._uplinks:
            return Placement("local", BACKEND_ACTIVE | BACKEND_LOCAL, forwarded=True)
        next_hop = (str(route.gateway or address), route.interface)
        if forwarding == "dsr" and route.gateway is None:
            return Placement("dsr", BACKEND_ACTIVE | BACKEND_DSR, next_hop=next_hop, forwarded=True)
        if route.source is None:
            return Placement(
                "unreachable",
                note=f"the node has no IPv{address.version} address on {route.interface} to translate to",
            )
        return Placement(
            "nat",
            BACKEND_ACTIVE,
            packed(route.source),
            next_hop,
            forwarded=True,
            note=f"reached through {route.gateway}, so dsr cannot address it: nat"
            if forwarding == "dsr"
            else "",
        )


def refuse_nat_ports(pools: Iterable[Pool], placements: Placements, tunables: Tunables) -> None:
    """Checks that no service has one of the ports, on the node's own addresses, that nat gives to connections.

    Raises:
        Conflict: Naming the service.
    """
    low, high = tunables.nat_port_min, tunables.nat_port_max
    for pool in pools:
        for frontend in pool.frontends:
            if (
                frontend.scope == "any"
                and low <= frontend.port <= high
                and placements.is_own(frontend.address)
            ):
                raise Conflict(
                    f"{pool.service} wants {frontend}",
                    why=f"{frontend.address} is the node's own, whose ports {low} to {high} nat gives to connections",
                    remedy="choose another port, or other ports for nat: spec.nat in the NodeConfig",
                )


FORWARDING = {4: Path("/proc/sys/net/ipv4/ip_forward"), 6: Path("/proc/sys/net/ipv6/conf/all/forwarding")}


def require_forwarding(versions: set[int]) -> None:
    """Refuses to go on where one of these families is not forwarded.

    Raises:
        ControlError: Saying which.
    """
    for what in forwarding_off(versions):
        version = int(what[3])
        name = ".".join(FORWARDING[version].parts[3:])
        raise ControlError(
            what,
            why="backends that are not on the node itself cannot be reached without it",
            remedy=f"sysctl -w {name}=1",
        )


def forwarding_off(versions: set[int]) -> list[str]:
    """What is said of each family that needs forwarding and has it switched off."""
    return [
        f"IPv{version} forwarding is switched off on this node"
        for version in sorted(versions)
        if FORWARDING[version].exists() and FORWARDING[version].read_text().strip() == "0"
    ]
