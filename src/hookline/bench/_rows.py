"""What a row is, and how two things are timed against each other on a noisy machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        value: The median, in ``unit``.
        reference: What it is held against, measured in the same run, in turn with it.
        ratio: Median of the value over median of the reference.
        spread: Interquartile range of the value over its median: 0.1 says that the middle half lies within 10 %.
        n: Rounds.
        goal: The target, as text; ``met`` says whether it was reached, None where there is none.
    """

    id: str
    value: float
    unit: str
    reference: str
    ratio: float
    spread: float
    n: int
    goal: str
    met: bool | None
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """The row as the ``--json`` form."""
        return asdict(self)


def in_turn(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Calls each in turn, ``rounds`` times after one that does not count, and returns what each answered.

    In turn, so that a machine that slows down slows all of them.
    """
    for measure in measures:
        measure()
    found: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for measure, answers in zip(measures, found, strict=True):
            answers.append(measure())
    return found


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    reference: str,
    reference_values: Sequence[float],
    goal: str = "",
    most: float | None = None,
    most_ratio: float | None = None,
) -> Row:
    """A row from two series.

    Args:
        name: The row's id.
        unit: Of ``values`` and ``most``.
        values: What was measured.
        reference: What it is held against.
        reference_values: The reference, in its own unit if ``unit`` is the same.
        goal: The target as text.
        most: The largest value that reaches the goal.
        most_ratio: The largest ratio that does.
    """
    value = statistics.median(values)
    ratio = value / statistics.median(reference_values)
    met = None
    if most is not None:
        met = value <= most
    if most_ratio is not None:
        met = ratio <= most_ratio
    return Row(name, value, unit, reference, ratio, _spread(values), len(values), goal, met, machine())


def _spread(values: Sequence[float]) -> float:
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


@cache
def machine() -> str:
    """Processor, number of CPUs and kernel."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}"
