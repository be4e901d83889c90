"""Rows: which of them decide, and how they get into the kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from hookline.datapath.firewall.firewall import Rows, Tunables, _wait_for_readers
from hookline.errors import HooklineError
from hookline.policy import PolicyRow
from tests.kernel.firewall.scene import (
    FAR,
    FAR_IDENTITY,
    OTHER,
    OTHER_IDENTITY,
    PEER,
    PEER_IDENTITY,
    SMALL,
    WORLD_IDENTITY,
    Gate,
    allow,
    context,
    from_pod,
    key,
    to_pod,
    turned,
)
from tests.kernel.firewall.shapes import echo, sctp
from tests.kernel.loadbalancer.packets import tcp, udp

VERSIONS = pytest.mark.parametrize("version", [4, 6])
STRANGER = {4: "198.51.100.7", 6: "2001:db8::7"}


def allowed(gate: Gate, packet: bytes, *, out: bool = False) -> bool:
    """Whether a new connection is."""
    gate.firewall.maps["tracked"].clear()
    by_peer = any(ip_address(one).packed in packet[14:54] for one in PEER.values())
    return (gate.out(packet) if out else gate.come(packet, by_peer=by_peer)).verdict == "PASS"


@VERSIONS
def test_identity_protocol_and_port_all_count(gate: Gate, version: int) -> None:
    gate.rules(
        ingress=[allow(FAR_IDENTITY, 6, 80), allow(OTHER_IDENTITY, 17), allow(PEER_IDENTITY)],
        egress=[allow(0, 17, 53), allow(WORLD_IDENTITY, 6, 443)],
    )
    for source, port, shape, expected in (
        (FAR, 80, tcp, True),
        (FAR, 81, tcp, False),
        (FAR, 80, udp, False),
        (OTHER, 80, tcp, False),
        (OTHER, 80, udp, True),
        (OTHER, 9, udp, True),
        (PEER, 9, tcp, True),
        (PEER, 9, udp, True),
        (STRANGER, 80, tcp, False),
    ):
        assert allowed(gate, shape(to_pod(version, port, source))) is expected, (source, port, shape)
    for target, port, shape, expected in (
        (FAR, 53, udp, True),
        (STRANGER, 53, udp, True),
        (STRANGER, 443, tcp, True),
        (FAR, 443, tcp, False),
        (STRANGER, 53, tcp, False),
    ):
        assert allowed(gate, shape(from_pod(version, port, target)), out=True) is expected


@VERSIONS
def test_one_direction_isolated_leaves_the_other(gate: Gate, version: int) -> None:
    gate.rules(ingress=[])
    assert not allowed(gate, tcp(to_pod(version)))
    assert allowed(gate, tcp(from_pod(version)), out=True)
    gate.rules(egress=[])
    assert allowed(gate, tcp(to_pod(version)))
    assert not allowed(gate, tcp(from_pod(version)), out=True)


@VERSIONS
def test_a_range_of_ports_is_prefixes(gate: Gate, version: int) -> None:
    """8000 to 8010: 8000/13, 8008/15, 8010/16."""
    gate.rules(
        ingress=[
            allow(FAR_IDENTITY, 6, 8000, 13),
            allow(FAR_IDENTITY, 6, 8008, 15),
            allow(FAR_IDENTITY, 6, 8010, 16),
            allow(FAR_IDENTITY, 132, 8000, 13),
        ]
    )
    for port in range(7995, 8016):
        assert allowed(gate, tcp(to_pod(version, port))) is (8000 <= port <= 8010), port
        assert not allowed(gate, udp(to_pod(version, port)))
    assert allowed(gate, sctp(to_pod(version, 8007), 1))
    assert not allowed(gate, sctp(to_pod(version, 8008), 1))


def test_all_ports_of_a_range_are_not_the_protocol(gate: Gate) -> None:
    """1 to 65535 has no port 0, so what has no ports is not in it."""
    gate.rules(ingress=[allow(FAR_IDENTITY, 1, 1 << 15, 1)])
    assert not allowed(gate, echo(to_pod(4)))


@VERSIONS
def test_the_longest_prefix_says_who_it_is(gate: Gate, version: int) -> None:
    inner = {4: "10.2.0.0", 6: "fd00:2::"}[version]
    bits = {4: 96 + 24, 6: 64}[version]
    rows = replace(
        gate.plain,
        identities={**gate.plain.identities, (key(inner), bits): (20, 0), (key(FAR[version]), 128): (21, 0)},
        endpoints={**gate.plain.endpoints, gate.pod: PolicyRow(ingress=11)},
        rules={(11, 20, 6, 80, 16): (1, True), (11, 21, 6, 81, 16): (2, True)},
    )
    gate.firewall.commit(rows)
    neighbour = {version: {4: "10.2.0.10", 6: "fd00:2::10"}[version]}
    beyond = {version: {4: "10.2.9.9", 6: "fd00:2:0:9::9"}[version]}
    assert allowed(gate, tcp(to_pod(version, 80, neighbour)))
    assert not allowed(gate, tcp(to_pod(version, 80, FAR)))
    assert allowed(gate, tcp(to_pod(version, 81, FAR)))
    assert not allowed(gate, tcp(to_pod(version, 80, beyond)))


def test_a_short_prefix_of_one_family_leaves_the_other(gate: Gate) -> None:
    """An IPv4 network is longer than 96 bits, and where everything of IPv6 has a row, so has everything of IPv4."""
    rows = replace(
        gate.plain,
        identities={
            **gate.plain.identities,
            (bytes(16), 0): (20, 0),
            (key("0.0.0.0"), 96): (1, 0),
            (key("192.0.2.0"), 96 + ip_network("192.0.2.0/24").prefixlen): (21, 0),
        },
        endpoints={**gate.plain.endpoints, gate.pod: PolicyRow(ingress=11)},
        rules={(11, 20, None, 0, 0): (1, True), (11, 21, None, 0, 0): (2, True)},
    )
    gate.firewall.commit(rows)
    assert allowed(gate, tcp(to_pod(6, 80, STRANGER)))
    assert not allowed(gate, tcp(to_pod(4, 80, STRANGER)))
    assert allowed(gate, tcp(to_pod(4, 80, {4: "192.0.2.9"})))


@VERSIONS
def test_a_verdict_of_a_row_counts(gate: Gate, version: int) -> None:
    gate.firewall.commit(
        replace(
            gate.plain,
            endpoints={**gate.plain.endpoints, gate.pod: PolicyRow(ingress=11)},
            rules={(11, FAR_IDENTITY, None, 0, 0): (1, True), (11, FAR_IDENTITY, 6, 22, 16): (2, False)},
        )
    )
    assert allowed(gate, tcp(to_pod(version, 80)))
    assert not allowed(gate, tcp(to_pod(version, 22)))


# Audited policies


@VERSIONS
def test_an_audited_policy_denies_nothing_and_says_so(gate: Gate, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY)], audit_ingress=[allow(FAR_IDENTITY, 6, 80)], audit_egress=[])
    assert str(gate.come(tcp(to_pod(version, 80)))) == "PASS `rule`"
    assert str(gate.come(tcp(to_pod(version, 81)))) == "PASS `audited`"
    assert str(gate.come(tcp(to_pod(version, 81, OTHER)))) == "DROP `no_rule`"
    assert str(gate.out(udp(from_pod(version, 53)))) == "PASS `audited`"
    assert str(gate.come(udp(turned(from_pod(version, 53))))) == "PASS `established`"


# Into the kernel


def _many(gate: Gate, count: int, first: int = 0) -> Rows:
    return replace(
        gate.plain,
        endpoints={gate.pod: PolicyRow(11, 12, 13, 14, True, False), 0: PolicyRow(21)},
        rules={
            **{(11, 16 + number, 6, 1000 + number, 16): (number, True) for number in range(first, count)},
            (12, 0, None, 0, 0): (1, True),
            (12, 1, 17, 0, 0): (2, False),
            (12, 1, 17, 1024, 6): (3, True),
        },
    )


def test_what_was_committed_is_read_back(gate: Gate) -> None:
    for rows in (_many(gate, 200), _many(gate, 100, 50), gate.plain, Rows(), _many(gate, 20)):
        generation = gate.firewall.commit(rows)
        assert gate.firewall.generation == generation
        assert gate.firewall.rows() == rows


def test_the_same_rows_are_no_new_generation(gate: Gate) -> None:
    rows = _many(gate, 10)
    first = gate.firewall.commit(rows)
    assert gate.firewall.commit(replace(rows)) == first
    assert gate.firewall.commit(gate.plain) == first + 1


def test_too_much_is_refused_with_the_number(gate: Gate) -> None:
    generation = gate.firewall.commit(gate.plain)
    with pytest.raises(HooklineError, match="1,003 rules do not fit") as refused:
        gate.firewall.commit(_many(gate, 1000))
    assert "256" in refused.value.why
    assert gate.firewall.generation == generation
    assert gate.firewall.rows() == gate.plain


def test_a_change_that_ended_half_way_is_finished_by_the_next(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is in the bank that nobody reads."""
    before = gate.firewall.commit(_many(gate, 50))
    kept = gate.firewall.rows()
    patch = gate.firewall._patch

    def interrupted(name: str, *rest: object) -> None:
        if name == "own_addresses":
            raise KeyboardInterrupt
        patch(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gate.firewall, "_patch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gate.firewall.commit(_many(gate, 100, 40))
    monkeypatch.undo()
    assert gate.firewall.generation == before
    assert gate.firewall.rows() == kept
    gate.firewall.commit(_many(gate, 60, 30))
    assert gate.firewall.rows() == _many(gate, 60, 30)


@VERSIONS
def test_every_packet_meets_one_generation_or_the_other(gate: Gate, version: int) -> None:
    """In each of them exactly one of two ports is allowed; the policy changes a hundred times meanwhile."""
    stop = threading.Event()
    rows = [
        replace(
            gate.plain,
            endpoints={**gate.plain.endpoints, gate.pod: PolicyRow(ingress=group)},
            identities={**gate.plain.identities, (key(FAR[version]), 128): (identity, 0)},
            rules={(group, identity, 6, port, 16): (1, True)},
        )
        for group, identity, port in ((11, 20, 80), (12, 21, 81))
    ]
    gate.firewall.commit(rows[0])
    failures: list[BaseException] = []

    def change() -> None:
        try:
            for number in range(100):
                gate.firewall.commit(rows[number & 1 ^ 1])
        except BaseException as error:
            failures.append(error)
        finally:
            stop.set()

    program, place = gate.firewall.programs["to_pod"], context(gate.pod, gate.uplink)
    packets = [tcp(to_pod(version, port), "S") for port in (80, 81)]
    changer = threading.Thread(target=change)
    changer.start()
    runs = 0
    try:
        while not stop.is_set():
            before = gate.firewall.generation
            verdicts = [program.test_run(packet, context=place).verdict for packet in packets]
            if gate.firewall.generation == before:
                runs += 1
                # Rows 0 are those of odd generations or of even ones, as it happened to begin.
                assert sorted(verdicts) == [2, 0xFFFFFFFF]
    finally:
        changer.join()
    assert not failures
    assert runs > 10


def test_waiting_for_readers_returns() -> None:
    _wait_for_readers()


def test_sizes_are_for_one_bank(make_gate: Callable[[Tunables], Gate]) -> None:
    gate = make_gate(SMALL)
    assert gate.firewall.capacity() == {
        "endpoints": 64,
        "identities": 64,
        "rules": 256,
        "own_addresses": 16,
        "rule_counts": 256,
    }
    full = replace(
        gate.plain,
        rules={(1, number, None, 0, 0): (1, True) for number in range(256)},
        endpoints={number: PolicyRow() for number in range(64)},
    )
    other = replace(full, rules={(2, number, None, 0, 0): (1, True) for number in range(256)})
    for rows in (full, other, full):
        gate.firewall.commit(rows)
        assert gate.firewall.rows() == rows
