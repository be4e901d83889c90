"""A run beside an earlier one: which rows changed, and whether by more than noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hookline.bench._rows import Row, more_is_better
from hookline.errors import HooklineError

NOISE = 0.15
"""Differences below this say nothing on a shared machine."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row, then and now.

    Attributes:
        old: The earlier value; None where the row was not there.
        new: Today's value; None where it was not measured.
        change: New over old, less 1: 0.2 says 20 % more. None where one is missing.
        verdict: ``noise``: below 15 %, or within both spreads; ``better``; ``worse``; ``new``; ``not measured``;
            ``other unit``.
        remark: What else a reader must know: that the machine was another.
    """

    id: str
    unit: str
    old: float | None
    new: float | None
    change: float | None
    verdict: str
    remark: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The change as the ``--json`` form."""
        return asdict(self)


def read(path: Path) -> list[Row]:
    """The rows of an earlier ``hookline bench --json``.

    Raises:
        HooklineError: The file cannot be read, or is not that.
    """
    try:
        return [_row(entry) for entry in json.loads(path.read_text())["rows"]]
    except OSError as error:
        raise HooklineError(
            f"cannot read {path}",
            why=error.strerror or str(error),
            remedy="name the output of an earlier hookline bench --json",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HooklineError(
            f"{path} holds no rows of a bench",
            why="it is not what hookline bench --json prints, or of another release",
            remedy=f"make it anew: hookline bench --json >{path.name}",
        ) from error


def _row(entry: dict[str, Any]) -> Row:
    row = Row(**entry)
    if not (isinstance(row.value, int | float) and isinstance(row.spread, int | float) and row.value > 0):
        raise TypeError(f"row {row.id} has the value {row.value!r} and the spread {row.spread!r}")
    return row


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Each row of either run, today's first."""
    return list(_changes({row.id: row for row in old}, {row.id: row for row in new}))


def _changes(old: dict[str, Row], new: dict[str, Row]) -> Iterator[Change]:
    for name, row in new.items():
        before = old.get(name)
        if before is None:
            yield Change(name, row.unit, None, row.value, None, "new")
        elif before.unit != row.unit:
            yield Change(name, row.unit, before.value, row.value, None, "other unit", f"it was {before.unit}")
        else:
            yield _change(before, row)
    for name, row in old.items():
        if name not in new:
            yield Change(name, row.unit, row.value, None, None, "not measured")


def _change(old: Row, new: Row) -> Change:
    """Worse or better only beyond 15 % and beyond both rows' own spreads together."""
    change = new.value / old.value - 1
    slower = old.value / new.value - 1 if more_is_better(new.unit) else change
    faster = change if more_is_better(new.unit) else old.value / new.value - 1
    least = max(NOISE, old.spread + new.spread)
    verdict = "worse" if slower > least else "better" if faster > least else "noise"
    remark = "" if old.machine == new.machine else f"then on {old.machine}"
    return Change(new.id, new.unit, old.value, new.value, change, verdict, remark)
