"""Kubernetes' Services as real sockets see them: from pods and the node by connect-time programs, from outside through XDP.

Two nodes in two zones with one pod of the service ``web`` each. Every rule is asked in both families, over TCP and UDP.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from hookline import api, control, lab, net
from hookline.lab import Lab, ProbeFailed
from hookline.lab._inside import open_sockets
from hookline.model import Resource, parse
from hookline.model.names import NodeName
from tests.lab.conftest import document

Protocol = Literal["tcp", "udp"]
Family = Literal[4, 6]
FAMILIES = pytest.mark.parametrize("version", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
CLUSTER = {4: "10.96.0.10", 6: "fd00:96::10"}
EXTERNAL = {4: "192.0.2.10", 6: "2001:db8:192::10"}
BALANCER = {4: "192.0.2.11", 6: "2001:db8:192::11"}
NODE_1 = {4: "172.30.0.1", 6: "fd00:172:30::1"}
NODE_2 = {4: "172.30.0.2", 6: "fd00:172:30::2"}
PODS = {
    "web-1": ("node-1", {4: "10.244.1.10", 6: "fd00:244:1::10"}),
    "web-2": ("node-2", {4: "10.244.2.10", 6: "fd00:244:2::10"}),
}
FIRST, SECOND = "default/web-1", "default/web-2"
BOTH = {FIRST, SECOND}
INSIDE = ("default/asker", "node/node-1")
OUTSIDE = "external/client"
NUMBER = {"tcp": 80, "udp": 53}
NODE_PORT = {"tcp": 30080, "udp": 30053}
ASKED = 20
"""How often is asked who answers: that two backends of equal weight do not both show is less than one in 500,000."""


def _web_pod(name: str) -> Resource:
    """A pod whose ports have names; the numbers behind them are not the same in both."""
    node, addresses = PODS[name]
    http, dns = (8080, 5353) if name == "web-1" else (9080, 9053)
    return document(
        "Pod",
        name,
        metadata={"labels": {"app": "web"}},
        spec={
            "nodeName": node,
            "containers": [
                {
                    "name": "server",
                    "ports": [
                        {"name": "http", "containerPort": http},
                        {"name": "dns", "containerPort": dns, "protocol": "UDP"},
                    ],
                }
            ],
        },
        status={"podIP": addresses[4], "podIPs": [{"ip": addresses[4]}, {"ip": addresses[6]}]},
    )


def _node(number: int) -> Resource:
    addresses = (NODE_1, NODE_2)[number - 1]
    return document(
        "Node",
        f"node-{number}",
        metadata={"labels": {"topology.kubernetes.io/zone": f"zone-{number}"}},
        status={"addresses": [{"type": "InternalIP", "address": one} for one in addresses.values()]},
    )


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """The cluster, without services."""
    name = unique_name()
    resources = [
        *(_node(number) for number in (1, 2)),
        *(_web_pod(pod) for pod in PODS),
        document("Pod", "asker", spec={"nodeName": "node-1"}),
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
        document(
            "ExternalHost",
            "legacy",
            spec={
                "addresses": ["203.0.113.1", "2001:db8:203::1"],
                "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
            },
        ),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture
def apply(place: Lab) -> Iterator[Callable[..., None]]:
    """Applies documents to a node (the first where none is named), and removes them after the test."""
    added: dict[str, list[str]] = {}

    def carry_out(*documents: dict[str, Any], node: str = "node-1") -> None:
        resources = [parse(one) for one in documents]
        with api.Node(NodeName(place.name, node)) as opened:
            opened.apply(resources)
        added.setdefault(node, []).extend(
            one.reference for one in resources if one.reference not in added.get(node, ())
        )

    yield carry_out
    for node, references in added.items():
        with api.Node(NodeName(place.name, node)) as opened:
            opened.delete(references)


def service(*, status: Any = None, name: str = "web", **spec: Any) -> dict[str, Any]:
    """The Service, reached on ports whose targets are named."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": CLUSTER[4],
            "clusterIPs": list(CLUSTER.values()),
            "selector": {"app": "web"},
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http", "nodePort": NODE_PORT["tcp"]},
                {
                    "name": "dns",
                    "port": 53,
                    "targetPort": "dns",
                    "nodePort": NODE_PORT["udp"],
                    "protocol": "UDP",
                },
            ],
        }
        | spec,
        "status": status or {},
    }


def slices(
    *endpoints: dict[str, Any], addresses: dict[int, dict[str, str]] | None = None, name: str = "web"
) -> list[dict[str, Any]]:
    """A slice of each family and port set, endpoints by pod: ``{"pod": "web-1", "conditions": …}``."""
    found = []
    for version in (4, 6):
        for one in endpoints:
            pod = one["pod"]
            http, dns = (9080, 9053) if pod == "web-2" else (8080, 5353)
            node, own = PODS.get(pod, ("", {4: "203.0.113.1", 6: "2001:db8:203::1"}))
            fields = {key: value for key, value in one.items() if key != "pod"}
            endpoint = {"addresses": [own[version]], **({"nodeName": node} if node else {}), **fields}
            found.append(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{name}-{pod}-{version}",
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "addressType": f"IPv{version}",
                    "ports": [
                        {"name": "http", "port": http},
                        {"name": "dns", "port": dns, "protocol": "UDP"},
                    ],
                    "endpoints": [endpoint],
                }
            )
    return found


def who(
    place: Lab, source: str, address: str, number: int, protocol: Protocol, times: int = ASKED
) -> set[str]:
    """Who answers; ``refused`` or another reason where nobody does."""
    found = set()
    for _ in range(times):
        try:
            found.add(place.probe(source, address, number, protocol).answered_by)
        except ProbeFailed as failed:
            found.add(failed.reason)
    return found


@FAMILIES
@PROTOCOLS
def test_internal_traffic_policy(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    at = CLUSTER[version], NUMBER[protocol], protocol
    apply(service())
    for source in INSIDE:
        assert who(place, source, *at) == BOTH
    apply(service(internalTrafficPolicy="Local"))
    for source in (*INSIDE, OUTSIDE):
        assert who(place, source, *at) == {FIRST}
    apply(*slices({"pod": "web-2"}))
    for source in (*INSIDE, OUTSIDE):
        assert who(place, source, *at, times=2) == {"refused"}


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("kind", ["external", "balancer", "node port"])
def test_external_traffic_policy(
    place: Lab, apply: Any, kind: str, version: Family, protocol: Protocol
) -> None:
    """Clients outside get the node's own endpoints, clients inside all of them: a node's policy binds nobody within."""
    address, number = {
        "external": (EXTERNAL[version], NUMBER[protocol]),
        "balancer": (BALANCER[version], NUMBER[protocol]),
        "node port": (NODE_1[version], NODE_PORT[protocol]),
    }[kind]
    fields: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalIPs": list(EXTERNAL.values()),
        "status": {"loadBalancer": {"ingress": [{"ip": one} for one in BALANCER.values()]}},
    }
    at = address, number, protocol
    apply(service(**fields))
    for source in (*INSIDE, OUTSIDE):
        assert who(place, source, *at) == BOTH
    apply(service(**fields, externalTrafficPolicy="Local"))
    assert who(place, OUTSIDE, *at) == {FIRST}
    for source in INSIDE:
        assert who(place, source, *at) == BOTH
    apply(*slices({"pod": "web-2"}))
    assert who(place, OUTSIDE, *at, times=2) == {"refused"}
    for source in INSIDE:
        assert who(place, source, *at, times=4) == {SECOND}


@FAMILIES
@PROTOCOLS
def test_local_endpoints_see_the_clients_address(
    place: Lab, apply: Any, version: Family, protocol: Protocol
) -> None:
    apply(
        service(
            externalIPs=list(EXTERNAL.values()),
            externalTrafficPolicy="Local",
            ports=[{"name": "raw", "port": 81, "targetPort": 7001, "protocol": protocol.upper()}],
        )
    )
    client = {4: "198.51.100.7", 6: "2001:db8:51::7"}[version]
    with net.inside(place.member(FIRST).netns):
        listening = socket.socket(
            socket.AF_INET if version == 4 else socket.AF_INET6,
            socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM,
        )
        listening.bind((PODS["web-1"][1][version], 7001))
    (asking,) = place.sockets(OUTSIDE, version, protocol)
    with listening, asking:
        listening.settimeout(5)
        asking.settimeout(5)
        if protocol == "tcp":
            listening.listen()
        asking.connect((EXTERNAL[version], 81))
        if protocol == "tcp":
            accepted, peer = listening.accept()
            accepted.close()
        else:
            asking.send(b"who")
            _, peer = listening.recvfrom(100)
    assert peer[0] == client


@FAMILIES
@PROTOCOLS
def test_node_ports_on_every_node(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    fields: dict[str, Any] = {"type": "NodePort", "clusterIP": "", "clusterIPs": []}
    for node in ("node-1", "node-2"):
        apply(service(**fields), node=node)
    for address in (NODE_1[version], NODE_2[version]):
        for source in (*INSIDE, "node/node-2", OUTSIDE):
            assert who(place, source, address, NODE_PORT[protocol], protocol) == BOTH
    # What is not the service's stays the node's.
    assert who(place, OUTSIDE, NODE_1[version], 30099, protocol, times=1) == {"refused"}
    for node in ("node-1", "node-2"):
        apply(service(**fields, externalTrafficPolicy="Local"), node=node)
    assert who(place, OUTSIDE, NODE_1[version], NODE_PORT[protocol], protocol, 8) == {FIRST}
    assert who(place, OUTSIDE, NODE_2[version], NODE_PORT[protocol], protocol, 8) == {SECOND}
    assert who(place, "default/asker", NODE_2[version], NODE_PORT[protocol], protocol) == BOTH


@FAMILIES
@PROTOCOLS
def test_headless_services_are_left_to_dns(
    place: Lab, apply: Any, version: Family, protocol: Protocol
) -> None:
    apply(service(name="other", clusterIP="10.96.0.99", clusterIPs=["10.96.0.99"], selector={"app": "none"}))
    apply(service(clusterIP="None", clusterIPs=["None"]))
    with api.Node(place.first_node) as node:
        assert {status.pool.service for status in node.services()} == {"Service/default/other"}
    own = PODS["web-2"][1][version]
    number = 9080 if protocol == "tcp" else 9053
    assert who(place, "default/asker", own, number, protocol, times=1) == {SECOND}


@FAMILIES
@PROTOCOLS
def test_services_without_selector(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    """Their endpoints are whatever somebody wrote, here a machine outside."""
    apply(service(selector={}, externalIPs=list(EXTERNAL.values())))
    at = NUMBER[protocol], protocol
    for source in INSIDE:
        assert who(place, source, CLUSTER[version], *at, times=1) == {"refused"}
    apply(*slices({"pod": "legacy"}))
    for source in INSIDE:
        assert who(place, source, CLUSTER[version], *at, times=2) == {"external/legacy"}
    assert who(place, OUTSIDE, EXTERNAL[version], *at, times=2) == {"external/legacy"}


@FAMILIES
@PROTOCOLS
def test_conditions_of_endpoints(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    """Ready ones serve; where none is ready, those that are going away and still serve; else connections are refused."""
    at = CLUSTER[version], NUMBER[protocol], protocol
    going = {"ready": False, "serving": True, "terminating": True}
    gone = {"ready": False, "serving": False, "terminating": True}
    apply(service(), *slices({"pod": "web-1", "conditions": going}, {"pod": "web-2"}))
    for source in ("default/asker", OUTSIDE):
        assert who(place, source, *at, times=8) == {SECOND}
    apply(*slices({"pod": "web-2", "conditions": gone}))
    for source in ("default/asker", OUTSIDE):
        assert who(place, source, *at, times=8) == {FIRST}
    apply(*slices({"pod": "web-1", "conditions": gone}))
    for source in ("default/asker", OUTSIDE):
        assert who(place, source, *at, times=2) == {"refused"}


@FAMILIES
@PROTOCOLS
def test_zones(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    at = CLUSTER[version], NUMBER[protocol], protocol
    for distribution in ("PreferSameZone", "PreferSameNode", "PreferClose"):
        apply(service(trafficDistribution=distribution))
        for source in ("default/asker", OUTSIDE):
            assert who(place, source, *at, times=8) == {FIRST}
    # Nobody of this zone is ready: others serve.
    apply(*slices({"pod": "web-1", "conditions": {"ready": False}}, {"pod": "web-2"}))
    assert who(place, "default/asker", *at, times=4) == {SECOND}
    # Hints say otherwise than places.
    hints = {"hints": {"forZones": [{"name": "zone-1"}]}}
    apply(*slices({"pod": "web-1", "hints": {"forZones": [{"name": "zone-2"}]}}, {"pod": "web-2", **hints}))
    assert who(place, "default/asker", *at, times=8) == {SECOND}


@FAMILIES
@PROTOCOLS
def test_session_affinity(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    apply(service(sessionAffinity="ClientIP", externalIPs=list(EXTERNAL.values())))
    for source, address in (("default/asker", CLUSTER), ("node/node-1", CLUSTER), (OUTSIDE, EXTERNAL)):
        assert len(who(place, source, address[version], NUMBER[protocol], protocol)) == 1


@pytest.mark.parametrize("source", ["default/asker", OUTSIDE])
def test_session_affinity_ends(place: Lab, apply: Any, source: str) -> None:
    """A client that was silent for longer is a new one; which backend a new one gets is each service's own matter."""
    names = [f"bound-{number}" for number in range(12)]

    def bound(seconds: int) -> list[dict[str, Any]]:
        return [
            service(
                name=name,
                clusterIP=f"10.96.1.{number}",
                clusterIPs=[f"10.96.1.{number}"],
                selector={},
                sessionAffinity="ClientIP",
                sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}},
            )
            for number, name in enumerate(names)
        ]

    def answers() -> set[str]:
        return {
            one
            for number in range(len(names))
            for one in who(place, source, f"10.96.1.{number}", 80, "tcp", 1)
        }

    def ready(pods: tuple[str, ...]) -> list[dict[str, Any]]:
        conditions = {pod: {"ready": pod in pods} for pod in PODS}
        return [
            one
            for name in names
            for one in slices(*({"pod": pod, "conditions": conditions[pod]} for pod in PODS), name=name)
            if one["addressType"] == "IPv4"
        ]

    apply(*bound(600), *ready(("web-1",)))
    assert answers() == {FIRST}
    apply(*ready(("web-1", "web-2")))
    assert answers() == {FIRST}
    apply(*bound(1))
    time.sleep(3)
    assert answers() == BOTH
    apply(*ready(("web-2",)))
    assert answers() == {SECOND}


@FAMILIES
@PROTOCOLS
def test_algorithm_of_a_service(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    policy = {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "ServicePolicy",
        "metadata": {"name": "web"},
        "spec": {"targetRef": {"name": "web"}, "algorithm": "modulo"},
    }
    apply(service(), service(name="plain", clusterIP="10.96.0.11", clusterIPs=["10.96.0.11"]), policy)
    with api.Node(place.first_node) as node:
        kinds = {
            status.pool.service: (status.pool.algorithm, status.table_size) for status in node.services()
        }
    assert kinds["Service/default/web"] == ("modulo", 2)
    assert kinds["Service/default/plain"][0] == "maglev"
    for source in ("default/asker", OUTSIDE):
        assert who(place, source, CLUSTER[version], NUMBER[protocol], protocol) == BOTH


@FAMILIES
@PROTOCOLS
def test_local_redirect_of_a_service(place: Lab, apply: Any, version: Family, protocol: Protocol) -> None:
    """This node's own sockets go to its own pod; the service is as it was for everybody else."""
    redirect: dict[str, Any] = {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": "near"},
        "spec": {
            "redirectFrontend": {"serviceMatcher": {"serviceName": "web", "namespace": "default"}},
            "redirectBackend": {
                "localEndpointSelector": {"matchLabels": {"app": "web"}},
                "toPorts": [
                    {"name": "http", "port": 8080},
                    {"name": "dns", "port": 5353, "protocol": "UDP"},
                ],
            },
        },
    }
    at = CLUSTER[version], NUMBER[protocol], protocol
    apply(service(), redirect)
    for source in INSIDE:
        assert who(place, source, *at, times=8) == {FIRST}
    assert who(place, OUTSIDE, *at) == BOTH
    redirect["spec"]["redirectBackend"]["localEndpointSelector"] = {"matchLabels": {"app": "elsewhere"}}
    apply(redirect)
    assert who(place, "default/asker", *at) == BOTH


@FAMILIES
@PROTOCOLS
def test_local_redirect_of_an_address_with_rows_of_its_own(
    place: Lab, apply: Any, version: Family, protocol: Protocol
) -> None:
    """The service's row for this node's sockets gives way while the redirect has a pod, and is back afterwards."""
    ports = [{"port": str(NUMBER[one]), "protocol": one.upper(), "name": one} for one in ("tcp", "udp")]
    redirect: dict[str, Any] = {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": "near"},
        "spec": {
            "redirectFrontend": {"addressMatcher": {"ip": EXTERNAL[version], "toPorts": ports}},
            "redirectBackend": {
                "localEndpointSelector": {"matchLabels": {"app": "web"}},
                "toPorts": [
                    {"name": "tcp", "port": 8080},
                    {"name": "udp", "port": 5353, "protocol": "UDP"},
                ],
            },
        },
    }
    at = EXTERNAL[version], NUMBER[protocol], protocol
    apply(service(externalIPs=list(EXTERNAL.values()), externalTrafficPolicy="Local"))
    assert who(place, "default/asker", *at) == BOTH
    apply(redirect)
    assert who(place, "default/asker", *at, times=8) == {FIRST}
    redirect["spec"]["redirectBackend"]["localEndpointSelector"] = {"matchLabels": {"app": "elsewhere"}}
    apply(redirect)
    assert who(place, "default/asker", *at) == BOTH


@FAMILIES
@PROTOCOLS
def test_node_ports_on_loopback_are_the_hosts(
    place: Lab, apply: Any, version: Family, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's programs find them there; a pod's loopback stays the pod's own. The backend is this test's own socket."""
    here = control.Node._here
    monkeypatch.setattr(
        control.Node, "_here", lambda self, nodes: replace(here(self, nodes), has_loopback=True)
    )
    loopback = {4: "127.0.0.1", 6: "::1"}[version]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as listening:
        listening.bind((loopback, 0))
        listening.settimeout(5)
        if protocol == "tcp":
            listening.listen()
        port = {"name": "one", "port": 81, "nodePort": NODE_PORT[protocol], "protocol": protocol.upper()}
        slice_port = {"name": "one", "port": listening.getsockname()[1], "protocol": protocol.upper()}
        apply(
            service(type="NodePort", clusterIP="", clusterIPs=[], ports=[port], selector={}),
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "web-own", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": f"IPv{version}",
                "ports": [slice_port],
                "endpoints": [{"addresses": [loopback]}],
            },
        )
        group = place.cgroup("node/node-1")
        (asking,) = open_sockets(Path("/proc/self/ns/net"), group, [(family, kind)])
        with asking:
            asking.settimeout(5)
            asking.connect((loopback, NODE_PORT[protocol]))
            assert asking.getpeername()[:2] == (loopback, NODE_PORT[protocol])
            asking.sendall(b"x")
            accepted = listening.accept()[0] if protocol == "tcp" else listening
            accepted.settimeout(5)
            assert accepted.recv(10) == b"x"
            if accepted is not listening:
                accepted.close()
        for source in INSIDE:
            # Somebody listens where the endpoint would be, so only a connection that is left alone is refused.
            with net.inside(place.member(source).netns), socket.socket(family, kind) as trap:
                trap.bind((loopback, slice_port["port"]))
                if protocol == "tcp":
                    trap.listen()
                assert who(place, source, loopback, NODE_PORT[protocol], protocol, 1) == {"refused"}


def test_which_node_this_is_follows_its_object_and_the_machine(place: Lab) -> None:
    """In one process: its ``v1/Node`` goes and comes, and where there is none, its own address becomes another."""
    name = NodeName(place.name, "node-1")
    elsewhere = {4: "172.30.0.99", 6: "fd00:172:30::99"}
    others = [one for one in place.resources() if one.reference != "Node/node-1"]
    moved = document(
        "Node",
        "node-1",
        status={"addresses": [{"type": "InternalIP", "address": one} for one in elsewhere.values()]},
    )

    def inside(*words: str) -> None:
        command = ["nsenter", f"--net={name.netns}", "ip", *words]
        subprocess.run(command, check=True, capture_output=True)

    with api.Node(name) as node:

        def own() -> set[str]:
            """Where the tables in the kernel have the node port, for those outside."""
            return {
                str(frontend.address)
                for status in node.services()
                for frontend in status.pool.frontends
                if frontend.port == NODE_PORT["tcp"] and frontend.scope == "any"
            }

        added = [parse(service(type="NodePort"))]
        node.apply(added)
        try:
            assert own() == set(NODE_1.values())
            node.apply([*others, moved], owner="lab")
            assert own() == set(elsewhere.values())
            node.apply(others, owner="lab")
            assert own() == set(NODE_1.values()), "those that it uses towards the world"
            node.apply([*others, moved], owner="lab")
            assert own() == set(elsewhere.values())
            node.apply(others, owner="lab")
            inside("address", "add", "172.30.0.77/24", "dev", "eth0")
            inside("route", "add", "198.51.100.1", "dev", "eth0", "src", "172.30.0.77")
            node.repair(full=True)
            assert own() == {"172.30.0.77", NODE_1[6]}
            inside("route", "replace", "unreachable", "198.51.100.1")
            node.repair(full=True)
            assert own() == {"172.30.0.77", NODE_1[6]}, (
                "it has the address, with a way to the world or without"
            )
            inside("address", "del", "172.30.0.77/24", "dev", "eth0")
            node.repair(full=True)
            assert own() == {NODE_1[6]}
        finally:
            for words in ("address del 172.30.0.77/24 dev eth0", "route del 198.51.100.1"):
                subprocess.run(["nsenter", f"--net={name.netns}", "ip", *words.split()], check=False)
            node.delete([one.reference for one in added])
            node.apply(place.resources(), owner="lab")
