"""Pods that the programs of sockets treat differently, and how these know them: rows of the map ``pods``.

A pod is known by the cookie of its network namespace. It has a row of its own where a `DNSCapture` takes its queries, and one for
each local redirect whose backend it is, since what takes the place of a service must still reach the service itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np

from hookline import bpf, net
from hookline.control.inventory import Inventory
from hookline.control.placement import packed
from hookline.control.pools import Pool
from hookline.control.tables import REDIRECT
from hookline.model import DNSCapture, Pod
from hookline.model.names import NodeName, pod_netns

Address = IPv4Address | IPv6Address
CAPTURE_DNS = 1
OWN_ROW = 0


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Who answers a pod's queries; None in a family refuses those that are sent in it."""

    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    port: int = 53


@dataclass(slots=True)
class Treatment:
    """What is wanted for pods of this node, by ``namespace/pod``.

    Attributes:
        captured: Those whose queries go to a resolver.
        redirects: Keys of the redirects' pools that are not for the pod, as it is their backend.
        warnings: What cannot be as it is wanted.
    """

    captured: dict[str, Resolvers] = field(default_factory=dict)
    redirects: dict[str, set[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def pods(self) -> list[str]:
        """All that have a row."""
        return sorted({*self.captured, *self.redirects})


def treatment(inventory: Inventory, pools: Iterable[Pool]) -> Treatment:
    """What captures and redirects want; of several captures of one pod the first by name counts."""
    found = Treatment()
    for reference in sorted(inventory.captures):
        capture = inventory.captures[reference]
        mine = [
            pod
            for pod in inventory.pods.get(capture.metadata.namespace, ())
            if inventory.is_here(pod.spec.node_name)
        ]
        addresses = _resolver_addresses(capture, mine)
        if not addresses:
            found.warnings.append(
                f"{reference}: no pod of this node is ready that its resolver's selector means; queries are refused"
            )
        who = _resolvers(addresses, capture.spec.resolver.port)
        for pod in mine:
            if not capture.spec.pod_selector.accepts(pod.metadata.labels):
                continue
            # The resolver itself asks whom it likes.
            if not set(pod.addresses) & set(addresses) and not _is_candidate(capture, pod):
                found.captured.setdefault(_name(pod), who)
    for pool in pools:
        if pool.service.startswith(REDIRECT):
            for target in pool.targets:
                found.redirects.setdefault(target.name, set()).add(pool.key)
    return found


def _is_candidate(capture: DNSCapture, pod: Pod) -> bool:
    selector = capture.spec.resolver.selector
    return selector is not None and pod.matches(selector)


def _resolver_addresses(capture: DNSCapture, pods: Sequence[Pod]) -> tuple[Address, ...]:
    resolver = capture.spec.resolver
    if resolver.selector is None:
        return resolver.fixed
    ready = [
        pod for pod in pods if pod.matches(resolver.selector) and pod.is_ready and not pod.is_terminating
    ]
    chosen = min(ready, key=lambda pod: pod.metadata.name, default=None)
    return chosen.addresses if chosen else ()


def _resolvers(addresses: Iterable[Address], port: int) -> Resolvers:
    by_version: dict[int, Any] = {}
    for address in addresses:
        by_version.setdefault(address.version, address)
    return Resolvers(by_version.get(4), by_version.get(6), port)


def _name(pod: Pod) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def cookies(
    name: NodeName, group: str, pods: Mapping[str, tuple[Address, ...]], warnings: list[str] | None = None
) -> dict[str, int]:
    """The cookie of each pod's network namespace, as far as it is found.

    A lab's is the one that carries the pod's name. On the host it is the one, among those of the node's processes, that has
    the pod's addresses; a pod in the host's own network namespace has none of its own and is left out.

    Args:
        name: The node.
        group: The cgroup of its processes.
        pods: Addresses by ``namespace/pod``.
        warnings: Takes what kept pods from being found.
    """
    if not pods:
        return {}
    if name.lab is not None:
        places = {pod: pod_netns(name.lab, *pod.split("/", 1)) for pod in pods}
        return {pod: _inside(place) for pod, place in places.items() if place.exists()}
    found: dict[str, int] = {}
    hidden: list[int] = []
    for place in process_namespaces(group, hidden):
        try:
            with net.inside(place):
                mine = [
                    pod
                    for pod, addresses in pods.items()
                    if pod not in found and any(map(net.has_address, addresses))
                ]
                if mine:
                    found.update(dict.fromkeys(mine, net.own_cookie()))
        except net.NetworkError:
            continue  # its last process ended meanwhile
    if hidden and warnings is not None and len(found) < len(pods):
        error = net.processes_hidden("pods are not found by their processes", len(hidden))
        warnings.append(f"{error.what}: {error.why}; {error.remedy}")
    return found


def _inside(place: Path) -> int:
    with net.inside(place):
        return net.own_cookie()


def process_namespaces(group: str, hidden: list[int]) -> Iterable[Path]:
    """One file of each network namespace of a cgroup's processes, this thread's own left out.

    Processes that do not show theirs, for want of CAP_SYS_PTRACE, are added to ``hidden``.
    """
    seen = {net.own_number()}
    for number in net.cgroups.processes(group):
        place = Path(f"/proc/{number}/ns/net")
        try:
            inode = place.stat().st_ino
        except PermissionError:
            hidden.append(number)
            continue
        except OSError:
            continue  # it ended meanwhile
        if inode not in seen:
            seen.add(inode)
            yield place


PodRows = Mapping[tuple[int, int], Resolvers | None]
"""Rows of the map ``pods`` by cookie and pool."""


def pod_rows(wanted: Treatment, known: Mapping[str, int]) -> PodRows:
    """The rows that the map must have for the pods that are known."""
    rows: dict[tuple[int, int], Resolvers | None] = {}
    for pod, cookie in known.items():
        if pod in wanted.captured:
            rows[cookie, OWN_ROW] = wanted.captured[pod]
        rows.update(dict.fromkeys(((cookie, pool) for pool in wanted.redirects.get(pod, ())), None))
    return rows


class PodTable:
    """The map ``pods``. The node's lock is held while it changes."""

    def __init__(self, table: bpf.Map) -> None:
        self._table = table

    def put(self, rows: PodRows) -> None:
        """Writes rows.

        Raises:
            bpf.MapFull: There are more than the map takes.
        """
        for (cookie, pool), resolvers in rows.items():
            self._table[{"netns": cookie, "pool": pool}] = self._value(resolvers)

    def keep_only(self, rows: PodRows) -> None:
        """Removes all others."""
        for key in self._keys() - set(rows):
            self._table.pop({"netns": key[0], "pool": key[1]}, None)

    def holds(self, rows: PodRows) -> bool:
        """Whether it has these rows and no others, each as it must be."""
        return self._keys() == set(rows) and all(
            self._table[{"netns": cookie, "pool": pool}].tobytes() == self._value(resolvers).tobytes()
            for (cookie, pool), resolvers in rows.items()
        )

    def _keys(self) -> set[tuple[int, int]]:
        keys, _ = self._table.read()
        return {(int(key["netns"]), int(key["pool"])) for key in keys}

    def _value(self, resolvers: Resolvers | None) -> Any:
        value = np.zeros((), self._table.value_dtype)
        if resolvers is None:
            return value
        value["flags"] = CAPTURE_DNS
        for place, address in enumerate((resolvers.ipv4, resolvers.ipv6)):
            if address is not None:
                entry = value["resolvers"][place]
                entry["address"]["words"] = np.frombuffer(packed(address), np.uint32)
                entry["port"] = np.uint16(resolvers.port).byteswap()
        return value
