"""Packets as bytes, made by scapy, in shapes: the same packet between other ends is the same function's.

So what a program must have made of a packet is ``shape(other_ends)``, every checksum computed anew by scapy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

UPLINK_MAC, CLIENT_MAC, BACKEND_MAC = "02:00:00:00:00:01", "02:00:00:00:00:09", "02:00:00:00:00:02"
OTHER_MAC, SERVER_MAC = "02:00:00:00:01:01", "02:00:00:00:01:02"
SERVICE = {4: "192.0.2.1", 6: "2001:db8:f::1"}
SECOND_SERVICE = {4: "192.0.2.2", 6: "2001:db8:f::2"}
CLIENT = {4: "10.0.0.9", 6: "2001:db8::9"}
NODE = {4: "10.0.0.1", 6: "2001:db8::1"}
NODE_OTHER = {4: "10.0.1.1", 6: "2001:db8:1::1"}
BACKEND = {4: "10.0.0.2", 6: "2001:db8::2"}  # behind the uplink
SERVER = {4: "10.0.1.2", 6: "2001:db8:1::2"}  # behind the other link
POD = {4: "10.0.3.2", 6: "2001:db8:3::2"}  # of the node
SILENT = {4: "10.0.0.88", 6: "2001:db8::88"}  # behind the uplink, its layer-2 address not known
NARROW = {4: "10.0.2.2", 6: "2001:db8:2::2"}  # behind a link of 1280 octets
NOWHERE = {4: "203.0.113.1", 6: "2001:db8:dead::1"}
ELSEWHERE = {4: "198.51.100.7", 6: "2001:db8:e::7"}
TCP_NUMBER, UDP_NUMBER = 6, 17


@dataclass(frozen=True)
class Ends:
    """Who a packet is from and for, on layers 2 to 4, and how far it may go."""

    source: str
    destination: str
    source_port: int = 40000
    destination_port: int = 80
    ttl: int = 64
    mac_source: str = CLIENT_MAC
    mac_destination: str = UPLINK_MAC

    @property
    def version(self) -> int:
        return ip_address(self.source).version


def to_service(version: int, **changes: object) -> Ends:
    """From the client to the service."""
    return Ends(CLIENT[version], SERVICE[version], **changes)  # type: ignore[arg-type]


Shape = Callable[[Ends], bytes]


def tcp(ends: Ends, flags: str = "S", payload: bytes = b"", **fields: object) -> bytes:
    """A TCP packet."""
    return _frame(
        ends,
        TCP(sport=ends.source_port, dport=ends.destination_port, flags=flags, **fields) / Raw(payload),
    )


def udp(ends: Ends, payload: bytes = b"hello", **fields: object) -> bytes:
    """A UDP packet."""
    return _frame(ends, UDP(sport=ends.source_port, dport=ends.destination_port, **fields) / Raw(payload))


def icmp(ends: Ends) -> bytes:
    """An echo request."""
    return _frame(ends, ICMP() if ends.version == 4 else ICMPv6EchoRequest())


def _frame(ends: Ends, layer4: Packet, **fields: object) -> bytes:
    kind = (
        IP(src=ends.source, dst=ends.destination, ttl=ends.ttl, **fields)
        if ends.version == 4
        else IPv6(src=ends.source, dst=ends.destination, hlim=ends.ttl, **fields)
    )
    return bytes(ethernet(ends) / kind / layer4)


def ethernet(ends: Ends) -> Packet:
    """The layer-2 header."""
    return Ether(src=ends.mac_source, dst=ends.mac_destination)


def tcp4_with_options(ends: Ends) -> bytes:
    """IPv4 with the longest header, and TCP with options."""
    options = [IPOption_NOP(), IPOption_RR(length=39, routers=["0.0.0.0"] * 9)]
    layer4 = TCP(
        sport=ends.source_port, dport=ends.destination_port, flags="S", options=[("MSS", 1460), ("WScale", 7)]
    )
    return _frame(ends, layer4 / Raw(b"odd"), options=options)


def udp4_without_checksum(ends: Ends) -> bytes:
    return udp(ends, b"abc", chksum=0)


def padded(shape: Shape) -> Shape:
    """As a network card delivers a short packet: padded to 60 octets and more."""
    return lambda ends: shape(ends).ljust(74, b"\x5a")


# IPv6 extension headers: (number, the header itself given the next one's number)

Extension = tuple[int, Callable[[int], bytes]]


def options(number: int, units: int = 1) -> Extension:
    """Hop-by-hop (0) or destination (60) options, PadN all along."""
    size = units * 8 - 4
    return number, lambda following: bytes((following, units - 1, 1, size)) + bytes(size)


def routing() -> Extension:
    """A routing header that has done its duty (segments left: 0)."""
    return 43, lambda following: bytes((following, 2, 0, 0, 0, 0, 0, 0)) + ip_address("2001:db8::5").packed


def authentication() -> Extension:
    return 51, lambda following: bytes((following, 4)) + bytes(22)


def fragment(offset: int = 0, *, more: bool = False) -> Extension:
    return 44, lambda following: struct.pack("!BBHI", following, 0, offset << 3 | more, 0x1234)


def with_extensions(extensions: Sequence[Extension], shape: Shape = tcp) -> Shape:
    """An IPv6 packet with extension headers before its TCP or UDP header."""

    def made(ends: Ends) -> bytes:
        plain = shape(ends)
        following, chain = plain[20], b""
        for number, header in reversed(extensions):
            chain = header(following) + chain
            following = number
        length = struct.pack("!H", len(plain) - 54 + len(chain))
        return plain[:18] + length + bytes((following,)) + plain[21:54] + chain + plain[54:]

    return made


def fragment4(ends: Ends, offset: int = 8, *, more: bool = False, shape: Shape = udp) -> bytes:
    """An IPv4 fragment."""
    whole = bytearray(shape(ends))
    struct.pack_into("!H", whole, 20, offset | more << 13)
    return repaired4(whole)


def repaired4(frame: bytes | bytearray) -> bytes:
    """The frame with its IPv4 header's checksum computed anew."""
    packet = Ether(bytes(frame))
    del packet[IP].chksum
    return bytes(packet)


def changed(frame: bytes, offset: int, new: bytes) -> bytes:
    """The frame with some octets replaced."""
    return frame[:offset] + new + frame[offset + len(new) :]


def tagged(ends: Ends) -> bytes:
    """With a VLAN tag."""
    return bytes(ethernet(ends) / Dot1Q(vlan=5) / Ether(tcp(ends)).payload)


def arp() -> bytes:
    return bytes(Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=NODE[4]))


TCP4: dict[str, Shape] = {
    "tcp4": tcp,
    "tcp4 odd": lambda ends: tcp(ends, "PA", b"odd"),
    "tcp4 even": lambda ends: tcp(ends, "PA", b"even"),
    "tcp4 large": lambda ends: tcp(ends, "A", bytes(range(256)) * 5),
    "tcp4 options": tcp4_with_options,
    "tcp4 padded": padded(tcp),
}
UDP4: dict[str, Shape] = {
    "udp4": udp,
    "udp4 empty": lambda ends: udp(ends, b""),
    "udp4 odd": lambda ends: udp(ends, b"abc"),
    "udp4 without checksum": udp4_without_checksum,
    "udp4 padded": padded(udp),
}
TCP6: dict[str, Shape] = {
    "tcp6": tcp,
    "tcp6 odd": lambda ends: tcp(ends, "PA", b"odd"),
    "tcp6 hop-by-hop": with_extensions([options(0)]),
    "tcp6 destination options": with_extensions([options(60, 3)]),
    "tcp6 routing": with_extensions([routing()]),
    "tcp6 authentication": with_extensions([authentication()]),
    "tcp6 atomic fragment": with_extensions([fragment()]),
    "tcp6 chain": with_extensions([options(0), routing(), fragment(), authentication(), options(60)]),
    "tcp6 six headers": with_extensions([options(0), *[options(60)] * 5]),
}
UDP6: dict[str, Shape] = {
    "udp6": udp,
    "udp6 odd": lambda ends: udp(ends, b"abc"),
    "udp6 hop-by-hop": with_extensions([options(0)], udp),
}
SHAPES: dict[str, Shape] = TCP4 | UDP4 | TCP6 | UDP6


def version_of(name: str) -> int:
    """4 or 6, of a shape."""
    return int(name[3])


def protocol_of(name: str) -> str:
    """``TCP`` or ``UDP``, of a shape."""
    return name[:3].upper()
