"""Watching services: what differs between one look at the counters and the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookline.agent._wire import Update
    from hookline.control import Node, PoolStatus


class Differences:
    """Remembers the last look, and says what the next one changes."""

    def __init__(self) -> None:
        self._last: dict[int, PoolStatus] | None = None

    def of(self, statuses: list[PoolStatus]) -> tuple[list[PoolStatus], list[int], bool]:
        """Pools that are new or different, keys of those that are gone, and whether this is the first look."""
        before, now = self._last, {status.pool.key: status for status in statuses}
        self._last = now
        if before is None:
            return statuses, [], True
        changed = [status for key, status in now.items() if before.get(key) != status]
        return changed, [key for key in before if key not in now], False


def watch_node(node: Node, interval_s: float) -> Iterator[Update]:
    """Looks at a node again and again, without an agent. Never ends by itself."""
    from hookline.agent._wire import Update

    differences = Differences()
    while True:
        pools, gone, whole = differences.of(node.services())
        if pools or gone or whole:
            yield Update(pools, gone, whole)
        time.sleep(interval_s)
