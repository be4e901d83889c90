"""Packets that nobody would send: whatever they are, an isolated pod gets none, and each is counted once."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kernel.firewall.scene import Gate, from_pod, to_pod
from tests.kernel.firewall.shapes import echo, error, fragments, sctp
from tests.kernel.loadbalancer.packets import options, routing, tcp, udp, with_extensions

WHOLE = [
    shape(ends)
    for version in (4, 6)
    for ends in (to_pod(version), from_pod(version))
    for shape in (
        tcp,
        udp,
        echo,
        lambda ends: sctp(ends, 1),
        lambda ends: error(ends, udp(ends)),
        lambda ends: fragments(ends)[0],
        lambda ends: fragments(ends)[1],
    )
] + [with_extensions([options(0), routing(), options(60)], shape)(to_pod(6)) for shape in (tcp, udp)]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A packet with some octets replaced behind its layer-2 addresses, cut or made longer."""
    packet = bytearray(draw(st.sampled_from(WHOLE)))
    for place, octet in draw(
        st.lists(st.tuples(st.integers(12, len(packet) - 1), st.integers(0, 255)), max_size=6)
    ):
        packet[place] = octet
    length = draw(st.integers(54, max(54, len(packet) + 8))) if draw(st.booleans()) else len(packet)
    return bytes(packet[:length].ljust(54, b"\0"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged())
@example(bytes(54))
def test_an_isolated_pod_is_not_reached(gate: Gate, packet: bytes) -> None:
    gate.rules(ingress=[], egress=[])
    gate.firewall.maps["tracked"].clear()
    for outcome in (gate.come(packet), gate.out(packet)):
        # By chance it may come to be ARP, a link's own message, the node's, or for the pod itself.
        assert outcome.verdict == "DROP" or outcome.reason in ("link", "node", "self"), outcome
