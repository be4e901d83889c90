"""What a row is, and what a series of measurements becomes: a median, a spread, a goal met or missed."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        value: The median, in ``unit``. A unit that ends in ``/s`` is a rate: more is better. Of all others less is.
        reference: What it is held against, measured in the same run, in turn with it.
        ratio: Median of the value over median of the reference.
        spread: Interquartile range of the value over its median: 0.1 says that the middle half lies within 10 %.
        n: Rounds.
        goal: The target, as text; ``met`` says whether it was reached, None where there is none.
        machine: Processor, number of CPUs and kernel.
        method: How it was measured.
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
    method: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as the ``--json`` form."""
        return asdict(self)


def more_is_better(unit: str) -> bool:
    """Whether the unit is a rate."""
    return unit.endswith("/s")


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    reference: str,
    reference_values: Sequence[float],
    method: str = "",
    goal: str = "",
    most: float | None = None,
    least: float | None = None,
    most_ratio: float | None = None,
    least_ratio: float | None = None,
) -> Row:
    """A row from two series.

    Args:
        name: The row's id.
        unit: Of ``values``, ``most`` and ``least``.
        values: What was measured.
        reference: What it is held against.
        reference_values: The reference, in its own unit if ``unit`` is the same.
        method: How it was measured.
        goal: The target as text.
        most: The largest value that reaches the goal.
        least: The smallest value that does.
        most_ratio: The largest ratio that does.
        least_ratio: The smallest ratio that does.
    """
    value = statistics.median(values)
    ratio = value / statistics.median(reference_values)
    reached = [
        *([value <= most] if most is not None else []),
        *([value >= least] if least is not None else []),
        *([ratio <= most_ratio] if most_ratio is not None else []),
        *([ratio >= least_ratio] if least_ratio is not None else []),
    ]
    met = all(reached) if reached else None
    return Row(name, value, unit, reference, ratio, spread(values), len(values), goal, met, machine(), method)


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median; of less than four values their whole range."""
    median = statistics.median(values)
    if median == 0:
        return 0.0
    if len(values) < 4:
        return (max(values) - min(values)) / abs(median)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / abs(median)


@cache
def machine() -> str:
    """Processor, number of CPUs and kernel."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}"
