"""Policies that are wrong, huge, or for nobody: what is refused changes nothing, and the last good state stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hookline import api, cli, lab
from hookline.api import Node
from hookline.control import DoesNotFit
from hookline.lab import Lab, Prober, Question
from hookline.model import InvalidResource, Resource, parse
from hookline.sources import files

CAST = Path(__file__).parents[1] / "policy" / "cast" / "cluster.yaml"
PORT = 7000
KEY, VALUE = "x" * 253 + "/" + "Y" * 63, "A" + "_" * 61 + "z"
SHOWN = "NetworkPolicy/default/p"


def policy(name: str = "p", namespace: str = "default", **spec: Any) -> Resource:
    return parse(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec,
        }
    )


def blocks(number: int) -> list[Any]:
    """So many rules, each for an address and a port of its own."""
    return [
        {
            "from": [{"ipBlock": {"cidr": f"11.{which >> 16}.{which >> 8 & 255}.{which & 255}/32"}}],
            "ports": [{"port": which % 65535 + 1}],
        }
        for which in range(number)
    ]


GOOD = policy(
    podSelector={"matchLabels": {"app": "b"}},
    ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}],
)
"""`default/b` is reached by `default/a` alone."""


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    name = unique_name()
    try:
        config = {"maps": {"identities": 2048, "rules": 4096}}
        node = {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "NodeConfig",
            "metadata": {"name": "node-1"},
            "spec": config,
        }
        yield api.lab_up([*files.load([CAST]), parse(node)], name)
    finally:
        lab.down(name)


@pytest.fixture(scope="module")
def prober(place: Lab) -> Iterator[Prober]:
    with Prober(place) as made:
        yield made


@pytest.fixture
def node(place: Lab, tmp_path: Path) -> Iterator[Node]:
    """The first node, with the good policy."""
    with Node(place.first_node) as opened:
        opened.apply(write(tmp_path, "good.yaml", [GOOD]))
        yield opened
        opened.delete([one.reference for one in opened.resources() if one.kind == "NetworkPolicy"])


def write(folder: Path, name: str, resources: Sequence[Resource] | str) -> Path:
    path = folder / name
    path.write_text(resources if isinstance(resources, str) else files.dump(resources))
    return path


def reached(prober: Prober, source: str, target: str) -> list[bool]:
    """Whether a target is reached over TCP and UDP, IPv4 and IPv6."""
    questions = [
        Question(source, target, PORT, protocol, family) for protocol in ("tcp", "udp") for family in (4, 6)
    ]
    return [heard.outcome == "allow" for heard in prober.ask(questions)]


def is_good(prober: Prober) -> bool:
    """Whether all is as the good policy has it."""
    return reached(prober, "default/a", "default/b") == [True] * 4 and not any(
        reached(prober, "shop/a", "default/b")
    )


def policies(node: Node) -> list[Resource]:
    return [one for one in node.resources() if one.kind == "NetworkPolicy"]


@pytest.mark.parametrize(
    "wrong",
    [
        "spec: {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.1/8}}]}]}",
        "spec: {podSelector: {matchExpressions: [{key: app, operator: In}]}}",
        "spec: {podSelector: {}, ingres: [{}]}",
        "spec: {podSelector: {matchLabels: {app: b}}, ingress: [{ports: [{port: 0}]}]}",
        f"spec: {{podSelector: {{matchLabels: {{app: {'b' * 64}}}}}}}",
        "spec: {podSelector: {}, ingress: [null]}",
    ],
)
def test_one_wrong_policy_keeps_all_of_its_files_out(
    node: Node, prober: Prober, tmp_path: Path, wrong: str
) -> None:
    head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s}\n"
    text = files.dump([policy("deny")]) + "---\n" + head % "wrong" + wrong + "\n"
    with pytest.raises(InvalidResource):
        node.apply(write(tmp_path, "wrong.yaml", text))
    assert policies(node) == [GOOD]
    assert is_good(prober)


def test_two_policies_of_one_name_are_refused(node: Node, prober: Prober, tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", [policy()])
    second = write(tmp_path, "b.yaml", [policy(policyTypes=["Egress"])])
    with pytest.raises(InvalidResource, match="the same object is already at"):
        node.apply([first, second])
    assert policies(node) == [GOOD]
    assert is_good(prober)


def test_one_name_in_two_namespaces_is_two_policies(node: Node, prober: Prober, tmp_path: Path) -> None:
    node.apply(write(tmp_path, "two.yaml", [policy(namespace="shop")]))
    assert {one.reference for one in policies(node)} == {SHOWN, "NetworkPolicy/shop/p"}
    assert not any(reached(prober, "default/a", "shop/a"))
    assert is_good(prober)


def test_a_policy_for_an_absent_namespace_is_kept_and_is_for_nobody(
    node: Node, prober: Prober, tmp_path: Path
) -> None:
    node.apply(write(tmp_path, "ghost.yaml", [policy(namespace="ghost", policyTypes=["Ingress", "Egress"])]))
    assert len(policies(node)) == 2
    assert is_good(prober)
    assert reached(prober, "shop/a", "default/a") == [True] * 4


def test_labels_at_their_limits(node: Node, prober: Prober, tmp_path: Path) -> None:
    longest = {"matchLabels": {KEY: VALUE}}
    rule = {"from": [{"podSelector": {"matchExpressions": [{"key": KEY, "operator": "DoesNotExist"}]}}]}
    node.apply(
        write(
            tmp_path,
            "long.yaml",
            [
                policy("nobody", podSelector=longest),
                policy("more", podSelector={"matchLabels": {"app": "b"}}, ingress=[rule]),
            ],
        )
    )
    assert reached(prober, "default/c", "default/b") == [True] * 4
    assert not any(reached(prober, "shop/a", "default/b"))
    node.delete(["NetworkPolicy/default/nobody", "NetworkPolicy/default/more"])
    assert not any(reached(prober, "default/c", "default/b"))


def test_what_does_not_fit_is_refused_with_its_number(node: Node, prober: Prober, tmp_path: Path) -> None:
    huge = policy("huge", podSelector={"matchLabels": {"app": "b"}}, ingress=blocks(3000))
    with pytest.raises(DoesNotFit, match=r"2,?048"):
        node.apply(write(tmp_path, "huge.yaml", [huge]))
    many = policy(
        "huge",
        podSelector={"matchLabels": {"app": "b"}},
        ingress=[{"ports": [{"port": port} for port in range(1, 10_000, 2)]}],
    )
    with pytest.raises(DoesNotFit, match=r"4,?096"):
        node.apply(write(tmp_path, "huge.yaml", [many]))
    assert policies(node) == [GOOD]
    assert is_good(prober)
    fits = policy("huge", podSelector={"matchLabels": {"app": "b"}}, ingress=blocks(1000))
    node.apply(write(tmp_path, "huge.yaml", [fits]))
    assert is_good(prober)


def test_get_describe_and_delete(
    node: Node, place: Lab, prober: Prober, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--node", f"lab/{place.name}"]

    def call(*words: str) -> str:
        assert cli.run([*words, *where]) == 0
        return capsys.readouterr().out

    assert "app=b" in call("get", "netpol")
    (item,) = json.loads(call("get", "networkpolicies", "p", "--json"))["items"]
    assert item["object"] == GOOD.to_document()
    assert "podSelector {app=a}" in call("describe", "netpol", "p")
    assert json.loads(call("describe", SHOWN, "--json"))["item"]["reference"] == SHOWN
    assert f"{SHOWN} removed" in call("delete", "netpol", "p")
    assert reached(prober, "shop/a", "default/b") == [True] * 4
