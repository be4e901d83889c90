"""Captured DNS queries and local redirects, with a real resolver (dnsmasq) and real sockets."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSQR

from hookline import api, bpf, lab, net
from hookline.control import Node
from hookline.control.pods import cookies
from hookline.lab import Lab
from hookline.model import Resource, parse
from hookline.model.names import NodeName
from tests.lab.conftest import document, pod
from tests.lab.test_sockets import FAMILIES, opened, seen
from tests.requirements import missing_program, need

ASKED = {4: "198.51.100.53", 6: "2001:db8:51::53"}
"""Nobody has these addresses."""
NAMES = {
    "orders.test": {4: "192.0.2.99", 6: "2001:db8::99"},
    "web.test": {4: "192.0.2.98", 6: "2001:db8::98"},
}
CLUSTER_DNS = {4: "10.96.0.10", 6: "fd00:96::a"}


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes: a web pod, another pod, and a resolver on the first; a pod that is the cluster's DNS on the second."""
    need("lab", missing_program("dnsmasq"))
    name = unique_name()
    quiet: dict[str, Any] = {"spec": {"nodeName": "node-1"}}
    resources: list[Resource] = [
        *(document("Node", f"node-{n}") for n in (1, 2)),
        document("Pod", "web", metadata={"labels": {"app": "web"}}, **quiet),
        document("Pod", "other", **quiet),
        document("Pod", "resolver", metadata={"labels": {"app": "resolver"}}, **quiet),
        pod("cache", metadata={"labels": {"app": "cache"}}),
        pod("far", "node-2", metadata={"labels": {"app": "far"}}),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture(scope="module")
def resolver(place: Lab) -> Iterator[None]:
    """dnsmasq in the pod of that name."""
    names = [f"--address=/{name}/{address}" for name, both in NAMES.items() for address in both.values()]
    process = place.start(
        "default/resolver",
        [
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--pid-file=",
            *names,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while (
            place.call(
                "default/other", lambda: query(address_of(place, "resolver", 4), 53, "udp", "web.test", 4)
            )
            is None
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


@pytest.fixture
def node(place: Lab) -> Iterator[Node]:
    with api.Node(f"lab/{place.name}") as node:
        yield node
        mine = ("DNSCapture", "LocalRedirectPolicy", "Service", "EndpointSlice", "VirtualService")
        node.delete([one.reference for one in node.resources() if one.kind in mine])


def address_of(place: Lab, name: str, version: int) -> str:
    return next(str(a) for a in place.member(f"default/{name}").addresses if a.version == version)


def query(
    server: str, port: int, protocol: str, name: str, version: int
) -> tuple[str, tuple[str, int]] | None:
    """A query by an own socket: the answer, and who seems to have given it; None without an answer."""
    kind = "A" if version == 4 else "AAAA"
    packet = bytes(DNS(id=4711, rd=1, qd=DNSQR(qname=name, qtype=kind)))
    try:
        with opened(server, protocol) as one:
            one.settimeout(1)
            if protocol == "udp":
                one.sendto(packet, (server, port))
                data, source = one.recvfrom(4096)
            else:
                one.connect((server, port))
                one.sendall(len(packet).to_bytes(2, "big") + packet)
                data, source = one.recv(4096)[2:], one.getpeername()
    except OSError:
        return None
    answer = DNS(data)
    return str(answer.an[0].rdata if answer.ancount else ""), seen(source)


def capture(name: str = "web", **resolver: Any) -> Resource:
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "DNSCapture",
            "metadata": {"name": name},
            "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "resolver": resolver},
        }
    )


@FAMILIES
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_queries_of_chosen_pods_are_captured(
    place: Lab, resolver: None, node: Node, version: int, protocol: str
) -> None:
    asked = ASKED[version]
    ask = lambda: query(asked, 53, protocol, "orders.test", version)  # noqa: E731
    assert place.call("default/web", ask) is None
    done = node.apply(capture(selector={"app": "resolver"}))
    assert done.plan.warnings == []
    assert place.call("default/web", ask) == (NAMES["orders.test"][version], (asked, 53))
    # Another port, another pod and the node itself are not captured.
    assert place.call("default/web", lambda: query(asked, 5353, protocol, "orders.test", version)) is None
    assert place.call("default/other", ask) is None
    assert place.call("node/node-1", ask) is None
    # The resolver asks whom it likes, also by labels that are captured.
    node.apply(capture(selector={"app": "resolver"}).model_copy(deep=True))
    assert place.call("default/resolver", ask) is None
    node.delete(["DNSCapture/default/web"])
    assert place.call("default/web", ask) is None


def test_the_system_s_own_resolver_is_captured(
    place: Lab, resolver: None, node: Node, tmp_path: Path
) -> None:
    """glibc's getaddrinfo() with a resolv.conf that names servers which do not exist."""
    node.apply(capture(addresses=[address_of(place, "resolver", v) for v in (4, 6)]))
    for version, server in ASKED.items():
        conf = tmp_path / f"resolv{version}.conf"
        conf.write_text(f"nameserver {server}\noptions timeout:2 attempts:1\n")
        script = f"mount --bind {conf} /etc/resolv.conf && exec getent ahosts orders.test"
        done = place.run("default/web", ["unshare", "--mount", "sh", "-c", script], timeout=30)
        assert done.returncode == 0, done.stderr
        assert set(NAMES["orders.test"].values()) <= {line.split()[0] for line in done.stdout.splitlines()}


def test_mapped_and_several_servers_from_one_socket(place: Lab, resolver: None, node: Node) -> None:
    node.apply(capture(selector={"app": "resolver"}))
    servers = [f"::ffff:198.51.100.{n}" for n in (53, 54, 55, 56, 57, 58)]

    def ask() -> list[tuple[str, int]]:
        found = []
        packet = bytes(DNS(id=1, rd=1, qd=DNSQR(qname="web.test", qtype="A")))
        with opened("::", "udp") as one:
            for server in servers:
                one.sendto(packet, (server, 53))
                found.append(seen(one.recvfrom(4096)[1]))
        return found

    assert place.call("default/web", ask) == [(server, 53) for server in servers]


def test_a_family_that_the_resolver_has_not_is_refused(place: Lab, resolver: None, node: Node) -> None:
    node.apply(capture(address=address_of(place, "resolver", 4)))
    assert place.call("default/web", lambda: query(ASKED[4], 53, "udp", "web.test", 4))

    def ask() -> int:
        with opened(ASKED[6], "udp") as one, contextlib.suppress(TimeoutError):
            try:
                one.sendto(b"x", (ASKED[6], 53))
            except OSError as error:
                return error.errno or 0
        return 0

    assert place.call("default/web", ask) == errno.ECONNREFUSED


def test_a_capture_without_a_resolver_on_the_node_says_so(place: Lab, node: Node) -> None:
    done = node.apply(capture(selector={"app": "absent"}))
    (warning,) = done.plan.warnings
    assert "queries are refused" in warning


def redirect(**frontend: Any) -> Resource:
    """What is asked for goes to the pod `cache`, whose server listens on 8080/tcp and 5353/udp."""
    ports = [
        {"name": "dns", "port": "5353", "protocol": "UDP"},
        {"name": "dns-tcp", "port": "8080", "protocol": "TCP"},
    ]
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "LocalRedirectPolicy",
            "metadata": {"name": "dns"},
            "spec": {
                "redirectFrontend": frontend,
                "redirectBackend": {
                    "localEndpointSelector": {"matchLabels": {"app": "cache"}},
                    "toPorts": ports,
                },
            },
        }
    )


def cluster_dns() -> list[Resource]:
    """A service whose only pod is on the other node."""
    return [
        parse(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "dns"},
                "spec": {
                    "clusterIPs": list(CLUSTER_DNS.values()),
                    "clusterIP": CLUSTER_DNS[4],
                    "ipFamilies": ["IPv4", "IPv6"],
                    "selector": {"app": "far"},
                    "ports": [
                        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353},
                        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 8080},
                    ],
                },
            }
        )
    ]


def who(server: str, protocol: str) -> tuple[str, tuple[str, int]]:
    with opened(server, protocol) as one:
        one.connect((server, 53))
        one.sendall(b"who\n")
        return one.recv(200).decode().strip(), seen(one.getpeername())


@FAMILIES
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_service_s_traffic_goes_to_the_node_s_own_pod(
    place: Lab, node: Node, version: int, protocol: str
) -> None:
    server = CLUSTER_DNS[version]
    ask = lambda: who(server, protocol)  # noqa: E731
    node.apply(cluster_dns())
    assert place.call("default/web", ask) == ("default/far", (server, 53))
    policy = redirect(serviceMatcher={"serviceName": "dns", "namespace": "default"})
    node.apply(policy)
    for source in ("default/web", "default/other", "node/node-1"):
        assert place.call(source, ask) == ("default/cache", (server, 53))
    # The pod that takes the service's place reaches the service itself.
    assert place.call("default/cache", ask) == ("default/far", (server, 53))
    # Without a pod on this node it is the service's again, and back.
    here = next(one for one in node.resources() if one.reference == "Pod/default/cache")
    away = here.to_document()
    away["metadata"]["labels"] = {"app": "elsewhere"}
    with api.Node(node.name) as owner:
        lab_resources = [one for one in owner.resources() if owner.source_of(one.reference) == "lab"]
        changed = [parse(away) if one.reference == here.reference else one for one in lab_resources]
        owner.apply(changed, owner="lab")
        assert place.call("default/web", ask) == ("default/far", (server, 53))
        owner.apply(lab_resources, owner="lab")
    assert place.call("default/web", ask) == ("default/cache", (server, 53))


@FAMILIES
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_an_address_traffic_goes_to_the_node_s_own_pod(
    place: Lab, node: Node, version: int, protocol: str
) -> None:
    address = {4: "169.254.20.10", 6: "fd00:20::10"}[version]
    ports = [
        {"name": "dns", "port": "53", "protocol": "UDP"},
        {"name": "dns-tcp", "port": "53", "protocol": "TCP"},
    ]
    node.apply(redirect(addressMatcher={"ip": address, "toPorts": ports}))
    for source in ("default/web", "node/node-1"):
        assert place.call(source, lambda: who(address, protocol)) == ("default/cache", (address, 53))


class Asker:
    """One datagram socket of a pod that is never connected and asks the same server again and again."""

    def __init__(self, place: Lab, source: str, server: str) -> None:
        self.server = server
        (self.socket,) = place.sockets(source, 6 if ":" in server else 4, "udp")
        self.socket.settimeout(5)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, message: bytes = b"who") -> bytes:
        self.socket.sendto(message, (self.server, 53))
        answer, source = self.socket.recvfrom(4096)
        assert seen(source) == (self.server, 53)
        return answer.strip()


@FAMILIES
def test_a_redirect_reaches_a_datagram_socket_whose_backend_is_well(
    place: Lab, node: Node, version: int
) -> None:
    node.apply(cluster_dns())
    policy = redirect(serviceMatcher={"serviceName": "dns", "namespace": "default"})
    with Asker(place, "default/web", CLUSTER_DNS[version]) as one:
        assert one.ask() == b"default/far"
        node.apply(policy)
        assert one.ask() == b"default/cache"
        node.delete([policy.reference])
        assert one.ask() == b"default/far"


@FAMILIES
def test_a_capture_reaches_a_datagram_socket_whose_backend_is_well(
    place: Lab, resolver: None, node: Node, version: int
) -> None:
    node.apply(cluster_dns())
    kind = "A" if version == 4 else "AAAA"
    question = bytes(DNS(id=4711, rd=1, qd=DNSQR(qname="web.test", qtype=kind)))
    with Asker(place, "default/web", CLUSTER_DNS[version]) as one:
        assert one.ask() == b"default/far"
        node.apply(capture(selector={"app": "resolver"}))
        assert DNS(one.ask(question)).an[0].rdata == NAMES["web.test"][version]
        node.delete(["DNSCapture/default/web"])
        assert one.ask() == b"default/far"


@FAMILIES
def test_an_address_that_a_service_lost_is_none_s_for_a_datagram_socket(
    place: Lab, node: Node, version: int
) -> None:
    """The service and its backend stay, and another address of it."""
    (dns,) = cluster_dns()
    document = dns.to_document()
    document["spec"]["externalIPs"] = list(ASKED.values())
    node.apply(parse(document))
    with (
        Asker(place, "default/web", ASKED[version]) as one,
        Asker(place, "default/web", CLUSTER_DNS[version]) as other,
    ):
        assert one.ask() == other.ask() == b"default/far"
        node.apply(dns)
        assert other.ask() == b"default/far"
        one.socket.settimeout(1)
        with pytest.raises(OSError, match=r"timed out|unreachable|refused"):
            one.ask()


def test_a_row_that_was_lost_is_put_back(place: Lab, resolver: None, node: Node) -> None:
    node.apply(capture(selector={"app": "resolver"}))
    ask = lambda: query(ASKED[4], 53, "udp", "web.test", 4)  # noqa: E731
    assert place.call("default/web", ask)
    with bpf.Map.from_pin(node.name.pins / "maps" / "pods") as pods:
        keys, _ = pods.read()
        for key in keys:
            pods.pop(key)
    assert place.call("default/web", ask) is None
    assert [one.kind for one in node.repair().repairs] == ["pod"]
    assert place.call("default/web", ask)
    assert node.repair().repairs == []


def test_a_host_s_pods_are_found_by_their_addresses(place: Lab) -> None:
    """As on a machine, where no namespace carries a pod's name: by the processes in the node's cgroup."""
    pods = {name: place.member(name).addresses for name in ("default/web", "default/other")}
    group = f"hookline/{place.name}/node-1"
    process = place.start("default/web", ["sleep", "60"])
    try:
        deadline = time.monotonic() + 20
        while not (found := cookies(NodeName(), group, pods)):
            assert time.monotonic() < deadline
        with net.inside(place.member("default/web").netns):
            assert found == {"default/web": net.own_cookie()}
    finally:
        process.kill()
        process.wait()
    assert cookies(NodeName(), group, pods) == {}
