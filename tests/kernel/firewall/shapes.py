"""Packets that only the firewall knows, made by scapy; the others are the load balancer's tests'."""

from __future__ import annotations

from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet, Raw

from tests.kernel.loadbalancer.packets import Ends, ethernet, fragment4, udp, with_extensions
from tests.kernel.loadbalancer.packets import fragment as fragment6


def frame(ends: Ends, rest: Packet, **fields: object) -> bytes:
    """A packet with anything behind its IP header."""
    if ends.version == 4:
        layer3 = IP(src=ends.source, dst=ends.destination, ttl=ends.ttl, **fields)
    else:
        layer3 = IPv6(src=ends.source, dst=ends.destination, hlim=ends.ttl, **fields)
    return bytes(ethernet(ends) / layer3 / rest)


def of_protocol(ends: Ends, number: int, payload: bytes = bytes(8)) -> bytes:
    """A packet of any protocol."""
    return frame(ends, Raw(payload), **({"proto": number} if ends.version == 4 else {"nh": number}))


def sctp(ends: Ends, chunk: int) -> bytes:
    """An SCTP packet with one chunk: 1 is INIT, 2 INIT ACK, 0 DATA."""
    ports = ends.source_port.to_bytes(2, "big") + ends.destination_port.to_bytes(2, "big")
    return of_protocol(ends, 132, ports + bytes(8) + bytes((chunk, 0, 0, 4)))


def echo(ends: Ends, *, reply: bool = False, number: int = 7) -> bytes:
    """A ping or its answer."""
    if ends.version == 4:
        return frame(ends, ICMP(type=0 if reply else 8, id=number))
    return frame(ends, (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number))


def error(outer: Ends, quoted: bytes, *, too_big: bool = False) -> bytes:
    """An ICMP error between these ends that quotes the beginning of a packet."""
    if outer.version == 4:
        head: Packet = ICMP(type=3, code=4 if too_big else 3)
        return frame(outer, head / Raw(quoted[14:42]))
    head = ICMPv6PacketTooBig(mtu=1280) if too_big else ICMPv6DestUnreach(code=4)
    return frame(outer, head / Raw(quoted[14:214]))


def fragments(ends: Ends) -> tuple[bytes, bytes]:
    """The first fragment of a datagram, and a later one, which has no ports but something in their place."""
    if ends.version == 4:
        first, later = fragment4(ends, 0, more=True), fragment4(ends, 64)
    else:
        first = with_extensions([fragment6(0, more=True)], udp)(ends)
        later = with_extensions([fragment6(64)], udp)(ends)
    return first, later[:-13] + b"\xff" * 13
