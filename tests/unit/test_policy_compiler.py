"""The rows, looked up as the data path does, say what the evaluator says; and changed rows are those that a fresh start makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from hookline.model import Resource
from hookline.policy import (
    Compiled,
    Compiler,
    Evaluator,
    Probe,
    RuleNumbers,
    World,
    is_audited,
)
from hookline.policy._prefixes import PORT_BITS, port_prefixes
from tests import policy_worlds as worlds
from tests.policy_worlds import Address

ANY, OWN_NODE, WORLD = 0, 2, 1
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1}
QUESTIONS = [(protocol, port) for protocol in worlds.PROTOCOLS for port in worlds.PORTS] + [("ICMP", 0)]


def packed(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


@dataclass
class Rows:
    """Looks compiled rows up as the programs do: the longest prefix of an address, the longest key of a rule."""

    rows: Compiled
    known: dict[Address, tuple[int, str | None]] = field(default_factory=dict)

    def identity(self, address: Address) -> tuple[int, str | None]:
        if address not in self.known:
            self.known[address] = self._identity(address)
        return self.known[address]

    def _identity(self, address: Address) -> tuple[int, str | None]:
        number = int.from_bytes(packed(address), "big")
        for bits in range(128, -1, -1):
            prefix = number >> (128 - bits) << (128 - bits)
            found = self.rows.identities.get((prefix.to_bytes(16, "big"), bits))
            if found is not None:
                return found
        return WORLD, None

    def is_here(self, address: Address) -> bool:
        identity, pod = self.identity(address)
        return identity == OWN_NODE or pod is not None

    def rule(self, rules: int, identity: int, protocol: int, port: int) -> tuple[int, bool] | None:
        for bits in range(PORT_BITS, -1, -1):
            prefix = port >> (PORT_BITS - bits) << (PORT_BITS - bits)
            found = self.rows.rules.get((rules, identity, protocol, prefix, bits))
            if found is not None:
                return found
        return self.rows.rules.get((rules, identity, None, 0, 0))

    def verdict(
        self, rules: int, peer: Address, protocol: int, port: int, *, default: bool = False
    ) -> tuple[bool, int]:
        """Whether a rule set lets a peer be, and the number of the rule that says so (0: none)."""
        if rules == 0:
            return True, 0
        identity, _ = self.identity(peer)
        if identity == OWN_NODE:
            return True, 0
        for number in (identity, ANY):
            if (found := self.rule(rules, number, protocol, port)) is not None:
                return found[1], found[0]
        return default, 0


def local_ends(world: World) -> dict[str, tuple[str, list[Address]]]:
    """What has rows: by its key in them what a probe calls it, and its addresses."""
    found: dict[str, tuple[str, list[Address]]] = {}
    for key, pod in world.pods.items():
        if pod.spec.node_name == world.node and not pod.spec.host_network and not pod.has_ended:
            found[key] = key, list(pod.addresses)
    return found


def peers_of(resources: list[Resource]) -> list[Address]:
    texts = [*worlds.STRANGERS, *(a for pair in worlds.POD_ADDRESSES for a in pair)]
    texts += [address for pair in worlds.NODE_ADDRESSES.values() for address in pair]
    return [ip_address(text) for text in texts]


def check(world: World, rows: Compiled, resources: list[Resource], questions: list[tuple[str, int]]) -> None:
    """Holds the rows against the evaluator, for all ends that have rows and all peers."""
    looked = Rows(rows)
    ends = local_ends(world)
    assert set(rows.endpoints) - {""} == set(ends)
    evaluators = [Evaluator(world)]
    if any(map(is_audited, resources)):
        evaluators.append(Evaluator(world, audited=True))
    own = sorted(world.own_addresses, key=lambda address: (address.version, address))
    everybody = [*ends.items()]
    if own:
        everybody.append(("", (str(own[0]), own)))
    for key, (name, addresses) in everybody:
        row = rows.endpoints.get(key)
        for address in addresses:
            text = name if key else str(address)
            for peer in peers_of(resources):
                if peer.version != address.version or peer in addresses:
                    continue
                if not key and looked.is_here(peer):
                    continue  # does not cross the uplink
                for protocol, port in questions:
                    out = Probe(text, str(peer), protocol, port, address.version)
                    back = Probe(str(peer), text, protocol, port, address.version)
                    number = PROTOCOLS[protocol]
                    for evaluator, (direction, probe) in product(
                        evaluators, (("egress", out), ("ingress", back))
                    ):
                        decision = evaluator.decide(probe)
                        side = decision.egress if direction == "egress" else decision.ingress
                        if row is None:
                            assert not side.isolated, (probe, side)
                            continue
                        rules = row.egress if direction == "egress" else row.ingress
                        default = (
                            row.default_allow_egress if direction == "egress" else row.default_allow_ingress
                        )
                        if evaluator.audited:
                            watched = row.audit_egress if direction == "egress" else row.audit_ingress
                            if watched:
                                rules, default = watched, False
                        allowed, rule = looked.verdict(rules, peer, number, port, default=default)
                        assert allowed == side.allowed, (key, direction, probe, side, rules)
                        if rule:
                            source = rows.sources[rule]
                            assert source.direction == direction
                            matches = evaluator.rules_that_allow(probe, source.direction)
                            assert (source.policy, source.index) in [(m.policy, m.rule) for m in matches]


some_questions = st.lists(
    st.sampled_from((("TCP", 80), ("TCP", 81), *QUESTIONS)), min_size=3, max_size=3, unique=True
)


@settings(max_examples=100, deadline=None)
@given(worlds.worlds(), some_questions)
def test_rows_say_what_the_evaluator_says(
    resources: list[Resource], questions: list[tuple[str, int]]
) -> None:
    world = World.of(resources, node=worlds.NODE)
    check(world, Compiler().compile(world), resources, questions)


@settings(max_examples=50, deadline=None)
@given(
    worlds.worlds(),
    st.lists(worlds.changes(), min_size=1, max_size=4),
    st.sampled_from((32, 32, 6)),
    some_questions,
)
def test_a_change_leaves_what_a_fresh_compiler_makes(
    resources: list[Resource],
    steps: list[list[tuple[Resource, bool]]],
    number_bits: int,
    questions: list[tuple[str, int]],
) -> None:
    numbers = RuleNumbers()
    compiler = Compiler(numbers, number_bits=number_bits)
    world = World.of(resources, node=worlds.NODE)
    compiler.compile(world)
    now = {resource.reference: resource for resource in resources}
    for step in steps:
        gone: list[Resource] = []
        come: list[Resource] = []
        for resource, stays in step:
            if resource.reference in now:
                gone.append(now.pop(resource.reference))
            if stays:
                now[resource.reference] = resource
                come = [other for other in come if other.reference != resource.reference] + [resource]
            else:
                come = [other for other in come if other.reference != resource.reference]
        world = world.changed(gone, come)
        fresh = World.of(now.values(), node=worlds.NODE)
        assert {key: dict(value) for key, value in world.policies.items()} == fresh.policies
        assert world.pods == fresh.pods
        rows = compiler.compile(world)
        assert rows == Compiler(numbers, number_bits=number_bits).compile(fresh)
    check(world, rows, list(now.values()), questions)


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_port_prefixes_are_the_range_and_nothing_else(first: int, last: int) -> None:
    found = [
        port
        for start, bits in port_prefixes(first, last)
        for port in range(start, start + (1 << (PORT_BITS - bits)))
    ]
    assert found == list(range(first, last + 1))
    assert len(list(port_prefixes(first, last))) <= 2 * PORT_BITS - 2 + (first == 0 and last == 65535)
