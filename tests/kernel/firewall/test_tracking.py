"""Connections: states, replies, new reverse flows, expiry, ICMP, fragments, changes of policy."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt
from scapy.packet import Raw

from hookline.datapath.firewall.firewall import Older
from tests.kernel.firewall.scene import (
    FAR,
    FAR_IDENTITY,
    NODE,
    OTHER,
    OTHER_IDENTITY,
    POD,
    SMALL,
    Gate,
    Outcome,
    allow,
    context,
    from_pod,
    to_pod,
    turned,
)
from tests.kernel.firewall.shapes import echo, error, fragments, frame, of_protocol, sctp
from tests.kernel.loadbalancer.packets import Ends, changed, fragment4, tcp, udp, with_extensions
from tests.kernel.loadbalancer.packets import fragment as fragment6

VERSIONS = pytest.mark.parametrize("version", [4, 6])
HTTP = [allow(FAR_IDENTITY, 6, 80)]
ANY_UDP = [allow(FAR_IDENTITY, 17)]
ALL = [allow(FAR_IDENTITY)]
ESTABLISHED = Outcome("PASS", "established")
RULE = Outcome("PASS", "rule")
FREE = Outcome("PASS", "not_isolated")
RELATED = Outcome("PASS", "related")
NO_RULE = Outcome("DROP", "no_rule")
CUT = Outcome("DROP", "cut")
LOST = Outcome("DROP", "unknown_fragment")


def state(gate: Gate) -> str:
    """Of the only connection."""
    (one,) = gate.firewall.tracked()
    return one.state


def opened(gate: Gate, there: Ends) -> None:
    """Opens a connection to the pod."""
    gate.come(tcp(there, "S"))
    gate.out(tcp(turned(there), "SA"))
    assert gate.come(tcp(there, "A")) == ESTABLISHED


@VERSIONS
def test_a_connection_lives_from_syn_to_its_end(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    back = turned(there)
    assert gate.out(tcp(back, "SA")) == NO_RULE
    assert gate.come(tcp(there, "S")) == RULE
    assert state(gate) == "new"
    assert gate.come(tcp(there, "S")) == ESTABLISHED
    assert gate.out(tcp(back, "SA")) == ESTABLISHED
    assert state(gate) == "replied"
    assert gate.come(tcp(there, "A")) == ESTABLISHED
    assert state(gate) == "open"
    for _ in range(3):
        assert gate.come(tcp(there, "PA", b"x")) == ESTABLISHED
        assert gate.out(tcp(back, "A")) == ESTABLISHED
    gate.age(20_000)
    assert gate.out(tcp(back, "PA", b"late")) == ESTABLISHED
    assert gate.out(tcp(back, "FA")) == ESTABLISHED
    assert state(gate) == "closing"
    gate.age(3_000)
    assert gate.come(tcp(there, "A")) == ESTABLISHED
    assert gate.come(tcp(there, "FA")) == ESTABLISHED
    assert state(gate) == "closed"
    assert gate.out(tcp(back, "A")) == ESTABLISHED
    gate.age(61)
    assert gate.firewall.tracked() == []
    assert gate.out(tcp(back, "A")) == NO_RULE


@VERSIONS
def test_a_half_closed_connection_ends_after_an_hour(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    opened(gate, to_pod(version))
    gate.come(tcp(to_pod(version), "FA"))
    gate.age(3_601)
    assert gate.out(tcp(turned(to_pod(version)), "A")) == NO_RULE


@VERSIONS
def test_a_reset_closes(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    assert gate.come(tcp(there, "S")) == RULE
    assert gate.out(tcp(turned(there), "RA")) == ESTABLISHED
    assert state(gate) == "closed"
    assert gate.come(tcp(there, "S")) == RULE
    assert state(gate) == "new"


@VERSIONS
def test_the_same_ports_again_are_a_new_connection(gate: Gate, version: int) -> None:
    there = to_pod(version)
    gate.rules(ingress=HTTP, egress=[])
    gate.come(tcp(there, "S"))
    gate.out(tcp(turned(there), "FA"))
    assert gate.come(tcp(there, "S")) == RULE
    assert state(gate) == "new"


@pytest.mark.parametrize(("seconds", "alive"), [(58, True), (61, False)])
@VERSIONS
def test_an_unanswered_syn_is_forgotten(gate: Gate, version: int, seconds: int, alive: bool) -> None:
    gate.rules(ingress=HTTP, egress=[])
    gate.come(tcp(to_pod(version), "S"))
    gate.age(seconds)
    assert gate.out(tcp(turned(to_pod(version)), "SA")) == (ESTABLISHED if alive else NO_RULE)


@VERSIONS
def test_an_open_connection_may_be_silent_for_eight_hours(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    opened(gate, there)
    gate.age(20_000)
    assert gate.out(tcp(turned(there), "A")) == ESTABLISHED
    gate.firewall.maps["tracked"].clear()
    opened(gate, there)
    gate.age(28_801)
    assert gate.out(tcp(turned(there), "A")) == NO_RULE


@VERSIONS
def test_a_reverse_connection_is_judged_by_itself(gate: Gate, version: int) -> None:
    """A SYN between the same ports, the other way round, is no reply."""
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    gate.come(tcp(there, "S"))
    assert gate.out(tcp(turned(there), "S")) == NO_RULE
    assert gate.out(tcp(turned(there), "SA")) == ESTABLISHED
    gate.come(tcp(there, "A"))
    assert gate.out(tcp(turned(there), "S")) == NO_RULE
    assert gate.come(tcp(there, "A")) == ESTABLISHED
    gate.rules(ingress=HTTP, egress=ALL)
    assert gate.out(tcp(turned(there), "S")) == RULE


@VERSIONS
def test_datagrams_and_their_answers(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    there = from_pod(version, 53)
    assert gate.come(udp(turned(there))) == NO_RULE
    assert gate.out(udp(there)) == RULE
    gate.age(28)
    assert gate.come(udp(turned(there))) == ESTABLISHED
    assert state(gate) == "open"
    for _ in range(3):
        # Either end's packets keep it.
        gate.age(100)
        assert gate.come(udp(turned(there))) == ESTABLISHED
        gate.age(100)
        assert gate.out(udp(there)) == ESTABLISHED
    gate.age(121)
    assert gate.come(udp(turned(there))) == NO_RULE
    assert gate.out(udp(there)) == RULE
    gate.age(31)
    assert gate.come(udp(turned(there))) == NO_RULE


@VERSIONS
def test_another_port_address_or_protocol_is_another_flow(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    gate.out(udp(from_pod(version, 53)))
    assert gate.come(udp(turned(from_pod(version, 54)))) == NO_RULE
    assert gate.come(udp(turned(from_pod(version, 53, source_port=40001)))) == NO_RULE
    assert gate.come(udp(turned(from_pod(version, 53, target=OTHER)))) == NO_RULE
    assert gate.come(tcp(turned(from_pod(version, 53)), "SA")) == NO_RULE


@VERSIONS
def test_sctp_is_tracked_by_its_ports(gate: Gate, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY, 132, 3868)], egress=[])
    there = to_pod(version, 3868)
    assert gate.come(sctp(to_pod(version, 3869), 1)) == NO_RULE
    assert gate.come(sctp(there, 1)) == RULE
    assert gate.out(sctp(turned(there), 2)) == ESTABLISHED
    assert gate.come(sctp(there, 10)) == ESTABLISHED
    assert gate.out(sctp(turned(there), 1)) == NO_RULE
    gate.age(3_500)
    assert gate.out(sctp(turned(there), 0)) == ESTABLISHED
    gate.age(3_601)
    assert gate.out(sctp(turned(there), 0)) == NO_RULE


@VERSIONS
def test_any_other_protocol_is_tracked_by_its_addresses(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ALL)
    there = from_pod(version)
    assert gate.come(of_protocol(turned(there), 47)) == NO_RULE
    assert gate.out(of_protocol(there, 47)) == RULE
    assert gate.come(of_protocol(turned(there), 47)) == ESTABLISHED
    assert gate.come(of_protocol(turned(there), 50)) == NO_RULE
    gate.age(121)
    assert gate.come(of_protocol(turned(there), 47)) == NO_RULE
    gate.rules(ingress=[], egress=[allow(FAR_IDENTITY, 6)])
    assert gate.out(of_protocol(there, 47)) == NO_RULE


@VERSIONS
def test_an_echo_is_answered_and_not_asked_back(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ALL)
    there = from_pod(version)
    assert gate.come(echo(turned(there), reply=True)) == NO_RULE
    assert gate.out(echo(there)) == RULE
    assert gate.come(echo(turned(there), reply=True)) == ESTABLISHED
    assert gate.come(echo(turned(there), reply=True, number=8)) == NO_RULE
    assert gate.come(echo(turned(there))) == NO_RULE
    gate.age(31)
    assert gate.come(echo(turned(there), reply=True)) == NO_RULE


def test_other_icmp_has_no_replies(gate: Gate) -> None:
    gate.rules(ingress=[], egress=ALL)
    there = from_pod(4)
    assert gate.out(frame(there, ICMP(type=13))) == RULE
    assert gate.come(frame(turned(there), ICMP(type=14))) == NO_RULE
    assert gate.firewall.tracked() == []


@VERSIONS
def test_a_rule_for_ports_is_not_for_icmp(gate: Gate, version: int) -> None:
    gate.rules(egress=[allow(FAR_IDENTITY, 6), allow(FAR_IDENTITY, 17), allow(FAR_IDENTITY, 132)])
    assert gate.out(echo(from_pod(version))) == NO_RULE


# Errors


@pytest.mark.parametrize("too_big", [False, True])
@VERSIONS
def test_errors_about_a_connection_pass(gate: Gate, version: int, too_big: bool) -> None:
    """From anybody on the way: a router, or the other end."""
    gate.rules(ingress=[], egress=ANY_UDP)
    there = from_pod(version, 53)
    told = error(Ends(OTHER[version], POD[version]), udp(there), too_big=too_big)
    assert gate.come(told) == NO_RULE
    gate.out(udp(there))
    assert gate.come(told) == RELATED
    assert gate.come(error(Ends(OTHER[version], POD[version]), udp(from_pod(version, 54)))) == NO_RULE
    gate.age(31)
    assert gate.come(told) == NO_RULE


@VERSIONS
def test_the_pod_may_say_that_a_port_is_closed(gate: Gate, version: int) -> None:
    gate.rules(ingress=ANY_UDP, egress=[])
    there = to_pod(version, 53)
    told = error(turned(there), udp(there))
    assert gate.out(told) == NO_RULE
    assert gate.come(udp(there)) == RULE
    assert gate.out(told) == RELATED
    spoofed = error(Ends(OTHER[version], FAR[version]), udp(there))
    assert gate.out(spoofed) == Outcome("DROP", "spoofed_source")


@VERSIONS
def test_an_error_about_a_tcp_connection_and_an_echo(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ALL)
    there = from_pod(version)
    gate.out(tcp(there, "S"))
    gate.out(echo(there))
    for quoted in (tcp(there, "S"), echo(there)):
        assert gate.come(error(turned(there), quoted)) == RELATED
    # It says that the other end had sent it, and so had no reason to tell the pod.
    assert gate.come(error(turned(there), tcp(turned(there), "SA"))) == NO_RULE


@VERSIONS
def test_errors_end_with_the_permission(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    there = from_pod(version, 53)
    gate.out(udp(there))
    gate.rules(ingress=[], egress=[])
    assert gate.come(error(turned(there), udp(there))) == NO_RULE
    assert gate.out(udp(there)) == CUT


def test_an_error_that_quotes_extension_headers(gate: Gate) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    there = from_pod(6, 53)
    chained = frame(there, IPv6ExtHdrDestOpt() / UDP(sport=40000, dport=53) / Raw(b"hello"))
    assert gate.out(chained) == RULE
    assert gate.come(error(turned(there), chained)) == RELATED


@VERSIONS
def test_an_error_that_quotes_too_little(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    there = from_pod(version, 53)
    gate.out(udp(there))
    head = 14 + (20 + 8 + 20 if version == 4 else 40 + 8 + 40)
    whole = error(turned(there), udp(there))[: head + 8]
    for cut, expected in ((0, RELATED), (1, NO_RULE), (8, NO_RULE), (12, NO_RULE)):
        short = whole[: len(whole) - cut]
        total = len(short) - (14 if version == 4 else 54)
        short = changed(short, 16 if version == 4 else 18, total.to_bytes(2, "big"))
        assert gate.come(short) == expected


# Fragments


@VERSIONS
def test_later_fragments_follow_the_first(gate: Gate, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY, 17, 53)], egress=[])
    first, later = fragments(to_pod(version, 53))
    assert gate.come(later) == LOST
    assert gate.come(first) == RULE
    assert gate.come(later) == ESTABLISHED
    gate.age(61)
    assert gate.come(later) == LOST


@VERSIONS
def test_fragments_of_a_refused_datagram(gate: Gate, version: int) -> None:
    gate.rules(ingress=[allow(FAR_IDENTITY, 17, 53)], egress=[])
    first, later = fragments(to_pod(version, 54))
    assert gate.come(first) == NO_RULE
    assert gate.come(later) == LOST


@VERSIONS
def test_fragments_of_replies(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=ANY_UDP)
    gate.out(udp(from_pod(version, 53)))
    first, later = fragments(turned(from_pod(version, 53)))
    assert gate.come(later) == LOST
    assert gate.come(first) == ESTABLISHED
    assert gate.come(later) == ESTABLISHED


@VERSIONS
def test_a_rule_for_all_ports_takes_fragments_as_they_come(gate: Gate, version: int) -> None:
    later = fragments(to_pod(version, 53))[1]
    assert gate.come(later) == FREE
    gate.rules(ingress=ALL, egress=[])
    assert gate.come(later) == RULE


@VERSIONS
def test_a_fragment_may_not_overwrite_flags(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP)
    there = to_pod(version)
    tiny = fragment4(there, 1, shape=tcp) if version == 4 else with_extensions([fragment6(1)], tcp)(there)
    assert gate.come(tiny) == Outcome("DROP", "tiny_fragment")


# Changes of policy


@VERSIONS
def test_an_allowed_connection_outlives_a_change(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    opened(gate, there)
    for port in (443, 444, 445):
        generation = gate.rules(ingress=[*HTTP, allow(OTHER_IDENTITY, 6, port)], egress=[])
        # By the answer first: it is judged as the beginning was, not as a connection to the other end.
        assert gate.out(tcp(turned(there), "A")) == ESTABLISHED
        (one,) = gate.firewall.tracked()
        assert (one.generation, one.cut, one.direction) == (generation, False, "ingress")
        assert gate.come(tcp(there, "A")) == ESTABLISHED


@pytest.mark.parametrize("answer_first", [False, True])
@VERSIONS
def test_a_connection_is_cut_and_stays_cut(gate: Gate, version: int, answer_first: bool) -> None:
    """Its answers are not taken for connections of their own, though the pod may send where it likes."""
    gate.rules(ingress=HTTP)
    there = to_pod(version)
    opened(gate, there)
    gate.rules(ingress=[])
    if answer_first:
        assert gate.out(tcp(turned(there), "A")) == CUT
    assert gate.come(tcp(there, "A")) == CUT
    for _ in range(3):
        gate.age(20_000)
        assert gate.out(tcp(turned(there), "PA", b"x")) == CUT
        assert gate.come(tcp(there, "A")) == CUT
    assert gate.come(tcp(there, "S")) == NO_RULE
    assert gate.come(tcp(there, "A")) == CUT
    # A connection of its own may take the same ports.
    assert gate.out(tcp(turned(there), "S")) == FREE
    assert gate.come(tcp(there, "SA")) == ESTABLISHED


@VERSIONS
def test_a_cut_connection_comes_back_with_its_permission(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP, egress=[])
    there = to_pod(version)
    opened(gate, there)
    gate.rules(ingress=[], egress=[])
    assert gate.come(tcp(there, "A")) == CUT
    gate.rules(ingress=HTTP, egress=[])
    assert gate.out(tcp(turned(there), "A")) == ESTABLISHED
    assert state(gate) == "open"
    gate.age(20_000)
    assert gate.come(tcp(there, "A")) == ESTABLISHED


@VERSIONS
def test_a_cut_flow_of_datagrams_is_over_after_half_a_minute(gate: Gate, version: int) -> None:
    gate.rules(ingress=ANY_UDP)
    there = to_pod(version, 53)
    gate.come(udp(there))
    gate.out(udp(turned(there)))
    gate.rules(ingress=[])
    assert gate.out(udp(turned(there))) == CUT
    assert gate.come(udp(there)) == CUT
    gate.age(20)
    assert gate.out(udp(turned(there))) == CUT
    gate.age(11)
    assert gate.come(udp(there)) == NO_RULE
    assert gate.out(udp(turned(there))) == FREE


@VERSIONS
def test_connections_of_an_unselected_pod_have_a_direction_when_a_policy_comes(
    gate: Gate, version: int
) -> None:
    there = from_pod(version)
    assert gate.out(tcp(there, "S")) == FREE
    gate.come(tcp(turned(there), "SA"))
    gate.out(tcp(there, "A"))
    gate.rules(ingress=[])
    assert gate.come(tcp(turned(there), "A")) == ESTABLISHED
    gate.rules(egress=[])
    assert gate.come(tcp(turned(there), "A")) == CUT


# Connections that are older than the firewall


@VERSIONS
def test_replies_of_older_connections_are_adopted_for_a_while(gate: Gate, version: int) -> None:
    gate.rules(ingress=[], egress=HTTP)
    reply = turned(from_pod(version))
    assert gate.come(tcp(reply, "A")) == NO_RULE
    gate.adopt_until((1 << 63) - 1)
    assert gate.come(tcp(reply, "SA")) == NO_RULE
    assert gate.come(tcp(turned(from_pod(version, 81)), "A")) == NO_RULE
    assert gate.come(udp(reply)) == NO_RULE
    assert gate.come(tcp(reply, "A")) == Outcome("PASS", "adopted")
    (one,) = gate.firewall.tracked()
    assert (one.direction, one.state) == ("egress", "open")
    gate.adopt_until(0)
    assert gate.come(tcp(reply, "A")) == ESTABLISHED
    assert gate.out(tcp(from_pod(version), "A")) == ESTABLISHED


@VERSIONS
def test_a_known_older_connection_is_judged_as_it_began(gate: Gate, version: int) -> None:
    gate.rules(ingress=HTTP)
    ends = ip_address(POD[version]), ip_address(FAR[version])
    gate.firewall.remember(
        [
            Older(gate.pod, *ends, 80, 40000, "ingress"),
            Older(gate.pod, *ends, 22, 40000, "ingress"),
            Older(gate.pod, *ends, 40000, 443, "egress"),
        ]
    )
    assert gate.out(tcp(turned(to_pod(version)), "A")) == ESTABLISHED
    assert gate.out(tcp(turned(to_pod(version, 22)), "A")) == CUT
    assert gate.come(tcp(to_pod(version, 22), "A")) == CUT
    assert gate.come(tcp(turned(from_pod(version, 443)), "A")) == ESTABLISHED


def test_the_table_forgets_the_least_used_ones_first(make_gate: Callable[..., Gate]) -> None:
    """An LRU: there is room for a new connection whatever there are already."""
    gate = make_gate(SMALL)
    gate.rules(egress=ANY_UDP, ingress=[])
    whole, place = udp(from_pod(4, 53)), context(gate.pod, gate.pod)
    for port in range(1000, 7000):
        gate.firewall.programs["from_pod"].test_run(
            changed(whole, 34, port.to_bytes(2, "big")), context=place
        )
    assert gate.come(udp(turned(from_pod(4, 53, source_port=6999)))) == ESTABLISHED
    assert len(gate.firewall.maps["tracked"]) <= 4096


# An end that asks the other way round


@pytest.mark.parametrize("renewed", [False, True])
@VERSIONS
def test_a_reverse_syn_does_not_make_a_connection_the_other_end_s(
    gate: Gate, version: int, renewed: bool
) -> None:
    """The pod's own connection: what comes from its other end may begin connections to the pod, too."""
    gate.rules(ingress=ALL, egress=HTTP)
    there = from_pod(version)
    back = turned(there)
    gate.out(tcp(there, "S"))
    gate.come(tcp(back, "SA"))
    gate.out(tcp(there, "A"))
    assert gate.come(tcp(back, "S")) == RULE
    if renewed:
        gate.rules(ingress=ALL, egress=HTTP)
    # A living end challenges it.
    assert gate.out(tcp(there, "A")) == ESTABLISHED
    assert gate.come(tcp(back, "RA")) == ESTABLISHED
    assert gate.come(tcp(back, "S")) == RULE
    (one,) = gate.firewall.tracked()
    assert one.direction == "egress"
    gate.rules(ingress=ALL, egress=[])
    assert gate.out(tcp(there, "A")) == CUT
    assert gate.come(tcp(back, "A")) == CUT


@VERSIONS
def test_a_reverse_syn_that_is_answered_is_a_connection_of_its_own(gate: Gate, version: int) -> None:
    gate.rules(ingress=ALL, egress=HTTP)
    there = from_pod(version)
    back = turned(there)
    gate.out(tcp(there, "S"))
    gate.come(tcp(back, "SA"))
    gate.out(tcp(there, "A"))
    assert gate.out(tcp(there, "SA")) == ESTABLISHED
    assert gate.firewall.tracked()[0].direction == "egress"
    assert gate.come(tcp(back, "S")) == RULE
    assert gate.out(tcp(there, "SA")) == ESTABLISHED
    assert gate.come(tcp(back, "A")) == ESTABLISHED
    (one,) = gate.firewall.tracked()
    assert (one.direction, one.state) == ("ingress", "open")
    gate.rules(ingress=[], egress=HTTP)
    assert gate.out(tcp(there, "A")) == CUT


@VERSIONS
def test_an_answer_to_a_syn_that_is_not_allowed_any_more(gate: Gate, version: int) -> None:
    gate.rules(ingress=ALL, egress=HTTP)
    there = from_pod(version)
    gate.out(tcp(there, "S"))
    assert gate.come(tcp(turned(there), "S")) == RULE
    gate.rules(ingress=[], egress=HTTP)
    assert gate.out(tcp(there, "SA")) == ESTABLISHED
    assert gate.firewall.tracked()[0].direction == "egress"


@VERSIONS
def test_an_association_asked_for_the_other_way_round(gate: Gate, version: int) -> None:
    """Its end answers an INIT in the middle of it, and goes on: that alone makes it none of the other end's."""
    gate.rules(ingress=ALL, egress=ALL)
    there = from_pod(version, 3868)
    back = turned(there)
    for packet, way in ((1, gate.out), (2, gate.come), (10, gate.out), (11, gate.come), (0, gate.out)):
        way(sctp(there if way == gate.out else back, packet))
    assert gate.come(sctp(back, 1)) == RULE
    assert gate.out(sctp(there, 2)) == ESTABLISHED
    assert gate.firewall.tracked()[0].direction == "egress"
    gate.rules(ingress=ALL, egress=[])
    assert gate.out(sctp(there, 0)) == CUT
    # Of one that is cut nothing passes but the answer.
    assert gate.come(sctp(back, 10)) == CUT
    assert gate.come(sctp(back, 1)) == RULE
    assert gate.out(sctp(there, 2)) == ESTABLISHED
    assert gate.firewall.tracked()[0].direction == "ingress"
    assert gate.come(sctp(back, 10)) == ESTABLISHED


@VERSIONS
def test_an_association_made_anew_by_the_other_end_is_that_one_s(gate: Gate, version: int) -> None:
    gate.rules(ingress=ALL, egress=ALL)
    there = from_pod(version, 3868)
    gate.out(sctp(there, 1))
    gate.come(sctp(turned(there), 1))
    gate.out(sctp(there, 2))
    gate.come(sctp(turned(there), 10))
    assert gate.out(sctp(there, 11)) == ESTABLISHED
    assert gate.firewall.tracked()[0].direction == "ingress"


@VERSIONS
def test_an_echo_asked_for_the_other_way_round(gate: Gate, version: int) -> None:
    gate.rules(ingress=ALL, egress=ALL)
    there = from_pod(version)
    gate.out(echo(there))
    assert gate.come(echo(turned(there))) == RULE
    assert gate.out(echo(there, reply=True)) == ESTABLISHED
    assert gate.come(echo(turned(there))) == RULE
    assert gate.firewall.tracked()[0].direction == "egress"
    gate.rules(ingress=[], egress=ALL)
    assert gate.come(echo(turned(there))) == NO_RULE


@VERSIONS
def test_a_pod_tells_errors_to_whom_they_are_about_only(gate: Gate, version: int) -> None:
    gate.rules(ingress=ANY_UDP, egress=[])
    there = to_pod(version, 53)
    gate.come(udp(there))
    assert gate.out(error(Ends(POD[version], OTHER[version]), udp(there))) == NO_RULE
    assert gate.out(error(turned(there), udp(there))) == RELATED


@pytest.mark.parametrize("protocol", [33, 136])
@VERSIONS
def test_the_ports_of_rarer_protocols_count(gate: Gate, version: int, protocol: int) -> None:
    gate.rules(ingress=[], egress=ALL)
    mine, other = (bytes((156, 64, 0, port)) + bytes(12) for port in (80, 81))
    assert gate.out(of_protocol(from_pod(version), protocol, mine)) == RULE
    back = [one[2:4] + one[:2] + one[4:] for one in (mine, other)]
    assert gate.come(of_protocol(turned(from_pod(version)), protocol, back[1])) == NO_RULE
    assert gate.come(of_protocol(turned(from_pod(version)), protocol, back[0])) == ESTABLISHED


@VERSIONS
def test_a_refused_or_broken_first_fragment_leaves_no_ports(gate: Gate, version: int) -> None:
    for broken in (False, True):
        gate.rules(ingress=[allow(FAR_IDENTITY, 17, 53)], egress=[])
        first, later = fragments(to_pod(version, 53))
        again = fragments(to_pod(version, 54))[0]
        if broken and version == 4:
            again = changed(first[:38], 16, b"\0\x18")
        elif broken:
            again = changed(first[:66], 18, b"\0\x0c")
        assert gate.come(first) in (RULE, ESTABLISHED)
        assert gate.come(again) == (Outcome("DROP", "malformed_l4") if broken else NO_RULE)
        assert gate.come(later) == LOST


@VERSIONS
def test_later_fragments_to_the_node_have_no_other_s_ports(gate: Gate, version: int) -> None:
    gate.rules(host=True, ingress=[allow(FAR_IDENTITY, 17, 53)], egress=[])
    first, later = fragments(Ends(FAR[version], NODE[version], 40000, 53))
    assert gate.wire_in(first) == RULE
    broken = changed(first[:38], 16, b"\0\x18") if version == 4 else changed(first[:66], 18, b"\0\x0c")
    assert gate.wire_in(broken) == Outcome("DROP", "malformed_l4")
    assert gate.wire_in(later) == LOST


@VERSIONS
def test_a_connection_that_is_cut_keeps_the_rule_that_allowed_it(gate: Gate, version: int) -> None:
    gate.rules(ingress=[allow(OTHER_IDENTITY), *HTTP], egress=[])
    opened(gate, to_pod(version))
    with gate.firewall.verdicts() as ring:
        ring.read()
        gate.rules(ingress=[], egress=[])
        assert gate.come(tcp(to_pod(version), "A")) == CUT
        (one,) = ring.read()
        assert one["rule"] == 2
