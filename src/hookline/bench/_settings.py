"""How a run measures: how many rounds, on which CPU, and whom it tells how far it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hookline.errors import HooklineError

FEWEST_ROUNDS = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run measures.

    Attributes:
        rounds: How often each thing is measured; None leaves it to each row.
        cpu: The CPU that measuring is pinned to; None for none.
        tell: Told before every round: which row, which round, of how many.
    """

    rounds: int | None = None
    cpu: int | None = None
    tell: Callable[[str, int, int], None] = lambda row, number, of: None

    @property
    def where(self) -> str:
        """For a row's method: the CPU."""
        return "not pinned to a CPU" if self.cpu is None else f"on CPU {self.cpu}"

    def in_turn(self, row: str, rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
        """Calls each in turn, ``rounds`` times after one that does not count, and returns what each answered.

        In turn, so that a machine that slows down slows all of them.
        """
        rounds = self.rounds or rounds
        self.tell(row, 0, rounds)
        for measure in measures:
            measure()
        found: list[list[float]] = [[] for _ in measures]
        for number in range(rounds):
            self.tell(row, number + 1, rounds)
            for measure, answers in zip(measures, found, strict=True):
                answers.append(measure())
        return found


def choose_cpu(wanted: int | None = None) -> int:
    """The CPU to measure on: the one wanted, else the last that this process may use; the first serves most interrupts.

    Raises:
        HooklineError: This process may not use the CPU that is wanted.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if wanted is None:
        return allowed[-1]
    if wanted not in allowed:
        raise HooklineError(
            f"cannot measure on CPU {wanted}",
            why=f"this process may use {', '.join(map(str, allowed))}",
            remedy="choose one of these, or --pin none",
        )
    return wanted


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Keeps this thread, and what it starts, on a CPU while the block runs; None: wherever it was."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
