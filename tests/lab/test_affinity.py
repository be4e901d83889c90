"""Session affinity and backends' states with real sockets: of a machine outside, by XDP, and of pods, at connect time."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from hookline import api, lab
from hookline.control.health import Health, HealthKey
from hookline.lab import Lab
from hookline.model import Resource
from tests.lab.conftest import document, pod
from tests.lab.test_balancing import PORTS, service

Protocol = Literal["tcp", "udp"]
STICKY = {4: "192.0.2.10", 6: "2001:db8::10"}
SHORT = {4: "192.0.2.11", 6: "2001:db8::11"}
PORT = {"tcp": 80, "udp": 53}
BACKENDS = [f"default/orders-{n}" for n in (1, 2, 3, 4)]
TIMES = 20
USED: set[tuple[str, str, str, str, int]] = set()
FAMILIES = pytest.mark.parametrize("version", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
# One is balanced by XDP on the first node's uplink, the other by the programs of its sockets.
SOURCES = pytest.mark.parametrize("source", ["external/client", "default/client"])


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes with two backends each; clients outside and in a pod of the first node."""
    name = unique_name()
    resources: list[Resource] = [
        *(document("Node", f"node-{n}") for n in (1, 2)),
        *(pod(f"orders-{n}", f"node-{(n + 1) // 2}") for n in (1, 2, 3, 4)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
        document("ExternalHost", "other", spec={"addresses": ["198.51.100.8", "2001:db8:51::8"]}),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture
def node(place: Lab) -> Iterator[api.Node]:
    """The first node, which has no services afterwards."""
    with api.Node(f"lab/{place.name}/node-1") as one:
        try:
            yield one
        finally:
            one.delete(
                [resource.reference for resource in one.resources() if resource.kind == "VirtualService"]
            )


def wanted(place: Lab, name: str = "sticky", weights: dict[str, int] | None = None, **more: Any) -> Resource:
    """A service of all four backends, by their addresses."""
    backends = [
        {"address": str(address), "weight": (weights or {}).get(backend, 100)}
        for backend in BACKENDS
        for address in place.member(backend).addresses
    ]
    addresses = STICKY if name == "sticky" else SHORT
    settings = {"sessionAffinity": {"type": "ClientIP", "timeoutSeconds": 3000}} | more
    return service(name, tuple(addresses.values()), PORTS, backends=backends, **settings)


def connected(place: Lab, source: str, address: str, protocol: Protocol) -> socket.socket:
    """A new flow: datagrams from a port that was used within two minutes go where those before them went."""
    while True:
        (one,) = place.sockets(source, 6 if ":" in address else 4, protocol)
        one.settimeout(10)
        one.connect((address, PORT[protocol]))
        flow = (place.name, source, address, protocol, one.getsockname()[1])
        if protocol == "tcp" or flow not in USED:
            USED.add(flow)
            return one
        one.close()


def ask(one: socket.socket) -> str:
    """Who answers."""
    one.sendall(b"who\n")
    return one.recv(200).decode().strip()


def asked(place: Lab, source: str, address: str, protocol: Protocol, times: int = TIMES) -> set[str]:
    """Who answers so many new sockets."""
    found = set()
    for _ in range(times):
        with connected(place, source, address, protocol) as one:
            found.add(ask(one))
    return found


def key_of(place: Lab, backend: str, protocol: Protocol, version: int) -> HealthKey:
    (address,) = (one for one in place.member(backend).addresses if one.version == version)
    name, number = ("http", 8080) if protocol == "tcp" else ("dns", 5353)
    upper: Literal["TCP", "UDP"] = "TCP" if protocol == "tcp" else "UDP"
    return HealthKey("VirtualService/default/sticky", name, upper, address, number)


@FAMILIES
@PROTOCOLS
@SOURCES
def test_a_client_keeps_its_backend(
    place: Lab, node: api.Node, source: str, protocol: Protocol, version: int
) -> None:
    node.apply([wanted(place)])
    (backend,) = asked(place, source, STICKY[version], protocol)
    # Without it the same client meets them all.
    node.apply([wanted(place, sessionAffinity={"type": "None"})])
    assert len(asked(place, source, STICKY[version], protocol, 40)) > 1
    node.apply([wanted(place)])
    assert asked(place, source, STICKY[version], protocol, 5) == {backend}


@pytest.mark.parametrize(
    ("source", "protocol", "version"),
    [
        *((source, "tcp", version) for source in ("external/client", "default/client") for version in (4, 6)),
        ("external/client", "udp", 6),
        ("default/client", "udp", 4),
    ],
)
def test_a_client_is_placed_anew_after_the_timeout(
    place: Lab, node: api.Node, source: str, protocol: Protocol, version: int
) -> None:
    """Its backend is out of the table meanwhile, so that the new place is another one."""
    short = {"type": "ClientIP", "timeoutSeconds": 2}
    node.apply([wanted(place, sessionAffinity=short)])
    (backend,) = asked(place, source, STICKY[version], protocol, 3)
    deadline = time.monotonic() + 60
    node.apply(
        [
            wanted(
                place,
                weights={backend: 1, **{b: 100 for b in BACKENDS if b != backend}},
                sessionAffinity=short,
            )
        ]
    )
    found = {backend}
    while found == {backend}:
        assert time.monotonic() < deadline
        time.sleep(3)
        found = asked(place, source, STICKY[version], protocol, 1)
        if found == {backend}:
            # The lighter table has it at this client's slot still: take it out of the table alone.
            node.apply([wanted(place, weights={backend: 0}, sessionAffinity=short)])


@FAMILIES
@PROTOCOLS
@SOURCES
def test_a_backend_that_drains_keeps_connections_and_loses_its_clients(
    place: Lab, node: api.Node, source: str, protocol: Protocol, version: int
) -> None:
    node.apply([wanted(place)])
    with connected(place, source, STICKY[version], protocol) as open_one:
        backend = ask(open_one)
        node.apply([wanted(place, weights={backend: 0})])
        moved = asked(place, source, STICKY[version], protocol, 5)
        assert len(moved) == 1
        assert moved != {backend}
        assert [ask(open_one) for _ in range(3)] == [backend] * 3
        # It stays there when the first one is back.
        node.apply([wanted(place)])
        assert asked(place, source, STICKY[version], protocol, 5) == moved


@FAMILIES
@PROTOCOLS
@SOURCES
def test_a_backend_that_is_down_loses_its_clients(
    place: Lab, node: api.Node, source: str, protocol: Protocol, version: int
) -> None:
    node.apply([wanted(place)])
    with connected(place, source, STICKY[version], protocol) as open_one:
        backend = ask(open_one)
        key = key_of(place, backend, protocol, version)
        node.observe({key: Health("down", 0)})
        try:
            moved = asked(place, source, STICKY[version], protocol, 5)
            assert len(moved) == 1
            assert moved != {backend}
            if protocol == "tcp":
                # The server lives: a connection in the middle is never moved.
                assert ask(open_one) == backend
            elif source.startswith("external"):
                assert ask(open_one) in moved
        finally:
            node.observe({key: Health("active")})


@FAMILIES
@PROTOCOLS
def test_each_client_has_its_own(place: Lab, node: api.Node, protocol: Protocol, version: int) -> None:
    """Clients outside are told apart by their addresses; the table decides, so neither is bound to the other's place."""
    node.apply([wanted(place)])
    first = asked(place, "external/client", STICKY[version], protocol, 5)
    second = asked(place, "external/other", STICKY[version], protocol, 5)
    assert len(first) == len(second) == 1
    (away,) = first
    node.apply([wanted(place, weights={away: 0})])
    assert asked(place, "external/client", STICKY[version], protocol, 5).isdisjoint(first)
    if second != first:
        assert asked(place, "external/other", STICKY[version], protocol, 5) == second
