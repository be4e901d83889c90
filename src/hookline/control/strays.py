"""Sockets whose backend's row is another's by now, and which of them no longer have a backend.

A change ends the sockets of what it takes away. Some are missed: the process was killed in the middle, the state could not be
written, the backend had got another row before (its way had changed), or a program connected by the old tables while they were
exchanged. Their records name a row and a generation that are not there any more; whose pool it was and where they are
connected to tells whether they may stay. The rule is that of `tables.still_wanted`: they do as long as a pool of the same
service has the backend, also where their own port is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
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
    services: Callable[[], Mapping[int, str]] = dict,
) -> dict[Row, tuple[Address, int]]:
    """Rows and generations whose sockets have no backend any more, with its address and port as they were.

    Costs next to nothing where every socket's row is still its backend's; else what a look at all pools costs.

    Args:
        found: The sockets, ``struct live_socket``, shape (n,).
        backends: The rows of ``backends``, ``struct backend``, shape (m,).
        pools: What is wanted now, with the targets whose connections may stay for a while.
        drained: Pool, packed address and port of backends whose drain is over.
        services: Gives whose pools were that are gone, by key. Of a pool that neither this nor ``pools`` has it is not known:
            its sockets stay as long as any service has the backend.
    """
    found = found[~_at_home(found, backends)]
    if not len(found):
        return {}
    by_key: dict[int, Pool] = {}
    by_backend: dict[tuple[bytes, int, int], list[Pool]] = {}
    places = set(
        zip((one.tobytes() for one in found["remote"]), found["remote_port"].byteswap().tolist(), strict=True)
    )
    for pool in pools:
        by_key[pool.key] = pool
        for target in pool.targets:
            place = packed(target.address), target.port
            if place in places:
                by_backend.setdefault((*place, PROTOCOLS[pool.protocol]), []).append(pool)
    left = services()
    ends: dict[Row, tuple[Address, int]] = {}
    stay: set[Row] = set()
    for one in np.unique(found[["backend", "generation", "pool", "protocol", "remote", "remote_port"]]):
        row = int(one["backend"]), int(one["generation"])
        address, port = one["remote"].tobytes(), int(one["remote_port"].byteswap())
        protocol = int(one["protocol"])
        among = by_backend.get((address, port, protocol), [])
        own = by_key.get(int(one["pool"]))
        if own in among:
            among = [own]
        elif service := own.service if own is not None else left.get(int(one["pool"])):
            among = [pool for pool in among if pool.service == service]
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
