"""``docs/packets.md`` says what becomes of which packet; every row of its tables is run here, over both families."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import (
    Ends,
    authentication,
    changed,
    fragment,
    options,
    tcp,
    to_service,
    udp,
    with_extensions,
)
from tests.kernel.loadbalancer.scene import DSR, LOCAL, Balancer

PAGE = Path(__file__).resolve().parents[3] / "docs" / "packets.md"
ROW = re.compile(r"^\| (?P<packet>[^|]+) \| (?P<four>[^|]+) \| (?P<six>[^|]+) \|", re.MULTILINE)

Run = Callable[[Balancer, int], str]


def _service(
    lb: Balancer, version: int, *, target: str = "", flags: int = 0, protocol: str = "TCP", own: bool = False
) -> None:
    rows = [lb.backend(target, flags=flags)] if target else []
    lb.service(packets.SERVICE[version], *rows, protocol=protocol, own=own)


def _for_nobody(frame: Callable[[int], bytes | None]) -> Run:
    """A packet with a service on the node that it is not for."""

    def run(lb: Balancer, version: int) -> str:
        _service(lb, version, target=packets.BACKEND[version])
        data = frame(version)
        return "—" if data is None else str(lb.balance(data))

    return run


def _for_service(
    frame: Callable[[int], bytes | None], target: dict[int, str] | None = None, flags: int = 0
) -> Run:
    """A packet for a service whose backend is ``target``."""

    def run(lb: Balancer, version: int) -> str:
        _service(lb, version, target=(target or packets.BACKEND)[version], flags=flags)
        data = frame(version)
        return "—" if data is None else str(lb.balance(data))

    return run


def _alone(frame: Callable[[int], bytes | None], *, own: bool = False, protocol: str = "TCP") -> Run:
    """A packet for a service without backends."""

    def run(lb: Balancer, version: int) -> str:
        _service(lb, version, own=own, protocol=protocol)
        data = frame(version)
        return "—" if data is None else str(lb.balance(data))

    return run


def _reply(lb: Balancer, version: int) -> str:
    _service(lb, version, target=packets.BACKEND[version])
    sent = lb.balance(tcp(to_service(version))).ends
    return str(lb.balance(tcp(turned(sent), "SA")))


def _fragmented_reply(lb: Balancer, version: int) -> str:
    _service(lb, version, target=packets.BACKEND[version], protocol="UDP")
    sent = lb.balance(udp(to_service(version))).ends
    shape = packets.fragment4 if version == 4 else with_extensions([fragment(8)], udp)
    return str(lb.balance(shape(turned(sent))))


def turned(ends: Ends) -> Ends:
    """The other direction, as the node receives it."""
    return Ends(
        ends.destination,
        ends.source,
        ends.destination_port,
        ends.source_port,
        mac_source=packets.BACKEND_MAC,
        mac_destination=packets.UPLINK_MAC,
    )


def _contradiction(lb: Balancer, version: int) -> str:
    _service(lb, version, target=packets.BACKEND[version])
    lb.retire(1)
    return str(lb.balance(tcp(to_service(version))))


def _cut(version: int, octets: int) -> bytes:
    return tcp(to_service(version))[:octets]


def _other(version: int, shape: packets.Shape = tcp) -> bytes:
    return shape(Ends(packets.CLIENT[version], packets.ELSEWHERE[version]))


def _six(frame: bytes) -> Callable[[int], bytes | None]:
    return lambda version: frame if version == 6 else None


def _four(frame: bytes) -> Callable[[int], bytes | None]:
    return lambda version: frame if version == 4 else None


_S4, _S6 = tcp(to_service(4)), tcp(to_service(6))
_LONG = with_extensions([options(60, 28)])  # 224 octets
CASES: dict[str, Run] = {
    "not IP (ARP)": _for_nobody(_four(packets.arp())),
    "nothing behind the Ethernet header": _for_nobody(_four(packets.arp()[:14])),
    "with a VLAN tag, even for a service": _for_nobody(lambda v: packets.tagged(to_service(v))),
    "TCP for another address": _for_nobody(_other),
    "UDP for another address": _for_nobody(lambda v: _other(v, udp)),
    "ICMP for another address": _for_nobody(lambda v: _other(v, packets.icmp)),
    "a fragment for another address": _for_nobody(
        lambda v: _other(v, packets.fragment4 if v == 4 else with_extensions([fragment(8)], udp))
    ),
    "a broken TCP header for another address": _for_nobody(
        lambda v: _other(v, lambda ends: tcp(ends, dataofs=4))
    ),
    "more extension headers than are followed, for another address": _for_nobody(
        lambda v: None if v == 4 else _other(v, _LONG)
    ),
    "IP header cut short": _for_nobody(lambda v: _cut(v, 30)),
    "wrong IP version": _for_nobody(lambda v: changed(tcp(to_service(v)), 14, b"\x55")),
    "IPv4 header length below 20": _for_nobody(_four(changed(_S4, 14, b"\x44"))),
    "IPv4 total length below its header's": _for_nobody(_four(changed(_S4, 16, b"\0\x13"))),
    "longer than the frame, as it says itself": _for_nobody(
        lambda v: changed(_S4, 16, b"\x01\0") if v == 4 else changed(_S6, 18, b"\x01\0")
    ),
    "extension header cut short": _for_nobody(
        _six(changed(with_extensions([options(0)])(to_service(6))[:60], 18, b"\0\x06"))
    ),
    "TCP or UDP header cut short": _for_service(
        lambda v: (
            packets.repaired4(changed(_S4[:46], 16, b"\0\x20"))
            if v == 4
            else changed(_S6[:66], 18, b"\0\x0c")
        )
    ),
    "TCP data offset below 5": _for_service(lambda v: tcp(to_service(v), dataofs=4)),
    "TCP data offset beyond the packet": _for_service(lambda v: tcp(to_service(v), dataofs=15)),
    "UDP length below 8": _for_service(lambda v: udp(to_service(v), len=7)),
    "UDP length beyond the packet": _for_service(lambda v: udp(to_service(v), len=100)),
    "ICMP": _for_service(lambda v: packets.icmp(to_service(v))),
    "the first fragment": _for_service(
        lambda v: (
            packets.fragment4(to_service(4), 0, more=True)
            if v == 4
            else with_extensions([fragment(more=True)], udp)(to_service(6))
        )
    ),
    "a later fragment": _for_service(
        lambda v: (
            packets.fragment4(to_service(4), 8)
            if v == 4
            else with_extensions([fragment(8)], udp)(to_service(6))
        )
    ),
    "an atomic fragment": _for_service(_six(with_extensions([fragment()])(to_service(6)))),
    "up to six extension headers, 255 octets": _for_service(
        _six(with_extensions([options(0), authentication(), *[options(60)] * 4])(to_service(6)))
    ),
    "seven extension headers": _for_service(_six(with_extensions([options(60)] * 7)(to_service(6)))),
    "extension headers of more than 255 octets": _for_service(_six(_LONG(to_service(6)))),
    "IPv4 options": _for_service(_four(packets.tcp4_with_options(to_service(4)))),
    "a port that no service has": _for_service(lambda v: tcp(to_service(v, destination_port=81))),
    "the same, where the address is the node's own": _alone(
        lambda v: tcp(to_service(v, destination_port=22)), own=True
    ),
    "ICMP, where the address is the node's own": _alone(lambda v: packets.icmp(to_service(v)), own=True),
    "a service without backends, TCP": _alone(lambda v: tcp(to_service(v))),
    "a service without backends, UDP": _alone(lambda v: udp(to_service(v)), protocol="UDP"),
    "a backend of this node": _for_service(lambda v: tcp(to_service(v)), packets.POD, flags=LOCAL),
    "a backend behind the link it came by": _for_service(lambda v: tcp(to_service(v))),
    "a backend behind another link": _for_service(lambda v: tcp(to_service(v)), packets.SERVER),
    "the same with `dsr`": _for_service(lambda v: tcp(to_service(v)), flags=DSR),
    "a backend whose layer-2 address is not known yet": _for_service(
        lambda v: tcp(to_service(v)), packets.SILENT
    ),
    "a backend beyond the node, TTL or hop limit 1": _for_service(lambda v: tcp(to_service(v, ttl=1))),
    "a backend beyond the node, TTL or hop limit 0": _for_service(lambda v: tcp(to_service(v, ttl=0))),
    "a backend of this node, TTL or hop limit 1": _for_service(
        lambda v: tcp(to_service(v, ttl=1)), packets.POD, flags=LOCAL
    ),
    "a backend without a route": _for_service(lambda v: tcp(to_service(v)), packets.NOWHERE),
    "larger than the MTU towards the backend": _for_service(
        lambda v: tcp(to_service(v), "A", bytes(1300)), packets.NARROW
    ),
    "a reply of a backend beyond the node": _reply,
    "a fragment of such a reply": _fragmented_reply,
    "a service whose backend's row is not in use": _contradiction,
    "a reset": _alone(lambda v: tcp(to_service(v), "R")),
    "sent to a layer-2 group": _alone(lambda v: tcp(to_service(v, mac_destination="ff:ff:ff:ff:ff:ff"))),
    "from a group or broadcast address": _alone(
        lambda v: tcp(Ends({4: "255.255.255.255", 6: "ff02::1"}[v], packets.SERVICE[v]))
    ),
    "from an address that is no host's": _alone(
        lambda v: tcp(Ends({4: "127.0.0.1", 6: "::"}[v], packets.SERVICE[v]))
    ),
    "from the service's own address": _alone(lambda v: tcp(Ends(packets.SERVICE[v], packets.SERVICE[v]))),
    "a fragment": _alone(
        lambda v: (packets.fragment4 if v == 4 else with_extensions([fragment(8)], udp))(to_service(v)),
        protocol="UDP",
    ),
}


def _rows() -> dict[str, tuple[str, str]]:
    # What follows is of backends: test_connections.py and test_affinity.py have its rows.
    rows = ROW.finditer(PAGE.read_text().partition("## Backends that come and go")[0])
    return {
        match["packet"].strip(): (match["four"].strip(), match["six"].strip())
        for match in rows
        if match["packet"].strip() not in ("packet", "packet for a service without backends", "---")
        and not match["packet"].startswith("--")
    }


def test_the_page_has_every_packet() -> None:
    assert list(_rows()) == list(CASES)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", CASES)
def test_packet(balancer: Balancer, name: str, version: int) -> None:
    assert _rows()[name][version == 6] == CASES[name](balancer, version)
