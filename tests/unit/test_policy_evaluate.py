"""What answers say beside the verdict, ends and worlds at their edges, and which connections a change concerns."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from hookline.model import Resource, parse
from hookline.policy import (
    Decision,
    Evaluator,
    PolicyError,
    Probe,
    World,
    evaluate,
    impact,
    is_audited,
)
from tests.policy_worlds import hostpol, netpol, node, pod

A, B, C = pod("a", 1), pod("b", 2), pod("c", 3)
ONLY_A = netpol(
    "only-a",
    podSelector={"matchLabels": {"app": "b"}},
    ingress=[
        {"from": [{"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}}]},
        {
            "from": [
                {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a"]}]}}
            ],
            "ports": [{"port": 80, "endPort": 90}, {"port": 53, "protocol": "UDP"}],
        },
    ],
)


def ask(resources: list[Resource], source: str, destination: str, port: int = 80, **more: Any) -> Decision:
    return evaluate(World.of(resources), Probe(source, destination, port=port, **more))


def test_an_answer_names_the_policy_the_rule_and_what_matched() -> None:
    found = ask([A, B, ONLY_A], "default/a", "default/b", 85)
    assert found.allowed
    assert not found.egress.isolated
    side = found.ingress
    assert (side.policy, side.rule) == ("NetworkPolicy/default/only-a", 1)
    assert (side.peer, side.port) == ("podSelector {app in (a)}", "80-90/TCP")
    assert found.decided_by == (
        "ingress: NetworkPolicy/default/only-a ingress[1] allows podSelector {app in (a)}, 80-90/TCP"
    )
    found = ask([A, B, ONLY_A], "192.0.2.1", "default/b", 443)
    assert found.ingress.peer == "ipBlock 192.0.2.0/24 except 192.0.2.128/25"
    assert found.ingress.port == "any port"


def test_a_refusal_names_who_isolates_and_what_was_asked() -> None:
    deny = netpol("deny", policyTypes=["Ingress"])
    found = ask([A, B, C, ONLY_A, deny], "default/c", "default/b")
    assert not found.allowed
    assert found.ingress.policies == ("NetworkPolicy/default/deny", "NetworkPolicy/default/only-a")
    assert found.ingress.policy == "NetworkPolicy/default/deny"
    assert found.ingress.rule is None
    assert found.decided_by == (
        "ingress: default/b (10.0.0.2) is isolated by NetworkPolicy/default/deny, NetworkPolicy/default/only-a, "
        "and no rule allows TCP 80 from default/c (10.0.0.3)"
    )


def test_the_end_that_denies_decides() -> None:
    closed = netpol("closed", podSelector={"matchLabels": {"app": "a"}}, policyTypes=["Egress"])
    found = ask([A, B, ONLY_A, closed], "default/a", "default/b")
    assert not found.egress.allowed
    assert found.ingress.allowed
    assert found.decided_by.startswith(
        "egress: default/a (10.0.0.1) is isolated by NetworkPolicy/default/closed"
    )
    assert ask([A, B], "default/a", "default/b").decided_by == "no policy isolates either end"


def test_family_and_addresses() -> None:
    assert ask([A, B], "default/a", "default/b").source == ip_address("10.0.0.1")
    assert ask([A, B], "default/a", "default/b", version=6).destination == ip_address("fd00::2")
    assert ask([A, B, ONLY_A], "fd00::1", "default/b").ingress.rule == 1  # a pod by its address
    only_4 = pod("four", 9, status={"podIPs": [{"ip": "10.0.0.9"}]})
    with pytest.raises(PolicyError, match="no IPv6 address in common"):
        ask([A, only_4], "default/a", "default/four", version=6)
    with pytest.raises(PolicyError, match="no family in common"):
        ask([only_4], "fd00::7", "default/four")


@pytest.mark.parametrize("text", ["default/nobody", "external/x", "node/x"])
def test_somebody_unknown_is_an_error(text: str) -> None:
    with pytest.raises(PolicyError, match="is nobody"):
        ask([A], "default/a", text)


def test_a_pod_that_has_ended_is_nobody_and_its_address_another_ones() -> None:
    ended = pod("a", 1, status={"phase": "Succeeded"})
    with pytest.raises(PolicyError, match="has ended"):
        ask([ended, B], "default/a", "default/b")
    heir = pod("heir", 1)
    found = ask([ended, heir, B, ONLY_A], "10.0.0.1", "default/b")
    assert not found.allowed
    assert "default/heir" in found.ingress.why


def test_of_two_pods_with_one_address_the_one_that_stays_has_it() -> None:
    leaving = pod("a", 1, metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
    heir = pod("heir", 1)
    assert "default/heir" in ask([leaving, heir, B, ONLY_A], "10.0.0.1", "default/b").ingress.why
    assert ask([leaving, B, ONLY_A], "10.0.0.1", "default/b").allowed


def test_a_pod_in_its_nodes_network_is_the_node() -> None:
    deny = netpol("deny", podSelector={})
    host_a = pod("a", 1, hostNetwork=True, status={"podIPs": [{"ip": "10.1.0.1"}]})
    resources = [host_a, B, pod("far", 4, node="m"), node("n", 1), node("m", 2), deny]
    assert ask(resources, "default/a", "default/b").allowed
    assert not ask(resources, "default/a", "default/far").allowed
    assert not ask(resources, "default/b", "default/far").allowed
    assert ask(resources, "default/b", "default/a").allowed


def test_a_pod_reaches_itself() -> None:
    nothing = netpol("nothing", policyTypes=["Ingress", "Egress"])
    assert ask([A, nothing], "default/a", "default/a").allowed


@pytest.mark.parametrize(
    ("protocol", "allowed"), [("ICMP", False), (1, False), ("TCP", True), (6, True), (47, False)]
)
def test_ports_are_of_protocols(protocol: str | int, allowed: bool) -> None:
    some = netpol("some", podSelector={"matchLabels": {"app": "b"}}, ingress=[{"ports": [{}]}])
    assert ask([A, B, some], "default/a", "default/b", protocol=protocol).allowed == allowed
    whole = netpol("some", podSelector={"matchLabels": {"app": "b"}}, ingress=[{}])
    assert ask([A, B, whole], "default/a", "default/b", protocol=protocol).allowed


def test_a_namespace_without_an_object_has_a_name() -> None:
    far = pod("far/x", 5)
    by_name = {"matchLabels": {"kubernetes.io/metadata.name": "far"}}
    policy = netpol(
        "p", podSelector={"matchLabels": {"app": "b"}}, ingress=[{"from": [{"namespaceSelector": by_name}]}]
    )
    assert ask([far, A, B, policy], "far/x", "default/b").allowed
    assert not ask([far, A, B, policy], "default/a", "default/b").allowed


def test_audited_policies_count_only_when_asked() -> None:
    audited = netpol("deny", audit=True, policyTypes=["Ingress"])
    assert is_audited(audited)
    world = World.of([A, B, audited])
    probe = Probe("default/a", "default/b", port=80)
    assert evaluate(world, probe).allowed
    assert not evaluate(world, probe).ingress.isolated
    assert not evaluate(world, probe, audited=True).allowed


def test_host_policies_are_for_nodes() -> None:
    policy = hostpol(
        "edge",
        nodeSelector={"matchLabels": {"role": "edge"}},
        policyTypes=["Ingress", "Egress"],
        ingress=[{"from": [{"nodeSelector": {"matchLabels": {"role": "core"}}}], "ports": [{"port": 22}]}],
        egress=[{"to": [{"namespaceSelector": {}}], "ports": [{"port": "http"}]}],
    )
    web = pod("web", 6, node="m", containers=[{"ports": [{"name": "http", "containerPort": 8080}]}])
    resources = [A, web, node("n", 1, role="edge"), node("m", 2, role="core"), node("o", 3), policy]
    found = ask(resources, "node/m", "node/n", 22)
    assert found.ingress.peer == "nodeSelector {role=core}"
    assert not ask(resources, "node/m", "node/n", 23).allowed
    assert not ask(resources, "node/o", "node/n", 22).allowed
    assert ask(resources, "node/m", "node/o", 22).allowed
    assert ask(resources, "node/n", "default/web", 8080).allowed
    assert not ask(resources, "node/n", "default/web", 80).allowed
    assert not ask(resources, "node/n", "192.0.2.1", 80).allowed
    assert ask(resources, "default/a", "node/n", 80).allowed  # its own pod
    lenient = hostpol("edge", nodeSelector={}, defaultVerdict="allow")
    found = ask([*resources[:-1], lenient], "node/o", "node/n", 22)
    assert found.allowed
    assert found.decided_by == "ingress: the default verdict of HostPolicy/edge is allow"
    strict = hostpol("strict", nodeSelector={})
    assert not ask([*resources[:-1], lenient, strict], "node/o", "node/n", 22).allowed


def test_this_nodes_addresses_may_be_given() -> None:
    deny = netpol("deny", podSelector={})
    there = pod("far", 4, node="m")
    mine = World.of([B, there, deny], node="host", names=["n"], addresses=[ip_address("192.0.2.7")])
    assert evaluate(mine, Probe("192.0.2.7", "default/b", port=80)).allowed
    assert evaluate(mine, Probe("node/n", "default/b", port=80)).allowed
    assert evaluate(mine, Probe("node/host", "default/b", port=80)).allowed
    assert not evaluate(mine, Probe("192.0.2.7", "default/far", port=80)).allowed
    assert not evaluate(mine, Probe("192.0.2.8", "default/b", port=80)).allowed
    moved = mine.changed((), (), addresses=[ip_address("192.0.2.8")])
    assert evaluate(moved, Probe("192.0.2.8", "default/b", port=80)).allowed


def test_a_change_leaves_the_world_that_was() -> None:
    before = World.of([A, B])
    after = before.changed([], [ONLY_A])
    assert not before.policies
    again = after.changed([ONLY_A], [])
    assert after.policies["default"] == {"only-a": ONLY_A}
    assert not again.policies
    assert again.changed((), ()) is again
    assert (
        again.changed(
            [hostpol("not-there")],
            [parse({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}})],
        )
        == again
    )


def test_impact_is_what_changes() -> None:
    before = World.of([A, B, C])
    after = before.changed((), [ONLY_A])
    probes = [
        Probe("10.0.0.1", "10.0.0.2", "TCP", 80),
        Probe("10.0.0.3", "10.0.0.2", "TCP", 80),
        Probe("10.0.0.3", "10.0.0.2", "TCP", 80),
        Probe("fd00::1", "fd00::2", "TCP", 22),
        Probe("10.0.0.3", "10.0.0.1", "TCP", 80),
        Probe("192.0.2.200", "10.0.0.2", "UDP", 53),
    ]
    changed = impact(before, after, probes)
    assert [(one.probe, one.after.allowed) for one in changed] == [
        (probes[1], False),
        (probes[3], False),
        (probes[5], False),
    ]
    assert "no rule allows UDP 53 from 192.0.2.200" in changed[2].after.decided_by
    assert impact(after, before, probes[:1]) == []
    assert [one.after.allowed for one in impact(after, before, probes[1:2])] == [True]


def test_every_rule_that_allows_is_found() -> None:
    more = netpol("more", ingress=[{"ports": [{"port": 1}]}, {}])
    found = Evaluator(World.of([A, B, ONLY_A, more])).rules_that_allow(
        Probe("default/a", "default/b", port=80), "ingress"
    )
    assert [(match.policy.rpartition("/")[2], match.rule) for match in found] == [("more", 1), ("only-a", 1)]
