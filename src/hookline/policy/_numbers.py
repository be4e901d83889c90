"""Numbers: of rules, given out and kept; of rule sets and identities, made from what they stand for."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping

from hookline.policy._compiled import RuleSource


class RuleNumbers:
    """Gives each rule a number from 1; a number that became free is given out again, the lowest first.

    Args:
        known: Numbers by rule from an earlier process, so that a rule keeps its number.
    """

    def __init__(self, known: Mapping[RuleSource, int] | None = None) -> None:
        self._numbers: dict[RuleSource, int] = dict(known or {})
        taken = set(self._numbers.values())
        self._next = max(taken, default=0) + 1
        self._free = [number for number in range(1, self._next) if number not in taken]
        heapq.heapify(self._free)

    def __call__(self, source: RuleSource) -> int:
        """The rule's number, a new one where it has none."""
        number = self._numbers.get(source)
        if number is None:
            if self._free:
                number = heapq.heappop(self._free)
            else:
                number = self._next
                self._next += 1
            self._numbers[source] = number
        return number

    def forget(self, sources: Iterable[RuleSource]) -> None:
        """Frees the numbers of rules that are gone."""
        for source in sources:
            number = self._numbers.pop(source, None)
            if number is not None:
                heapq.heappush(self._free, number)

    @property
    def known(self) -> Mapping[RuleSource, int]:
        """Numbers by rule."""
        return self._numbers


def digest_of(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ContentNumbers:
    """Numbers that depend on the digests that are there and on nothing else: neither on their order nor on earlier ones.

    A digest's number is its first bits. Where these meet another's or one that is reserved, the digests are numbered in their
    order, and who finds its number taken takes another that follows from it.

    Args:
        first: The lowest number that is given out.
        bits: Numbers are below 2 to the power of this.
    """

    def __init__(self, first: int, bits: int = 32) -> None:
        self._first = first
        self._bits = bits
        self._wanted: dict[int, set[bytes]] = {}
        self._numbers: dict[bytes, int] = {}
        self._crowded = 0

    def change(self, gone: Iterable[bytes], come: Iterable[bytes]) -> bool:
        """Numbers digests that come, and forgets others; whether any that stays has another number than before."""
        gone, come = set(gone), set(come)
        crowded = self._crowded > 0
        for digest in gone - come:
            self._count(digest, -1)
        for digest in come - gone:
            self._count(digest, 1)
        if not crowded and not self._crowded:
            for digest in gone - come:
                self._numbers.pop(digest, None)
            for digest in come:
                self._numbers[digest] = self._number(digest, 0)
            return False
        before = self._numbers
        self._numbers = {}
        taken: set[int] = set()
        for digest in sorted(digest for digests in self._wanted.values() for digest in digests):
            attempt = 0
            while (number := self._number(digest, attempt)) in taken or number < self._first:
                attempt += 1
            taken.add(number)
            self._numbers[digest] = number
        return any(self._numbers.get(digest, number) != number for digest, number in before.items())

    def __getitem__(self, digest: bytes) -> int:
        return self._numbers[digest]

    def _number(self, digest: bytes, attempt: int) -> int:
        if attempt:
            digest = hashlib.blake2b(digest, digest_size=16, salt=attempt.to_bytes(8, "big")).digest()
        return int.from_bytes(digest[:8], "big") >> (64 - self._bits)

    def _count(self, digest: bytes, step: int) -> None:
        """Keeps count of the numbers that more than one wants, or that are reserved."""
        wanted = self._number(digest, 0)
        digests = self._wanted.setdefault(wanted, set())
        was = bool(digests) and (len(digests) > 1 or wanted < self._first)
        digests.add(digest) if step > 0 else digests.discard(digest)
        is_now = bool(digests) and (len(digests) > 1 or wanted < self._first)
        self._crowded += is_now - was
        if not digests:
            del self._wanted[wanted]
