"""``hookline lab``: a small cluster of network namespaces on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hookline.cli._output import count, print_json, print_table

if TYPE_CHECKING:
    from hookline.lab import LabSummary, Member

app = typer.Typer(
    name="lab",
    help="A small cluster of network namespaces on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Option("--name", metavar="LAB", help="The lab.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]

NOT_FOUND, NOT_EXECUTABLE = 127, 126


@app.command()
def up(
    files: Annotated[
        list[str],
        typer.Option(
            "--file", "-f", metavar="FILE", help="A file or folder, - for standard input; repeatable."
        ),
    ],
    name: Name = "lab",
    as_json: Json = False,
) -> None:
    """Make a lab: a network namespace for every node, pod and machine outside, and a server on every port.

    Policies in the files are applied to every node, a NodeConfig to its own, what else they hold (services) to the first node.

    \b
    Examples:
      hookline lab up -f examples/lab/cluster.yaml
      hookline lab up -f cluster.yaml --name trial
    """
    from hookline import api

    notices: list[str] = []
    say = notices.append if as_json else _notice
    with _progress(f"lab {name}", shown=not as_json) as progress:
        made = api.lab_up(files, name, say=say, progress=progress)
    if as_json:
        print_json(_members_document(made.name, made.members) | {"notices": notices})
        return
    print(
        f"lab {made.name} is up: {count(len(made.nodes), 'node')}, {count(len(made.pods), 'pod')}, "
        f"{count(len(made.externals), 'external host')}"
    )


@app.command()
def down(
    name: Name = "lab",
    every: Annotated[bool, typer.Option("--all", help="Every lab of this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a lab with everything that belongs to it, also one that was half made.

    \b
    Examples:
      hookline lab down
      hookline lab down --name trial
      hookline lab down --all
    """
    from hookline import api, lab

    names = [summary.name for summary in lab.list_labs()] if every else [name]
    for one in names:
        api.lab_down(one)
        if not as_json:
            print(f"lab {one} is gone")
    if as_json:
        print_json({"removed": names})
    elif not names:
        print("there is no lab")


@app.command(name="list")
def list_command(
    name: Annotated[
        str | None, typer.Option("--name", metavar="LAB", help="The members of this lab.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the labs of this machine, or the members of one.

    \b
    Examples:
      hookline lab list
      hookline lab list --name trial --json
    """
    from hookline import lab

    if name is not None:
        members = lab.Lab.open(name).members
        if as_json:
            print_json(_members_document(name, members))
        else:
            print_table(
                ("NAME", "NODE", "ADDRESSES", "PORTS"),
                [
                    (
                        member.endpoint,
                        member.node or "-",
                        " ".join(map(str, member.addresses)),
                        " ".join(map(str, member.ports)) or "-",
                    )
                    for member in members
                ],
            )
        return
    labs = lab.list_labs()
    if as_json:
        print_json({"labs": [summary.as_dict() for summary in labs]})
    elif not labs:
        print("there is no lab; hookline lab up -f FILE makes one")
    else:
        print_table(("LAB", "STATUS", "NODES", "PODS", "EXTERNAL"), [_summary_row(one) for one in labs])


@app.command(name="exec")
def exec_command(
    member: Annotated[str, typer.Argument(metavar="POD", help="A pod, external/NAME or node/NAME.")],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND", help="The command and its arguments.")
    ],
    name: Name = "lab",
    as_json: Annotated[
        bool, typer.Option("--json", help="The exit status and the output as one JSON document.")
    ] = False,
) -> None:
    """Run a command in a member's network namespace and cgroup; its exit status is the command's.

    \b
    Examples:
      hookline lab exec orders-1 -- ip address
      hookline lab exec external/client --name trial -- curl -s http://10.244.1.10:8080/
    """
    import os

    from hookline import lab

    opened = lab.Lab.open(name)
    if as_json:
        done = opened.run(member, command)
        print_json({"exit_status": done.returncode, "stdout": done.stdout, "stderr": done.stderr})
        raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
    opened.move_into(member)
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"hookline: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE) from None


@app.command()
def probe(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A pod, external/NAME or node/NAME.")],
    target: Annotated[str, typer.Argument(metavar="TO:PORT[/udp]", help="A member or an address.")],
    name: Name = "lab",
    family: Annotated[Literal["4", "6"] | None, typer.Option("--family", help="IPv4 or IPv6 only.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, metavar="SECONDS")] = 3.0,
    as_json: Json = False,
) -> None:
    """Ask from inside a member who answers at a port, over TCP or UDP; exit status 1 if nobody does.

    \b
    Examples:
      hookline lab probe external/client orders-1:8080
      hookline lab probe orders-1 192.0.2.10:53/udp --timeout 1
      hookline lab probe orders-1 web-2:80 --family 6
    """
    from hookline import lab

    wanted: Literal[4, 6] | None = None if family is None else 4 if family == "4" else 6
    answer = lab.Lab.open(name).probe(source, target, family=wanted, timeout=timeout)
    if as_json:
        print_json(answer.as_dict())
        return
    host = f"[{answer.address}]" if answer.address.version == 6 else str(answer.address)
    print(
        f"{answer.answered_by} answered {answer.source} at {host}:{answer.port}/{answer.protocol} "
        f"in {answer.answered_ns / 1e6:.2f} ms"
        + (f" (connected in {answer.connected_ns / 1e6:.2f} ms)" if answer.connected_ns else "")
    )


def _members_document(name: str, members: tuple[Member, ...]) -> dict[str, Any]:
    return {"name": name, "members": [member.as_dict() for member in members]}


def _summary_row(summary: LabSummary) -> tuple[str, ...]:
    status = summary.status
    if status == "up" and not summary.server:
        return summary.name, "server gone", " ".join(summary.nodes), str(summary.pods), str(summary.externals)
    if status != "up":
        return summary.name, status, "-", "-", "-"
    return summary.name, status, " ".join(summary.nodes), str(summary.pods), str(summary.externals)


def _notice(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A line that counts network namespaces, on a terminal only."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda done, total: status.update(f"{what}: {done} of {total} network namespaces")
