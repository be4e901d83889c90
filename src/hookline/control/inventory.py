"""What services refer to, found quickly: pods, slices, policies, nodes; and which of the nodes this one is.

An `Inventory` is never changed. `Inventory.changed` gives the one that follows from it, for the price of the change: what
stays is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from hookline.model import (
    DNSCapture,
    EndpointSlice,
    ExternalHost,
    LocalRedirectPolicy,
    Node,
    Pod,
    Resource,
    Service,
    ServicePolicy,
    VirtualService,
)

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Here:
    """This node, as services see it.

    Attributes:
        names: What documents call it; more than one where the machine has a name of its own.
        addresses: Its addresses on which node ports are reached. Empty: those of its ``v1/Node``.
        has_loopback: Whether node ports are reached on loopback too: on the host, whose programs share it.
    """

    names: frozenset[str] = frozenset()
    addresses: tuple[Address, ...] = ()
    has_loopback: bool = False


@dataclass(frozen=True, slots=True)
class Inventory:
    """The objects that decide what stands behind a service.

    Attributes:
        pods: By namespace, those that have not ended; in the order in which they came.
        slices: By the service that they belong to.
        names: Who has an address: ``namespace/pod`` or ``external/name``.
        policies: By the service that they are for; more than one is a mistake that is refused.
        nodes: By name.
        services: By reference.
        redirects: Local redirect policies, by reference.
        captures: Pods' DNS queries that go elsewhere, by reference.
    """

    here: Here = Here()
    pods: Mapping[str, tuple[Pod, ...]] = field(default_factory=dict)
    slices: Mapping[str, tuple[EndpointSlice, ...]] = field(default_factory=dict)
    names: Mapping[Address, str] = field(default_factory=dict)
    policies: Mapping[str, tuple[ServicePolicy, ...]] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    services: Mapping[str, Service | VirtualService] = field(default_factory=dict)
    redirects: Mapping[str, LocalRedirectPolicy] = field(default_factory=dict)
    captures: Mapping[str, DNSCapture] = field(default_factory=dict)

    @classmethod
    def of(cls, resources: Iterable[Resource], here: Here = Here()) -> Inventory:
        """Sorts resources into an inventory."""
        return cls(here).changed((), resources)

    def changed(self, gone: Iterable[Resource], come: Iterable[Resource]) -> Inventory:
        """The inventory without some objects and with others.

        Args:
            gone: Objects that it has; those that are replaced are among them.
            come: Objects that are new, or that replace others.
        """
        change = _Change(self)
        for resource in gone:
            change.take(resource)
        for resource in come:
            change.add(resource)
        return change.done()

    def name_of(self, address: Address) -> str:
        """The name of who has the address, or the address itself."""
        return self.names.get(address) or str(address)

    def selected(self, namespace: str, selector: Mapping[str, str]) -> Iterator[Pod]:
        """The namespace's pods that have all of the labels."""
        wanted = selector.items()
        for pod in self.pods.get(namespace, ()):
            if wanted <= pod.metadata.labels.items():
                yield pod

    def is_here(self, node_name: str | None) -> bool:
        """Whether a node's name is this node's."""
        return node_name is not None and node_name in self.here.names

    @property
    def own_node(self) -> Node | None:
        """This node's ``v1/Node``; None where there is none."""
        return next((self.nodes[name] for name in sorted(self.here.names) if name in self.nodes), None)

    @property
    def own_addresses(self) -> tuple[Address, ...]:
        """This node's addresses on which node ports are reached."""
        node = self.own_node
        return self.here.addresses or (node.service_addresses if node else ())

    @property
    def other_addresses(self) -> tuple[Address, ...]:
        """The other nodes' addresses, in the order of their names."""
        own = frozenset(self.own_addresses)
        others = (self.nodes[name] for name in sorted(self.nodes) if name not in self.here.names)
        return tuple(dict.fromkeys(a for node in others for a in node.service_addresses if a not in own))

    @property
    def zone(self) -> str:
        """The zone that this node is in; empty where its ``v1/Node`` does not say."""
        node = self.own_node
        return node.zone if node else ""

    def zone_of(self, node_name: str | None) -> str:
        """The zone of a node by its name; empty where nobody says."""
        node = self.nodes.get(node_name or "")
        return node.zone if node else ""


class _Change:
    """An inventory in the making: each part is copied when something in it changes first."""

    def __init__(self, base: Inventory) -> None:
        self._base = base
        self._parts: dict[str, dict[Any, Any]] = {}

    def _part(self, name: str) -> dict[Any, Any]:
        if name not in self._parts:
            self._parts[name] = dict(getattr(self._base, name))
        return self._parts[name]

    def done(self) -> Inventory:
        parts: dict[str, Any] = self._parts
        return replace(self._base, **parts) if parts else self._base

    def add(self, resource: Resource) -> None:
        match resource:
            case Pod() if not resource.has_ended:
                self._add_to("pods", resource.metadata.namespace, resource)
                self._part("names").update(
                    dict.fromkeys(
                        resource.addresses, f"{resource.metadata.namespace}/{resource.metadata.name}"
                    )
                )
            case ExternalHost():
                self._part("names").update(
                    dict.fromkeys(resource.addresses, f"external/{resource.metadata.name}")
                )
            case EndpointSlice() if resource.service_reference:
                self._add_to("slices", resource.service_reference, resource)
            case ServicePolicy():
                self._add_to("policies", resource.service_reference, resource)
            case Node():
                self._part("nodes")[resource.metadata.name] = resource
            case Service() | VirtualService():
                self._part("services")[resource.reference] = resource
            case LocalRedirectPolicy():
                self._part("redirects")[resource.reference] = resource
            case DNSCapture():
                self._part("captures")[resource.reference] = resource

    def take(self, resource: Resource) -> None:
        match resource:
            case Pod() if not resource.has_ended:
                self._take_from("pods", resource.metadata.namespace, resource)
                name = f"{resource.metadata.namespace}/{resource.metadata.name}"
                self._forget_names(resource.addresses, name)
            case ExternalHost():
                self._forget_names(resource.addresses, f"external/{resource.metadata.name}")
            case EndpointSlice() if resource.service_reference:
                self._take_from("slices", resource.service_reference, resource)
            case ServicePolicy():
                self._take_from("policies", resource.service_reference, resource)
            case Node():
                self._part("nodes").pop(resource.metadata.name, None)
            case Service() | VirtualService():
                self._part("services").pop(resource.reference, None)
            case LocalRedirectPolicy():
                self._part("redirects").pop(resource.reference, None)
            case DNSCapture():
                self._part("captures").pop(resource.reference, None)

    def _add_to(self, part: str, key: str, resource: Resource) -> None:
        found = self._part(part)
        found[key] = (*found.get(key, ()), resource)

    def _take_from(self, part: str, key: str, resource: Resource) -> None:
        found = self._part(part)
        name = resource.metadata.name  # all of one key are of one kind and namespace
        left = tuple(one for one in found.get(key, ()) if one.metadata.name != name)
        if left:
            found[key] = left
        else:
            found.pop(key, None)

    def _forget_names(self, addresses: Iterable[Address], name: str) -> None:
        names = self._part("names")
        for address in addresses:
            if names.get(address) == name:
                del names[address]
