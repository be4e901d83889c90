"""Tables on their way to a trial: what holds at each step, who is asked where, and with which addresses."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from hookline import trials
from hookline.model import InvalidResource, Pod
from hookline.trials import Step, TrialError
from hookline.trials._live import groups

Document = dict[str, Any]


def pod(name: str, address: str = "", node: str = "", **spec: Any) -> Document:
    status = {"podIP": address} if address else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {**({"nodeName": node} if node else {}), **spec},
        "status": status,
    }


def node(name: str, address: str = "") -> Document:
    found: Document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
    if address:
        found["status"] = {"addresses": [{"type": "InternalIP", "address": address}]}
    return found


def probe(source: str, target: str, **others: Any) -> Document:
    return {"from": source, "to": target, "port": 80, "expect": "allow", **others}


def table(
    name: str, resources: list[Any], *probes: Document, steps: list[Document] | None = None
) -> Document:
    return {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "PolicyTest",
        "metadata": {"name": name},
        "spec": {"resources": resources, "probes": list(probes), "steps": steps or []},
    }


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Reads tables from a file."""

    def reader(*documents: Document) -> list[Step]:
        path = tmp_path / "tables.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        return trials.read_tables([path])

    return reader


def addresses(step: Step) -> dict[str, str]:
    return {member.endpoint: str(member.addresses[0]) for member in step.plan.members}


def test_each_step_begins_with_what_the_one_before_left(read: Any) -> None:
    steps = read(
        table(
            "t",
            [pod("a"), pod("b")],
            probe("a", "b"),
            steps=[
                {"resources": [pod("c")], "remove": ["Pod/default/a"], "probes": [probe("b", "c")]},
                {"resources": [pod("c", node="node-1", hostNetwork=True)], "probes": [probe("b", "c")]},
            ],
        )
    )
    assert [(str(step), step.number, len(step.asked)) for step in steps] == [
        ("t", 0, 2),
        ("t step 1", 1, 2),
        ("t step 2", 2, 2),
    ]
    pods = [sorted(one.name for one in step.resources if isinstance(one, Pod)) for step in steps]
    assert pods == [["a", "b"], ["b", "c"], ["b", "c"]]
    assert [step.asked[0].asked for step in steps] == ["default/b", "default/c", "node/node-1"]


def test_every_probe_is_asked_in_every_family_that_it_can_be(read: Any) -> None:
    (step,) = read(
        table(
            "t",
            [pod("a")],
            probe("a", "node/node-1"),
            probe("a", "node/node-1", family=6),
            probe("a", "198.51.100.1"),
            probe("2001:db8::1", "a", protocol=["UDP", "SCTP"]),
        )
    )
    assert [(one.source, one.target, one.family, one.protocol) for one in step.asked] == [
        ("a", "node/node-1", 4, "TCP"),
        ("a", "node/node-1", 6, "TCP"),
        ("a", "node/node-1", 6, "TCP"),
        ("a", "198.51.100.1", 4, "TCP"),
        ("2001:db8::1", "a", 6, "UDP"),
        ("2001:db8::1", "a", 6, "SCTP"),
    ]


def test_machines_that_only_probes_name_are_in_the_lab_and_in_no_document(read: Any) -> None:
    (step,) = read(
        table("t", [pod("a", "198.51.100.2")], probe("a", "198.51.100.1"), probe("198.51.100.2", "a"))
    )
    assert step.asked[0].asked == "external/at-198-51-100-1"
    assert step.asked[1].asking == "default/a", "an address that a member has is that member"
    assert addresses(step)["external/at-198-51-100-1"] == "198.51.100.1"
    assert [one.kind for one in step.resources] == ["Namespace", "Node", "Pod"]


def test_who_is_given_no_address_has_one_of_his_own_in_all_tables(read: Any) -> None:
    """10.244.1.1 and .2 would be the first to be given out."""
    first, second, third = read(
        table("first", [pod("a"), pod("b")], probe("a", "b")),
        table("second", [pod("b"), pod("c", "10.244.1.1")], probe("b", "c")),
        table("third", [pod("a", "10.9.9.9"), pod("d")], probe("a", "10.244.1.2")),
    )
    assert addresses(first)["default/a"] == "10.244.1.3"
    assert addresses(first)["default/b"] == addresses(second)["default/b"] == "10.244.1.4"
    assert addresses(second)["default/c"] == "10.244.1.1"
    assert addresses(third)["default/a"] == "10.9.9.9"
    assert addresses(third)["default/d"] == "10.244.1.5"
    given = {one.name: one.addresses for one in second.resources if isinstance(one, Pod)}
    assert [str(one) for one in given["b"]] == ["10.244.1.4", "fd00:10:244:1::2"]


def test_pods_without_a_network_of_their_own(read: Any) -> None:
    """One of its node's network is the node; one that has ended leaves its address to others."""
    (step,) = read(
        table(
            "t",
            [
                node("node-1"),
                node("node-2"),
                pod("host", node="node-2", hostNetwork=True),
                {**pod("ended"), "status": {"podIP": "10.9.9.9", "phase": "Succeeded"}},
                pod("heir", "10.9.9.9"),
                {**pod("waiting"), "status": {"phase": "Pending"}},
            ],
            probe("host", "heir"),
            probe("heir", "host"),
        )
    )
    assert [(one.asking, one.asked) for one in step.asked[::2]] == [
        ("node/node-2", "default/heir"),
        ("default/heir", "node/node-2"),
    ]
    found = {one.name: one for one in step.resources if isinstance(one, Pod)}
    assert [str(one) for one in found["host"].addresses] == ["172.30.0.2", "fd00:172:30::2"]
    assert [str(one) for one in found["ended"].addresses] == ["10.9.9.9"]
    assert found["waiting"].addresses == ()
    assert [member.endpoint for member in step.plan.pods] == ["default/heir"]


@pytest.mark.parametrize("wanted", ["ended", "waiting"])
def test_a_pod_that_is_not_there_cannot_be_probed(read: Any, wanted: str) -> None:
    resources = [
        pod("a"),
        {**pod("ended"), "status": {"phase": "Failed"}},
        {**pod("waiting"), "status": {"phase": "Pending"}},
    ]
    with pytest.raises(TrialError, match=f"{wanted} cannot be probed"):
        read(table("t", resources, probe("a", wanted)))


def test_an_end_that_is_not_there_is_named_with_those_that_are(read: Any) -> None:
    with pytest.raises(TrialError, match="there is no nobody") as caught:
        read(table("t", [pod("a")], probe("a", "nobody")))
    assert "default/a, node/node-1" in caught.value.why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"resources": [], "remove": ["Pod/default/z"], "probes": [probe("a", "a")]},
            "removes Pod/default/z",
        ),
        ({"resources": [pod("b", node="node-9")], "probes": [probe("a", "a")]}, "is to run on node-9"),
        ({"resources": [pod("b", "10.1.1.1")], "probes": [probe("a", "a")]}, "has the address 10.1.1.1"),
        ({"probes": [probe("a", "2001:db8::1", family=4)]}, "no packet goes from a to 2001:db8::1"),
        ({"probes": [probe("198.51.100.1", "2001:db8::1")]}, "no packet goes"),
    ],
)
def test_a_step_that_cannot_be_is_named(read: Any, given: Document, message: str) -> None:
    with pytest.raises(TrialError, match=message) as caught:
        read(table("t", [pod("a", "10.1.1.1")], probe("a", "a"), steps=[given]))
    assert "PolicyTest/default/t step 1" in caught.value.what


def service(*backends: str) -> list[Document]:
    """A service on 10.96.0.10:80, whose backends listen on 8080."""
    metadata = {"name": "s-1", "labels": {"kubernetes.io/service-name": "s"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "s"},
            "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": "IPv4",
            "endpoints": [{"addresses": [one]} for one in backends],
            "ports": [{"port": 8080}],
        },
    ]


def test_who_asks_a_service_asks_its_backend(read: Any) -> None:
    (step,) = read(
        table("t", [pod("a"), pod("b", "10.1.1.1"), *service("10.1.1.1")], probe("a", "10.96.0.10"))
    )
    (asked,) = step.asked
    assert (asked.port, asked.via) == (80, (IPv4Address("10.96.0.10"), 80))
    assert (asked.asked, asked.listening, asked.destination) == ("default/b", 8080, "default/b")
    assert [member.endpoint for member in step.plan.externals] == []


@pytest.mark.parametrize(
    ("backends", "port", "why"),
    [
        (["10.1.1.1", "10.1.1.2"], 80, "2 backends take its connections"),
        ([], 80, "0 backends"),
        (["10.1.1.1"], 81, "the service has no such port"),
    ],
)
def test_a_service_is_probed_where_it_is_sure_who_is_asked(
    read: Any, backends: list[str], port: int, why: str
) -> None:
    resources = [pod("a"), pod("b", "10.1.1.1"), pod("c", "10.1.1.2"), *service(*backends)]
    with pytest.raises(TrialError, match=f"10.96.0.10:{port}/TCP cannot be probed") as caught:
        read(table("t", resources, probe("a", "10.96.0.10", port=port)))
    assert why in caught.value.why


def test_files_are_looked_for_beside_the_table(read: Any, tmp_path: Path) -> None:
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "a.yaml").write_text(yaml.safe_dump_all([pod("a"), pod("b")]))
    (step,) = read(table("t", ["pods/a.yaml"], probe("a", "b")))
    assert [member.endpoint for member in step.plan.pods] == ["default/a", "default/b"]
    with pytest.raises(InvalidResource, match="no such file"):
        read(table("t", ["pods/z.yaml"], probe("a", "b")))


def test_what_stands_beside_tables_holds_for_all_of_them(read: Any) -> None:
    first, second = read(
        pod("a"), table("first", [], probe("a", "a")), table("second", [pod("b")], probe("a", "b"))
    )
    assert [member.endpoint for member in first.plan.pods] == ["default/a"]
    assert [member.endpoint for member in second.plan.pods] == ["default/a", "default/b"]


def test_no_table_is_an_error(read: Any) -> None:
    with pytest.raises(TrialError, match="nothing to try") as caught:
        read(pod("a"))
    shown = Path(__file__).parents[2] / (caught.value.remedy or "").split()[0]
    assert "kind: PolicyTest" in shown.read_text()


def test_tables_that_one_network_cannot_hold_are_tried_in_several(read: Any) -> None:
    steps = read(
        table("first", [node("node-1", "172.30.0.9"), pod("a", "10.1.1.1")], probe("a", "a")),
        table("again", [node("node-1", "172.30.0.9"), pod("a", "10.1.1.2")], probe("a", "a")),
        table("moved", [node("node-1", "172.30.0.8")], probe("node/node-1", "198.51.100.1")),
        table("beside", [pod("b")], probe("b", "198.51.100.1")),
        table("taken", [node("node-1", "172.30.0.8"), pod("c", "198.51.100.1")], probe("c", "c")),
    )
    found = [[step.test for step in group] for group in groups(steps)]
    assert found[0] == ["first", "again"]
    assert found[1][0] == "moved"
    assert found[-1] == ["taken"]
    assert [name for group in found for name in group] == ["first", "again", "moved", "beside", "taken"]
