"""The connection table: who keeps a backend, who gets a new one, and what the rows and counters say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.conftest import MakeBalancer
from tests.kernel.loadbalancer.packets import Ends, tcp, to_service, udp
from tests.kernel.loadbalancer.scene import (
    CLOSING,
    DSR,
    DSR_KIND,
    LOCAL,
    LOCAL_KIND,
    LOCAL_REPLY,
    NAT,
    NAT_REPLY,
    STATE_ACTIVE,
    STATE_DOWN,
    STATE_DRAINING,
    Balancer,
    flow,
    packed,
)

CLIENTS = 24
# So that rows need not be older than the machine. `QUICK` seconds later they are over.
QUICK = {"tcp_idle_ns": 2_000_000_000, "udp_idle_ns": 2_000_000_000, "closed_ns": 1_000_000_000}


def _pods(lb: Balancer, count: int) -> list[int]:
    return [lb.backend(f"10.0.3.{number + 1}", flags=LOCAL) for number in range(count)]


def _chosen(lb: Balancer, port: int, flags: str = "S", shape: Callable[..., bytes] = tcp) -> str:
    """The backend that a packet from this port goes to."""
    ends = to_service(4, source_port=port)
    return lb.balance(shape(ends, flags) if shape is tcp else shape(ends)).ends.destination


def _reply_ends(version: int, sent: Ends) -> Ends:
    return Ends(sent.destination, sent.source, sent.destination_port, sent.source_port)


# Rows


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_rows_of_nat_name_each_other(balancer: Balancer, version: int, protocol: str) -> None:
    row = balancer.backend(packets.BACKEND[version])
    number = balancer.service(packets.SERVICE[version], row, protocol=protocol)
    ends = to_service(version)
    sent = balancer.balance((tcp if protocol == "TCP" else udp)(ends)).ends
    forward = balancer.connection(ends, protocol)
    reply = balancer.connection(_reply_ends(version, sent), protocol)
    assert (forward["kind"], reply["kind"]) == (NAT, NAT_REPLY)
    assert _written(forward) == (packets.NODE[version], sent.source_port, packets.BACKEND[version], 8080)
    assert _written(reply) == (packets.SERVICE[version], 80, packets.CLIENT[version], 40000)
    for one in (forward, reply):
        assert (one["backend"], one["service"]) == (row, number)
        assert one["generation"] == balancer.maps["backends"][row]["generation"]
        assert not one["flags"]
    assert len(balancer.maps["connections"]) == 2


def _written(row: object) -> tuple[str, int, str, int]:
    names = {packed(address): address for table in _EVERY for address in table.values()}
    source, destination = (names[row[side].tobytes()] for side in ("source", "destination"))  # type: ignore[index]
    ports = (int(row[f"{side}_port"].byteswap()) for side in ("source", "destination"))  # type: ignore[index]
    return source, next(ports), destination, next(ports)


_EVERY = (packets.NODE, packets.BACKEND, packets.SERVICE, packets.CLIENT, packets.POD)


@pytest.mark.parametrize("version", [4, 6])
def test_rows_of_a_local_backend(balancer: Balancer, version: int) -> None:
    balancer.service(packets.SERVICE[version], balancer.backend(packets.POD[version], flags=LOCAL))
    ends = to_service(version)
    sent = balancer.balance(tcp(ends)).ends
    forward, reply = (balancer.connection(one) for one in (ends, _reply_ends(version, sent)))
    assert (forward["kind"], reply["kind"]) == (LOCAL_KIND, LOCAL_REPLY)
    assert _written(forward) == (packets.CLIENT[version], 40000, packets.POD[version], 8080)
    assert _written(reply) == (packets.SERVICE[version], 80, packets.CLIENT[version], 40000)


def test_dsr_has_one_row(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4], flags=DSR))
    balancer.balance(tcp(to_service(4)))
    assert balancer.connection(to_service(4))["kind"] == DSR_KIND
    assert len(balancer.maps["connections"]) == 1


def test_counters(balancer: Balancer) -> None:
    row = balancer.backend(packets.BACKEND[4])
    number = balancer.service(packets.SERVICE[4], row)
    empty = balancer.service(packets.SECOND_SERVICE[4])
    before, backend_before = balancer.service_counts(number), balancer.backend_counts(row)
    drops_before = balancer.service_counts(empty)["drops"]
    sent = balancer.balance(tcp(to_service(4))).ends
    balancer.balance(tcp(to_service(4), "A", b"four"))
    balancer.balance(tcp(_reply_ends(4, sent), "SA"))
    balancer.balance(tcp(Ends(packets.CLIENT[4], packets.SECOND_SERVICE[4])))
    after, backend_after = balancer.service_counts(number), balancer.backend_counts(row)
    assert _grown(before, after) == {"connections": 1, "packets": 2, "bytes": 84, "drops": 0}
    assert _grown(backend_before, backend_after) == {
        "connections": 1,
        "packets": 2,
        "bytes": 84,
        "reply_packets": 1,
        "reply_bytes": 40,
    }
    assert balancer.service_counts(empty)["drops"] - drops_before == 1


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in before}


def test_replies_of_a_local_backend_are_counted(balancer: Balancer) -> None:
    row = balancer.backend(packets.POD[4], flags=LOCAL)
    balancer.service(packets.SERVICE[4], row)
    sent = balancer.balance(tcp(to_service(4))).ends
    before = balancer.backend_counts(row)
    balancer.reply(tcp(_reply_ends(4, sent), "SA"))
    grown = _grown(before, balancer.backend_counts(row))
    assert (grown["reply_packets"], grown["reply_bytes"]) == (1, 40)


# Who keeps a backend


def test_new_connections_go_by_the_table(balancer: Balancer) -> None:
    """All of a table's backends are met, and the same flow meets the same one with an empty connection table."""
    balancer.service(packets.SERVICE[4], *_pods(balancer, 4))
    first = [_chosen(balancer, 40000 + number) for number in range(64)]
    balancer.maps["connections"].clear()
    assert [_chosen(balancer, 40000 + number) for number in range(64)] == first
    assert len(set(first)) == 4


def test_modulo_takes_the_remainder(balancer: Balancer) -> None:
    """A modulo table spreads by another rule over the same slots."""
    pods = _pods(balancer, 5)
    balancer.service(packets.SERVICE[4], *pods)
    by_range = [_chosen(balancer, 40000 + number) for number in range(64)]
    balancer.maps["connections"].clear()
    balancer.service(packets.SERVICE[4], *pods, flags=4)
    by_remainder = [_chosen(balancer, 40000 + number) for number in range(64)]
    assert by_range != by_remainder
    assert set(by_range) == set(by_remainder)


def test_a_connection_keeps_its_backend_after_the_table_changed(balancer: Balancer) -> None:
    rows = _pods(balancer, 4)
    balancer.service(packets.SERVICE[4], *rows)
    before = [_chosen(balancer, 40000 + number) for number in range(CLIENTS)]
    balancer.service(packets.SERVICE[4], *reversed(rows))
    assert [_chosen(balancer, 40000 + number, "A") for number in range(CLIENTS)] == before
    # A SYN sent once more is the same connection's.
    assert [_chosen(balancer, 40000 + number, "S") for number in range(CLIENTS)] == before


def test_a_connection_keeps_its_backend_after_the_backend_is_gone(balancer: Balancer) -> None:
    """Until the client begins anew."""
    gone, stays = _pods(balancer, 2)
    balancer.service(packets.SERVICE[4], gone)
    assert _chosen(balancer, 40000) == "10.0.3.1"
    balancer.service(packets.SERVICE[4], stays)
    balancer.retire(gone)
    for flags in ("A", "PA", "FA"):
        assert _chosen(balancer, 40000, flags) == "10.0.3.1"
    balancer.age(to_service(4), 1)
    assert _chosen(balancer, 40000, "S") == "10.0.3.2"
    assert _chosen(balancer, 40000, "A") == "10.0.3.2"


def test_udp_goes_to_another_backend_when_its_own_is_gone(balancer: Balancer) -> None:
    gone, stays = _pods(balancer, 2)
    balancer.service(packets.SERVICE[4], gone, protocol="UDP")
    assert _chosen(balancer, 40000, shape=udp) == "10.0.3.1"
    balancer.service(packets.SERVICE[4], stays, protocol="UDP")
    assert _chosen(balancer, 40000, shape=udp) == "10.0.3.1"
    balancer.retire(gone)
    assert _chosen(balancer, 40000, shape=udp) == "10.0.3.2"


def test_a_row_that_another_backend_has_now_is_not_the_old_one(balancer: Balancer) -> None:
    """The generation tells: datagrams go by the table again, and counters are the new backend's alone."""
    gone, stays = _pods(balancer, 2)
    balancer.service(packets.SERVICE[4], gone, protocol="UDP")
    _chosen(balancer, 40000, shape=udp)
    balancer.service(packets.SERVICE[4], stays, protocol="UDP")
    balancer.renew(gone)
    before = balancer.backend_counts(gone)
    assert _chosen(balancer, 40000, shape=udp) == "10.0.3.2"
    assert balancer.backend_counts(gone) == before


@pytest.mark.parametrize("flags", ["F", "FA", "R", "RA", "FRA"])
@pytest.mark.parametrize("target", ["local", "nat", "dsr"])
def test_a_client_may_use_its_port_again_once_the_connection_closes(
    balancer: Balancer, flags: str, target: str
) -> None:
    kind = {"local": LOCAL, "nat": 0, "dsr": DSR}[target]
    old, new = (balancer.backend(packets.BACKEND[4], port, flags=kind) for port in (8080, 8081))
    balancer.service(packets.SERVICE[4], old)
    balancer.balance(tcp(to_service(4)))
    balancer.service(packets.SERVICE[4], new)
    balancer.balance(tcp(to_service(4), flags))
    assert balancer.connection(to_service(4))["flags"] == CLOSING
    # Its last packets still go to the old one.
    balancer.balance(tcp(to_service(4), "A"))
    assert balancer.connection(to_service(4))["backend"] == old
    balancer.balance(tcp(to_service(4), "S"))
    row = balancer.connection(to_service(4))
    assert (row["backend"], row["flags"]) == (new, 0)


def test_a_connection_met_at_its_end_is_closing_at_once(balancer: Balancer) -> None:
    """Its row was evicted; the port that it takes is soon free again."""
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    sent = balancer.balance(tcp(to_service(4), "R")).ends
    assert balancer.connection(to_service(4))["flags"] == CLOSING
    assert balancer.connection(_reply_ends(4, sent))["flags"] == CLOSING


@pytest.mark.parametrize("flags", ["R", "F"])
@pytest.mark.parametrize("direction", ["client", "backend"])
@pytest.mark.parametrize("target", ["local", "nat"])
def test_a_reset_ends_both_directions_a_fin_its_own(
    balancer: Balancer, target: str, direction: str, flags: str
) -> None:
    local = target == "local"
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4], flags=LOCAL if local else 0))
    sent = balancer.balance(tcp(to_service(4))).ends
    answer = _reply_ends(4, sent)
    if direction == "client":
        balancer.balance(tcp(to_service(4), flags))
    elif local:
        balancer.reply(tcp(answer, flags))
    else:
        balancer.balance(tcp(answer, flags))
    closing = [bool(balancer.connection(ends)["flags"]) for ends in (to_service(4), answer)]
    own = [direction == "client", direction == "backend"]
    assert closing == ([True, True] if flags == "R" else own)


# How long rows live


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("target", ["local", "nat"])
def test_a_silent_direction_lives_as_long_as_the_other(
    make_balancer: MakeBalancer, target: str, protocol: str
) -> None:
    """A client that sends for long without an answer is still answered from the service's address."""
    balancer = make_balancer(QUICK)
    shape = tcp if protocol == "TCP" else udp
    local = target == "local"
    balancer.service(
        packets.SERVICE[4],
        balancer.backend(packets.BACKEND[4], flags=LOCAL if local else 0),
        protocol=protocol,
    )
    sent = balancer.balance(shape(to_service(4))).ends
    answer = _reply_ends(4, sent)
    for ends in (to_service(4), answer):
        balancer.age(ends, 3, protocol)
    old = balancer.connection(answer, protocol)["last_seen_ns"]
    balancer.balance(tcp(to_service(4), "A") if protocol == "TCP" else udp(to_service(4)))
    assert balancer.connection(answer, protocol)["last_seen_ns"] > old
    if local:
        assert balancer.reply(shape(answer))[1] == 1


def test_the_other_row_is_left_alone_when_it_is_another_connections(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    sent = balancer.balance(tcp(to_service(4))).ends
    answer = _reply_ends(4, sent)
    row = balancer.connection(answer)
    row["destination_port"] += 1
    balancer.maps["connections"].put(flow(answer), row)
    balancer.balance(tcp(to_service(4), "R"))
    assert balancer.connection(answer) == row


def test_a_pod_answers_for_itself_once_the_connection_is_over(make_balancer: MakeBalancer) -> None:
    """A client that comes to the pod directly, from a port that it once used for the service."""
    balancer = make_balancer(QUICK)
    balancer.service(packets.SERVICE[4], balancer.backend(packets.POD[4], flags=LOCAL), protocol="UDP")
    answer = _reply_ends(4, balancer.balance(udp(to_service(4))).ends)
    assert balancer.reply(udp(answer))[1] == 1
    balancer.age(answer, 3, "UDP")
    assert balancer.reply(udp(answer)) == (udp(answer), 0)


def test_what_a_pod_sends_of_its_own_is_left_alone(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    sent = balancer.balance(tcp(to_service(4))).ends
    # Not even a row of another kind is taken for a reply's.
    for packet in (
        tcp(_reply_ends(4, sent)),
        tcp(to_service(4)),
        packets.arp(),
        packets.fragment4(to_service(4)),
    ):
        assert balancer.reply(packet) == (packet, 0)


def test_the_least_recently_used_rows_make_room(make_balancer: MakeBalancer) -> None:
    """The table is never full: new connections are served, and old ones find their backend by the table again."""
    balancer = make_balancer(sizes={"connections": 64})
    balancer.service(packets.SERVICE[4], *_pods(balancer, 4))
    first = [_chosen(balancer, 1024 + number) for number in range(500)]
    assert len(balancer.maps["connections"]) <= 64
    assert [_chosen(balancer, 1024 + number, "A") for number in range(500)] == first


# Ports of nat


def _nat_ports(lb: Balancer, count: int, first: int = 40000) -> list[int]:
    outcomes = [lb.balance(tcp(to_service(4, source_port=first + number))) for number in range(count)]
    assert {one.verdict for one in outcomes} == {"TX"}
    return [one.ends.source_port for one in outcomes]


def test_ports_are_unique_towards_a_backend_and_spread(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    ports = _nat_ports(balancer, 400)
    assert len(set(ports)) == 400
    assert min(ports) >= 10240
    assert max(ports) <= 29999
    assert max(ports) - min(ports) > 15000


def test_a_range_of_eight_serves_eight(make_balancer: MakeBalancer) -> None:
    balancer = make_balancer({"nat_port_min": 20000, "nat_port_max": 20007})
    number = balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    assert sorted(_nat_ports(balancer, 8)) == list(range(20000, 20008))
    outcome = balancer.balance(tcp(to_service(4, source_port=50000)))
    assert str(outcome) == "DROP `no_nat_port`"
    assert balancer.service_counts(number)["drops"] == 1
    assert balancer.connection(to_service(4, source_port=50000)) is None
    # Towards another backend the same ports are free, and known connections go on.
    balancer.service(packets.SECOND_SERVICE[4], balancer.backend(packets.SERVER[4]))
    other = Ends(packets.CLIENT[4], packets.SECOND_SERVICE[4])
    assert balancer.balance(tcp(other)).verdict == "REDIRECT"
    assert balancer.balance(tcp(to_service(4), "A")).verdict == "TX"


def test_the_ports_of_closed_connections_are_taken_over(make_balancer: MakeBalancer) -> None:
    balancer = make_balancer(QUICK | {"nat_port_min": 20000, "nat_port_max": 20003})
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    ports = _nat_ports(balancer, 4)
    ended = to_service(4, source_port=40002)
    balancer.balance(tcp(ended, "R"))
    new = to_service(4, source_port=50000)
    assert balancer.balance(tcp(new)).reason == "no_nat_port"
    balancer.age(Ends(packets.BACKEND[4], packets.NODE[4], 8080, ports[2]), 1.5)
    assert balancer.balance(tcp(new)).ends.source_port == ports[2]
    answer = balancer.balance(tcp(Ends(packets.BACKEND[4], packets.NODE[4], 8080, ports[2]), "SA"))
    assert answer.ends.destination_port == 50000


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_the_ports_of_idle_connections_are_taken_over(make_balancer: MakeBalancer, protocol: str) -> None:
    """After the idle time of their own protocol."""
    shape = tcp if protocol == "TCP" else udp
    balancer = make_balancer(
        {"nat_port_min": 20000, "nat_port_max": 20000, f"{protocol.lower()}_idle_ns": 4_000_000_000}
    )
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]), protocol=protocol)
    balancer.balance(shape(to_service(4)))
    new = to_service(4, source_port=50000)
    answer = Ends(packets.BACKEND[4], packets.NODE[4], 8080, 20000)
    balancer.age(answer, 1, protocol)
    assert balancer.balance(shape(new)).reason == "no_nat_port"
    balancer.age(answer, 3.5, protocol)
    assert balancer.balance(shape(new)).ends.source_port == 20000


def test_a_row_seen_by_another_cpu_just_now_is_not_idle(make_balancer: MakeBalancer) -> None:
    """Its time may lie ahead of what this CPU has read."""
    balancer = make_balancer({"nat_port_min": 20000, "nat_port_max": 20000})
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    sent = balancer.balance(tcp(to_service(4))).ends
    balancer.age(_reply_ends(4, sent), -1)
    assert balancer.balance(tcp(to_service(4, source_port=50000))).reason == "no_nat_port"


def test_the_constant_closed_ns(make_balancer: MakeBalancer) -> None:
    balancer = make_balancer({"nat_port_min": 20000, "nat_port_max": 20000, "closed_ns": 0})
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    sent = balancer.balance(tcp(to_service(4))).ends
    balancer.balance(tcp(to_service(4), "R"))
    balancer.age(_reply_ends(4, sent), 0.001)
    assert balancer.balance(tcp(to_service(4, source_port=50000))).verdict == "TX"


def test_a_flow_whose_row_was_evicted_gets_its_port_again(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    (port,) = _nat_ports(balancer, 1)
    del balancer.maps["connections"][flow(to_service(4))]
    assert balancer.balance(tcp(to_service(4), "A")).ends.source_port == port


def test_the_same_client_port_for_two_services_is_two_connections(make_balancer: MakeBalancer) -> None:
    """A client's port may serve several destinations at once: neither connection takes the other's nat port."""
    balancer = make_balancer({"nat_port_min": 20000, "nat_port_max": 20015})
    row = balancer.backend(packets.BACKEND[4])
    balancer.service(packets.SERVICE[4], row)
    balancer.service(packets.SECOND_SERVICE[4], row)
    every = [
        replace(to_service(4, source_port=40000 + number), destination=service)
        for number in range(8)
        for service in (packets.SERVICE[4], packets.SECOND_SERVICE[4])
    ]
    ports = [balancer.balance(tcp(ends)).ends.source_port for ends in every]
    assert sorted(ports) == list(range(20000, 20016))
    for ends, port in zip(every, ports, strict=True):
        answer = balancer.balance(tcp(Ends(packets.BACKEND[4], packets.NODE[4], 8080, port), "SA")).ends
        assert (answer.source, answer.destination_port) == (ends.destination, ends.source_port)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_the_same_client_port_for_two_services_with_one_backend_of_this_node(
    balancer: Balancer, protocol: str
) -> None:
    """The pod sees two ports of the client, and each answer comes from the service that was asked."""
    shape = tcp if protocol == "TCP" else udp
    row = balancer.backend(packets.POD[4], flags=LOCAL)
    both = [to_service(4), replace(to_service(4), destination=packets.SECOND_SERVICE[4])]
    for ends in both:
        balancer.service(ends.destination, row, protocol=protocol)
    sent = [balancer.balance(shape(ends)).ends for ends in both]
    assert [one.source for one in sent] == [packets.CLIENT[4]] * 2
    assert sent[0].source_port == 40000 != sent[1].source_port
    for ends, one in zip(both, sent, strict=True):
        data, counted = balancer.reply(shape(_reply_ends(4, one)))
        assert counted == 1
        assert data == shape(_reply_ends(4, ends))
        # A known connection keeps its port.
        assert balancer.balance(shape(ends)).ends.source_port == one.source_port


def test_a_packet_to_a_nat_port_that_nobody_has_is_the_nodes_own(balancer: Balancer) -> None:
    balancer.service(packets.SERVICE[4], balancer.backend(packets.BACKEND[4]))
    packet = tcp(Ends(packets.BACKEND[4], packets.NODE[4], 8080, 20000), "SA")
    assert str(balancer.balance(packet)) == "PASS"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_reply_is_none_of_a_service_that_has_its_port(
    make_balancer: MakeBalancer, version: int, protocol: str
) -> None:
    """As after an upgrade from a version whose nat ports met Kubernetes' node ports: the flow tells them apart."""
    balancer = make_balancer({"nat_port_min": 31000, "nat_port_max": 31000})
    shape = tcp if protocol == "TCP" else udp
    balancer.service(packets.SERVICE[version], balancer.backend(packets.BACKEND[version]), protocol=protocol)
    sent = balancer.balance(shape(to_service(version))).ends
    node_port = balancer.service(
        packets.NODE[version],
        balancer.backend(packets.POD[version], flags=LOCAL),
        port=31000,
        protocol=protocol,
        own=True,
    )
    answer = balancer.balance(shape(_reply_ends(version, sent))).ends
    assert (answer.source, answer.destination) == (packets.SERVICE[version], packets.CLIENT[version])
    assert balancer.service_counts(node_port)["packets"] == 0
    asked = Ends(packets.CLIENT[version], packets.NODE[version], 40000, 31000)
    assert balancer.balance(shape(asked)).ends.destination == packets.POD[version]


# States of backends


@pytest.mark.parametrize("version", [4, 6])
def test_udp_flows_leave_a_backend_that_is_down(balancer: Balancer, version: int) -> None:
    first, second = (balancer.backend(address, flags=LOCAL) for address in _two(version))
    balancer.service(packets.SERVICE[version], first, protocol="UDP")
    ends = to_service(version)
    assert balancer.balance(udp(ends)).ends.destination == _two(version)[0]
    balancer.set_state(first, STATE_DOWN)
    balancer.service(packets.SERVICE[version], second, protocol="UDP")
    assert balancer.balance(udp(ends)).ends.destination == _two(version)[1]
    # It has another connection's rows now, and stays there when the first one is back.
    balancer.set_state(first, STATE_ACTIVE)
    assert balancer.balance(udp(ends)).ends.destination == _two(version)[1]


@pytest.mark.parametrize("version", [4, 6])
def test_udp_flows_of_a_backend_that_is_down_are_refused_where_there_is_no_other(
    balancer: Balancer, version: int
) -> None:
    row = balancer.backend(packets.POD[version], flags=LOCAL)
    balancer.service(packets.SERVICE[version], row, protocol="UDP")
    ends = to_service(version)
    assert balancer.balance(udp(ends)).verdict == "PASS"
    balancer.set_state(row, STATE_DOWN)
    balancer.service(packets.SERVICE[version], protocol="UDP")
    assert balancer.balance(udp(ends)).answered


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("shape", [tcp, udp])
def test_a_backend_that_drains_keeps_what_it_has(
    balancer: Balancer, version: int, shape: Callable[[Ends], bytes]
) -> None:
    protocol = "TCP" if shape is tcp else "UDP"
    first, second = (balancer.backend(address, flags=LOCAL) for address in _two(version))
    balancer.service(packets.SERVICE[version], first, protocol=protocol)
    ends = to_service(version)
    assert balancer.balance(shape(ends)).ends.destination == _two(version)[0]
    balancer.set_state(first, STATE_DRAINING)
    balancer.service(packets.SERVICE[version], second, protocol=protocol)
    assert balancer.balance(shape(ends)).ends.destination == _two(version)[0]
    new = replace(ends, source_port=40001)
    assert balancer.balance(shape(new)).ends.destination == _two(version)[1]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("state", [STATE_DRAINING, STATE_DOWN])
def test_an_open_tcp_connection_never_changes_its_backend(
    balancer: Balancer, version: int, state: int
) -> None:
    first, second = (balancer.backend(address, flags=LOCAL) for address in _two(version))
    balancer.service(packets.SERVICE[version], first)
    ends = to_service(version)
    balancer.balance(tcp(ends))
    balancer.set_state(first, state)
    for rows in ((second,), ()):
        balancer.service(packets.SERVICE[version], *rows)
        for flags in ("A", "PA", "FA", "R"):
            assert balancer.balance(tcp(ends, flags)).ends.destination == _two(version)[0]


@pytest.mark.parametrize("version", [4, 6])
def test_a_connection_that_a_dead_backend_did_not_answer_goes_to_another(
    balancer: Balancer, version: int
) -> None:
    """Its client sends its SYN again: the only packet of TCP that may move."""
    first, second = (balancer.backend(address, flags=LOCAL) for address in _two(version))
    balancer.service(packets.SERVICE[version], first)
    ends = to_service(version)
    assert balancer.balance(tcp(ends)).ends.destination == _two(version)[0]
    balancer.set_state(first, STATE_DOWN)
    balancer.service(packets.SERVICE[version], second)
    assert balancer.balance(tcp(ends)).ends.destination == _two(version)[1]


def _two(version: int) -> tuple[str, str]:
    return ("10.0.3.21", "10.0.3.22") if version == 4 else ("2001:db8:3::21", "2001:db8:3::22")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_row_that_was_given_to_another_pool_gets_no_connection(
    balancer: Balancer, version: int, protocol: str
) -> None:
    """As a program meets it that still holds the old table."""
    row = balancer.backend(packets.BACKEND[version])
    balancer.service(packets.SERVICE[version], row, protocol=protocol)
    balancer.set_pool(row, 2)
    shape = tcp if protocol == "TCP" else udp
    assert balancer.balance(shape(to_service(version))).reason == "internal"
    balancer.set_pool(row, 1)
    assert balancer.balance(shape(to_service(version))).reason == ""
