"""``hookline bench``: the rows behind every claim, measured here."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hookline.bench import Row


def bench(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID…]", help="Rows to measure; all by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure every claim on this machine, beside what it is held against in the same run.

    Each row has its median, the ratio to its reference, the spread (interquartile range over the median), the number of
    rounds, its goal and whether it was met. Differences below 15 % are noise. Exits with 1 when a goal is missed.

    \b
    Examples:
      hookline bench
      hookline bench maglev-build cli-help
      hookline bench --json
    """
    from hookline import bench as rows

    def tell(row: Row) -> None:
        if not as_json:
            print(_line(row), flush=True)

    if not as_json:
        print(
            f"{'row':20} {'median':>11}     {'ratio':>7} {'spread':>7} {'n':>4}  reference, goal", flush=True
        )
    found = rows.run(ids or (), found=tell)
    if as_json:
        print(json.dumps([row.as_dict() for row in found]))
    elif found:
        print(f"on {found[0].machine}")
    missed = [row.id for row in found if row.met is False]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
        raise typer.Exit(1)


def _line(row: Row) -> str:
    goal = f"; goal {row.goal}: {'met' if row.met else 'MISSED'}" if row.goal else ""
    return f"{row.id:20} {row.value:11,.2f} {row.unit:3} {row.ratio:7.2f} {row.spread:7.0%} {row.n:4}  {row.reference}{goal}"
