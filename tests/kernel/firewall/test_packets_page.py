"""``docs/firewall.md`` says what becomes of which packet; every row of its tables is run here, over both families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6MLQuery, ICMPv6ND_NS, ICMPv6NIQueryNOOP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.kernel.firewall.scene import FAR, NODE, OTHER, PEER, POD, Gate, allow, from_pod, to_pod, turned
from tests.kernel.firewall.shapes import echo, error, fragments, frame, of_protocol, sctp
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import Ends, changed, fragment4, options, tcp, udp, with_extensions
from tests.kernel.loadbalancer.packets import fragment as fragment6

PAGE = Path(__file__).resolve().parents[3] / "docs" / "firewall.md"
ROW = re.compile(r"^\| (?P<packet>[^|]+) \| (?P<rest>.+) \|$", re.MULTILINE)

Outcomes = Iterator[str]
Run = Callable[[Gate, int, bool], Outcomes]
"""Runs the row's packets; ``isolated`` says whether the pod is."""


def isolate(gate: Gate, isolated: bool) -> None:
    if isolated:
        gate.rules(ingress=[], egress=[])


def both(make: Callable[[Ends], bytes | None], targets: dict[int, str] = FAR) -> Run:
    """A packet in either direction."""

    def run(gate: Gate, version: int, isolated: bool) -> Outcomes:
        isolate(gate, isolated)
        there = from_pod(version, target=targets)
        for ends, way in ((there, gate.out), (turned(there), gate.come)):
            packet = make(ends)
            if packet is not None:
                yield str(way(packet))
                gate.firewall.maps["tracked"].clear()

    return run


def several(*runs: Run) -> Run:
    """One row, more than one packet."""

    def run(gate: Gate, version: int, isolated: bool) -> Outcomes:
        for one in runs:
            yield from one(gate, version, isolated)

    return run


def _icmp(ends: Ends) -> bytes:
    if ends.version == 4:
        return frame(ends, ICMP(type=13))
    return frame(ends, ICMPv6NIQueryNOOP(type=139))


def _rule(gate: Gate, version: int, isolated: bool) -> Outcomes:
    if not isolated:
        yield "—"
        return
    gate.rules(ingress=[allow(16, 6, 80)], egress=[allow(16, 17, 80)])
    yield str(gate.come(tcp(to_pod(version))))
    yield str(gate.out(udp(from_pod(version))))


def _established(gate: Gate, version: int, isolated: bool) -> Outcomes:
    if isolated:
        gate.rules(ingress=[allow(16, 6, 80)], egress=[])
    gate.come(tcp(to_pod(version)))
    yield str(gate.out(tcp(turned(to_pod(version)), "SA")))
    yield str(gate.come(tcp(to_pod(version), "A")))


def _related(gate: Gate, version: int, isolated: bool) -> Outcomes:
    if isolated:
        gate.rules(ingress=[allow(16, 6, 80)], egress=[])
    gate.come(tcp(to_pod(version)))
    yield str(gate.out(error(turned(to_pod(version)), tcp(to_pod(version)))))
    yield str(gate.come(error(Ends(OTHER[version], POD[version]), tcp(turned(to_pod(version)), "SA"))))


def _with_options(ends: Ends) -> bytes:
    if ends.version == 4:
        return packets.tcp4_with_options(ends)
    return with_extensions([options(0), *[options(60)] * 5])(ends)


def _seven(ends: Ends) -> bytes | None:
    return with_extensions([options(60)] * 7)(ends) if ends.version == 6 else None


def _later(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    there = from_pod(version, 53)
    for ends, way in ((there, gate.out), (turned(there), gate.come)):
        first, later = fragments(ends)
        way(first)
        yield str(way(later))
        for name in ("tracked", "fragments"):
            gate.firewall.maps[name].clear()


def _tiny(ends: Ends) -> bytes:
    return fragment4(ends, 1, shape=tcp) if ends.version == 4 else with_extensions([fragment6(1)], tcp)(ends)


def _wrong_headers(ends: Ends) -> list[bytes]:
    whole = tcp(ends)
    if ends.version == 6:
        cut = changed(with_extensions([options(0)])(ends)[:60], 18, b"\0\x06")
        return [changed(whole, 14, b"\x55"), changed(whole, 18, b"\x01\0"), cut]
    return [
        changed(whole, 14, b"\x55"),
        changed(whole, 14, b"\x44"),
        changed(whole, 16, b"\0\x13"),
        changed(whole, 16, b"\x01\0"),
    ]


def _cut_ports(ends: Ends) -> list[bytes]:
    made = []
    for whole, octets in (
        (tcp(ends), 13),
        (udp(ends), 7),
        (sctp(ends, 1), 11),
        (echo(ends), 7),
        (of_protocol(ends, 136), 7),
        (of_protocol(ends, 33), 7),
    ):
        start = 34 if ends.version == 4 else 54
        place, total = (16, 20 + octets) if ends.version == 4 else (18, octets)
        made.append(changed(whole[: start + octets], place, total.to_bytes(2, "big")))
    return made


def _each(make: Callable[[Ends], list[bytes]]) -> Run:
    def run(gate: Gate, version: int, isolated: bool) -> Outcomes:
        isolate(gate, isolated)
        there = from_pod(version)
        for ends, way in ((there, gate.out), (turned(there), gate.come)):
            for packet in make(ends):
                yield str(way(packet))

    return run


def _arp(ends: Ends) -> bytes | None:
    return packets.arp() if ends.version == 4 else None


def _link(gate: Gate, version: int, isolated: bool) -> Outcomes:
    if version == 4:
        return
    isolate(gate, isolated)
    group = "ff02::1:ff00:1"
    for source, target in ((POD[6], group), ("::", group), ("fe80::2", "fe80::1"), (POD[6], "fe80::1")):
        yield str(gate.out(frame(Ends(source, target, ttl=255), ICMPv6ND_NS(tgt="fe80::1"))))
    yield str(gate.come(frame(Ends("fe80::1", POD[6], ttl=255), ICMPv6ND_NS(tgt=POD[6]))))
    yield str(gate.come(frame(Ends("fe80::1", "ff02::1", ttl=1), ICMPv6MLQuery())))


def _routed_discovery(ends: Ends) -> bytes | None:
    if ends.version == 4:
        return None
    return frame(replace(ends, ttl=255), ICMPv6ND_NS(tgt="fe80::1"))


def _far_discovery(gate: Gate, version: int, isolated: bool) -> Outcomes:
    """Of the link by its addresses, and passed on by a router by its hop limit."""
    if version == 4:
        return
    isolate(gate, isolated)
    yield str(gate.out(frame(Ends(POD[6], "fe80::1", ttl=64), ICMPv6ND_NS(tgt="fe80::1"))))
    yield str(gate.come(frame(Ends("fe80::1", POD[6], ttl=254), ICMPv6ND_NS(tgt=POD[6]))))
    yield str(gate.come(frame(Ends("fe80::1", POD[6], ttl=2), ICMPv6MLQuery())))


def _foreign(ends: Ends) -> bytes:
    return bytes(Ether(src=ends.mac_source, dst=ends.mac_destination, type=0x88CC) / Raw(bytes(50)))


def _node(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    yield str(gate.out(tcp(from_pod(version, target=NODE))))
    gate.firewall.maps["tracked"].clear()
    if isolated:
        yield str(gate.come(tcp(to_pod(version, source=OTHER)), by_node=True))
        # And its answer, whatever the address was.
        assert str(gate.out(tcp(turned(to_pod(version, source=OTHER)), "SA"))) == "PASS `established`"


def _itself(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    packet = tcp(Ends(POD[version], POD[version]))
    yield str(gate.out(packet))
    yield str(gate.run("to_pod", packet, gate.pod, gate.pod))
    # And its answer, which the two meet in turn.
    answer = tcp(turned(Ends(POD[version], POD[version])), "SA")
    assert str(gate.out(answer)) == "PASS `established`"
    assert str(gate.run("to_pod", answer, gate.pod, gate.pod)) == "PASS `established`"


def _from_elsewhere(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    for source in (POD, PEER, NODE):
        ends = Ends(source[version], POD[version])
        for packet in (udp(ends), tcp(ends), echo(ends), error(ends, udp(turned(ends)))):
            yield str(gate.come(packet))
    yield str(gate.come(udp(Ends(NODE[version], POD[version])), by_peer=True))


def _mapped(gate: Gate, version: int, isolated: bool) -> Outcomes:
    """Where the address itself would be let through."""
    if version == 4:
        return
    if isolated:
        gate.rules(ingress=[allow(16)], egress=[allow(16)])
    far, pod = f"::ffff:{FAR[4]}", f"::ffff:{POD[4]}"
    for ends in (Ends(far, POD[6]), Ends(FAR[6], pod), Ends(far, pod)):
        for make in (tcp, udp, echo, lambda one: sctp(one, 1), with_extensions([options(0)])):
            yield str(gate.come(make(ends)))
            yield str(gate.out(make(turned(ends))))


def _tagged(ends: Ends, kind: int = 0x8100) -> bytes:
    whole = tcp(ends)
    return whole[:12] + kind.to_bytes(2, "big") + b"\0\5" + whole[12:]


def _spoofed(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    for source in (PEER, OTHER, NODE):
        yield str(gate.out(udp(Ends(source[version], FAR[version]))))
    if version == 6:
        yield str(gate.out(udp(Ends("::", FAR[6]))))
        yield str(gate.out(with_extensions([options(60)] * 7)(Ends(PEER[6], FAR[6]))))
        yield str(gate.out(echo(Ends(PEER[6], FAR[6]))))
    else:
        yield str(gate.out(_icmp(Ends(PEER[4], FAR[4]))))


def _unknown(gate: Gate, version: int, isolated: bool) -> Outcomes:
    isolate(gate, isolated)
    there = from_pod(version)
    place = gate.uplink
    yield str(gate.run("from_pod", tcp(there), place, place))
    yield str(gate.run("to_pod", tcp(turned(there)), place, place))
    yield str(gate.run("from_pod", _foreign(there), place, place))


POD_CASES: dict[str, Run] = {
    "TCP, UDP or SCTP": several(both(tcp), both(udp), both(lambda e: sctp(e, 1))),
    "any other protocol": several(
        both(lambda e: of_protocol(e, 47)), both(lambda e: of_protocol(e, 58 if e.version == 4 else 1))
    ),
    "an ICMP or ICMPv6 echo": several(both(echo), both(lambda e: echo(e, reply=True))),
    "other ICMP": both(_icmp),
    "allowed by a rule": _rule,
    "of an allowed connection": _established,
    "an ICMP error about an allowed connection": _related,
    "an ICMP error about anything else": both(lambda e: error(e, udp(turned(e)))),
    "IPv4 options, or up to six extension headers": both(_with_options),
    "seven extension headers": both(_seven),
    "a first fragment": both(lambda e: fragments(e)[0]),
    "a later fragment, behind its first": _later,
    "a later fragment before its first": both(lambda e: fragments(e)[1]),
    "a TCP fragment at offset 1": both(_tiny),
    "IP header wrong, or longer than the frame": _each(_wrong_headers),
    "TCP, UDP, UDP-Lite, DCCP, SCTP or ICMP header cut short": _each(_cut_ports),
    "ARP": both(_arp),
    "neighbour discovery, multicast listeners": _link,
    "the same with another hop limit, or from one network to another": several(
        both(_routed_discovery), _far_discovery
    ),
    "neither IP nor ARP": both(_foreign),
    "between a pod and its own node": _node,
    "from the pod to itself": _itself,
    "an address of a local pod or of the node, from elsewhere": _from_elsewhere,
    "IPv6 with an address of IPv4 (`::ffff:a.b.c.d`)": _mapped,
    "a VLAN tag behind the first": several(both(_tagged), both(lambda e: _tagged(e, 0x88A8))),
    "an address of another, from the pod": _spoofed,
    "an interface without a row": _unknown,
}


def _ways(version: int) -> tuple[Ends, Ends]:
    """To the node, and from it."""
    return Ends(FAR[version], NODE[version]), Ends(NODE[version], FAR[version])


def _strangers(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[], egress=[])
    yield str(gate.wire_in(tcp(to_pod(version))))
    yield str(gate.wire_out(tcp(from_pod(version)), forwarded=True))
    yield str(gate.wire_in(packets.arp()))
    yield str(gate.wire_in(changed(tcp(_ways(version)[0]), 14, b"\x55")))
    yield str(gate.wire_out(_tagged(_ways(version)[1])))
    later = fragments(to_pod(version))[1]
    yield str(gate.wire_in(later))


def _no_host_policy(gate: Gate, version: int) -> Outcomes:
    there, back = _ways(version)
    yield str(gate.wire_in(tcp(there)))
    yield str(gate.wire_out(udp(back)))


def _host_rule(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(16, 6, 80)], egress=[allow(16, 17)])
    there, back = _ways(version)
    yield str(gate.wire_in(tcp(there)))
    yield str(gate.wire_out(udp(back)))


def _host_refused(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[], egress=[])
    there, back = _ways(version)
    yield str(gate.wire_in(tcp(there)))
    yield str(gate.wire_out(udp(back)))
    yield str(gate.wire_in(echo(there)))


def _host_default(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[], egress=[], default_allow=True)
    there, back = _ways(version)
    yield str(gate.wire_in(tcp(there)))
    yield str(gate.wire_out(udp(back)))


def _host_established(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(16, 6, 80)], egress=[])
    there, _ = _ways(version)
    gate.wire_in(tcp(there))
    yield str(gate.wire_out(tcp(turned(there), "SA")))
    # By whichever uplink it comes and goes.
    yield str(gate.run("from_wire", tcp(there, "A"), gate.peer, gate.peer))


def _in_its_name(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[], egress=[])
    _, back = _ways(version)
    yield str(gate.wire_out(udp(back), forwarded=True))
    assert str(gate.wire_in(udp(turned(back)))) == "PASS `established`"
    gate.rules(host=True, ingress=[], egress=[allow(17)])
    assert str(gate.wire_in(udp(turned(back)))) == "PASS `established`"


def _claims_node(gate: Gate, version: int) -> Outcomes:
    """Towards the node, through it, or to all."""
    gate.rules(host=True, ingress=[allow(0)], egress=[allow(0)])
    group = {4: "224.0.0.251", 6: "ff02::fb"}
    for target in (NODE, FAR, POD, group):
        ends = Ends(NODE[version], target[version])
        for packet in (udp(ends), tcp(ends), echo(ends)):
            yield str(gate.wire_in(packet))


def _groups(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(16, 6)], egress=[])
    for target in ("224.0.0.1", "239.1.2.3", "255.255.255.255") if version == 4 else ("ff02::1", "ff05::2"):
        ends = Ends(FAR[version], target, 5353, 5353)
        for packet in (udp(ends), echo(ends), fragments(ends)[1]):
            # Its later fragments have no ports.
            yield str(gate.wire_in(packet)).replace("unknown_fragment", "no_rule")
    gate.rules(host=True, ingress=[allow(16, 17, 5353)], egress=[])
    assert str(gate.wire_in(udp(ends))) == "PASS `rule`"


def _host_broken(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(0)], egress=[allow(0)])
    there, back = _ways(version)
    for packet in _cut_ports(there):
        yield str(gate.wire_in(packet))
    for packet in _cut_ports(back):
        yield str(gate.wire_out(packet))


def _host_mapped(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(0)], egress=[allow(0)])
    far, node = f"::ffff:{FAR[4]}", f"::ffff:{NODE[4]}"
    for ends in (Ends(far, node), Ends(far, NODE[6]), Ends(FAR[6], node)):
        for packet in (tcp(ends), echo(ends)):
            yield str(gate.wire_in(packet))


def _host_tagged(gate: Gate, version: int) -> Outcomes:
    gate.rules(host=True, ingress=[allow(0)], egress=[allow(0)])
    for kind in (0x8100, 0x88A8):
        yield str(gate.wire_in(_tagged(_ways(version)[0], kind)))


HOST_CASES: dict[str, Callable[[Gate, int], Outcomes]] = {
    "for or from another address": _strangers,
    "no HostPolicy": _no_host_policy,
    "allowed by a rule": _host_rule,
    "no rule": _host_refused,
    "no rule, and `defaultVerdict` is allow": _host_default,
    "of an allowed connection": _host_established,
    "forwarded in the node's name": _in_its_name,
    "from the wire with one of the node's own addresses": _claims_node,
    "to a multicast group, or to all": _groups,
    "TCP, UDP, UDP-Lite, DCCP, SCTP or ICMP header cut short": _host_broken,
    "IPv6 with an address of IPv4 (`::ffff:a.b.c.d`)": _host_mapped,
    "from the wire, a VLAN tag behind the first": _host_tagged,
}


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the first table behind a heading."""
    section = PAGE.read_text().partition(f"\n{heading}\n")[2].partition("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return {first: rest for first, *rest in rows[2:]}


ONE_FAMILY = {
    (4, "IPv6 with an address of IPv4 (`::ffff:a.b.c.d`)"),
    (6, "ARP"),
    (4, "seven extension headers"),
    (4, "neighbour discovery, multicast listeners"),
    (4, "the same with another hop limit, or from one network to another"),
}
"""Of the other family there is no such packet."""

POD_TABLE, HOST_TABLE = table("### From and to a pod"), table("### From and to the node itself")


def test_every_row_is_run() -> None:
    assert set(POD_TABLE) == set(POD_CASES)
    assert set(HOST_TABLE) == set(HOST_CASES)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", POD_CASES)
def test_a_pod_s_packets(gate: Gate, name: str, version: int, isolated: bool) -> None:
    said = POD_TABLE[name][isolated]
    verdict, *reasons = said.split(" ", 1)
    allowed = {f"{verdict} {reason}" for reason in (reasons[0].split(", ") if reasons else [])} or {said}
    if name == "IP header wrong, or longer than the frame":
        allowed = {f"DROP `malformed_ipv{version}`"}
    found = set(POD_CASES[name](gate, version, isolated))
    assert found <= allowed
    assert found or (version, name) in ONE_FAMILY


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", HOST_CASES)
def test_the_node_s_packets(gate: Gate, name: str, version: int) -> None:
    found = set(HOST_CASES[name](gate, version))
    assert found == {HOST_TABLE[name][0]}
