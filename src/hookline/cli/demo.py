"""``hookline demo``: the main job, shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hookline.demo import Progress, Result


def demo(
    seconds: Annotated[
        float,
        typer.Option("--seconds", metavar="SECONDS", min=4.0, max=600.0, help="How long the clients run."),
    ] = 10.0,
    detach_at: Annotated[
        float | None,
        typer.Option(
            "--detach-at",
            metavar="SECONDS",
            min=0.0,
            help="Detach the balancer after so long: connections break, and the demo must fail.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Balance real connections in a lab while backends come and go and Hookline itself is killed.

    Exits with 1 if any connection to a backend that stayed broke, or if the counts of the clients, the servers and
    the kernel differ.

    \b
    Examples:
      hookline demo
      hookline demo --seconds 30
      hookline demo --detach-at 5
      hookline demo --json
    """
    from hookline import demo as show

    if detach_at is not None and detach_at >= seconds:
        raise typer.BadParameter(
            f"{detach_at:g} is not before the end, at {seconds:g}", param_hint="--detach-at"
        )
    with _shown(seconds, quiet=as_json) as tell:
        result = show.run(seconds=seconds, detach_at=detach_at, progress=tell)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
    if not result.ok:
        raise typer.Exit(1)


@contextmanager
def _shown(seconds: float, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Shows the run as it goes: a live line on a terminal, a line a second elsewhere, nothing with ``--json``."""
    if quiet:
        yield lambda moment: None
        return
    if not sys.stdout.isatty():
        yield lambda moment: print((moment.event and f"        {moment.event}") or _line(moment), flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(highlight=False)
    with Bar(BarColumn(24), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("making the lab", total=seconds)

        def tell(moment: Progress) -> None:
            if moment.event:
                console.print(f"[dim]{moment.seconds:5.1f} s[/dim]  {moment.event}")
            else:
                bar.update(task, completed=moment.seconds, description=_line(moment))

        yield tell


def _line(moment: Progress) -> str:
    return (
        f"{moment.seconds:5.1f} s  {moment.packets_per_second:8,.0f} packets/s  "
        f"{moment.opened:6,} connections opened, {moment.open_now:3} open, {moment.broken} broken  "
        f"{moment.answers:8,} answers"
    )


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("backend", "placement"):
        table.add_column(heading)
    for heading in ("connections", "share", "ideal", "datagrams"):
        table.add_column(heading, justify="right")
    table.add_column("")
    total = sum(backend.connections for backend in result.backends) or 1
    ideal = sum(backend.ideal for backend in result.backends) or 1.0
    for backend in result.backends:
        table.add_row(
            backend.name,
            backend.placement,
            f"{backend.connections:,}",
            f"{backend.connections / total:.1%}",
            f"{backend.ideal / ideal:.1%}",
            f"{backend.datagrams:,}",
            "" if backend.stayed else "removed",
        )
    console.print()
    console.print(table)
    console.print()
    broken = f", {result.broken_removed} on the removed one" if result.broken_removed else ""
    lines = (
        (
            "packets",
            f"{result.kernel_packets:,} in {result.seconds:.1f} s: {result.packets_per_second:,.0f} a second",
        ),
        (
            "per packet",
            f"{result.ns_per_packet:,.0f} ns by the kernel's statistics; an empty program {result.empty_ns_per_packet:,.0f} ns",
        ),
        (
            "connections",
            (
                f"{result.opened:,} opened, {result.broken_surviving} broken on surviving backends{broken}, "
                f"{result.failed_to_open} not opened"
            ),
        ),
        ("counts", f"kernel {result.kernel_connections:,}, servers {result.server_accepts:,} connections"),
        (
            "",
            (
                f"clients {result.datagrams_sent:,}, kernel {result.kernel_datagrams:,}, servers {result.server_datagrams:,} "
                f"datagrams; {result.datagrams_unanswered} unanswered"
            ),
        ),
        ("verdicts", ", ".join(f"{name} {count:,}" for name, count in result.verdicts.items() if count)),
        ("drops", ", ".join(f"{name} {count:,}" for name, count in result.drop_reasons.items()) or "none"),
    )
    for heading, text in lines:
        console.print(f"{heading:12} {text}", soft_wrap=True)
    console.print()
    if result.ok:
        held = "The demo held: no connection broke on a backend that stayed, and all counts agree."
        console.print(held, soft_wrap=True)
    for problem in result.problems:
        console.print(f"FAILED: {problem}", style="red", soft_wrap=True)
