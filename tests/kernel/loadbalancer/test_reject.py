"""What a client is told of a service without a backend: resets and "port unreachable", octet for octet as scapy makes them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.conftest import MakeBalancer
from tests.kernel.loadbalancer.packets import SHAPES, Ends, Shape, options, protocol_of, tcp, to_service, udp
from tests.kernel.loadbalancer.scene import Balancer, Outcome

EACH_FAMILY = pytest.mark.parametrize("version", [4, 6])
TCP_SHAPES = [name for name in SHAPES if protocol_of(name) == "TCP"]
UDP_SHAPES = [name for name in SHAPES if protocol_of(name) == "UDP"]
LARGEST = {4: 576, 6: 1280}
UNREACHABLE = {4: ICMP(type=3, code=3), 6: ICMPv6DestUnreach(code=4)}


def answer_to(ends: Ends, layer4: Packet, *, tos: int = 0) -> bytes:
    """The frame that goes back, every length and checksum made by scapy."""
    back = Ether(src=ends.mac_destination, dst=ends.mac_source)
    if ends.version == 4:
        ip = IP(src=ends.destination, dst=ends.source, ttl=64, id=0, flags="DF", tos=tos)
    else:
        ip = IPv6(src=ends.destination, dst=ends.source, hlim=64)
    return bytes(back / ip / layer4)


def reset_of(ends: Ends, flags: str, seq: int, ack: int) -> bytes:
    return answer_to(
        ends,
        TCP(sport=ends.destination_port, dport=ends.source_port, flags=flags, seq=seq, ack=ack, window=0),
    )


def error_about(ends: Ends, frame: bytes) -> bytes:
    """Port unreachable, quoting the frame from its IP header on, without what padded it."""
    length = (
        int.from_bytes(frame[16:18], "big") if ends.version == 4 else 40 + int.from_bytes(frame[18:20], "big")
    )
    room = LARGEST[ends.version] - (28 if ends.version == 4 else 48)
    quoted = frame[14 : 14 + min(length, room)]
    return answer_to(ends, UNREACHABLE[ends.version] / Raw(quoted), tos=0xC0)


def refused(lb: Balancer, frame: bytes, protocol: str, version: int) -> Outcome:
    number = lb.service(packets.SERVICE[version], protocol=protocol)
    before = lb.service_counts(number)["drops"]
    outcome = lb.balance(frame)
    assert (outcome.verdict, outcome.reason, outcome.answered) == ("TX", "no_backend", True)
    assert lb.service_counts(number)["drops"] == before + 1
    assert lb.connection(to_service(version), protocol) is None
    return outcome


@pytest.mark.parametrize(
    ("flags", "payload", "expected"),
    [
        ("S", b"", ("RA", 0, 1000 + 1)),
        ("S", b"early", ("RA", 0, 1000 + 1 + 5)),
        ("F", b"abc", ("RA", 0, 1000 + 3 + 1)),
        ("", b"abcd", ("RA", 0, 1000 + 4)),
        ("A", b"data", ("R", 7000, 0)),
        ("SA", b"", ("R", 7000, 0)),
        ("FPA", b"end", ("R", 7000, 0)),
    ],
)
@EACH_FAMILY
def test_a_reset_has_the_numbers_that_its_receiver_accepts(
    balancer: Balancer, version: int, flags: str, payload: bytes, expected: tuple[str, int, int]
) -> None:
    """RFC 9293, 3.10.7.1."""
    ends = to_service(version)
    outcome = refused(balancer, tcp(ends, flags, payload, seq=1000, ack=7000), "TCP", version)
    assert outcome.data == reset_of(ends, *expected)


@EACH_FAMILY
def test_sequence_numbers_wrap(balancer: Balancer, version: int) -> None:
    ends = to_service(version)
    outcome = refused(balancer, tcp(ends, "S", b"early", seq=0xFFFFFFFD), "TCP", version)
    assert outcome.data == reset_of(ends, "RA", 0, 3)


@pytest.mark.parametrize("name", TCP_SHAPES)
def test_every_shape_of_segment_is_reset(balancer: Balancer, name: str) -> None:
    """Options, extension headers and padding are neither answered nor acknowledged."""
    version = packets.version_of(name)
    ends = to_service(version)
    frame = SHAPES[name](ends)
    segment = Ether(frame)[TCP] if version == 4 else _tcp_of(frame)
    payload = _payload_length(frame, version, segment)
    if "A" in segment.flags:
        expected = reset_of(ends, "R", segment.ack, 0)
    else:
        expected = reset_of(ends, "RA", 0, segment.seq + payload + ("S" in segment.flags))
    assert refused(balancer, frame, "TCP", version).data == expected


def _tcp_of(frame: bytes) -> Packet:
    """The TCP header, wherever it is: the shapes put it at the end or before their payload."""
    return TCP(frame[_l4_offset(frame) :])


def _l4_offset(frame: bytes) -> int:
    following, at = frame[20], 54
    while following not in (packets.TCP_NUMBER, packets.UDP_NUMBER):
        size = (
            8 if following == 44 else (frame[at + 1] + 2) * 4 if following == 51 else (frame[at + 1] + 1) * 8
        )
        following, at = frame[at], at + size
    return at


def _payload_length(frame: bytes, version: int, segment: Packet) -> int:
    if version == 4:
        header = Ether(frame)[IP]
        return int(header.len) - int(header.ihl) * 4 - int(segment.dataofs) * 4
    return 54 + int.from_bytes(frame[18:20], "big") - _l4_offset(frame) - int(segment.dataofs) * 4


@pytest.mark.parametrize("name", UDP_SHAPES)
def test_every_shape_of_datagram_is_quoted(balancer: Balancer, name: str) -> None:
    version = packets.version_of(name)
    ends = to_service(version)
    frame = SHAPES[name](ends)
    assert refused(balancer, frame, "UDP", version).data == error_about(ends, frame)


# Payloads around the rounds of the checksum's loops, and around the largest quotation.
SIZES = (*range(12), 27, 28, 29, 91, 92, 93, 519, 520, 521, 1000, 1183, 1184, 1185, 1440)


@pytest.mark.parametrize("size", SIZES)
@EACH_FAMILY
def test_as_much_as_fits_is_quoted(balancer: Balancer, version: int, size: int) -> None:
    ends = to_service(version)
    frame = udp(ends, bytes(1 + n % 255 for n in range(size)))
    outcome = refused(balancer, frame, "UDP", version)
    assert outcome.data == error_about(ends, frame)
    assert len(outcome.data) - 14 <= LARGEST[version]


def test_ipv4_options_are_quoted(balancer: Balancer) -> None:
    ends = to_service(4)

    def shape(these: Ends) -> bytes:
        return bytes(
            packets.ethernet(these)
            / IP(src=these.source, dst=these.destination, options=[IPOption_NOP()] * 4)
            / UDP(sport=these.source_port, dport=these.destination_port)
            / Raw(b"x" * 600)
        )

    frame = shape(ends)
    assert refused(balancer, frame, "UDP", 4).data == error_about(ends, frame)


def test_long_extension_headers_are_quoted(balancer: Balancer) -> None:
    ends = to_service(6)
    shape: Shape = packets.with_extensions([options(0, 12), options(60, 10)], lambda e: udp(e, b"x" * 1200))
    frame = shape(ends)
    assert refused(balancer, frame, "UDP", 6).data == error_about(ends, frame)


@EACH_FAMILY
def test_on_a_veth_the_answer_is_redirected(make_balancer: MakeBalancer, version: int) -> None:
    lb = make_balancer({"tx_by_redirect": 1})
    lb.service(packets.SERVICE[version])
    ends = to_service(version)
    outcome = lb.balance(tcp(ends, seq=5))
    assert (outcome.verdict, outcome.answered) == ("REDIRECT", True)
    assert outcome.data == reset_of(ends, "RA", 0, 6)


@pytest.mark.parametrize(
    "source",
    [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.9",
        "ff02::1",
        "ff0e::9",
    ],
)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_who_is_no_single_host_gets_no_answer(balancer: Balancer, source: str, protocol: str) -> None:
    version = ip_address(source).version
    balancer.service(packets.SERVICE[version], protocol=protocol)
    shape = tcp if protocol == "TCP" else udp
    outcome = balancer.balance(shape(Ends(source, packets.SERVICE[version])))
    assert str(outcome) == "DROP `no_backend`"
    assert not outcome.rewritten


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Keeps the test on the CPU that it is on: each has a bucket of its own."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("protocol", "at_once"), [("TCP", 6), ("UDP", 3)])
def test_answers_are_rationed(
    make_balancer: MakeBalancer, one_cpu: None, protocol: str, at_once: int
) -> None:
    """Resets and errors have buckets of their own: here of six and three, which gain one in a second."""
    second = 1_000_000_000
    lb = make_balancer(
        {
            "reset_interval_ns": second,
            "reset_depth_ns": 6 * second,
            "unreachable_interval_ns": second,
            "unreachable_depth_ns": 3 * second,
        }
    )
    lb.service(packets.SERVICE[4], protocol="TCP")
    lb.service(packets.SERVICE[4], protocol="UDP")
    shape, other = (tcp, udp) if protocol == "TCP" else (udp, tcp)
    frame = shape(to_service(4))
    began = time.monotonic()
    outcomes = [lb.balance(frame) for _ in range(64)]
    answered = sum(outcome.answered for outcome in outcomes)
    assert at_once <= answered <= at_once + 1 + time.monotonic() - began
    assert {str(outcome) for outcome in outcomes if not outcome.answered} == {"DROP `no_backend`"}
    assert lb.balance(other(to_service(4))).answered
    deadline = time.monotonic() + 20
    while not lb.balance(frame).answered:
        assert time.monotonic() < deadline
        time.sleep(0.1)
