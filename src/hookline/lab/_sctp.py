"""SCTP's packets that open an association, written and read here: the kernel need not have SCTP for a probe.

Only what a policy can see is made: an INIT, and the INIT ACK or ABORT that answers it, over raw sockets of protocol 132. No
association comes of it. Source: RFC 9260, sections 3.1, 3.3.2, 3.3.3, 3.3.7; the checksum is CRC32c (appendix A).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

PROTOCOL = 132
Kind: TypeAlias = Literal["init", "init-ack", "abort"]

_HEADER = struct.Struct("!HHII")
_CHUNK = struct.Struct("!BBH")
_INIT = struct.Struct("!IIHHI")
_COOKIE = struct.pack("!HH4s", 7, 8, b"hook")
_KINDS: dict[int, Kind] = {1: "init", 2: "init-ack", 6: "abort"}
_WINDOW, _STREAMS = 65536, 1
_REFLECTED_POLYNOMIAL = 0x82F63B78


@dataclass(frozen=True, slots=True)
class Packet:
    """What is read of a packet.

    Attributes:
        verification: The tag that its receiver chose; 0 in an INIT.
        tag: The tag that its sender chose; 0 in an ABORT.
    """

    kind: Kind
    source: int
    destination: int
    verification: int
    tag: int


def init(source: int, destination: int, tag: int) -> bytes:
    """An INIT from a port to another; the tag, not 0, is what its answer will carry."""
    return _packet(source, destination, 0, 1, _INIT.pack(tag, _WINDOW, _STREAMS, _STREAMS, tag))


def answer(asked: Packet, *, listening: bool) -> bytes:
    """What an INIT gets: an INIT ACK where somebody listens, else an ABORT."""
    if not listening:
        return _packet(asked.destination, asked.source, asked.tag, 6, b"")
    mine = asked.tag ^ 0xFFFFFFFF or 1
    body = _INIT.pack(mine, _WINDOW, _STREAMS, _STREAMS, mine) + _COOKIE
    return _packet(asked.destination, asked.source, asked.tag, 2, body)


def read(data: bytes) -> Packet | None:
    """The packet, without its IP header; None where it is another, or damaged."""
    if len(data) < _HEADER.size + _CHUNK.size:
        return None
    source, destination, verification, checksum = _HEADER.unpack_from(data)
    kind = _KINDS.get(data[_HEADER.size])
    whole = data[:8] + bytes(4) + data[12:]
    if kind is None or checksum != _checksum(whole):
        return None
    tag = 0
    if kind != "abort":
        if len(data) < _HEADER.size + _CHUNK.size + _INIT.size:
            return None
        (tag,) = struct.unpack_from("!I", data, _HEADER.size + _CHUNK.size)
    return Packet(kind, source, destination, verification, tag)


def _packet(source: int, destination: int, verification: int, chunk: int, body: bytes) -> bytes:
    chunk_data = _CHUNK.pack(chunk, 0, _CHUNK.size + len(body)) + body
    without = _HEADER.pack(source, destination, verification, 0) + chunk_data
    return _HEADER.pack(source, destination, verification, _checksum(without)) + chunk_data


def _checksum(data: bytes) -> int:
    """CRC32c as the header has it: the remainder's octets in the order of the wire, the lowest first."""
    remainder = 0xFFFFFFFF
    for octet in data:
        remainder = remainder >> 8 ^ _TABLE[(remainder ^ octet) & 0xFF]
    return int.from_bytes((remainder ^ 0xFFFFFFFF).to_bytes(4, "little"), "big")


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_REFLECTED_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()
