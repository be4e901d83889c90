"""`World`: the documents that policies are about, sorted for quick questions. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hookline.model import ExternalHost, Namespace, Node, Pod, Resource
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
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    host_policies: Mapping[str, Any] = field(default_factory=dict)

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
        raise NotImplementedError
