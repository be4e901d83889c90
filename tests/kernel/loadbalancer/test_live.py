"""The programs on real interfaces: every verdict with real traffic, native and generic, and real connections."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Literal

import pytest
from scapy.packet import Packet

from hookline import bpf, net
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.conftest import MakeBalancer
from tests.kernel.loadbalancer.packets import Ends, tcp, to_service, udp
from tests.kernel.loadbalancer.scene import LOCAL, Balancer, Outcome, Scene, received, send, sniffer

EACH_FAMILY = pytest.mark.parametrize("version", [4, 6])
EACH_MODE = pytest.mark.parametrize("mode", ["native", "generic"])
NEIGHBOUR = {4: "10.0.0.77", 6: "2001:db8::77"}  # the client's second address: it answers when asked
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

Mode = Literal["native", "generic"]

_ports = itertools.count(41000)


class Attached:
    """A balancer attached to the uplink, and to ``other`` if wanted, until the test ends."""

    def __init__(self, balancer: Balancer, links: ExitStack) -> None:
        self.balancer = balancer
        self.links = links
        self.programs = balancer.obj.programs
        balancer.maps["settings"][0] = {"balance_id": self.programs["balance"].id}
        links.enter_context(self.programs["count_exceptions"].attach_raw_tracepoint("xdp_exception"))

    def attach(self, *interfaces: str, mode: Mode = "native") -> None:
        hooks: dict[str, Literal["ingress", "egress"]] = {"resolve": "ingress", "reply": "egress"}
        for interface in interfaces:
            for name, direction in hooks.items():
                self.links.enter_context(self.programs[name].attach_tc(interface, direction))
            self.links.enter_context(self.programs["balance"].attach_xdp(interface, mode=mode))

    def verdicts(self) -> dict[str, int]:
        return {name: count for name, (count, _) in self.balancer.totals().verdicts.items()}


@pytest.fixture
def make_attached(make_balancer: MakeBalancer) -> Iterator[Callable[..., Attached]]:
    with ExitStack() as links:

        def make(**constants: int) -> Attached:
            return Attached(make_balancer(constants), links)

        yield make


@pytest.fixture
def dummy_at(empty_object: Path) -> Iterator[Callable[[Path, str], None]]:
    """Puts an XDP program that passes everything on an interface."""
    with bpf.Object.open(empty_object) as obj, ExitStack() as links:
        obj.load()

        def attach(namespace: Path, interface: str) -> None:
            with net.inside(namespace):
                links.enter_context(obj.programs["empty_xdp"].attach_xdp(interface, mode="native"))

        yield attach


def _fresh(version: int) -> Ends:
    return to_service(version, source_port=next(_ports))


# One packet for each verdict


@EACH_FAMILY
@EACH_MODE
def test_tx(
    make_attached: Callable[..., Attached],
    dummy_at: Callable[[Path, str], None],
    scene: Scene,
    version: int,
    mode: Mode,
) -> None:
    """XDP_TX itself. A veth's wakes only a peer with an XDP program of its own."""
    dummy_at(scene.client, "up")
    attached = make_attached(tx_by_redirect=0, check_mtu=int(mode == "native"))
    lb = attached.balancer
    lb.service(packets.SERVICE[version], lb.backend(packets.BACKEND[version]))
    attached.attach("uplink", mode=mode)
    ends = _fresh(version)
    with sniffer(scene.client, "up") as listener:
        send(scene.client, "up", tcp(ends))
        packet = received(listener, _sent(lb, ends))
    assert attached.verdicts()["tx"] == 1
    assert (packet.src, packet.dst) == (packets.UPLINK_MAC, packets.BACKEND_MAC)
    assert bytes(packet) == tcp(_ends_of(packet))


@EACH_FAMILY
@EACH_MODE
def test_redirect_to_where_it_came_from(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    """No program is needed at the veth's other end then, which has GRO."""
    attached = make_attached(tx_by_redirect=1, check_mtu=int(mode == "native"))
    lb = attached.balancer
    lb.service(packets.SERVICE[version], lb.backend(packets.BACKEND[version]))
    attached.attach("uplink", mode=mode)
    ends = _fresh(version)
    with sniffer(scene.client, "up") as listener:
        send(scene.client, "up", tcp(ends))
        packet = received(listener, _sent(lb, ends))
    assert attached.verdicts()["redirect"] == 1
    assert bytes(packet) == tcp(_ends_of(packet))


@EACH_FAMILY
@EACH_MODE
def test_redirect_to_another_link(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    attached = make_attached(check_mtu=int(mode == "native"))
    lb = attached.balancer
    lb.service(packets.SERVICE[version], lb.backend(packets.SERVER[version]), protocol="UDP")
    attached.attach("uplink", mode=mode)
    ends = _fresh(version)
    with sniffer(scene.server, "ot") as listener:
        send(scene.client, "up", udp(ends))
        packet = received(listener, _sent(lb, ends, "UDP"))
    assert attached.verdicts()["redirect"] == 1
    assert (packet.src, packet.dst) == (packets.OTHER_MAC, packets.SERVER_MAC)
    assert bytes(packet) == udp(_ends_of(packet))


@EACH_FAMILY
@EACH_MODE
def test_pass_drop_and_aborted(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    attached = make_attached()
    lb = attached.balancer
    broken = lb.backend(packets.BACKEND[version])
    lb.service(packets.SERVICE[version], lb.backend(packets.POD[version], flags=LOCAL))
    lb.service(packets.SERVICE[version], broken, port=81)
    lb.retire(broken)
    attached.attach("uplink", mode=mode)
    before, reasons = attached.verdicts(), lb.totals().reasons
    own = Ends(packets.CLIENT[version], packets.NODE[version], next(_ports), 9)
    with sniffer(scene.node, "uplink") as listener:
        send(
            scene.client,
            "up",
            tcp(to_service(version, destination_port=82)),
            tcp(to_service(version, destination_port=81)),
            tcp(to_service(version, destination_port=81)),
            udp(own),
        )
        assert bytes(received(listener, own)) == udp(own)
    after = attached.verdicts()
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["drop"], grown["aborted"], grown["tx"], grown["redirect"]) == (1, 2, 0, 0)
    assert grown["pass"] >= 1
    totals = lb.totals()
    assert totals.exceptions == {"aborted": 2}
    assert not reasons
    assert {name: count for name, (count, _) in totals.reasons.items()} == {"no_service": 1, "internal": 2}


def test_exceptions_of_other_programs_are_not_counted(
    make_attached: Callable[..., Attached], scene: Scene
) -> None:
    attached = make_attached()
    lb = attached.balancer
    lb.service(packets.SERVICE[4], 0)
    lb.maps["settings"][0] = {"balance_id": 1 << 30}
    attached.attach("uplink")
    own = Ends(packets.CLIENT[4], packets.NODE[4], next(_ports), 9)
    with sniffer(scene.node, "uplink") as listener:
        send(scene.client, "up", tcp(to_service(4)), udp(own))
        received(listener, own)
    assert attached.verdicts()["aborted"] == 1
    assert not lb.totals().exceptions


# resolve


@EACH_FAMILY
@EACH_MODE
def test_resolve_sends_what_had_no_neighbour(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    """The stack asks for the layer-2 address, and the first packet is not lost."""
    net.forget(ip_address(NEIGHBOUR[version]), "uplink")
    attached = make_attached(check_mtu=int(mode == "native"))
    lb = attached.balancer
    lb.service(packets.SERVICE[version], lb.backend(NEIGHBOUR[version]))
    attached.attach("uplink", mode=mode)
    ends = _fresh(version)
    with sniffer(scene.client, "up") as listener:
        send(scene.client, "up", tcp(ends))
        packet = received(listener, _sent(lb, ends))
    assert lb.totals().handed_to_stack[0] == 1
    assert packet.dst == packets.CLIENT_MAC
    assert bytes(packet) == tcp(_ends_of(packet))
    net.forget(ip_address(NEIGHBOUR[version]), "uplink")


def _metadata(magic: int, address: str) -> bytes:
    hop = socket.inet_pton(socket.AF_INET, address).ljust(16, b"\0")
    return struct.pack("=III", magic, socket.if_nametoindex("uplink"), socket.AF_INET) + hop


@pytest.mark.parametrize("magic", [0x486F6F6B, 0x12345678])
def test_resolve_obeys_its_own_metadata_only(
    make_attached: Callable[..., Attached], scene: Scene, magic: int
) -> None:
    """A packet with metadata that says the client's second address: sent there, or left to the stack."""
    attached = make_attached()
    attached.attach("uplink")
    ends = Ends("10.0.0.50", packets.ELSEWHERE[4], next(_ports), 9)
    metadata = _metadata(magic, NEIGHBOUR[4])
    frame = metadata + udp(ends)
    context = struct.pack("=6I", 28, len(frame), 0, socket.if_nametoindex("uplink"), 0, 0)
    ours = magic == 0x486F6F6B
    with sniffer(scene.client, "up") as listener:
        attached.programs["balance"].test_run(frame, context=context, live_frames=True, repeat=1)
        if ours:
            packet = received(listener, ends)
            assert bytes(packet)[14:] == udp(ends)[14:]
        else:
            listener.settimeout(0.2)
            with pytest.raises(TimeoutError):
                received(listener, ends)


# Real connections


@contextlib.contextmanager
def _echo(namespace: Path, version: int, address: str, port: int = 8080) -> Iterator[None]:
    """A server that answers TCP and UDP with what it was sent, turned around."""
    stop = threading.Event()
    with net.inside(namespace):
        listener = socket.create_server((address, port), family=FAMILY[version])
        datagrams = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
        datagrams.bind((address, port))

    def streams() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    while data := connection.recv(65536):
                        connection.sendall(data[::-1])

    def packets_() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                data, sender = datagrams.recvfrom(65536)
                datagrams.sendto(data[::-1], sender)

    threads = [threading.Thread(target=one) for one in (streams, packets_)]
    with listener, datagrams:
        listener.settimeout(0.1)
        datagrams.settimeout(0.1)
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _talk(namespace: Path, version: int, address: str) -> None:
    with net.inside(namespace):
        stream = socket.socket(FAMILY[version], socket.SOCK_STREAM)
        datagram = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    with stream, datagram:
        for one in (stream, datagram):
            one.settimeout(5)
            one.connect((address, 80))
        for size in (1, 777, 1400):
            message = bytes(number % 251 for number in range(size))
            datagram.send(message)
            assert datagram.recv(65536) == message[::-1]
            stream.sendall(message)
            answer = b""
            while len(answer) < size:
                answer += stream.recv(65536)
            assert answer == message[::-1]


@EACH_FAMILY
@EACH_MODE
def test_connections_to_a_backend_of_this_node(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    attached = make_attached(tx_by_redirect=1, check_mtu=int(mode == "native"))
    lb = attached.balancer
    row = lb.backend(packets.NODE_OTHER[version], flags=LOCAL)
    for protocol in ("TCP", "UDP"):
        lb.service(packets.SERVICE[version], row, protocol=protocol)
    attached.attach("uplink", mode=mode)
    with _echo(scene.node, version, packets.NODE_OTHER[version]):
        _talk(scene.client, version, packets.SERVICE[version])
    totals = lb.totals()
    assert totals.replies[0] >= 3 + 5  # UDP's, and TCP's SYN/ACK, data, FIN or their acknowledgements
    assert not totals.reasons
    assert lb.backend_counts(row)["reply_packets"] == totals.replies[0]


@EACH_FAMILY
@EACH_MODE
def test_connections_to_a_backend_beyond_the_node(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    attached = make_attached(tx_by_redirect=1, check_mtu=int(mode == "native"))
    lb = attached.balancer
    row = lb.backend(packets.SERVER[version])
    for protocol in ("TCP", "UDP"):
        lb.service(packets.SERVICE[version], row, protocol=protocol)
    attached.attach("uplink", "other", mode=mode)
    with _echo(scene.server, version, packets.SERVER[version]):
        _talk(scene.client, version, packets.SERVICE[version])
    totals = lb.totals()
    assert not totals.reasons
    assert totals.verdicts["redirect"][0] >= 2 * (3 + 5)
    counts = lb.backend_counts(row)
    assert counts["packets"] + counts["reply_packets"] == totals.verdicts["redirect"][0]
    assert counts["connections"] == 2


def _sent(lb: Balancer, ends: Ends, protocol: str = "TCP") -> Ends:
    """What the connection's row will make, or made, of the packet's ends: waits for the row."""
    for _ in range(2000):
        row = lb.connection(ends, protocol)
        if row is not None:
            source, destination = (_text(row[side].tobytes()) for side in ("source", "destination"))
            return Ends(
                source,
                destination,
                int(row["source_port"].byteswap()),
                int(row["destination_port"].byteswap()),
            )
        threading.Event().wait(0.001)
    raise AssertionError("the packet did not arrive")


def _text(packed: bytes) -> str:
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _ends_of(packet: Packet) -> Ends:
    return Outcome("", bytes(packet), "", 0, False, b"").ends


@EACH_FAMILY
@EACH_MODE
def test_connections_to_no_backend_are_refused(
    make_attached: Callable[..., Attached], scene: Scene, version: int, mode: Mode
) -> None:
    """A real client's: the answers' checksums are right, and its stack finds its socket by them."""
    attached = make_attached(tx_by_redirect=1, check_mtu=int(mode == "native"))
    lb = attached.balancer
    for protocol in ("TCP", "UDP"):
        lb.service(packets.SERVICE[version], protocol=protocol)
    attached.attach("uplink", mode=mode)
    with net.inside(scene.client):
        stream = socket.socket(FAMILY[version], socket.SOCK_STREAM)
        datagram = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    with stream, datagram:
        for one in (stream, datagram):
            one.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            stream.connect((packets.SERVICE[version], 80))
        datagram.connect((packets.SERVICE[version], 80))
        for size in (0, 1, 777, 1400):
            datagram.send(bytes(size))
            with pytest.raises(ConnectionRefusedError):
                datagram.recv(1)
    totals = lb.totals()
    assert totals.answered[0] == 1 + 4
    assert totals.reasons["no_backend"][0] == totals.answered[0]
