"""From resources to pools: what a service's documents mean on this node.

Pure: what the documents say, without the kernel. A `VirtualService` names backends by address or selects pods of its namespace;
a `Service` has those of its EndpointSlices, or, where no slice names it, the pods that it selects.

A Service has up to two pools for each port and family. The *cluster* pool has the backends of all nodes, the *local* pool those
of this one. Which of them an address has is said by the Service's policies, as kube-proxy reads them:

| address | clients outside, and all where nothing else is said | clients of this node |
| --- | --- | --- |
| cluster IP | internalTrafficPolicy | the same |
| external IP, load balancer's IP, node port on this node's addresses | externalTrafficPolicy | cluster |
| node port on other nodes' addresses, and on loopback (the host) | not this node's to answer | cluster |

`docs/services.md` has it field by field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from hookline.control._errors import Conflict
from hookline.control.inventory import Inventory
from hookline.control.pools import Address, Frontend, Pool, Protocol, Reach, State, Target
from hookline.datapath.loadbalancer import maglev
from hookline.model import (
    Endpoint,
    LocalRedirectPolicy,
    Pod,
    Service,
    ServicePort,
    TrafficSettings,
    VirtualService,
)

LOOPBACK: tuple[Address, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
WEIGHT = 100
"""What every backend weighs that is not given a weight."""

DEFAULTS = TrafficSettings()


def compile_service(service: VirtualService | Service, inventory: Inventory) -> tuple[Pool, ...]:
    """The pools of one service, in the order of its ports, IPv4 before IPv6.

    Raises:
        Conflict: Its table cannot be made as it asks, or two policies are for it.
    """
    if isinstance(service, Service):
        return () if service.is_headless else tuple(_service_pools(service, inventory))
    return tuple(_virtual_service_pools(service, inventory))


def state_of(*, ready: bool, serving: bool, terminating: bool) -> State:
    """Where an endpoint is in its life, by its conditions.

    | ready | serving | terminating | state |
    | --- | --- | --- | --- |
    | yes | any | any | active |
    | no | yes | yes | draining |
    | no | yes | no | down |
    | no | no | any | down |
    """
    if ready:
        return "active"
    return "draining" if serving and terminating else "down"


# -- VirtualService


def _virtual_service_pools(service: VirtualService, inventory: Inventory) -> Iterator[Pool]:
    spec = service.spec
    namespace = service.metadata.namespace
    for port in spec.ports:
        found: list[Target] = []
        for backend in spec.backends:
            if backend.address is not None:
                number = backend.port if backend.port is not None else port.target
                if isinstance(number, int):
                    name = inventory.name_of(backend.address)
                    found.append(Target(backend.address, number, backend.weight, name))
                continue
            for pod in inventory.selected(namespace, backend.selector or {}):
                target = backend.port or pod.port_number(port.target, port.protocol)
                if target is not None:
                    found.extend(
                        Target(a, target, backend.weight, _pod_name(pod), _pod_state(pod))
                        for a in pod.addresses
                    )
        frontends = [Frontend(address, port.port, port.protocol) for address in service.addresses]
        settings = _Settings(
            spec,
            spec.session_affinity.seconds if spec.session_affinity else 0,
            spec.forwarding,
            spec.table_size,
        )
        yield from _by_family(
            service.reference,
            port.name or str(port.port),
            port.protocol,
            frontends,
            _in_use(list(map(_rested, found))),
            settings,
        )


def _pod_name(pod: Pod) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def _pod_state(pod: Pod, *, ready_anyway: bool = False) -> State:
    # As the EndpointSlice controller makes conditions of a pod.
    ready = pod.is_ready
    return state_of(
        ready=(ready and not pod.is_terminating) or ready_anyway,
        serving=ready,
        terminating=pod.is_terminating,
    )


def _rested(target: Target) -> Target:
    """A backend that the user gave no weight any more drains."""
    resting = target.weight == 0 and target.state == "active"
    return replace(target, state="draining") if resting else target


def _in_use(found: Sequence[Target]) -> Sequence[Target]:
    """The backends, those that are going away in use again where no other is left in their family."""
    left = {target.address.version for target in found if target.state == "active" and target.weight}
    return [
        replace(target, state="active")
        if target.state == "draining" and target.weight and target.address.version not in left
        else target
        for target in found
    ]


# -- Service


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An endpoint of a service's port: a backend, and for whose clients it is."""

    target: Target
    is_local: bool
    zones: frozenset[str]
    nodes: frozenset[str]


def _service_pools(service: Service, inventory: Inventory) -> Iterator[Pool]:
    spec = service.spec
    policies = inventory.policies.get(service.reference, ())
    if len(policies) > 1:
        raise Conflict(
            f"{service.reference} has two policies",
            why=f"{policies[0].reference} and {policies[1].reference} are both for it",
            remedy="remove one of them",
        )
    policy = policies[0].spec if policies else DEFAULTS
    affinity = policy.session_affinity.seconds if policy.session_affinity else service.affinity_seconds
    settings = _Settings(policy, affinity)
    for port in spec.ports:
        protocol = port.protocol
        if protocol == "SCTP":
            continue
        frontends = _service_frontends(service, port, protocol, inventory)
        if not frontends:
            continue
        candidates = list(_candidates(service, port, inventory))
        reaches: tuple[Reach, ...] = ("cluster", "local")
        for reach in reaches:
            mine = [frontend for frontend, wanted in frontends.items() if wanted == reach]
            if not mine:
                continue
            targets = _cluster(candidates, inventory) if reach == "cluster" else _local(candidates)
            yield from _by_family(
                service.reference, port.name or str(port.port), protocol, mine, targets, settings, reach
            )


def _service_frontends(
    service: Service, port: ServicePort, protocol: Protocol, inventory: Inventory
) -> dict[Frontend, Reach]:
    """Every address on which a port is reached, and which of its pools answers there."""
    spec = service.spec
    internal: Reach = "local" if spec.internal_traffic_policy == "Local" else "cluster"
    external: Reach = "local" if spec.external_traffic_policy == "Local" else "cluster"
    found: dict[Frontend, Reach] = {}

    def add(address: Address, number: int, reach: Reach, inside: Reach | None = None) -> None:
        if (
            found.setdefault(Frontend(address, number, protocol), reach) == reach
            and (inside or reach) != reach
        ):
            found.setdefault(Frontend(address, number, protocol, "inside"), inside or reach)

    for address in service.cluster_addresses:
        add(address, port.port, internal)
    cluster = frozenset(service.cluster_addresses)
    for address in service.outside_addresses:
        if address not in cluster:
            add(address, port.port, external, "cluster")
    if service.has_node_ports and port.node_port:
        families = _families(service)
        for address in inventory.own_addresses:
            if address.version in families:
                add(address, port.node_port, external, "cluster")
        elsewhere = (*inventory.other_addresses, *(LOOPBACK if inventory.here.has_loopback else ()))
        for address in elsewhere:
            if address.version in families:
                found.setdefault(Frontend(address, port.node_port, protocol, "inside"), "cluster")
    return found


def _families(service: Service) -> frozenset[int]:
    """The families in which a service has node ports."""
    if service.spec.ip_families:
        return frozenset(4 if family == "IPv4" else 6 for family in service.spec.ip_families)
    return frozenset(address.version for address in service.addresses) or frozenset((4, 6))


def _candidates(service: Service, port: ServicePort, inventory: Inventory) -> Iterator[_Candidate]:
    slices = inventory.slices.get(service.reference, ())
    for piece in slices:
        numbers = [
            entry.port
            for entry in piece.ports
            if (entry.name or "") == port.name and (entry.protocol or "TCP") == port.protocol
        ]
        for number in numbers:
            if number is not None:
                for endpoint in piece.endpoints:
                    yield from _of_endpoint(service, endpoint, number, inventory)
    if slices or not service.spec.selector:
        return
    for pod in inventory.selected(service.metadata.namespace, service.spec.selector):
        target = pod.port_number(port.target, port.protocol)
        if target is None:
            continue
        state = _pod_state(pod, ready_anyway=service.spec.publish_not_ready_addresses)
        node = pod.spec.node_name
        zones, nodes = _spread(service, node, inventory.zone_of(node))
        for address in pod.addresses:
            yield _Candidate(
                Target(address, target, WEIGHT, _pod_name(pod), state), inventory.is_here(node), zones, nodes
            )


def _of_endpoint(
    service: Service, endpoint: Endpoint, number: int, inventory: Inventory
) -> Iterator[_Candidate]:
    node = endpoint.node_name or ""
    zones: frozenset[str]
    if endpoint.hints is not None and (endpoint.hints.for_zones or endpoint.hints.for_nodes):
        zones = frozenset(hint.name for hint in endpoint.hints.for_zones)
        nodes = frozenset(hint.name for hint in endpoint.hints.for_nodes)
    else:
        zones, nodes = _spread(service, node, endpoint.zone or inventory.zone_of(node))
    state = state_of(
        ready=endpoint.is_ready, serving=endpoint.is_serving, terminating=endpoint.is_terminating
    )
    reference = endpoint.target_ref
    for address in endpoint.ips[:1]:  # Kubernetes gives no meaning to the others
        name = (
            f"{reference.namespace or service.metadata.namespace}/{reference.name}"
            if reference and reference.name
            else inventory.name_of(address)
        )
        yield _Candidate(Target(address, number, WEIGHT, name, state), inventory.is_here(node), zones, nodes)


NONE: frozenset[str] = frozenset()


def _spread(service: Service, node: str, zone: str) -> tuple[frozenset[str], frozenset[str]]:
    """The hints that Kubernetes' EndpointSlice controller would give an endpoint: zones, and nodes."""
    distribution = service.spec.traffic_distribution
    if distribution is None:
        return NONE, NONE
    zones = frozenset((zone,)) if zone else NONE
    nodes = frozenset((node,)) if node and distribution == "PreferSameNode" else NONE
    return zones, nodes


def _cluster(candidates: Sequence[_Candidate], inventory: Inventory) -> Sequence[Target]:
    """The backends of all nodes. Those for other zones or nodes keep their connections and get no new ones.

    Hints are obeyed as kube-proxy obeys them (CategorizeEndpoints in its pkg/proxy/topology.go): only where every ready endpoint
    has one and at least one is for this node, or else this zone; otherwise all are used. They are of no account where nothing
    is ready and endpoints that are going away must do.
    """
    found: list[Target] = []
    for version in (4, 6):
        mine = [one for one in candidates if one.target.address.version == version]
        ready = [one for one in mine if one.target.state == "active"]
        preferred = ready
        near = [one for one in ready if one.nodes & inventory.here.names]
        if near and all(one.nodes for one in ready):
            preferred = near
        elif all(one.zones for one in ready):
            preferred = [one for one in ready if inventory.zone in one.zones] or ready
        chosen = {id(one) for one in preferred}
        found.extend(
            replace(one.target, weight=0)
            if one.target.state == "active" and id(one) not in chosen
            else one.target
            for one in mine
        )
    return _in_use(found)


def _local(candidates: Sequence[_Candidate]) -> Sequence[Target]:
    """The backends of this node."""
    return _in_use([one.target for one in candidates if one.is_local])


# -- LocalRedirectPolicy


def compile_redirect(policy: LocalRedirectPolicy, inventory: Inventory) -> tuple[Pool, ...]:
    """The pools of a local redirect: rows for this node's own sockets alone; none where none of its pods is ready here."""
    spec = policy.spec
    pods = [
        pod
        for pod in inventory.pods.get(policy.metadata.namespace, ())
        if inventory.is_here(pod.spec.node_name)
        and spec.redirect_backend.local_endpoint_selector.accepts(pod.metadata.labels)
    ]
    pools: list[Pool] = []
    for name, number, protocol, addresses in _redirected(policy, inventory):
        target = spec.backend_port(name)
        if target is None or target.protocol != protocol:
            continue
        found = [
            Target(address, target.port, WEIGHT, _pod_name(pod), _pod_state(pod))
            for pod in pods
            for address in pod.addresses
        ]
        ready = {one.address.version for one in found if one.state == "active"}
        frontends = [
            Frontend(address, number, protocol, "inside") for address in addresses if address.version in ready
        ]
        if frontends:
            pools.extend(
                _by_family(
                    policy.reference, name or str(number), protocol, frontends, found, _Settings(DEFAULTS, 0)
                )
            )
    return tuple(pools)


def _redirected(
    policy: LocalRedirectPolicy, inventory: Inventory
) -> Iterator[tuple[str, int, Protocol, tuple[Address, ...]]]:
    """What a policy takes: a port's name, number and protocol, and the addresses."""
    frontend = policy.spec.redirect_frontend
    if frontend.address_matcher is not None:
        for port in frontend.address_matcher.to_ports:
            yield port.name, port.port, port.protocol, (frontend.address_matcher.ip,)
        return
    service = inventory.services.get(policy.service_reference or "")
    if not isinstance(service, Service):
        return
    wanted = {(port.port, port.protocol): port.name for port in frontend.ports}
    for own in service.spec.ports:
        if own.protocol != "SCTP" and (not wanted or (own.port, own.protocol) in wanted):
            name = wanted.get((own.port, own.protocol), own.name)
            yield name, own.port, own.protocol, service.cluster_addresses


# -- pools


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the pools of a service have in common."""

    traffic: TrafficSettings
    affinity_seconds: int
    forwarding: Literal["nat", "dsr"] = "nat"
    table_size: int | None = None


def _by_family(
    service: str,
    port: str,
    protocol: Protocol,
    frontends: Iterable[Frontend],
    found: Iterable[Target],
    settings: _Settings,
    reach: Reach = "cluster",
) -> Iterator[Pool]:
    frontends, found = tuple(frontends), tuple(found)
    versions: tuple[Literal[4, 6], ...] = (4, 6)
    for version in versions:
        mine = tuple(frontend for frontend in frontends if frontend.address.version == version)
        if not mine:
            continue
        unique: dict[tuple[Address, int], Target] = {}
        for target in found:
            if target.address.version == version:
                unique.setdefault((target.address, target.port), target)
        weights = [weight for target in unique.values() if (weight := target.effective_weight)]
        traffic = settings.traffic
        yield Pool(
            service,
            port,
            version,
            protocol,
            mine,
            tuple(unique.values()),
            settings.forwarding,
            traffic.algorithm,
            _table_size(service, port, version, weights, settings),
            settings.affinity_seconds,
            traffic.drain_seconds,
            traffic.health_check,
            traffic.slow_start_seconds,
            traffic.all_down,
            reach,
        )


def _table_size(service: str, port: str, version: int, weights: list[int], settings: _Settings) -> int:
    if not weights:
        return 0
    if settings.traffic.algorithm == "modulo":
        try:
            return len(maglev.modulo(weights))
        except ValueError as error:
            raise Conflict(f"{service}: algorithm modulo", why=str(error)) from None
    least = maglev.table_size(len(weights))
    size = settings.table_size or least
    if size < least:
        raise Conflict(
            f"{service}: tableSize {size} is too small for {len(weights)} IPv{version} backends on port {port}",
            why=f"evenness needs {maglev.SLOTS_PER_BACKEND} slots for each, up to {maglev.LARGEST_TABLE} in all",
            remedy=f"leave tableSize out, or make it at least {least}",
        )
    if len(weights) > size:
        raise Conflict(
            f"{service} has {len(weights)} IPv{version} backends on port {port}",
            why=f"a table of {size} slots has room for that many only",
            remedy="raise tableSize, up to 65537" if settings.table_size else "split the service",
        )
    return size
