"""Sockets whose backend's row is another's by now, and which of them no longer have a backend.

A change ends the sockets of what it takes away. Some are missed: the process was killed in the middle, the state could not be
written, the backend had got another row before (its way had changed), or a program connected by the old tables while they were
exchanged. Their records name a row and a generation that are not there any more; what they asked for and where they are
connected to tells whether they may stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hookline.control.placement import packed
from hookline.control.pools import Pool
from hookline.control.tables import PROTOCOLS, STATES, address_of
from hookline.datapath.loadbalancer.sockets import Row

Address = IPv4Address | IPv6Address


def strays(
    found: NDArray[np.void],
    backends: NDArray[np.void],
    pools: Iterable[Pool],
    drained: Set[tuple[int, bytes, int]] = frozenset(),
) -> dict[Row, tuple[Address, int]]:
    """Rows and generations whose sockets have no backend any more, with its address and port as they were.

    Costs next to nothing where every socket's row is still its backend's; else what a look at all pools costs.

    Args:
        found: The sockets, ``struct live_socket``, shape (n,).
        backends: The rows of ``backends``, ``struct backend``, shape (m,).
        pools: What is wanted now, with the targets whose connections may stay for a while.
        drained: Pool, packed address and port of backends whose drain is over.
    """
    found = found[~_at_home(found, backends)]
    if not len(found):
        return {}
    by_key: dict[int, Pool] = {}
    by_frontend: dict[tuple[bytes, int, int], list[Pool]] = {}
    for pool in pools:
        by_key[pool.key] = pool
        for frontend in pool.frontends:
            place = packed(frontend.address), frontend.port, PROTOCOLS[frontend.protocol]
            by_frontend.setdefault(place, []).append(pool)
    ends: dict[Row, tuple[Address, int]] = {}
    stay: set[Row] = set()
    for one in np.unique(
        found[["backend", "generation", "pool", "asked", "asked_port", "protocol", "remote", "remote_port"]]
    ):
        row = int(one["backend"]), int(one["generation"])
        address, port = one["remote"].tobytes(), int(one["remote_port"].byteswap())
        protocol = int(one["protocol"])
        # The pool's own name changes with the service's or the port's; then it is what stands in its place.
        own = by_key.get(int(one["pool"]))
        asked = one["asked"].tobytes(), int(one["asked_port"].byteswap()), protocol
        among = [own] if own is not None else by_frontend.get(asked, [])
        if any(_wants(pool, address, port, drained) for pool in among):
            stay.add(row)
        else:
            ends[row] = (address_of(one["remote"]), port)
    return {row: place for row, place in ends.items() if row not in stay}


def _at_home(found: NDArray[np.void], backends: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether the row that each socket was given is still that backend's, and the backend is not down."""
    there = found["backend"] < len(backends)
    rows = backends[np.where(there, found["backend"], 0)]
    same: NDArray[np.bool_] = (
        there
        & (rows["flags"] != 0)
        & (rows["generation"] == found["generation"])
        & (rows["state"] != STATES["down"])
        & (rows["port"] == found["remote_port"])
        & (_octets(rows["address"]) == _octets(found["remote"]))
    )
    return same


def _octets(addresses: NDArray[Any]) -> NDArray[np.void]:
    """Addresses as values that can be compared, shape (n,)."""
    return np.frombuffer(np.ascontiguousarray(addresses).tobytes(), "V16")


def _wants(pool: Pool, address: bytes, port: int, drained: Set[tuple[int, bytes, int]]) -> bool:
    return any(
        target.port == port
        and packed(target.address) == address
        and not (target.state == "down" and (pool.key, address, port) in drained)
        for target in pool.targets
    )
