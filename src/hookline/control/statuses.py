"""Services as the kernel has them: backends, their share of the table, counters; and how full maps are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hookline import bpf
from hookline.control.placement import Placement, Placements, packed
from hookline.control.pools import Pool, Target
from hookline.control.serving import Serving
from hookline.control.tables import frontend_key

COUNT_EVERY_S = 15.0


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One backend of a pool as the kernel has it. Counters are sums over the CPUs since the backend was added.

    Attributes:
        slots: Slots of the table that are its own.
    """

    target: Target
    placement: Placement
    slots: int
    connections: int
    packets: int
    bytes: int
    reply_packets: int
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool as the kernel has it. Counters are sums over its frontends and the CPUs."""

    pool: Pool
    table_size: int
    connections: int
    packets: int
    bytes: int
    drops: int
    backends: tuple[BackendStatus, ...]


@dataclass(slots=True)
class Counted:
    """How many entries a map had when they were last counted, which is `COUNT_EVERY_S` ago at most."""

    _map: int = 0
    _number: int = 0
    _until: float = 0.0

    def of(self, table: bpf.Map) -> int:
        """The number of entries."""
        now = time.monotonic()
        if self._map != table.id or now >= self._until:
            self._map, self._number = table.id, table.used or 0
            self._until = now + COUNT_EVERY_S
        return self._number


_COUNTERS = ("connections", "packets", "bytes", "reply_packets", "reply_bytes")


def statuses_of(pools: Sequence[Pool], placements: Placements, kernel: Serving) -> list[PoolStatus]:
    """The pools as the kernel has them."""
    maps, tables = kernel.balancer.maps, kernel.tables
    _, service_counters = maps["service_metrics"].read()
    _, backend_counters = maps["backend_metrics"].read()
    sums = {name: backend_counters[name].sum(axis=1) for name in _COUNTERS}
    # One question of the kernel for all: each alone takes 100 µs.
    placements.learn(target.address for pool in pools for target in pool.targets)
    found = []
    for pool in pools:
        rows = [row for f in pool.frontends if (row := tables.services.get(frontend_key(f))) is not None]
        counters = service_counters[[row.id for row in rows]]
        slots = dict(
            zip(
                *(part.tolist() for part in np.unique(tables.table(pool.frontends[0]), return_counts=True)),
                strict=True,
            )
        )
        rows_of = tables.pool_rows(pool)
        backends = []
        for target in pool.targets:
            number = rows_of.get((packed(target.address), target.port))
            backends.append(
                BackendStatus(
                    target,
                    placements.place(target.address, pool.forwarding),
                    slots.get(number, 0),
                    *(int(sums[name][number]) if number is not None else 0 for name in _COUNTERS),
                )
            )
        found.append(
            PoolStatus(
                pool,
                table_size=rows[0].table_size if rows else 0,
                connections=int(counters["connections"].sum()),
                packets=int(counters["packets"].sum()),
                bytes=int(counters["bytes"].sum()),
                drops=int(counters["drops"].sum()),
                backends=tuple(backends),
            )
        )
    return found
