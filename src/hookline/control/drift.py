"""What the kernel has against what was written there: the difference that somebody else made, and its repair.

`Tables` mirrors the maps, and within one process nobody else writes them. So whatever differs from the mirror came
from outside, and the mirror is put back. The slots of the tables, which are large, are remembered as checksums; those of
a table that this process has not seen before are counted instead: each backend must have the share that its weight asks for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hookline import bpf
from hookline.control.placement import packed
from hookline.control.pools import Pool
from hookline.control.rows import ServiceRow
from hookline.control.tables import Tables, address_of, frontend_key, key_address
from hookline.datapath.loadbalancer import maglev
from hookline.datapath.loadbalancer.balancer import LoadBalancer, pages_for

WINDOW_PAGES = 1024
"""Of the tables that are mapped at once to be looked at: 4 MiB."""
RepairKind = Literal["link", "pin", "service", "backend", "table", "neighbour", "pod", "socket", "rule"]


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing that was not as it was left, and was mended.

    Attributes:
        kind: ``link`` (an attachment, its program, an interface made anew), ``pin``, a row of ``service`` or ``backend``,
            a ``table``'s slots, a ``neighbour``, a ``pod``, a ``socket`` without a backend,
            a ``rule`` or another row of the firewall.
        what: Which one, and what was wrong with it.
    """

    kind: RepairKind
    what: str


@dataclass(slots=True)
class Repaired:
    """What a look at the kernel found.

    Attributes:
        repairs: What was mended.
        problems: What is wrong and not Hookline's to change, such as a switched-off sysctl.
    """

    repairs: list[Repair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TableDrift:
    """Rows and tables that somebody else changed.

    Attributes:
        lost: Service rows to write back.
        foreign: Keys of service rows that nobody wants.
        backends: Numbers of rows of ``backends`` to write back.
        tables: Keys of pools whose slots are not what was built.
    """

    lost: dict[bytes, ServiceRow] = field(default_factory=dict)
    foreign: list[bytes] = field(default_factory=list)
    backends: list[int] = field(default_factory=list)
    tables: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.lost or self.foreign or self.backends or self.tables)


class TableWatch:
    """Watches over one load balancer's tables. The node's lock is held while it compares and restores."""

    def __init__(self, balancer: LoadBalancer, tables: Tables) -> None:
        self._balancer = balancer
        self._tables = tables
        self._sums: dict[tuple[int, int], int] = {}
        self._whole: tuple[int, ...] | None = None

    def compare(self, pools: Iterable[Pool]) -> TableDrift:
        """Reads the maps and compares them with the mirror.

        Args:
            pools: All that is wanted, as it was carried out.
        """
        drift = TableDrift()
        whole = self._checksums()
        if whole == self._whole:
            return drift  # nobody wrote anything since it was last found well
        self._whole = None
        mirror = self._tables.services
        found = self._tables.read_services()
        drift.lost = {key: row for key, row in mirror.items() if found.get(key) != row}
        drift.foreign = [key for key in found if key not in mirror]
        _, backends = self._balancer.maps["backends"].read()
        if backends.tobytes() != self._tables.backends.tobytes():
            drift.backends = np.flatnonzero(backends != self._tables.backends).tolist()
        drift.tables = set(self._changed_tables(pools))
        if not drift:
            self._whole = whole
        return drift

    def _checksums(self) -> tuple[int, ...]:
        """Of all rows and slots, in the order in which the kernel has them."""
        maps = self._balancer.maps
        keys, values = maps["services"].read()
        backends = maps["backends"].read()[1]
        slots = 0
        for first in range(0, self._balancer.page_count, WINDOW_PAGES):
            count = min(WINDOW_PAGES, self._balancer.page_count - first)
            slots = zlib.crc32(self._balancer.page_range(first, count).data, slots)
        parts = (keys, values, backends)
        return (slots, *(zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data) for part in parts))

    def restore(self, drift: TableDrift) -> list[Repair]:
        """Writes back rows, and removes foreign ones."""
        repairs = []
        services, backends = self._balancer.maps["services"], self._balancer.maps["backends"]
        if drift.backends:
            rows = np.array(drift.backends, np.uint32)
            backends.write(rows, self._tables.backends[rows])
            repairs += [Repair("backend", self._backend_text(row)) for row in drift.backends]
        if drift.lost:
            values = np.array([tuple(row) for row in drift.lost.values()], services.value_dtype)
            services.write(np.frombuffer(b"".join(drift.lost), services.key_dtype), values)
            repairs += [
                Repair("service", f"{_key_text(key)}: its row was changed or removed") for key in drift.lost
            ]
        if drift.foreign:
            services.remove(np.frombuffer(b"".join(drift.foreign), services.key_dtype))
            repairs += [
                Repair("service", f"{_key_text(key)}: a row that nobody wants") for key in drift.foreign
            ]
        return repairs

    def distrust(self, drift: TableDrift) -> None:
        """Has the next `Tables.diff` build the damaged tables anew."""
        for key, row in list(self._tables.services.items()):
            if row.pool in drift.tables:
                self._tables.services[key] = row._replace(fingerprint=0)
                self._sums.pop((row.table_page, row.table_size), None)

    def forget(self, pools: Iterable[int]) -> None:
        """Rows and tables of these pools were written by this process."""
        self._whole = None
        services = self._tables.services
        for key in (key for pool in pools for key in services.of_pool.get(pool, ())):
            row = services[key]
            self._sums.pop((row.table_page, row.table_size), None)

    def _changed_tables(self, pools: Iterable[Pool]) -> Iterable[int]:
        tables, window = self._tables, _Window(self._balancer)
        found = ((tables.services.get(frontend_key(pool.frontends[0])), pool) for pool in pools)
        # By their place: each part of the pages is mapped once.
        placed = sorted(
            ((row, pool) for row, pool in found if row is not None and row.table_size),
            key=lambda one: one[0].table_page,
        )
        seen = {}
        for row, pool in placed:
            place = (row.table_page, row.table_size)
            if not tables.is_place(*place):
                yield pool.key
                continue
            slots = window.slots(*place)
            total = zlib.crc32(slots.data)
            known = self._sums.get(place)
            if known is None and not _shares_are_right(slots, pool, tables.pool_rows(pool)):
                yield pool.key
                continue
            if known is not None and known != total:
                yield pool.key
                continue
            seen[place] = total
        self._sums = seen

    def _backend_text(self, row: int) -> str:
        entry = self._tables.backends[row]
        if not entry["flags"]:
            return f"row {row}: nobody's, and was written"
        address, port = address_of(entry["address"]), int(entry["port"].byteswap())
        host = f"[{address}]" if address.version == 6 else str(address)
        return f"{host}:{port}: its row was changed"


class _Window:
    """A part of the tables' pages at a time, so that looking at all of them does not take the memory of all."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer
        self._first = 0
        self._pages: NDArray[np.uint32] | None = None

    def slots(self, first: int, size: int) -> NDArray[np.uint32]:
        """The slots of a table, live."""
        count = pages_for(size)
        pages, offset = self._pages, first - self._first
        if pages is None or not 0 <= offset <= len(pages) - count:
            room = self._balancer.page_count - first
            pages = self._pages = self._balancer.page_range(first, min(room, max(WINDOW_PAGES, count)))
            self._first, offset = first, 0
        return pages[offset : offset + count].reshape(-1)[:size]


def _shares_are_right(slots: NDArray[np.uint32], pool: Pool, rows: Mapping[tuple[bytes, int], int]) -> bool:
    """Whether each backend has as many slots as its weight asks for, to one slot, and nobody else has any."""
    active = {
        row: target.effective_weight
        for target in pool.targets
        if target.effective_weight and (row := rows.get((packed(target.address), target.port))) is not None
    }
    numbers, counts = np.unique(slots, return_counts=True)
    if set(numbers.tolist()) != set(active):
        return False
    if pool.algorithm == "modulo":
        expected = np.bincount(maglev.modulo(list(active.values())))
        return sorted(expected.tolist()) == sorted(counts.tolist())
    weights = np.array([active[number] for number in numbers.tolist()], np.float64)
    ideal = weights * len(slots) / weights.sum()
    # The smallest have one slot at least, which the largest lends them.
    return bool((np.abs(counts - ideal) <= np.where(counts == counts.max(), len(counts) + 1, 1.0)).all())


def _key_text(key: bytes) -> str:
    address, port = key_address(key), int.from_bytes(key[16:18], "big")
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{host}:{port}" if port else str(address)


def link_state(pins: Path, only: Set[str] | None = None) -> dict[str, tuple[int, int, str]]:
    """Every pinned attachment by its pin's name: link, program, and where it is; (0, 0, reason) for one that is no link.

    Args:
        pins: The folder of the data path's function.
        only: Names of pins to look at; None: all.
    """
    found = {}
    folder = pins / "links"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if only is not None and path.name not in only:
            continue
        try:
            with bpf.Link.from_pin(path) as link:
                info = link.info
                found[path.name] = (info.id, info.program_id, str(info.target))
        except bpf.BpfError:
            found[path.name] = (0, 0, "")
    return found


def pinned_names(pins: Path) -> frozenset[str]:
    """Names of the maps and programs that are pinned."""
    return frozenset(
        f"{kind}/{path.name}"
        for kind in ("maps", "programs")
        if (pins / kind).is_dir()
        for path in (pins / kind).iterdir()
    )


def link_drift(
    before: Mapping[str, tuple[int, int, str]], now: Mapping[str, tuple[int, int, str]]
) -> list[Repair]:
    """What is said of attachments that are not what they were."""
    repairs = []
    for name, (number, program, place) in before.items():
        found = now.get(name)
        if found == (number, program, place):
            continue
        if found is None:
            why = "its link was unpinned"
        elif found[1] != program:
            why = "another program was put into its link"
        elif found[2] != place:
            why = "it was detached"
        else:
            why = "its link was replaced"
        repairs.append(Repair("link", f"{name}: {why}"))
    repairs += [Repair("link", f"{name}: a pin that nobody made") for name in now if name not in before]
    return repairs
