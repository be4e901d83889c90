"""A lab changes while it runs: pods come and go, services are announced and withdrawn."""

from __future__ import annotations

import time
from ipaddress import ip_address

import pytest

from hookline import lab, net
from hookline.lab import Counts, Lab, LabError, ProbeFailed
from hookline.model import Pod
from hookline.model.names import fabric_netns, lab_run_dir
from tests.lab.conftest import document, pod, pods

SERVICE, SERVICE_6 = "192.0.2.10", "2001:db8::10"


@pytest.fixture
def small(lab_name: str) -> Lab:
    external = document("ExternalHost", "x", spec={"address": "203.0.113.9", "ports": [{"port": 80}]})
    return lab.up([*pods(4), external], lab_name)


def loopback(made: Lab, endpoint: str) -> set[str]:
    with net.inside(made.member(endpoint).netns):
        (lo,) = [one for one in net.interfaces() if one.name == "lo"]
    return {str(address.ip) for address in lo.addresses} - {"127.0.0.1", "::1"}


def way(made: Lab, address: str) -> str:
    with net.inside(fabric_netns(made.name)):
        route = net.route_to(ip_address(address))
    return str(route.gateway) if route.kind == "unicast" else route.kind


def test_a_pod_is_added_and_removed(small: Lab) -> None:
    resources = small.add_pod(pod("new", "node-2", metadata={"labels": {"app": "orders"}}))
    (new,) = [one for one in resources if one.name == "new"]
    assert isinstance(new, Pod)
    assert new.labels == {"app": "orders"}
    assert [str(address) for address in new.addresses] == ["10.244.2.3", "fd00:10:244:2::3"]
    for source in ("p0", "p1", "external/x", "node/node-1"):
        for family in (4, 6):
            assert small.probe(source, "new:8080", family=family).answered_by == "default/new"
    assert small.probe("new", "p0:5353/udp").answered_by == "default/p0"
    assert Lab.open(small.name).member("new") == small.member("new")
    resources = small.remove_pod("new")
    assert "new" not in {one.name for one in resources}
    assert not net.list_names(f"hl.{small.name}.pod.default.new")
    with pytest.raises(ProbeFailed) as raised:
        small.probe("p0", "10.244.2.3:8080")
    assert raised.value.reason == "unreachable"
    assert small.server_counts().of("default/new") == Counts(8, 8, 8, 0, 0)
    small.add_pod(pod("new", "node-1"))
    assert small.probe("p1", "new:8080").answered_by == "default/new"
    assert small.server_counts().of("default/new").tcp_accepted == 9


def test_pods_that_cannot_be_added_change_nothing(small: Lab) -> None:
    names = net.list_names(f"hl.{small.name}.")
    for wrong, why in (
        (pod("p0"), "there twice"),
        (pod("q", "node-9"), "node-9"),
        (pod("q", status={"podIP": "203.0.113.9"}), "203.0.113.9"),
        (document("Node", "node-3"), "only pods"),
    ):
        with pytest.raises(LabError, match=why):
            small.add_pod(wrong)
    for wrong_name in ("nobody", "external/x"):
        with pytest.raises(LabError):
            small.remove_pod(wrong_name)
    assert net.list_names(f"hl.{small.name}.") == names


def test_a_change_by_another_process_is_taken_up(small: Lab) -> None:
    other = Lab.open(small.name)
    other.add_pod(pod("one"))
    small.add_pod(pod("two"))
    assert {member.name for member in small.pods} >= {"one", "two"}
    other.refresh()
    assert other.pods == small.pods


def test_services_are_routed_to_the_node_that_announces_them(small: Lab) -> None:
    assert way(small, SERVICE) == way(small, SERVICE_6) == "unreachable"
    announcement = {"backends": [], "loopback": False}
    small.announce("node-2", {SERVICE: announcement, ip_address(SERVICE_6): announcement})  # type: ignore[dict-item]
    assert (way(small, SERVICE), way(small, SERVICE_6)) == ("172.30.0.2", "fd00:172:30::2")
    small.announce("node-1", {SERVICE: announcement})  # type: ignore[dict-item]
    assert (way(small, SERVICE), way(small, SERVICE_6)) == ("172.30.0.1", "fd00:172:30::2")
    small.announce("node-2", {SERVICE: announcement})  # type: ignore[dict-item]
    assert way(small, SERVICE) == "172.30.0.1", "said again is not said last"
    assert way(small, SERVICE_6) == "unreachable"
    small.announce("node-1", {})
    assert way(small, SERVICE) == "172.30.0.2", "the other node announces it still"
    small.announce("node-2", {})
    assert way(small, SERVICE) == "unreachable"
    assert small.probe("p0", "p1:8080").answered_by == "default/p1"


def test_the_loopback_of_backends(small: Lab) -> None:
    addresses = [
        str(address) for name in ("p1", "p3", "external/x") for address in small.member(name).addresses
    ]
    both = {"backends": addresses, "loopback": True}
    small.announce("node-1", {SERVICE: both, SERVICE_6: both})  # type: ignore[dict-item]
    for name in ("p1", "p3", "external/x"):
        assert loopback(small, name) == {SERVICE, SERVICE_6}
    assert loopback(small, "p0") == set()
    less = {"backends": addresses[:2], "loopback": True}
    small.announce("node-1", {SERVICE: less})  # type: ignore[dict-item]
    assert loopback(small, "p1") == {SERVICE}
    assert loopback(small, "p3") == loopback(small, "external/x") == set()
    small.announce("node-1", {SERVICE: {"backends": addresses[:2], "loopback": False}})
    assert loopback(small, "p1") == set()
    assert way(small, SERVICE) == "172.30.0.1"


def test_answers_leave_from_the_services_address(small: Lab) -> None:
    """Direct server return, without a balancer: the fabric sends the service straight to the backend."""
    backend = small.member("external/x")
    service = {"backends": list(backend.addresses), "loopback": True}
    small.announce("node-1", {SERVICE: service, SERVICE_6: service})  # type: ignore[dict-item]
    small.remove_pod("p0")
    small.add_pod(pod("p0", status={"podIP": "10.244.1.50"}))
    direct = small.member("p0")
    dsr = {"backends": list(direct.addresses), "loopback": True}
    small.announce("node-1", {SERVICE: dsr, SERVICE_6: dsr})  # type: ignore[dict-item]
    with net.inside(small.nodes[0].netns), net.Netlink() as netlink:
        # what the balancer will do: hand the packet to the backend as it is
        port = next(one.index for one in net.interfaces() if one.name == _port_of("default/p0"))
        for service_address, pod_address in zip((SERVICE, SERVICE_6), direct.addresses, strict=True):
            netlink.apply([net.add_route(_network(service_address), port, via=pod_address)])
    for target in (
        f"{SERVICE}:8080",
        f"[{SERVICE_6}]:8080",
        f"{SERVICE}:5353/udp",
        f"[{SERVICE_6}]:5353/udp",
    ):
        assert small.probe("p1", target).answered_by == "default/p0"


def _port_of(endpoint: str) -> str:
    from hookline.lab._topology import host_end

    return host_end(endpoint)


def _network(address: str) -> net.Network:
    from ipaddress import ip_network

    return ip_network(address)


def test_a_pod_added_later_gets_what_was_announced_for_it(small: Lab) -> None:
    small.announce("node-1", {SERVICE: {"backends": ["10.244.1.50"], "loopback": True}})
    small.add_pod(pod("late", status={"podIP": "10.244.1.50"}))
    assert loopback(small, "late") == {SERVICE}


def test_what_cannot_be_announced(small: Lab) -> None:
    with pytest.raises(LabError, match="has no node node-9"):
        small.announce("node-9", {})
    with pytest.raises(LabError, match="the address of external/x"):
        small.announce("node-1", {"203.0.113.9": {"backends": [], "loopback": False}})


def test_an_announcement_cut_short_is_made_good(small: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    service = {"backends": [str(small.member("p1").address(4))], "loopback": True}
    with monkeypatch.context() as patch:
        patch.setattr("hookline.lab._announce._put_on_loopback", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.announce("node-1", {SERVICE: service, "192.0.2.11": service})  # type: ignore[dict-item]
    assert way(small, SERVICE) == "172.30.0.1", "it came that far"
    assert loopback(small, "p1") == set()
    small.announce("node-1", {"192.0.2.11": service})  # type: ignore[dict-item]
    assert (way(small, SERVICE), way(small, "192.0.2.11")) == ("unreachable", "172.30.0.1")
    assert loopback(small, "p1") == {"192.0.2.11"}
    assert way(small, str(small.member("p1").address(4))) == "172.30.0.2", "members' own routes stay"


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_thousand_services(small: Lab) -> None:
    backends = [str(address) for member in small.pods for address in member.addresses]
    services = {
        f"192.0.{number // 250}.{number % 250 + 1}": {"backends": backends, "loopback": True}
        for number in range(1000)
    }
    begun = time.monotonic()
    small.announce("node-1", services)  # type: ignore[arg-type]
    everything = time.monotonic() - begun
    assert (way(small, "192.0.3.250"), len(loopback(small, "p3"))) == ("172.30.0.1", 1000)
    del services["192.0.3.250"]
    begun = time.monotonic()
    small.announce("node-1", services)  # type: ignore[arg-type]
    assert time.monotonic() - begun < 2
    assert (way(small, "192.0.3.250"), len(loopback(small, "p3"))) == ("unreachable", 999)
    assert everything < 8


def test_the_server_being_gone_is_said(small: Lab) -> None:
    import os
    import signal

    from hookline.lab._record import Record

    record = Record.read(small.name)
    assert record is not None
    assert record.server is not None
    os.kill(record.server.pid, signal.SIGKILL)
    os.waitpid(record.server.pid, 0)
    with pytest.raises(LabError, match="does not answer") as raised:
        small.server_counts()
    assert "hookline lab down" in raised.value.remedy
    (summary,) = [one for one in lab.list_labs() if one.name == small.name]
    assert (summary.status, summary.server) == ("up", False)
    assert (lab_run_dir(small.name) / "server.log").exists()
