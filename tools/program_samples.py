"""A scene for trial runs of the kernel programs: a network namespace with two links, services of every kind in the
maps, and packets for every branch.

The scene is the calling process's own network namespace, which goes with the process. In it `uplink` leads to the
client (10.0.0.9) and to a backend (10.0.0.2), `other` to another backend (10.0.1.2).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import numpy as np
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from hookline import bpf
from hookline.datapath.loadbalancer import maglev

UPLINK = "uplink"
SERVICE, SERVICE6, CLIENT, CLIENT6 = "192.0.2.1", "2001:db8:2::1", "10.0.0.9", "2001:db8::9"
BACKEND_ROWS = {"tx": 1, "redirect": 2, "local": 3, "neighbour": 4, "unreachable": 5, "tx6": 6, "gone": 7}
PORTS = {**{name: 80 + row for name, row in BACKEND_ROWS.items()}, "empty": 99}
_ACTIVE, _LOCAL = 1, 2
_SERVICE_ADDRESS = 1
_LOCAL_REPLY = 5
_MAGLEV_BACKENDS = 10
NODE, BEYOND = "10.0.0.1", "10.0.1.2"
_RULES = 1

_NETWORK = """
link set lo up
link add uplink type veth peer name uplink-peer
link add other type veth peer name other-peer
link set uplink-peer up
link set other-peer up
link set uplink up
link set other up
address add 10.0.0.1/24 dev uplink
address add 10.0.1.1/24 dev other
neighbour replace 10.0.0.2 lladdr 02:00:00:00:00:02 nud permanent dev uplink
neighbour replace 10.0.0.9 lladdr 02:00:00:00:00:09 nud permanent dev uplink
neighbour replace 10.0.1.2 lladdr 02:00:00:00:01:02 nud permanent dev other
"""
_NETWORK6 = """
address add 2001:db8::1/64 dev uplink nodad
neighbour replace 2001:db8::2 lladdr 02:00:00:00:00:02 nud permanent dev uplink
neighbour replace 2001:db8::9 lladdr 02:00:00:00:00:09 nud permanent dev uplink
"""


@dataclass(frozen=True)
class Sample:
    """One trial run: what it shows, what goes in, and what must be done before each run."""

    label: str
    data: bytes = b""
    context: bytes | None = None
    ingress: str | None = None
    egress: str | None = None
    prepare: Callable[[], None] | None = None


def set_the_scene() -> bool:
    """Moves the process into a network namespace of its own and builds the network; returns whether it has IPv6.

    Raises:
        OSError: The process may not, or ``ip`` is missing or fails.
    """
    new_network = 0x40000000  # CLONE_NEWNET
    if ctypes.CDLL(None, use_errno=True).unshare(new_network) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    _ip(_NETWORK)
    _write("/proc/sys/net/ipv4/ip_forward", "1")
    if not os.path.isdir("/proc/sys/net/ipv6/conf/uplink"):
        return False
    _write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0")
    _write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
    _ip(_NETWORK6)
    return True


def _ip(commands: str) -> None:
    done = subprocess.run(["ip", "-batch", "-"], input=commands, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip: {done.stderr.strip()}")


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


# The load balancer's tables, and the firewall's rows


def fill_tables(maps: bpf.Object) -> None:
    """Gives the load balancer a service for every fate: each on a port of its own, with one backend."""
    tables = maps.maps
    addresses = {
        "tx": ("10.0.0.2", "10.0.0.1", _ACTIVE),
        "redirect": ("10.0.1.2", "10.0.1.1", _ACTIVE),
        "local": ("10.0.2.2", "10.0.2.1", _ACTIVE | _LOCAL),
        "neighbour": ("10.0.0.77", "10.0.0.1", _ACTIVE),
        "unreachable": ("203.0.113.1", "10.0.0.1", _ACTIVE),
        "tx6": ("2001:db8::2", "2001:db8::1", _ACTIVE),
        "gone": ("10.0.0.2", "10.0.0.1", 0),
    }
    pages = tables["maglev"].view()["backends"]
    for name, (address, source, flags) in addresses.items():
        row = BACKEND_ROWS[name]
        tables["backends"][row] = {
            "address": {"words": packed(address)},
            "source": {"words": packed(source)},
            "port": socket.htons(8080),
            "generation": 1,
            "flags": flags,
        }
        pages[row][0] = row
        service = SERVICE6 if name == "tx6" else SERVICE
        tables["services"][service_key(service, PORTS[name])] = _service(row, table_page=row, table_size=1)
    tables["services"][service_key(SERVICE, PORTS["empty"])] = _service(8)
    for service in (SERVICE, SERVICE6):
        tables["services"][service_key(service, 0, protocol=0)] = _service(0, flags=_SERVICE_ADDRESS)
    tables["connections"][_flow("10.0.2.2", 8080, CLIENT, 40000)] = {
        "source": {"words": packed(SERVICE)},
        "destination": {"words": packed(CLIENT)},
        "source_port": socket.htons(80),
        "destination_port": socket.htons(40000),
        "backend": BACKEND_ROWS["local"],
        "generation": 1,
        "kind": _LOCAL_REPLY,
        "last_seen_ns": np.iinfo(np.int64).max,
    }


def fill_rows(programs: bpf.Object) -> None:
    """Gives the firewall a pod, the client behind `uplink`, and the node itself: each may speak TCP with port 80 and no other."""
    tables = programs.maps
    index = socket.if_nametoindex(UPLINK)
    for interface in (0, index):
        tables["endpoints"][struct.pack("=II", 0, interface)] = {"rules": (_RULES, _RULES)}
    for address, identity, interface in ((CLIENT, 16, index), (NODE, 2, 0), (CLIENT6, 16, index)):
        key = struct.pack("=II", 32 + 128, 0) + packed(address)
        tables["identities"][key] = {"identity": identity, "interface": interface}
    key = struct.pack("=IIIIB2sx", 120, 0, _RULES, 0, socket.IPPROTO_TCP, struct.pack("!H", 80))
    tables["rules"][key] = {"rule": 1}
    tables["own_addresses"][struct.pack("=I", 0) + packed(NODE)] = 1


def packed(address: str) -> bytes:
    """An address as the programs keep it: 16 octets, IPv4 as ``::ffff:a.b.c.d``."""
    octets = ip_address(address).packed
    return octets if len(octets) == 16 else bytes(10) + b"\xff\xff" + octets


def service_key(address: str, port: int, protocol: int = socket.IPPROTO_TCP) -> bytes:
    """``struct service_key``."""
    return packed(address) + struct.pack("!HBx", port, protocol)


def _service(number: int, **members: int) -> dict[str, int]:
    return {"id": number, **members}


def _flow(source: str, source_port: int, destination: str, destination_port: int) -> bytes:
    ports = struct.pack("!HHB3x", source_port, destination_port, socket.IPPROTO_TCP)
    return packed(source) + packed(destination) + ports


# Packets


def samples(programs: bpf.Object, *, ipv6: bool) -> dict[str, Sequence[Sample]]:
    """The trial runs of every program of the load balancer, by its name."""
    return {
        "balance": [Sample(label, bytes(packet), ingress=UPLINK) for label, packet in _to_balance(ipv6=ipv6)],
        "resolve": [Sample("no handover from balance", bytes(_tcp(PORTS["tx"])), ingress=UPLINK)],
        "reply": [
            Sample("reply of a pod of the node", bytes(_reply()), egress=UPLINK),
            Sample("not of a service's connection", bytes(_tcp(443)), egress=UPLINK),
        ],
        "count_exceptions": [Sample("another program's exception", context=struct.pack("=QQQ", 0, 0, 0))],
        "build_maglev": [_maglev(programs)],
    }


def firewall_samples(programs: bpf.Object) -> dict[str, Sequence[Sample]]:
    """The trial runs of every program of the firewall, by its name."""
    tracked = programs.maps["tracked"]

    def sample(label: str, ends: tuple[str, str], rest: Packet, *, new: bool = False) -> Sample:
        source, target = ends
        data = bytes(_ether() / IP(src=source, dst=target) / rest)
        prepare = tracked.clear if new else None
        # What leaves the node was made by it, not forwarded.
        if source == NODE:
            return Sample(label, data, egress=UPLINK, prepare=prepare)
        return Sample(label, data, ingress=UPLINK, prepare=prepare)

    def of(here: str) -> tuple[tuple[str, str], tuple[str, str]]:
        return (here, BEYOND), (BEYOND, here)

    segment, refused = TCP(sport=40000, dport=80, flags="A"), TCP(sport=40000, dport=22, flags="S")
    found: dict[str, Sequence[Sample]] = {}
    for name, ends in zip(
        ("from_pod", "to_pod", "to_wire", "from_wire"), (*of(CLIENT), *of(NODE)), strict=True
    ):
        found[name] = [
            sample("a new connection", ends, segment, new=True),
            sample("an established one", ends, segment),
            sample("refused", ends, refused),
            sample("an echo", ends, ICMP()),
        ]
    return found


def _to_balance(*, ipv6: bool) -> list[tuple[str, Packet]]:
    whole = bytes(_tcp(PORTS["tx"]))
    packets = [
        ("ARP", Ether() / ARP()),
        ("TCP, for no service", _ether() / IP(src=CLIENT, dst="10.0.0.1") / TCP(sport=40000, dport=22)),
        ("backend behind the same link", _tcp(PORTS["tx"])),
        ("backend behind another link", _tcp(PORTS["redirect"])),
        ("backend on this node", _tcp(PORTS["local"])),
        ("backend without a neighbour", _tcp(PORTS["neighbour"])),
        ("backend without a route", _tcp(PORTS["unreachable"])),
        ("service without a backend", _tcp(PORTS["empty"])),
        ("service's address, no such port", _tcp(7)),
        ("service's address, ICMP", _ether() / IP(src=CLIENT, dst=SERVICE) / ICMP()),
        (
            "service's address, fragment",
            _ether() / IP(src=CLIENT, dst=SERVICE, frag=8) / UDP() / Raw(bytes(8)),
        ),
        ("TCP header cut short", Raw(whole[: 14 + 20 + 10])),
        ("IPv4 header cut short", Raw(whole[: 14 + 12])),
        ("tables that disagree", _tcp(PORTS["gone"])),
    ]
    if ipv6:
        header = _ether() / IPv6(src=CLIENT6, dst=SERVICE6)
        packets.insert(3, ("the same over IPv6", header / TCP(sport=40000, dport=PORTS["tx6"], flags="S")))
    return packets


def _ether() -> Packet:
    return Ether(src="02:00:00:00:00:09", dst="02:00:00:00:00:01")


def _tcp(port: int) -> Packet:
    return _ether() / IP(src=CLIENT, dst=SERVICE) / TCP(sport=40000, dport=port, flags="S")


def _reply() -> Packet:
    return _ether() / IP(src="10.0.2.2", dst=CLIENT) / TCP(sport=8080, dport=40000, flags="SA")


def _maglev(programs: bpf.Object) -> Sample:
    """A table of 1,021 slots for ten backends, built anew each time in pages that no service has."""
    size, first_page = maglev.SMALLEST_TABLE, 100
    identities = [bytes([number]) for number in range(_MAGLEV_BACKENDS)]
    plan = maglev.turns(identities, [1] * _MAGLEV_BACKENDS, size)
    candidates = programs.maps["maglev_candidates"].view()[:_MAGLEV_BACKENDS]
    pages = programs.maps["maglev"].view()["backends"]

    def prepare() -> None:
        pages[first_page] = 0
        candidates["backend"] = plan.order + 1
        candidates["slot"] = plan.offset
        candidates["skip"] = plan.skip
        candidates["quota"] = plan.quota
        candidates["next"] = np.roll(np.arange(_MAGLEV_BACKENDS), -1)

    job = struct.pack("=IIII", first_page, size, _MAGLEV_BACKENDS - 1, size)
    return Sample(f"{size} slots, {_MAGLEV_BACKENDS} backends", context=job, prepare=prepare)
