"""Numbers of rules: dense, so that counters are an array, and kept as long as the rule is there."""

from __future__ import annotations

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
