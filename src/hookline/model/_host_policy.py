"""HostPolicy: which connections nodes themselves may have. The shape is NetworkPolicy's, with nodes in place of pods."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from hookline.model._network_policy import IPBlock, NetworkPolicyPort, PolicyType, PolicyTypes
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own, OwnClusterMetadata, OwnResource
from hookline.model._selectors import LabelSelector


class HostPolicyPeer(Own):
    """Who is at the other end.

    Attributes:
        namespace_selector: Namespaces by their labels, for their pods. A HostPolicy is in no namespace, so pods are always
            chosen with it; ``{}`` takes every namespace.
        pod_selector: Pods of these namespaces by their labels; without it all of them.
        node_selector: Nodes by their labels; it stands alone.
        ip_block: Addresses; it stands alone.
    """

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    node_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise Refused("null is no peer", remedy="{nodeSelector: {}} is every node")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> HostPolicyPeer:
        kinds = [
            name
            for name, given in (
                ("pods", self.pod_selector is not None or self.namespace_selector is not None),
                ("nodeSelector", self.node_selector is not None),
                ("ipBlock", self.ip_block is not None),
            )
            if given
        ]
        if len(kinds) > 1:
            raise Refused(
                f"a peer is pods, nodes or addresses; this one has {' and '.join(kinds)}",
                remedy="make an entry of each, which means either",
            )
        if not kinds:
            raise Refused(
                "a peer has podSelector, namespaceSelector, nodeSelector or ipBlock; this one has none",
                remedy="leave the whole list out to mean everybody",
            )
        if self.pod_selector is not None and self.namespace_selector is None:
            raise Refused(
                "a HostPolicy is in no namespace, so podSelector needs namespaceSelector",
                remedy="namespaceSelector: {} takes every namespace",
                at=("podSelector",),
            )
        return self


class HostIngressRule(Own):
    """Connections that are allowed to a node: from any of the peers, to any of the ports. An empty list is any."""

    from_: tuple[HostPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()

    @model_validator(mode="after")
    def _numbers_only(self) -> HostIngressRule:
        refusals = [
            Refused(
                f"{value_text(port.port)} is a name, and a node's ports have none",
                remedy="write the number",
                at=("ports", index, "port"),
            )
            for index, port in enumerate(self.ports)
            if isinstance(port.port, str)
        ]
        if refusals:
            raise Refused.all(refusals)
        return self

    @property
    def peers(self) -> tuple[HostPolicyPeer, ...]:
        """Who is at the other end, in either direction."""
        return self.from_


class HostEgressRule(Own):
    """Connections that are allowed from a node: to any of the peers, to any of the ports. An empty list is any."""

    to: tuple[HostPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()

    @property
    def peers(self) -> tuple[HostPolicyPeer, ...]:
        """Who is at the other end, in either direction."""
        return self.to


class HostPolicySpec(Own):
    """Which nodes are selected, and what they are allowed.

    Attributes:
        node_selector: Nodes by their labels; empty or missing takes all.
        default_verdict: What becomes of a connection that no rule allows, in the directions of the policy; among several
            policies that select a node ``deny`` wins.
    """

    node_selector: LabelSelector = LabelSelector()
    policy_types: PolicyTypes = ()
    ingress: tuple[HostIngressRule, ...] = ()
    egress: tuple[HostEgressRule, ...] = ()
    default_verdict: Literal["deny", "allow"] = "deny"

    @property
    def effective_types(self) -> tuple[PolicyType, ...]:
        """The directions that the policy is about: as said, or as NetworkPolicy's default is."""
        return self.policy_types or (("Ingress", "Egress") if self.egress else ("Ingress",))


class HostPolicy(OwnResource):
    """Which connections nodes may have (``hookline.dev/v1alpha1``)."""

    kind = "HostPolicy"
    plural = "hostpolicies"
    short_names = ("hp",)

    metadata: OwnClusterMetadata
    spec: HostPolicySpec = HostPolicySpec()
