"""Session affinity in XDP: a client keeps its backend while it comes back in time and the backend takes new connections."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import Ends, tcp, udp
from tests.kernel.loadbalancer.scene import (
    LOCAL,
    STATE_ACTIVE,
    STATE_DOWN,
    STATE_DRAINING,
    STATE_STARTING,
    Balancer,
)

EACH_FAMILY = pytest.mark.parametrize("version", [4, 6])
EACH_PROTOCOL = pytest.mark.parametrize("protocol", ["TCP", "UDP"])
PORTS = range(40000, 40024)
LONG, SHORT = 1000, 2


def pods(lb: Balancer, version: int, count: int) -> dict[int, str]:
    """Backends of the node: address by row."""
    form = "10.0.3.{}" if version == 4 else "2001:db8:3::{}"
    addresses = [form.format(number + 1) for number in range(count)]
    return {lb.backend(address, flags=LOCAL): address for address in addresses}


def client(version: int, number: int = 9) -> str:
    return f"10.0.0.{number}" if version == 4 else f"2001:db8::{number}"


def chosen(
    lb: Balancer, version: int, protocol: str = "TCP", *, source: str = "", port: int = 40000, to: int = 80
) -> str:
    """The backend of a new connection."""
    shape: Callable[[Ends], bytes] = tcp if protocol == "TCP" else udp
    ends = Ends(source or client(version), packets.SERVICE[version], port, to)
    return lb.balance(shape(ends)).ends.destination


def all_chosen(lb: Balancer, version: int, protocol: str = "TCP", *, source: str = "") -> set[str]:
    return {chosen(lb, version, protocol, source=source, port=port) for port in PORTS}


@EACH_FAMILY
@EACH_PROTOCOL
def test_all_connections_of_a_client_go_to_one(balancer: Balancer, version: int, protocol: str) -> None:
    rows = pods(balancer, version, 8)
    balancer.service(packets.SERVICE[version], *rows, protocol=protocol, affinity_seconds=LONG)
    by_client = [
        all_chosen(balancer, version, protocol, source=client(version, number)) for number in range(10, 34)
    ]
    assert all(len(backends) == 1 for backends in by_client)
    assert len(set.union(*by_client)) > 1
    row = balancer.affinity(client(version, 10))
    assert {rows[int(row["backend"])]} == by_client[0]
    assert row["generation"] == balancer.maps["backends"][int(row["backend"])]["generation"]
    assert len(balancer.maps["affinity"]) == 24


@EACH_FAMILY
def test_without_affinity_connections_spread(balancer: Balancer, version: int) -> None:
    balancer.service(packets.SERVICE[version], *pods(balancer, version, 8))
    assert len(all_chosen(balancer, version)) > 1
    assert not len(balancer.maps["affinity"])


@EACH_FAMILY
def test_a_client_stays_where_it_is_when_the_table_changes(balancer: Balancer, version: int) -> None:
    rows = pods(balancer, version, 8)
    address = packets.SERVICE[version]
    balancer.service(address, *rows, affinity_seconds=LONG)
    (before,) = all_chosen(balancer, version)
    others = [row for row in rows if rows[row] != before]
    # A table without it: only the memory holds the client there.
    balancer.service(address, *others, affinity_seconds=LONG)
    assert chosen(balancer, version, port=41000) == before
    assert chosen(balancer, version, port=41001, source=client(version, 77)) != before


@EACH_FAMILY
@pytest.mark.parametrize("state", [STATE_DRAINING, STATE_DOWN])
def test_a_backend_that_takes_nothing_new_loses_its_clients(
    balancer: Balancer, version: int, state: int
) -> None:
    rows = pods(balancer, version, 8)
    address = packets.SERVICE[version]
    balancer.service(address, *rows, affinity_seconds=LONG)
    (before,) = all_chosen(balancer, version)
    (row,) = (row for row in rows if rows[row] == before)
    balancer.set_state(row, state)
    balancer.service(address, *(other for other in rows if other != row), affinity_seconds=LONG)
    after = {chosen(balancer, version, port=port) for port in range(41000, 41008)}
    assert len(after) == 1
    assert after != {before}
    # It is remembered there, so that the first one does not get it back when it recovers.
    balancer.set_state(row, STATE_ACTIVE)
    balancer.service(address, *rows, affinity_seconds=LONG)
    assert chosen(balancer, version, port=42000) in after


@EACH_FAMILY
def test_a_backend_that_starts_keeps_its_clients(balancer: Balancer, version: int) -> None:
    rows = pods(balancer, version, 8)
    balancer.service(packets.SERVICE[version], *rows, affinity_seconds=LONG)
    (before,) = all_chosen(balancer, version)
    (row,) = (row for row in rows if rows[row] == before)
    balancer.set_state(row, STATE_STARTING)
    balancer.service(packets.SERVICE[version], *(r for r in rows if r != row), affinity_seconds=LONG)
    assert chosen(balancer, version, port=41000) == before


@EACH_FAMILY
@pytest.mark.parametrize("how", ["removed", "reused"])
def test_a_row_that_is_another_backends_binds_nobody(balancer: Balancer, version: int, how: str) -> None:
    rows = pods(balancer, version, 8)
    balancer.service(packets.SERVICE[version], *rows, affinity_seconds=LONG)
    (before,) = all_chosen(balancer, version)
    (row,) = (row for row in rows if rows[row] == before)
    if how == "removed":
        balancer.retire(row)
    else:
        balancer.renew(row)
    balancer.service(packets.SERVICE[version], *(r for r in rows if r != row), affinity_seconds=LONG)
    assert chosen(balancer, version, port=41000) != before


@EACH_FAMILY
def test_a_silent_client_is_forgotten(balancer: Balancer, version: int) -> None:
    rows = pods(balancer, version, 8)
    address = packets.SERVICE[version]
    balancer.service(address, *rows, affinity_seconds=SHORT)
    (before,) = all_chosen(balancer, version)
    balancer.service(address, *(row for row in rows if rows[row] != before), affinity_seconds=SHORT)
    balancer.age_affinity(client(version), SHORT + 1)
    assert chosen(balancer, version, port=41000) != before


@EACH_FAMILY
def test_a_client_that_comes_back_stays_longer(balancer: Balancer, version: int) -> None:
    """Its last use is written at most once a second, so that most connections write nothing."""
    balancer.service(packets.SERVICE[version], *pods(balancer, version, 8), affinity_seconds=LONG)
    chosen(balancer, version)
    began = time.monotonic()
    first = int(balancer.affinity(client(version))["last_used_ns"])
    chosen(balancer, version, port=40001)
    second = int(balancer.affinity(client(version))["last_used_ns"])
    assert second == first or time.monotonic() - began > 0.9
    balancer.age_affinity(client(version), 2)
    chosen(balancer, version, port=40002)
    assert int(balancer.affinity(client(version))["last_used_ns"]) >= first


@EACH_FAMILY
def test_pools_are_apart(balancer: Balancer, version: int) -> None:
    """A client has a backend for each port of a service; the addresses of a pool share it."""
    rows = pods(balancer, version, 8)
    balancer.service(packets.SERVICE[version], *rows, affinity_seconds=LONG, pool=1)
    balancer.service(packets.SECOND_SERVICE[version], *rows, affinity_seconds=LONG, pool=1)
    others = pods(balancer, version, 8)
    for row in others:
        balancer.set_pool(row, 2)
    balancer.service(packets.SERVICE[version], *others, port=81, affinity_seconds=LONG, pool=2)
    (first,) = all_chosen(balancer, version)
    ends = Ends(client(version), packets.SECOND_SERVICE[version])
    assert balancer.balance(tcp(ends)).ends.destination == first
    chosen(balancer, version, to=81)
    assert balancer.affinity(client(version), pool=2) is not None
    assert len(balancer.maps["affinity"]) == 2


@EACH_FAMILY
def test_the_first_choice_needs_no_memory(balancer: Balancer, version: int) -> None:
    """Another node, or this one after it forgot, chooses the same while the table is the same."""
    balancer.service(packets.SERVICE[version], *pods(balancer, version, 8), affinity_seconds=LONG)
    clients = [client(version, number) for number in range(10, 34)]
    before = [chosen(balancer, version, source=one) for one in clients]
    balancer.maps["affinity"].clear()
    balancer.maps["connections"].clear()
    assert [chosen(balancer, version, source=one, port=50000) for one in clients] == before


@EACH_FAMILY
def test_more_clients_than_entries(balancer: Balancer, version: int) -> None:
    """The map gives up old clients for new ones; none is refused."""
    balancer.service(packets.SERVICE[version], *pods(balancer, version, 8), affinity_seconds=LONG)
    table = balancer.maps["affinity"]
    for number in range(3 * table.max_entries):
        tail = struct.pack("!H", number)
        source = f"10.1.{tail[0]}.{tail[1]}" if version == 4 else f"2001:db8:7::{number + 1:x}"
        outcome = balancer.balance(tcp(Ends(source, packets.SERVICE[version])))
        assert (outcome.verdict, outcome.reason) == ("PASS", "")
    assert 0 < len(table) <= table.max_entries
