"""The programs of sockets on a cgroup that the test made, with tables filled by hand: on each kernel that can load them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf
from hookline.bpf import features
from hookline.datapath.loadbalancer.balancer import SOCKET_PROGRAMS
from hookline.datapath.loadbalancer.sockets import destroy_sockets, live_sockets
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.scene import Balancer, packed
from tests.requirements import need

EACH_FAMILY = pytest.mark.parametrize("version", [4, 6])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
KIND = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
INSIDE = 1


@pytest.fixture
def cgroup(unique_name: Callable[[], str]) -> Iterator[Path]:
    """A cgroup that this process is in while the test runs."""
    root = bpf.cgroup_folder()
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = next(line.partition("::")[2] for line in lines if line.startswith("0::"))
    folder = root / unique_name()
    folder.mkdir()
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield folder
    finally:
        (root / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        folder.rmdir()


@pytest.fixture
def attached(balancer: Balancer, cgroup: Path) -> Iterator[Balancer]:
    """The balancer with its programs of sockets on the test's cgroup."""
    with ExitStack() as links:
        for name in SOCKET_PROGRAMS:
            links.enter_context(balancer.obj.programs[name].attach_cgroup(cgroup, name))
        yield balancer


@pytest.fixture
def serve() -> Iterator[Callable[[int, str], int]]:
    """Starts a server on one of the node's addresses; each answers with its port."""
    with ExitStack() as running:

        def start(version: int, protocol: str) -> int:
            server = running.enter_context(socket.socket(FAMILY[version], KIND[protocol]))
            server.bind((packets.NODE[version], 0))
            number = int(server.getsockname()[1])
            work = _serve_tcp if protocol == "TCP" else _serve_udp
            if protocol == "TCP":
                server.listen(64)
            thread = threading.Thread(target=work, args=(server, str(number).encode()), daemon=True)
            thread.start()
            running.callback(thread.join, 10)
            running.callback(_stop, server)
            return number

        yield start


def _stop(server: socket.socket) -> None:
    """Wakes who waits for it; a datagram socket says that it is not connected, and does."""
    with suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


def _serve_tcp(server: socket.socket, answer: bytes) -> None:
    kept = []
    while True:
        try:
            one, _ = server.accept()
            kept.append(one)
            one.sendall(answer)
        except OSError:
            break
    for one in kept:
        one.close()


def _serve_udp(server: socket.socket, answer: bytes) -> None:
    while True:
        try:
            data, peer = server.recvfrom(100)
            if not peer or not data:
                break
            server.sendto(answer, peer)
        except OSError:
            break


def client(version: int, protocol: str) -> socket.socket:
    one = socket.socket(FAMILY[version], KIND[protocol])
    one.settimeout(20)
    return one


def ask(one: socket.socket, protocol: str) -> int:
    if protocol == "UDP":
        one.send(b"who")
    return int(one.recv(100))


def inside_service(balancer: Balancer, address: str, row: int, protocol: str) -> None:
    """A row for sockets alone, whose table has one slot."""
    page = balancer._next_page
    balancer._next_page += 1
    balancer._pages[page][0] = row
    number = packets.TCP_NUMBER if protocol == "TCP" else packets.UDP_NUMBER
    balancer.maps["services"][packed(address) + struct.pack("!HBB", 80, number, INSIDE)] = {
        "id": 60,
        "table_page": page,
        "table_size": 1,
        "pool": 1,
    }


@pytest.mark.feature("hook", "services at connect time (cgroup)")
@EACH_FAMILY
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_service_is_reached_and_seen(
    attached: Balancer, serve: Callable[[int, str], int], version: int, protocol: str
) -> None:
    port = serve(version, protocol)
    row = attached.backend(packets.NODE[version], port)
    number = attached.service(packets.SERVICE[version], row, protocol=protocol)
    before = attached.service_counts(number)["connections"]
    target = packets.SERVICE[version], 80
    with client(version, protocol) as one:
        one.connect(target)
        assert ask(one, protocol) == port
        assert one.getpeername()[:2] == target
    if protocol == "UDP":
        with client(version, protocol) as one:
            one.sendto(b"who", target)
            answer, source = one.recvfrom(100)
            assert (int(answer), source[:2]) == (port, target)
    assert attached.service_counts(number)["connections"] - before == (1 if protocol == "TCP" else 2)


@EACH_FAMILY
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_refused(attached: Balancer, version: int, protocol: str) -> None:
    number = attached.service(packets.SERVICE[version], protocol=protocol)
    before = attached.service_counts(number)["drops"]
    with client(version, protocol) as one, pytest.raises(ConnectionRefusedError):
        one.connect((packets.SERVICE[version], 80))
    if protocol == "UDP":
        with client(version, protocol) as one, pytest.raises(ConnectionRefusedError):
            one.sendto(b"x", (packets.SERVICE[version], 80))
    assert attached.service_counts(number)["drops"] - before == (1 if protocol == "TCP" else 2)


@EACH_FAMILY
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_rows_of_scope_inside_are_for_sockets_alone(
    attached: Balancer, serve: Callable[[int, str], int], version: int, protocol: str
) -> None:
    port = serve(version, protocol)
    row = attached.backend(packets.NODE[version], port)
    attached.service(packets.SERVICE[version], protocol=protocol)
    inside_service(attached, packets.SERVICE[version], row, protocol)
    make = packets.tcp if protocol == "TCP" else packets.udp
    assert attached.balance(make(packets.to_service(version))).reason == "no_backend"
    with client(version, protocol) as one:
        one.connect((packets.SERVICE[version], 80))
        assert ask(one, protocol) == port


@pytest.mark.feature("other", "sockets ended by SOCK_DESTROY")
@EACH_FAMILY
@pytest.mark.parametrize("way", ["netlink", "iterator"])
def test_sockets_of_a_backend_are_ended(
    attached: Balancer, serve: Callable[[int, str], int], version: int, way: str
) -> None:
    if way == "iterator":
        found = features.kfunc("bpf_sock_destroy")
        need("vm", "" if found.answer is features.Answer.YES else found.why)
    sockets: list[Any] = []
    rows = {}
    with ExitStack() as opened:
        for protocol in ("TCP", "UDP"):
            port = serve(version, protocol)
            row = attached.backend(packets.NODE[version], port)
            generation = int(attached.maps["backends"][row]["generation"])
            rows[row, generation] = (ip_address(packets.NODE[version]), port)
            attached.service(packets.SERVICE[version], row, protocol=protocol)
            for direct in (False, True):
                one = opened.enter_context(closing(client(version, protocol)))
                one.connect((packets.NODE[version], port) if direct else (packets.SERVICE[version], 80))
                assert ask(one, protocol) == port
                sockets.append((protocol, direct, one))
        found_now = live_sockets(attached.maps["sockets"])
        assert {(int(one["backend"]), int(one["generation"])) for one in found_now} == set(rows)
        ended = destroy_sockets(attached.maps["sockets"], rows, netlink=way == "netlink")
        if ended.left.get(os.strerror(errno.EOPNOTSUPP)):
            need("vm", "SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY)")
        assert (ended.tcp, ended.udp, ended.left) == (1, 1, {})
        for protocol, direct, one in sockets:
            if direct:
                assert one.getpeername()[0] == packets.NODE[version]
                if protocol == "UDP":
                    assert ask(one, protocol)
            else:
                with pytest.raises(OSError, match=r"abort|not connected|Destination address"):
                    one.send(b"x") if protocol == "UDP" else one.recv(1)
        assert not len(live_sockets(attached.maps["sockets"]))
