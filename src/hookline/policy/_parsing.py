"""Policies as the compiler works with them: peers as plain keys, ports as prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hookline.model import (
    HostPolicy,
    HostPolicyPeer,
    IPBlock,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
)
from hookline.policy._compiled import RuleSource
from hookline.policy._decision import PROTOCOLS, Direction
from hookline.policy._prefixes import Block, port_prefixes, prefix_of
from hookline.policy._selecting import EVERYBODY, SelectorKey, selector_key
from hookline.policy._world import is_audited

PortRow = tuple[int | None, int, int]
"""Protocol (None is any), port, and how many of the port's bits count."""

ANY_PORT: PortRow = (None, 0, 0)


class PodPeer(NamedTuple):
    """Pods by labels: of one namespace by its name, or of those that a selector takes."""

    namespace: str | SelectorKey
    pods: SelectorKey


class NodePeer(NamedTuple):
    """Nodes by labels."""

    nodes: SelectorKey


class NamedPort(NamedTuple):
    """A port that pods have by a name."""

    protocol: int
    name: str


PeerKey = PodPeer | NodePeer | Block


class ParsedRule(NamedTuple):
    """One rule.

    Attributes:
        peers: None: anybody.
        rows: Ports by number.
        names: Ports by name.
    """

    source: RuleSource
    peers: tuple[PeerKey, ...] | None
    rows: tuple[PortRow, ...]
    names: tuple[NamedPort, ...]


class ParsedPolicy:
    """One policy.

    Attributes:
        selected: The pods of its namespace that it selects, or the nodes.
        rules: By the directions in which it isolates.
    """

    __slots__ = ("audited", "default_allow", "namespace", "reference", "rules", "selected")

    def __init__(self, policy: NetworkPolicy | HostPolicy) -> None:
        self.reference = policy.reference
        self.namespace = policy.namespace
        self.audited = is_audited(policy)
        self.rules: dict[Direction, tuple[ParsedRule, ...]] = {}
        if isinstance(policy, HostPolicy):
            self.selected = selector_key(policy.spec.node_selector)
            self.default_allow = policy.spec.default_verdict == "allow"
        else:
            self.selected = selector_key(policy.spec.pod_selector)
            self.default_allow = False
        types = policy.spec.effective_types
        if "Ingress" in types:
            self._parse("ingress", ((rule.peers, rule.ports) for rule in policy.spec.ingress))
        if "Egress" in types:
            self._parse("egress", ((rule.peers, rule.ports) for rule in policy.spec.egress))

    def _parse(
        self,
        direction: Direction,
        rules: Iterable[tuple[tuple[NetworkPolicyPeer | HostPolicyPeer, ...], tuple[NetworkPolicyPort, ...]]],
    ) -> None:
        found = []
        for index, (peers, ports) in enumerate(rules):
            keys = tuple(key for peer in peers if (key := self._peer(peer)) is not None) if peers else None
            rows, names = _ports(ports)
            found.append(ParsedRule(RuleSource(self.reference, direction, index), keys, rows, names))
        self.rules[direction] = tuple(found)

    def _peer(self, peer: NetworkPolicyPeer | HostPolicyPeer) -> PeerKey | None:
        if peer.ip_block is not None:
            return _block(peer.ip_block)
        if isinstance(peer, HostPolicyPeer) and peer.node_selector is not None:
            return NodePeer(selector_key(peer.node_selector))
        pods = EVERYBODY if peer.pod_selector is None else selector_key(peer.pod_selector)
        if peer.namespace_selector is None:
            return PodPeer(self.namespace, pods)
        return PodPeer(selector_key(peer.namespace_selector), pods)


def _block(block: IPBlock) -> Block | None:
    prefix = prefix_of(block.network)
    if prefix is None:
        return None
    if not block.except_:
        return Block(prefix, ())
    holes = {hole for network in block.holes if (hole := prefix_of(network)) is not None}
    return Block(prefix, tuple(sorted(holes)))


def _ports(ports: tuple[NetworkPolicyPort, ...]) -> tuple[tuple[PortRow, ...], tuple[NamedPort, ...]]:
    if not ports:
        return (ANY_PORT,), ()
    rows: dict[PortRow, None] = {}
    names: dict[NamedPort, None] = {}
    for port in ports:
        protocol = PROTOCOLS[port.protocol]
        if port.port is None:
            rows[protocol, 0, 0] = None
        elif isinstance(port.port, str):
            names[NamedPort(protocol, port.port)] = None
        else:
            last = port.port if port.end_port is None else port.end_port
            rows.update(
                dict.fromkeys((protocol, first, bits) for first, bits in port_prefixes(port.port, last))
            )
    return tuple(rows), tuple(names)
