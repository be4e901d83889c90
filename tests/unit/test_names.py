"""Names of nodes and endpoints, and the places that follow from them."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from hookline.model import names
from hookline.model.names import Endpoint, InvalidName, NodeName


def test_host_is_where_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOKLINE_STATE", raising=False)
    host = NodeName.parse("host")
    assert host.netns is None
    assert host.pins == Path("/sys/fs/bpf/hookline/host")
    assert host.state_dir == Path("/var/lib/hookline/host")
    assert str(host) == "host"


def test_a_labs_node_has_its_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOKLINE_STATE", raising=False)
    node = NodeName.parse("lab/demo/node-2")
    assert node.netns == Path("/run/netns/hl.demo.node.node-2")
    assert node.pins == Path("/sys/fs/bpf/hookline/lab/demo/node-2")
    assert node.state_dir == Path("/var/lib/hookline/lab/demo/node-2")
    assert str(node) == "lab/demo/node-2"
    assert NodeName.parse(str(node)) == node


def test_pins_have_no_dots_because_bpffs_refuses_them() -> None:
    assert "." not in NodeName.parse("lab/demo/node-1.example.org").pins.name


def test_a_lab_alone_means_its_first_node() -> None:
    assert NodeName.parse("lab/demo") == NodeName("demo", "node-1")
    assert NodeName.parse("lab/demo", first_node="balancer") == NodeName("demo", "balancer")


def test_the_state_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKLINE_STATE", "/tmp/x")
    assert NodeName.parse("host").state_dir == Path("/tmp/x/host")
    assert NodeName.parse("lab/l").state_dir == Path("/tmp/x/lab/l/node-1")


@pytest.mark.parametrize(
    "text", ["", "Host", "lab", "lab/", "lab/A", "lab/x/", "lab/x/y/z", "node-1", f"lab/{'x' * 33}"]
)
def test_what_is_not_a_node(text: str) -> None:
    with pytest.raises(InvalidName) as raised:
        NodeName.parse(text)
    assert raised.value.why
    assert raised.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("a", Endpoint("pod", "a", "default")),
        ("shop/a", Endpoint("pod", "a", "shop")),
        ("shop/a:80", Endpoint("pod", "a", "shop", port=80)),
        ("a:53/udp", Endpoint("pod", "a", "default", port=53, protocol="udp")),
        ("a:53/UDP", Endpoint("pod", "a", "default", port=53, protocol="udp")),
        ("a:7/sctp", Endpoint("pod", "a", "default", port=7, protocol="sctp")),
        ("external/client", Endpoint("external", "client")),
        ("external/client:443/tcp", Endpoint("external", "client", port=443)),
        ("node/node-1", Endpoint("node", "node-1")),
        ("10.0.0.1", Endpoint("address", address=ip_address("10.0.0.1"))),
        ("10.0.0.1:80", Endpoint("address", address=ip_address("10.0.0.1"), port=80)),
        ("2001:db8::10", Endpoint("address", address=ip_address("2001:db8::10"))),
        ("[2001:db8::10]", Endpoint("address", address=ip_address("2001:db8::10"))),
        (
            "[2001:db8::10]:80/udp",
            Endpoint("address", address=ip_address("2001:db8::10"), port=80, protocol="udp"),
        ),
    ],
)
def test_endpoints(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "a:",
        "a:0",
        "a:65536",
        "a:http",
        "a:80/",
        "a:80/icmp",
        "a/b/c",
        "A",
        "-a",
        "a_b",
        "[10.0.0.1]:80",
        "[2001:db8::10",
        "2001:db8::10]:80",
        "fe80::1%eth0",
        "external/",
        "node/",
        "Shop/a",
        "a:²",
    ],
)
def test_what_is_not_an_endpoint(text: str) -> None:
    with pytest.raises(InvalidName) as raised:
        Endpoint.parse(text)
    assert raised.value.why


@pytest.mark.parametrize("namespace", ["external", "node", "a.b", "", "x" * 64])
def test_what_is_not_a_namespace(namespace: str) -> None:
    with pytest.raises(InvalidName):
        names.check_namespace(namespace)


def test_members_and_their_network_namespaces() -> None:
    assert Endpoint.parse("a:80").member == "default/a"
    assert Endpoint.parse("a").netns("demo").name == "hl.demo.pod.default.a"
    assert Endpoint.parse("external/x").netns("demo").name == "hl.demo.external.x"
    assert Endpoint.parse("node/n").netns("demo").name == "hl.demo.node.n"
    assert names.fabric_netns("demo").name == "hl.demo.fabric"
    assert Endpoint.parse("a").at(53, "udp") == Endpoint.parse("a:53/udp")
    with pytest.raises(InvalidName):
        Endpoint.parse("10.0.0.1").netns("demo")


def test_no_labs_namespaces_can_be_taken_for_anothers() -> None:
    assert not names.fabric_netns("demo-1").name.startswith(names.lab_netns_prefix("demo"))
    with pytest.raises(InvalidName, match="too long"):
        names.pod_netns("x" * 32, "y" * 63, "z" * 200)
