"""Policies on a node of a lab: what real packets and sockets meet, and what becomes of them when policies change."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import api, bpf, cli, net
from hookline.control import Covered, DoesNotFit, Node, NotThere, tables
from hookline.datapath.firewall.firewall import FOLDER
from hookline.lab import Lab, ProbeFailed
from hookline.model import Pod, Resource, parse
from hookline.model.names import NodeName, pod_netns
from tests.lab.agents import AgentProcess, until
from tests.lab.conftest import document, lab_with, pod

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
PORTS = {"tcp": 8080, "udp": 5353}
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def policy(name: str, selector: dict[str, str], **spec: Any) -> Resource:
    """A NetworkPolicy for the pods of ``default`` with these labels."""
    return parse(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "annotations": spec.pop("annotations", {})},
            "spec": {"podSelector": {"matchLabels": selector}, **spec},
        }
    )


def host_policy(name: str, **spec: Any) -> Resource:
    """A HostPolicy."""
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "HostPolicy",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


def from_app(app: str) -> dict[str, Any]:
    """An ingress rule for pods of that label."""
    return {"from": [{"podSelector": {"matchLabels": {"app": app}}}]}


def labelled(name: str, app: str, node: str = "node-1") -> Resource:
    """A pod of a lab with its label."""
    return pod(name, node, metadata={"labels": {"app": app}})


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Pods a and b on node-1, c on node-2, and a client outside."""
    members = (labelled("a", "a"), labelled("b", "b"), labelled("c", "c", "node-2"))
    with lab_with(unique_name(), *members, nodes=2) as made:
        yield made


@pytest.fixture
def node(place: Lab) -> Iterator[Node]:
    """The first node, with nothing applied before and after."""
    with api.Node(place.first_node) as opened:
        try:
            yield opened
        finally:
            opened.apply(place.resources(), owner=api.OWNER)
            mine = [one for one in opened.resources() if opened.source_of(one.reference) != api.OWNER]
            if mine:
                opened.delete([one.reference for one in mine])


def reaches(place: Lab, source: str, target: str, protocol: Any, family: Any, **more: Any) -> bool:
    """Whether a probe is answered."""
    try:
        place.probe(
            source,
            target,
            more.pop("port", PORTS[protocol]),
            protocol,
            family,
            timeout=more.pop("patience_s", 0.3),
        )
    except ProbeFailed:
        return False
    return True


def programs(node: Node) -> set[str]:
    """Names of the programs that are attached."""
    return {one.program for one in node.attachments()}


# What policies do


@FAMILIES
@PROTOCOLS
def test_both_ends_must_allow(place: Lab, node: Node, family: int, protocol: str) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a"), from_app("c")]))
    assert reaches(place, "default/a", "default/b", protocol, family)
    assert reaches(place, "default/c", "default/b", protocol, family)
    assert reaches(place, "node/node-1", "default/b", protocol, family)
    assert not reaches(place, "external/client", "default/b", protocol, family)
    node.apply(policy("a", {"app": "a"}, policyTypes=["Egress"]))
    assert not reaches(place, "default/a", "default/b", protocol, family)
    assert reaches(place, "default/c", "default/b", protocol, family)
    assert reaches(place, "default/b", "default/c", protocol, family), "b's egress is not isolated"


def test_policies_alone_need_no_load_balancer(place: Lab, node: Node) -> None:
    node.apply(policy("b", {"app": "b"}))
    assert programs(node) == {"from_pod", "to_pod"}
    assert node.totals() is None
    assert {one.name for one in place.first_node.pins.iterdir()} == {FOLDER}
    applied = node.delete(["NetworkPolicy/default/b"])
    assert {one.change for one in applied.attachments} == {"detached"}
    assert not place.first_node.pins.exists()


@FAMILIES
@PROTOCOLS
def test_policy_sees_what_a_service_translated_to(place: Lab, node: Node, family: int, protocol: str) -> None:
    address = {4: "192.0.2.80", 6: "2001:db8:80::80"}[family]
    ports = [{"name": "main", "port": 80, "targetPort": PORTS[protocol], "protocol": protocol.upper()}]
    service = document(
        "Service",
        "b",
        spec={
            "selector": {"app": "b"},
            "ports": ports,
            "ipFamilies": [f"IPv{family}"],
            "clusterIP": address,
            "externalIPs": [address],
        },
    )
    node.apply([service])
    assert "from_pod" not in programs(node), "services alone need no firewall"
    assert reaches(place, "external/client", address, protocol, family, port=80, patience_s=1)
    port = {"port": PORTS[protocol], "protocol": protocol.upper()}
    block = {4: "203.0.113.0/24", 6: "2001:db8:203::/48"}[family]
    rule = {"from": [{"ipBlock": {"cidr": block}}, {"podSelector": {}}], "ports": [port]}
    node.apply(policy("b", {"app": "b"}, ingress=[rule]))
    assert {"balance", "from_pod"} <= programs(node)
    assert reaches(place, "external/client", address, protocol, family, port=80, patience_s=1)
    node.apply(policy("b", {"app": "b"}, ingress=[{**rule, "ports": [{**port, "port": 80}]}]))
    assert not reaches(place, "external/client", address, protocol, family, port=80)
    node.delete(["Service/default/b"])
    assert programs(node) == {"from_pod", "to_pod"}


@FAMILIES
@PROTOCOLS
def test_host_policy(place: Lab, node: Node, family: int, protocol: str) -> None:
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    port = 7070
    block = {4: "203.0.113.10/32", 6: "2001:db8:203::10/128"}[family]
    rule = {
        "from": [{"ipBlock": {"cidr": block}}],
        "ports": [{"port": port, "protocol": protocol.upper()}],
    }
    with serving(place, "node/node-1", version, protocol, port):
        assert asks(place, "external/client", "node/node-1", version, protocol, port)
        assert asks(place, "node/node-2", "node/node-1", version, protocol, port)
        node.apply(host_policy("here", ingress=[rule]))
        assert programs(node) == {"from_wire", "to_wire", "from_pod", "to_pod"}, "sources of pods are checked"
        assert asks(place, "external/client", "node/node-1", version, protocol, port)
        assert not asks(place, "node/node-2", "node/node-1", version, protocol, port)
        assert asks(place, "default/a", "node/node-1", version, protocol, port), (
            "its own pods are not on the wire"
        )
        assert reaches(place, "node/node-2", "default/a", protocol, family), (
            "nor are packets to pods the node's"
        )
        assert reaches(place, "node/node-1", "default/c", protocol, family), "replies pass"
        node.apply(host_policy("here", policyTypes=["Ingress"], defaultVerdict="allow"))
        assert asks(place, "node/node-2", "node/node-1", version, protocol, port)
        node.apply(host_policy("here", nodeSelector={"matchLabels": {"no": "such"}}))
        assert programs(node) == set()


# What is told


def test_verdicts_counters_and_connections_have_names(place: Lab, node: Node) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    node.sample_verdicts(1)
    with node.verdicts() as verdicts:
        assert reaches(place, "default/a", "default/b", "tcp", 4)
        assert not reaches(place, "external/client", "default/b", "udp", 6)
        events = []
        while verdicts.wait(0.2):
            events += verdicts.read()
        assert verdicts.lost == 0
    allowed = [one for one in events if one.policy == "NetworkPolicy/default/b"]
    assert {(one.source, one.destination, one.verdict, one.rule, one.reason) for one in allowed} == {
        ("default/a", "default/b", "allow", 0, "rule")
    }
    denied = [one for one in events if one.verdict == "deny"]
    assert {
        (one.source, one.destination, one.destination_port, one.protocol, one.reason) for one in denied
    } == {("external/client", "default/b", 5353, 17, "no_rule")}
    assert abs(denied[0].time - time.time()) < 60
    (count,) = node.rule_counts()
    assert (count.policy, count.direction, count.rule) == ("NetworkPolicy/default/b", "ingress", 0)
    assert count.packets > 0
    mine = [one for one in node.tracked() if one.policy]
    assert {(one.source, one.destination, one.destination_port) for one in mine} == {
        ("default/a", "default/b", 8080)
    }
    totals = node.policy_totals()
    assert totals is not None
    assert totals.reasons["ingress", "no_rule"][0] >= 1


@FAMILIES
@PROTOCOLS
def test_an_audited_policy_denies_nothing(place: Lab, node: Node, family: int, protocol: str) -> None:
    audited = {"hookline.dev/audit": "true"}
    node.apply(policy("b", {"app": "b"}, annotations=audited, ingress=[from_app("a")]))
    with node.verdicts() as verdicts:
        assert reaches(place, "external/client", "default/b", protocol, family)
        assert verdicts.wait(5)
        events = verdicts.read()
    assert {(one.verdict, one.source, one.destination) for one in events} == {
        ("audit", "external/client", "default/b")
    }


@FAMILIES
def test_explain_names_the_rule_of_each_end(place: Lab, node: Node, family: int) -> None:
    node.apply(
        policy("b", {"app": "b"}, ingress=[from_app("c"), {**from_app("a"), "ports": [{"port": 8080}]}])
    )
    answer = node.explain("default/a", "default/b:8080", family=family)
    (one,) = answer.permissions
    assert one.allowed
    assert (one.ingress.policy, one.ingress.rule) == ("NetworkPolicy/default/b", 1)
    assert "app=a" in one.ingress.peer
    assert not one.egress.isolated
    assert not answer.obstacles
    for source, target in (
        ("external/client", "default/b:8080"),
        ("default/a", "default/b:8081"),
        ("default/a", "default/b:8080/udp"),
        ("default/a", "default/b:8080/sctp"),
    ):
        answer = node.explain(source, target, family=family)
        (one,) = answer.permissions
        assert not one.allowed
        assert [stop.kind for stop in answer.obstacles] == ["policy"]
        assert "NetworkPolicy/default/b" in answer.obstacles[0].what
    # A policy that the kernel does not enforce is noticed.
    with bpf.Map.from_pin(place.first_node.pins / FOLDER / "maps" / "rules") as rules:
        keys, _ = rules.read()
        rules.remove(keys)
    answer = node.explain("default/a", "default/b:8080", family=family)
    assert [stop.kind for stop in answer.obstacles] == ["policy_rows"]


@FAMILIES
def test_explain_asks_the_node_that_judges(
    place: Lab, node: Node, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--from", "default/a", "--to", "default/c:8080", "--family", str(family)]
    words += ["--node", str(node.name)]
    node.apply(policy("c", {"app": "c"}))
    # No policy was applied to c's node.
    assert reaches(place, "default/a", "default/c", "tcp", family)
    answer = node.explain("default/a", "default/c:8080", family=family)
    assert not answer.obstacles
    (one,) = answer.permissions
    assert one.allowed
    assert one.judged_by == {"egress": "node-1", "ingress": "node-2"}
    assert one.enforced == {"egress": True, "ingress": True}
    assert cli.run(words) == 0
    assert "nothing was found that would stop it" in capsys.readouterr().out
    with api.Node(f"lab/{place.name}/node-2") as other:
        other.apply(policy("theirs", {"app": "c"}, ingress=[from_app("b")]))
        try:
            assert not reaches(place, "default/a", "default/c", "tcp", family)
            answer = node.explain("default/a", "default/c:8080", family=family)
            assert [stop.kind for stop in answer.obstacles] == ["policy"]
            assert "NetworkPolicy/default/theirs" in answer.obstacles[0].what
            assert cli.run(words) == 1
            assert "denied" in capsys.readouterr().out
            with bpf.Map.from_pin(other.name.pins / FOLDER / "maps" / "rules") as rules:
                rules.remove(rules.read()[0])
            assert (
                node.explain("default/b", "default/c:8080", family=family).obstacles[0].kind == "policy_rows"
            )
        finally:
            other.delete(["NetworkPolicy/default/theirs"])


@FAMILIES
def test_explain_counts_no_node_that_cannot_be_asked(
    node: Node, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = [{"ip": "203.0.113.77"}, {"ip": "2001:db8:203::77"}]
    node.apply([pod("far", "elsewhere", status={"podIPs": addresses}), policy("far", {})])
    node.apply(policy("a", {"app": "a"}, policyTypes=["Egress"], egress=[{}]))
    words = ["explain", "--from", "default/a", "--to", "default/far:8080", "--family", str(family)]
    assert cli.run([*words, "--node", str(node.name)]) == 0
    said = capsys.readouterr().out
    assert "allowed, as far as nodes were asked" in said
    assert "judged by node elsewhere, which was not asked; by the policies known here denied: " in said
    assert "stops it" not in said
    assert cli.run([*words, "--json", "--node", str(node.name)]) == 0
    (one,) = json.loads(capsys.readouterr().out)["permissions"]
    assert one["judged_by"] == {"egress": "node-1", "ingress": "elsewhere"}
    assert one["enforced"] == {"egress": True, "ingress": False}
    assert (one["allowed"], one["ingress"]["allowed"]) == (True, False)
    node.apply(policy("a", {"app": "a"}, policyTypes=["Egress"]))
    (stop,) = node.explain("default/a", "default/far:8080", family=family).obstacles
    assert (stop.kind, stop.what[:6]) == ("policy", "egress"), "this node's own end counts"


@FAMILIES
def test_explain_names_audited_policies_that_would_deny(
    node: Node, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = {"hookline.dev/audit": "true"}
    node.apply(
        [
            policy("in", {"app": "b"}, annotations=audit, ingress=[from_app("c")]),
            policy("out", {"app": "a"}, annotations=audit, policyTypes=["Egress"]),
        ]
    )
    words = ["explain", "--from", "default/a", "--to", "default/b:8080", "--family", str(family)]
    assert cli.run([*words, "--node", str(node.name)]) == 0
    said = capsys.readouterr().out
    assert "ingress: NetworkPolicy/default/in, audited, would deny" in said
    assert "egress: NetworkPolicy/default/out, audited, would deny" in said
    (one,) = node.explain("default/c", "default/b:8080", family=family).permissions
    assert one.would_deny == {"egress": (), "ingress": ()}


@FAMILIES
@PROTOCOLS
def test_rules_and_reasons_are_counted_where_people_look(
    place: Lab,
    node: Node,
    family: int,
    protocol: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("nobody"), from_app("a")]))

    def shown(*words: str) -> str:
        assert cli.run([*words, "--node", str(node.name)]) == 0
        return capsys.readouterr().out

    assert reaches(place, "default/a", "default/b", protocol, family)
    assert not reaches(place, "default/c", "default/b", protocol, family)
    described = json.loads(shown("describe", "networkpolicy", "b", "--json"))
    lines = [line.split() for line in shown("describe", "networkpolicy", "b").splitlines()]
    (row,) = (line.split() for line in shown("get", "networkpolicies").splitlines()[1:])
    unused, used = described["item"]["rules"]
    assert unused == {"direction": "ingress", "rule": 0, "packets": 0, "bytes": 0}
    assert (used["direction"], used["rule"]) == ("ingress", 1)
    assert used["packets"] >= 1
    assert used["bytes"] >= 28 * used["packets"]
    totals = described["totals"]
    assert totals["verdicts"] is None, "nothing is balanced"
    reasons = {(one["direction"], one["reason"]): one for one in totals["firewall"]["reasons"]}
    dropped = reasons["ingress", "no_rule"]
    assert dropped["verdict"] == "drop"
    assert dropped["packets"] >= 1
    assert reasons["ingress", "rule"]["verdict"] == "pass"
    assert [line[-2:] for line in lines if line[:1] == ["1"]] == [[str(used["packets"]), str(used["bytes"])]]
    assert [line[-2] for line in lines if line[:3] == ["ingress", "drop", "no_rule"]] == [
        str(dropped["packets"])
    ]
    assert row[-1] == str(used["packets"])


def test_an_agent_says_the_same_of_rules_and_reasons(
    place: Lab, node: Node, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    assert reaches(place, "default/a", "default/b", "tcp", 4)

    def described() -> Any:
        assert cli.run(["describe", "networkpolicy", "b", "--json", "--node", str(node.name)]) == 0
        return json.loads(capsys.readouterr().out)

    directly = described()
    (tmp_path / "empty").mkdir()
    agent = AgentProcess(place, tmp_path / "empty", tmp_path / "agent.log")
    try:
        agent.start()
        by_agent = described()
    finally:
        agent.clear()
    assert by_agent["item"]["rules"][0]["packets"] >= directly["item"]["rules"][0]["packets"] > 0
    assert by_agent["totals"].keys() == directly["totals"].keys()
    counted = {(one["direction"], one["reason"]) for one in by_agent["totals"]["firewall"]["reasons"]}
    assert ("ingress", "rule") in counted


def test_explain_follows_a_service_to_its_backends(place: Lab, node: Node) -> None:
    service = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "both"},
            "spec": {
                "addresses": ["192.0.2.81"],
                "ports": [{"name": "main", "port": 80, "targetPort": 8080}],
                "backends": [{"selector": {"app": "b"}}, {"selector": {"app": "c"}}],
            },
        }
    )
    node.apply([service, policy("b", {"app": "b"}, ingress=[from_app("c")])])
    answer = node.explain("default/a", "both:80")
    said = {one.backend: (one.source, one.port, one.allowed) for one in answer.permissions}
    assert said == {"default/b": ("default/a", 8080, False), "default/c": ("default/a", 8080, True)}
    assert [(stop.kind, stop.backend) for stop in answer.obstacles] == [("policy", "default/b")]


# Connections


@contextlib.contextmanager
def serving(
    place: Lab, member: str, version: socket.AddressFamily, protocol: str, port: int
) -> Iterator[list[int]]:
    """Answers every message with itself, in the block; gives the errors that ended connections."""
    family = 4 if version == socket.AF_INET else 6
    (listener,) = place.sockets(member, family, protocol)  # type: ignore[arg-type]
    accepted: list[socket.socket] = []
    errors: list[int] = []
    done = threading.Event()

    def echo(one: socket.socket) -> None:
        try:
            while data := one.recv(4096):
                one.sendall(data)
        except OSError as error:
            errors.append(error.errno or 0)

    def serve() -> None:
        while not done.is_set():
            try:
                if protocol == "tcp":
                    one, _ = listener.accept()
                    accepted.append(one)
                    threading.Thread(target=echo, args=(one,), daemon=True).start()
                else:
                    data, peer = listener.recvfrom(4096)
                    listener.sendto(data, peer)
            except OSError:
                continue

    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", port))
    if protocol == "tcp":
        listener.listen(64)
    listener.settimeout(0.1)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield errors
    finally:
        done.set()
        thread.join()
        listener.close()
        for one in accepted:
            one.close()


def connect(
    place: Lab, source: str, target: str, version: socket.AddressFamily, protocol: str, port: int
) -> socket.socket:
    """A socket of a member that is connected to another."""
    family = 4 if version == socket.AF_INET else 6
    (one,) = place.sockets(source, family, protocol)  # type: ignore[arg-type]
    one.settimeout(0.3)
    address = place.member(target).address(family)
    try:
        one.connect((str(address), port))
    except BaseException:
        one.close()
        raise
    return one


def exchanges(one: socket.socket, text: bytes = b"ping") -> bool:
    """Whether a message comes back."""
    try:
        one.sendall(text)
        return one.recv(4096) == text
    except OSError:
        return False


def asks(
    place: Lab, source: str, target: str, version: socket.AddressFamily, protocol: str, port: int
) -> bool:
    """Whether a new connection is answered."""
    try:
        with connect(place, source, target, version, protocol, port) as one:
            return exchanges(one)
    except OSError:
        return False


def ended(one: socket.socket) -> bool:
    """Whether the kernel ended a socket."""
    one.settimeout(5)
    try:
        one.recv(4096)
    except OSError as error:
        return error.errno == errno.ECONNABORTED
    return False


def relabelled(place: Lab, name: str, app: str) -> list[Resource]:
    """The lab's objects with another label on a pod."""
    found = []
    for one in place.resources():
        if one.reference == f"Pod/default/{name}":
            changed = one.to_document()
            changed["metadata"]["labels"] = {"app": app}
            one = parse(changed)
        found.append(one)
    return found


CHANGES = ["policy", "label", "first"]


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("change", CHANGES)
def test_a_connection_that_is_no_longer_allowed_is_cut_at_both_ends(
    place: Lab, node: Node, family: int, protocol: str, change: str
) -> None:
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    if change != "first":
        node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    with serving(place, "default/b", version, protocol, 6060) as errors:
        silent = connect(place, "default/a", "default/b", version, protocol, 6060)
        other = connect(place, "default/b", "default/c", version, protocol, PORTS[protocol])
        with silent, other:
            assert exchanges(silent)
            if change == "label":
                applied = node.apply(relabelled(place, "a", "other"), owner=api.OWNER)
            else:
                applied = node.apply(policy("b", {"app": "b"}, ingress=[from_app("c")]))
            if change == "first" and protocol == "udp":
                assert not exchanges(
                    silent
                )  # nobody saw it begin: its packets are dropped, its socket is not known
                return
            assert applied.plan.policies is not None
            assert applied.plan.policies.connections_cut == 1
            assert applied.plan.sockets_ended == (2 if protocol == "tcp" else 1)
            assert ended(silent)
            if protocol == "tcp":
                wait_for(lambda: errors == [errno.ECONNABORTED])
            assert not asks(place, "default/a", "default/b", version, protocol, 6060)
            assert not ended_soon(other)


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns once it holds; fails after some seconds."""
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def ended_soon(one: socket.socket) -> bool:
    """Whether a socket has an error already."""
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


@FAMILIES
@PROTOCOLS
def test_replies_of_a_connection_that_is_older_than_the_first_policy_pass(
    place: Lab, node: Node, family: int, protocol: str
) -> None:
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    with (
        serving(place, "default/c", version, protocol, 6061),
        connect(place, "default/b", "default/c", version, protocol, 6061) as one,
    ):
        assert exchanges(one)
        node.apply(policy("b", {"app": "b"}))  # nothing may come to b
        assert exchanges(one)
        assert not reaches(place, "default/c", "default/b", protocol, family)


@FAMILIES
def test_updates_under_load_break_nothing_allowed_and_leave_nothing_forbidden(
    place: Lab, node: Node, family: int
) -> None:
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    done = threading.Event()
    broken: list[str] = []
    passed: list[str] = []
    tries = {"tcp": 0, "udp": 0, "new": 0, "forbidden": 0}

    def keep_talking(protocol: str) -> None:
        with connect(place, "default/a", "default/b", version, protocol, 6062) as one:
            one.settimeout(3)
            while not done.is_set():
                if not exchanges(one, str(tries[protocol]).encode()):
                    broken.append(f"{protocol} after {tries[protocol]}")
                    return
                tries[protocol] += 1

    def keep_opening() -> None:
        while not done.is_set():
            try:
                with connect(place, "default/a", "default/b", version, "tcp", 6062) as one:
                    one.settimeout(3)
                    if not exchanges(one):
                        broken.append("a new connection")
            except OSError as error:
                broken.append(f"a new connection: {error}")
            tries["new"] += 1

    def keep_trying() -> None:
        (one,) = place.sockets("external/client", family, "udp")  # type: ignore[arg-type]
        with one:
            one.settimeout(0.02)
            one.connect((str(place.member("default/b").address(family)), 6062))
            while not done.is_set():
                if exchanges(one):
                    passed.append("udp")
                tries["forbidden"] += 1

    steps = [
        policy("b", {"app": "b"}, ingress=[from_app("a")]),
        policy("b", {"app": "b"}, ingress=[from_app("c"), from_app("a")]),
        policy(
            "b",
            {"app": "b"},
            ingress=[
                {
                    **from_app("a"),
                    "ports": [{"port": 6000, "endPort": 6100, "protocol": p} for p in ("TCP", "UDP")],
                }
            ],
        ),
        policy("more", {"app": "b"}, ingress=[{"from": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}]),
    ]
    node.apply(steps[0])
    with serving(place, "default/b", version, "tcp", 6062), serving(place, "default/b", version, "udp", 6062):
        threads = [
            *(threading.Thread(target=keep_talking, args=(one,)) for one in ("tcp", "udp")),
            threading.Thread(target=keep_opening),
            threading.Thread(target=keep_trying),
        ]
        for one in threads:
            one.start()
        rounds = 0
        while rounds < 8 or (min(tries.values()) < 30 and not broken):
            for step in steps:
                node.apply(step)
            node.delete(["NetworkPolicy/default/more"])
            rounds += 1
            assert rounds < 500
        assert node.repair().repairs == []
        done.set()
        for one in threads:
            one.join()
    assert (broken, passed) == ([], [])
    assert min(tries.values()) >= 30


# New pods


@FAMILIES
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
def test_a_new_pod_is_isolated_before_it_can_send(
    place: Lab, node: Node, family: int, isolated: bool
) -> None:
    """It has a process that sends from before its interface is up; what arrives of that is counted."""
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    node.apply(
        [
            policy("a", {"app": "a"}, ingress=[from_app("b")]),
            *([policy("new", {"app": "new"}, policyTypes=["Egress"])] if isolated else []),
        ]
    )
    target = str(place.member("default/b").address(family))
    (listener,) = place.sockets("default/b", family, "udp")  # type: ignore[arg-type]
    stop, sent = threading.Event(), [0]

    def send(namespace: Any) -> None:
        with net.inside(namespace), socket.socket(version, socket.SOCK_DGRAM) as one:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    one.sendto(b"early", (target, 6063))
                    sent[0] += 1

    sender: list[threading.Thread] = []
    original = Lab.add_pod

    def add(self: Lab, what: Any, *, before_up: Any) -> Any:
        def hook(resources: Any) -> None:
            member = self.member("default/b")
            where = member.netns.with_name(member.netns.name.replace(".default.b", ".default.late"))
            assert where.exists()
            thread = threading.Thread(target=send, args=(where,))
            thread.start()
            sender.append(thread)
            before_up(resources)

        return original(self, what, before_up=hook)

    with listener:
        listener.bind(("", 6063))
        listener.settimeout(0.5)
        Lab.add_pod = add  # type: ignore[method-assign,assignment]
        try:
            api.add_pod(place, labelled("late", "new"))
            until = time.monotonic() + 5
            while sent[0] < 50 and time.monotonic() < until:
                time.sleep(0.01)
            assert sent[0] >= 50
        finally:
            Lab.add_pod = original  # type: ignore[method-assign]
            stop.set()
            for thread in sender:
                thread.join()
            place.refresh()
            with contextlib.suppress(Exception):
                place.remove_pod("default/late")
        received = 0
        with contextlib.suppress(TimeoutError):
            while listener.recv(64):
                received += 1
                if received > 10:
                    break
    assert (received == 0) is isolated


# Refusals, repair, going back


def test_what_does_not_fit_is_refused_with_the_number(place: Lab, node: Node) -> None:
    config = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "NodeConfig",
            "metadata": {"name": "node-1"},
            "spec": {"maps": {"rules": 16}},
        }
    )
    node.apply([config, policy("b", {"app": "b"}, ingress=[from_app("a")])])
    many = [{"port": port} for port in range(1000, 1034, 2)]
    for change in (node.plan, node.apply):
        with pytest.raises(DoesNotFit) as refused:
            change(policy("b", {"app": "b"}, ingress=[{"ports": many}]))
        assert "17" in str(refused.value)
        assert "16" in str(refused.value)
    assert reaches(place, "default/a", "default/b", "tcp", 4)
    assert not reaches(place, "external/client", "default/b", "tcp", 4)
    assert node.repair().repairs == []


def test_rollback(place: Lab, node: Node) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    node.apply(policy("b", {"app": "b"}))
    assert not reaches(place, "default/a", "default/b", "tcp", 4)
    plan = node.plan_rollback()
    assert plan.policies is not None
    assert plan.policies.rules_added == 1
    node.rollback()
    assert reaches(place, "default/a", "default/b", "tcp", 4)
    assert not reaches(place, "external/client", "default/b", "tcp", 4)
    with pytest.raises(NotThere):
        node.delete(["NetworkPolicy/default/none"])


def test_plan_says_what_is_cut_and_changes_nothing(place: Lab, node: Node) -> None:
    version = socket.AF_INET
    plan = node.plan(policy("b", {"app": "b"}))
    assert plan.policies is not None
    assert plan.policies.loads
    assert programs(node) == set()
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    with (
        serving(place, "default/b", version, "tcp", 6064),
        connect(place, "default/a", "default/b", version, "tcp", 6064) as one,
    ):
        assert exchanges(one)
        plan = node.plan(delete=["NetworkPolicy/default/b"])
        assert plan.policies is not None
        assert plan.policies.detaches
        plan = node.plan(policy("b", {"app": "b"}, ingress=[from_app("c")]))
        assert plan.policies is not None
        assert plan.policies.connections_cut == 1
        assert exchanges(one)


@FAMILIES
def test_only_what_is_open_and_turns_forbidden_counts_as_cut(place: Lab, node: Node, family: int) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    node.apply(policy("c", {"app": "none"}))
    asked = policy("b", {"app": "b"}, ingress=[from_app("c")])
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    with (
        serving(place, "default/b", version, "tcp", 6071),
        serving(place, "default/b", version, "udp", 6071),
    ):
        with connect(place, "default/a", "default/b", version, "tcp", 6071) as over:
            assert exchanges(over)
            over.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        wait_for(
            lambda: any(one.destination_port == 6071 and one.state == "closed" for one in node.tracked())
        )
        plan = node.plan(asked)
        assert plan.policies is not None
        assert plan.policies.connections_cut == 0, "a connection that is over cannot be cut"
        tcp = connect(place, "default/a", "default/b", version, "tcp", 6071)
        udp = connect(place, "default/a", "default/b", version, "udp", 6071)
        with tcp, udp:
            assert exchanges(tcp)
            assert exchanges(udp)
            for change in (node.plan(asked), node.apply(asked).plan):
                assert change.policies is not None
                assert change.policies.connections_cut == 2, "each once, though both its pods are here"
            for other in (
                node.plan(policy("c", {"app": "none"}, ingress=[from_app("c")])),
                node.plan(policy("b", {"app": "b"})),
                node.apply(policy("b", {"app": "b"})).plan,
                node.delete(["NetworkPolicy/default/c"]).plan,
                node.apply(policy("c", {"app": "none"})).plan,
            ):
                assert other.policies is None or not other.policies.connections_cut, "cut before"


def test_drift_is_repaired(place: Lab, node: Node) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    assert node.repair().repairs == []
    folder = place.first_node.pins / FOLDER
    link = next((folder / "links").glob("to_pod*"))
    link.unlink()  # the pin was the last to hold it
    repaired = node.repair()
    assert any(one.kind == "link" and "unpinned" in one.what for one in repaired.repairs)
    assert node.repair().repairs == []
    assert not reaches(place, "external/client", "default/b", "tcp", 4)

    with bpf.Map.from_pin(folder / "maps" / "rules") as rules:
        keys, _ = rules.read()
        rules.remove(keys)
    assert not reaches(place, "default/a", "default/b", "tcp", 4)
    repaired = node.repair()
    assert any(one.kind == "rule" for one in repaired.repairs)
    assert reaches(place, "default/a", "default/b", "tcp", 4)
    assert node.repair().repairs == []


def test_another_process_adopts_what_it_finds(place: Lab, node: Node) -> None:
    version = socket.AF_INET6
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    with (
        serving(place, "default/b", version, "tcp", 6065),
        connect(place, "default/a", "default/b", version, "tcp", 6065) as one,
    ):
        assert exchanges(one)
        before = {(link.program, link.interface) for link in node.attachments()}
        numbers = node.rule_counts()
        with api.Node(NodeName(place.name, "node-1")) as other:
            assert other.repair().repairs == []
            applied = other.apply(policy("b", {"app": "b"}, ingress=[from_app("a"), from_app("c")]))
            assert applied.attachments == []
            assert other.rule_counts()[0].packets >= numbers[0].packets > 0
        assert {(link.program, link.interface) for link in node.attachments()} == before
        assert exchanges(one)
        node.apply(policy("b", {"app": "b"}, ingress=[from_app("c")]))
        assert ended(one)


def test_a_state_that_is_gone_opens_nothing(place: Lab, node: Node) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    folder = place.first_node.state_dir
    node.close()
    for path in folder.glob("state.db*"):
        path.unlink()
    with api.Node(place.first_node) as other:
        assert "policies" in other.check_state().lost
        applied = other.apply(place.resources(), owner=api.OWNER)
        assert any("stays as it is" in line for line in applied.plan.warnings)
        assert not reaches(place, "external/client", "default/b", "tcp", 4)
        assert reaches(place, "default/a", "default/b", "tcp", 4)
        applied = other.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
        assert applied.plan.warnings == []
        assert other.check_state().lost == ""
        assert not reaches(place, "external/client", "default/b", "tcp", 4)


# What a process that is killed leaves, and a change that fails


KILLED = """
import os, signal, sys
from hookline import api
from hookline.control import policies
from hookline.datapath.firewall.firewall import Firewall

def dies(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)

def then_dies(original):
    def wrapper(*given, **named):
        original(*given, **named)
        dies()
    return wrapper

place = sys.argv[3]
if place == "before the step":
    Firewall._patch = then_dies(Firewall._patch)
elif place == "after the step":
    Firewall.commit = then_dies(Firewall.commit)
elif place == "before the commit":
    policies.Policies.carry_out = then_dies(policies.Policies.carry_out)
else:
    policies.Policies.cut = dies
with api.Node(sys.argv[1]) as node:
    node.apply(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("where", "first"),
    [
        ("before the step", False),
        ("after the step", False),
        ("before the commit", False),
        ("before the commit", True),
        ("before sockets end", False),
    ],
)
def test_a_killed_change_is_whole_or_not_there(
    place: Lab, node: Node, tmp_path: Path, where: str, first: bool
) -> None:
    """b may be asked by a before, and by c after; then by both, or by nobody else."""
    version = socket.AF_INET6
    if not first:
        node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    after = policy("b", {"app": "b"}, ingress=[from_app("c")])
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(after.to_document()))
    with (
        serving(place, "default/b", version, "tcp", 6066),
        connect(place, "default/a", "default/b", version, "tcp", 6066) as one,
    ):
        assert exchanges(one)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(node.name), str(path), where], check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        # The kernel judges by the one or the other.
        asked = asks(place, "default/a", "default/b", version, "tcp", 6066)
        other = asks(place, "default/c", "default/b", version, "tcp", 6066)
        assert (asked, other) in ((True, first), (False, True), (True, True))
        stored = {one.reference: one for one in node.resources()}.get(after.reference)
        assert (stored == after) is (where == "before sockets end")
        # The next process brings the kernel to what is wanted, and applies the change for good.
        repaired = node.repair()
        assert asks(place, "default/a", "default/b", version, "tcp", 6066) is (where != "before sockets end")
        node.apply(after)
        assert not asks(place, "default/a", "default/b", version, "tcp", 6066)
        assert asks(place, "default/c", "default/b", version, "tcp", 6066)
        assert ended(one)
        assert node.repair().repairs == [], repaired


@FAMILIES
def test_a_change_whose_services_fail_leaves_the_policies_before(
    place: Lab, node: Node, monkeypatch: pytest.MonkeyPatch, family: int
) -> None:
    node.apply(policy("b", {"app": "b"}, ingress=[from_app("a")]))
    service = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "b"},
            "spec": {
                "addresses": ["192.0.2.82"],
                "ports": [{"name": "main", "port": 80, "targetPort": 8080}],
                "backends": [{"selector": {"app": "b"}}],
            },
        }
    )

    def fails(*_: Any) -> None:
        raise bpf.BpfError("the tables are not written")

    monkeypatch.setattr(tables.Tables, "carry_out", fails)
    with pytest.raises(bpf.BpfError, match="not written"):
        node.apply([service, policy("b", {"app": "b"}, ingress=[from_app("c")])])
    with pytest.raises(bpf.BpfError, match="not written"):
        node.apply(service.model_copy(), prune=Covered(frozenset({"python"})))  # the policy would go
    monkeypatch.undo()
    assert reaches(place, "default/a", "default/b", "tcp", family)
    assert not reaches(place, "default/c", "default/b", "tcp", family)
    node.repair()
    assert reaches(place, "default/a", "default/b", "tcp", family)
    assert not reaches(place, "default/c", "default/b", "tcp", family)


def test_a_first_policy_whose_change_fails_leaves_no_firewall(
    place: Lab, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise bpf.BpfError("the services are not written")

    monkeypatch.setattr(Node, "_carry_out_kernel", fails)
    with pytest.raises(bpf.BpfError, match="not written"):
        node.apply(policy("b", {"app": "b"}))
    monkeypatch.undo()
    assert programs(node) == set()
    assert not place.first_node.pins.exists()
    assert reaches(place, "external/client", "default/b", "tcp", 4)


def test_a_pod_that_is_not_served_is_said(place: Lab, node: Node) -> None:
    ghost = labelled("ghost", "b")
    document_of = ghost.to_document()
    document_of["status"] = {"podIP": "10.99.0.1", "podIPs": [{"ip": "10.99.0.1"}]}
    applied = node.apply([policy("b", {"app": "b"}), parse(document_of)])
    assert any("default/ghost" in line and "no policy is enforced" in line for line in applied.plan.warnings)
    assert any("default/ghost" in line for line in node.repair().problems)
    node.delete(["Pod/default/ghost"])
    assert node.repair().problems == []
    assert not reaches(place, "external/client", "default/b", "tcp", 4)


def test_a_pod_whose_families_come_by_different_interfaces(place: Lab, node: Node) -> None:
    """Its policies are on both, and what it sends by either is its own."""
    served = next(one for one in place.resources() if str(one.reference) == "Pod/default/b")
    assert isinstance(served, Pod)
    six = next(str(one) for one in served.addresses if one.version == 6)
    netns = place.first_node.netns
    assert netns
    inside = netns, pod_netns(place.first_node.lab or "", "default", "b")
    commands = (
        (
            f"link add two0 type veth peer name two1 netns {inside[1].name}\n"
            "link set two0 up\naddress add fe80::77/64 dev two0 nodad\n"
            f"route add {six}/128 dev two0 metric 1\n"
        ),
        (
            f"link set two1 up\naddress add {six}/128 dev two1 nodad\n"
            "route add default via fe80::77 dev two1 metric 1\n"
        ),
    )
    try:
        for namespace, lines in zip(inside, commands, strict=True):
            subprocess.run(
                ["ip", "-netns", namespace.name, "-batch", "-"], input=lines, text=True, check=True
            )
        assert node.repair().problems == []
        applied = node.apply(policy("b", {"app": "b"}, ingress=[{}]))
        assert applied.plan.warnings == []
        on_b = {one.interface for one in node.attachments()}
        assert "two0" in on_b
        assert len(on_b) == 3, "of a, and two of b"
        for family in (4, 6):
            assert reaches(place, "external/client", "default/b", "tcp", family, patience_s=3)
        node.apply(policy("b", {"app": "b"}))
        for family in (4, 6):
            assert not reaches(place, "external/client", "default/b", "tcp", family)
    finally:
        subprocess.run(["ip", "-netns", netns.name, "link", "del", "two0"], check=False)


@FAMILIES
@PROTOCOLS
def test_the_nodes_own_connections_are_cut(place: Lab, node: Node, family: int, protocol: str) -> None:
    version = socket.AF_INET if family == 4 else socket.AF_INET6
    port = 6070 + family + (protocol == "udp")  # nothing of another test's is sent again to it
    ports = [{"port": port, "protocol": protocol.upper()}]
    node.apply(host_policy("here", ingress=[{"ports": ports}]))
    with (
        serving(place, "node/node-1", version, protocol, port) as errors,
        connect(place, "external/client", "node/node-1", version, protocol, port) as one,
    ):
        assert exchanges(one)
        applied = node.apply(host_policy("here", policyTypes=["Ingress"]))
        assert applied.plan.policies is not None
        assert applied.plan.policies.connections_cut == 1
        if protocol == "tcp":
            wait_for(lambda: errors == [errno.ECONNABORTED])
        assert not exchanges(one)


def test_an_agent_keeps_policies_and_counts(place: Lab, node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    agent = AgentProcess(place, folder, tmp_path / "agent.log")
    text = json.dumps(policy("b", {"app": "b"}, ingress=[from_app("a")]).to_document())
    agent.write(text, "policy.yaml")
    agent.start()
    try:
        assert reaches(place, "default/a", "default/b", "tcp", 4)
        assert not reaches(place, "external/client", "default/b", "udp", 6)
        rule = 'hookline_policy_rule_packets_total{direction="ingress",policy="NetworkPolicy/default/b",rule="0"}'
        until("the rule is counted", lambda: agent.metric(rule) > 0)
        denied = 'hookline_policy_packets_total{direction="ingress",reason="no_rule",verdict="drop"}'
        assert agent.metric(denied) > 0
        assert agent.metric('hookline_map_entries{map="firewall_rules"}') == 1
        (place.first_node.pins / FOLDER / "links").joinpath(
            next(one.name for one in (place.first_node.pins / FOLDER / "links").iterdir())
        ).unlink()
        until("the link is mended", lambda: agent.metric('hookline_agent_repairs_total{kind="link"}') > 0)
        agent.write(
            json.dumps(policy("b", {"app": "b"}, ingress=[from_app("c")]).to_document()), "policy.yaml"
        )
        until("the change is carried out", lambda: not reaches(place, "default/a", "default/b", "tcp", 4))
    finally:
        agent.clear()


def test_a_lab_has_its_policies_on_every_node_and_apply_says_where_one_is_not(
    unique_name: Callable[[], str], tmp_path: Path
) -> None:
    members = (labelled("a", "a"), labelled("c", "c", "node-2"), policy("all", {}))
    with lab_with(unique_name(), *members, nodes=2) as made:
        for protocol in PORTS:
            for family in (4, 6):
                for target in ("default/a", "default/c"):
                    assert not reaches(made, "external/client", target, protocol, family)
        for text, warned in (
            ("{app: c}", "selects pods on others too: default/c on node-2"),
            ("{app: a}", ""),
        ):
            file = tmp_path / "policy.yaml"
            file.write_text(
                "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: late}, "
                f"spec: {{podSelector: {{matchLabels: {text}}}}}}}"
            )
            done = subprocess.run(
                [sys.executable, "-m", "hookline", "apply", "-f", str(file), "--node", f"lab/{made.name}"],
                check=True,
                capture_output=True,
                text=True,
            )
            assert warned in done.stderr
            assert ("NetworkPolicy/default/late is applied to" in done.stderr) == bool(warned)
