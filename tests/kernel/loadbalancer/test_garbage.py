"""Packets that nobody would send: random octets, cut short, valid ones with octets changed.

Whatever comes, `balance` never aborts, what it passes is whole, and every packet is counted
once (`Balancer.balance` checks that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import SHAPES, Ends, tcp, to_service, udp, version_of, with_extensions
from tests.kernel.loadbalancer.scene import DSR, LOCAL, Balancer

BOUNDED = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Ports of services, by the kind of their backend.
KINDS = {80: "nat", 81: "local", 82: "dsr", 83: "none", 84: "silent"}
ADDRESSES = {version: ip_address(packets.SERVICE[version]).packed for version in (4, 6)}

_random = st.binary(min_size=14, max_size=200)
_random_ip = st.builds(
    lambda version, first, rest: (
        bytes(12) + (b"\x08\0" if version == 4 else b"\x86\xdd") + bytes((first,)) + rest
    ),
    st.sampled_from([4, 6]),
    st.one_of(st.sampled_from([0x45, 0x46, 0x4F, 0x60]), st.integers(0, 255)),
    st.binary(max_size=120),
)


def _for_service(shape_name: str, port: int) -> bytes:
    return SHAPES[shape_name](to_service(version_of(shape_name), destination_port=port))


_valid = st.builds(_for_service, st.sampled_from(sorted(SHAPES)), st.sampled_from([*KINDS, 85]))
_not_ours = st.builds(
    lambda name, port: SHAPES[name](
        Ends(packets.CLIENT[version_of(name)], packets.ELSEWHERE[version_of(name)], 40000, port)
    ),
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 65535),
)
_cut = st.builds(lambda frame, length: frame[: max(length, 14)], _valid, st.integers(14, 120))


@st.composite
def _mutated(draw: st.DrawFn, source: st.SearchStrategy[bytes] = _valid) -> bytes:
    frame = bytearray(draw(source))
    for _ in range(draw(st.integers(1, 6))):
        # The headers, mostly.
        place = draw(st.integers(12, min(len(frame) - 1, 90)))
        frame[place] = draw(
            st.one_of(st.sampled_from([0, 1, 6, 17, 43, 44, 51, 60, 255]), st.integers(0, 255))
        )
    return bytes(frame)


_chains = st.builds(
    lambda headers, tail: with_extensions(
        [
            packets.options(number, units)
            if number in (0, 60)
            else {43: packets.routing, 44: packets.fragment, 51: packets.authentication}[number]()
            for number, units in headers
        ],
        tail,
    )(to_service(6)),
    st.lists(st.tuples(st.sampled_from([0, 43, 44, 51, 60]), st.integers(1, 32)), max_size=9),
    st.sampled_from([tcp, udp]),
)
ANYTHING = st.one_of(_random, _random_ip, _cut, _mutated(), _mutated(_chains), _chains)


@pytest.fixture
def served(balancer: Balancer) -> Balancer:
    """Services of every kind over both families and protocols."""
    for version in (4, 6):
        targets = {
            80: (packets.BACKEND[version], 0),
            81: (packets.POD[version], LOCAL),
            82: (packets.BACKEND[version], DSR),
            84: (packets.SILENT[version], 0),
        }
        for protocol in ("TCP", "UDP"):
            for port, (address, flags) in targets.items():
                balancer.service(
                    packets.SERVICE[version],
                    balancer.backend(address, flags=flags),
                    port=port,
                    protocol=protocol,
                )
            balancer.service(packets.SERVICE[version], port=83, protocol=protocol)
    return balancer


def _check_answer(data: bytes, frame: bytes) -> None:
    """A whole packet, from whom the frame was for to whom it was from, as scapy would make it."""
    first, second = ((26, 30), (30, 34)) if frame[12:14] == b"\x08\0" else ((22, 38), (38, 54))
    assert data[:6] == frame[6:12]
    assert data[6:12] == frame[:6]
    assert data[slice(*first)] == frame[slice(*second)]
    assert data[slice(*second)] == frame[slice(*first)]
    assert len(data) <= len(frame) + 48
    version = 4 if frame[12:14] == b"\x08\0" else 6
    start = 34 if version == 4 else 54
    if data[23 if version == 4 else 20] == packets.TCP_NUMBER:
        layer4: Packet = TCP(data[start:])
        layer4.chksum = None
    else:
        error = ICMP(type=3, code=3) if version == 4 else ICMPv6DestUnreach(code=4)
        layer4 = error / Raw(data[start + 8 :])
    layer3 = (IP if version == 4 else IPv6)(data[14:start])
    if version == 4:
        layer3.chksum = None
    packet = Ether(data[:14]) / layer3 / layer4
    assert bytes(packet) == data


@given(frame=ANYTHING)
@example(frame=tcp(to_service(4, destination_port=83)))
@example(frame=udp(to_service(4, destination_port=83)))
@example(frame=udp(to_service(6, destination_port=83), b"odd"))
@example(frame=bytes(14))
@example(frame=bytes(12) + b"\x08\0" + b"\x45")
@example(frame=bytes(12) + b"\x86\xdd" + b"\x60" + bytes(39))
@BOUNDED
def test_balance(served: Balancer, frame: bytes) -> None:
    outcome = served.balance(frame)
    assert outcome.verdict != "ABORTED"
    if outcome.answered:
        _check_answer(outcome.data, frame)
        return
    assert len(outcome.data) == len(frame)
    if outcome.verdict == "DROP" or not outcome.rewritten:
        assert outcome.data == frame
    else:
        # Only a service's packets are ever changed.
        version = 4 if frame[12:14] == b"\x08\0" else 6
        destination = frame[30:34] if version == 4 else frame[38:54]
        assert destination == ADDRESSES[version]


@given(frame=st.one_of(_not_ours, _mutated(_not_ours), _random))
@BOUNDED
def test_what_is_for_no_service_stays_as_it_is(served: Balancer, frame: bytes) -> None:
    outcome = served.balance(frame)
    if any(address in frame for address in ADDRESSES.values()):
        return
    assert outcome.verdict in ("PASS", "DROP")
    assert outcome.data == frame
    assert outcome.reason in ("", "malformed_ipv4", "malformed_ipv6")


@given(frame=ANYTHING)
@BOUNDED
def test_reply(served: Balancer, frame: bytes) -> None:
    # The kernel makes no socket buffer of less than an IP header.
    assume(len(frame) >= {b"\x08\0": 34, b"\x86\xdd": 54}.get(frame[12:14], 14))
    data, counted = served.reply(frame)
    assert len(data) == len(frame)
    if not counted:
        assert data == frame


def _answers() -> Iterator[bytes]:
    for version in (4, 6):
        for shape in (tcp, udp):
            yield shape(Ends(packets.POD[version], packets.CLIENT[version], 8080, 40000))


@pytest.fixture
def opened(served: Balancer) -> Balancer:
    """With a connection to each backend of the node."""
    shapes: tuple[Callable[[Ends], bytes], ...] = (tcp, udp)
    for version in (4, 6):
        for shape in shapes:
            served.balance(shape(to_service(version, destination_port=81)))
    return served


@given(frame=_mutated(st.sampled_from(list(_answers()))))
@BOUNDED
def test_reply_to_mutated_answers(opened: Balancer, frame: bytes) -> None:
    data, counted = opened.reply(frame)
    assert len(data) == len(frame)
    assert (data != frame) == bool(counted)
