"""``hookline policy``: tables of who may reach whom, tried; policies that only report; what a change would mean."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hookline.cli._options import JsonOption, NodeOption

if TYPE_CHECKING:
    from hookline.trials import Row

app = typer.Typer(
    name="policy",
    help="Network policies: try tables of who may reach whom, and policies without denying.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

SHOWN_MISMATCHES = 50


@app.command(name="test")
def try_tables(
    tables: Annotated[
        list[str],
        typer.Argument(metavar="TABLE...", help="Files or folders with PolicyTests, - for standard input."),
    ],
    mode: Annotated[
        Literal["offline", "live", "both"],
        typer.Option("--mode", help="Ask what the policies mean, send real packets in a lab, or both."),
    ] = "both",
    no_datapath: Annotated[
        bool,
        typer.Option(
            "--no-datapath",
            help="Leave the programs out of the lab: what tables deny gets through, and the test must fail.",
        ),
    ] = False,
    lab: Annotated[
        str | None, typer.Option("--lab", metavar="LAB", help="What the lab is called while it is there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try tables of who may reach whom, offline by what the policies mean and live with real packets in a lab.

    Exit status 1 if any probe comes out otherwise than its table expects; each is shown with the policy and rule that decide.

    \b
    Examples:
      hookline policy test tests/policy/
      hookline policy test isolation.yaml --mode offline
      hookline policy test tests/policy/ --json | jq 'all(.[]; .live == .expect and .offline == .expect)'
    """
    from hookline import trials
    from hookline.cli._errors import UsageError
    from hookline.cli._output import print_json

    if no_datapath and mode == "offline":
        raise UsageError(
            "--no-datapath says nothing with --mode offline",
            why="offline sends no packets",
            remedy="leave one of them out",
        )
    if mode != "offline":
        _refuse_unprivileged()
    with _progress() as progress:
        rows = trials.run(tables, mode=mode, datapath=not no_datapath, lab_name=lab, progress=progress)
    wrong = [row for row in rows if row.mismatch]
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        _show(rows, wrong, mode)
    if no_datapath and not wrong:
        print(
            "hookline: nothing differed without the programs: these tables cannot tell whether the data path works",
            file=sys.stderr,
        )
    if wrong or no_datapath:
        raise typer.Exit(1)


@app.command()
def audit(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A NetworkPolicy, NAME or NAMESPACE/NAME, or a HostPolicy's name."
        ),
    ],
    off: Annotated[bool, typer.Option("--off", help="Enforce it again.")] = False,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Have a policy only report what it would deny: it isolates nobody, and its denials are told as verdicts.

    The object on the node is marked, not its file: applying that again enforces the policy again, unless it has the
    annotation hookline.dev/audit: "true" itself.

    \b
    Examples:
      hookline policy audit shop/web && hookline verdicts --follow
      hookline policy audit shop/web --off
    """
    from hookline import trials
    from hookline.cli._output import print_json
    from hookline.cli.objects import _opened, _print_warnings

    with _opened(node, reading=False) as opened:
        changed, applied = trials.set_audit(opened, policy, on=not off)
        if as_json:
            print_json(
                {
                    "node": str(opened.name),
                    "policy": changed.reference,
                    "audited": not off,
                    "changed": applied is not None,
                }
            )
            return
        already = "" if applied is not None else " already"
        print(
            f"{changed.reference} is enforced{already}"
            if off
            else f"{changed.reference} is audited{already}: it denies nothing; hookline verdicts --follow tells what it would"
        )
        if applied is not None:
            _print_warnings(applied.plan)


@app.command()
def impact(
    files: Annotated[
        list[str], typer.Argument(metavar="NEW.yaml...", help="Files or folders, - for standard input.")
    ],
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Say which connections that the node knows would be judged otherwise, if these files were applied; changes nothing.

    Those are the connections that its firewall remembers: none where no policy is on the node.

    \b
    Examples:
      hookline policy impact new.yaml
      hookline policy impact policies/ --node lab/demo --json
    """
    from hookline import trials
    from hookline.cli._output import count, print_json, print_table
    from hookline.cli.state import _opened

    with _opened(node) as opened:
        found = trials.impact(opened, files)
        if as_json:
            changes = [one.as_dict() for one in found.changes]
            print_json({"node": str(opened.name), "connections": found.connections, "changes": changes})
            return
        if found.changes:
            print_table(
                ("FROM", "TO", "PORT", "PROTOCOL", "NOW", "THEN", "DECIDED BY"),
                [
                    (one.source, one.target, one.port, one.protocol, one.before, one.after, one.decided_by)
                    for one in found.changes
                ],
            )
        print(
            f"{len(found.changes)} of {count(found.connections, 'recorded connection')} of node {opened.name} "
            "would be judged otherwise"
        )


def _refuse_unprivileged() -> None:
    from hookline import bpf
    from hookline.cli.objects import CAPABILITIES

    if bpf.lacking(*CAPABILITIES):
        raise bpf.NotPermitted("cannot make a lab and send packets in it", capability=" ".join(CAPABILITIES))


def _show(rows: Sequence[Row], wrong: Sequence[Row], mode: str) -> None:
    from hookline.cli._output import count

    for row in wrong[:SHOWN_MISMATCHES]:
        step = f" step {row.step}" if row.step else ""
        print(
            f"MISMATCH {row.test}{step}: {row.source} to {row.target}:{row.port}/{row.protocol} IPv{row.family}: "
            f"expected {row.expect}, {_found(row)}"
        )
        if row.decided_by:
            print(f"  decided by {row.decided_by}")
    if len(wrong) > SHOWN_MISMATCHES:
        print(f"and {len(wrong) - SHOWN_MISMATCHES} more; --json has them all")
    tables = len({row.test for row in rows})
    said = {"offline": "offline", "live": "live", "both": "offline and live"}[mode]
    probes = f"{count(len(rows), 'probe')} of {count(tables, 'table')}"
    if wrong:
        print(f"{len(wrong)} of {probes} came out otherwise than expected ({said})")
    else:
        print(f"{probes} came out as expected ({said})")


def _found(row: Row) -> str:
    found = []
    if row.offline is not None:
        found.append(f"offline {row.offline}")
    if row.live is not None:
        found.append(f"live {row.live}" + (f" ({row.seen})" if row.live != row.expect and row.seen else ""))
    return ", ".join(found)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line that says how far the probes are, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("reading the tables") as status:
        yield lambda what, done, total: status.update(f"{escape(what)}: {done} of {total} probes")
