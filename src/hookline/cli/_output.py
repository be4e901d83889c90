"""What commands print: tables, drawn by rich on a terminal and plain, aligned text elsewhere, and JSON."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

Cell = str | int | float
UNLIMITED = 10_000


def on_terminal() -> bool:
    """Whether output is for a person at a terminal who wants it drawn."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    import json

    print(json.dumps(document, indent=2))


def print_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, indent: int = 0) -> None:
    """Prints a table; numbers stand to the right.

    Args:
        head: The columns' names.
        rows: Cells; floats are shares from 0 to 1 and are printed as percentages.
        indent: Spaces before each line.
    """
    rows = [tuple(row) for row in rows]
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    texts = [tuple(_text(cell) for cell in row) for row in rows]
    if on_terminal():
        _print_drawn(head, texts, numeric, indent)
    else:
        _print_plain(head, texts, numeric, indent)


def count(number: int, thing: str, things: str = "") -> str:
    """``1 backend``, ``2 backends``; a plural with more than an ``s`` is given."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def size(octets: int) -> str:
    """A size in octets as a person reads it: ``4.0 KiB``."""
    value = float(octets)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def share(value: float) -> str:
    """A share from 0 to 1 as a percentage."""
    return f"{100 * value:.1f}%"


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return share(cell)
    return str(cell) if cell != "" else "-"


def _print_plain(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], indent: int
) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print(" " * indent + "  ".join(cells).rstrip())


def _print_drawn(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], indent: int
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    head_style = (
        "" if os.environ.get("NO_COLOR") else "bold"
    )  # rich leaves bold on where colours are not wanted
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style=head_style
    )
    for name, right in zip(head, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False, width=UNLIMITED)
    if indent + console.measure(table).maximum > shutil.get_terminal_size().columns:
        # It is for the terminal to wrap: cells that are cut into pieces help nobody, and a wrapped rule neither.
        _print_plain(head, rows, numeric, indent)
        return
    console.print(Padding(table, (0, 0, 0, indent), expand=False))
