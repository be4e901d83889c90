"""Services on the lab's network: which node gets their packets, and who has their address on the loopback.

What every node announced is written down in ``announced.json``; an announcement is carried out as the
difference to it, so that a change to one service among a thousand costs one route. The file says ``settled``
once the network is as it says; if a process was killed in between, the next announcement goes over
everything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypedDict

from hookline import net
from hookline.lab._errors import LabError
from hookline.lab._plan import Member, Plan
from hookline.lab._record import write_json
from hookline.lab._topology import BRIDGE, LOOPBACK
from hookline.model.names import Address, fabric_netns
from hookline.net import Change, Netlink


class Announcement(TypedDict):
    """A service address: the addresses of its backends, and whether they have it on their loopback."""

    backends: Iterable[str | Address]
    loopback: bool


@dataclass(frozen=True, slots=True)
class _Service:
    backends: frozenset[str]
    loopback: bool


@dataclass(slots=True)
class Announced:
    """What all nodes announce. ``owners`` has the node that gets an address's packets: the last of them."""

    nodes: dict[str, dict[str, _Service]]
    owners: dict[str, str]
    settled: bool = True

    @classmethod
    def read(cls, folder: Path) -> Announced:
        """What is written down; nothing if nothing is."""
        try:
            document = json.loads((folder / "announced.json").read_text())
        except FileNotFoundError:
            return cls({}, {})
        return cls(
            {
                node: {
                    address: _Service(frozenset(one["backends"]), one["loopback"])
                    for address, one in services.items()
                }
                for node, services in document["nodes"].items()
            },
            document["owners"],
            document["settled"],
        )

    def write(self, folder: Path) -> None:
        """Write it down."""
        nodes = {
            node: {
                address: {"backends": sorted(service.backends), "loopback": service.loopback}
                for address, service in services.items()
            }
            for node, services in self.nodes.items()
        }
        write_json(
            folder / "announced.json", {"settled": self.settled, "owners": self.owners, "nodes": nodes}
        )

    def replaced(self, node: str, services: dict[str, _Service]) -> Announced:
        """The same with another set of services of one node."""
        nodes = {**self.nodes, node: services}
        before = self.nodes.get(node, {})
        owners = dict(self.owners)
        for address in services:
            if address not in before or address not in owners:
                owners[address] = node
        for address in before.keys() - services.keys():
            if owners.get(address) == node:
                del owners[address]
                for other, theirs in nodes.items():
                    if address in theirs:
                        owners[address] = other
        return Announced(nodes, owners)

    def on_loopbacks(self) -> dict[str, set[str]]:
        """The service addresses that backends have on their loopback: by the backend's address."""
        wanted: dict[str, set[str]] = {}
        for services in self.nodes.values():
            for address, service in services.items():
                if service.loopback:
                    for backend in service.backends:
                        wanted.setdefault(backend, set()).add(address)
        return wanted


def announce(plan: Plan, folder: Path, node: str, services: Mapping[str | Address, Announcement]) -> None:
    """Have the lab's network bring these service addresses to a node, and no others that it announced before.

    Raises:
        LabError: The lab has no such node, or a member has that address.
    """
    if plan.member(f"node/{node}") is None:
        raise LabError(
            f"lab {plan.lab} has no node {node}",
            why=f"its nodes are {', '.join(member.name for member in plan.nodes)}",
        )
    taken = {address: member for member in plan.members for address in member.addresses}
    wanted: dict[str, _Service] = {}
    for text, service in services.items():
        address = ip_address(text)
        if address in taken:
            raise LabError(
                f"node {node} cannot announce {address}",
                why=f"it is the address of {taken[address].endpoint}",
                remedy="give the service an address of its own",
            )
        if address.version in plan.families:
            backends = frozenset(map(_canonical, service["backends"]))
            wanted[str(address)] = _Service(backends, service["loopback"])
    before = Announced.read(folder)
    after = before.replaced(node, wanted)
    if before.settled and (after.nodes, after.owners) == (before.nodes, before.owners):
        return
    _settle(plan, folder, before, after)


def settle_pod(plan: Plan, folder: Path, pod: Member) -> None:
    """Give a new pod the service addresses that were announced for its address."""
    wanted = Announced.read(folder).on_loopbacks()
    _put_on_loopback(pod, set(), _wanted_by(pod, wanted))


def _settle(plan: Plan, folder: Path, before: Announced, after: Announced) -> None:
    before.settled, thorough = False, not before.settled
    before.write(folder)
    with Netlink(fabric_netns(plan.lab)) as netlink:
        netlink.apply(_route_changes(plan, {} if thorough else before.owners, after.owners))
        if thorough:
            netlink.apply(_stale_routes(netlink, plan, after.owners))
    had, wanted = before.on_loopbacks(), after.on_loopbacks()
    for member in (*plan.pods, *plan.externals):
        old = _on_loopback(member) if thorough else _wanted_by(member, had)
        _put_on_loopback(member, old, _wanted_by(member, wanted))
    after.write(folder)


@functools.lru_cache(maxsize=65536)
def _canonical(address: str | Address) -> str:
    """An address in the one form that it is written down in."""
    return str(ip_address(address))


def _route_changes(plan: Plan, before: dict[str, str], after: dict[str, str]) -> Iterable[Change]:
    nodes = {node.name: node for node in plan.nodes}
    for address, owner in after.items():
        if before.get(address) != owner:
            network = ip_network(address)
            yield net.add_route(network, BRIDGE, via=nodes[owner].address(network.version))
    for address in before.keys() - after.keys():
        yield net.delete_route(ip_network(address))


def _stale_routes(netlink: Netlink, plan: Plan, owners: dict[str, str]) -> list[Change]:
    """Removal of the fabric's routes that neither the lab's members nor the services explain."""
    known = {str(address) for member in plan.members for address in member.addresses} | owners.keys()
    changes = []
    for family in (2, 10):
        for route in netlink.routes(family, net.ROUTE_PROTOCOL):
            destination = route.get_attr("RTA_DST")
            if destination and str(ip_address(destination)) not in known:
                changes.append(net.delete_route(ip_network(destination)))
    return changes


def _wanted_by(member: Member, wanted: Mapping[str, set[str]]) -> set[str]:
    mine: set[str] = set()
    for address in member.addresses:
        mine |= wanted.get(str(address), set())
    return mine


def _put_on_loopback(member: Member, before: set[str], after: set[str]) -> None:
    changes = [net.delete_address(LOOPBACK, ip_address(address)) for address in sorted(before - after)]
    changes += [net.add_address(LOOPBACK, ip_address(address)) for address in sorted(after - before)]
    if changes:
        with Netlink(member.netns) as netlink:
            netlink.apply(changes)


def _on_loopback(member: Member) -> set[str]:
    """The addresses that a member's loopback has, beside its own."""
    with Netlink(member.netns) as netlink:
        entries: list[Any] = netlink.addresses()
    addresses = {
        entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
        for entry in entries
        if entry["index"] == LOOPBACK
    }
    return addresses - {"127.0.0.1", "::1"}
