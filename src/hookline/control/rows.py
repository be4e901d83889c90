"""The rows of ``services`` with indexes beside them, so that a change of one service asks for no look at all the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hookline.datapath.loadbalancer.balancer import pages_for

K = TypeVar("K")


class ServiceRow(NamedTuple):
    """One row of ``services``, in the order of its members."""

    id: int
    table_page: int
    table_size: int
    flags: int
    affinity_seconds: int
    reserved: int
    pool: int
    fingerprint: int


class ServiceRows(dict[bytes, ServiceRow]):
    """Rows by key.

    Attributes:
        of_pool: Keys by pool, those of rows for an address alone left out.
        of_address: Keys by packed address.
        numbers: The ids that are given out.
        taken: Which pages of ``maglev`` hold a table, shape (pages,).
    """

    def __init__(self, rows: Mapping[bytes, ServiceRow], pages: int) -> None:
        super().__init__()
        self.of_pool: dict[int, set[bytes]] = {}
        self.of_address: dict[bytes, set[bytes]] = {}
        self.numbers: set[int] = set()
        self.taken: NDArray[np.bool_] = np.zeros(pages, np.bool_)
        self._tables: dict[int, list[int]] = {}
        self.put(rows)

    def __setitem__(self, key: bytes, row: ServiceRow) -> None:
        if (old := self.get(key)) is not None:
            self._forget(key, old)
        super().__setitem__(key, row)
        self.of_address.setdefault(key[:16], set()).add(key)
        if row.pool:
            self.of_pool.setdefault(row.pool, set()).add(key)
            self.numbers.add(row.id)
        if row.table_size:
            # The frontends of a pool share its table.
            table = self._tables.setdefault(row.table_page, [pages_for(row.table_size), 0])
            table[1] += 1
            self.taken[row.table_page : row.table_page + table[0]] = True

    def put(self, rows: Mapping[bytes, ServiceRow]) -> None:
        """Adds or replaces rows."""
        for key, row in rows.items():
            self[key] = row

    def take(self, keys: Iterable[bytes]) -> list[ServiceRow]:
        """Removes rows, and returns them.

        Raises:
            KeyError: One is not there.
        """
        found = []
        for key in keys:
            row = super().pop(key)
            self._forget(key, row)
            found.append(row)
        return found

    def tables(self, pools: Iterable[int] | None = None) -> dict[int, int]:
        """First page of each table and how many it has, of all pools or these."""
        if pools is None:
            return {first: table[0] for first, table in self._tables.items()}
        rows = (self[key] for pool in pools for key in self.of_pool.get(pool, ()))
        return {row.table_page: pages_for(row.table_size) for row in rows if row.table_size}

    def _forget(self, key: bytes, row: ServiceRow) -> None:
        _remove(self.of_address, key[:16], key)
        if row.pool:
            _remove(self.of_pool, row.pool, key)
            self.numbers.discard(row.id)
        if row.table_size:
            table = self._tables[row.table_page]
            table[1] -= 1
            if not table[1]:
                del self._tables[row.table_page]
                self.taken[row.table_page : row.table_page + table[0]] = False


def _remove(index: dict[K, set[bytes]], name: K, key: bytes) -> None:
    entries = index[name]
    entries.discard(key)
    if not entries:
        del index[name]
