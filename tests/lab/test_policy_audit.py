"""``hookline policy audit``: a policy that only reports, and is enforced again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import cli
from hookline.api import Node
from hookline.lab import Lab
from hookline.model import NetworkPolicy
from hookline.policy import AUDIT_ANNOTATION, is_audited
from hookline.sources import files
from tests.lab.conftest import lab_with, pods

POLICIES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, annotations: {team: shop}}
spec: {podSelector: {}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {}}
---
apiVersion: hookline.dev/v1alpha1
kind: HostPolicy
metadata: {name: nodes}
spec: {nodeSelector: {matchLabels: {role: none}}}
---
apiVersion: hookline.dev/v1alpha1
kind: HostPolicy
metadata: {name: web}
spec: {nodeSelector: {matchLabels: {role: none}}}
"""


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    with lab_with(unique_name(), *pods(2)[2:], nodes=2) as made:
        yield made


@pytest.fixture
def node(place: Lab, tmp_path: Path) -> Iterator[Node]:
    """The lab's first node with the policies from a file."""
    path = tmp_path / "policies.yaml"
    path.write_text(POLICIES)
    with Node(place.first_node) as opened:
        opened.apply(path)
        yield opened
        opened.delete([one.reference for one in files.loads(POLICIES)])


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], place: Lab) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(["policy", "audit", *arguments, "--node", f"lab/{place.name}"])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def audited(node: Node) -> set[str]:
    return {one.reference for one in node.resources() if is_audited(one)}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("shop/web", "NetworkPolicy/shop/web"),
        ("default/web", "NetworkPolicy/default/web"),
        ("NetworkPolicy/shop/web", "NetworkPolicy/shop/web"),
        ("nodes", "HostPolicy/nodes"),
        ("HostPolicy/web", "HostPolicy/web"),
    ],
)
def test_a_policy_is_audited_and_enforced_again(call: Any, node: Node, name: str, reference: str) -> None:
    before = {one.reference: (one, node.source_of(one.reference)) for one in node.resources()}
    status, out, err = call(name)
    assert (status, err) == (0, "")
    assert out.startswith(f"{reference} is audited: ")
    assert audited(node) == {reference}
    assert call(name)[1].startswith(f"{reference} is audited already: ")
    status, out, err = call(name, "--off", "--json")
    assert json.loads(out) == {
        "node": str(node.name),
        "policy": reference,
        "audited": False,
        "changed": True,
    }
    assert json.loads(call(name, "--off", "--json")[1])["changed"] is False
    after = {one.reference: (one, node.source_of(one.reference)) for one in node.resources()}
    assert after.keys() == before.keys()
    assert {name: source for name, (_, source) in after.items()} == {
        name: source for name, (_, source) in before.items()
    }


def test_other_annotations_stay(call: Any, node: Node) -> None:
    assert call("default/web")[0] == 0
    (policy,) = (one for one in node.resources(NetworkPolicy) if one.namespace == "default")
    assert policy.metadata.annotations == {"team": "shop", AUDIT_ANNOTATION: "true"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("web", "which policy web?"),
        ("shop/nothing", "has no policy shop/nothing"),
        ("nothing", "its policies are"),
    ],
)
@pytest.mark.usefixtures("node")
def test_a_name_that_is_not_one_policy_is_refused(call: Any, name: str, message: str) -> None:
    status, out, err = call(name)
    assert (status, out) == (1, "")
    assert message in err


def test_an_owner_s_policy_is_the_owner_s(call: Any, place: Lab, node: Node) -> None:
    (policy,) = files.loads(POLICIES.partition("---")[0].replace("name: web", "name: owned"))
    node.apply([*place.resources(), policy], owner="lab")
    try:
        status, _, err = call("default/owned")
        assert status == 1
        assert "belongs to the lab" in err
    finally:
        node.apply(place.resources(), owner="lab")
