"""Whether one connection is allowed, sentence by sentence as the specification has it.

The sentences are those of ``networking.k8s.io/v1`` (its types' comments) and of Kubernetes' page on network policies; where
they leave a choice, docs/policy.md says what is chosen here. Nothing is shared with the compiler, on purpose: what both say
has been thought twice. `tools/mutants.py` makes this file wrong in many ways and looks whether the tables of cases notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hookline.model import (
    EgressRule,
    HostEgressRule,
    HostIngressRule,
    HostPolicy,
    HostPolicyPeer,
    IngressRule,
    IPBlock,
    LabelExpression,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    Pod,
)
from hookline.model.names import Endpoint
from hookline.policy._decision import PROTOCOLS, Address, Decision, Direction, Probe, Side
from hookline.policy._errors import PolicyError
from hookline.policy._words import peer_text, port_text
from hookline.policy._world import World, holder, is_audited

Policy = NetworkPolicy | HostPolicy
Peer = NetworkPolicyPeer | HostPolicyPeer
Rule = IngressRule | EgressRule | HostIngressRule | HostEgressRule

METADATA_NAME = "kubernetes.io/metadata.name"


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection.

    Attributes:
        address: The address that its packets carry.
        pod: The pod in a network of its own that it is.
        node: The name of the node that it is, or that its pod runs on; empty where it is neither.
    """

    address: Address
    pod: Pod | None = None
    node: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """A rule that lets a connection be."""

    policy: str
    rule: int
    peer: str
    port: str


class Evaluator:
    """Answers questions about one world; it remembers which policies isolate whom.

    Args:
        audited: Audited policies count as if they were enforced.
    """

    def __init__(self, world: World, *, audited: bool = False) -> None:
        self.world = world
        self.audited = audited
        self._isolating: dict[tuple[str, Direction], Sequence[Policy]] = {}
        self._known: dict[str, list[End]] = {}
        self._pods: dict[Address, list[Pod]] = {}
        self._nodes: dict[Address, str] = {}
        for pod in world.pods.values():
            if has_network(pod):
                for address in pod.addresses:
                    self._pods.setdefault(address, []).append(pod)
            elif pod.spec.host_network and not pod.has_ended:
                self._nodes.update(dict.fromkeys(pod.addresses, self._node_name(pod.spec.node_name)))
        for name, node in world.nodes.items():
            self._nodes.update(dict.fromkeys(node.service_addresses, self._node_name(name)))
        self._nodes.update(dict.fromkeys(world.addresses, self._node_name(world.node)))

    def decide(self, probe: Probe) -> Decision:
        """The verdict, and what decided.

        Raises:
            PolicyError: An end is not in the world, or the two have no family in common.
        """
        source, destination = self._ends(probe)
        egress = self._side(source, destination, "egress", probe)
        ingress = self._side(destination, source, "ingress", probe)
        # "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the
        # source pod and the ingress policy on the destination pod need to allow the connection."
        return Decision(
            egress.allowed and ingress.allowed, egress, ingress, source.address, destination.address
        )

    def rules_that_allow(self, probe: Probe, direction: Direction) -> list[Match]:
        """Every rule of the end of that direction that lets the connection be, in the policies' order.

        Raises:
            PolicyError: As for `decide`.
        """
        source, destination = self._ends(probe)
        local, remote = (source, destination) if direction == "egress" else (destination, source)
        return list(self._matches(local, remote, direction, probe))

    def node_of(self, address: Address) -> str:
        """The node that has an address, or whose pod has it; empty where neither is known."""
        return self._at(address).node

    def _side(self, local: End, remote: End, direction: Direction, probe: Probe) -> Side:
        """What the end that is local says of a connection that leaves it (egress) or comes to it (ingress)."""
        policies = self._policies(local, direction)
        references = tuple(policy.reference for policy in policies)

        def side(allowed: bool, why: str, match: Match | None = None) -> Side:
            if match is None:
                first = references[0] if references and not allowed else ""
                return Side(allowed, bool(policies), why, first, policies=references)
            return Side(allowed, True, why, match.policy, match.rule, match.peer, match.port, references)

        if not policies:
            return side(True, f"no policy isolates {self._name(local)} for {direction}")
        if is_same_pod(local, remote):
            return side(True, "a pod always reaches itself")
        if is_own_node(local, remote):
            return side(True, f"{self._name(local)} and its own node always reach each other")
        for match in self._matches(local, remote, direction, probe):
            rule = f"{match.policy} {direction}[{match.rule}]"
            return side(True, f"{rule} allows {match.peer}, {match.port}", match)
        if is_default_allowed(policies):
            return side(True, f"the default verdict of {', '.join(references)} is allow")
        packet = f"{_protocol_text(probe)} {'to' if direction == 'egress' else 'from'} {self._name(remote)}"
        return side(
            False,
            f"{self._name(local)} is isolated by {', '.join(references)}, and no rule allows {packet}",
        )

    def _matches(self, local: End, remote: End, direction: Direction, probe: Probe) -> Iterator[Match]:
        destination = remote if direction == "egress" else local
        for policy in self._policies(local, direction):
            for index, rule in enumerate(rules_of(policy, direction)):
                # "The traffic must match both ports and from."
                peer = self._peer(policy, rule.peers, remote)
                port = matching_port(rule.ports, probe, destination)
                if peer is not None and port is not None:
                    yield Match(policy.reference, index, peer, port)

    def _peer(self, policy: Policy, peers: Sequence[Peer], remote: End) -> str | None:
        """The first of a rule's peers that the other end is, in words."""
        # "If this field is empty or missing, this rule matches all sources."
        if not peers:
            return "anybody"
        for peer in peers:
            if self._is_peer(policy, peer, remote):
                return peer_text(peer)
        return None

    def _is_peer(self, policy: Policy, peer: Peer, remote: End) -> bool:
        if peer.ip_block is not None:
            return contains(peer.ip_block, remote.address)
        if isinstance(peer, HostPolicyPeer) and peer.node_selector is not None:
            return is_node(remote) and selects(peer.node_selector, self._node_labels(remote.node))
        pod = remote.pod
        if pod is None:
            return False
        if peer.namespace_selector is None:
            # "Otherwise it selects the pods matching podSelector in the policy's own namespace."
            if pod.namespace != policy.namespace:
                return False
        elif not selects(peer.namespace_selector, self._namespace_labels(pod.namespace)):
            return False
        return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)

    def _policies(self, local: End, direction: Direction) -> Sequence[Policy]:
        """The policies that isolate an end in a direction, by reference."""
        if local.pod is not None:
            key = f"{local.pod.namespace}/{local.pod.name}"
        elif local.node:
            key = f"node/{local.node}"
        else:
            return ()
        found = self._isolating.get((key, direction))
        if found is None:
            candidates: Iterable[Policy]
            if local.pod is not None:
                candidates = self.world.policies.get(local.pod.namespace, {}).values()
            else:
                candidates = self.world.host_policies.values()
            found = sorted(
                (policy for policy in candidates if self._isolates(policy, local, direction)),
                key=lambda policy: policy.reference,
            )
            self._isolating[key, direction] = found
        return found

    def _isolates(self, policy: Policy, local: End, direction: Direction) -> bool:
        # "A pod is isolated for egress if there is any NetworkPolicy that both selects the pod and has "Egress" in its
        # policyTypes."
        if is_audited(policy) and not self.audited:
            return False
        if not concerns(policy, direction):
            return False
        if isinstance(policy, HostPolicy):
            return selects(policy.spec.node_selector, self._node_labels(local.node))
        return local.pod is not None and selects(policy.spec.pod_selector, local.pod.labels)

    def _namespace_labels(self, name: str) -> Mapping[str, str]:
        """A namespace's labels; the API server gives each the label of its name."""
        namespace = self.world.namespaces.get(name)
        return {**(namespace.labels if namespace is not None else {}), METADATA_NAME: name}

    def _node_labels(self, name: str) -> Mapping[str, str]:
        node = self.world.own_node if self.world.is_here(name) else self.world.nodes.get(name)
        return node.labels if node is not None else {}

    def _node_name(self, name: str) -> str:
        """One name for a node that documents give several."""
        return self.world.node if self.world.is_here(name) else name

    def _ends(self, probe: Probe) -> tuple[End, End]:
        for first in self._end(probe.source):
            for second in self._end(probe.destination):
                if first.address.version == second.address.version and probe.version in (
                    None,
                    first.address.version,
                ):
                    return first, second
        family = "family" if probe.version is None else f"IPv{probe.version} address"
        raise PolicyError(
            f"{probe.source} cannot be a client of {probe.destination}",
            why=f"they have no {family} in common",
        )

    def _end(self, text: str) -> list[End]:
        """What a name or address means, one for each of its addresses."""
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._find(text)
        if not known:
            raise PolicyError(
                f"{text} is nobody that a packet can come from or go to",
                why="no document names it, it has ended, or it has no address",
            )
        return known

    def _find(self, text: str) -> list[End]:
        endpoint = Endpoint.parse(text)
        world = self.world
        found: Iterable[Address] = ()
        match endpoint.kind:
            case "address":
                found = (endpoint.address,) if endpoint.address is not None else ()
            case "external" if (external := world.externals.get(endpoint.name)) is not None:
                found = external.addresses
            case "node":
                name = self._node_name(endpoint.name)
                node = world.own_node if world.is_here(name) else world.nodes.get(name)
                found = node.addresses if node is not None else ()
                if not found and world.is_here(name):
                    found = sorted(world.addresses, key=lambda address: (address.version, address))
            case "pod" if (pod := world.pods.get(endpoint.member)) is not None and not pod.has_ended:
                if has_network(pod):
                    node_name = self._node_name(pod.spec.node_name)
                    return [End(address, pod, node_name) for address in pod.addresses]
                found = pod.addresses
        return [self._at(address) for address in found]

    def _at(self, address: Address) -> End:
        """Who has an address."""
        if pods := self._pods.get(address):
            pod = holder(pods)
            return End(address, pod, self._node_name(pod.spec.node_name))
        return End(address, None, self._nodes.get(address, ""))

    def _name(self, end: End) -> str:
        if end.pod is not None:
            return f"{end.pod.namespace}/{end.pod.name} ({end.address})"
        return f"node/{end.node} ({end.address})" if end.node else str(end.address)


def has_network(pod: Pod) -> bool:
    """Whether a pod is one that policies mean: it has a network of its own, and has not ended."""
    return not pod.spec.host_network and not pod.has_ended


def is_node(end: End) -> bool:
    """Whether an end is a node itself."""
    return end.pod is None and bool(end.node)


def is_same_pod(local: End, remote: End) -> bool:
    """Whether a pod talks to itself, which no policy concerns."""
    return local.pod is not None and local.pod is remote.pod


def is_own_node(local: End, remote: End) -> bool:
    """Whether a pod and the node that it runs on talk, or two ends on a node of which one is the node."""
    # "Traffic to and from the node where a Pod is running is always allowed."
    return bool(local.node) and local.node == remote.node and (is_node(local) or is_node(remote))


def is_default_allowed(policies: Sequence[Policy]) -> bool:
    """Whether what no rule allows is allowed nevertheless: HostPolicies alone can say so, and all of them must."""
    return all(
        isinstance(policy, HostPolicy) and policy.spec.default_verdict == "allow" for policy in policies
    )


def concerns(policy: Policy, direction: Direction) -> bool:
    """Whether a policy isolates in a direction those whom it selects."""
    types = policy.spec.policy_types
    if types:
        return direction.capitalize() in types
    # "policies that contain an egress section are assumed to affect egress, and all policies (whether or not they
    # contain an ingress section) are assumed to affect ingress"; the API server takes an empty section for none.
    return direction == "ingress" or bool(policy.spec.egress)


def rules_of(policy: Policy, direction: Direction) -> Sequence[Rule]:
    """A policy's rules for a direction."""
    return policy.spec.ingress if direction == "ingress" else policy.spec.egress


def matching_port(ports: Sequence[NetworkPolicyPort], probe: Probe, destination: End) -> str | None:
    """The first of a rule's ports that a connection is to, in words."""
    # "If this field is empty or missing, this rule matches all ports."
    if not ports:
        return "any port"
    for port in ports:
        if is_port(port, probe, destination):
            return port_text(port)
    return None


def is_port(port: NetworkPolicyPort, probe: Probe, destination: End) -> bool:
    """Whether a connection is to a port of a rule."""
    if PROTOCOLS[port.protocol] != protocol_number(probe):
        return False
    # "If this field is not provided, this matches all port names and numbers."
    if port.port is None:
        return True
    if isinstance(port.port, str):
        return destination.pod is not None and any(
            named.name == port.port and named.protocol == port.protocol and named.container_port == probe.port
            for named in destination.pod.ports
        )
    # "endPort indicates that the range of ports from port to endPort if set, inclusive, should be allowed."
    return port.port <= probe.port <= (port.port if port.end_port is None else port.end_port)


def contains(block: IPBlock, address: Address) -> bool:
    """Whether an address is in a block and in none of its excepts."""
    return address in block.network and not any(address in hole for hole in block.holes)


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether labels fulfil a selector: all of its conditions; an empty one takes everything."""
    for key, value in selector.match_labels.items():
        if labels.get(key) != value:
            return False
    return all(holds(condition, labels) for condition in selector.match_expressions)


def holds(condition: LabelExpression, labels: Mapping[str, str]) -> bool:
    """Whether labels fulfil one condition. What has no such label is "not in" any values."""
    match condition.operator:
        case "In":
            return condition.key in labels and labels[condition.key] in condition.values
        case "NotIn":
            return condition.key not in labels or labels[condition.key] not in condition.values
        case "Exists":
            return condition.key in labels
    return condition.key not in labels


def protocol_number(probe: Probe) -> int:
    """The number of a probe's IP protocol."""
    return probe.protocol if isinstance(probe.protocol, int) else PROTOCOLS[probe.protocol.upper()]


def _protocol_text(probe: Probe) -> str:
    name = f"protocol {probe.protocol}" if isinstance(probe.protocol, int) else probe.protocol.upper()
    return f"{name} {probe.port}" if probe.port else name


def evaluate(world: World, probe: Probe, *, audited: bool = False) -> Decision:
    """The verdict on one connection; for many questions about one world an `Evaluator` is quicker.

    Raises:
        PolicyError: An end is not in the world, or the two have no family in common.
    """
    return Evaluator(world, audited=audited).decide(probe)
