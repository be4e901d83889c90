"""``hookline get services|backends --watch``: what changes, as it changes, by the agent where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hookline.cli import _documents, _tables

if TYPE_CHECKING:
    from hookline.agent import Update
    from hookline.api import AnyNode
    from hookline.control import PoolStatus

Document = dict[str, Any]


def updates(node: AnyNode, interval_s: float) -> Iterator[Update]:
    """What changes of the node's pools; the first has all."""
    from hookline.agent import RemoteNode, watch_node

    if isinstance(node, RemoteNode):
        return node.updates(interval_s)
    return watch_node(node, interval_s)


def backends(
    node: AnyNode, interval_s: float, service: str | None, namespace: str | None
) -> Iterator[list[Document]]:
    """Each time something changed: ``{event, backend}`` of the backends that are new, different or gone."""

    def described(pools: Iterable[PoolStatus]) -> dict[str, Document]:
        chosen = [one for one in pools if _documents.is_of(one.pool.service, service, namespace)]
        return {
            "/".join(
                map(str, (one["service"], one["service_port"], one["family"], one["address"], one["port"]))
            ): one
            for one in _documents.backends(chosen)
        }

    yield from _events(updates(node, interval_s), described, "backend")


def services(node: AnyNode, interval_s: float, chosen: Callable[[str], bool]) -> Iterator[list[Document]]:
    """The same of services, chosen by reference: ``{event, service}``, where a service has its pools."""

    def described(pools: Iterable[PoolStatus]) -> dict[str, Document]:
        grouped: dict[str, list[PoolStatus]] = {}
        for one in pools:
            if chosen(one.pool.service):
                grouped.setdefault(one.pool.service, []).append(one)
        return {name: _documents.watched_service(name, statuses) for name, statuses in grouped.items()}

    yield from _events(updates(node, interval_s), described, "service")


def _events(found: Iterator[Update], described: Any, name: str) -> Iterator[list[Document]]:
    pools: dict[int, PoolStatus] = {}
    before: dict[str, Document] = {}
    for update in found:
        if update.whole:
            pools = {}
        pools.update({one.pool.key: one for one in update.pools})
        for key in update.gone:
            pools.pop(key, None)
        now = described(pools.values())
        events = [
            {"event": "changed" if key in before else "added", name: document}
            for key, document in now.items()
            if before.get(key) != document
        ]
        events += [{"event": "removed", name: document} for key, document in before.items() if key not in now]
        before = now
        if events or update.whole:
            yield events


def show(found: Iterable[list[Document]], *, as_json: bool, name: str) -> None:
    """Prints changes: as newline-delimited JSON, or as lines of a table, whose head comes first. Ends with its reader."""
    head = True
    for events in found:
        if as_json:
            for event in events:
                print(json.dumps(event), flush=True)
            continue
        rows = [(_mark(event), event[name]) for event in events]
        _tables.print_changes(name, rows, head=head)
        head = False


def _mark(event: Mapping[str, Any]) -> str:
    return {"added": "+", "changed": "~", "removed": "-"}[event["event"]]
