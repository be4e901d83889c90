"""What the programs write into packets, octet for octet: every shape of packet in every kind of connection.

The expected packet is made by scapy between the new ends, checksums computed anew.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import SHAPES, Ends, protocol_of, tcp, to_service, udp, version_of
from tests.kernel.loadbalancer.scene import DSR, LOCAL, Balancer

EVERY_SHAPE = pytest.mark.parametrize("name", SHAPES)
UDP_CHECKSUM = {4: 14 + 20 + 6, 6: 14 + 40 + 6}
TCP_CHECKSUM = {4: 14 + 20 + 16, 6: 14 + 40 + 16}


def _open(
    lb: Balancer, version: int, protocol: str, target: str, port: int = 8080, flags: int = 0
) -> tuple[Ends, int]:
    """A service with one backend, and a connection to it; the ends that its packets have and the NAT port."""
    lb.service(packets.SERVICE[version], lb.backend(target, port, flags=flags), protocol=protocol)
    ends = to_service(version)
    first = lb.balance((tcp if protocol == "TCP" else udp)(ends))
    return ends, first.ends.source_port


@EVERY_SHAPE
def test_to_a_backend_of_this_node(balancer: Balancer, name: str) -> None:
    shape, version = SHAPES[name], version_of(name)
    balancer.service(
        packets.SERVICE[version],
        balancer.backend(packets.POD[version], 8080, flags=LOCAL),
        protocol=protocol_of(name),
    )
    ends = to_service(version)
    outcome = balancer.balance(shape(ends))
    assert outcome.verdict == "PASS"
    assert not outcome.handed
    assert not outcome.metadata
    assert outcome.data == shape(replace(ends, destination=packets.POD[version], destination_port=8080))


@EVERY_SHAPE
@pytest.mark.parametrize("link", ["uplink", "other"])
def test_to_a_backend_beyond_the_node(balancer: Balancer, name: str, link: str) -> None:
    shape, version = SHAPES[name], version_of(name)
    target = (packets.BACKEND if link == "uplink" else packets.SERVER)[version]
    ends, port = _open(balancer, version, protocol_of(name), target)
    assert 10240 <= port <= 29999
    outcome = balancer.balance(shape(ends))
    assert outcome.verdict == ("TX" if link == "uplink" else "REDIRECT")
    uplink = link == "uplink"
    assert outcome.data == shape(
        Ends(
            (packets.NODE if uplink else packets.NODE_OTHER)[version],
            target,
            port,
            8080,
            63,
            packets.UPLINK_MAC if uplink else packets.OTHER_MAC,
            packets.BACKEND_MAC if uplink else packets.SERVER_MAC,
        )
    )


@EVERY_SHAPE
def test_reply_of_a_backend_beyond_the_node(balancer: Balancer, name: str) -> None:
    shape, version = SHAPES[name], version_of(name)
    _, port = _open(balancer, version, protocol_of(name), packets.BACKEND[version])
    reply = Ends(
        packets.BACKEND[version],
        packets.NODE[version],
        8080,
        port,
        mac_source=packets.BACKEND_MAC,
        mac_destination=packets.UPLINK_MAC,
    )
    outcome = balancer.balance(shape(reply))
    assert outcome.verdict == "TX"
    assert outcome.data == shape(
        Ends(
            packets.SERVICE[version],
            packets.CLIENT[version],
            80,
            40000,
            63,
            packets.UPLINK_MAC,
            packets.CLIENT_MAC,
        )
    )


@EVERY_SHAPE
def test_reply_of_a_backend_of_this_node(balancer: Balancer, name: str) -> None:
    shape, version = SHAPES[name], version_of(name)
    _open(balancer, version, protocol_of(name), packets.POD[version], flags=LOCAL)
    reply = Ends(packets.POD[version], packets.CLIENT[version], 8080, 40000)
    data, counted = balancer.reply(shape(reply))
    assert counted == 1
    assert data == shape(replace(reply, source=packets.SERVICE[version], source_port=80))


@EVERY_SHAPE
def test_dsr_changes_layer_2_and_ttl_only(balancer: Balancer, name: str) -> None:
    shape, version = SHAPES[name], version_of(name)
    ends, _ = _open(balancer, version, protocol_of(name), packets.BACKEND[version], flags=DSR)
    outcome = balancer.balance(shape(ends))
    assert outcome.verdict == "TX"
    assert outcome.data == shape(
        replace(ends, ttl=63, mac_source=packets.UPLINK_MAC, mac_destination=packets.BACKEND_MAC)
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("target", ["local", "nat"])
def test_udp_checksum_that_comes_out_as_zero(balancer: Balancer, version: int, target: str) -> None:
    """RFC 768: it is sent as 0xffff, since 0 says that there is none."""
    local = target == "local"
    address = (packets.POD if local else packets.BACKEND)[version]
    ends, _ = _open(balancer, version, "UDP", address, flags=LOCAL if local else 0)
    after = balancer.balance(udp(ends)).ends
    (odd,) = struct.unpack_from("!H", udp(after, b"\0\0"), UDP_CHECKSUM[version])
    outcome = balancer.balance(udp(ends, struct.pack("!H", odd)))
    assert outcome.data == udp(after, struct.pack("!H", odd))
    assert struct.unpack_from("!H", outcome.data, UDP_CHECKSUM[version]) == (0xFFFF,)


@pytest.mark.parametrize("version", [4, 6])
def test_udp_checksum_that_comes_in_as_ffff(balancer: Balancer, version: int) -> None:
    ends, _ = _open(balancer, version, "UDP", packets.BACKEND[version])
    (odd,) = struct.unpack_from("!H", udp(ends, b"\0\0"), UDP_CHECKSUM[version])
    packet = udp(ends, struct.pack("!H", odd))
    assert struct.unpack_from("!H", packet, UDP_CHECKSUM[version]) == (0xFFFF,)
    outcome = balancer.balance(packet)
    assert outcome.data == udp(outcome.ends, struct.pack("!H", odd))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("wanted", [0x0000, 0x0001, 0xFFFE])
def test_tcp_checksums_at_the_edges(balancer: Balancer, version: int, wanted: int) -> None:
    """A TCP checksum of 0 is an ordinary one, before and after."""
    ends, _ = _open(balancer, version, "TCP", packets.BACKEND[version])
    after = balancer.balance(tcp(ends)).ends
    for side in (ends, after):
        (check,) = struct.unpack_from("!H", tcp(side, "A", b"\0\0"), TCP_CHECKSUM[version])
        payload = struct.pack("!H", (check - wanted) % 0xFFFF)
        assert struct.unpack_from("!H", tcp(side, "A", payload), TCP_CHECKSUM[version]) == (wanted,)
        assert balancer.balance(tcp(ends, "A", payload)).data == tcp(after, "A", payload)


def test_udp_reply_checksum_zero_and_ffff(balancer: Balancer) -> None:
    """The same in `reply`, which uses the kernel's helpers."""
    _open(balancer, 4, "UDP", packets.POD[4], flags=LOCAL)
    before, after = Ends(packets.POD[4], packets.CLIENT[4], 8080, 40000), to_service(4)
    after = Ends(after.destination, after.source, 80, 40000)
    (odd,) = struct.unpack_from("!H", udp(after, b"\0\0"), UDP_CHECKSUM[4])
    payload = struct.pack("!H", odd)
    assert balancer.reply(udp(before, payload)) == (udp(after, payload), 1)


@pytest.mark.parametrize("check", [0x0000, 0xFFFF, 0x1234])
def test_a_wrong_checksum_stays_wrong(balancer: Balancer, check: int) -> None:
    """It is updated, never made right: whoever receives it finds the damage."""
    ends, _ = _open(balancer, 4, "TCP", packets.BACKEND[4])
    good = tcp(ends, "A", b"damaged")
    right = struct.unpack_from("!H", good, TCP_CHECKSUM[4])[0]
    assert right % 0xFFFF != check % 0xFFFF
    bad = packets.changed(good, TCP_CHECKSUM[4], struct.pack("!H", check))
    outcome = balancer.balance(bad)
    expected = tcp(outcome.ends, "A", b"damaged")
    assert outcome.data != expected
    off = struct.unpack_from("!H", outcome.data, TCP_CHECKSUM[4])[0]
    (new,) = struct.unpack_from("!H", expected, TCP_CHECKSUM[4])
    assert (off - new) % 0xFFFF == (check - right) % 0xFFFF
