"""Random pods and policies: what the evaluator says of a connection is what the programs do with its first packet."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from functools import cache
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from hookline.datapath.firewall.firewall import NODE_ITSELF, Rows, Tunables, packed
from hookline.model import Resource
from hookline.policy import Compiled, Compiler, Evaluator, Probe, World
from tests import policy_worlds as worlds
from tests.kernel.firewall.scene import SMALL, Gate, context
from tests.kernel.firewall.shapes import echo, sctp
from tests.kernel.loadbalancer.packets import Ends, tcp, udp
from tests.policy_worlds import Address

INTERFACES = ("pod0", "pod1", "spare0", "spare1", "lo")
QUESTIONS = [(protocol, port) for protocol in worlds.PROTOCOLS for port in worlds.PORTS] + [("ICMP", 0)]
NODE_IDENTITY = 2
PEERS = [
    ip_address(text)
    for text in (
        *worlds.STRANGERS,
        *(address for pair in worlds.POD_ADDRESSES for address in pair),
        *(address for pair in worlds.NODE_ADDRESSES.values() for address in pair),
    )
]


@pytest.fixture
def gate(make_gate: Callable[[Tunables], Gate]) -> Gate:
    """With room for all that a random world asks for."""
    return make_gate(dataclasses.replace(SMALL, identities=1024, rules=16384, rule_counts=1024))


@cache
def first_packet(source: Address, target: Address, protocol: str, port: int) -> bytes:
    """Of a connection."""
    ends = Ends(str(source), str(target), 40000, port)
    if protocol == "ICMP":
        return echo(ends)
    if protocol == "SCTP":
        return sctp(ends, 1)
    return tcp(ends) if protocol == "TCP" else udp(ends)


def rows_of(world: World, compiled: Compiled, index_of: dict[str, int]) -> Rows:
    """As a node has them whose pods are at these interfaces."""
    endpoints = {index_of[pod]: row for pod, row in compiled.endpoints.items() if pod}
    if "" in compiled.endpoints:
        endpoints[NODE_ITSELF] = compiled.endpoints[""]
    identities = {
        key: (identity, index_of[pod] if pod else 0) for key, (identity, pod) in compiled.identities.items()
    }
    return Rows(endpoints, identities, compiled.rules, frozenset(map(packed, world.own_addresses)))


def passes(gate: Gate, program: str, packet: bytes, interface: int, came: int) -> bool:
    result = gate.firewall.programs[program].test_run(packet, context=context(interface, came))
    return result.verdict != 2


@settings(
    max_examples=12,
    deadline=None,
    # An example takes long to run, and many times as long to make smaller.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(worlds.worlds(), st.lists(st.sampled_from(QUESTIONS), min_size=3, max_size=3, unique=True))
def test_the_programs_do_what_the_evaluator_says(
    gate: Gate, resources: list[Resource], questions: list[tuple[str, int]]
) -> None:
    world = World.of(resources, node=worlds.NODE)
    compiled = Compiler().compile(world)
    here = [name for name in compiled.endpoints if name]
    index_of = dict(zip(here, map(socket.if_nametoindex, INTERFACES), strict=False))
    gate.firewall.commit(rows_of(world, compiled, index_of))
    gate.firewall.maps["tracked"].clear()
    evaluator = Evaluator(world)
    asked = 0

    def came_by(peer: Address) -> int:
        """The interface that its packets come by: its own, the uplink, or none where it is the node itself."""
        identity, owner = compiled.identities.get((packed(peer), 128), (0, None))
        return 0 if identity == NODE_IDENTITY else index_of.get(owner or "", gate.uplink)

    for pod, index in index_of.items():
        for address in world.pods[pod].addresses:
            owner = compiled.identities.get((packed(address), 128), (0, None))[1]
            for peer in PEERS:
                if peer.version != address.version or peer in world.pods[pod].addresses or owner != pod:
                    continue
                for protocol, port in questions:
                    out = Probe(pod, str(peer), protocol, port, address.version)
                    back = Probe(str(peer), pod, protocol, port, address.version)
                    packet = first_packet(address, peer, protocol, port)
                    said = evaluator.decide(out).egress
                    assert passes(gate, "from_pod", packet, index, index) == said.allowed, (out, said)
                    packet = first_packet(peer, address, protocol, port)
                    said = evaluator.decide(back).ingress
                    came = came_by(peer)
                    assert passes(gate, "to_pod", packet, index, came) == said.allowed, (back, said)
                    asked += 1
    if "" in compiled.endpoints:
        for own in world.own_addresses:
            for peer in PEERS:
                if peer.version != own.version or peer in world.own_addresses or _is_here(world, peer):
                    continue
                for protocol, port in questions:
                    out = Probe(str(own), str(peer), protocol, port, own.version)
                    back = Probe(str(peer), str(own), protocol, port, own.version)
                    said = evaluator.decide(out).egress
                    packet = first_packet(own, peer, protocol, port)
                    assert passes(gate, "to_wire", packet, gate.uplink, 0) == said.allowed, (out, said)
                    said = evaluator.decide(back).ingress
                    packet = first_packet(peer, own, protocol, port)
                    assert passes(gate, "from_wire", packet, gate.uplink, gate.uplink) == said.allowed, (
                        back,
                        said,
                    )
                    asked += 1
    assume(asked)


def _is_here(world: World, address: Address) -> bool:
    """Whether it is a pod's of this node: what is between that and the node does not cross the uplink."""
    return any(
        address in pod.addresses and pod.spec.node_name == world.node and not pod.has_ended
        for pod in world.pods.values()
    )
