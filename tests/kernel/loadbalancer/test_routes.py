"""Where packets leave: the kernel's routes and neighbours, what is refused for want of them, and contradictory tables."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hookline import bpf, net
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.conftest import MakeBalancer
from tests.kernel.loadbalancer.packets import Ends, tcp, to_service
from tests.kernel.loadbalancer.scene import DSR, UNSPEC, Balancer, Scene, packed

EACH_FAMILY = pytest.mark.parametrize("version", [4, 6])
HOOK = 0x486F6F6B
AF = {4: socket.AF_INET, 6: socket.AF_INET6}


def _handover(interface: str, version: int, address: str) -> bytes:
    """``struct handover``."""
    hop = packed(address)[12:] if version == 4 else packed(address)
    numbers = [HOOK, socket.if_nametoindex(interface), int(AF[version])]
    return b"".join(number.to_bytes(4, "little") for number in numbers) + hop.ljust(16, b"\0")


@EACH_FAMILY
@pytest.mark.parametrize("flags", [0, DSR])
def test_without_a_neighbour_resolve_is_told_where_to(balancer: Balancer, version: int, flags: int) -> None:
    row = balancer.backend(packets.SILENT[version], flags=flags)
    balancer.service(packets.SERVICE[version], row)
    outcome = balancer.balance(tcp(to_service(version)))
    assert (outcome.verdict, outcome.handed) == ("PASS", 1)
    assert outcome.metadata == _handover("uplink", version, packets.SILENT[version])
    # The packet is complete but for its layer-2 addresses.
    sent = outcome.ends
    assert sent.ttl == 63
    assert outcome.data == tcp(sent)
    assert sent.destination == (packets.SERVICE if flags else packets.SILENT)[version]


def test_an_ipv4_route_through_an_ipv6_neighbour(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend("10.0.4.2"))
    outcome = balancer.balance(tcp(to_service(4)))
    assert outcome.metadata == _handover("uplink", 6, "2001:db8::78")


@EACH_FAMILY
def test_metadata_that_leaves_no_room(balancer: Balancer, version: int) -> None:
    """Somebody else's program filled it: the packet is dropped, and counted, rather than sent astray."""
    balancer.service(packets.SERVICE[version], balancer.backend(packets.SILENT[version]))
    packet = tcp(to_service(version))
    try:
        outcome = balancer.balance(packet, metadata=bytes(200))
    except bpf.BpfError:
        outcome = balancer.balance(packet, metadata=bytes(32))  # Linux 6.1 has no more
    assert (outcome.verdict, outcome.reason, outcome.handed) == ("DROP", "no_metadata", 0)


@EACH_FAMILY
def test_without_a_route(balancer: Balancer, version: int) -> None:
    balancer.service(packets.SERVICE[version], balancer.backend(packets.NOWHERE[version]))
    assert str(balancer.balance(tcp(to_service(version)))) == "DROP `no_route`"


@pytest.fixture
def no_forwarding(scene: Scene, inside_node: None) -> Iterator[None]:
    names = ["ipv4/conf/uplink/forwarding", "ipv6/conf/uplink/forwarding"]
    net.write_sysctls(dict.fromkeys(names, 0))
    yield
    net.write_sysctls(dict.fromkeys(names, 1))


@EACH_FAMILY
def test_forwarding_switched_off(no_forwarding: None, balancer: Balancer, version: int) -> None:
    balancer.service(packets.SERVICE[version], balancer.backend(packets.BACKEND[version]))
    assert str(balancer.balance(tcp(to_service(version)))) == "DROP `forwarding_disabled`"


@EACH_FAMILY
def test_the_mtu_of_the_way_out(balancer: Balancer, version: int) -> None:
    balancer.service(
        packets.SERVICE[version], balancer.backend(packets.NARROW[version], source=packets.NODE[version])
    )
    header = 40 if version == 4 else 60
    assert balancer.balance(tcp(to_service(version), "A", bytes(1280 - header))).verdict == "REDIRECT"
    outcome = balancer.balance(tcp(to_service(version), "A", bytes(1281 - header)))
    assert str(outcome) == "DROP `too_big`"


@EACH_FAMILY
def test_the_mtu_is_not_checked_where_xdp_is_generic(make_balancer: MakeBalancer, version: int) -> None:
    balancer = make_balancer({"check_mtu": 0})
    balancer.service(
        packets.SERVICE[version], balancer.backend(packets.NARROW[version], source=packets.NODE[version])
    )
    assert balancer.balance(tcp(to_service(version), "A", bytes(1300))).verdict == "REDIRECT"


@EACH_FAMILY
def test_by_redirect_also_where_it_came_from(make_balancer: MakeBalancer, version: int) -> None:
    """As on a veth, whose XDP_TX wakes only a peer with an XDP program."""
    balancer = make_balancer({"tx_by_redirect": 1})
    balancer.service(packets.SERVICE[version], balancer.backend(packets.BACKEND[version]))
    assert str(balancer.balance(tcp(to_service(version)))) == "REDIRECT, rewritten"


@EACH_FAMILY
@pytest.mark.parametrize("ttl", [0, 1])
def test_a_packet_at_the_end_of_its_life_is_as_it_came(balancer: Balancer, version: int, ttl: int) -> None:
    balancer.service(packets.SERVICE[version], balancer.backend(packets.BACKEND[version]))
    assert str(balancer.balance(tcp(to_service(version, ttl=ttl)))) == "PASS"


def test_ttl_2_is_enough(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    outcome = balancer.balance(tcp(to_service(4, ttl=2)))
    assert outcome.data == tcp(outcome.ends)
    assert outcome.ends.ttl == 1


# Tables that contradict each other


def test_a_table_beyond_the_map(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    members = {"id": 1, "table_page": 1 << 20, "table_size": 1}
    balancer.set_service(packets.SERVICE[4], 80, "TCP", members)
    assert str(balancer.balance(tcp(to_service(4)))) == "ABORTED `internal`"


def test_a_slot_that_names_nobody(balancer: Balancer) -> None:
    for row in (0, balancer.backend(packets.BACKEND[4]) + 1, 1 << 20):
        balancer.service(packets.SERVICE[4], row)
        assert str(balancer.balance(tcp(to_service(4)))) == "ABORTED `internal`"


def test_a_service_without_counters(balancer: Balancer) -> None:
    balancer.set_service(packets.SERVICE[4], 80, "TCP", {"id": 1 << 20})
    assert str(balancer.balance(tcp(to_service(4)))) == "ABORTED `internal`"


def test_resolve_leaves_other_packets_alone(balancer: Balancer) -> None:
    result = balancer.obj.programs["resolve"].test_run(tcp(Ends("10.0.0.9", "10.0.0.1")), ingress="uplink")
    assert result.verdict == UNSPEC
