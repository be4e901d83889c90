"""`World`: the documents that policies are about, sorted for quick questions. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hookline.model import ExternalHost, HostPolicy, Namespace, NetworkPolicy, Node, Pod, Resource
from hookline.policy._decision import Address

AUDIT_ANNOTATION = "hookline.dev/audit"


def is_audited(policy: Resource) -> bool:
    """Whether a policy only reports what it would deny (``hookline.dev/audit: "true"``)."""
    return policy.metadata.annotations.get(AUDIT_ANNOTATION) == "true"


@dataclass(frozen=True, slots=True)
class World:
    """The documents that decide, as one node sees them. Never changed: `changed` gives the next.

    Attributes:
        node: The node's name.
        names: All that documents call the node, `node` among them.
        addresses: The node's own addresses beside those of its ``v1/Node``.
        namespaces: By name.
        pods: All of them, by ``namespace/name``; ended ones and those in a node's network too.
        nodes: By name.
        externals: By name.
        policies: NetworkPolicies by namespace and in it by name.
        host_policies: HostPolicies by name.
    """

    node: str = ""
    names: frozenset[str] = frozenset()
    addresses: frozenset[Address] = frozenset()
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    pods: Mapping[str, Pod] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    externals: Mapping[str, ExternalHost] = field(default_factory=dict)
    policies: Mapping[str, Mapping[str, NetworkPolicy]] = field(default_factory=dict)
    host_policies: Mapping[str, HostPolicy] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        resources: Iterable[Resource],
        *,
        node: str = "",
        names: Iterable[str] = (),
        addresses: Iterable[Address] = (),
    ) -> World:
        """Sorts resources; kinds that no policy is about are passed over.

        Args:
            node: The node whose rows are compiled.
            names: What else documents call it.
            addresses: Its own addresses, beside those of its ``v1/Node``.
        """
        return cls(node, frozenset((node, *names)) - {""}, frozenset(addresses)).changed((), resources)

    def changed(
        self,
        gone: Iterable[Resource],
        come: Iterable[Resource],
        *,
        addresses: Iterable[Address] | None = None,
    ) -> World:
        """The world without some objects and with others; what stays is shared.

        Args:
            gone: Objects that it has; those that are replaced may be among them.
            come: Objects that are new, or that replace others of their name.
            addresses: The node's own addresses as they are now; None: as before.
        """
        parts: dict[str, dict[str, Any]] = {}
        fresh: set[str] = set()

        def part(name: str) -> dict[str, Any]:
            if name not in parts:
                parts[name] = dict(getattr(self, name))
            return parts[name]

        def policies_of(namespace: str) -> dict[str, NetworkPolicy]:
            all_policies = part("policies")
            if namespace not in fresh:
                fresh.add(namespace)
                all_policies[namespace] = dict(all_policies.get(namespace, {}))
            found: dict[str, NetworkPolicy] = all_policies[namespace]
            return found

        for resource in gone:
            if isinstance(resource, NetworkPolicy):
                policies_of(resource.namespace).pop(resource.name, None)
            elif (place := _place(resource)) is not None:
                part(place).pop(_key(resource), None)
        for resource in come:
            if isinstance(resource, NetworkPolicy):
                policies_of(resource.namespace)[resource.name] = resource
            elif (place := _place(resource)) is not None:
                part(place)[_key(resource)] = resource
        for namespace in fresh:
            if not parts["policies"][namespace]:
                del parts["policies"][namespace]
        own = self.addresses if addresses is None else frozenset(addresses)
        if not parts and own == self.addresses:
            return self
        changes: dict[str, Any] = {**parts, "addresses": own}
        return replace(self, **changes)

    def is_here(self, node_name: str) -> bool:
        """Whether a node's name is this node's."""
        return node_name in self.names

    @property
    def own_node(self) -> Node | None:
        """This node's ``v1/Node``; None where there is none."""
        return next((self.nodes[name] for name in sorted(self.names) if name in self.nodes), None)

    @property
    def own_addresses(self) -> frozenset[Address]:
        """This node's addresses: `addresses` and those of its ``v1/Node``."""
        own = self.own_node
        return self.addresses | frozenset(own.service_addresses) if own is not None else self.addresses


def holder(pods: Iterable[Pod]) -> Pod:
    """Who has an address that several pods say is theirs: one that is not going away, of these the newest, the last by name."""
    return max(
        pods,
        key=lambda pod: (
            not pod.is_terminating,
            pod.metadata.creation_timestamp or "",
            pod.namespace,
            pod.name,
        ),
    )


PLACES: dict[type[Resource], str] = {
    Namespace: "namespaces",
    Pod: "pods",
    Node: "nodes",
    ExternalHost: "externals",
    HostPolicy: "host_policies",
}


def _place(resource: Resource) -> str | None:
    return PLACES.get(type(resource))


def _key(resource: Resource) -> str:
    return f"{resource.namespace}/{resource.name}" if isinstance(resource, Pod) else resource.name
