"""Services at connect time: real sockets of pods and of the node itself, both families, TCP and UDP."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import pytest

from hookline import api, lab
from hookline.control import PoolStatus
from hookline.lab import Lab
from hookline.model import Resource
from tests.lab.conftest import document, pod
from tests.lab.test_balancing import PORTS, service

Protocol = Literal["tcp", "udp"]
SERVICE = {4: "192.0.2.10", 6: "2001:db8::10"}
SECOND = {4: "192.0.2.11", 6: "2001:db8::11"}
EMPTY = {4: "192.0.2.12", 6: "2001:db8::12"}
MAPPED = "::ffff:192.0.2.10"
PORT = {"tcp": 80, "udp": 53}
BACKENDS = {f"default/orders-{n}" for n in (1, 2, 3, 4)}
FAMILIES = pytest.mark.parametrize("version", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])
SOURCES = pytest.mark.parametrize("source", ["default/client", "node/node-1"])


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes with two backends each, a pod that only asks on the first, and services on that node alone."""
    name = unique_name()
    labelled = {"labels": {"app": "orders"}}
    chosen = [{"selector": {"app": "orders"}}]
    resources: list[Resource] = [
        *(document("Node", f"node-{n}") for n in (1, 2)),
        *(pod(f"orders-{n}", f"node-{(n + 1) // 2}", metadata=labelled) for n in (1, 2, 3, 4)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
        service("orders", tuple(SERVICE.values()), PORTS, backends=chosen),
        service("second", tuple(SECOND.values()), PORTS, backends=chosen),
        service("empty", tuple(EMPTY.values()), PORTS, backends=[{"selector": {"app": "nobody"}}]),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


def opened(address: str, protocol: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    one.settimeout(5)
    return one


def ask(one: socket.socket) -> str:
    """Who answers a connected socket."""
    one.sendall(b"who\n")
    return one.recv(200).decode().strip()


def seen(address: tuple[Any, ...]) -> tuple[str, int]:
    return cast("tuple[str, int]", address[:2])


def connections(place: Lab, name: str, protocol: str, version: int) -> PoolStatus:
    with api.Node(f"lab/{place.name}") as node:
        return next(
            status
            for status in node.services()
            if status.pool.service == f"VirtualService/default/{name}"
            and (status.pool.protocol.lower(), status.pool.version) == (protocol, version)
        )


def connect_many(target: tuple[str, int], protocol: str, times: int) -> list[tuple[str, tuple[str, int]]]:
    found = []
    for _ in range(times):
        with opened(target[0], protocol) as one:
            one.connect(target)
            found.append((ask(one), seen(one.getpeername())))
    return found


@FAMILIES
@PROTOCOLS
@SOURCES
def test_connected_sockets_reach_every_backend_and_see_the_service(
    place: Lab, source: str, protocol: Protocol, version: int
) -> None:
    target = SERVICE[version], PORT[protocol]
    before = connections(place, "orders", protocol, version)
    found = place.call(source, lambda: connect_many(target, protocol, 60))
    answered = Counter(name for name, _ in found)
    assert set(answered) == BACKENDS
    assert {peer for _, peer in found} == {target}
    after = connections(place, "orders", protocol, version)
    assert after.connections - before.connections == 60
    assert after.packets == before.packets, "packets of a socket's own connection went through XDP"
    for later, earlier in zip(after.backends, before.backends, strict=True):
        assert later.connections - earlier.connections == answered[later.target.name]


@PROTOCOLS
def test_ipv4_mapped_sockets(place: Lab, protocol: Protocol) -> None:
    target = MAPPED, PORT[protocol]
    found = place.call("default/client", lambda: connect_many(target, protocol, 40))
    assert {name for name, _ in found} == BACKENDS
    assert {peer for _, peer in found} == {target}


def send_to_each(addresses: list[tuple[str, int]], times: int) -> dict[tuple[str, int], list[str]]:
    """One socket asks several addresses in turn; who answered, by the address that the answer seems to come from."""
    found: dict[tuple[str, int], list[str]] = {address: [] for address in addresses}
    with opened(addresses[0][0], "udp") as one:
        for _ in range(times):
            for address in addresses:
                one.sendto(b"who", address)
                answer, source = one.recvfrom(200)
                assert seen(source) == address
                found[address].append(answer.decode().strip())
    return found


@pytest.mark.parametrize(
    "pair", [(SERVICE[4], SECOND[4]), (SERVICE[6], SECOND[6]), (MAPPED, "::ffff:192.0.2.11")]
)
@SOURCES
def test_unconnected_datagrams_stay_with_their_backend(
    place: Lab, source: str, pair: tuple[str, str]
) -> None:
    addresses = [(address, 53) for address in pair]
    chosen = set()
    for _ in range(12):
        found = place.call(source, lambda: send_to_each(addresses, 5))
        for names in found.values():
            assert len(set(names)) == 1, "one socket's datagrams went to several backends"
        chosen.add(found[addresses[0]][0])
    assert len(chosen) > 1, "all sockets went to one backend"


@FAMILIES
@PROTOCOLS
@SOURCES
def test_a_service_without_backends_is_refused_at_once(
    place: Lab, source: str, protocol: Protocol, version: int
) -> None:
    before = connections(place, "empty", protocol, version)

    def refused() -> list[int]:
        errors = []
        target = EMPTY[version], PORT[protocol]
        for way in ("connect", "sendto"):
            if (protocol, way) == ("tcp", "sendto"):
                continue
            with opened(target[0], protocol) as one:
                try:
                    one.connect(target) if way == "connect" else one.sendto(b"x", target)
                except OSError as error:
                    errors.append(error.errno or 0)
        return errors

    errors = place.call(source, refused)
    assert errors == [errno.ECONNREFUSED] * (2 if protocol == "udp" else 1)
    with api.Node(f"lab/{place.name}") as node:
        counted = node.totals()
    assert counted is not None
    assert counted.sockets["refused_no_backend"] >= len(errors)
    assert connections(place, "empty", protocol, version).drops - before.drops == len(errors)


@FAMILIES
@PROTOCOLS
def test_a_backend_calls_its_own_service(place: Lab, protocol: Protocol, version: int) -> None:
    target = SERVICE[version], PORT[protocol]
    found = place.call("default/orders-1", lambda: connect_many(target, protocol, 60))
    assert {name for name, _ in found} == BACKENDS


@FAMILIES
@PROTOCOLS
def test_clients_outside_are_served_by_xdp_meanwhile(place: Lab, protocol: Protocol, version: int) -> None:
    before = connections(place, "orders", protocol, version).packets
    answers = {
        place.probe("external/client", SERVICE[version], PORT[protocol], protocol).answered_by
        for _ in range(24)
    }
    assert answers <= BACKENDS
    assert len(answers) > 1
    assert connections(place, "orders", protocol, version).packets > before


@FAMILIES
@PROTOCOLS
def test_others_addresses_are_left_alone(place: Lab, protocol: Protocol, version: int) -> None:
    """A direct connection to a backend's own address, before and after the same socket was a service's."""
    backend = place.member("default/orders-3")
    address = next(str(a) for a in backend.addresses if a.version == version)
    number = 8080 if protocol == "tcp" else 5353

    def reconnect() -> list[tuple[str, tuple[str, int]]]:
        found = []
        with opened(address, protocol) as one:
            for target in (
                (SERVICE[version], PORT[protocol]),
                (address, number),
                (SECOND[version], PORT[protocol]),
            ):
                one.connect(target)
                found.append((ask(one), seen(one.getpeername())))
                if protocol == "tcp":
                    disconnect(one)
        return found

    found = place.call("default/client", reconnect)
    assert [peer for _, peer in found] == [
        (SERVICE[version], PORT[protocol]),
        (address, number),
        (SECOND[version], PORT[protocol]),
    ]
    assert found[1][0] == "default/orders-3"


def disconnect(one: socket.socket) -> None:
    """connect() with AF_UNSPEC, which Python's sockets do not have."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(one.fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), "disconnect")


def test_a_disconnected_datagram_socket_is_a_free_one(place: Lab) -> None:
    """In IPv4: the kernel lets a disconnected IPv6 socket hear its last peer only, with services or without."""
    version = 4

    def both() -> list[tuple[str, int]]:
        found = []
        with opened(SERVICE[version], "udp") as one:
            one.connect((SERVICE[version], 53))
            ask(one)
            disconnect(one)
            with pytest.raises(OSError, match="not connected"):
                one.getpeername()
            for address in (SECOND[version], SERVICE[version]):
                one.sendto(b"who", (address, 53))
                found.append(seen(one.recvfrom(100)[1]))
        return found

    assert place.call("default/client", both) == [(SECOND[version], 53), (SERVICE[version], 53)]


@FAMILIES
def test_a_connected_datagram_socket_may_still_name_its_service(place: Lab, version: int) -> None:
    """sendto() of a connected socket to its own service: the kernel takes answers from its peer alone."""

    def both() -> tuple[str, bool]:
        with opened(SERVICE[version], "udp") as one:
            one.connect((SERVICE[version], 53))
            name = ask(one)
            one.sendto(b"who", (SERVICE[version], 53))
            answer, source = one.recvfrom(100)
            return name, seen(source) == (SERVICE[version], 53) and bool(answer)

    name, right = place.call("default/client", both)
    assert name in BACKENDS
    assert right


@FAMILIES
@pytest.mark.parametrize("option", [0, 30], ids=["sendto", "TCP_FASTOPEN_CONNECT"])
def test_fast_open(place: Lab, version: int, option: int) -> None:
    def fast() -> tuple[str, tuple[str, int]]:
        with opened(SERVICE[version], "tcp") as one:
            if option:
                one.setsockopt(socket.IPPROTO_TCP, option, 1)
                one.connect((SERVICE[version], 80))
                one.sendall(b"who\n")
            else:
                one.settimeout(None)  # a nonblocking one is told "in progress"
                one.sendto(b"who\n", socket.MSG_FASTOPEN, (SERVICE[version], 80))
            return one.recv(100).decode().strip(), seen(one.getpeername())

    name, peer = place.call("default/client", fast)
    assert name in BACKENDS
    assert peer == (SERVICE[version], 80)


@FAMILIES
@PROTOCOLS
def test_a_bound_socket_keeps_its_port_and_a_fork_inherits_it(
    place: Lab, version: int, protocol: Protocol
) -> None:
    def bound() -> tuple[int, int, str]:
        with opened(SERVICE[version], protocol) as one:
            one.bind(("::" if version == 6 else "0.0.0.0", 0))
            number = one.getsockname()[1]
            one.connect((SERVICE[version], PORT[protocol]))
            reading, writing = os.pipe()
            if os.fork() == 0:
                peer = seen(one.getpeername())
                os.write(writing, f"{ask(one)} {peer[0]}".encode())
                os._exit(0)
            os.close(writing)
            with os.fdopen(reading) as answer:
                text = answer.read()
            os.wait()
            return number, one.getsockname()[1], text

    before, after, text = place.call("default/client", bound)
    assert before == after
    name, peer = text.split()
    assert name in BACKENDS
    assert peer == SERVICE[version]


@FAMILIES
def test_many_services_from_one_datagram_socket(
    place: Lab, version: int, lab_file: Callable[..., None]
) -> None:
    """More than a socket's own storage holds: answers still seem to come from whom was asked."""
    many = [f"192.0.2.{n}" if version == 4 else f"2001:db8::{n:x}" for n in range(100, 112)]
    lab_file(
        service(
            "many",
            tuple(many),
            [{"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"}],
            backends=[{"selector": {"app": "orders"}}],
        )
    )
    addresses = [(address, 53) for address in many]

    def each_once_then_again() -> tuple[dict[Any, list[str]], int]:
        found: dict[Any, list[str]] = {address: [] for address in addresses}
        wrong = 0
        with opened(many[0], "udp") as one:
            for _ in range(3):
                for address in addresses:
                    one.sendto(b"who", address)
                    answer, source = one.recvfrom(200)
                    wrong += seen(source) not in found
                    found[address].append(answer.decode())
        return found, wrong

    found, wrong = place.call("default/client", each_once_then_again)
    assert wrong == 0
    for address, names in found.items():
        assert len(set(names)) == 1, f"{address} was answered by several"


@pytest.fixture
def lab_file(place: Lab) -> Iterator[Callable[..., None]]:
    """Applies more services, and removes them after the test."""
    added: list[str] = []

    def apply(*resources: Resource) -> None:
        with api.Node(f"lab/{place.name}") as node:
            node.apply(resources)
        added.extend(resource.reference for resource in resources)

    yield apply
    with api.Node(f"lab/{place.name}") as node:
        node.delete(added)
