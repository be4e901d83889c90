"""From documents to the rows of one node, again and again, for the price of what changed.

An address belongs to a *class*: the set of peers (selectors, ipBlocks, and ports by name) in use on this node that it is one
of. Two addresses of one class are the same to every rule, so a class is an identity, and the longest prefix that has an
address tells its class exactly, however blocks, their excepts and pods overlap. A *rule set* is what one or several policies
say in one direction; pods with the same policies share it. A row of rules joins the two: in this set, this class may have
these ports.

What is kept between calls is indexed both ways, so that a change leads to what it touches: a pod to its class, a class to
the sets that name one of its peers, a policy to its sets.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from hookline.model import NetworkPolicy, Pod
from hookline.policy._compiled import (
    ANY,
    FIRST_CLASS,
    OWN_NODE,
    WORLD,
    Compiled,
    IdentityKey,
    PolicyRow,
    RuleKey,
    RuleSource,
)
from hookline.policy._decision import PROTOCOLS, Direction
from hookline.policy._errors import TooManyRows
from hookline.policy._numbers import ContentNumbers, RuleNumbers, digest_of
from hookline.policy._parsing import ANY_PORT, NamedPort, NodePeer, ParsedPolicy, PeerKey, PodPeer, PortRow
from hookline.policy._prefixes import ADDRESS_BITS, PORT_BITS, Block, Blocks, Prefix, number_of
from hookline.policy._selecting import EVERYBODY, NOBODY, PodIndex, SelectorKey, accepts, drop
from hookline.policy._world import World, holder

K = TypeVar("K")
V = TypeVar("V")

Signature = frozenset[int]
"""A class's peers, by their numbers in this process."""

NAMESPACE_NAME = "kubernetes.io/metadata.name"
BOTH: tuple[Direction, Direction] = ("ingress", "egress")
NODE_ITSELF = ""
FEW = 16
"""So many changed pods are held against every selector one by one; more are found through the index."""
WORTH_COUNTING = 1 << 21
"""Rows beyond the limit are counted, so that the error has the very number, unless there may be more than this."""

OUTGROWN = 1 << 16
"""So many peers that nobody uses any more are remembered before the compiler starts afresh."""


class Facts(NamedTuple):
    """What matters of a pod that has a network of its own."""

    pod: Pod
    namespace: str
    labels: Mapping[str, str]
    addresses: tuple[int, ...]
    ports: tuple[tuple[NamedPort, int], ...]
    is_local: bool


class SetKey(NamedTuple):
    """What makes a rule set: whose rules, and what port names mean where they are the pod's own."""

    direction: Direction
    policies: tuple[str, ...]
    ports: tuple[tuple[NamedPort, int], ...]


class Grant(NamedTuple):
    """What a rule allows a peer. Of several that allow the same, the lowest ``order`` is named."""

    order: int
    rule: int
    rows: tuple[PortRow, ...]
    names: tuple[NamedPort, ...]


class RuleSet:
    """The rules of some policies in one direction.

    Attributes:
        grants: By peer.
        anybody: Rule by ports, for peers of any class.
        uses: Peers and names of ports that its rows depend on.
        sources: Where its rules are written, by number.
        cells: The rows for each class that has any.
    """

    __slots__ = ("anybody", "cells", "digest", "grants", "key", "number", "sources", "uses")

    def __init__(self, key: SetKey) -> None:
        self.key = key
        self.number = 0
        self.digest = digest_of(repr(key))
        self.grants: dict[int, list[Grant]] = {}
        self.anybody: dict[PortRow, int] = {}
        self.uses: set[int] = set()
        self.sources: dict[int, RuleSource] = {}
        self.cells: dict[AddressClass, list[RuleKey]] = {}


class AddressClass:
    """The addresses that are the same to every rule.

    Attributes:
        ports: What names of ports mean there.
        places: How many rows of identities name it.
        sets: The rule sets that have rows for it.
    """

    __slots__ = ("digest", "number", "places", "ports", "sets", "signature")

    def __init__(self, signature: Signature, digest: bytes, ports: dict[NamedPort, list[int]]) -> None:
        self.signature = signature
        self.digest = digest
        self.ports = ports
        self.number = 0
        self.places = 0
        self.sets: set[RuleSet] = set()


class Place(NamedTuple):
    """Who is at a prefix. No signature: the node itself."""

    signature: Signature | None
    pod: str | None


class Compiler:
    """Keeps what it knows between calls. Numbers of rule sets and identities follow from the documents alone: a set's from
    its policies' names (not from what they say), an identity's from the peers that its addresses are.

    Args:
        number: Gives rules their numbers, from 1; the same rule must get the same number each time.
        number_bits: Of sets and identities.
    """

    def __init__(self, number: Callable[[RuleSource], int] | None = None, *, number_bits: int = 32) -> None:
        self._number = number if number is not None else RuleNumbers()
        self._number_bits = number_bits
        self._forget()

    def compile(self, world: World, *, limit: int | None = None) -> Compiled:
        """The rows for the world's node.

        Parts that did not change since the last call are the same objects as then.

        Args:
            limit: How many rows of rules there is room for; None: any number.

        Raises:
            TooManyRows: There are more; the next call starts afresh.
        """
        is_other_node = world.names != self._world.names or world.node != self._world.node
        if is_other_node or len(self._peers) > OUTGROWN + 4 * len(self._sets_of_peer):
            self._forget()
        try:
            with _without_collection():
                self._update(world, limit)
        except BaseException:
            self._forget()  # half of a change is in it
            raise
        return self._result()

    def _forget(self) -> None:
        self._world = World()
        # Pods.
        self._facts: dict[str, Facts] = {}
        self._index = PodIndex()
        self._local: set[str] = set()
        self._host_network: dict[str, Pod] = {}
        self._holders: dict[int, set[str]] = {}
        # Policies.
        self._policies: dict[str, ParsedPolicy] = {}
        self._of_namespace: dict[str, dict[str, ParsedPolicy]] = {}
        self._chosen: dict[str, set[str]] = {}
        # Rule sets.
        self._keys: dict[str, dict[tuple[Direction, bool], SetKey]] = {}
        self._users: dict[SetKey, set[str]] = {}
        self._sets: dict[SetKey, RuleSet] = {}
        self._sets_of_policy: dict[str, set[SetKey]] = {}
        self._sources: dict[int, RuleSource] = {}
        self._source_uses: Counter[int] = Counter()
        # Peers, by number.
        self._peer_numbers: dict[PeerKey | NamedPort | tuple[NamedPort, int], int] = {}
        self._peers: list[PeerKey | NamedPort | tuple[NamedPort, int]] = []
        self._peer_digests: list[bytes] = []
        self._sets_of_peer: dict[int, set[RuleSet]] = {}
        self._pod_peers: dict[int, PodPeer] = {}
        self._members: dict[int, set[str]] = {}
        self._peers_of_pod: dict[str, set[int]] = {}
        self._namespaces: dict[SelectorKey, set[str]] = {}
        # Addresses.
        self._blocks = Blocks()
        self._block_rows: dict[Prefix, Signature] = {}
        self._nodes: dict[int, str | None] = {}
        self._node_peers: dict[str, set[int]] = {}
        self._places: dict[Prefix, Place] = {}
        self._classes: dict[Signature, AddressClass] = {}
        self._classes_of_peer: dict[int, set[AddressClass]] = {}
        # Rows.
        self._set_numbers = ContentNumbers(1, self._number_bits)
        self._class_numbers = ContentNumbers(FIRST_CLASS, self._number_bits)
        self._identities: dict[IdentityKey, tuple[int, str | None]] = {}
        self._rules: dict[RuleKey, tuple[int, bool]] = {}
        self._endpoints: dict[str, PolicyRow] = {}
        self._values: dict[int, tuple[int, bool]] = {}
        self._limit: int | None = None
        # Of one call.
        self._host_network_changed = False
        self._vacated: set[int] = set()
        self._moved_places: list[Prefix] = []
        self._stale = {"identities", "rules", "endpoints", "sources"}
        self._shown: Compiled | None = None

    def _update(self, world: World, limit: int | None) -> None:
        old, self._world = self._world, world
        self._limit = limit
        changed_namespaces = _differing(old.namespaces, world.namespaces)
        touched = self._change_pods(_differing(old.pods, world.pods))
        if changed_namespaces:
            self._namespaces.clear()
            for name in changed_namespaces:
                touched |= self._index.namespaces.get(name, NOBODY)
        affected, stale = self._change_policies(old, world, touched)
        gone, come = self._change_sets(affected, stale)
        left, entered = self._change_uses(gone, come)
        nodes_changed = (
            old.nodes is not world.nodes
            or old.addresses != world.addresses
            or self._host_network_changed
            or any(isinstance(self._peers[peer], NodePeer) for peer in (*left, *entered))
        )
        moved = self._change_members(touched, left, entered)
        old_classes = set(self._classes.values())
        self._change_places(
            moved | touched,
            blocks_changed=any(isinstance(self._peers[peer], Block) for peer in (*left, *entered)),
            nodes_changed=nodes_changed,
        )
        self._change_rows(gone, come, old_classes)
        self._change_endpoints(affected)

    # Pods.

    def _change_pods(self, names: set[str]) -> set[str]:
        """Takes in the pods that changed; returns them, those that are gone too."""
        self._host_network_changed = False
        self._vacated = set()
        for name in names:
            was = self._facts.pop(name, None)
            if was is not None:
                self._index.remove(name, was.namespace, was.labels)
                self._local.discard(name)
                for address in was.addresses:
                    drop(self._holders, address, name)
                self._vacated.update(was.addresses)
            if self._host_network.pop(name, None) is not None:
                self._host_network_changed = True
            pod = self._world.pods.get(name)
            if pod is None or pod.has_ended:
                continue
            if pod.spec.host_network:
                self._host_network[name] = pod
                self._host_network_changed = True
                continue
            facts = Facts(
                pod,
                pod.metadata.namespace,
                pod.metadata.labels,
                tuple(number_of(address) for address in pod.addresses),
                tuple(
                    (NamedPort(PROTOCOLS[port.protocol], port.name), port.container_port)
                    for port in pod.ports
                    if port.name
                ),
                self._world.is_here(pod.spec.node_name),
            )
            if facts.namespace not in self._index.namespaces:
                self._namespaces.clear()
            self._facts[name] = facts
            self._index.add(name, facts.namespace, facts.labels)
            if facts.is_local:
                self._local.add(name)
            for address in facts.addresses:
                self._holders.setdefault(address, set()).add(name)
        return names

    def _namespace_labels(self, name: str) -> Mapping[str, str]:
        namespace = self._world.namespaces.get(name)
        return {**(namespace.metadata.labels if namespace is not None else {}), NAMESPACE_NAME: name}

    # Policies: which of them select whom.

    def _change_policies(self, old: World, world: World, touched: set[str]) -> tuple[set[str], set[str]]:
        """Takes in the policies that changed.

        Returns:
            The local pods (and the node itself) whose policies may be others now, and the policies that say something else.
        """
        affected = {name for name in touched if name in self._local or name in self._chosen}
        stale: set[str] = set()
        for name in affected - self._local:
            del self._chosen[name]
        for namespace in _differing(old.policies, world.policies):
            before, after = old.policies.get(namespace, {}), world.policies.get(namespace, {})
            for name in _differing(before, after):
                for pod in self._replace(before.get(name), after.get(name), stale):
                    affected.add(pod)
        # Pods that changed are held against the policies of their namespace, unless there are so many that it is the same
        # to look the other way round.
        mine = touched & self._local
        if len(mine) <= FEW:
            for name in mine:
                facts = self._facts[name]
                self._chosen[name] = {
                    reference
                    for reference, policy in self._of_namespace.get(facts.namespace, {}).items()
                    if accepts(policy.selected, facts.labels)
                }
        else:
            for name in mine:
                self._chosen[name] = set()
            for namespace in {self._facts[name].namespace for name in mine}:
                for reference, policy in self._of_namespace.get(namespace, {}).items():
                    for name in self._selected(policy) & mine:
                        self._chosen[name].add(reference)
        self._change_host_policies(old, world, affected, stale)
        return affected, stale

    def _replace(
        self, before: NetworkPolicy | None, after: NetworkPolicy | None, stale: set[str]
    ) -> Iterator[str]:
        """Puts a policy in another's place; yields the local pods that either selects."""
        if before is not None:
            parsed = self._policies.pop(before.reference)
            del self._of_namespace[parsed.namespace][parsed.reference]
            stale.add(parsed.reference)
            for name in self._selected(parsed):
                chosen = self._chosen.get(name)
                if chosen is not None:
                    chosen.discard(parsed.reference)
                    yield name
        if after is not None:
            parsed = ParsedPolicy(after)
            self._policies[parsed.reference] = parsed
            self._of_namespace.setdefault(parsed.namespace, {})[parsed.reference] = parsed
            stale.add(parsed.reference)
            for name in self._selected(parsed):
                self._chosen.setdefault(name, set()).add(parsed.reference)
                yield name

    def _selected(self, policy: ParsedPolicy) -> set[str]:
        """The local pods that a policy selects, as the index has them now."""
        pods = self._index.namespaces.get(policy.namespace)
        return set(self._index.find(policy.selected, pods) & self._local) if pods else set()

    def _change_host_policies(self, old: World, world: World, affected: set[str], stale: set[str]) -> None:
        for name in _differing(old.host_policies, world.host_policies):
            before, after = old.host_policies.get(name), world.host_policies.get(name)
            for policy in (before, after):
                if policy is not None:
                    stale.add(policy.reference)
            if before is not None:
                del self._policies[before.reference]
            if after is not None:
                self._policies[after.reference] = ParsedPolicy(after)
        own = world.own_node
        labels: Mapping[str, str] = own.metadata.labels if own is not None else {}
        chosen = {
            policy.reference
            for policy in world.host_policies.values()
            if world.names and accepts(self._policies[policy.reference].selected, labels)
        }
        if chosen != self._chosen.get(NODE_ITSELF, set()) or chosen & stale:
            affected.add(NODE_ITSELF)
        if chosen:
            self._chosen[NODE_ITSELF] = chosen
        elif self._chosen.pop(NODE_ITSELF, None) is not None:
            affected.add(NODE_ITSELF)

    # Rule sets.

    def _change_sets(self, affected: set[str], stale: set[str]) -> tuple[list[RuleSet], list[RuleSet]]:
        """Finds which rule sets pods need now; returns those that go and those that come, both if one says something else."""
        wanted: set[SetKey] = set()
        unwanted: set[SetKey] = set()
        for name in affected:
            keys = self._keys_of(name)
            for key in self._keys.pop(name, {}).values():
                users = self._users[key]
                users.discard(name)
                if not users:
                    unwanted.add(key)
            if keys:
                self._keys[name] = keys
                for key in keys.values():
                    self._users.setdefault(key, set()).add(name)
                    wanted.add(key)
        for reference in stale:
            wanted |= self._sets_of_policy.get(reference, set())
        gone, come = [], []
        for key in unwanted | wanted:
            is_used = bool(self._users.get(key))
            known = self._sets.get(key)
            if not is_used:
                self._users.pop(key, None)
            if known is not None and (not is_used or not stale.isdisjoint(key.policies)):
                gone.append(known)
                del self._sets[key]
                for reference in key.policies:
                    drop(self._sets_of_policy, reference, key)
                known = None
            if is_used and known is None:
                come.append(self._build(key))
                self._sets[key] = come[-1]
                for reference in key.policies:
                    self._sets_of_policy.setdefault(reference, set()).add(key)
        return gone, come

    def _keys_of(self, name: str) -> dict[tuple[Direction, bool], SetKey]:
        """The rule sets that a local pod or the node needs, by direction and whether audited policies count."""
        chosen = self._chosen.get(name)
        if not chosen:
            return {}
        facts = self._facts.get(name)
        keys: dict[tuple[Direction, bool], SetKey] = {}
        policies = [self._policies[reference] for reference in sorted(chosen)]
        for direction in BOTH:
            isolating = [policy for policy in policies if direction in policy.rules]
            enforced = [policy for policy in isolating if not policy.audited]
            if enforced:
                keys[direction, False] = _set_key(direction, enforced, facts)
            if len(enforced) != len(isolating):
                keys[direction, True] = _set_key(direction, isolating, facts)
        return keys

    def _build(self, key: SetKey) -> RuleSet:
        made = RuleSet(key)
        order = 0
        meanings: dict[NamedPort, list[int]] = {}
        for name, port in key.ports:
            meanings.setdefault(name, []).append(port)
        policies = [self._policies[reference] for reference in key.policies]
        for policy in policies:
            for rule in policy.rules[key.direction]:
                order += 1
                number = self._number(rule.source)
                made.sources[number] = rule.source
                rows, names = rule.rows, rule.names
                if names and key.direction == "ingress":
                    # Named ports are the pod's own.
                    rows += tuple(
                        (name.protocol, port, PORT_BITS) for name in names for port in meanings.get(name, ())
                    )
                    names = ()
                made.uses.update(map(self._peer_number, names))
                if rule.peers is None:
                    for row in rows:
                        made.anybody.setdefault(row, number)
                    for name in names:  # whoever has a port of that name
                        made.grants.setdefault(self._peer_number(name), []).append(
                            Grant(order, number, (), (name,))
                        )
                    continue
                grant = Grant(order, number, rows, names)
                for peer in dict.fromkeys(rule.peers):
                    made.grants.setdefault(self._peer_number(peer), []).append(grant)
        if any(policy.audited for policy in policies) and all(policy.default_allow for policy in policies):
            # Where enforced policies say so, the endpoint's own row does.
            made.anybody.setdefault(ANY_PORT, 0)
        made.uses.update(made.grants)
        return made

    def _peer_number(self, peer: PeerKey | NamedPort | tuple[NamedPort, int]) -> int:
        number = self._peer_numbers.get(peer)
        if number is None:
            number = self._peer_numbers[peer] = len(self._peers)
            self._peers.append(peer)
            self._peer_digests.append(digest_of(repr(peer)))
        return number

    # Peers: which pods are which.

    def _change_uses(self, gone: Sequence[RuleSet], come: Sequence[RuleSet]) -> tuple[set[int], set[int]]:
        """Enters rule sets by their peers; returns the peers that nobody uses any more, and those that are newly used."""
        before: set[int] = set()
        after: set[int] = set()
        for old in gone:
            before |= old.uses
            for peer in old.uses:
                drop(self._sets_of_peer, peer, old)
            for number in old.sources:
                self._source_uses[number] -= 1
        known = {peer for peer in before if peer in self._sets_of_peer}
        for new in come:
            for peer in new.uses:
                if peer not in self._sets_of_peer and peer not in before:
                    after.add(peer)
                self._sets_of_peer.setdefault(peer, set()).add(new)
            for number, source in new.sources.items():
                self._source_uses[number] += 1
                if self._sources.get(number) != source:
                    self._sources[number] = source
                    self._stale.add("sources")
        for old in gone:
            for number in old.sources:
                if self._source_uses.get(number) == 0:
                    del self._source_uses[number]
                    del self._sources[number]
                    self._stale.add("sources")
        left = {peer for peer in before - known if peer not in self._sets_of_peer}
        return left, after

    def _change_members(self, touched: set[str], left: set[int], entered: set[int]) -> set[str]:
        """Finds the pods of each peer in use; returns those of which that is another set than before."""
        moved: set[str] = set()
        names: set[NamedPort] = set()
        for peer in left | entered:
            what = self._peers[peer]
            if isinstance(what, NamedPort):
                names.add(what)
        if names:
            moved.update(
                name for name, facts in self._facts.items() if any(port in names for port, _ in facts.ports)
            )
        for peer in left:
            self._pod_peers.pop(peer, None)
            for name in self._members.pop(peer, ()):
                drop(self._peers_of_pod, name, peer)
                moved.add(name)
        if len(touched) <= FEW:
            for name in touched:
                facts = self._facts.get(name)
                now: set[int] = set()
                if facts is not None:
                    labels = self._namespace_labels(facts.namespace)
                    now = {peer for peer, what in self._pod_peers.items() if _is_one_of(what, facts, labels)}
                self._join(name, now)
        else:
            for peer, what in self._pod_peers.items():
                self._enlist(peer, what, moved)
        for peer in entered:
            what = self._peers[peer]
            if isinstance(what, PodPeer):
                self._pod_peers[peer] = what
                self._enlist(peer, what, moved)
        return moved

    def _join(self, name: str, now: set[int]) -> None:
        before = self._peers_of_pod.get(name, set())
        for peer in before - now:
            self._members[peer].discard(name)
        for peer in now - before:
            self._members.setdefault(peer, set()).add(name)
        if now:
            self._peers_of_pod[name] = now
        else:
            self._peers_of_pod.pop(name, None)

    def _enlist(self, peer: int, what: PodPeer, moved: set[str]) -> None:
        """Finds a peer's pods through the index."""
        if isinstance(what.namespace, str):
            within = self._index.namespaces.get(what.namespace)
            now = set(self._index.find(what.pods, within)) if within else set()
        elif what.namespace == EVERYBODY:
            now = set(self._index.find(what.pods))
        else:
            now = set()
            for namespace in self._namespaces_of(what.namespace):
                now |= self._index.find(what.pods, self._index.namespaces[namespace])
        before = self._members.get(peer, set())
        for name in before - now:
            drop(self._peers_of_pod, name, peer)
            moved.add(name)
        for name in now - before:
            self._peers_of_pod.setdefault(name, set()).add(peer)
            moved.add(name)
        self._members[peer] = now

    def _namespaces_of(self, selector: SelectorKey) -> set[str]:
        found = self._namespaces.get(selector)
        if found is None:
            found = self._namespaces[selector] = {
                name for name in self._index.namespaces if accepts(selector, self._namespace_labels(name))
            }
        return found

    # Addresses: of which class each is.

    def _change_places(self, pods: set[str], *, blocks_changed: bool, nodes_changed: bool) -> None:
        prefixes = {Prefix(address, ADDRESS_BITS) for address in self._vacated}
        for name in pods:
            facts = self._facts.get(name)
            if facts is not None:
                prefixes.update(Prefix(address, ADDRESS_BITS) for address in facts.addresses)
        if nodes_changed:
            prefixes.update(Prefix(address, ADDRESS_BITS) for address in self._nodes)
            self._find_nodes()
            prefixes.update(Prefix(address, ADDRESS_BITS) for address in self._nodes)
        if blocks_changed:
            self._blocks = Blocks.of(
                (peer, what) for peer in self._sets_of_peer if isinstance(what := self._peers[peer], Block)
            )
            rows = dict(self._blocks.rows())
            prefixes.update(self._block_rows)
            prefixes.update(rows)
            self._block_rows = rows
            prefixes.update(Prefix(address, ADDRESS_BITS) for address in (*self._holders, *self._nodes))
        for prefix in prefixes:
            before, now = self._places.get(prefix), self._place(prefix)
            if before == now:
                continue
            self._stale.add("identities")
            if now is None:
                del self._places[prefix]
                self._identities.pop(_identity_key(prefix), None)
            else:
                self._places[prefix] = now
                self._count(now.signature, 1)
                self._moved_places.append(prefix)
            if before is not None:
                self._count(before.signature, -1)

    def _find_nodes(self) -> None:
        """Whose address a node's is; None: this node's own."""
        world = self._world
        nodes: dict[int, str | None] = {}
        for pod in self._host_network.values():
            name = pod.spec.node_name
            for address in pod.addresses:
                nodes[number_of(address)] = None if world.is_here(name) else name
        for name, node in world.nodes.items():
            for address in node.service_addresses:
                nodes[number_of(address)] = None if world.is_here(name) else name
        if world.names:
            for address in world.addresses:
                nodes[number_of(address)] = None
        self._nodes = nodes
        self._node_peers = {}
        for peer in self._sets_of_peer:
            what = self._peers[peer]
            if isinstance(what, NodePeer):
                for name in {name for name in nodes.values() if name}:
                    node_labels = world.nodes[name].metadata.labels if name in world.nodes else {}
                    if accepts(what.nodes, node_labels):
                        self._node_peers.setdefault(name, set()).add(peer)

    def _place(self, prefix: Prefix) -> Place | None:
        """Who is at a prefix; None where the next shorter one says it."""
        row = self._block_rows.get(prefix)
        around = Place(row, None) if row is not None else None
        if prefix.bits < ADDRESS_BITS:
            return around
        names = self._holders.get(prefix.number)
        if names:
            if len(names) == 1:
                (name,) = names
            else:
                pod = holder(self._facts[each].pod for each in names)
                name = f"{pod.namespace}/{pod.name}"
            facts = self._facts[name]
            blocks = self._blocks.at(prefix.number)
            signature = blocks.union(self._peers_of_pod.get(name, ()), self._port_peers(facts))
            if facts.is_local:
                return Place(signature, name)
            return around if signature == blocks else Place(signature, None)
        if prefix.number in self._nodes:
            node = self._nodes[prefix.number]
            if node is None:
                return Place(None, None)
            if node in self._node_peers:
                return Place(self._blocks.at(prefix.number) | self._node_peers[node], None)
        return around

    def _port_peers(self, facts: Facts) -> Iterator[int]:
        """What a pod's names of ports add to its class: that it has one, and what it means; only names in use count."""
        for name, port in facts.ports:
            peer = self._peer_numbers.get(name)
            if peer is not None and peer in self._sets_of_peer:
                yield peer
                yield self._peer_number((name, port))

    def _count(self, signature: Signature | None, step: int) -> None:
        if not signature:
            return  # the world, or the node itself
        known = self._classes.get(signature)
        if known is None:
            ports: dict[NamedPort, list[int]] = {}
            for peer in signature:
                what = self._peers[peer]
                if isinstance(what, tuple) and isinstance(what[0], NamedPort):
                    ports.setdefault(what[0], []).append(what[1])
            digest = digest_of(b"".join(sorted(self._peer_digests[peer] for peer in signature)).hex())
            known = self._classes[signature] = AddressClass(signature, digest, ports)
        known.places += step

    # Rows.

    def _change_rows(
        self, gone: Sequence[RuleSet], come: Sequence[RuleSet], old_classes: set[AddressClass]
    ) -> None:
        """Takes out the rows of what went and puts in those of what came.

        Args:
            old_classes: The classes that there were before the change.
        """
        empty = [each for each in self._classes.values() if not each.places]
        for each in empty:
            del self._classes[each.signature]
        lost = [each for each in empty if each in old_classes]
        found = [each for each in self._classes.values() if each not in old_classes]
        for rules in gone:
            self._remove_set(rules)
        for each in lost:
            self._remove_class(each)
        for each in found:
            for peer in each.signature:
                self._classes_of_peer.setdefault(peer, set()).add(each)
        sets_moved = self._set_numbers.change(
            [rules.digest for rules in gone], [rules.digest for rules in come]
        )
        classes_moved = self._class_numbers.change(
            [each.digest for each in lost], [each.digest for each in found]
        )
        for rules in come:
            rules.number = self._set_numbers[rules.digest]
        for each in found:
            each.number = self._class_numbers[each.digest]
        if sets_moved or classes_moved:
            self._renumber()
        else:
            fresh = set(come)
            for rules in come:
                self._fill_set(rules)
            for each in found:
                for rules in _together(each.signature, self._sets_of_peer):
                    if rules not in fresh:
                        self._fill(rules, each)
            for prefix in self._moved_places:
                if (place := self._places.get(prefix)) is not None:
                    self._identities[_identity_key(prefix)] = self._identity(place)
        self._moved_places.clear()
        if gone or come or lost or found:
            self._stale.add("rules")
        if self._limit is not None and len(self._rules) > self._limit:
            raise TooManyRows(len(self._rules), self._limit)

    def _renumber(self) -> None:
        """Writes all rows again: numbers collided, and others than the new ones had to move."""
        self._rules.clear()
        for each in self._classes.values():
            each.number = self._class_numbers[each.digest]
            each.sets.clear()
        for rules in self._sets.values():
            rules.number = self._set_numbers[rules.digest]
            rules.cells.clear()
            self._fill_set(rules)
        for prefix, place in self._places.items():
            self._identities[_identity_key(prefix)] = self._identity(place)
        for name in self._endpoints:
            self._endpoints[name] = self._endpoint(name)
        self._stale |= {"rules", "identities", "endpoints"}

    def _remove_set(self, rules: RuleSet) -> None:
        for each, keys in rules.cells.items():
            each.sets.discard(rules)
            for key in keys:
                del self._rules[key]
        for row in rules.anybody:
            del self._rules[rules.number, ANY, *row]

    def _remove_class(self, each: AddressClass) -> None:
        for peer in each.signature:
            drop(self._classes_of_peer, peer, each)
        for rules in each.sets:
            for key in rules.cells.pop(each):
                del self._rules[key]

    def _fill_set(self, rules: RuleSet) -> None:
        """Puts in the rows of a rule set that has none yet."""
        for row, rule in rules.anybody.items():
            self._rules[rules.number, ANY, *row] = self._value(rule)
        for each in _together(rules.grants, self._classes_of_peer):
            self._fill(rules, each)

    def _fill(self, rules: RuleSet, each: AddressClass) -> None:
        """Puts in what a rule set allows a class."""
        grants = rules.grants
        if len(grants) < len(each.signature):
            found = [grant for peer, given in grants.items() if peer in each.signature for grant in given]
        else:
            found = [grant for peer in each.signature if peer in grants for grant in grants[peer]]
        if len(found) > 1:
            found.sort()
        rows: dict[PortRow, int] = {}
        for grant in found:
            for row in grant.rows:
                rows.setdefault(row, grant.rule)
            for name in grant.names:
                for port in each.ports.get(name, ()):
                    rows.setdefault((name.protocol, port, PORT_BITS), grant.rule)
        if not rows:
            return
        keys = []
        for row, rule in rows.items():
            key = (rules.number, each.number, *row)
            keys.append(key)
            self._rules[key] = self._value(rule)
        rules.cells[each] = keys
        each.sets.add(rules)
        if self._limit is not None and len(self._rules) > max(self._limit, WORTH_COUNTING):
            raise TooManyRows(self._most_rows(), self._limit, is_exact=False)

    def _most_rows(self) -> int:
        """So many rows there are at most, without making them."""
        most = sum(len(rules.anybody) for rules in self._sets.values())
        for rules in self._sets.values():
            for peer, grants in rules.grants.items():
                each = sum(len(grant.rows) + len(grant.names) for grant in grants)
                most += each * len(self._classes_of_peer.get(peer, ()))
        return most

    def _value(self, rule: int) -> tuple[int, bool]:
        """One object for all rows that a rule has."""
        value = self._values.get(rule)
        if value is None:
            value = self._values[rule] = (rule, True)
        return value

    def _identity(self, place: Place) -> tuple[int, str | None]:
        if place.signature is None:
            return OWN_NODE, place.pod
        return self._classes[place.signature].number if place.signature else WORLD, place.pod

    # Endpoints, and the whole.

    def _change_endpoints(self, affected: set[str]) -> None:
        for name in affected:
            if name in self._local or name in self._keys:
                row = self._endpoint(name)
                if self._endpoints.get(name) != row:
                    self._endpoints[name] = row
                    self._stale.add("endpoints")
            elif self._endpoints.pop(name, None) is not None:
                self._stale.add("endpoints")

    def _endpoint(self, name: str) -> PolicyRow:
        keys = self._keys.get(name, {})

        def number(direction: Direction, audited: bool) -> int:
            key = keys.get((direction, audited))
            return self._sets[key].number if key is not None else 0

        def is_default_allowed(direction: Direction) -> bool:
            key = keys.get((direction, False))
            return key is not None and all(
                self._policies[reference].default_allow for reference in key.policies
            )

        return PolicyRow(
            number("ingress", False),
            number("egress", False),
            number("ingress", True),
            number("egress", True),
            is_default_allowed("ingress"),
            is_default_allowed("egress"),
        )

    def _result(self) -> Compiled:
        shown = self._shown
        if shown is None or self._stale:
            stale = self._stale
            self._shown = shown = Compiled(
                self._identities.copy() if shown is None or "identities" in stale else shown.identities,
                self._rules.copy() if shown is None or "rules" in stale else shown.rules,
                self._endpoints.copy() if shown is None or "endpoints" in stale else shown.endpoints,
                self._sources.copy() if shown is None or "sources" in stale else shown.sources,
            )
            self._stale = set()
        return shown


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leaves cycles alone meanwhile: the collector would spend as long on a hundred thousand new rows, none of them garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _differing(before: Mapping[K, V], after: Mapping[K, V]) -> set[K]:
    """The keys under which two mappings have other objects."""
    if before is after:
        return set()
    found = {key for key, value in after.items() if before.get(key) is not value}
    found.update(key for key in before if key not in after)
    return found


def _together(peers: Iterable[int], index: Mapping[int, set[V]]) -> Iterable[V]:
    """What an index has under any of some peers, each once."""
    found = [index[peer] for peer in peers if peer in index]
    return found[0] if len(found) == 1 else set[V]().union(*found)


def _set_key(direction: Direction, policies: Sequence[ParsedPolicy], facts: Facts | None) -> SetKey:
    ports: tuple[tuple[NamedPort, int], ...] = ()
    if direction == "ingress" and facts is not None and facts.ports:
        names = {name for policy in policies for rule in policy.rules[direction] for name in rule.names}
        ports = tuple(sorted({port for port in facts.ports if port[0] in names}))
    return SetKey(direction, tuple(policy.reference for policy in policies), ports)


def _is_one_of(peer: PodPeer, facts: Facts, namespace_labels: Mapping[str, str]) -> bool:
    if isinstance(peer.namespace, str):
        if peer.namespace != facts.namespace:
            return False
    elif not accepts(peer.namespace, namespace_labels):
        return False
    return accepts(peer.pods, facts.labels)


def _identity_key(prefix: Prefix) -> IdentityKey:
    return prefix.number.to_bytes(ADDRESS_BITS // 8, "big"), prefix.bits
