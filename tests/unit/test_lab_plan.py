"""From resources to a lab's members: addresses, names, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hookline.lab import LabError
from hookline.lab._plan import plan
from hookline.model import ExternalHost, Namespace, Node, Pod, Resource, parse
from hookline.model.names import InvalidName


def make(kind: str, name: str, **fields: Any) -> Resource:
    version = "hookline.dev/v1alpha1" if kind == "ExternalHost" else "v1"
    metadata = {"name": name, **fields.pop("metadata", {})}
    return parse({"apiVersion": version, "kind": kind, "metadata": metadata, **fields})


def on(node: str) -> dict[str, Any]:
    return {"spec": {"nodeName": node}}


def test_addresses_are_chosen_in_the_order_of_the_file() -> None:
    resources = [
        make("Node", "n1"),
        make("Node", "n2"),
        make("Pod", "a", **on("n1")),
        make("Pod", "b", **on("n2")),
        make("Pod", "c"),
        make("ExternalHost", "x", spec={"address": "203.0.113.1"}),
        make("ExternalHost", "y", spec={"address": "2001:db8:203::1"}),
    ]
    made = plan(resources, "demo")
    addresses = {member.endpoint: [str(address) for address in member.addresses] for member in made.members}
    assert addresses == {
        "node/n1": ["172.30.0.1", "fd00:172:30::1"],
        "node/n2": ["172.30.0.2", "fd00:172:30::2"],
        "default/a": ["10.244.1.1", "fd00:10:244:1::1"],
        "default/b": ["10.244.2.1", "fd00:10:244:2::1"],
        "default/c": ["10.244.1.2", "fd00:10:244:1::2"],
        "external/x": ["203.0.113.1", "2001:db8:203::2"],
        "external/y": ["203.0.113.2", "2001:db8:203::1"],
    }
    assert plan(resources, "demo") == made
    assert plan(made.resources, "demo") == made, "complete resources stay as they are"


def test_the_resources_have_everything_filled_in() -> None:
    pod = make("Pod", "a", metadata={"namespace": "shop", "labels": {"app": "x"}}, extra={"kept": 1})
    made = plan([pod, make("ExternalHost", "x", spec={"address": "203.0.113.7"})], "demo")
    namespace, node, filled, external = made.resources
    assert isinstance(namespace, Namespace)
    assert namespace.labels == {"kubernetes.io/metadata.name": "shop"}
    assert isinstance(node, Node)
    assert (node.name, node.spec.pod_cidrs) == ("node-1", ("10.244.1.0/24", "fd00:10:244:1::/64"))
    assert isinstance(filled, Pod)
    assert (filled.spec.node_name, filled.status.pod_ip, filled.status.phase) == (
        "node-1",
        "10.244.1.1",
        "Running",
    )
    assert filled.labels == {"app": "x"}
    assert filled.to_document()["extra"] == {"kept": 1}
    assert isinstance(external, ExternalHost)
    assert [str(address) for address in external.addresses] == ["203.0.113.7", "2001:db8:203::1"]


def test_what_is_given_is_honoured_and_not_given_out_again() -> None:
    internal = [
        {"type": "Hostname", "address": "n"},
        {"type": "InternalIP", "address": "172.30.0.2"},
    ]
    resources = [
        make("Node", "n1", status={"addresses": internal}, spec={"podCIDR": "10.9.0.0/29"}),
        make("Node", "n2"),
        make("Node", "n3"),
        make("Pod", "a", **on("n1")),
        make(
            "Pod",
            "b",
            **on("n1"),
            status={"podIP": "10.9.0.1", "podIPs": [{"ip": "10.9.0.1"}, {"ip": "fd09::1"}]},
        ),
    ]
    made = plan(resources, "demo")
    assert [str(member.addresses[0]) for member in made.nodes] == ["172.30.0.2", "172.30.0.1", "172.30.0.3"]
    assert [str(member.addresses[0]) for member in made.pods] == ["10.9.0.2", "10.9.0.1"]
    assert str(made.pods[1].address(6)) == "fd09::1"
    node = made.resources[1]
    assert isinstance(node, Node)
    assert node.to_document()["status"]["addresses"][-1]["type"] == "Hostname"


def test_one_family() -> None:
    made = plan([make("Pod", "a", status={"podIPs": [{"ip": "fd00::1"}]})], "demo", (4,))
    assert [str(address) for member in made.members for address in member.addresses] == [
        "172.30.0.1",
        "10.244.1.1",
    ]
    assert made.pods[0].address(6) is None


def test_ports_are_those_of_all_containers_each_once() -> None:
    containers = [
        {
            "name": "a",
            "ports": [{"name": "http", "containerPort": 80}, {"containerPort": 53, "protocol": "UDP"}],
        },
        {"name": "b", "ports": [{"containerPort": 80}, {"containerPort": 53, "protocol": "TCP"}]},
    ]
    (pod,) = plan([make("Pod", "a", spec={"containers": containers})], "demo").pods
    assert sorted(map(str, pod.ports)) == ["53/tcp", "53/udp", "80/tcp"]


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ([make("Pod", "a", **on("n9"))], "to run on n9: the lab's nodes are node-1"),
        (
            [make("Pod", "a", status={"podIP": "10.0.0.1"}), make("Pod", "b", status={"podIP": "10.0.0.1"})],
            "pod default/b has the address 10.0.0.1: pod default/a has it too",
        ),
        (
            [
                make("Pod", "a", status={"podIP": "203.0.113.1"}),
                make("ExternalHost", "x", spec={"address": "203.0.113.1"}),
            ],
            "external/x has the address 203.0.113.1: pod default/a has it too",
        ),
        ([make("Pod", "a"), make("Pod", "a")], "Pod/default/a is there twice"),
        ([make("Pod", "a", status={"podIP": "127.0.0.1"})], "cannot have the address 127.0.0.1"),
        ([make("Pod", "a", status={"podIP": "169.254.1.1"})], "cannot have the address 169.254.1.1"),
        (
            [make("Pod", "a", status={"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]})],
            "has 2 IPv4 addresses",
        ),
        ([make("Pod", "a", spec={"hostNetwork": True})], "hostNetwork"),
        ([make("Node", "n", spec={"podCIDR": "10.0.0.1/24"}), make("Pod", "a")], "the podCIDR '10.0.0.1/24'"),
        (
            [
                make("Node", "n", spec={"podCIDR": "10.0.0.0/30"}),
                *(make("Pod", f"p{one}") for one in range(3)),
            ],
            "pod default/p2 cannot be given an IPv4 address: none is free in 10.0.0.0/30",
        ),
        ([make("Node", f"n{number}") for number in range(255)], "at most 254 nodes"),
    ],
)
def test_what_cannot_be_a_lab(resources: list[Resource], why: str) -> None:
    with pytest.raises(LabError) as raised:
        plan(resources, "demo")
    assert why in str(raised.value)


def test_a_namespace_that_endpoints_could_not_name() -> None:
    with pytest.raises(InvalidName):
        plan([make("Pod", "a", metadata={"namespace": "external"})], "demo")
