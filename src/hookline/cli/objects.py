"""``hookline apply``, ``get``, ``describe`` and ``delete``: what is wanted on a node, and what is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hookline.cli._errors import UsageError
from hookline.cli._options import (
    JsonOption,
    KindArgument,
    NamespaceOption,
    NodeOption,
    check_seconds,
    complete_name,
)

if TYPE_CHECKING:
    from hookline.api import AnyNode
    from hookline.control import Applied, Moves, Plan
    from hookline.errors import HooklineError
    from hookline.model import Resource

Output = Literal["table", "json", "yaml"]

CAPABILITIES = ("CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN")
DEFAULT_NAMESPACE = "default"
ALL, BACKENDS, GENERATIONS = "all", "backends", "generations"
DONE = {"create": "created", "change": "changed", "remove": "removed", "keep": "unchanged"}
MARKS = {"create": "+", "change": "~", "remove": "-", "keep": " "}


def apply(
    files: Annotated[
        list[str],
        typer.Option(
            "--file", "-f", metavar="FILE", help="A file or folder, - for standard input; repeatable."
        ),
    ],
    prune: Annotated[
        bool, typer.Option("--prune", help="Also remove what the same files once set and no longer hold.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Add and change objects, and bring the kernel to it.

    What cannot be is refused before anything is touched. A second time nothing changes. The command ends, and the
    kernel goes on.

    \b
    Examples:
      hookline apply -f services.yaml
      hookline apply -f config/ --prune --dry-run
      hookline apply -f service.yaml --node lab/demo
    """
    from hookline.cli._output import print_json

    with _opened(node, reading=dry_run) as opened:
        if dry_run:
            plan = opened.plan(files, prune=prune)
            if as_json:
                print_json({"node": str(opened.name), "dry_run": True, **plan.as_dict()})
            else:
                _print_plan(opened, plan)
            return
        applied = opened.apply(files, prune=prune)
        _warn_of_pods_elsewhere(opened, applied.plan)
        _show_applied(opened, applied, as_json=as_json)


def get(
    kind: KindArgument,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=complete_name, help="One object.")
    ] = None,
    namespace: NamespaceOption = None,
    node: NodeOption = "host",
    output: Annotated[
        Output | None, typer.Option("--output", "-o", help="yaml can be applied again.")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            "-w",
            help="Services or backends: go on, and show what changes; JSON is a line for each.",
        ),
    ] = False,
    interval_s: Annotated[
        float,
        typer.Option(
            "--interval",
            metavar="SECONDS",
            min=0.1,
            callback=check_seconds,
            help="Between two looks with --watch.",
        ),
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """List objects and their state: of a kind, or all; or backends.

    "backends" lists every backend of every service with its share of new connections and its counters, "generations" the
    last changes, which hookline rollback can go back to. Objects of all namespaces are listed unless --namespace names one.

    \b
    Examples:
      hookline get services
      hookline get vs orders --json
      hookline get backends --node lab/demo
      hookline get backends --watch --json
      hookline get all -o yaml > everything.yaml
    """
    chosen: Output = "json" if as_json else output or "table"
    with _opened(node, reading=True) as opened:
        if watch:
            _watch_kind(opened, kind, name, namespace, chosen, interval_s)
            return
        if kind == BACKENDS:
            _get_backends(opened, name, namespace, chosen)
            return
        if kind == GENERATIONS:
            _get_generations(opened, name, chosen)
            return
        _show_resources(opened, _selected(opened, kind, name, namespace), chosen, kind)


def describe(
    kind: KindArgument,
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=complete_name, help="The object.")
    ] = "",
    namespace: NamespaceOption = None,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Show everything about one object; of a policy also what each of its rules let through on this node.

    For a service: its backends by port and family, their slots of the table beside the share that their weights ask
    for, notes on how they are reached; and the node's counters and the hooks that its programs are on.

    \b
    Examples:
      hookline describe vs orders
      hookline describe VirtualService/default/orders --node lab/demo --json
    """
    from hookline.cli import _describe, _documents
    from hookline.cli._output import print_json

    with _opened(node, reading=True) as opened:
        (reference,) = _references(kind, [name] if name else [], namespace)
        resource = _find(opened, reference)
        document = {
            "node": str(opened.name),
            "item": _documents.item(
                resource,
                opened.source_of(reference),
                _documents.statuses_by_service(opened),
                _documents.counts_by_policy(opened, [resource]),
            ),
            "totals": _documents.totals(opened),
            "attachments": _documents.attachments(opened),
        }
        if as_json:
            print_json(document)
        else:
            _describe.print_item(document, resource)


def delete(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="virtualservices, services, vs, svc …")
    ] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", autocompletion=complete_name)
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="FILE", help="Remove what these files describe; repeatable."),
    ] = None,
    namespace: NamespaceOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Remove objects by kind and name, or those of files.

    With the last service the programs are detached and their tables go.

    \b
    Examples:
      hookline delete vs orders quotes
      hookline delete -f services.yaml
    """
    from hookline import control
    from hookline.cli._output import print_json

    if (kind is None) == (not files):
        raise UsageError(
            "say what to delete: KIND NAME, or -f FILE",
            why="neither was given" if kind is None else "both were given",
            remedy="hookline delete --help",
        )
    with _opened(node, reading=dry_run) as opened:
        if kind is not None:
            references = _references(kind, names or [], namespace)
        else:
            references = [resource.reference for resource in control.load(files or [])]
        if dry_run:
            plan = opened.plan(delete=references)
            if as_json:
                print_json({"node": str(opened.name), "dry_run": True, **plan.as_dict()})
            else:
                _print_plan(opened, plan)
            return
        _show_applied(opened, opened.delete(references), as_json=as_json)


def rollback(
    to: Annotated[
        int | None,
        typer.Option(
            "--to", min=0, metavar="N", help="What was wanted after generation N; by default the one before."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Go back to an earlier generation of what is wanted: hookline get generations lists them.

    Planned, checked and applied as any change, and a generation of its own: a second rollback undoes the first. Objects
    of an owner (a lab, the agent) stay as they are.

    \b
    Examples:
      hookline rollback --dry-run
      hookline rollback --to 7 --node lab/demo
    """
    from hookline.cli._output import print_json

    with _opened(node, reading=dry_run) as opened:
        if not dry_run:
            _show_applied(opened, opened.rollback(to), as_json=as_json)
            return
        plan = opened.plan_rollback(to)
        if as_json:
            print_json({"node": str(opened.name), "dry_run": True, **plan.as_dict()})
        else:
            _print_plan(opened, plan)


@contextmanager
def _opened(name: str, *, reading: bool) -> Iterator[AnyNode]:
    """The node, by its agent where one answers, else once it is clear that this user may do anything with it.

    What only reads passes by an agent that hangs; what changes something fails there.
    """
    import sys

    from hookline import bpf
    from hookline.api import open_node

    def check_rights() -> None:
        if bpf.lacking(*CAPABILITIES):
            raise bpf.NotPermitted(f"cannot work on node {name}", capability=" ".join(CAPABILITIES))

    def say_that_it_hangs(error: HooklineError) -> None:
        print(
            f"note: {error.what} ({error.why}): the node is read directly, without it\n      do: {error.remedy}",
            file=sys.stderr,
        )

    with open_node(name, before_direct=check_rights, on_hang=say_that_it_hangs if reading else None) as node:
        yield node


# -- which objects


def _kind(word: str) -> type[Resource]:
    from hookline import model

    try:
        return model.find_kind(word)
    except model.InvalidResource as error:
        raise UsageError(
            f"{word!r} cannot be listed or named",
            why=error.why,
            remedy=f"{error.remedy}; {BACKENDS}, {GENERATIONS} and {ALL} can be listed too",
        ) from None


def _references(kind: str, names: Sequence[str], namespace: str | None) -> list[str]:
    """References from ``KIND NAME…``, or from ``KIND/NAMESPACE/NAME`` as errors and tables write them."""
    if "/" in kind:
        word, *rest = kind.split("/")
        given = _kind(word)
        if len(rest) == (2 if given.is_namespaced() else 1) and all(rest) and not names and not namespace:
            return ["/".join((given.kind, *rest))]
        raise UsageError(
            f"{kind!r} is not one object",
            why="one object is KIND NAME, or KIND/NAMESPACE/NAME (KIND/NAME where there are no namespaces)",
            remedy="hookline get all",
        )
    given = _kind(kind)
    if not names:
        raise UsageError(f"which {given.kind}?", why="no name was given", remedy=f"hookline get {kind}")
    if not given.is_namespaced():
        if namespace:
            raise UsageError(
                f"there is no {given.kind} in namespace {namespace}",
                why=f"{given.kind} objects are in no namespace",
                remedy="leave --namespace out",
            )
        return [f"{given.kind}/{name}" for name in names]
    return [f"{given.kind}/{namespace or DEFAULT_NAMESPACE}/{name}" for name in names]


def _find(node: AnyNode, reference: str) -> Resource:
    node.source_of(reference)  # says what there is where there is none of that name
    return next(resource for resource in node.resources() if resource.reference == reference)


def _selected(node: AnyNode, kind: str, name: str | None, namespace: str | None) -> list[Resource]:
    if "/" in kind or name is not None:
        if kind == ALL:
            raise UsageError(
                f"which kind of object is {name}?",
                why=f"{ALL} is every kind, and one object has one",
                remedy="hookline get KIND NAME",
            )
        (reference,) = _references(kind, [name] if name else [], namespace)
        return [_find(node, reference)]
    found = node.resources(None if kind == ALL else _kind(kind))
    return [resource for resource in found if namespace is None or resource.namespace == namespace]


# -- printing


def _show_resources(node: AnyNode, resources: Sequence[Resource], output: Output, kind: str) -> None:
    from hookline.cli import _documents, _tables
    from hookline.cli._output import print_json

    if output == "yaml":
        from hookline.sources import files

        print(files.dump(resources), end="")
        return
    statuses = _documents.statuses_by_service(node)
    counts = _documents.counts_by_policy(node, resources)
    items = [
        _documents.item(resource, node.source_of(resource.reference), statuses, counts)
        for resource in resources
    ]
    if output == "json":
        print_json({"node": str(node.name), "items": items})
        return
    kinds = dict.fromkeys(item["kind"] for item in items)
    for number, one in enumerate(kinds):
        if len(kinds) > 1:
            print(f"{chr(10) if number else ''}{one}")
        _tables.print_items(one, [item for item in items if item["kind"] == one])
    if not items:
        given = None if kind == ALL else _kind(kind).kind
        _say_nothing(node, given or "object")
        other = {"Service": "VirtualService", "VirtualService": "Service"}.get(given or "")
        if other is not None and (there := len(node.resources(_kind(other)))):
            _say_other(node, other, there)


def _get_backends(node: AnyNode, service: str | None, namespace: str | None, output: Output) -> None:
    from hookline.cli import _documents, _tables
    from hookline.cli._output import print_json

    if output == "yaml":
        raise UsageError("backends cannot be printed as yaml", why="they are no objects", remedy="say --json")
    statuses = [one for one in node.services() if _documents.is_of(one.pool.service, service, namespace)]
    found = _documents.backends(statuses)
    if output == "json":
        print_json({"node": str(node.name), "backends": found})
    elif found:
        _tables.print_backends(found)
    else:
        _say_nothing(node, "backend")


def _watch_kind(
    node: AnyNode, kind: str, name: str | None, namespace: str | None, output: Output, interval_s: float
) -> None:
    from hookline.cli import _documents, _watch

    if output == "yaml":
        raise UsageError(
            "what changes cannot be printed as yaml",
            why="it has no end, and is no object",
            remedy="say --json",
        )
    if kind == BACKENDS:
        found = _watch.backends(node, interval_s, name, namespace)
        _watch.show(found, as_json=output == "json", name="backend")
        return
    given = None if kind == ALL else _kind(kind.partition("/")[0]).kind
    if given not in ("Service", "VirtualService"):
        raise UsageError(
            f"{kind} cannot be watched",
            why="services and backends have something that changes by itself",
            remedy="hookline get services --watch, or backends",
        )
    if "/" in kind or name is not None:
        (wanted,) = _references(kind, [name] if name else [], namespace)
        _find(node, wanted)  # says what there is where there is none

        def chosen(reference: str) -> bool:
            return reference == wanted
    else:

        def chosen(reference: str) -> bool:
            return reference.startswith(f"{given}/") and _documents.is_of(reference, None, namespace)

    _watch.show(_watch.services(node, interval_s, chosen), as_json=output == "json", name="service")


def _get_generations(node: AnyNode, name: str | None, output: Output) -> None:
    from hookline.cli import _tables
    from hookline.cli._output import print_json

    if output == "yaml" or name is not None:
        raise UsageError(
            "generations are listed all at once, as a table or as JSON",
            why="they are no objects",
            remedy="hookline get generations --json",
        )
    found = [one.as_dict() for one in node.generations()]
    if output == "json":
        print_json({"node": str(node.name), "generations": found})
    elif found:
        _tables.print_generations(found)
    else:
        _say_nothing(node, "generation")


def _say_nothing(node: AnyNode, thing: str) -> None:
    import sys

    print(f"node {node.name} has no {thing}", file=sys.stderr)


def _say_other(node: AnyNode, kind: str, number: int) -> None:
    """There are two kinds of services, and who asks for one may mean the other."""
    import sys

    from hookline.cli._output import count

    print(f"it has {count(number, kind)}: hookline get {kind.lower()}s --node {node.name}", file=sys.stderr)


def _show_applied(node: AnyNode, applied: Applied, *, as_json: bool) -> None:
    from hookline.cli._output import count, print_json

    attachments = [
        {
            "program": one.program,
            "hook": one.hook,
            "interface": one.interface,
            "change": one.change,
        }
        for one in applied.attachments
    ]
    if as_json:
        print_json(
            {
                "node": str(node.name),
                "dry_run": False,
                **applied.plan.as_dict(),
                "attachments": attachments,
            }
        )
        return
    for change in applied.plan.resources:
        print(f"{change.reference} {DONE[change.action]}")
    for one in applied.attachments:
        if one.change != "kept":
            place = (
                f" {'from' if one.change == 'detached' else 'on'} {one.interface}" if one.interface else ""
            )
            print(f"{one.program} {one.change}{place}" + (f" ({one.hook})" if one.hook else ""))
    if not applied.plan.changes and not any(one.change != "kept" for one in applied.attachments):
        print("nothing changed")
    change_of_policies = applied.plan.policies
    if change_of_policies is not None and change_of_policies.connections_cut:
        print(f"{count(change_of_policies.connections_cut, 'connection')} not allowed any more: cut")
    if applied.plan.sockets_ended:
        print(
            f"{count(applied.plan.sockets_ended, 'socket')} ended: the backend is gone, or the connection not allowed any more"
        )
    _print_warnings(applied.plan)


def _warn_of_pods_elsewhere(node: AnyNode, plan: Plan) -> None:
    """Who applies a policy to one node of a lab may believe pods on the others covered."""
    policies = [
        one.reference
        for one in plan.resources
        if one.action != "remove" and one.reference.startswith("NetworkPolicy/")
    ]
    if node.name.lab is None or not policies:
        return
    from hookline import api

    for reference, pods in api.selected_elsewhere(node, policies).items():
        plan.warnings.append(
            f"{reference} is applied to node {node.name} alone, and selects pods on others too: {', '.join(pods)}"
        )


def _print_warnings(plan: Plan) -> None:
    import sys

    for warning in plan.warnings:
        print(f"note: {warning}", file=sys.stderr)


def _move_cells(moves: Moves | None) -> tuple[str, ...]:
    from hookline.cli._output import share

    if moves is None:
        return ("",) * 5
    return (
        f"{moves.slots} of {moves.size}" if moves.size else "",
        share(moves.share) if moves.size else "",
        str(moves.stay),
        str(moves.move),
        str(moves.end),
    )


def _print_policies(plan: Plan) -> None:
    from hookline.cli._output import count

    change = plan.policies
    if not change:
        return
    print("\npolicies")
    if change.detaches:
        print("  none is for this node any more: the firewall is detached and its tables removed")
        return
    if change.loads:
        print("  the firewall's programs are loaded")
    print(
        f"  {count(change.rules_added, 'row')} of rules added, {change.rules_removed} removed; "
        f"{count(change.endpoints, 'pod')} and {count(change.identities, 'address', 'addresses')} are judged otherwise"
    )
    if change.connections_cut is not None:
        print(f"  {count(change.connections_cut, 'open connection')} would be cut")


def _print_plan(node: AnyNode, plan: Plan) -> None:
    from hookline.cli._output import count, print_table

    if not plan.changes:
        print(f"plan for node {node.name}: nothing would change")
        _print_warnings(plan)
        return
    print(f"plan for node {node.name}; nothing was changed")
    for change in plan.resources:
        print(f"  {MARKS[change.action]} {change.reference}" + " (unchanged)" * (change.action == "keep"))
    if plan.pools:
        print("\nservices")
        print_table(
            (
                "",
                "SERVICE",
                "PORT",
                "FAMILY",
                "ADDED",
                "REMOVED",
                "SLOTS MOVED",
                "NEW CONNECTIONS MOVED",
                "OPEN: STAY",
                "MOVE",
                "END",
            ),
            [
                (
                    MARKS[pool.action],
                    pool.service,
                    pool.port,
                    pool.family,
                    count(len(pool.added), "backend") if pool.added else "",
                    count(pool.removed, "backend") if pool.removed else "",
                    *_move_cells(pool.moves),
                )
                for pool in plan.pools
            ],
            indent=2,
        )
    _print_policies(plan)
    if plan.usage:
        print("\nmaps")
        print_table(
            ("MAP", "USED", "SIZE"),
            [(name, usage.used, usage.size) for name, usage in plan.usage.items()],
            indent=2,
        )
    if plan.loads:
        print("\nprograms are loaded; running connections go on")
    elif plan.attaches:
        print(f"\nmissing and attached again: {', '.join(plan.attaches)}")
    if plan.uplinks:
        print("uplinks: " + ", ".join(f"{name} (XDP {mode})" for name, mode in plan.uplinks))
    if plan.detaches:
        print("\nnothing is left to balance: programs are detached and their tables removed")
    if plan.sockets_ended:
        print(
            f"\n{plan.sockets_ended} sockets of this node are connected to backends that go, and would be ended"
        )
    _print_warnings(plan)
