"""``hookline bench``: the rows behind every claim, measured here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hookline.cli._errors import UsageError

if TYPE_CHECKING:
    from hookline.bench import Change, Group, Row

REDRAW_S = 0.2


def bench(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID…]", help="Rows to measure; all by default.")
    ] = None,
    list_rows: Annotated[
        bool, typer.Option("--list", help="List the rows, and what each needs, and measure nothing.")
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="N", min=1, max=10_000, help="Measure each row so often."),
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(
            "--pin", metavar="CPU", help="Measure on this CPU, or none; by default on the last one."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="OLD.json", help="Hold the rows against an earlier --json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure every claim on this machine, beside what it is held against in the same run.

    Each row has its median, the ratio to its reference, the spread (interquartile range over the median), the number of
    rounds, its goal and whether it was met; --json also says how it was measured. Differences below 15 % are noise.

    Exits with 1 when a goal is missed, or when --compare finds a row worse by more than 15 % and by more than both
    runs' spreads.

    \b
    Examples:
      hookline bench
      hookline bench --list
      hookline bench maglev-build cli-help
      hookline bench --json >before.json
      hookline bench --compare before.json
    """
    from hookline import bench as rows

    groups = rows.groups_of(ids or ())
    if list_rows:
        _print_list(groups, ids or (), as_json)
        return
    earlier = rows.read(compare) if compare else None
    cpu = None if pin == "none" else rows.choose_cpu(_cpu(pin))
    with _shown(quiet=as_json) as (tell, found):
        measured = rows.run(ids or (), rows.Settings(rounds, cpu, tell), found=found)
    changes = rows.compare(earlier, measured.rows) if earlier is not None else []
    for name, why in measured.left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    if as_json:
        document: dict[str, Any] = {"rows": [row.as_dict() for row in measured.rows]}
        document["left_out"] = measured.left_out
        if earlier is not None:
            document["compared"] = [change.as_dict() for change in changes]
        print(json.dumps(document))
    elif measured.rows:
        print(
            f"on {measured.rows[0].machine}, {'not pinned to a CPU' if cpu is None else f'pinned to CPU {cpu}'}"
        )
        _print_changes(changes)
    missed = [row.id for row in measured.rows if row.met is False]
    worse = [change.id for change in changes if change.verdict == "worse"]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    if worse:
        print(f"worse than before: {', '.join(worse)}", file=sys.stderr)
    if missed or worse:
        raise typer.Exit(1)


def _cpu(pin: str | None) -> int | None:
    if pin is None:
        return None
    if not pin.isdecimal():
        raise UsageError(
            f"--pin {pin!r} is neither the number of a CPU nor none",
            why="rows are measured on one CPU, or wherever the kernel puts them",
            remedy="--pin 1, or --pin none",
        )
    return int(pin)


def _print_list(groups: Sequence[Group], ids: Sequence[str], as_json: bool) -> None:
    from hookline.cli._output import print_table

    entries = [
        (name, "a lab" if group.lab else "root" if group.privileged else "nothing", text)
        for group in groups
        for name, text in group.rows.items()
        if not ids or name in ids
    ]
    if as_json:
        print(json.dumps([dict(zip(("id", "needs", "measures"), entry, strict=True)) for entry in entries]))
    else:
        print_table(("ID", "NEEDS", "MEASURES"), entries)


Tell = Callable[[str, int, int], None]


@contextmanager
def _shown(*, quiet: bool) -> Iterator[tuple[Tell, Callable[[Row], None]]]:
    """Prints rows as they come; on a terminal, a line below them says what is being measured.

    It is redrawn between rounds, never by a thread, which would take time from what is measured.
    """
    if not quiet:
        heading = f"{'row':20} {'median':>11}     {'ratio':>7} {'spread':>7} {'n':>4}  reference, goal"
        print(heading, flush=True)
    if not sys.stderr.isatty():
        yield lambda row, number, of: None, lambda row: None if quiet else print(_line(row), flush=True)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as live:
        drawn = 0.0

        def tell(row: str, number: int, of: int) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= REDRAW_S or number == 0:
                drawn = time.monotonic()
                live.update(
                    Text(f"{row}: {f'round {number} of {of}' if number else 'warming up'}"), refresh=True
                )

        def found(row: Row) -> None:
            live.update(Text(""), refresh=True)
            if not quiet:
                print(_line(row), flush=True)

        yield tell, found


def _print_changes(changes: Sequence[Change]) -> None:
    if not changes:
        return
    from hookline.cli._output import print_table

    print()
    print_table(
        ("ROW", "OLD", "NEW", "CHANGE", "VERDICT"),
        [
            (
                change.id,
                _value(change.old, change.unit),
                _value(change.new, change.unit),
                f"{change.change:+.0%}" if change.change is not None else "",
                f"{change.verdict}{change.remark and f' ({change.remark})'}",
            )
            for change in changes
        ],
    )


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.2f} {unit}"


def _line(row: Row) -> str:
    goal = f"; goal {row.goal}: {'met' if row.met else 'MISSED'}" if row.goal else ""
    return f"{row.id:20} {row.value:11,.2f} {row.unit:3} {row.ratio:7.2f} {row.spread:7.0%} {row.n:4}  {row.reference}{goal}"
