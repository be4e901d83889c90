"""Small valid packets, made without a packet library: the bench runs where only Hookline is installed."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address

SYN, ACK = 0x02, 0x10


def tcp(
    source: tuple[Address, int], destination: tuple[Address, int], *, flags: int = ACK, payload: bytes = b""
) -> bytes:
    """An Ethernet frame with a TCP segment, its checksums right.

    Args:
        source: Address and port.
        destination: Address and port, of the same family.
        flags: TCP flags (RFC 9293, 3.1).
        payload: What it carries.
    """
    segment = struct.pack("!HHIIBBHHH", source[1], destination[1], 1, 1, 5 << 4, flags, 65535, 0, 0) + payload
    ends = source[0].packed + destination[0].packed
    check = _checksum(ends + struct.pack("!IHH", len(segment), 0, 6) + segment)
    segment = segment[:16] + struct.pack("!H", check) + segment[18:]
    ethernet = b"\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02"
    if source[0].version == 6:
        header = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + ends
        return ethernet + b"\x86\xdd" + header + segment
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0x4000, 64, 6, 0) + ends
    header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
    return ethernet + b"\x08\x00" + header + segment


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
