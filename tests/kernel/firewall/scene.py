"""A node with two pods behind veths and an uplink, and a firewall whose programs are run on packets by hand.

    pod ── p0 ══ pod0 ── node ── uplink ══ up ── far
    peer ─ p1 ══ pod1 ──┘

`POD` is the pod that policies are for, `PEER` another one of the node; `FAR` and `OTHER` are beyond the uplink.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from hookline import net
from hookline.datapath.firewall.firewall import NODE_ITSELF, Firewall, Rows, RuleKey, Tunables, packed
from hookline.policy import PolicyRow
from tests.kernel.loadbalancer.packets import Ends
from tests.kernel.loadbalancer.scene import ip_batch

POD = {4: "10.1.0.2", 6: "fd00:1::2"}
PEER = {4: "10.1.0.3", 6: "fd00:1::3"}
NODE = {4: "10.0.0.1", 6: "fd00::1"}
FAR = {4: "10.2.0.9", 6: "fd00:2::9"}
OTHER = {4: "10.3.0.9", 6: "fd00:3::9"}
NETS = {4: ("10.2.0.0", "10.3.0.0", 112), 6: ("fd00:2::", "fd00:3::", 32)}
TCP, UDP, SCTP = 6, 17, 132
ANY_IDENTITY, WORLD_IDENTITY = 0, 1
FAR_IDENTITY, OTHER_IDENTITY, POD_IDENTITY, PEER_IDENTITY = 16, 17, 18, 19
SMALL = Tunables(
    endpoints=64, identities=64, rules=256, own_addresses=16, tracked=4096, fragments=64, rule_counts=256
)
SETS = {"ingress": 11, "egress": 12, "audit_ingress": 13, "audit_egress": 14}

_NODE = """
link add pod0 type veth peer name p0 netns POD
link add pod1 type veth peer name p1 netns PEER
link add uplink type veth peer name up netns FAR
link add spare0 type veth peer name spare1
link set lo up
link set pod0 up
link set pod1 up
link set uplink up
address add 10.0.0.1/24 dev uplink
address add fd00::1/64 dev uplink nodad
address add 169.254.1.1/32 dev pod0
address add 169.254.1.1/32 dev pod1
address add fe80::1/64 dev pod0 nodad
address add fe80::1/64 dev pod1 nodad
route add 10.1.0.2 dev pod0
route add 10.1.0.3 dev pod1
route add fd00:1::2 dev pod0
route add fd00:1::3 dev pod1
route add 10.2.0.0/16 via 10.0.0.9
route add fd00:2::/32 via fd00::9
"""
_POD = """
link set lo up
link set dev LINK up
address add V4/32 dev LINK
address add V6/128 dev LINK nodad
route add 169.254.1.1 dev LINK
route add default via 169.254.1.1
route add default via fe80::1 dev LINK
"""
_FAR = """
link set lo up
link set dev up up
address add 10.0.0.9/24 dev up
address add 10.2.0.9/32 dev up
address add fd00::9/64 dev up nodad
address add fd00:2::9/128 dev up nodad
route add default via 10.0.0.1 src 10.2.0.9
route add default via fd00::1 src fd00:2::9
"""


@dataclass(frozen=True)
class Scene:
    """The namespaces' files."""

    node: Path
    pod: Path
    peer: Path
    far: Path

    @classmethod
    @contextmanager
    def built(cls, name: str) -> Iterator[Scene]:
        """Makes it, and removes it at the end."""
        names = [f"hl-{name}-{part}" for part in ("node", "pod", "peer", "far")]
        try:
            scene = cls(*(net.create(one) for one in names))
            for path in (scene.node, scene.pod, scene.peer, scene.far):
                with net.inside(path):
                    net.write_sysctls(
                        {
                            "ipv4/ip_forward": int(path == scene.node),
                            "ipv6/conf/all/disable_ipv6": 0,
                            "ipv6/conf/all/forwarding": int(path == scene.node),
                            "ipv4/conf/all/rp_filter": 0,
                            "ipv4/conf/default/rp_filter": 0,
                            "ipv6/conf/default/accept_dad": 0,
                        }
                    )
            commands = _NODE
            for place, actual in zip(("POD", "PEER", "FAR"), names[1:], strict=True):
                commands = commands.replace(f"netns {place}\n", f"netns {actual}\n")
            ip_batch(scene.node, commands)
            for path, link, own in ((scene.pod, "p0", POD), (scene.peer, "p1", PEER)):
                ip_batch(path, _POD.replace("LINK", link).replace("V4", own[4]).replace("V6", own[6]))
            ip_batch(scene.far, _FAR)
            yield scene
        finally:
            for one in names:
                net.delete(one)


def key(address: str) -> bytes:
    """An address as the programs keep it."""
    return packed(ip_address(address))


Allowed = tuple[int, int | None, int, int]
"""What a rule is for: identity, protocol, port, and how many of the port's bits count."""


def allow(identity: int, protocol: int | None = None, port: int = 0, bits: int | None = None) -> Allowed:
    """A rule, by default for a port whole or for all of them."""
    return identity, protocol, port, bits if bits is not None else 16 if port else 0


@dataclass(frozen=True)
class Outcome:
    """What became of a packet; an empty reason says that it was none of the firewall's business."""

    verdict: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict} `{self.reason}`" if self.reason else self.verdict


class Gate:
    """A firewall, loaded and not attached."""

    def __init__(self, firewall: Firewall) -> None:
        self.firewall = firewall
        self.pod, self.peer, self.uplink = (
            socket.if_nametoindex(name) for name in ("pod0", "pod1", "uplink")
        )
        identities: dict[tuple[bytes, int], tuple[int, int]] = {}
        for version in (4, 6):
            far, other, bits = NETS[version]
            identities[key(POD[version]), 128] = (POD_IDENTITY, self.pod)
            identities[key(PEER[version]), 128] = (PEER_IDENTITY, self.peer)
            identities[key(NODE[version]), 128] = (2, 0)
            identities[key(far), bits] = (FAR_IDENTITY, 0)
            identities[key(other), bits] = (OTHER_IDENTITY, 0)
        self.plain = Rows(
            endpoints={self.pod: PolicyRow(), self.peer: PolicyRow()},
            identities=identities,
            own_addresses=frozenset(key(address) for address in NODE.values()),
        )

    def clear(self) -> None:
        """No connections, no fragments, both pods without policies."""
        for name in ("tracked", "fragments"):
            self.firewall.maps[name].clear()
        self.firewall.sample(0)
        self.adopt_until(0)
        self.firewall.commit(self.plain)

    def adopt_until(self, at_ns: int) -> None:
        """Ends the time in which replies are taken for those of older connections."""
        self.firewall.maps["active"].view()["adopt_until_ns"][0] = at_ns

    def rules(
        self,
        *,
        ingress: Sequence[Allowed] | None = None,
        egress: Sequence[Allowed] | None = None,
        audit_ingress: Sequence[Allowed] | None = None,
        audit_egress: Sequence[Allowed] | None = None,
        host: bool = False,
        default_allow: bool = False,
    ) -> int:
        """Gives the pod, or the node, what is allowed by direction; None: no policy. Numbers count from 1."""
        given = {
            "ingress": ingress,
            "egress": egress,
            "audit_ingress": audit_ingress,
            "audit_egress": audit_egress,
        }
        rules: dict[RuleKey, tuple[int, bool]] = {}
        for name, allowed in given.items():
            for one in allowed or ():
                rules[(SETS[name], *one)] = (len(rules) + 1, True)
        sets = {name: SETS[name] for name, allowed in given.items() if allowed is not None}
        row = PolicyRow(**sets, default_allow_ingress=default_allow, default_allow_egress=default_allow)
        index = NODE_ITSELF if host else self.pod
        endpoints = {**self.plain.endpoints, index: row}
        return self.firewall.commit(replace(self.plain, endpoints=endpoints, rules=rules))

    # -- running

    def out(self, packet: bytes) -> Outcome:
        """What the pod sends."""
        return self.run("from_pod", packet, self.pod, self.pod)

    def come(self, packet: bytes, *, by_node: bool = False, by_peer: bool = False) -> Outcome:
        """What comes to the pod, from elsewhere, from the node itself or from the other pod."""
        came = 0 if by_node else self.peer if by_peer else self.uplink
        return self.run("to_pod", packet, self.pod, came)

    def wire_out(self, packet: bytes, *, forwarded: bool = False) -> Outcome:
        """What leaves by the uplink."""
        return self.run("to_wire", packet, self.uplink, self.pod if forwarded else 0)

    def wire_in(self, packet: bytes) -> Outcome:
        """What comes by the uplink."""
        return self.run("from_wire", packet, self.uplink, self.uplink)

    def run(self, name: str, packet: bytes, interface: int, came: int) -> Outcome:
        """Runs a program, and checks that it counted the packet once, or not at all."""
        before = self.firewall.totals().reasons
        result = self.firewall.programs[name].test_run(packet, context=context(interface, came))
        after = self.firewall.totals().reasons
        grown = {
            where: tuple(a - b for a, b in zip(now, before.get(where, (0, 0)), strict=True))
            for where, now in after.items()
            if now != before.get(where)
        }
        assert result.data == packet
        verdict = {0xFFFFFFFF: "PASS", 2: "DROP"}[result.verdict]
        if not grown:
            assert verdict == "PASS"
            return Outcome(verdict, "")
        (((side, reason), counted),) = grown.items()
        assert side == ("egress" if name in ("from_pod", "to_wire") else "ingress")
        assert counted == (1, len(packet))
        assert (reason in self.firewall.drops) == (verdict == "DROP")
        return Outcome(verdict, reason)

    def age(self, seconds: float) -> None:
        """Makes all connections and fragments older."""
        for name, member in (("tracked", "last_seen_ns"), ("fragments", "seen_ns")):
            table = self.firewall.maps[name]
            keys, values = table.read()
            if len(keys):
                values[member] = (values[member].astype("i8") - int(seconds * 1e9)).astype("u8")
                table.write(keys, values)


def context(interface: int, came: int) -> bytes:
    """``struct __sk_buff`` of a packet on one interface that came by another; 0: it was made here."""
    raw = bytearray(192)
    struct.pack_into("=II", raw, 36, came, interface)
    return bytes(raw)


def to_pod(version: int, port: int = 80, source: dict[int, str] = FAR, source_port: int = 40000) -> Ends:
    """From beyond the node to the pod."""
    return Ends(source[version], POD[version], source_port, port)


def from_pod(version: int, port: int = 80, target: dict[int, str] = FAR, source_port: int = 40000) -> Ends:
    """From the pod to beyond the node."""
    return Ends(POD[version], target[version], source_port, port)


def turned(ends: Ends) -> Ends:
    """The other direction."""
    return Ends(ends.destination, ends.source, ends.destination_port, ends.source_port)
