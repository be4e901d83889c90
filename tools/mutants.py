"""Whether the tables of tests/policy notice a wrong evaluator.

    .venv/bin/python -m tools.mutants            tries all of them, exit status 1 if one survives
    .venv/bin/python -m tools.mutants WORD…      those whose sentence has one of these words

A mutant is `hookline.policy._evaluate` with one place changed, and a sentence that says what it gets wrong. It is *killed* by the
first probe of the tables for which it says something else than the table expects. The evaluator as it is must agree with all.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookline import policy, trials
from hookline.model.names import Endpoint

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "hookline" / "policy" / "_evaluate.py"
TABLES = ROOT / "tests" / "policy"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong evaluator: one text of its source, which stands there once, in another's place."""

    says: str
    right: str
    wrong: str


MUTANTS = (
    # Both ends.
    Mutant(
        "One end that allows is enough.",
        "egress.allowed and ingress.allowed, egress",
        "egress.allowed or ingress.allowed, egress",
    ),
    Mutant(
        "Only the destination's policies count.",
        "egress.allowed and ingress.allowed, egress",
        "ingress.allowed, egress",
    ),
    Mutant(
        "Only the source's policies count.",
        "egress.allowed and ingress.allowed, egress",
        "egress.allowed, egress",
    ),
    # Isolation.
    Mutant(
        "A policy isolates in both directions, whatever its types are.",
        "        if not concerns(policy, direction):\n            return False\n",
        "",
    ),
    Mutant(
        "A policy without policyTypes is for ingress alone, even with egress rules.",
        'return direction == "ingress" or bool(policy.spec.egress)',
        'return direction == "ingress"',
    ),
    Mutant(
        "A policy without policyTypes is for both directions.",
        'return direction == "ingress" or bool(policy.spec.egress)',
        "return True",
    ),
    Mutant(
        "A policy without policyTypes is for ingress only where it has ingress rules.",
        'return direction == "ingress" or bool(policy.spec.egress)',
        "return bool(rules_of(policy, direction))",
    ),
    Mutant(
        "A policy without policyTypes that has egress rules is for egress alone.",
        'return direction == "ingress" or bool(policy.spec.egress)',
        'return bool(policy.spec.egress) == (direction == "egress")',
    ),
    Mutant(
        "policyTypes are ignored, and follow from the rules.",
        "    if types:\n        return direction.capitalize() in types\n",
        "",
    ),
    Mutant(
        "Rules of a direction that policyTypes leave out count as if it was there.",
        "return direction.capitalize() in types",
        "return direction.capitalize() in types or bool(rules_of(policy, direction))",
    ),
    Mutant(
        "A policy without rules isolates nobody.",
        "return direction.capitalize() in types",
        "return direction.capitalize() in types and bool(rules_of(policy, direction))",
    ),
    Mutant(
        "A pod that no policy selects is isolated.",
        'return side(True, f"no policy isolates {self._name(local)} for {direction}")',
        'return side(local.pod is None, "")',
    ),
    Mutant(
        "Every policy of the namespace is for every pod of it.",
        "return local.pod is not None and selects(policy.spec.pod_selector, local.pod.labels)",
        "return local.pod is not None",
    ),
    Mutant(
        "A policy whose podSelector is empty selects nobody.",
        "return local.pod is not None and selects(policy.spec.pod_selector, local.pod.labels)",
        "return local.pod is not None and policy.spec.pod_selector != LabelSelector() "
        "and selects(policy.spec.pod_selector, local.pod.labels)",
    ),
    Mutant(
        "A policy selects pods of all namespaces.",
        "candidates = self.world.policies.get(local.pod.namespace, {}).values()",
        "candidates = [one for mine in self.world.policies.values() for one in mine.values()]",
    ),
    Mutant(
        "Of several policies that select a pod only the first counts.",
        "            self._isolating[key, direction] = found\n",
        "            found = self._isolating[key, direction] = found[:1]\n",
    ),
    Mutant(
        "Of several policies that select a pod only the last counts.",
        "            self._isolating[key, direction] = found\n",
        "            found = self._isolating[key, direction] = found[-1:]\n",
    ),
    Mutant(
        "All policies that select a pod must allow, instead of one.",
        "        for match in self._matches(local, remote, direction, probe):\n            rule =",
        "        matches = list(self._matches(local, remote, direction, probe))\n"
        "        for match in matches if {m.policy for m in matches} == {*references} else ():\n            rule =",
    ),
    Mutant(
        "Ingress rules are taken for egress, and the other way round.",
        'return policy.spec.ingress if direction == "ingress" else policy.spec.egress',
        'return policy.spec.egress if direction == "ingress" else policy.spec.ingress',
    ),
    Mutant(
        "An audited policy isolates as any other.",
        "        if is_audited(policy) and not self.audited:\n            return False\n",
        "",
    ),
    # Rules.
    Mutant(
        "Of a policy's rules only the first counts.",
        "enumerate(rules_of(policy, direction))",
        "enumerate(rules_of(policy, direction)[:1])",
    ),
    Mutant(
        "A rule matches when its peers or its ports do.",
        "if peer is not None and port is not None:",
        "if peer is not None or port is not None:",
    ),
    Mutant("Peers are ignored.", "if peer is not None and port is not None:", "if port is not None:"),
    Mutant("Ports are ignored.", "if peer is not None and port is not None:", "if peer is not None:"),
    Mutant("A rule without peers is for nobody.", 'return "anybody"', "return None"),
    Mutant(
        "A rule without peers is for pods alone.",
        'return "anybody"',
        'return "anybody" if remote.pod is not None else None',
    ),
    Mutant(
        "A rule without peers is for pods of the policy's own namespace.",
        'return "anybody"',
        'return "anybody" if remote.pod is None or remote.pod.namespace == policy.namespace else None',
    ),
    Mutant(
        "Of a rule's peers only the first counts.",
        "for peer in peers:\n            if self._is_peer",
        "for peer in peers[:1]:\n            if self._is_peer",
    ),
    Mutant(
        "The other end must be all of a rule's peers.",
        "        for peer in peers:\n            if self._is_peer(policy, peer, remote):\n",
        "        for peer in peers:\n            if all(self._is_peer(policy, each, remote) for each in peers):\n",
    ),
    # Pods and namespaces.
    Mutant(
        "podSelector alone takes pods of all namespaces.",
        "if pod.namespace != policy.namespace:",
        "if False:",
    ),
    Mutant(
        "podSelector beside namespaceSelector is ignored.",
        "return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)",
        "return peer.pod_selector is None or peer.namespace_selector is not None "
        "or selects(peer.pod_selector, pod.labels)",
    ),
    Mutant(
        "namespaceSelector beside podSelector is ignored.",
        "elif not selects(peer.namespace_selector, self._namespace_labels(pod.namespace)):",
        "elif peer.pod_selector is None and not selects(peer.namespace_selector, "
        "self._namespace_labels(pod.namespace)):",
    ),
    Mutant(
        "podSelector and namespaceSelector of one item are either, not both.",
        "        return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)\n",
        "        return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)\n\n"
        "    def _is_peer(self, policy, peer, remote, *, whole=_is_peer):\n"
        "        if peer.pod_selector is None or peer.namespace_selector is None:\n"
        "            return whole(self, policy, peer, remote)\n"
        "        parts = ({'pod_selector': None}, {'namespace_selector': None})\n"
        "        return any(whole(self, policy, peer.model_copy(update=part), remote) for part in parts)\n",
    ),
    Mutant(
        "namespaceSelector reaches the policy's own namespace whatever its labels are.",
        "elif not selects(peer.namespace_selector, self._namespace_labels(pod.namespace)):",
        "elif pod.namespace != policy.namespace and not selects(peer.namespace_selector, "
        "self._namespace_labels(pod.namespace)):",
    ),
    Mutant(
        "An empty namespaceSelector takes nothing.",
        "elif not selects(peer.namespace_selector, self._namespace_labels(pod.namespace)):",
        "elif peer.namespace_selector == LabelSelector() or not selects(peer.namespace_selector, "
        "self._namespace_labels(pod.namespace)):",
    ),
    Mutant(
        "An empty namespaceSelector takes everybody, machines outside too.",
        "        if pod is None:\n            return False\n",
        "        if pod is None:\n            return peer.namespace_selector == LabelSelector()\n",
    ),
    Mutant(
        "An empty podSelector of a peer takes nothing.",
        "return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)",
        "return peer.pod_selector is None or (peer.pod_selector != LabelSelector() "
        "and selects(peer.pod_selector, pod.labels))",
    ),
    Mutant(
        "A missing podSelector beside namespaceSelector takes nothing.",
        "return peer.pod_selector is None or selects(peer.pod_selector, pod.labels)",
        "return peer.pod_selector is not None and selects(peer.pod_selector, pod.labels)",
    ),
    Mutant(
        "namespaceSelector is held against the pod's labels.",
        "elif not selects(peer.namespace_selector, self._namespace_labels(pod.namespace)):",
        "elif not selects(peer.namespace_selector, pod.labels):",
    ),
    Mutant(
        "A namespace has not the label kubernetes.io/metadata.name by itself.",
        "return {**(namespace.labels if namespace is not None else {}), METADATA_NAME: name}",
        "return namespace.labels if namespace is not None else {}",
    ),
    Mutant(
        "A namespace may lie about its name.",
        "return {**(namespace.labels if namespace is not None else {}), METADATA_NAME: name}",
        "return {METADATA_NAME: name, **(namespace.labels if namespace is not None else {})}",
    ),
    Mutant(
        "Pods that have ended keep their addresses.",
        "return not pod.spec.host_network and not pod.has_ended",
        "return not pod.spec.host_network",
    ),
    Mutant(
        "A pod in its node's network is a pod as any other.",
        "return not pod.spec.host_network and not pod.has_ended",
        "return not pod.has_ended",
    ),
    Mutant(
        "A pod that is going away is no peer any longer.",
        "return not pod.spec.host_network and not pod.has_ended",
        "return not pod.spec.host_network and not pod.has_ended and not pod.is_terminating",
    ),
    Mutant(
        "A pod that is not ready is no peer.",
        "return not pod.spec.host_network and not pod.has_ended",
        "return not pod.spec.host_network and not pod.has_ended and pod.is_ready",
    ),
    Mutant(
        "A pod is known by its first address alone.",
        "for address in pod.addresses:\n                    self._pods",
        "for address in pod.addresses[:1]:\n                    self._pods",
    ),
    # Blocks.
    Mutant(
        "except is ignored.",
        "return address in block.network and not any(address in hole for hole in block.holes)",
        "return address in block.network",
    ),
    Mutant(
        "Of the excepts only the first counts.",
        "not any(address in hole for hole in block.holes)",
        "not any(address in hole for hole in block.holes[:1])",
    ),
    Mutant(
        "except denies the address, whatever other blocks of the rule say.",
        "        for peer in peers:\n            if self._is_peer(policy, peer, remote):\n",
        "        if any(remote.address in hole for p in peers if p.ip_block for hole in p.ip_block.holes):\n"
        "            return None\n"
        "        for peer in peers:\n            if self._is_peer(policy, peer, remote):\n",
    ),
    Mutant(
        "ipBlock does not take pods.",
        "return contains(peer.ip_block, remote.address)",
        "return remote.pod is None and contains(peer.ip_block, remote.address)",
    ),
    Mutant(
        "ipBlock takes pods whatever except says.",
        "return contains(peer.ip_block, remote.address)",
        "return contains(peer.ip_block, remote.address) or (remote.pod is not None "
        "and remote.address in peer.ip_block.network)",
    ),
    Mutant(
        "A block 0.0.0.0/0 is IPv6 too.",
        "return address in block.network and not",
        "return (address in block.network or block.network.prefixlen == 0) and not",
    ),
    Mutant(
        "ipBlock is held against the local end's address.",
        "peer = self._peer(policy, rule.peers, remote)",
        "peer = self._peer(policy, rule.peers, End(local.address, remote.pod, remote.node))",
    ),
    Mutant(
        "A block's first address is not in it.",
        "return address in block.network and not",
        "return address in block.network and (block.network.num_addresses == 1 "
        "or address != block.network.network_address) and not",
    ),
    # Ports.
    Mutant("A rule without ports allows no port.", 'return "any port"', "return None"),
    Mutant(
        "A rule without ports is for TCP alone.",
        'return "any port"',
        'return "any port" if protocol_number(probe) == PROTOCOLS["TCP"] else None',
    ),
    Mutant(
        "A rule without ports is for TCP and UDP alone.",
        'return "any port"',
        'return "any port" if protocol_number(probe) != PROTOCOLS["SCTP"] else None',
    ),
    Mutant(
        "Of a rule's ports only the first counts.",
        "    for port in ports:\n",
        "    for port in ports[:1]:\n",
    ),
    Mutant(
        "A port is of any protocol.",
        "if PROTOCOLS[port.protocol] != protocol_number(probe):",
        "if False:",
    ),
    Mutant(
        "A port without protocol is of any.",
        "if PROTOCOLS[port.protocol] != protocol_number(probe):",
        'if "protocol" in port.model_fields_set and PROTOCOLS[port.protocol] != protocol_number(probe):',
    ),
    Mutant(
        "A protocol without port allows no port.",
        "    if port.port is None:\n        return True\n",
        "    if port.port is None:\n        return False\n",
    ),
    Mutant("endPort is ignored.", "port.port if port.end_port is None else port.end_port)", "port.port)"),
    Mutant(
        "endPort itself is beyond the range.",
        "port.port if port.end_port is None else port.end_port)",
        "port.port if port.end_port is None else max(port.port, port.end_port - 1))",
    ),
    Mutant(
        "A range begins after its first port.",
        "return port.port <= probe.port <=",
        "return port.port + (port.end_port is not None) <= probe.port <=",
    ),
    Mutant(
        "A range has no end.",
        "return port.port <= probe.port <= (port.port if port.end_port is None else port.end_port)",
        "return port.port <= probe.port and (port.end_port is not None or port.port == probe.port)",
    ),
    Mutant("A port allows all below it.", "return port.port <= probe.port <=", "return probe.port <="),
    Mutant(
        "The names of ports are the source's.",
        'destination = remote if direction == "egress" else local',
        'destination = local if direction == "egress" else remote',
    ),
    Mutant(
        "A named port of egress means the source's own.",
        'destination = remote if direction == "egress" else local',
        "destination = local",
    ),
    Mutant(
        "A named port is its number with any protocol.",
        "named.name == port.port and named.protocol == port.protocol and",
        "named.name == port.port and",
    ),
    Mutant(
        "A named port allows nothing.",
        "named.name == port.port and named.protocol == port.protocol and",
        "False and",
    ),
    Mutant(
        "A named port is any that the pod declares.",
        "named.name == port.port and named.protocol == port.protocol and",
        "named.protocol == port.protocol and",
    ),
    Mutant(
        "A named port is any port of a pod that declares the name.",
        "and named.container_port == probe.port",
        "",
    ),
    Mutant(
        "A named port is the same number on every pod: that of the first pod that was asked about.",
        "for named in destination.pod.ports",
        "for named in is_port.__dict__.setdefault((port.port, port.protocol), destination.pod.ports)",
    ),
    Mutant(
        "A port's name is looked for in the pod's first container.",
        "for named in destination.pod.ports",
        "for container in destination.pod.spec.containers[:1]\n            for named in container.ports",
    ),
    # Selectors.
    Mutant(
        "matchLabels takes whoever has one of the labels.",
        "        if labels.get(key) != value:\n            return False\n",
        "        if labels.get(key) == value:\n            break\n    else:\n"
        "        if selector.match_labels:\n            return False\n",
    ),
    Mutant(
        "matchLabels looks at keys alone.",
        "        if labels.get(key) != value:\n",
        "        if key not in labels:\n",
    ),
    Mutant(
        "matchExpressions is ignored.",
        "return all(holds(condition, labels) for condition in selector.match_expressions)",
        "return True",
    ),
    Mutant(
        "Of matchExpressions one must hold, not all.",
        "return all(holds(condition, labels) for condition in selector.match_expressions)",
        "return not selector.match_expressions or any(\n"
        "        holds(condition, labels) for condition in selector.match_expressions\n    )",
    ),
    Mutant(
        "matchLabels is ignored where there are matchExpressions.",
        "for key, value in selector.match_labels.items():",
        "for key, value in selector.match_labels.items() if not selector.match_expressions else ():",
    ),
    Mutant(
        "In takes its first value alone.",
        "labels[condition.key] in condition.values\n        case",
        "labels[condition.key] in condition.values[:1]\n        case",
    ),
    Mutant(
        "NotIn asks that the label is there.",
        "return condition.key not in labels or labels[condition.key] not in condition.values",
        "return condition.key in labels and labels[condition.key] not in condition.values",
    ),
    Mutant(
        "NotIn is In.",
        "return condition.key not in labels or labels[condition.key] not in condition.values",
        "return condition.key in labels and labels[condition.key] in condition.values",
    ),
    Mutant(
        "Exists takes everybody.",
        '        case "Exists":\n            return condition.key in labels\n',
        '        case "Exists":\n            return True\n',
    ),
    Mutant(
        "Exists asks for a value that is not empty.",
        '        case "Exists":\n            return condition.key in labels\n',
        '        case "Exists":\n            return bool(labels.get(condition.key))\n',
    ),
    Mutant(
        "DoesNotExist takes everybody.",
        "    return condition.key not in labels\n\n",
        "    return True\n\n",
    ),
    # Nodes.
    Mutant(
        "A node does not reach its own pods.",
        "        if is_own_node(local, remote):\n",
        '        if is_own_node(local, remote) and direction == "egress":\n',
    ),
    Mutant(
        "A pod does not reach its own node.",
        "        if is_own_node(local, remote):\n",
        '        if is_own_node(local, remote) and direction == "ingress":\n',
    ),
    Mutant(
        "Every node reaches every pod.",
        "return bool(local.node) and local.node == remote.node and (is_node(local) or is_node(remote))",
        "return bool(local.node) and bool(remote.node) and (is_node(local) or is_node(remote))",
    ),
    Mutant(
        "Pods of one node always reach each other.",
        "local.node == remote.node and (is_node(local) or is_node(remote))",
        "local.node == remote.node",
    ),
    Mutant(
        "A HostPolicy is for every node.",
        "return selects(policy.spec.node_selector, self._node_labels(local.node))",
        "return True",
    ),
    Mutant(
        "A HostPolicy denies what no rule allows, whatever its defaultVerdict is.",
        "        if is_default_allowed(policies):\n",
        "        if False:\n",
    ),
    Mutant(
        "Of several HostPolicies one that allows by default is enough.",
        "    return all(\n        isinstance(policy, HostPolicy)",
        "    return any(\n        isinstance(policy, HostPolicy)",
    ),
    Mutant(
        "nodeSelector of a peer takes every node.",
        "return is_node(remote) and selects(peer.node_selector, self._node_labels(remote.node))",
        "return is_node(remote)",
    ),
    Mutant(
        "nodeSelector of a peer takes the pods of these nodes too.",
        "return is_node(remote) and selects(peer.node_selector, self._node_labels(remote.node))",
        "return bool(remote.node) and selects(peer.node_selector, self._node_labels(remote.node))",
    ),
    Mutant(
        "A HostPolicy isolates the node's pods.",
        "candidates = self.world.policies.get(local.pod.namespace, {}).values()",
        "candidates = [*self.world.policies.get(local.pod.namespace, {}).values(), "
        "*self.world.host_policies.values()]",
    ),
    Mutant(
        "A pod's policies keep it from itself.",
        "    return local.pod is not None and local.pod is remote.pod\n",
        "    return False\n",
    ),
    Mutant(
        "Blocks are of IPv4 alone.",
        "return address in block.network and not",
        "return address.version == 4 and address in block.network and not",
    ),
    Mutant(
        "Excepts are of IPv4 alone.",
        "not any(address in hole for hole in block.holes)",
        "not any(address in hole for hole in block.holes if hole.version == 4)",
    ),
    Mutant(
        "An address outside is in no pod's blocks, and so allowed.",
        "        pod = remote.pod\n        if pod is None:\n            return False\n",
        "        pod = remote.pod\n        if pod is None:\n            return not remote.node\n",
    ),
    Mutant(
        "The policies of the destination's namespace are for the source too.",
        "candidates = self.world.policies.get(local.pod.namespace, {}).values()",
        "candidates = [one for name, mine in self.world.policies.items() for one in mine.values()\n"
        '                    if name == local.pod.namespace or direction == "egress"]',
    ),
    Mutant(
        "A range is of TCP alone.",
        "return port.port <= probe.port <= (port.port if port.end_port is None else port.end_port)",
        "return port.port <= probe.port <= (\n"
        '        port.port if port.end_port is None or port.protocol != "TCP" else port.end_port\n    )',
    ),
    Mutant(
        "SCTP is not looked at.",
        "if PROTOCOLS[port.protocol] != protocol_number(probe):",
        'if PROTOCOLS[port.protocol] != protocol_number(probe) != PROTOCOLS["SCTP"]:',
    ),
    Mutant(
        "UDP is allowed where TCP is.",
        "if PROTOCOLS[port.protocol] != protocol_number(probe):",
        'if PROTOCOLS[port.protocol] != protocol_number(probe) != PROTOCOLS["UDP"]:',
    ),
    Mutant(
        "NotIn looks at its first value alone.",
        "labels[condition.key] not in condition.values\n",
        "labels[condition.key] not in condition.values[:1]\n",
    ),
    Mutant(
        "A label that is there and empty is one that is not there.",
        "    for key, value in selector.match_labels.items():\n",
        "    labels = {key: value for key, value in labels.items() if value}\n"
        "    for key, value in selector.match_labels.items():\n",
    ),
    Mutant(
        "Only pods of the namespace default have names of ports.",
        "return destination.pod is not None and any(",
        'return destination.pod is not None and destination.pod.namespace == "default" and any(',
    ),
    Mutant(
        "A HostPolicy's egress is not looked at.",
        "            return selects(policy.spec.node_selector, self._node_labels(local.node))\n",
        '            return direction == "ingress" and selects(\n'
        "                policy.spec.node_selector, self._node_labels(local.node)\n            )\n",
    ),
    Mutant(
        "A HostPolicy is for the connections of a node and its own pods too.",
        "local.node == remote.node and (is_node(local) or is_node(remote))",
        "local.node == remote.node and is_node(remote)",
    ),
)


def evaluator(mutant: Mutant | None = None) -> type[policy.Evaluator]:
    """The evaluator, or a wrong one.

    Raises:
        ValueError: The text that a mutant changes does not stand in the source once.
    """
    text = SOURCE.read_text()
    if mutant is not None:
        if text.count(mutant.right) != 1:
            raise ValueError(
                f"{mutant.says} changes a text that is {text.count(mutant.right)} times in {SOURCE.name}: {mutant.right!r}"
            )
        text = text.replace(mutant.right, mutant.wrong)
    module = types.ModuleType("hookline.policy._mutant")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(text, str(SOURCE), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    found: type[policy.Evaluator] = module.Evaluator
    return found


def first_mismatch(made: type[policy.Evaluator], steps: Sequence[trials.Step]) -> str | None:
    """The first probe for which an evaluator says something else than its table, in words; None where it agrees with all."""
    for step in steps:
        answers: Any = made(policy.World.of(step.resources))
        for asked in step.asked:
            source = Endpoint.parse(asked.source).member
            probe = policy.Probe(source, asked.destination, asked.protocol, asked.listening, asked.family)
            where = f"{step.test}, step {step.number}: {source} to {asked.destination}:{asked.listening}/{asked.protocol}"
            try:
                allowed = answers.decide(probe).allowed
            except policy.PolicyError as error:
                return f"{where}: {error}"
            if allowed != (asked.expect == "allow"):
                return f"{where}, expected {asked.expect}"
    return None


def main(words: Sequence[str]) -> int:
    """Tries the mutants whose sentences have one of the words, or all; 1 where one survives."""
    steps = trials.read_tables([TABLES])
    if (wrong := first_mismatch(evaluator(), steps)) is not None:
        print(f"the evaluator itself does not agree with the tables: {wrong}")
        return 1
    chosen = [one for one in MUTANTS if not words or any(word.lower() in one.says.lower() for word in words)]
    survivors = 0
    for mutant in chosen:
        killer = first_mismatch(evaluator(mutant), steps)
        survivors += killer is None
        print(f"{'SURVIVES' if killer is None else 'killed  '}  {mutant.says}")
        if killer is not None and words:
            print(f"          {killer}")
    print(
        f"{len(chosen) - survivors} of {len(chosen)} wrong evaluators are killed by {TABLES.relative_to(ROOT)}"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
