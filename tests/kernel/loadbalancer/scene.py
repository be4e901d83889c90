"""A node in a network namespace of its own, a client beyond its uplink, a server beyond another link; and a load
balancer whose tables a test fills by hand.

    client ── up ══ uplink ── node ── other ══ ot ── server
                                └─── narrow (1280 octets)
"""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from hookline import bpf, net
from hookline.datapath.loadbalancer.balancer import Totals, totals
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import Ends

VERDICTS = ("ABORTED", "DROP", "PASS", "TX", "REDIRECT")
ACTIVE, LOCAL, DSR = 1, 2, 4
ADDRESS, NODE_OWN, MODULO = 1, 2, 4
STATE_STARTING, STATE_ACTIVE, STATE_DRAINING, STATE_DOWN = 1, 2, 3, 4
NAT, DSR_KIND, LOCAL_KIND, NAT_REPLY, LOCAL_REPLY = 1, 2, 3, 4, 5
CLOSING = 1
UNSPEC = 0xFFFFFFFF
SIZES = {
    "connections": 4096,
    "affinity": 1024,
    "services": 64,
    "service_metrics": 64,
    "backends": 64,
    "backend_metrics": 64,
    "maglev": 64,
}

# The rows of `struct metrics`: five verdicts, then reasons, replies, handed, answered.
_REASONS, _REPLIES, _HANDED, _ANSWERED = 5, 20, 21, 22
_XDP_CONTEXT = struct.Struct(
    "=6I"
)  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex

_NODE = f"""
link add uplink address {packets.UPLINK_MAC} type veth peer name up address {packets.CLIENT_MAC} netns CLIENT
link add other address {packets.OTHER_MAC} type veth peer name ot address {packets.SERVER_MAC} netns SERVER
link add narrow mtu 1280 type veth peer name na mtu 1280 netns SERVER
link set dev lo up
link set dev uplink up
link set dev other up
link set dev narrow up
address add 10.0.0.1/24 dev uplink
address add 10.0.1.1/24 dev other
address add 10.0.2.1/24 dev narrow
address add 2001:db8::1/64 dev uplink nodad
address add 2001:db8:1::1/64 dev other nodad
address add 2001:db8:2::1/64 dev narrow nodad
neighbour replace 10.0.0.2 lladdr {packets.BACKEND_MAC} nud permanent dev uplink
neighbour replace 10.0.0.9 lladdr {packets.CLIENT_MAC} nud permanent dev uplink
neighbour replace 10.0.1.2 lladdr {packets.SERVER_MAC} nud permanent dev other
neighbour replace 10.0.2.2 lladdr {packets.SERVER_MAC} nud permanent dev narrow
neighbour replace 2001:db8::2 lladdr {packets.BACKEND_MAC} nud permanent dev uplink
neighbour replace 2001:db8::9 lladdr {packets.CLIENT_MAC} nud permanent dev uplink
neighbour replace 2001:db8:1::2 lladdr {packets.SERVER_MAC} nud permanent dev other
neighbour replace 2001:db8:2::2 lladdr {packets.SERVER_MAC} nud permanent dev narrow
route add 10.0.4.0/24 via inet6 2001:db8::78 dev uplink
route add unreachable {packets.NOWHERE[4]}
route add unreachable {packets.NOWHERE[6]}
"""
_CLIENT = """
link set dev lo up
link set dev up up
address add 10.0.0.9/24 dev up
address add 10.0.0.77/24 dev up
address add 2001:db8::9/64 dev up nodad
address add 2001:db8::77/64 dev up nodad
route add default via 10.0.0.1
route add default via 2001:db8::1
"""
_SERVER = """
link set dev lo up
link set dev ot up
link set dev na up
address add 10.0.1.2/24 dev ot
address add 2001:db8:1::2/64 dev ot nodad
route add default via 10.0.1.1
route add default via 2001:db8:1::1
"""


@dataclass(frozen=True)
class Scene:
    """The three namespaces' files."""

    node: Path
    client: Path
    server: Path

    @classmethod
    @contextmanager
    def built(cls, name: str) -> Iterator[Scene]:
        """Makes it, and removes it at the end."""
        names = [f"hl-{name}-{part}" for part in ("node", "client", "server")]
        try:
            scene = cls(*(net.create(one) for one in names))
            for path in (scene.node, scene.client, scene.server):
                with net.inside(path):
                    net.write_sysctls(
                        {
                            "ipv4/ip_forward": 1,
                            "ipv6/conf/all/disable_ipv6": 0,
                            "ipv6/conf/all/forwarding": 1,
                            "ipv4/conf/all/rp_filter": 0,
                            "ipv4/conf/default/rp_filter": 0,
                        }
                    )
            ip_batch(scene.node, _NODE.replace("CLIENT", names[1]).replace("SERVER", names[2]))
            ip_batch(scene.client, _CLIENT)
            ip_batch(scene.server, _SERVER)
            for path, links in ((scene.client, ["up"]), (scene.server, ["ot"])):
                with net.inside(path):
                    for link in links:
                        net.set_offloads(link, gro=True, tx_checksum=False)
            yield scene
        finally:
            for one in names:
                net.delete(one)


def ip_batch(namespace: Path, commands: str) -> None:
    """Runs the commands of ``ip`` in a namespace."""
    command = ["ip", "-netns", namespace.name, "-batch", "-"]
    done = subprocess.run(command, input=commands, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def packed(address: str) -> bytes:
    """An address as the programs keep it."""
    octets = ip_address(address).packed
    return octets if len(octets) == 16 else bytes(10) + b"\xff\xff" + octets


def flow(ends: Ends, protocol: str = "TCP") -> bytes:
    """``struct flow``."""
    number = packets.TCP_NUMBER if protocol == "TCP" else packets.UDP_NUMBER
    ports = struct.pack("!HHB3x", ends.source_port, ends.destination_port, number)
    return packed(ends.source) + packed(ends.destination) + ports


@dataclass(frozen=True)
class Outcome:
    """What became of a packet. ``reason`` is empty unless it was refused, ``answered`` if that was said to the sender;
    ``metadata`` lies before the packet."""

    verdict: str
    data: bytes
    reason: str
    handed: int
    rewritten: bool
    metadata: bytes
    answered: bool = False

    def __str__(self) -> str:
        text = f"{self.verdict} `{self.reason}`" if self.reason else self.verdict
        if self.answered:
            return text + ", answered"
        return text + (", rewritten" if self.rewritten else "") + (", handed on" if self.handed else "")

    @property
    def packet(self) -> Packet:
        """The packet afterwards."""
        return Ether(self.data)

    @property
    def ends(self) -> Ends:
        """Its ends afterwards; what follows IP directly must be TCP or UDP."""
        packet = self.packet
        layer3 = packet[IP] if IP in packet else packet[IPv6]
        layer4 = layer3.payload
        ttl = layer3.ttl if IP in packet else layer3.hlim
        return Ends(layer3.src, layer3.dst, layer4.sport, layer4.dport, ttl, packet.src, packet.dst)


class Balancer:
    """The programs and maps, loaded and not attached, with tables filled by hand."""

    def __init__(
        self,
        obj: bpf.Object,
        constants: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        for name, value in (constants or {}).items():
            obj.constants[name] = value
        for name, size in (SIZES | dict(sizes or {})).items():
            obj.resize(name, size)
        obj.load()
        self.obj = obj
        self._reasons = [name.removeprefix("REASON_").lower() for name in obj.btf.enums()["drop_reason"]]
        assert len(self._reasons) == _REPLIES - _REASONS + 1
        self.maps = obj.maps
        self._pages = obj.maps["maglev"].view()["backends"]
        self._next_row, self._next_page, self._next_id = 1, 0, 1

    def clear(self) -> None:
        """Empties the tables; counters go on."""
        self.maps["services"].clear()
        self.maps["connections"].clear()
        self.maps["affinity"].clear()
        for row in range(1, self._next_row):
            self.maps["backends"][row] = {}
        self._pages[:] = 0
        self._next_row, self._next_page, self._next_id = 1, 0, 1

    # -- filling

    def backend(self, address: str, port: int = 8080, *, source: str = "", flags: int = 0) -> int:
        """A row of `backends`; ``source`` as the node would choose it for those beyond it."""
        row = self._next_row
        self._next_row += 1
        generation = int(self.maps["backends"][row]["generation"]) + 1
        version = ip_address(address).version
        if not source:
            source = (
                packets.NODE_OTHER[version] if address == packets.SERVER[version] else packets.NODE[version]
            )
        self.maps["backends"][row] = {
            "address": {"words": packed(address)},
            "source": {"words": packed(source)},
            "port": socket.htons(port),
            "generation": generation,
            "flags": ACTIVE | flags,
            "state": STATE_ACTIVE,
            "pool": 1,
        }
        return row

    def retire(self, row: int) -> None:
        """Makes a backend's row inactive."""
        self._set_backend(row, flags=0)

    def renew(self, row: int) -> None:
        """Gives a row to another backend: only its generation tells."""
        self._set_backend(row, generation=int(self.maps["backends"][row]["generation"]) + 1)

    def set_state(self, row: int, state: int) -> None:
        """Changes where a backend is in its life."""
        self._set_backend(row, state=state)

    def set_pool(self, row: int, pool: int) -> None:
        """Makes a backend another pool's."""
        self._set_backend(row, pool=pool)

    def _set_backend(self, row: int, **members: int) -> None:
        value = self.maps["backends"][row]
        for name, number in members.items():
            value[name] = number
        self.maps["backends"][row] = value

    def service(
        self,
        address: str,
        *rows: int,
        port: int = 80,
        protocol: str = "TCP",
        flags: int = 0,
        own: bool = False,
        affinity_seconds: int = 0,
        pool: int = 1,
    ) -> int:
        """A service whose table has one slot for each row given; returns its number."""
        number, page = self._next_id, self._next_page
        self._next_id += 1
        self._next_page += 1
        self._pages[page][: len(rows)] = rows
        self.set_service(
            address,
            port,
            protocol,
            {
                "id": number,
                "table_page": page,
                "table_size": len(rows),
                "flags": flags,
                "affinity_seconds": affinity_seconds,
                "pool": pool,
            },
        )
        self.set_service(address, 0, "", {"flags": ADDRESS | (NODE_OWN if own else 0)})
        return number

    def set_service(self, address: str, port: int, protocol: str, members: Mapping[str, int]) -> None:
        """Writes a row of `services`."""
        number = {"TCP": packets.TCP_NUMBER, "UDP": packets.UDP_NUMBER, "": 0}[protocol]
        self.maps["services"][packed(address) + struct.pack("!HBx", port, number)] = dict(members)

    # -- running

    def balance(self, packet: bytes, ingress: str = "uplink", metadata: bytes = b"") -> Outcome:
        """Runs ``balance``, and checks that its counters say what it did."""
        start, length = len(metadata), len(packet)
        index = socket.if_nametoindex(ingress)
        context = _XDP_CONTEXT.pack(start, start + length, 0, index, 0, 0)
        before = self._counts()
        result = self.obj.programs["balance"].test_run(metadata + packet, context=context)
        grown = self._counts() - before
        start = _XDP_CONTEXT.unpack(result.context)[0]
        data = result.data[start:]
        verdict = VERDICTS[result.verdict]
        expected = np.zeros_like(grown)
        expected[result.verdict] = (1, length)
        reason = ""
        answered = bool(grown[_ANSWERED, 0])
        expected[_ANSWERED] = grown[_ANSWERED]
        if answered:
            assert verdict in ("TX", "REDIRECT")
            assert grown[_ANSWERED, 0] == 1
        if answered or verdict in ("DROP", "ABORTED"):
            (number,) = np.flatnonzero(grown[_REASONS:_REPLIES, 0])
            expected[_REASONS + number] = (1, length)
            reason = self._reasons[number]
        handed = int(grown[_HANDED, 0])
        grown[_HANDED] = 0
        assert np.array_equal(grown, expected)
        return Outcome(verdict, data, reason, handed, data != packet, result.data[:start], answered)

    def reply(self, packet: bytes, egress: str = "uplink") -> tuple[bytes, int]:
        """Runs ``reply``; the packet afterwards, and how many replies were counted."""
        before = self._counts()
        result = self.obj.programs["reply"].test_run(packet, egress=egress)
        assert result.verdict == UNSPEC
        grown = self._counts() - before
        assert not grown[:_REPLIES].any()
        return result.data, int(grown[_REPLIES, 0])

    def _counts(self) -> npt.NDArray[np.int64]:
        """``struct metrics`` over all CPUs: rows of packets and bytes, as the structure has them."""
        raw: npt.NDArray[np.int64] = np.ascontiguousarray(self.maps["metrics"][0]).view(np.int64)
        summed: npt.NDArray[np.int64] = raw.reshape(-1, _ANSWERED + 1, 2).sum(axis=0)
        return summed

    def totals(self) -> Totals:
        """The node's counters."""
        return totals(self.maps)

    # -- reading

    def affinity(self, client: str, pool: int = 1) -> Any:
        """A client's row of `affinity`, or None."""
        return self.maps["affinity"].get(packed(client) + struct.pack("=Q", pool))

    def age_affinity(self, client: str, seconds: float, pool: int = 1) -> None:
        """Makes a client's row older."""
        key = packed(client) + struct.pack("=Q", pool)
        row = self.maps["affinity"][key]
        assert row["last_used_ns"] > seconds * 1e9
        row["last_used_ns"] = int(row["last_used_ns"]) - int(seconds * 1e9)
        self.maps["affinity"][key] = row

    def connection(self, ends: Ends, protocol: str = "TCP") -> Any:
        """A row of `connections`, or None."""
        return self.maps["connections"].get(flow(ends, protocol))

    def age(self, ends: Ends, seconds: float, protocol: str = "TCP") -> None:
        """Makes a connection's row older."""
        key = flow(ends, protocol)
        row = self.maps["connections"][key]
        assert row["last_seen_ns"] > seconds * 1e9
        row["last_seen_ns"] = int(row["last_seen_ns"]) - int(seconds * 1e9)
        self.maps["connections"][key] = row

    def service_counts(self, number: int) -> dict[str, int]:
        """A service's counters over all CPUs."""
        return _summed(self.maps["service_metrics"][number])

    def backend_counts(self, row: int) -> dict[str, int]:
        """A backend's counters over all CPUs."""
        return _summed(self.maps["backend_metrics"][row])


def _summed(values: Any) -> dict[str, int]:
    return {name: int(values[name].sum()) for name in values.dtype.names}


@contextmanager
def sniffer(namespace: Path, interface: str) -> Iterator[socket.socket]:
    """A packet socket that waits at most two seconds."""
    with net.inside(namespace):
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        listener.bind((interface, 3))
    with listener:
        listener.settimeout(2)
        yield listener


def send(namespace: Path, interface: str, *frames: bytes) -> None:
    """Sends frames as they are."""
    with net.inside(namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for frame in frames:
            sender.send(frame)


def received(listener: socket.socket, ends: Ends) -> Packet:
    """The first packet between these ends, whatever its ttl and layer-2 addresses; TimeoutError without one."""
    while True:
        data, (_, _, kind, _, _) = listener.recvfrom(65536)
        if kind == socket.PACKET_OUTGOING:
            continue
        packet = Ether(data)
        layer3 = packet.payload
        if not isinstance(layer3, IP | IPv6) or (layer3.src, layer3.dst) != (ends.source, ends.destination):
            continue
        layer4 = layer3.payload
        number = layer3.proto if isinstance(layer3, IP) else layer3.nh
        if number not in (packets.TCP_NUMBER, packets.UDP_NUMBER):
            continue
        if (layer4.sport, layer4.dport) == (ends.source_port, ends.destination_port):
            return packet
