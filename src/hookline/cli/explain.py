"""``hookline explain``: what decides about a connection, and what would stop it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hookline.cli._options import JsonOption, NodeOption

if TYPE_CHECKING:
    from hookline.control.explain import Choice, Explanation, Permission
    from hookline.policy import Direction, Side


def explain(
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="A",
            help="A pod, node/NAME, external/NAME or an address, with its port or without.",
        ),
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="SERVICE:PORT[/udp|/sctp]", help="A service, a pod or an address.")
    ],
    family: Annotated[Literal["4", "6"] | None, typer.Option("--family", help="IPv4 or IPv6 only.")] = None,
    node: NodeOption = "host",
    as_json: JsonOption = False,
) -> None:
    """Say which service, table, backend and policies a new connection meets on a node, why, and what would stop it.

    The kernel's own tables are followed. With the source's port the slot is exact for what arrives from outside. Exit
    status 1 where something would stop it.

    \b
    Examples:
      hookline explain --from orders-1 --to shop/web:80
      hookline explain --from external/client:40000 --to 192.0.2.10:53/udp --node lab/demo --json
    """
    from hookline.cli._output import print_json
    from hookline.cli.state import _opened

    _check(source, target, family)
    with _opened(node) as opened:
        answer = opened.explain(source, target, family=None if family is None else int(family))
        if as_json:
            print_json({"node": str(opened.name), **answer.as_dict()})
        else:
            _show(answer)
    if answer.obstacles or answer.outcome in ("refused", "dropped"):
        raise typer.Exit(1)


def _check(source: str, target: str, family: str | None) -> None:
    """Refuses what the command line alone shows to be none, whatever the node has."""
    from hookline.cli._errors import UsageError
    from hookline.model.names import Endpoint, InvalidName

    try:
        asking, wanted = Endpoint.parse(source), Endpoint.parse(target)
    except InvalidName as error:
        raise UsageError(error.what, why=error.why, remedy=error.remedy) from None
    if wanted.port is None:
        raise UsageError(
            f"which port of {target}?", why="--to gives none", remedy=f"say --to {target}:PORT or :PORT/udp"
        )
    versions = {one.address.version for one in (asking, wanted) if one.address is not None}
    if family is not None:
        versions.add(4 if family == "4" else 6)
    if len(versions) > 1:
        raise UsageError(
            f"no connection goes from {source} to {target}",
            why="one is IPv4 and the other IPv6"
            if family is None
            else f"with --family {family}, addresses are IPv{family}",
            remedy="give addresses of one family",
        )


WAYS = {
    "sockets": "decided when the socket connects (cgroup programs)",
    "xdp": "decided when the packet arrives (XDP on the uplink)",
}


def _show(answer: Explanation) -> None:
    from hookline.cli._output import print_table

    host = f"[{answer.address}]" if ":" in answer.address else answer.address
    print(
        f"{answer.source} to {answer.destination}: {host}:{answer.port}/{answer.protocol}, {WAYS[answer.way]}"
    )
    table = answer.table
    if table is not None:
        affinity = f", clients stay {table['affinity_seconds']} s" if table["affinity_seconds"] else ""
        slot = f", slot {table['slot']}" if table["slot"] is not None else ""
        print(
            f"table: {table['service']} port {table['port']}, scope {table['scope']}, {table['algorithm']}, "
            f"{table['size']} slots{slot}{affinity}"
        )
    for line in answer.why:
        print(f"  {line}")
    if answer.chosen is not None:
        print(f"backend: {answer.chosen.name}")
    rows = [*answer.backends, *answer.others]
    if rows:
        print_table(
            ("BACKEND", "ADDRESS", "SHARE", "STATE", "REACHED", "NEXT HOP"),
            [_row(one) for one in rows],
            indent=2,
        )
    for one in answer.permissions:
        host = f"[{one.address}]" if ":" in one.address else one.address
        to = f"{one.backend or answer.destination} ({host}:{one.port})"
        print(f"policies, {one.source} to {to}: {_verdict(one)}")
        print(f"  egress:  {_side(one, 'egress')}")
        print(f"  ingress: {_side(one, 'ingress')}")
        for direction, policies in one.would_deny.items():
            for policy in policies:
                print(f"  {direction}: {policy}, audited, would deny")
    for obstacle in answer.obstacles:
        concerned = f" ({obstacle.backend})" if obstacle.backend else ""
        print(f"stops it: {obstacle.what}{concerned}\n      do: {obstacle.remedy}")
    if not answer.obstacles:
        print(
            "nothing was found that would stop it"
            if answer.outcome in ("backend", "direct")
            else f"it is {answer.outcome}"
        )


def _verdict(one: Permission) -> str:
    if not one.allowed:
        return "denied"
    asked = all(one.enforced[name] or side.allowed for name, side in _sides(one).items())
    return "allowed" if asked else "allowed, as far as nodes were asked"


def _side(one: Permission, direction: Direction) -> str:
    side = _sides(one)[direction]
    node = one.judged_by[direction]
    if one.enforced[direction] or not (node or side.isolated):
        return side.why
    judge = f"judged by node {node}, which was not asked" if node else "judged by no node"
    return f"{judge}; by the policies known here {'allowed' if side.allowed else 'denied'}: {side.why}"


def _sides(one: Permission) -> dict[Direction, Side]:
    return {"egress": one.egress, "ingress": one.ingress}


def _row(one: Choice) -> tuple[str | float, ...]:
    host = f"[{one.address}]" if ":" in one.address else one.address
    return one.name, f"{host}:{one.port}", one.share, one.state, one.how, f"{one.next_hop} on {one.interface}"
