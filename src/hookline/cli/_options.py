"""Options and arguments that several commands have, and what a shell completes for them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

NODE_VARIABLE = "HOOKLINE_NODE"


def complete_node(incomplete: str) -> list[str]:
    """``host`` and the labs of this machine, by their folders."""
    try:
        labs = sorted(os.listdir("/run/hookline/labs"))
    except OSError:
        labs = []
    return [name for name in ("host", *(f"lab/{lab}" for lab in labs)) if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """The kinds by their plural names, and the words for more than one kind."""
    from hookline import model

    names = ("all", "backends", "generations", *(kind.plural for kind in model.supported_kinds()))
    return [name for name in names if name.startswith(incomplete.lower())]


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """The names of the node's objects of the kind that stands before."""
    from hookline import model
    from hookline.api import Node
    from hookline.errors import HooklineError

    try:
        kind = model.find_kind(context.params.get("kind") or "")
        with Node(context.params.get("node") or os.environ.get(NODE_VARIABLE) or "host") as node:
            names = sorted({resource.name for resource in node.resources(kind)})
    except (HooklineError, OSError):
        return []
    return [name for name in names if name.startswith(incomplete)]


LONGEST_S = 1_000_000


def check_seconds(value: float | None) -> float | None:
    """A time that can be waited for: not ``inf``, not ``nan``, and no more than the kernel's timers hold."""
    if value is not None and not value <= LONGEST_S:
        raise typer.BadParameter(f"{value} is no number of seconds up to {LONGEST_S}.")
    return value


def check_path(value: str | None) -> str | None:
    """A path that names something."""
    if value == "":
        raise typer.BadParameter("it is empty, and names no file.")
    return value


NodeOption = Annotated[
    str,
    typer.Option(
        "--node",
        metavar="NODE",
        envvar=NODE_VARIABLE,
        autocompletion=complete_node,
        help="host, lab/LAB (its first node) or lab/LAB/NODE.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAMESPACE", help="The objects' namespace.")
]
KindArgument = Annotated[
    str,
    typer.Argument(
        metavar="KIND", autocompletion=complete_kind, help="virtualservices, services, vs, svc, pods …"
    ),
]
