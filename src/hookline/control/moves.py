"""What a change moves: slots of tables, which are shares of new connections, and the connections that are open. Pure.

What becomes of an open connection of the XDP balancer, by what happens to its service and its backend:

| | TCP | UDP |
| --- | --- | --- |
| the service's address or port goes | ends: what arrives is dropped and counted | ends |
| its backend goes, or is down | stays with it until it ends | moves to another at its next packet; ends where there is none |
| its backend drains | stays | stays |

Sockets of this node that were given their backend when they connected are in no table of XDP's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hookline.control.placement import packed
from hookline.control.tables import (
    PROTOCOLS,
    SCOPES,
    SERVICE_MODULO,
    STATES,
    PoolChange,
    TableChange,
    Tables,
    frontend_key,
)
from hookline.datapath.loadbalancer import maglev

SAMPLES = 1 << 20
"""Hashes that are tried where a table by remainder changes its size, and the exact answer would take too long."""

FLOW_KEY_BYTES = 19
"""Address, port and protocol: what a connection's row and a service's key begin with."""

Counts = Mapping[tuple[bytes, int], int]
"""Open connections by what they were made to (`FLOW_KEY_BYTES`) and the row of their backend."""


class Moves(NamedTuple):
    """What a change does to one pool.

    Attributes:
        slots: Slots of the new table whose connections went elsewhere before; all of the old one's where there is none any more.
        size: Slots of the table that ``slots`` counts in; 0 where there was none before.
        share: The share of new connections that goes elsewhere than before, 0 to 1.
        stay: Open connections with backends that go, drain or are down, and that stay with them.
        move: Open connections that go to another backend.
        end: Open connections that end.
    """

    slots: int = 0
    size: int = 0
    share: float = 0.0
    stay: int = 0
    move: int = 0
    end: int = 0


class Reckoning:
    """What a whole change moves, pool by pool.

    Args:
        change: The whole change.
        tables: The tables before it.
        counts: Open connections.
    """

    def __init__(self, change: TableChange, tables: Tables, counts: Counts) -> None:
        self._tables = tables
        self._removed = frozenset(change.removed)
        self._keys: dict[int, list[bytes]] = {}
        wanted = {one.key for one in change.pools}
        for key, row in tables.services.items():
            if row.pool in wanted or key in self._removed:
                self._keys.setdefault(row.pool, []).append(key)
        self._open: dict[bytes, list[tuple[int, int]]] = {}
        for (flow, backend), number in counts.items():
            self._open.setdefault(flow, []).append((backend, number))

    def moves(self, change: PoolChange) -> Moves:
        """What the change of one pool moves."""
        tables, keys = self._tables, self._keys.get(change.key, [])
        new = _new_table(change, tables)
        slots = size = 0
        share = 0.0
        row = next((tables.services[key] for key in keys if tables.services[key].table_size), None)
        if change.pool is not None and row is not None:
            size = len(new) or row.table_size
            if change.rebuild or not len(new):
                modulo = (bool(row.flags & SERVICE_MODULO), change.pool.algorithm == "modulo")
                slots, share = differing(tables.slots(row), new, modulo=modulo)
        return Moves(slots, size, share, *self._connections(change, keys, served=bool(len(new))))

    def _connections(
        self, change: PoolChange, keys: Iterable[bytes], *, served: bool
    ) -> tuple[int, int, int]:
        """Open connections that stay with a backend that goes, that move, and that end."""
        leaving = {*change.gone_rows, *(row for row, state in change.restated if state == STATES["down"])}
        draining = {row for row, state in change.restated if state == STATES["draining"]}
        stay = move = end = 0
        for key in keys:
            if key[FLOW_KEY_BYTES] != SCOPES["any"]:
                continue  # XDP reads no other rows
            for backend, number in self._open.get(key[:FLOW_KEY_BYTES], ()):
                if key in self._removed:
                    end += number
                elif backend in draining or (backend in leaving and key[18] == PROTOCOLS["TCP"]):
                    stay += number
                elif backend in leaving and served:
                    move += number
                elif backend in leaving:
                    end += number
        return stay, move, end


def _new_table(change: PoolChange, tables: Tables) -> NDArray[np.uint32]:
    """The table after the change, by the rows that the backends have now; new ones have numbers beyond all rows."""
    pool = change.pool
    active = [
        item for item in change.placed if item.target.effective_weight and item.placement.how != "unreachable"
    ]
    only_loses_addresses = not change.placed and not change.gone_rows
    if pool is None or not (active or only_loses_addresses):
        return np.empty(0, np.uint32)
    if not change.rebuild:
        first = next(
            (frontend_key(one) for one in pool.frontends if frontend_key(one) in tables.services), None
        )
        return tables.slots(tables.services[first]) if first is not None else np.empty(0, np.uint32)
    rows = tables.pool_rows(pool)
    numbers = np.array(
        [
            rows.get((packed(item.target.address), item.target.port), (1 << 31) + index)
            for index, item in enumerate(active)
        ],
        np.uint32,
    )
    weights = [item.target.effective_weight for item in active]
    if pool.algorithm == "modulo":
        return numbers[maglev.modulo(weights)]
    return numbers[maglev.build([item.target.identity for item in active], weights, pool.table_size)]


def differing(
    old: NDArray[np.uint32], new: NDArray[np.uint32], *, modulo: tuple[bool, bool] = (False, False)
) -> tuple[int, float]:
    """Slots of a new table whose connections went elsewhere by the old one, and the share of all hashes that goes elsewhere.

    Tables of different sizes are compared where they meet: a hash is a point of the same line for both.

    Args:
        old: Rows by slot; not empty.
        new: Rows by slot; empty: there is none, and everything moves.
        modulo: Whether each is a table by remainder.
    """
    if not len(new):
        return len(old), 1.0
    if len(old) == len(new) and modulo[0] == modulo[1]:
        differ = old != new
        return int(differ.sum()), float(differ.mean())
    if modulo == (False, False):
        # In units of 1 / (old size × new size) of the line: exact, and at most 2^34.
        edges = np.unique(
            np.concatenate(
                [
                    np.arange(len(old), dtype=np.int64) * len(new),
                    np.arange(len(new), dtype=np.int64) * len(old),
                ]
            )
        )
        widths = np.diff(edges, append=len(old) * len(new))
        slots = edges // len(old)
        differ = old[edges // len(new)] != new[slots]
        return len(np.unique(slots[differ])), float(widths[differ].sum() / (len(old) * len(new)))
    step = (1 << 32) // SAMPLES
    # An odd step meets every remainder.
    hashes = (np.arange(SAMPLES, dtype=np.int64) * (step + 1)) & 0xFFFFFFFF
    places = [
        hashes % len(table) if remainder else hashes * len(table) >> 32
        for table, remainder in zip((old, new), modulo, strict=True)
    ]
    differ = old[places[0]] != new[places[1]]
    return len(np.unique(places[1][differ])), float(differ.mean())
