"""``hookline state``: whether a node's wanted state is whole, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from hookline.cli._options import JsonOption, NodeOption

if TYPE_CHECKING:
    from hookline.api import Node
    from hookline.control import Recovery

app = typer.Typer(
    name="state",
    help="A node's wanted state: check its file, repair it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def check(node: NodeOption = "host", as_json: JsonOption = False) -> None:
    """Read all of a node's state, and compare with what the kernel serves; exit status 1 where it is not whole.

    \b
    Examples:
      hookline state check
      hookline state check --node lab/demo --json
    """
    with _opened(node) as opened:
        found = opened.check_state()
        _show(opened, found, as_json=as_json)
        if not found.healthy:
            raise typer.Exit(1)


@app.command()
def repair(
    drop_unclaimed: Annotated[
        bool,
        typer.Option("--drop-unclaimed", help="Remove the kernel's services that no object wants any more."),
    ] = False,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Move a damaged state aside, take over what can be trusted of it, and have the kernel go on.

    What the kernel serves and no object wants stays until the file that wants it is applied again. Where all is well,
    nothing happens.

    \b
    Examples:
      hookline state repair
      hookline apply -f services/ && hookline state repair --drop-unclaimed
    """
    with _opened(node) as opened:
        _refuse_agent(opened)
        _show(opened, opened.recover(drop_unclaimed=drop_unclaimed), as_json=as_json)


@contextmanager
def _opened(name: str) -> Iterator[Node]:
    """The node itself, also where an agent keeps it."""
    from hookline import bpf
    from hookline.api import Node
    from hookline.cli.objects import CAPABILITIES

    if bpf.lacking(*CAPABILITIES):
        raise bpf.NotPermitted(f"cannot work on node {name}", capability=" ".join(CAPABILITIES))
    with Node(name) as node:
        yield node


def _refuse_agent(node: Node) -> None:
    """A file is not moved away from under an agent that has it open."""
    from hookline.control import StateError

    if not node.name.agent_socket.exists():
        return
    from hookline.agent import connect

    agent = connect(node.name)
    if agent is not None:
        agent.close()
        raise StateError(
            f"the agent of node {node.name} has its state open",
            why="it repairs the state itself when it starts",
            remedy="restart it: systemctl restart hookline-agent",
        )


def _show(node: Node, found: Recovery, *, as_json: bool) -> None:
    from hookline.cli._output import count, print_json

    if as_json:
        print_json({"node": str(node.name), **found.as_dict()})
        return
    if found.healthy:
        print(f"the state of node {node.name} is whole")
        return
    if found.damage:
        print(f"the state of node {node.name} is damaged: {found.damage}")
    elif found.lost:
        print(f"the state of node {node.name} was lost: {found.lost}")
    if found.kept_at is not None:
        print(f"{count(len(found.restored), 'object')} taken over; the damaged file is {found.kept_at}")
    for reference in found.unreadable:
        print(f"lost: {reference}")
    for one in found.unclaimed:
        print(f"served and wanted by no object: {one}")
    if found.unclaimed:
        print("apply the files again to claim these, or drop them: hookline state repair --drop-unclaimed")
