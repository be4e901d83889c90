"""What get and describe print of policies and tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hookline.cli import _describe, _documents, _tables, objects
from hookline.control.plan import Plan, PolicyChange
from hookline.control.verdicts import RuleCount
from hookline.model import Resource
from hookline.sources import files

EXAMPLES = Path(__file__).parents[2] / "examples" / "policies"


def example(name: str) -> Resource:
    return files.load([EXAMPLES / f"{name}.yaml"])[0]


def listed(resource: Resource, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The columns of an object's row in its table."""
    _tables.print_items(resource.kind, [_documents.item(resource, "file", {}, {})])
    head, row = capsys.readouterr().out.splitlines()
    names = list(re.finditer(r"\S+", head))
    ends = [*(name.start() for name in names[1:]), None]
    return {name[0]: row[name.start() : end].strip() for name, end in zip(names, ends, strict=True)}


def described(resource: Resource, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The words of each line."""
    item = _documents.item(resource, "file", {}, {})
    _describe.print_item({"node": "host", "item": item, "totals": None, "attachments": []}, resource)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_network_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    columns = listed(example("networkpolicy"), capsys)
    assert columns["NAMESPACE"] == "shop"
    assert columns["PODS"] == "app=database"
    assert columns["TYPES"] == "Ingress Egress"
    assert (columns["INGRESS"], columns["EGRESS"], columns["MODE"]) == ("1", "0", "enforce")


def test_types_that_are_not_said_are_listed_as_they_are_meant(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, annotations: "
        '{hookline.dev/audit: "true"}}, spec: {egress: [{}]}}'
    )
    columns = listed(files.loads(text)[0], capsys)
    assert columns["TYPES"] == "Ingress Egress"
    assert (columns["PODS"], columns["MODE"]) == ("all", "audit")


def test_host_policies_and_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    columns = listed(example("hostpolicy"), capsys)
    assert (columns["NODES"], columns["TYPES"], columns["DEFAULT"]) == ("role=edge", "Ingress", "deny")
    columns = listed(example("policytest"), capsys)
    assert (columns["STEPS"], columns["PROBES"]) == ("2", "14")


def test_a_network_policy_is_described_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    lines = described(example("networkpolicy"), capsys)
    assert ["pods", "{app=database}", "of", "namespace", "shop"] in lines
    assert ["isolates", "for", "ingress", "and", "egress"] in lines
    assert ["egress:", "nothing", "is", "allowed"] in lines
    (rule,) = (" ".join(line) for line in lines if line[:1] == ["0"])
    assert "namespaceSelector {team=shop} podSelector {app in (web,api)}" in rule
    assert "ipBlock 192.0.2.0/24 except 192.0.2.128/25" in rule
    assert "postgres/TCP 9100-9199/TCP" in rule


def test_rules_that_mean_nothing_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: "
        "{policyTypes: [Ingress], ingress: [{}], egress: [{}]}}"
    )
    lines = [" ".join(line) for line in described(files.loads(text)[0], capsys)]
    assert "egress: its rules mean nothing, since policyTypes has no Egress" in lines
    assert "0 anybody any - -" in lines


def test_a_host_policy_is_described_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    lines = described(example("hostpolicy"), capsys)
    assert ["nodes", "{role=edge}"] in lines
    assert ["default", "deny"] in lines
    assert any("nodeSelector {};" in " ".join(line) for line in lines)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1, ["1 row of rules", "1 pod and 1 address are", "1 open connection would"]),
        (2, ["2 rows of rules", "2 pods and 2 addresses are", "2 open connections would"]),
    ],
)
def test_a_plan_counts_in_words(number: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    change = PolicyChange(rules_added=number, endpoints=number, identities=number, connections_cut=number)
    objects._print_policies(Plan(resources=[], policies=change))
    printed = capsys.readouterr().out
    assert [one for one in said if one not in printed] == []


def test_what_rules_let_through_stands_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    resource = example("hostpolicy")
    counts = {resource.reference: [RuleCount(resource.reference, "ingress", 0, 12, 3456)]}
    item = _documents.item(resource, "file", {}, counts)
    _describe.print_item({"node": "host", "item": item, "totals": None, "attachments": []}, resource)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2:] for line in lines if line[:1] == ["0"]] == [["12", "3456"]]
    assert all(line[-2:] == ["-", "-"] for line in lines if line[:1] == ["1"]), "which the node does not have"
