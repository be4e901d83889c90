"""The rows, looked up as the data path does, say what the evaluator says; and changed rows are those that a fresh start makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import product
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline.model import Resource
from hookline.policy import (
    Compiled,
    Compiler,
    Evaluator,
    PolicyRow,
    Probe,
    RuleNumbers,
    RuleSource,
    TooManyRows,
    World,
    is_audited,
)
from hookline.policy._numbers import ContentNumbers, digest_of
from hookline.policy._prefixes import PORT_BITS, port_prefixes
from tests import policy_worlds as worlds
from tests.policy_worlds import Address, netpol, pod

Test = TypeVar("Test", bound=Callable[..., None])
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
    for key, one in world.pods.items():
        if one.spec.node_name == world.node and not one.spec.host_network and not one.has_ended:
            found[key] = key, list(one.addresses)
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


def rows_say_what_the_evaluator_says(resources: list[Resource], questions: list[tuple[str, int]]) -> None:
    world = World.of(resources, node=worlds.NODE)
    check(world, Compiler().compile(world), resources, questions)


def a_change_leaves_what_a_fresh_compiler_makes(
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


random_worlds = given(worlds.worlds(), some_questions)
random_changes = given(
    worlds.worlds(),
    st.lists(worlds.changes(), min_size=1, max_size=4),
    st.sampled_from((32, 32, 6)),
    some_questions,
)
quick, thorough = settings(max_examples=50, deadline=None), settings(max_examples=500, deadline=None)


def slow(test: Test) -> Test:
    marked: Test = pytest.mark.slow(pytest.mark.timeout(1200)(test))
    return marked


test_rows = quick(random_worlds(rows_say_what_the_evaluator_says))
test_changes = quick(random_changes(a_change_leaves_what_a_fresh_compiler_makes))
test_many_rows = slow(thorough(random_worlds(rows_say_what_the_evaluator_says)))
test_many_changes = slow(thorough(random_changes(a_change_leaves_what_a_fresh_compiler_makes)))


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_port_prefixes_are_the_range_and_nothing_else(first: int, last: int) -> None:
    found = [
        port
        for start, bits in port_prefixes(first, last)
        for port in range(start, start + (1 << (PORT_BITS - bits)))
    ]
    assert found == list(range(first, last + 1))
    assert len(list(port_prefixes(first, last))) <= 2 * PORT_BITS - 2 + (first == 0 and last == 65535)


# What random worlds seldom have.


def rows_of(*resources: Resource) -> Rows:
    return Rows(Compiler().compile(World.of(resources, node="n")))


def verdict(rows: Rows, key: str, direction: str, peer: str, port: int = 80, protocol: int = 6) -> bool:
    rules: int = getattr(rows.rows.endpoints[key], direction)
    return rows.verdict(rules, ip_address(peer), protocol, port)[0]


def test_names_of_ports_are_each_pods_own() -> None:
    def web(name: str, number: int, *ports: dict[str, object]) -> Resource:
        return pod(name, number, metadata={"labels": {"app": "web"}}, containers=[{"ports": list(ports)}])

    http = {"name": "http", "containerPort": 8080}
    one, two = web("one", 1, http), web("two", 2, {**http, "containerPort": 8081})
    three = web("three", 3, {**http, "protocol": "UDP"})
    to_web = {"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}
    client = pod("client", 4)
    egress = netpol(
        "egress", podSelector={"matchLabels": {"app": "client"}}, policyTypes=["Egress"], egress=[to_web]
    )
    rows = rows_of(one, two, three, client, egress)
    for number, port in ((1, 8080), (2, 8081)):
        for other in (8080, 8081):
            for peer in (f"10.0.0.{number}", f"fd00::{number}"):
                assert verdict(rows, "default/client", "egress", peer, other) == (port == other)
    assert not verdict(rows, "default/client", "egress", "10.0.0.3", 8080)
    anywhere = netpol(
        "egress",
        podSelector={"matchLabels": {"app": "client"}},
        policyTypes=["Egress"],
        egress=[{"ports": [{"port": "http"}]}],
    )
    rows = rows_of(one, two, three, client, anywhere)
    assert verdict(rows, "default/client", "egress", "10.0.0.2", 8081)
    assert not verdict(rows, "default/client", "egress", "10.0.0.2", 8080)
    assert not verdict(rows, "default/client", "egress", "192.0.2.1", 8081)
    ingress = netpol("ingress", podSelector={}, ingress=[{"ports": [{"port": "http"}]}])
    rows = rows_of(one, two, three, client, ingress)
    assert verdict(rows, "default/one", "ingress", "192.0.2.1", 8080)
    assert not verdict(rows, "default/two", "ingress", "192.0.2.1", 8080)
    assert not verdict(rows, "default/three", "ingress", "192.0.2.1", 8080)
    assert not verdict(rows, "default/client", "ingress", "192.0.2.1", 8080)


def test_a_port_that_gets_a_name_is_allowed_from_then_on() -> None:
    policy = netpol(
        "egress",
        podSelector={"matchLabels": {"app": "a"}},
        policyTypes=["Egress"],
        egress=[{"ports": [{"port": "http"}]}],
    )
    before = pod("b", 2)
    after = pod("b", 2, containers=[{"ports": [{"name": "http", "containerPort": 80}]}])
    world = World.of([pod("a", 1), before, policy], node="n")
    compiler = Compiler()
    assert not verdict(Rows(compiler.compile(world)), "default/a", "egress", "10.0.0.2")
    assert verdict(
        Rows(compiler.compile(world.changed([before], [after]))), "default/a", "egress", "10.0.0.2"
    )


def test_all_of_ipv6_is_not_ipv4() -> None:
    policy = netpol("six", ingress=[{"from": [{"ipBlock": {"cidr": "::/0", "except": ["2001:db8::/32"]}}]}])
    rows = rows_of(pod("a", 1), policy)
    assert rows.rows.identities[bytes(10) + b"\xff\xff" + bytes(4), 96] == (WORLD, None)
    assert verdict(rows, "default/a", "ingress", "fd00::9")
    assert not verdict(rows, "default/a", "ingress", "2001:db8::9")
    assert not verdict(rows, "default/a", "ingress", "192.0.2.1")
    rows = rows_of(pod("a", 1), netpol("four", ingress=[{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]))
    assert not verdict(rows, "default/a", "ingress", "fd00::9")
    assert verdict(rows, "default/a", "ingress", "192.0.2.1")


def test_a_pod_without_policies_has_a_row_and_one_elsewhere_has_none() -> None:
    rows = rows_of(pod("a", 1), pod("far", 2, node="m"), pod("new", 3, status={"podIPs": []})).rows
    assert rows.endpoints == {"default/a": PolicyRow(), "default/new": PolicyRow()}
    assert {name for _, name in rows.identities.values()} == {"default/a"}
    assert rows.rules == {}


def test_audited_policies_have_rule_sets_of_their_own() -> None:
    deny = netpol("deny", audit=True, policyTypes=["Ingress", "Egress"])
    allow = netpol("allow", ingress=[{"ports": [{"port": 80}]}])
    row = rows_of(pod("a", 1), deny).rows.endpoints["default/a"]
    assert (row.ingress, row.egress) == (0, 0)
    assert 0 not in (row.audit_ingress, row.audit_egress)
    both = rows_of(pod("a", 1), deny, allow)
    row = both.rows.endpoints["default/a"]
    assert 0 not in (row.ingress, row.audit_ingress)
    assert row.egress == 0
    assert both.verdict(row.audit_ingress, ip_address("192.0.2.1"), 6, 80)[0]
    assert not both.verdict(row.audit_egress, ip_address("192.0.2.1"), 6, 80)[0]


def test_what_does_not_change_is_the_same_object() -> None:
    resources = [
        pod("a", 1),
        pod("b", 2),
        netpol("p", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]),
    ]
    world, compiler = World.of(resources, node="n"), Compiler()
    first = compiler.compile(world)
    assert compiler.compile(world) is first
    unmoved = compiler.compile(world.changed([resources[0]], [pod("a", 1, status={"phase": "Running"})]))
    assert unmoved.rules is first.rules
    moved = compiler.compile(world.changed([resources[1]], [pod("b", 2, metadata={"labels": {"app": "x"}})]))
    assert moved.endpoints is unmoved.endpoints
    assert moved.rules != first.rules
    assert first.rules == Compiler().compile(world).rules  # what was given away does not change


def test_too_many_rows_are_counted_and_forgotten() -> None:
    pods = [pod(f"p{number}", number, metadata={"labels": {"app": f"{number}"}}) for number in range(1, 21)]
    rules = [{"from": [{"podSelector": {"matchLabels": {"app": f"{number}"}}}]} for number in range(1, 21)]
    policy = netpol("p", ingress=rules)
    world, compiler = World.of([*pods, policy], node="n"), Compiler()
    with pytest.raises(TooManyRows) as raised:
        compiler.compile(world, limit=19)
    assert (raised.value.needed, raised.value.limit, raised.value.is_exact) == (20, 19, True)
    fewer = world.changed((), [netpol("p", ingress=rules[:3])])
    assert compiler.compile(fewer, limit=19) == Compiler().compile(fewer)
    assert len(compiler.compile(world, limit=20).rules) == 20


def test_peers_that_are_gone_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookline.policy._compiler.OUTGROWN", 10)
    compiler, world = Compiler(), World.of([pod("a", 1)], node="n")
    for number in range(100):
        block = {"ipBlock": {"cidr": f"192.0.2.{number}/32"}}
        world = world.changed((), [netpol("p", ingress=[{"from": [block]}])])
        assert compiler.compile(world) == Compiler().compile(world)
    assert len(compiler._peers) < 20


def test_numbers_are_the_same_in_another_process() -> None:
    code = (
        "from hookline.model import parse\nfrom hookline.policy import Compiler, World\n"
        "from tests.unit.test_policy_compiler import sample\n"
        "rows = Compiler().compile(World.of(sample(), node='n'))\n"
        "print(sorted(rows.rules.items(), key=repr), sorted(rows.identities.items()), sorted(rows.endpoints.items()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert "default/p3" in found.pop()


def sample() -> list[Resource]:
    """Some of everything."""
    pods = [
        pod(f"p{number}", number, containers=[{"ports": [{"name": "http", "containerPort": 80 + number}]}])
        for number in range(1, 6)
    ]
    peers = [{"podSelector": {"matchLabels": {"app": f"p{number}"}}} for number in range(1, 4)]
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.4/30", "10.0.0.1/32"]}}
    return [
        *pods,
        netpol("one", ingress=[{"from": [*peers, block], "ports": [{"port": 1, "endPort": 9}]}]),
        netpol("two", policyTypes=["Egress"], egress=[{"to": peers[1:], "ports": [{"port": "http"}]}]),
    ]


def test_rules_keep_their_numbers_and_free_ones_are_given_out_again() -> None:
    sources = [RuleSource("NetworkPolicy/default/p", "ingress", index) for index in range(4)]
    numbers = RuleNumbers({sources[0]: 1, sources[1]: 3})
    assert [numbers(source) for source in sources] == [1, 3, 2, 4]
    numbers.forget(sources[:2])
    assert numbers.known == {sources[2]: 2, sources[3]: 4}
    assert numbers(sources[1]) == 1
    assert numbers(sources[0]) == 3
    assert numbers(RuleSource("NetworkPolicy/default/q", "egress", 0)) == 5


@given(
    st.lists(st.tuples(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60))), max_size=8),
    st.integers(0, 20),
)
def test_numbers_from_content_forget_how_they_came_about(
    steps: list[tuple[set[int], set[int]]], first: int
) -> None:
    numbers = ContentNumbers(first, bits=8)
    present: set[bytes] = set()
    before: dict[bytes, int] = {}
    for gone, come in steps:
        leaving = {digest_of(str(number)) for number in gone} & present
        coming = {digest_of(str(number)) for number in come} - present
        moved = numbers.change(leaving, coming)
        present = (present - leaving) | coming
        fresh = ContentNumbers(first, bits=8)
        fresh.change((), present)
        now = {digest: numbers[digest] for digest in present}
        assert now == {digest: fresh[digest] for digest in present}
        assert len(set(now.values())) == len(present)
        assert all(first <= number < 256 for number in now.values())
        assert moved == any(now.get(digest, number) != number for digest, number in before.items())
        before = now
