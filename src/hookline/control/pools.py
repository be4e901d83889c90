"""From resources to pools: which backends stand behind which addresses and ports.

Pure: what the documents say, without the kernel. A pool is one port of one service in one address family; all of the service's
addresses of that family share its backends and its table. A `VirtualService` names backends by address or selects pods of its
namespace; a `Service` has those of its EndpointSlices, or, where no slice names it, the pods that it selects.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from hookline.control._errors import Conflict
from hookline.datapath.loadbalancer import maglev
from hookline.model import EndpointSlice, ExternalHost, HealthCheck, Pod, Resource, Service, VirtualService

Address = IPv4Address | IPv6Address
Protocol = Literal["TCP", "UDP"]
State = Literal["starting", "active", "draining", "down"]
Scope = Literal["any", "inside"]
BALANCED = ("TCP", "UDP")


@dataclass(frozen=True, slots=True)
class Target:
    """One backend.

    Attributes:
        weight: As the documents have it; 0 takes no new connections.
        name: The pod's or external host's that has the address, else the address.
        state: Where it is in its life: only ``starting`` and ``active`` ones take new connections.
        share: Percent of its weight that it has while it is ``starting``.
    """

    address: Address
    port: int
    weight: int
    name: str
    state: State = "active"
    share: int = 100

    @property
    def identity(self) -> bytes:
        """What stays the same as long as it is the same backend, on every node: the hash ring's key."""
        return b"%b/%d" % (self.address.packed, self.port)

    @property
    def effective_weight(self) -> int:
        """The weight with which it takes new connections now; 0 where it takes none."""
        if self.state == "active":
            return self.weight
        if self.state == "starting" and self.weight and self.share:
            return max(1, self.weight * self.share // 100)
        return 0


@dataclass(frozen=True, slots=True)
class Frontend:
    """What clients connect to. The scope says which: all, or only the sockets of this node and its pods."""

    address: Address
    port: int
    protocol: Protocol
    scope: Scope = "any"

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}/{self.protocol.lower()}"


@dataclass(frozen=True, slots=True)
class Pool:
    """The backends of one port of one service in one family, and the frontends that share them.

    Attributes:
        service: The object's reference, ``VirtualService/default/orders``.
        port: The port's name, or its number.
        frontends: At least one, all of one scope.
        targets: Each once.
        table_size: Slots of its table, a prime; for ``modulo`` what the weights need; 0 without active targets.
        affinity_seconds: How long a silent client keeps its backend; 0 where each connection is placed anew.
        drain_seconds: How long a backend that leaves keeps its connections; 0 ends them at once.
        health_check: How backends are asked whether they are well; None: nobody asks.
        slow_start_seconds: How long the share of a backend grows that begins to take connections.
        all_down: What becomes of connections where every backend is down.
    """

    service: str
    port: str
    version: Literal[4, 6]
    protocol: Protocol
    frontends: tuple[Frontend, ...]
    targets: tuple[Target, ...]
    forwarding: Literal["nat", "dsr"]
    algorithm: Literal["maglev", "modulo"]
    table_size: int
    affinity_seconds: int = 0
    drain_seconds: float = 0
    health_check: HealthCheck | None = None
    slow_start_seconds: float = 0
    all_down: Literal["failOpen", "reset"] = "reset"
    key: int = field(init=False)

    def __post_init__(self) -> None:
        text = f"{self.service}\0{self.port}\0{self.version}\0{self.protocol}"
        if self.scope != "any":
            text += f"\0{self.scope}"
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"pool").digest()
        # Never 0, which a row that no pool owns has.
        object.__setattr__(self, "key", int.from_bytes(digest, "little") | 1)

    @property
    def active(self) -> tuple[Target, ...]:
        """The targets that take new connections."""
        return tuple(target for target in self.targets if target.effective_weight)

    @property
    def scope(self) -> Scope:
        """Who the pool is for."""
        return self.frontends[0].scope


@dataclass(slots=True)
class Inventory:
    """What services refer to: pods by namespace, slices by the service that they belong to, names by address."""

    pods: Mapping[str, list[Pod]]
    slices: Mapping[str, list[EndpointSlice]]
    names: Mapping[Address, str]

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> Inventory:
        """Sorts resources into an inventory."""
        pods: defaultdict[str, list[Pod]] = defaultdict(list)
        slices: defaultdict[str, list[EndpointSlice]] = defaultdict(list)
        names: dict[Address, str] = {}
        for resource in resources:
            if isinstance(resource, Pod):
                if resource.metadata.deletion_timestamp is None and resource.status.phase not in (
                    "Succeeded",
                    "Failed",
                ):
                    pods[resource.metadata.namespace].append(resource)
                    names.update(dict.fromkeys(resource.addresses, _pod_name(resource)))
            elif isinstance(resource, ExternalHost):
                names.update(dict.fromkeys(resource.addresses, f"external/{resource.metadata.name}"))
            elif isinstance(resource, EndpointSlice) and resource.service_reference:
                slices[resource.service_reference].append(resource)
        return cls(pods, slices, names)

    def name_of(self, address: Address) -> str:
        """The name of who has the address, or the address itself."""
        return self.names.get(address) or str(address)

    def selected(self, namespace: str, selector: Mapping[str, str]) -> Iterator[Pod]:
        """The namespace's pods that have all of the labels."""
        wanted = selector.items()
        for pod in self.pods.get(namespace, ()):
            if wanted <= pod.metadata.labels.items():
                yield pod


def compile_service(service: VirtualService | Service, inventory: Inventory) -> tuple[Pool, ...]:
    """The pools of one service, in the order of its ports, IPv4 before IPv6."""
    if isinstance(service, Service):
        if service.is_headless or not service.addresses:
            return ()
        return tuple(_service_pools(service, inventory))
    return tuple(_virtual_service_pools(service, inventory))


def _pod_name(pod: Pod) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def _virtual_service_pools(service: VirtualService, inventory: Inventory) -> Iterator[Pool]:
    spec = service.spec
    namespace = service.metadata.namespace
    for port in spec.ports:
        found: list[Target] = []
        for backend in spec.backends:
            if backend.address is not None:
                number = backend.port if backend.port is not None else port.target
                if isinstance(number, int):
                    found.append(
                        Target(backend.address, number, backend.weight, inventory.name_of(backend.address))
                    )
                continue
            for pod in inventory.selected(namespace, backend.selector or {}):
                target = backend.port or pod.port_number(port.target, port.protocol)
                if target is not None:
                    found.extend(Target(a, target, backend.weight, _pod_name(pod)) for a in pod.addresses)
        yield from _pools_by_family(
            service.reference,
            port.name or str(port.port),
            service.addresses,
            port.port,
            port.protocol,
            found,
            spec.forwarding,
            spec.algorithm,
            spec.table_size,
        )


def _service_pools(service: Service, inventory: Inventory) -> Iterator[Pool]:
    slices = inventory.slices.get(service.reference, [])
    namespace = service.metadata.namespace
    for port in service.spec.ports:
        if port.protocol == "SCTP":
            continue
        found: list[Target] = []
        for piece in slices:
            for number in (
                entry.port
                for entry in piece.ports
                if (entry.name or "") == port.name and (entry.protocol or "TCP") == port.protocol
            ):
                if number is None:
                    continue
                for endpoint in piece.endpoints:
                    reference = endpoint.target_ref
                    found.extend(
                        Target(
                            address,
                            number,
                            100 if endpoint.is_ready else 0,
                            f"{reference.namespace or namespace}/{reference.name}"
                            if reference and reference.name
                            else inventory.name_of(address),
                        )
                        for address in endpoint.ips[:1]
                    )
        if not slices and service.spec.selector:
            for pod in inventory.selected(namespace, service.spec.selector):
                target = pod.port_number(port.target, port.protocol)
                if target is not None:
                    found.extend(Target(a, target, 100, _pod_name(pod)) for a in pod.addresses)
        yield from _pools_by_family(
            service.reference,
            port.name or str(port.port),
            service.addresses,
            port.port,
            port.protocol,
            found,
            "nat",
            "maglev",
            None,
        )


def _pools_by_family(
    service: str,
    port_name: str,
    addresses: Iterable[Address],
    port: int,
    protocol: Protocol,
    found: list[Target],
    forwarding: Literal["nat", "dsr"],
    algorithm: Literal["maglev", "modulo"],
    wanted_size: int | None,
) -> Iterator[Pool]:
    addresses = tuple(addresses)
    versions: tuple[Literal[4, 6], ...] = (4, 6)
    for version in versions:
        frontends = tuple(Frontend(a, port, protocol) for a in addresses if a.version == version)
        if not frontends:
            continue
        unique: dict[tuple[Address, int], Target] = {}
        for target in found:
            if target.address.version == version:
                unique.setdefault((target.address, target.port), target)
        weights = [weight for target in unique.values() if (weight := target.effective_weight)]
        size = 0
        if weights and algorithm == "modulo":
            size = _modulo_size(weights, service)
        elif weights:
            size = wanted_size or maglev.table_size(len(weights))
            least = maglev.table_size(len(weights))
            if size < least:
                raise Conflict(
                    f"{service}: tableSize {size} is too small for {len(weights)} IPv{version} backends on port {port_name}",
                    why=f"evenness needs {maglev.SLOTS_PER_BACKEND} slots for each, up to {maglev.LARGEST_TABLE} in all",
                    remedy=f"leave tableSize out, or make it at least {least}",
                )
            if len(weights) > size:
                raise Conflict(
                    f"{service} has {len(weights)} IPv{version} backends on port {port_name}",
                    why=f"a table of {size} slots has room for that many only",
                    remedy="raise tableSize, up to 65537" if wanted_size else "split the service",
                )
        yield Pool(
            service,
            port_name,
            version,
            protocol,
            frontends,
            tuple(unique.values()),
            forwarding,
            algorithm,
            size,
        )


def _modulo_size(weights: list[int], service: str) -> int:
    try:
        return len(maglev.modulo(weights))
    except ValueError as error:
        raise Conflict(f"{service}: algorithm modulo", why=str(error)) from None


def refuse_duplicates(pools: Iterable[Pool]) -> None:
    """Checks that no two services want the same address, port and protocol.

    Raises:
        Conflict: Naming both.
    """
    owners: dict[Frontend, str] = {}
    for pool in pools:
        for frontend in pool.frontends:
            first = owners.setdefault(frontend, pool.service)
            if first != pool.service:
                raise Conflict(
                    f"{frontend} is wanted twice",
                    why=f"{first} and {pool.service} both have it",
                    remedy="give one of them another address or port",
                )
