"""``hookline verdicts``: what a node's firewall lets through and what it does not, as it tells it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hookline.cli._options import JsonOption, NodeOption

if TYPE_CHECKING:
    from hookline.control.verdicts import VerdictEvent, Verdicts

    Told = tuple[VerdictEvent, tuple[str, ...]]

HEAD = ("TIME", "VERDICT", "REASON", "DIRECTION", "FROM", "TO", "PROTOCOL", "POLICY")
WIDTHS = (15, 7, 14, 9, 28, 28, 8, 0)
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
LOOKS_EVERY_S = 1.0


def verdicts(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with those to come, until Ctrl-C.")
    ] = False,
    only: Annotated[
        Literal["allow", "deny", "audit"] | None, typer.Option("--only", help="Verdicts of this kind alone.")
    ] = None,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Show what a node's firewall decided: every packet that it drops, and what audited policies would deny.

    A verdict is told once, to whoever reads first. Where very many come in a short time some are left out, and where nobody reads
    for long the newest are lost: both are counted, and said at the end. With --json and --follow each verdict is a line.

    \b
    Examples:
      hookline verdicts
      hookline verdicts --follow --only deny --node lab/demo
      hookline verdicts --follow --json | jq 'select(.reason == "no_rule")'
    """
    from hookline.cli.state import _opened
    from hookline.trials import Blame

    blame = Blame()
    with _opened(node) as opened, opened.verdicts() as reader:

        def read() -> Iterator[Told]:
            events = [event for event in reader.read() if only in (None, event.verdict)]
            world = opened.world() if events else None
            return ((event, blame.policies(world, event)) for event in events if world is not None)

        if as_json and not follow:
            _print_document(str(opened.name), reader, read())
            return
        _print(reader, read, follow=follow, as_json=as_json)


def _print(reader: Verdicts, read: Callable[[], Iterable[Told]], *, follow: bool, as_json: bool) -> None:
    import json

    head = not as_json
    lost = suppressed = 0
    while True:
        for event, policies in read():
            if as_json:
                print(json.dumps(_document(event, policies)), flush=True)
                continue
            if head:
                print(_line(HEAD))
                head = False
            print(_line(_cells(event, policies)), flush=True)
        lost, suppressed = _say_missing(reader, lost, suppressed)
        if not follow:
            return
        reader.wait(LOOKS_EVERY_S)


def _print_document(name: str, reader: Verdicts, told: Iterable[Told]) -> None:
    from hookline.cli._output import print_json

    found = [_document(event, policies) for event, policies in told]
    print_json({"node": name, "verdicts": found, "lost": reader.lost, "suppressed": reader.suppressed})


def _document(event: VerdictEvent, policies: Sequence[str]) -> dict[str, Any]:
    return event.as_dict() | {"policies": list(policies)}


def _say_missing(reader: Verdicts, lost: int, suppressed: int) -> tuple[int, int]:
    """Says how many verdicts are missing, when these are more than were said."""
    now = reader.lost, reader.suppressed
    if now != (lost, suppressed):
        print(
            f"note: {now[0]} verdicts found no room and {now[1]} were left out, since the firewall was loaded",
            file=sys.stderr,
        )
    return now


def _cells(event: VerdictEvent, policies: Sequence[str]) -> tuple[str, ...]:
    from datetime import datetime

    named = f"{event.policy} {event.direction}[{event.rule}]" if event.policy else ", ".join(policies) or "-"
    at = datetime.fromtimestamp(event.time)
    return (
        at.strftime("%H:%M:%S.%f"),
        event.verdict,
        event.reason,
        event.direction,
        _end(event.source, event.source_port),
        _end(event.destination, event.destination_port),
        PROTOCOLS.get(event.protocol, str(event.protocol)),
        f"{named} (policies changed since)" if event.policies_changed else named,
    )


def _end(name: str, port: int) -> str:
    host = f"[{name}]" if ":" in name else name
    return f"{host}:{port}" if port else name


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
