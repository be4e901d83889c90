"""What is counted and told: verdicts in the ring, counters by rule, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hookline import bpf
from hookline.datapath.firewall.firewall import SIDES, VERDICTS, Tunables
from tests.kernel.firewall.scene import (
    FAR,
    FAR_IDENTITY,
    POD,
    SMALL,
    Gate,
    allow,
    context,
    from_pod,
    key,
    to_pod,
    turned,
)
from tests.kernel.loadbalancer.packets import tcp, udp

VERSIONS = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def ring(gate: Gate) -> Iterator[bpf.Ring]:
    with gate.firewall.verdicts() as opened:
        opened.read()
        yield opened


def told(gate: Gate, ring: bpf.Ring) -> list[tuple[str, str, str]]:
    """Direction, verdict and reason of each."""
    return [
        (SIDES[one["direction"]], VERDICTS[one["verdict"]], gate.firewall.reasons[one["reason"]])
        for one in ring.read()
    ]


@VERSIONS
def test_a_drop_is_told_with_all_that_decided(gate: Gate, ring: bpf.Ring, version: int) -> None:
    generation = gate.rules(ingress=[allow(FAR_IDENTITY, 6, 80)])
    packet = tcp(to_pod(version, 81), "S")
    gate.come(packet)
    (one,) = ring.read()
    assert one["local"]["words"].tobytes() == key(POD[version])
    assert one["remote"]["words"].tobytes() == key(FAR[version])
    assert (int(one["local_port"]), int(one["remote_port"])) == tuple(
        np.frombuffer(port.to_bytes(2, "big"), np.uint16)[0] for port in (81, 40000)
    )
    assert one["interface"] == gate.pod
    assert (one["protocol"], one["tcp_flags"], one["bytes"]) == (6, 2, len(packet))
    assert (one["generation"], one["identity"], one["rule"], one["host"]) == (generation, FAR_IDENTITY, 0, 0)
    assert (SIDES[one["direction"]], VERDICTS[one["verdict"]]) == ("ingress", "deny")
    assert gate.firewall.reasons[one["reason"]] == "no_rule"
    assert one["at_ns"] > 0


@VERSIONS
def test_cut_connections_and_audited_ones_are_told(gate: Gate, ring: bpf.Ring, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY)])
    gate.come(udp(to_pod(version)))
    gate.rules(ingress=[allow(FAR_IDENTITY)], audit_ingress=[])
    # One that exists is told of once, by its next packet.
    gate.come(udp(to_pod(version)))
    gate.come(udp(to_pod(version)))
    gate.rules(ingress=[], egress=[])
    gate.out(udp(turned(to_pod(version))))
    assert told(gate, ring) == [("ingress", "audit", "established"), ("egress", "deny", "cut")]


@VERSIONS
def test_new_connections_are_told_as_often_as_wanted(gate: Gate, ring: bpf.Ring, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY)])
    gate.come(udp(to_pod(version, 1)))
    assert told(gate, ring) == []
    gate.firewall.sample(1)
    for port in range(10):
        gate.come(udp(to_pod(version, 100 + port)))
        gate.come(udp(to_pod(version, 100 + port)))
    assert told(gate, ring) == [("ingress", "allow", "rule")] * 10
    gate.firewall.sample(4)
    for port in range(100):
        gate.come(udp(to_pod(version, 1000 + port)))
    # One in four of 100: none or more than 75 happens once in 10^12 runs.
    assert 0 < len(told(gate, ring)) <= 75


def test_rules_and_reasons_are_counted(gate: Gate) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY, 6), allow(FAR_IDENTITY, 17)], egress=[allow(0, 17, 53)])
    before = gate.firewall.totals()
    there = to_pod(4)
    packets = [tcp(there, "S"), tcp(there, "A", b"xyz")]
    for packet in packets:
        gate.come(packet)
    gate.out(tcp(turned(there), "SA"))
    gate.out(udp(from_pod(4, 53)))
    gate.out(udp(from_pod(4, 54)))
    after = gate.firewall.totals()

    def grown(number: int) -> tuple[int, int]:
        now, then = after.rules.get(number, (0, 0)), before.rules.get(number, (0, 0))
        return now[0] - then[0], now[1] - then[1]

    # Every packet of a connection counts for the rule that allowed it.
    assert grown(1) == (3, len(packets[0]) + len(packets[1]) + len(tcp(turned(there), "SA")))
    assert grown(2) == (0, 0)
    assert grown(3) == (1, len(udp(from_pod(4, 53))))
    assert {"no_rule", "cut", "spoofed_source"} <= after.drops
    assert not {"rule", "established", "audited"} & after.drops


def test_too_many_are_counted_and_not_told(make_gate: Callable[[Tunables], Gate]) -> None:
    gate = make_gate(SMALL)
    gate.rules(ingress=[])
    packet, place = udp(to_pod(4)), context(gate.pod, gate.uplink)
    with gate.firewall.verdicts() as ring:
        gate.firewall.programs["to_pod"].test_run(packet, context=place, repeat=300_000)
        records: Any = ring.read()
        totals = gate.firewall.totals()
        assert totals.reasons["ingress", "no_rule"][0] == 300_000
        assert len(records) + totals.suppressed + totals.lost == 300_000
        assert len(records) >= 1000
        assert totals.suppressed > 0


def test_what_finds_no_room_is_lost_and_counted(make_gate: Callable[[Tunables], Gate]) -> None:
    """The limit is a thousand at once and the ring holds ten times that: it is filled by waiting."""
    gate = make_gate(SMALL)
    gate.rules(ingress=[])
    packet, place = udp(to_pod(4)), context(gate.pod, gate.uplink)
    while not gate.firewall.totals().lost:
        limits = gate.firewall.maps["verdict_limits"]
        limits[0] = np.zeros_like(limits[0])
        gate.firewall.programs["to_pod"].test_run(packet, context=place, repeat=1000)
    with gate.firewall.verdicts() as ring:
        assert ring.lost == gate.firewall.totals().lost
        assert len(ring.read()) > 5000
