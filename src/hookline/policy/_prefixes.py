"""Prefixes of addresses and of ports, as longest-prefix lookups need them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

ADDRESS_BITS = 128
PORT_BITS = 16
IPV4_ROOT = 0xFFFF << 32
"""::ffff:0:0, below which IPv4 addresses stand."""
IPV4_BITS = 96


class Prefix(NamedTuple):
    """The first ``bits`` of a 128-bit number; the others are zero."""

    number: int
    bits: int

    def contains(self, other: Prefix) -> bool:
        """Whether all of another prefix is in this one."""
        return self.bits <= other.bits and cut(other.number, self.bits) == self.number


def cut(number: int, bits: int) -> int:
    """A number with only its first bits."""
    rest = ADDRESS_BITS - bits
    return number >> rest << rest


def number_of(address: IPv4Address | IPv6Address) -> int:
    """An address as 128 bits, IPv4 below ::ffff:0:0/96."""
    return int(address) | IPV4_ROOT if isinstance(address, IPv4Address) else int(address)


def prefix_of(network: IPv4Network | IPv6Network) -> Prefix | None:
    """A network as a prefix; None for IPv6 networks of mapped IPv4 addresses, which no packet carries."""
    if isinstance(network, IPv4Network):
        return Prefix(int(network.network_address) | IPV4_ROOT, network.prefixlen + IPV4_BITS)
    prefix = Prefix(int(network.network_address), network.prefixlen)
    return None if Prefix(IPV4_ROOT, IPV4_BITS).contains(prefix) else prefix


def port_prefixes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest (port, bits) that together are the ports from first to last."""
    while first <= last:
        # As many ports at once as the alignment of the first and the distance to the last allow.
        size = first & -first or 1 << PORT_BITS
        while size > last - first + 1:
            size >>= 1
        yield first, PORT_BITS + 1 - size.bit_length()
        first += size


class Block(NamedTuple):
    """An ipBlock in use."""

    prefix: Prefix
    excepts: tuple[Prefix, ...]


@dataclass(slots=True)
class Blocks:
    """Which blocks an address is in, by the longest prefix that any block or except has.

    Attributes:
        members: The blocks that hold all addresses of a prefix that no longer prefix has.
    """

    members: Mapping[Prefix, frozenset[int]] = field(default_factory=dict)
    _lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, blocks: Iterable[tuple[int, Block]]) -> Blocks:
        """Numbered blocks, laid over each other."""
        begins: dict[Prefix, set[int]] = {}
        ends: dict[Prefix, set[int]] = {}
        for number, block in blocks:
            begins.setdefault(block.prefix, set()).add(number)
            for hole in block.excepts:
                # A hole that the block is in leaves nothing of the block.
                at = block.prefix if hole.contains(block.prefix) else hole
                ends.setdefault(at, set()).add(number)
        root = Prefix(IPV4_ROOT, IPV4_BITS)
        prefixes = sorted({*begins, *ends})
        if any(prefix.contains(root) and prefix != root for prefix in prefixes):
            # IPv6 prefixes that are above IPv4's in the tree do not mean IPv4.
            prefixes = sorted({*prefixes, root})
        members: dict[Prefix, frozenset[int]] = {}
        above: list[Prefix] = []
        nothing: frozenset[int] = frozenset()
        for prefix in prefixes:
            while above and not above[-1].contains(prefix):
                above.pop()
            inherited = members[above[-1]] if above and prefix != root else nothing
            added, removed = begins.get(prefix), ends.get(prefix)
            if added:
                inherited = inherited | added
            if removed:
                inherited = inherited - removed
            members[prefix] = inherited
            above.append(prefix)
        return cls(members, tuple(sorted({prefix.bits for prefix in prefixes}, reverse=True)))

    def at(self, number: int) -> frozenset[int]:
        """The blocks that an address is in."""
        for bits in self._lengths:
            found = self.members.get(Prefix(cut(number, bits), bits))
            if found is not None:
                return found
        return frozenset()

    def rows(self) -> Iterator[tuple[Prefix, frozenset[int]]]:
        """The prefixes that say something else than the next shorter one."""
        above: list[tuple[Prefix, frozenset[int]]] = []
        for prefix, members in self.members.items():
            while above and not above[-1][0].contains(prefix):
                above.pop()
            if members != (above[-1][1] if above else frozenset()):
                yield prefix, members
            above.append((prefix, members))
