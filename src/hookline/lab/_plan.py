"""From the resources of a file to the members of a lab: who there is, with which addresses; pure.

Addresses that the resources give are honoured. Missing ones are allocated in the order of the file, so the
same file always gives the same lab: nodes 172.30.0.N, pods from their node's podCIDR (10.244.N.0/24),
machines outside 203.0.113.N; for IPv6 fd00:172:30::N, fd00:10:244:N::/64 and 2001:db8:203::N. Whatever cannot
be is refused here, before anything is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from hookline.lab._errors import LabError
from hookline.model import ExternalHost, Namespace, Node, Pod, Resource, parse
from hookline.model.names import (
    FIRST_NODE,
    Address,
    Endpoint,
    Protocol,
    check_namespace,
    node_processes_cgroup,
    pod_cgroup,
)

Family: TypeAlias = Literal[4, 6]
Network: TypeAlias = IPv4Network | IPv6Network
MemberKind: TypeAlias = Literal["node", "pod", "external"]

MOST_NODES = 254
NODE_NETWORKS: dict[Family, Network] = {4: ip_network("172.30.0.0/24"), 6: ip_network("fd00:172:30::/64")}
EXTERNAL_NETWORKS: dict[Family, Network] = {
    4: ip_network("203.0.113.0/24"),
    6: ip_network("2001:db8:203::/64"),
}
LAB_KINDS = (Namespace, Node, Pod, ExternalHost)


@dataclass(frozen=True, slots=True)
class ServedPort:
    """A port that a member's server listens on."""

    port: int
    protocol: Protocol
    name: str = ""

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Member:
    """A node, pod or external host of a lab: one network namespace.

    ``endpoint`` is its name in every command (``default/a``, ``external/x``, ``node/n``), ``node`` the name
    of the node that a pod runs on (empty for the others). ``cgroup`` is that of its processes, relative to the cgroup2
    mount; empty for machines outside, which run on no node.
    """

    endpoint: str
    kind: MemberKind
    netns: Path
    addresses: tuple[Address, ...]
    ports: tuple[ServedPort, ...] = ()
    node: str = ""
    cgroup: str = ""

    @property
    def name(self) -> str:
        """The member's own name, without its namespace or kind."""
        return self.endpoint.partition("/")[2]

    def address(self, family: int) -> Address | None:
        """The member's address of a family (4 or 6), None where it has none."""
        return next((address for address in self.addresses if address.version == family), None)

    def as_dict(self) -> dict[str, Any]:
        """The member as plain values."""
        return {
            "endpoint": self.endpoint,
            "kind": self.kind,
            "netns": str(self.netns),
            "node": self.node,
            "cgroup": self.cgroup,
            "addresses": [str(address) for address in self.addresses],
            "ports": [{"name": one.name, "port": one.port, "protocol": one.protocol} for one in self.ports],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a lab will be: its members, and the resources with everything filled in."""

    lab: str
    families: tuple[Family, ...]
    nodes: tuple[Member, ...]
    pods: tuple[Member, ...]
    externals: tuple[Member, ...]
    resources: tuple[Resource, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """Everyone: nodes, pods, externals."""
        return (*self.nodes, *self.pods, *self.externals)

    def member(self, endpoint: str) -> Member | None:
        """The member of that endpoint, None where there is none."""
        return next((member for member in self.members if member.endpoint == endpoint), None)


def plan(
    resources: Iterable[Resource],
    lab: str,
    families: Sequence[Family] = (4, 6),
    *,
    reserved: Iterable[Address] = (),
) -> Plan:
    """Fill in what the resources leave open, and check that they can be a lab.

    Kinds that a lab has no use for are passed over.

    Args:
        resources: Those of the file.
        lab: The lab's name.
        families: The address families that members have.
        reserved: Addresses that nobody is given who does not ask for them.

    Raises:
        LabError: Two members of one name or address, a pod on a node that is not there, no address left.
    """
    wanted = [resource for resource in resources if isinstance(resource, LAB_KINDS)]
    _refuse_twice(wanted)
    nodes = [resource for resource in wanted if isinstance(resource, Node)] or [_node(FIRST_NODE)]
    pods = [resource for resource in wanted if isinstance(resource, Pod)]
    externals = [resource for resource in wanted if isinstance(resource, ExternalHost)]
    if len(nodes) > MOST_NODES:
        raise LabError(f"a lab has at most {MOST_NODES} nodes", why=f"there are {len(nodes)}")
    addresses = _Addresses(families, reserved)
    for resource in (*nodes, *pods, *externals):
        addresses.take(resource)
    filled_nodes = [_fill_node(node, number, addresses) for number, node in enumerate(nodes, 1)]
    filled_pods = _fill_pods(pods, filled_nodes, addresses)
    filled_externals = [_fill_external(external, addresses) for external in externals]
    namespaces = _fill_namespaces([resource for resource in wanted if isinstance(resource, Namespace)], pods)
    return Plan(
        lab=lab,
        families=tuple(families),
        nodes=tuple(_node_member(lab, node) for node in filled_nodes),
        pods=tuple(_pod_member(lab, pod) for pod in filled_pods),
        externals=tuple(_external_member(lab, external) for external in filled_externals),
        resources=(*namespaces, *filled_nodes, *filled_pods, *filled_externals),
    )


class _Addresses:
    """Who has which address; gives out those that are free."""

    def __init__(self, families: Sequence[Family], reserved: Iterable[Address]) -> None:
        self.families = tuple(families)
        self._owners: dict[Address, str] = {}
        self._reserved = frozenset(reserved)

    def take(self, resource: Resource) -> None:
        """Note the addresses that a resource was given."""
        label = _label(resource)
        for address in self.given(resource):
            if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local:
                raise LabError(
                    f"{label} cannot have the address {address}",
                    why="it is a multicast, loopback, link-local or unspecified address",
                    remedy="give an address that a machine can have, or none to have one chosen",
                )
            owner = self._owners.setdefault(address, label)
            if owner != label:
                raise LabError(
                    f"{label} has the address {address}",
                    why=f"{owner} has it too",
                    remedy="give each its own, or none to have one chosen",
                )
        for family in self.families:
            mine = [str(address) for address in self.given(resource) if address.version == family]
            if len(mine) > 1:
                raise LabError(
                    f"{label} has {len(mine)} IPv{family} addresses",
                    why=f"a lab's member has one of each family, not {', '.join(mine)}",
                    remedy="keep one of them",
                )

    def given(self, resource: Resource) -> tuple[Address, ...]:
        """The addresses of a resource in the families of this lab."""
        if isinstance(resource, Node | Pod | ExternalHost):
            return tuple(address for address in resource.addresses if address.version in self.families)
        return ()

    def complete(self, resource: Resource, networks: dict[Family, Network]) -> tuple[Address, ...]:
        """The resource's addresses, one per family, IPv4 first; missing ones from these networks."""
        given = {address.version: address for address in self.given(resource)}
        return tuple(
            given.get(family) or self._next(resource, networks.get(family), family)
            for family in self.families
        )

    def _next(self, resource: Resource, network: Network | None, family: int) -> Address:
        label = _label(resource)
        for address in _host_addresses(network):
            if address not in self._owners and address not in self._reserved:
                self._owners[address] = label
                return address
        raise LabError(
            f"{label} cannot be given an IPv{family} address",
            why=f"none is free in {network}" if network else f"its node has no podCIDR of IPv{family}",
            remedy="give it one, or its node a larger network in spec.podCIDRs",
        )


def _host_addresses(network: Network | None) -> Iterator[Address]:
    """A network's addresses from .1 on, without a broadcast address."""
    if network is None:
        return
    last = min(network.num_addresses - (1 if network.version == 4 else 0), 1 << 16)
    for number in range(1, last):
        yield network[number]


def _fill_node(node: Node, number: int, addresses: _Addresses) -> Node:
    document = node.to_document()
    mine = addresses.complete(node, NODE_NETWORKS)
    status = document.setdefault("status", {})
    others = [entry for entry in status.get("addresses", []) if entry.get("type") != "InternalIP"]
    status["addresses"] = [{"type": "InternalIP", "address": str(address)} for address in mine] + others
    networks = _pod_networks(node)
    networks.setdefault(4, ip_network(f"10.244.{number}.0/24"))
    networks.setdefault(6, ip_network(f"fd00:10:244:{number:x}::/64"))
    spec = document.setdefault("spec", {})
    spec["podCIDRs"] = [str(networks[family]) for family in addresses.families]
    spec["podCIDR"] = spec["podCIDRs"][0]
    return cast(Node, parse(document, node.origin))


def _pod_networks(node: Node) -> dict[Family, Network]:
    networks: dict[Family, Network] = {}
    for text in (*node.spec.pod_cidrs, *filter(None, [node.spec.pod_cidr])):
        try:
            network = ip_network(text)
        except ValueError as error:
            raise LabError(
                f"{_label(node)} has the podCIDR {text!r}",
                why=str(error),
                remedy="write a network such as 10.244.1.0/24",
            ) from None
        networks.setdefault(network.version, network)
    return networks


def _fill_pods(pods: list[Pod], nodes: list[Node], addresses: _Addresses) -> list[Pod]:
    networks = {node.name: _pod_networks(node) for node in nodes}
    filled = []
    for pod in pods:
        node = pod.spec.node_name or nodes[0].name
        if node not in networks:
            raise LabError(
                f"{_label(pod)} is to run on {node}",
                why=f"the lab's nodes are {', '.join(networks)}",
                remedy="add a Node of that name, or change spec.nodeName",
            )
        if pod.spec.host_network:
            raise LabError(
                f"{_label(pod)} wants its node's own network (hostNetwork)",
                why="every pod of a lab is a network namespace of its own",
                remedy="remove spec.hostNetwork",
            )
        check_namespace(pod.namespace)
        mine = addresses.complete(pod, networks[node])
        document = pod.to_document()
        document.setdefault("spec", {})["nodeName"] = node
        status = document.setdefault("status", {})
        status["podIP"] = str(mine[0])
        status["podIPs"] = [{"ip": str(address)} for address in mine]
        status["phase"] = "Running"
        filled.append(cast(Pod, parse(document, pod.origin)))
    return filled


def _fill_external(external: ExternalHost, addresses: _Addresses) -> ExternalHost:
    document = external.to_document()
    spec = document.setdefault("spec", {})
    spec.pop("address", None)
    spec["addresses"] = [str(address) for address in addresses.complete(external, EXTERNAL_NETWORKS)]
    return cast(ExternalHost, parse(document, external.origin))


def _fill_namespaces(namespaces: list[Namespace], pods: list[Pod]) -> list[Resource]:
    """The namespaces given and those that pods are in, with the label that Kubernetes gives to each."""
    documents: dict[str, tuple[dict[str, Any], Any]] = {
        namespace.name: (namespace.to_document(), namespace.origin) for namespace in namespaces
    }
    for name in (pod.namespace for pod in pods):
        documents.setdefault(
            name, ({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}, None)
        )
    for name, (document, _) in documents.items():
        document["metadata"].setdefault("labels", {}).setdefault("kubernetes.io/metadata.name", name)
    return [parse(document, origin) for document, origin in documents.values()]


def _node(name: str) -> Node:
    return cast(Node, parse({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}))


def _node_member(lab: str, node: Node) -> Member:
    endpoint = Endpoint("node", node.name)
    return Member(
        endpoint.member,
        "node",
        endpoint.netns(lab),
        node.addresses,
        cgroup=node_processes_cgroup(lab, node.name),
    )


def _pod_member(lab: str, pod: Pod) -> Member:
    endpoint = Endpoint("pod", pod.name, pod.namespace)
    ports = (
        ServedPort(port.container_port, cast(Protocol, port.protocol.lower()), port.name)
        for port in pod.ports
    )
    return Member(
        endpoint.member,
        "pod",
        endpoint.netns(lab),
        _ipv4_first(pod.addresses),
        _once(ports),
        node=pod.spec.node_name,
        cgroup=pod_cgroup(lab, pod.spec.node_name, pod.namespace, pod.name),
    )


def _external_member(lab: str, external: ExternalHost) -> Member:
    endpoint = Endpoint("external", external.name)
    ports = (
        ServedPort(port.port, cast(Protocol, port.protocol.lower()), port.name)
        for port in external.spec.ports
    )
    return Member(
        endpoint.member, "external", endpoint.netns(lab), _ipv4_first(external.addresses), _once(ports)
    )


def _ipv4_first(addresses: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(sorted(addresses, key=lambda address: address.version))


def _once(ports: Iterable[ServedPort]) -> tuple[ServedPort, ...]:
    """Each port and protocol once: two containers of a pod may declare the same."""
    return tuple({(port.port, port.protocol): port for port in ports}.values())


def _refuse_twice(resources: Sequence[Resource]) -> None:
    seen: set[str] = set()
    for resource in resources:
        if resource.reference in seen:
            raise LabError(
                f"{resource.reference} is there twice",
                why="a lab's members have names of their own",
                remedy="rename or remove one of them",
            )
        seen.add(resource.reference)


def _label(resource: Resource) -> str:
    """A resource by the name that commands use."""
    if isinstance(resource, Pod):
        return f"pod {resource.namespace}/{resource.name}"
    return f"external/{resource.name}" if isinstance(resource, ExternalHost) else f"node {resource.name}"
