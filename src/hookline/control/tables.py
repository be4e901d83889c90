"""The tables of the load balancer as they are in the kernel, and the change that makes them what is wanted.

`Tables` mirrors the pinned maps ``services`` and ``backends``. Everything about a pool can be read back from them (each row
names its pool, each service row the fingerprint of what its table was built from), so a process that finds the maps of a dead
one knows all that it knew. `Tables.diff` is pure; `Tables.carry_out` writes, in an order that never shows the programs half a
change:

1. new backends' rows, their counters zeroed;
2. new tables, in pages that no service points to; each is read back and checked, and one that is wrong ends the change here;
3. the states of the backends that stay;
4. services' rows, each in one update: from here on new connections go by the new tables;
5. services that are no longer wanted are removed;
6. rows of backends that are gone are made inactive.

A process that is killed in between leaves rows and pages that nothing points to; the next `diff` finds and frees them. Pages and
rows that a change frees are not given out again in the same change, so a program that still holds the old service row
reads a whole table.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hookline.control._errors import DoesNotFit, TableRefused
from hookline.control.placement import Placement, Placements, packed
from hookline.control.pools import Frontend, Pool, Scope, State, Target
from hookline.control.rows import ServiceRow, ServiceRows
from hookline.datapath.loadbalancer import maglev
from hookline.datapath.loadbalancer.balancer import LoadBalancer, pages_for

PROTOCOLS = {"TCP": 6, "UDP": 17}
SCOPES: dict[Scope, int] = {"any": 0, "inside": 1}
STATES: dict[State, int] = {"starting": 1, "active": 2, "draining": 3, "down": 4}
SERVICE_ADDRESS, SERVICE_NODE_OWN, SERVICE_MODULO, SERVICE_REDIRECT = 1, 2, 4, 8
REDIRECT = "LocalRedirectPolicy/"
"""What the names of redirects' pools begin with: they are not for the pods that are their backends."""
QUARANTINE_SECONDS = 0.1


class BackendIdentity(NamedTuple):
    """What makes a backend's row what it is: when any of it changes, the backend gets another row."""

    address: bytes
    port: int
    flags: int
    source: bytes


class PlacedTarget(NamedTuple):
    """A backend, where it is, and the identity of its row."""

    target: Target
    placement: Placement
    identity: BackendIdentity

    @classmethod
    def of(cls, target: Target, placement: Placement) -> PlacedTarget:
        """The backend at this place."""
        identity = BackendIdentity(packed(target.address), target.port, placement.flags, placement.source)
        return cls(target, placement, identity)


@dataclass(slots=True)
class PoolChange:
    """What changes for one pool. ``pool`` is None where it goes away altogether.

    Attributes:
        restated: Rows of backends that stay, with their new states.
    """

    key: int
    pool: Pool | None
    placed: tuple[PlacedTarget, ...] = ()
    new: tuple[PlacedTarget, ...] = ()
    gone_rows: tuple[int, ...] = ()
    restated: tuple[tuple[int, int], ...] = ()
    rebuild: bool = False
    fingerprint: int = 0
    new_frontends: tuple[Frontend, ...] = ()

    @property
    def pages(self) -> int:
        """Pages that the new table takes."""
        return pages_for(self.pool.table_size) if self.rebuild and self.pool else 0


@dataclass(slots=True)
class TableChange:
    """All that changes: data only.

    Attributes:
        pools: The pools that change, those that stay as they are left out.
        removed: Keys of service rows to remove.
        addresses: Address rows to write: key and flags.
    """

    pools: list[PoolChange] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    addresses: dict[bytes, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pools or self.removed or self.addresses)


def service_key(
    address: IPv4Address | IPv6Address, port: int = 0, protocol: str = "", scope: Scope = "any"
) -> bytes:
    """A key of ``services``: with port and protocol, or for the address alone."""
    return packed(address) + port.to_bytes(2, "big") + bytes((PROTOCOLS.get(protocol, 0), SCOPES[scope]))


def frontend_key(frontend: Frontend) -> bytes:
    """The key of a frontend's row."""
    return service_key(frontend.address, frontend.port, frontend.protocol, frontend.scope)


def key_address(key: bytes) -> IPv4Address | IPv6Address:
    """The address in a key."""
    mapped = IPv6Address(key[:16])
    return mapped.ipv4_mapped or mapped


def _fingerprint(pool: Pool, placed: Iterable[PlacedTarget]) -> int:
    digest = hashlib.blake2b(digest_size=8, person=b"table")
    digest.update(f"{pool.algorithm}/{pool.table_size}".encode())
    entries = [
        b"%b%b%b/%d/%d"
        % (
            item.target.identity,
            item.placement.source,
            item.placement.flags.to_bytes(1, "big"),
            item.target.effective_weight,
            0,
        )
        for item in placed
        if item.target.effective_weight
    ]
    # Modulo's slots follow the order that the user gave; Maglev's do not depend on it.
    for entry in entries if pool.algorithm == "modulo" else sorted(entries):
        digest.update(entry)
    return int.from_bytes(digest.digest(), "little")


class Tables:
    """The mirror of one load balancer's tables. The node's lock is held while it changes them."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer
        self._quarantine: list[tuple[float, int, int]] = []
        self.load()

    def load(self) -> None:
        """Reads the kernel's maps."""
        self.services = ServiceRows(self.read_services(), self.table_pages)
        _, self._backends = self._balancer.maps["backends"].read()
        self._pools: dict[int, dict[BackendIdentity, int]] = {}
        for row in np.flatnonzero(self._backends["flags"]).tolist():
            self._remember(row)

    def read_services(self) -> dict[bytes, ServiceRow]:
        """The rows of ``services`` as the kernel has them now, by key."""
        keys, values = self._balancer.maps["services"].read()
        width = keys.dtype.itemsize
        raw = np.ascontiguousarray(keys).tobytes()
        return {raw[i * width : (i + 1) * width]: ServiceRow(*row) for i, row in enumerate(values.tolist())}

    @property
    def backends(self) -> NDArray[np.void]:
        """The mirror of ``backends``, by row."""
        return self._backends

    def _remember(self, row: int) -> None:
        entry = self._backends[row]
        identity = BackendIdentity(
            entry["address"].tobytes(),
            int(entry["port"].byteswap()),
            int(entry["flags"]),
            entry["source"].tobytes(),
        )
        self._pools.setdefault(int(entry["pool"]), {})[identity] = row

    # -- reading

    @property
    def table_pages(self) -> int:
        """Pages that the map has."""
        return self._balancer.page_count

    def is_place(self, first_page: int, size: int) -> bool:
        """Whether there are such pages: a row that somebody else wrote may name others."""
        return 0 <= first_page <= self.table_pages - pages_for(size)

    def used_pages(self, pools: Set[int] | None = None) -> dict[int, int]:
        """Pages in use, by all pools or these: first page of each table and how many it has."""
        return self.services.tables(pools)

    @property
    def pages_in_use(self) -> int:
        """Pages that hold a table."""
        return int(np.count_nonzero(self.services.taken))

    def pool_rows(self, pool: Pool) -> dict[tuple[bytes, int], int]:
        """Rows of a pool's backends by packed address and port."""
        return {
            (identity.address, identity.port): row for identity, row in self._pools.get(pool.key, {}).items()
        }

    def rows_of(self, pool: int) -> NDArray[np.void]:
        """Copies of the rows of ``backends`` that a pool has, by the pool's key."""
        rows: NDArray[np.void] = self._backends[sorted(self._pools.get(pool, {}).values())]
        return rows

    def backends_in_use(self) -> int:
        """Active rows."""
        return int(np.count_nonzero(self._backends["flags"]))

    def table(self, frontend: Frontend) -> NDArray[np.uint32]:
        """A copy of a frontend's table, row of `backends` by slot, shape (size,); empty where it has none."""
        row = self.services.get(frontend_key(frontend))
        return np.empty(0, np.uint32) if row is None else self.slots(row)

    def slots(self, row: ServiceRow) -> NDArray[np.uint32]:
        """A copy of the table that a service's row points to, shape (size,); empty where it has none."""
        if not row.table_size or not self.is_place(row.table_page, row.table_size):
            return np.empty(0, np.uint32)
        slots = self._balancer.page_range(row.table_page, pages_for(row.table_size))
        return slots.reshape(-1)[: row.table_size].copy()

    def retired(
        self,
        change: TableChange,
        drained: Set[tuple[int, bytes, int]] = frozenset(),
        wanted: Mapping[int, Set[tuple[bytes, int]]] = {},
    ) -> dict[tuple[int, int], tuple[IPv4Address | IPv6Address, int]]:
        """Backends that a change takes away altogether: address and port by row and generation.

        One that only gets another row, since the way to it or the name of its pool changed, stays.

        Args:
            change: The change, before it is carried out.
            drained: Pool, packed address and port of backends whose drain is over: those that go down now are found, too.
            wanted: What `still_wanted` says of the change.
        """
        found = {}
        for difference in change.pools:
            for row, state in difference.restated:
                entry = self.backends[row]
                port = int(entry["port"].byteswap())
                if state == STATES["down"] and (difference.key, entry["address"].tobytes(), port) in drained:
                    found[row, int(entry["generation"])] = (address_of(entry["address"]), port)
            stays = {(item.identity.address, item.identity.port) for item in difference.placed}
            stays |= wanted.get(difference.key, frozenset())
            for row in difference.gone_rows:
                entry = self.backends[row]
                port = int(entry["port"].byteswap())
                if (entry["address"].tobytes(), port) not in stays:
                    found[row, int(entry["generation"])] = (address_of(entry["address"]), port)
        return found

    def diff(
        self, pools: Sequence[Pool], placements: Placements, *, only: frozenset[int] | None = None
    ) -> TableChange:
        """What has to change for the tables to be these pools'.

        Args:
            pools: The wanted pools, all of them, or with ``only`` those among the named ones.
            placements: Where their backends are.
            only: Keys of the pools that may have changed; the others are left alone.
        """
        change = TableChange()
        placements.learn(
            address
            for pool in pools
            for address in (
                *(target.address for target in pool.targets),
                *(frontend.address for frontend in pool.frontends),
            )
        )
        wanted_keys: set[bytes] = set()
        wanted_pools = {pool.key for pool in pools}
        addresses: dict[IPv4Address | IPv6Address, None] = {}
        for pool in pools:
            for frontend in pool.frontends:
                wanted_keys.add(frontend_key(frontend))
                # XDP alone asks whether an address is a service's.
                if frontend.scope == "any":
                    addresses[frontend.address] = None
            difference = self._pool_difference(pool, placements)
            if difference is not None:
                change.pools.append(difference)
        for address in addresses:
            key = service_key(address)
            flags = SERVICE_ADDRESS | (SERVICE_NODE_OWN if placements.is_own(address) else 0)
            wanted_keys.add(key)
            if key not in self.services or self.services[key].flags != flags:
                change.addresses[key] = flags
        change.removed = list(self._stale_keys(wanted_keys, wanted_pools, only))
        for number in self._pools if only is None else sorted(only & self._pools.keys()):
            if number not in wanted_pools:
                change.pools.append(PoolChange(number, None, gone_rows=tuple(self._pools[number].values())))
        return change

    def _stale_keys(
        self, wanted: set[bytes], pools: set[int], only: frozenset[int] | None
    ) -> Iterator[bytes]:
        if only is None:
            yield from (key for key in self.services if key not in wanted)
            return
        mine = (key for pool in only for key in self.services.of_pool.get(pool, ()))
        gone = {key for key in mine if key not in wanted}
        yield from gone
        # An address' own row goes with its last service.
        for address in {key[:16] for key in gone if key[19] == SCOPES["any"]}:
            still = any(
                key[19] == SCOPES["any"] and key not in gone and self.services[key].pool
                for key in self.services.of_address[address]
            )
            address_key = address + bytes(4)
            if not still and address_key not in wanted and address_key in self.services:
                yield address_key

    def _pool_difference(self, pool: Pool, placements: Placements) -> PoolChange | None:
        placed = tuple(
            PlacedTarget.of(target, placements.place(target.address, pool.forwarding))
            for target in pool.targets
        )
        reachable = tuple(item for item in placed if item.placement.how != "unreachable")
        existing = self._pools.get(pool.key, {})
        identities = {item.identity for item in reachable}
        new = tuple(item for item in reachable if item.identity not in existing)
        gone = tuple(row for identity, row in existing.items() if identity not in identities)
        states = self._backends["state"]
        restated = tuple(
            (row, state)
            for item in reachable
            if (row := existing.get(item.identity)) is not None
            and states[row] != (state := _row_state(item.target))
        )
        fingerprint = _fingerprint(pool, reachable)
        rows = [self.services.get(frontend_key(frontend)) for frontend in pool.frontends]
        new_frontends = tuple(
            frontend
            for frontend, row in zip(pool.frontends, rows, strict=True)
            if row is None or row.pool != pool.key
        )
        built = any(row and row.pool == pool.key and row.fingerprint == fingerprint for row in rows)
        active = any(item.target.effective_weight for item in reachable)
        stale = any(
            row
            and row.pool == pool.key
            and (row.fingerprint != fingerprint or row.affinity_seconds != pool.affinity_seconds)
            for row in rows
        )
        rebuild = active and (not built or bool(new and any(item.target.effective_weight for item in new)))
        if not (new or gone or restated or new_frontends or stale or rebuild):
            return None
        return PoolChange(pool.key, pool, placed, new, gone, restated, rebuild, fingerprint, new_frontends)

    def check_fits(self, change: TableChange) -> None:
        """Checks that the maps can hold the change, beside what they hold until it is done.

        Raises:
            DoesNotFit: Naming the map, what is wanted, what there is, and the setting that changes it.
        """
        backends = self.backends_in_use() + sum(len(pool.new) for pool in change.pools)
        room = len(self._backends) - 1
        if backends > room:
            raise DoesNotFit(
                f"{backends} backends do not fit",
                why=f"the map backends has room for {room}",
                remedy="raise spec.maps.backends in the NodeConfig",
            )
        keys = set(change.addresses)
        for pool in change.pools:
            keys.update(frontend_key(frontend) for frontend in pool.new_frontends)
        services = len(self.services) + len(keys - self.services.keys())
        room = self._balancer.maps["services"].max_entries
        if services > room:
            raise DoesNotFit(
                f"{services} rows of services do not fit",
                why=f"each address takes one and each of its ports another, and the map services has room for {room}",
                remedy="raise spec.maps.services in the NodeConfig",
            )
        self._find_pages([pool.pages for pool in change.pools if pool.pages])
        largest = max((len(pool.placed) for pool in change.pools), default=0)
        room = self._balancer.maps["maglev_candidates"].max_entries
        if largest > room:
            raise DoesNotFit(
                f"{largest} backends in one service do not fit",
                why=f"the table builder takes {room}",
                remedy="split the service",
            )

    def _find_pages(self, wanted: Sequence[int]) -> list[int]:
        """First pages for tables of so many pages each, first fit."""
        now = time.monotonic()
        self._quarantine = [entry for entry in self._quarantine if now - entry[0] < QUARANTINE_SECONDS]
        taken = self.services.taken
        if self._quarantine:
            taken = taken.copy()
            for _, first, count in self._quarantine:
                taken[first : first + count] = True
        # Where free pages begin and end, by turns.
        edges = np.flatnonzero(np.diff(taken, prepend=True, append=True)).reshape(-1, 2)
        gaps: list[list[int]] = [[first, after - first] for first, after in edges.tolist()]
        found = []
        start = 0
        for count in wanted:
            while start < len(gaps) and gaps[start][1] == 0:
                start += 1
            for gap in gaps[start:]:
                if gap[1] >= count:
                    found.append(gap[0])
                    gap[0] += count
                    gap[1] -= count
                    break
            else:
                free = sum(gap[1] for gap in gaps)
                raise DoesNotFit(
                    f"tables of {sum(wanted)} pages do not fit",
                    why=f"the map maglev has {self.table_pages} pages, {free} of them free, and old and new "
                    "tables stand side by side while they are exchanged",
                    remedy="raise spec.maps.maglevPages in the NodeConfig, or choose a smaller tableSize",
                )
        return found

    # -- writing

    def carry_out(self, change: TableChange) -> None:
        """Makes the change. It was checked by `check_fits`, so nothing here is expected to fail.

        Raises:
            TableRefused: A table came out wrong. No service points to it, and those that there were are in use.
        """
        if not change:
            return
        self._write_new_backends(change)
        rows = self._build_tables(change)
        self._write_states(change)
        self._write_services(change, rows)
        self._remove_services(change)
        self._retire_backends(change)

    def _write_new_backends(self, change: TableChange) -> None:
        new = [(pool.key, item) for pool in change.pools for item in pool.new]
        if not new:
            return
        free = np.flatnonzero(self._backends["flags"][1:] == 0)[: len(new)] + 1
        values = np.zeros(len(new), self._backends.dtype)
        values["address"] = _words([item.identity.address for _, item in new], values["address"])
        values["source"] = _words([item.identity.source for _, item in new], values["source"])
        values["port"] = np.array([item.target.port for _, item in new], np.uint16).byteswap()
        values["flags"] = [item.placement.flags for _, item in new]
        values["state"] = [_row_state(item.target) for _, item in new]
        values["pool"] = np.array([key for key, _ in new], np.uint64)
        # A connection of the row's earlier owner must not be taken for one of the new.
        values["generation"] = self._backends["generation"][free] + np.uint16(1)
        counters = self._balancer.maps["backend_metrics"]
        rows = free.astype(np.uint32)
        counters.write(rows, np.zeros(len(new), counters.value_dtype))
        self._balancer.maps["backends"].write(rows, values)
        self._backends[free] = values
        for (key, item), row in zip(new, free.tolist(), strict=True):
            self._pools.setdefault(key, {})[item.identity] = row

    def _write_states(self, change: TableChange) -> None:
        restated = [pair for pool in change.pools for pair in pool.restated]
        if not restated:
            return
        rows = np.array([row for row, _ in restated], np.uint32)
        values = self._backends[rows]
        values["state"] = [state for _, state in restated]
        self._balancer.maps["backends"].write(rows, values)
        self._backends[rows] = values

    def _build_tables(self, change: TableChange) -> dict[int, tuple[int, int]]:
        """Builds the tables; first page and size by pool."""
        rebuilt = [pool for pool in change.pools if pool.rebuild and pool.pool]
        placed_at = self._find_pages([pool.pages for pool in rebuilt])
        built = {}
        for difference, first in zip(rebuilt, placed_at, strict=True):
            pool = difference.pool
            if pool is None:
                continue
            rows_of = self._pools[pool.key]
            active = [
                item
                for item in difference.placed
                if item.target.effective_weight and item.placement.how != "unreachable"
            ]
            rows = np.array([rows_of[item.identity] for item in active], np.uint32)
            weights = [item.target.effective_weight for item in active]
            if pool.algorithm == "modulo":
                slots = rows[maglev.modulo(weights)]
                size = len(slots)
                self._balancer.write_table(first, slots)
            else:
                size = pool.table_size
                plan = maglev.turns([item.target.identity for item in active], weights, size)
                self._balancer.build_table(first, size, rows, plan)
            self._check_table(pool, first, size, rows.tolist(), weights)
            built[pool.key] = (first, size)
        return built

    def _check_table(
        self, pool: Pool, first: int, size: int, rows: Sequence[int], weights: Sequence[int]
    ) -> None:
        slots = self._balancer.page_range(first, pages_for(size)).reshape(-1)[:size]
        wrong = maglev.violation(slots, rows, weights)
        if wrong:
            raise TableRefused(
                f"the new table of {pool.service} port {pool.port} is wrong, and was not put to use",
                why=wrong,
                remedy="report this with the service's file; what was balanced before still is",
            )

    def _write_services(self, change: TableChange, built: dict[int, tuple[int, int]]) -> None:
        rows: dict[bytes, ServiceRow] = {}
        numbers = self._free_service_ids()
        for difference in change.pools:
            pool = difference.pool
            if pool is None:
                continue
            shared = self._shared_table(difference, built)
            flags = SERVICE_MODULO if pool.algorithm == "modulo" else 0
            flags |= SERVICE_REDIRECT if pool.service.startswith(REDIRECT) else 0
            for frontend in pool.frontends:
                key = frontend_key(frontend)
                known = self.services.get(key)
                number = known.id if known is not None else next(numbers)
                row = ServiceRow(
                    number, *shared, flags, pool.affinity_seconds, 0, pool.key, difference.fingerprint
                )
                if row != known:
                    rows[key] = row
        for key, address_flags in change.addresses.items():
            rows[key] = ServiceRow(0, 0, 0, address_flags, 0, 0, 0, 0)
        if not rows:
            return
        services = self._balancer.maps["services"]
        fresh = [row.id for key, row in rows.items() if key not in self.services and row.pool]
        if fresh:
            counters = self._balancer.maps["service_metrics"]
            counters.write(np.array(fresh, np.uint32), np.zeros(len(fresh), counters.value_dtype))
        keys = np.frombuffer(b"".join(rows), services.key_dtype)
        values = np.array([tuple(row) for row in rows.values()], services.value_dtype)
        services.write(keys, values)
        self._set_aside(old for key in rows if (old := self.services.get(key)) is not None and old.table_size)
        self.services.put(rows)

    def _shared_table(self, difference: PoolChange, built: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """First page and size of the table that all frontends of a pool share; (0, 0) without active backends."""
        if difference.key in built:
            return built[difference.key]
        pool = difference.pool
        for frontend in pool.frontends if pool else ():
            row = self.services.get(frontend_key(frontend))
            if row and row.pool == difference.key and row.fingerprint == difference.fingerprint:
                return row.table_page, row.table_size
        return 0, 0

    def _free_service_ids(self) -> Iterator[int]:
        used = self.services.numbers
        # Row 0 is what address rows carry; their counters are nobody's.
        return (
            number
            for number in range(1, self._balancer.maps["service_metrics"].max_entries)
            if number not in used
        )

    def _remove_services(self, change: TableChange) -> None:
        if not change.removed:
            return
        services = self._balancer.maps["services"]
        services.remove(np.frombuffer(b"".join(change.removed), services.key_dtype))
        removed = self.services.take(change.removed)
        self._set_aside(row for row in removed if row.table_size)

    def _retire_backends(self, change: TableChange) -> None:
        gone = [row for pool in change.pools for row in pool.gone_rows]
        if not gone:
            return
        rows = np.array(gone, np.uint32)
        values = self._backends[rows]
        values["flags"] = 0
        self._balancer.maps["backends"].write(rows, values)
        self._backends[rows] = values
        retired = set(gone)
        for difference in change.pools:
            kept = {
                identity: row
                for identity, row in self._pools.get(difference.key, {}).items()
                if row not in retired
            }
            if kept:
                self._pools[difference.key] = kept
            else:
                self._pools.pop(difference.key, None)

    def _set_aside(self, rows: Iterable[ServiceRow]) -> None:
        now = time.monotonic()
        self._quarantine.extend((now, row.table_page, pages_for(row.table_size)) for row in rows)


def still_wanted(
    change: TableChange, before: Mapping[str, Sequence[Pool]], after: Mapping[str, Sequence[Pool]]
) -> dict[int, frozenset[tuple[bytes, int]]]:
    """Packed addresses and ports that the services of the pools which lose backends still have, in whatever pool.

    A pool is another one when its port's name or its reach changes. Nobody leaves by that, and no connection ends.

    Args:
        change: What is going to be carried out.
        before: The pools before it, by service; at least those of the services that it is about.
        after: Those after it.

    Returns:
        By the key of the pool, of the same protocol.
    """
    losing = {difference.key for difference in change.pools if difference.gone_rows}
    if not losing:
        return {}
    return {
        pool.key: frozenset(
            (packed(target.address), target.port)
            for other in after.get(service, ())
            if other.protocol == pool.protocol
            for target in other.targets
        )
        for service, group in before.items()
        for pool in group
        if pool.key in losing
    }


def _row_state(target: Target) -> int:
    """The state in a target's row. One that takes no new connections, for whatever reason, gets none by affinity either."""
    if target.state in ("starting", "active") and not target.effective_weight:
        return STATES["draining"]
    return STATES[target.state]


def _words(packed_addresses: Sequence[bytes], like: NDArray[Any]) -> NDArray[Any]:
    """Packed addresses as the rows' own type, shape (n, …)."""
    return np.frombuffer(b"".join(packed_addresses), np.uint8).view(like.dtype).reshape(like.shape)


def address_of(row: NDArray[np.void]) -> IPv4Address | IPv6Address:
    """The address in a row's member of 16 octets."""
    mapped = ip_address(row.tobytes())
    return (mapped.ipv4_mapped or mapped) if isinstance(mapped, IPv6Address) else mapped
