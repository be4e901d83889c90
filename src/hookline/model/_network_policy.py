"""NetworkPolicy, as Kubernetes has it: which connections selected pods may have.

Fields, defaults and what is refused are those of ``networking.k8s.io/v1`` with strict validation, as kubectl asks for it:
https://kubernetes.io/docs/reference/kubernetes-api/policy-resources/network-policy-v1/. A field that is null is one
that is left out; an empty selector takes everything, a missing one nothing by itself.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hookline.model._fields import PORT_LIMIT, PortOrName, Protocol4, host_address
from hookline.model._problems import Refused, value_text
from hookline.model._resource import Own, OwnMetadata, StrictNativeResource
from hookline.model._selectors import LabelSelector

IPNetwork = IPv4Network | IPv6Network
PolicyType = Literal["Ingress", "Egress"]

_MAPPED = IPv6Network("::ffff:0:0/96")
_PLAIN = re.compile(r"[0-9A-Fa-f:.]+/(0|[1-9][0-9]{0,2})")
_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")


@lru_cache(maxsize=1 << 18)
def network_of(text: str) -> IPNetwork:
    """The network that a CIDR names.

    Kubernetes' own reading since 1.36: no leading zeros, no IPv4 in IPv6 clothes, no bits beyond the prefix.

    Raises:
        Refused: It names none.
    """
    if _PLAIN.fullmatch(text):
        try:
            network = IPv6Network(text) if ":" in text else IPv4Network(text)
        except ValueError:
            raise _not_a_network(text) from None
        if network.version == 4 or network.network_address not in _MAPPED:
            return network
    raise _not_a_network(text)


def _not_a_network(text: str) -> Refused:
    """What is wrong with a text that is none."""
    shown = value_text(text)
    nonsense = Refused(f"{shown} is not a network such as 192.0.2.0/24 or 2001:db8::/64")
    address_text, slash, length_text = text.partition("/")
    try:
        address = host_address(address_text)
    except Refused as refused:
        if "clothes" in str(refused):
            return Refused(f"{shown} is a network of IPv4 addresses in IPv6 clothes")
        return nonsense
    most = address.max_prefixlen
    if not slash:
        return Refused(f"{shown} is an address; a network is needed", remedy=f"write {text}/{most}")
    if not _PREFIX_LENGTH.fullmatch(length_text) or int(length_text) > most:
        return Refused(f"{shown} is not a network: after the slash stands a number from 0 to {most}")
    network = ip_network((address, int(length_text)), strict=False)
    return Refused(
        f"{shown} has bits beyond its prefix, so it may mean two things",
        remedy=f"write {network} for the network, {address}/{most} for the one address",
    )


def _cidr(value: str) -> str:
    network_of(value)
    return value


CIDR = Annotated[str, AfterValidator(_cidr)]
"""A network, kept as it was written; `network_of` has it parsed."""


class IPBlock(Own):
    """Addresses of a network, without those of some networks within it."""

    cidr: CIDR
    except_: tuple[CIDR, ...] = ()

    @model_validator(mode="after")
    def _holes_are_within(self) -> IPBlock:
        if not self.except_:
            return self
        refusals = []
        network = self.network
        for index, hole in enumerate(self.holes):
            if (
                hole.version != network.version
                or hole.prefixlen <= network.prefixlen
                or hole.network_address not in network
            ):
                refusals.append(
                    Refused(
                        f"{hole} is not a smaller network within {network}, the cidr", at=("except", index)
                    )
                )
        if refusals:
            raise Refused.all(refusals)
        return self

    @property
    def network(self) -> IPNetwork:
        """``cidr``, parsed."""
        return network_of(self.cidr)

    @property
    def holes(self) -> tuple[IPNetwork, ...]:
        """``except``, parsed."""
        return tuple(map(network_of, self.except_))


class NetworkPolicyPort(Own):
    """Ports of the destination: one, a range, one by its name on each pod, or all of a protocol."""

    protocol: Protocol4 = "TCP"
    port: PortOrName | None = None
    end_port: Annotated[int, Field(strict=True, ge=1, le=PORT_LIMIT)] | None = None

    @model_validator(mode="after")
    def _range(self) -> NetworkPolicyPort:
        if self.end_port is None:
            return self
        if self.port is None:
            raise Refused("endPort needs port, the range's first", at=("endPort",))
        if isinstance(self.port, str):
            raise Refused(
                f"port is the name {value_text(self.port)}; only a range of numbers has an endPort",
                remedy="remove endPort, or write port as a number",
                at=("endPort",),
            )
        if self.end_port < self.port:
            raise Refused(f"{self.end_port} is below port, {self.port}", at=("endPort",))
        return self


class NetworkPolicyPeer(Own):
    """Who is at the other end.

    Attributes:
        pod_selector: Pods by their labels: of the policy's own namespace, or of those that `namespace_selector` takes.
        namespace_selector: Namespaces by their labels; without `pod_selector` all of their pods.
        ip_block: Addresses; it stands alone.
    """

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise Refused(
                "null is no peer", remedy="{podSelector: {}} is every pod of the policy's namespace"
            )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> NetworkPolicyPeer:
        selectors = self.pod_selector is not None or self.namespace_selector is not None
        if self.ip_block is not None and selectors:
            raise Refused(
                "ipBlock stands alone: pods are not chosen by their addresses",
                remedy="make two entries of it, which means either",
            )
        if self.ip_block is None and not selectors:
            raise Refused(
                "a peer has podSelector, namespaceSelector or ipBlock; this one has none",
                remedy="leave the whole list out to mean everybody",
            )
        return self


class IngressRule(Own):
    """Connections that are allowed to a pod: from any of the peers, to any of the ports. An empty list is any."""

    from_: tuple[NetworkPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()

    @property
    def peers(self) -> tuple[NetworkPolicyPeer, ...]:
        """Who is at the other end, in either direction."""
        return self.from_


class EgressRule(Own):
    """Connections that are allowed from a pod: to any of the peers, to any of the ports. An empty list is any."""

    to: tuple[NetworkPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()

    @property
    def peers(self) -> tuple[NetworkPolicyPeer, ...]:
        """Who is at the other end, in either direction."""
        return self.to


def check_types(types: tuple[PolicyType, ...]) -> tuple[PolicyType, ...]:
    """Refuses more than two of them, as Kubernetes does; one twice is accepted there too."""
    if len(types) > 2:
        raise Refused("there are more than two policyTypes", remedy="Ingress, Egress or both")
    return types


PolicyTypes = Annotated[tuple[PolicyType, ...], AfterValidator(check_types)]


class NetworkPolicySpec(Own):
    """Which pods are selected, and what they are allowed.

    Attributes:
        pod_selector: Pods of the policy's namespace; empty or missing takes all.
    """

    pod_selector: LabelSelector = LabelSelector()
    policy_types: PolicyTypes = ()
    ingress: tuple[IngressRule, ...] = ()
    egress: tuple[EgressRule, ...] = ()

    @property
    def effective_types(self) -> tuple[PolicyType, ...]:
        """The directions in which the policy isolates those whom it selects: as said, or as Kubernetes' API fills it in."""
        return self.policy_types or (("Ingress", "Egress") if self.egress else ("Ingress",))


class NetworkPolicy(StrictNativeResource):
    """Which connections pods may have (``networking.k8s.io/v1``)."""

    api_version = "networking.k8s.io/v1"
    kind = "NetworkPolicy"
    plural = "networkpolicies"
    short_names = ("netpol",)

    metadata: OwnMetadata
    spec: NetworkPolicySpec = NetworkPolicySpec()
