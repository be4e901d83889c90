"""The lab's network carries traffic between all members, and its servers answer and count."""

from __future__ import annotations

import select
import socket
import time
from typing import Literal

import pytest

from hookline import net
from hookline.lab import Counts, Lab, LabError, ProbeFailed
from hookline.model.names import Endpoint, InvalidName, fabric_netns
from tests.requirements import missing_program, need

PAIRS = [
    ("orders-2", "orders-1", "same node"),
    ("orders-1", "orders-4", "across nodes"),
    ("external/client", "orders-1", "from outside to the first node"),
    ("external/client", "orders-3", "from outside to the second node"),
    ("node/node-1", "orders-1", "a node to its own pod"),
    ("node/node-1", "orders-3", "a node to another's pod"),
    ("orders-1", "orders-1", "itself"),
]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("port", "protocol"), [(8080, "tcp"), (5353, "udp")])
@pytest.mark.parametrize(("source", "target"), [pair[:2] for pair in PAIRS], ids=[pair[2] for pair in PAIRS])
def test_everyone_reaches_everyone(
    cluster: Lab,
    source: str,
    target: str,
    port: int,
    protocol: Literal["tcp", "udp"],
    family: Literal[4, 6],
) -> None:
    answer = cluster.probe(source, target, port, protocol, family)
    assert answer.answered_by == f"default/{target}"
    assert answer.address.version == family
    assert (answer.connected_ns > 0) == (protocol == "tcp")
    assert answer.answered_ns > answer.connected_ns


def test_a_pod_reaches_a_machine_outside(cluster: Lab) -> None:
    assert cluster.probe("web-2", "external/exchange:443").answered_by == "external/exchange"
    assert cluster.probe("web-2", "external/exchange:123/udp", family=6).answered_by == "external/exchange"


@pytest.mark.parametrize("target", ["orders-2:9", "orders-3:9", "orders-2:9/udp", "orders-3:9/udp"])
def test_a_port_without_a_server_refuses(cluster: Lab, target: str) -> None:
    with pytest.raises(ProbeFailed, match="refused") as raised:
        cluster.probe("orders-1", target)
    assert raised.value.reason == "refused"
    assert raised.value.as_dict()["reason"] == "refused"


@pytest.mark.parametrize("source", ["orders-1", "external/client", "node/node-2"])
@pytest.mark.parametrize("target", ["198.51.100.1:80", "[2001:db8:99::1]:80"])
def test_an_address_that_nobody_has_is_unreachable(cluster: Lab, source: str, target: str) -> None:
    with pytest.raises(ProbeFailed) as raised:
        cluster.probe(source, target)
    assert raised.value.reason == "unreachable"


def test_silence_is_a_timeout(cluster: Lab) -> None:
    with (
        net.inside(cluster.member("orders-1").netns),
        socket.create_server(("10.244.1.10", 7000)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as quiet,
    ):
        quiet.bind(("10.244.1.10", 7000))
        for target in ("orders-1:7000", "orders-1:7000/udp"):
            with pytest.raises(ProbeFailed, match=r"within 0\.2 s") as raised:
                cluster.probe("orders-2", target, timeout=0.2)
            assert raised.value.reason == "timeout"


def test_probes_that_make_no_sense(cluster: Lab) -> None:
    with pytest.raises(LabError, match="which port"):
        cluster.probe("orders-1", "orders-2")
    with pytest.raises(LabError, match="has no default/nobody"):
        cluster.probe("orders-1", "nobody:80")
    with pytest.raises(LabError, match="not an IPv6 address"):
        cluster.probe("orders-1", "10.244.1.10:80", family=6)
    with pytest.raises(ProbeFailed, match="TCP and UDP"):
        cluster.probe("orders-1", "orders-2:80/sctp")
    with pytest.raises(InvalidName):
        cluster.probe("orders-1", "orders-2:http")


def test_members_by_name_and_address(cluster: Lab) -> None:
    member = cluster.member("orders-1")
    assert member.name == "orders-1"
    assert cluster.member(Endpoint.parse("10.244.1.10")) is member
    assert cluster.member("default/orders-1") is member
    assert [str(port) for port in member.ports] == ["8080/tcp", "5353/udp"]
    assert [port.name for port in member.ports] == ["http", "quotes"]


def connect(lab: Lab, source: str, target: str, port: int) -> socket.socket:
    with net.inside(lab.member(source).netns):
        handle = socket.socket()
    handle.settimeout(5)
    handle.connect((str(lab.member(target).address(4)), port))
    return handle


def read_all(handle: socket.socket) -> bytes:
    data = b""
    while chunk := handle.recv(65536):
        data += chunk
    return data


def test_every_line_is_answered_by_one(cluster: Lab) -> None:
    with connect(cluster, "orders-1", "orders-2", 8080) as handle:
        handle.sendall(b"a\nb\nc")
        time.sleep(0.05)
        handle.sendall(b"c\n" + b"x\n" * 5000 + b"the last, without an end")
        handle.shutdown(socket.SHUT_WR)
        assert read_all(handle) == b"default/orders-2\n" * (3 + 5000 + 1)


def test_a_peer_that_does_not_read_holds_up_nobody(cluster: Lab) -> None:
    with connect(cluster, "orders-1", "orders-2", 8080) as handle:
        handle.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and sent < 8_000_000:
            try:
                sent += handle.send(b"\n" * 65536)
            except BlockingIOError:
                select.select([], [handle], [], 0.05)
        assert cluster.probe("orders-1", "orders-2:8080").answered_by == "default/orders-2"
        handle.settimeout(10)
        expected = sent * len("default/orders-2\n")
        received = 0
        while received < expected:
            received += len(handle.recv(1 << 20))


def test_http(cluster: Lab) -> None:
    with connect(cluster, "external/client", "orders-4", 8080) as handle:
        handle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST /y HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        handle.sendall(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answers = read_all(handle)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answers.count(b"\r\n\r\ndefault/orders-4\n") == 2
    assert answers.count(b"Connection: close") == 1
    with connect(cluster, "external/client", "orders-4", 8080) as handle:
        handle.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert read_all(handle).endswith(b"\r\n\r\ndefault/orders-4\n")
    with connect(cluster, "external/client", "orders-4", 8080) as handle:
        handle.sendall(b"GET / HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
        assert b"400 Bad Request" in read_all(handle)


def test_curl_and_exit_statuses(cluster: Lab) -> None:
    need("lab", missing_program("curl"))
    done = cluster.run(
        "external/client", ["curl", "-sg", "http://[fd00:10:244:2::1]:8080/", "http://10.244.1.10:8080"]
    )
    assert (done.returncode, done.stdout) == (0, "default/orders-3\ndefault/orders-1\n")
    assert cluster.run("orders-1", ["sh", "-c", "exit 7"]).returncode == 7
    with pytest.raises(LabError, match="cannot run no-such-command"):
        cluster.run("orders-1", ["no-such-command"])


def test_counts_are_exact(cluster: Lab) -> None:
    cluster.reset_server_counts()
    for _ in range(7):
        cluster.probe("orders-1", "web-1:80")
    for family in (4, 6):
        cluster.probe("orders-1", "orders-2:5353/udp", family=family)
    with connect(cluster, "orders-1", "orders-2", 8080) as handle:
        handle.sendall(b"x\n" * 10)
        assert len(handle.recv(10 * 17, socket.MSG_WAITALL)) == 170
        assert cluster.server_counts().of("default/orders-2").tcp_open == 1
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset at the end
    time.sleep(0.1)
    counts = cluster.server_counts()
    assert counts.members["default/web-1"] == {"80/tcp": Counts(7, 7, 7, 0, 0)}
    assert counts.members["default/orders-2"] == {
        "8080/tcp": Counts(1, 10, 0, 1, 0),
        "5353/udp": Counts(0, 0, 0, 0, 2),
    }
    assert counts.totals == Counts(8, 17, 7, 1, 2)
    assert counts.of("node/node-1") == Counts()
    assert counts.as_dict()["totals"]["tcp_accepted"] == 8
    cluster.reset_server_counts()
    assert cluster.server_counts().totals == Counts()


def test_ten_thousand_requests_a_second(cluster: Lab) -> None:
    """Eight clients with eight requests in flight each, for half a second; one process serves them all."""
    targets = [f"orders-{number}" for number in (1, 2, 3, 4)] * 2
    handles = [connect(cluster, "external/client", target, 8080) for target in targets]
    best = 0.0
    try:
        for _ in range(5):
            before = cluster.server_counts().totals.tcp_requests
            begun = time.monotonic()
            for handle in handles:
                handle.sendall(b"\n" * 8)
            while time.monotonic() < begun + 0.5:
                for handle in select.select(handles, [], [], 1)[0]:
                    handle.sendall(b"\n" * (len(handle.recv(65536)) // 17))
            rate = (cluster.server_counts().totals.tcp_requests - before) / (time.monotonic() - begun)
            best = max(best, rate)
            if best >= 10_000:
                break
    finally:
        for handle in handles:
            handle.close()
    assert best >= 10_000


def test_offloads_are_as_xdp_needs_them(cluster: Lab) -> None:
    for netns in (fabric_netns(cluster.name), *(member.netns for member in cluster.members)):
        with net.inside(netns):
            for interface in net.interfaces():
                if interface.kind == "veth":
                    assert net.offloads(interface.name) == net.Offloads(
                        gro=True, tx_checksum=False, tso=False
                    )


def test_packets_leave_pods_with_finished_checksums(cluster: Lab) -> None:
    """What a program at the uplink sees: no checksum is left to hardware, also of what was routed on."""
    member = cluster.member("node/node-1")
    with net.inside(member.netns):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        tap.bind(("eth0", 0x0800))
    with tap:
        tap.settimeout(3)
        cluster.probe("external/client", "orders-1:5353/udp", family=4)
        while True:
            packet = tap.recv(2048)
            if packet[23] == 17:
                break
    header = (packet[14] & 15) * 4
    datagram = packet[14 + header :]
    pseudo = packet[26:34] + bytes([0, 17]) + datagram[4:6]
    assert ones_complement(pseudo + datagram) == 0xFFFF


def ones_complement(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
