"""Real traffic through a lab's balancer: both families, TCP and UDP, nat and dsr, and what happens to connections."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from hookline import api, bpf, lab, net
from hookline.control import PoolStatus
from hookline.errors import HooklineError
from hookline.lab import Lab
from hookline.model import Resource, VirtualService, parse
from tests.lab.conftest import document, pod

PORTS = [
    {"name": "http", "port": 80, "targetPort": 8080},
    {"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"},
]
SAME_PORTS = [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]
LISTENS = [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]
NAT, DSR = ("192.0.2.10", "2001:db8::10"), ("192.0.2.20", "2001:db8::20")


def service(name: str, addresses: tuple[str, ...], ports: list[dict[str, Any]], **spec: Any) -> Resource:
    """A VirtualService."""
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": name},
            "spec": {"addresses": list(addresses), "ports": ports, **spec},
        }
    )


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes with two pods each, two servers outside, a client, and a service of each forwarding."""
    name = unique_name()
    labelled = {"labels": {"app": "orders"}}
    outside = [
        document(
            "ExternalHost",
            f"server-{n}",
            spec={"addresses": [f"203.0.113.{n}", f"2001:db8:203::{n}"], "ports": LISTENS},
        )
        for n in (1, 2)
    ]
    resources = [
        *(document("Node", f"node-{n}") for n in (1, 2)),
        *(pod(f"orders-{n}", f"node-{(n + 1) // 2}", metadata=labelled) for n in (1, 2, 3, 4)),
        *outside,
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
        service("nat", NAT, PORTS, backends=[{"selector": {"app": "orders"}}]),
        service(
            "dsr",
            DSR,
            SAME_PORTS,
            forwarding="dsr",
            backends=[{"address": str(a)} for host in outside for a in host.addresses],  # type: ignore[attr-defined]
        ),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


def answers(
    place: Lab, target: str, port: int, protocol: Literal["tcp", "udp"], times: int = 24
) -> Counter[str]:
    """Who answers so many connections or datagrams, each from a port of its own."""
    return Counter(place.probe("external/client", target, port, protocol).answered_by for _ in range(times))


def pools(place: Lab, name: str) -> dict[tuple[str, int], PoolStatus]:
    """A service's pools by port and family."""
    with api.Node(f"lab/{place.name}") as node:
        return {
            (status.pool.port, status.pool.version): status
            for status in node.services()
            if status.pool.service == f"VirtualService/default/{name}"
        }


@pytest.mark.parametrize(("port", "protocol"), [(80, "tcp"), (53, "udp")])
@pytest.mark.parametrize("address", NAT)
def test_nat_reaches_pods_of_the_node_and_beyond(
    place: Lab, address: str, port: int, protocol: Literal["tcp", "udp"]
) -> None:
    key = ("http" if protocol == "tcp" else "dns", 6 if ":" in address else 4)
    before = pools(place, "nat")[key]
    served = place.server_counts()
    seen = answers(place, address, port, protocol, times=40)
    assert set(seen) == {f"default/orders-{n}" for n in (1, 2, 3, 4)}
    after = pools(place, "nat")[key]
    if protocol == "tcp":
        assert after.connections - before.connections == 40
    for backend, earlier in zip(after.backends, before.backends, strict=True):
        # Two datagrams may leave by the same port: then they are one flow.
        counted = (
            backend.connections - earlier.connections
            if protocol == "tcp"
            else backend.packets - earlier.packets
        )
        assert counted == seen[backend.target.name]
        assert backend.reply_packets > earlier.reply_packets
        assert backend.placement.how == (
            "local" if backend.target.name in ("default/orders-1", "default/orders-2") else "nat"
        )
    now = place.server_counts()
    for name, count in seen.items():
        if protocol == "tcp":
            assert now.of(name).tcp_accepted - served.of(name).tcp_accepted == count
        else:
            assert now.of(name).udp_received - served.of(name).udp_received == count


@pytest.mark.parametrize(("port", "protocol"), [(8080, "tcp"), (5353, "udp")])
@pytest.mark.parametrize("address", DSR)
def test_dsr_backends_answer_the_client_themselves(
    place: Lab, address: str, port: int, protocol: Literal["tcp", "udp"]
) -> None:
    key = ("http" if protocol == "tcp" else "dns", 6 if ":" in address else 4)
    seen = answers(place, address, port, protocol)
    assert set(seen) == {"external/server-1", "external/server-2"}
    for backend in pools(place, "dsr")[key].backends:
        assert backend.placement.how == "dsr"
        assert backend.connections >= seen[backend.target.name]
        assert backend.reply_packets == 0, "a reply came back through the balancer"


def test_dsr_to_a_pod_behind_another_node_says_that_it_becomes_nat(place: Lab) -> None:
    wanted = service(
        "behind", ("192.0.2.30",), SAME_PORTS, forwarding="dsr", backends=[{"selector": {"app": "orders"}}]
    )
    with api.Node(f"lab/{place.name}") as node:
        applied = node.apply(wanted)
        try:
            assert sum("dsr cannot address it: nat" in warning for warning in applied.plan.warnings) == 4
            assert set(answers(place, "192.0.2.30", 8080, "tcp", times=40)) == {
                f"default/orders-{n}" for n in (1, 2, 3, 4)
            }
        finally:
            node.delete([wanted.reference])


@pytest.mark.parametrize("address", NAT)
def test_much_data_arrives_whole(place: Lab, address: str) -> None:
    """Many segments of full size in both directions; the servers answer every line."""
    lines = 4_000
    with net.inside(place.member("external/client").netns):
        connections = [socket.create_connection((address, 80), timeout=20) for _ in range(6)]
    names = set()
    for connection in connections:
        with connection:
            connection.sendall((b"x" * 700 + b"\n") * lines)
            connection.shutdown(socket.SHUT_WR)
            got = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))  # type: ignore[misc]
            answered = got.decode().splitlines()
            assert len(answered) == lines
            names.update(answered)
    assert len(names) > 1


def test_a_packet_is_not_lost_for_want_of_a_neighbour(place: Lab) -> None:
    name = place.first_node
    server = place.member("external/server-1")
    wanted = service(
        "strange",
        ("192.0.2.40", "2001:db8::40"),
        PORTS,
        backends=[{"address": str(a)} for a in server.addresses],
    )
    with api.Node(name) as node:
        node.apply(wanted)
        try:
            with net.inside(name.netns):
                kept = {n.address for n in net.neighbours() if n.managed}
                assert set(server.addresses) <= kept
            before = node.totals()
            for address in ("192.0.2.40", "2001:db8::40"):
                with net.inside(name.netns):
                    # The balancer cannot know them any more, neither the way there nor the way back.
                    for neighbour in net.neighbours():
                        net.forget(neighbour.address, neighbour.interface)
                assert place.probe("external/client", address, 53, "udp").answered_by == "external/server-1"
            after = node.totals()
            assert before is not None
            assert after is not None
            assert after.handed_to_stack[0] > before.handed_to_stack[0]
            assert after.reasons == before.reasons
        finally:
            node.delete([wanted.reference])


def test_a_connection_outlives_its_backends_removal_and_new_ones_go_elsewhere(place: Lab) -> None:
    def orders(*names: str) -> Resource:
        addresses = [str(place.member(name).addresses[0]) for name in names]
        return service(
            "two", ("192.0.2.50",), PORTS, backends=[{"address": address} for address in addresses]
        )

    with api.Node(f"lab/{place.name}") as node:
        node.apply(orders("orders-1", "orders-3"))
        try:
            with net.inside(place.member("external/client").netns):
                connections = [socket.create_connection(("192.0.2.50", 80), timeout=5) for _ in range(12)]
            with contextlib.ExitStack() as stack:
                for connection in connections:
                    stack.enter_context(connection)
                before = [ask(connection) for connection in connections]
                assert set(before) == {"default/orders-1", "default/orders-3"}
                node.apply(orders("orders-3"))
                assert [ask(connection) for connection in connections] == before
                assert set(answers(place, "192.0.2.50", 80, "tcp")) == {"default/orders-3"}
        finally:
            node.delete(["VirtualService/default/two"])


def ask(connection: socket.socket) -> str:
    """Who is at the other end."""
    connection.sendall(b"who\n")
    return connection.recv(100).decode().strip()


def test_without_backends_clients_are_refused_at_once(place: Lab) -> None:
    wanted = service("nobody", ("192.0.2.60", "2001:db8::60"), PORTS, backends=[])
    with api.Node(f"lab/{place.name}") as node:
        applied = node.apply(wanted)
        try:
            assert any("refused and counted as no_backend" in warning for warning in applied.plan.warnings)
            before = node.totals()
            tries: tuple[tuple[str, int, Literal["tcp", "udp"]], ...] = (
                ("192.0.2.60", 80, "tcp"),
                ("2001:db8::60", 80, "tcp"),
                ("192.0.2.60", 53, "udp"),
                ("2001:db8::60", 53, "udp"),
            )
            for number, (address, port, protocol) in enumerate(tries, start=1):
                with pytest.raises(lab.ProbeFailed) as raised:
                    place.probe("external/client", address, port, protocol, timeout=10)
                assert raised.value.reason == "refused"
                totals = node.totals()
                assert before is not None
                assert totals is not None
                assert totals.answered[0] - before.answered[0] == number
                assert totals.reasons["no_backend"][0] - before.reasons.get("no_backend", (0, 0))[0] == number
        finally:
            node.delete([wanted.reference])


def test_a_connected_udp_socket_learns_that_nobody_is_there(place: Lab) -> None:
    """By the error of its next call, whatever it sent: the whole datagram need not fit into the quotation."""
    wanted = service("nobody", ("192.0.2.60", "2001:db8::60"), PORTS, backends=[])
    with api.Node(f"lab/{place.name}") as node:
        node.apply(wanted)
        try:
            for address in ("192.0.2.60", "2001:db8::60"):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with net.inside(place.member("external/client").netns):
                    client = socket.socket(family, socket.SOCK_DGRAM)
                with client:
                    client.settimeout(10)
                    client.connect((address, 53))
                    for size in (0, 1, 1400):
                        client.send(bytes(size))
                        with pytest.raises(ConnectionRefusedError):
                            client.recv(1)
        finally:
            node.delete([wanted.reference])


def test_kubernetes_services_with_their_slices_and_named_ports(place: Lab) -> None:
    metadata = {"name": "web", "namespace": "default"}
    addresses = ["10.96.0.10", "fd00:96::10"]
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    spec = {"clusterIPs": addresses, "clusterIP": addresses[0], "selector": {"app": "orders"}, "ports": ports}
    kubernetes = document("Service", "web", metadata=metadata, spec=spec)
    slices = [
        parse(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": f"web-{version}", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": f"IPv{version}",
                "ports": [{"name": "http", "port": 8080}],
                "endpoints": [
                    {
                        "addresses": [str(place.member(name).address(version))],
                        "conditions": {"ready": ready},
                        "targetRef": {"kind": "Pod", "namespace": "default", "name": name},
                    }
                    for name, ready in (("orders-2", True), ("orders-4", True), ("orders-1", False))
                ],
            }
        )
        for version in (4, 6)
    ]
    with api.Node(f"lab/{place.name}") as node:
        node.apply([kubernetes])
        try:
            for address in addresses:
                everyone = set(answers(place, address, 80, "tcp", times=40))
                assert everyone == {f"default/orders-{n}" for n in (1, 2, 3, 4)}, "the pods that it selects"
            node.apply(slices)
            for address in addresses:
                assert set(answers(place, address, 80, "tcp")) == {"default/orders-2", "default/orders-4"}
        finally:
            node.delete(
                [
                    kubernetes.reference,
                    *(s.reference for s in slices if s.reference in {r.reference for r in node.resources()}),
                ]
            )


def test_generic_mode_transmits(place: Lab) -> None:
    """XDP without the driver's help; there the balancer leaves by XDP_TX."""
    name = place.first_node
    config = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "NodeConfig",
            "metadata": {"name": name.node},
            "spec": {"interfaces": [{"name": "eth0", "role": "uplink", "xdpMode": "generic"}]},
        }
    )
    with api.Node(name) as node:
        node.apply(config)
        try:
            [balance] = [item for item in node.attachments() if item.program == "balance"]
            assert "generic" in balance.hook
            before = node.totals()
            for address in NAT:
                assert len(answers(place, address, 80, "tcp", times=20)) == 4
            after = node.totals()
            assert before is not None
            assert after is not None
            assert after.verdicts["tx"][0] > before.verdicts["tx"][0]
            assert after.verdicts["redirect"] == before.verdicts["redirect"]
        finally:
            node.delete([config.reference])
    with api.Node(name) as node:
        [balance] = [item for item in node.attachments() if item.program == "balance"]
        assert "native" in balance.hook


def test_contradicting_tables_abort_and_the_kernel_says_so(place: Lab) -> None:
    name = place.first_node
    wanted = service("torn", ("192.0.2.70",), PORTS, backends=[{"address": "203.0.113.1"}])
    with api.Node(name) as node:
        node.apply(wanted)
        try:
            with bpf.Map.from_pin(name.pins / "maps" / "services") as services:
                keys, rows = services.read()
                ours = [
                    i
                    for i, key in enumerate(keys)
                    if key["address"].tobytes()[12:] == socket.inet_aton("192.0.2.70")
                ]
                torn = rows[ours].copy()
                torn["table_page"] = 1 << 20
                services.write(keys[ours], torn)
                with pytest.raises(lab.ProbeFailed):
                    place.probe("external/client", "192.0.2.70", 53, "udp", timeout=0.3)
                services.write(keys[ours], rows[ours])
            totals = node.totals()
            assert totals is not None
            assert totals.verdicts["aborted"][0] >= 1
            assert totals.exceptions["aborted"] == totals.verdicts["aborted"][0]
            assert totals.reasons["internal"] == totals.verdicts["aborted"]
            assert place.probe("external/client", "192.0.2.70", 53, "udp").answered_by == "external/server-1"
        finally:
            node.delete([wanted.reference])


def test_open_connections_outlive_another_range_of_nat_ports(place: Lab) -> None:
    name = place.first_node
    config = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "NodeConfig",
            "metadata": {"name": name.node},
            "spec": {"nat": {"portMin": 40000, "portMax": 41000}},
        }
    )
    with net.inside(place.member("external/client").netns):
        connections = [socket.create_connection((NAT[0], 80), timeout=5) for _ in range(16)]
    with contextlib.ExitStack() as stack, api.Node(name) as node:
        for connection in connections:
            stack.enter_context(connection)
        before = [ask(connection) for connection in connections]
        assert {"default/orders-3", "default/orders-4"} & set(before), "none is beyond the node"
        assert node.apply(config).plan.loads
        try:
            assert [ask(connection) for connection in connections] == before
            assert len(answers(place, NAT[0], 80, "tcp", times=20)) > 1
        finally:
            node.delete([config.reference])
        assert [ask(connection) for connection in connections] == before


@pytest.mark.parametrize("version", [4, 6])
def test_a_service_on_the_nodes_address_has_none_of_nats_ports(place: Lab, version: Literal[4, 6]) -> None:
    own = str(place.member("node/node-1").address(version))
    backends = [{"selector": {"app": "orders"}}]
    inside, outside = (
        service("edge", (own,), [{"port": port, "targetPort": 8080}], backends=backends)
        for port in (20000, 30080)
    )
    with api.Node(place.first_node) as node:
        with pytest.raises(HooklineError) as raised:
            node.apply([inside])
        assert "10240 to 29999" in raised.value.why
        assert "spec.nat" in raised.value.remedy
        assert not [one for one in node.resources(VirtualService) if one.metadata.name == "edge"]
        node.apply([outside])
        try:
            assert len(answers(place, own, 30080, "tcp")) > 1
        finally:
            node.delete([outside.reference])


def test_what_a_dry_run_says_of_a_program_that_was_detached(place: Lab) -> None:
    name = place.first_node
    with bpf.Link.from_pin(name.pins / "links" / "balance:eth0") as link:
        link.detach()
    with api.Node(name) as node:
        plan = node.plan()
        assert plan.changes
        assert plan.attaches == ["balance to eth0"]
    with api.Node(name) as node:
        node.apply(node.resources(VirtualService))
        assert not node.plan().attaches
    assert len(answers(place, NAT[0], 80, "tcp", times=10)) > 1
