"""The load balancer of one node as a process holds it: its maps, tables, attachments and sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hookline import bpf
from hookline.control.drift import TableWatch, link_state, pinned_names
from hookline.control.plan import Plan, Usage
from hookline.control.tables import TableChange, Tables, address_of, frontend_key
from hookline.datapath.loadbalancer.balancer import LoadBalancer
from hookline.datapath.loadbalancer.sockets import Records, destroy_sockets, live_sockets
from hookline.datapath.loadbalancer.sockets import Row as BackendRow
from hookline.model import NodeConfig

Address = IPv4Address | IPv6Address
NOT_ENDED = "sockets of backends that are gone are not ended"


@dataclass(slots=True)
class Serving:
    """What this process holds of the node's kernel side, in step with it as long as nobody else changes the node."""

    balancer: LoadBalancer
    tables: Tables
    uplinks: tuple[tuple[str, str], ...] = ()
    config: NodeConfig | None = None
    indexes: tuple[int, ...] = ()
    links: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    cgroup: tuple[Path, int] | None = None
    watch: TableWatch = field(init=False)
    # Backends whose sockets are to end once the change is committed; and when those that have no backend any more are to be
    # looked for: at once in tables that this process has not seen before.
    doomed: dict[BackendRow, tuple[Address, int]] = field(default_factory=dict)
    stray_look: float | None = 0.0
    _records: Records | None = None

    def __post_init__(self) -> None:
        self.watch = TableWatch(self.balancer, self.tables)

    @property
    def records(self) -> Records:
        """The walk over this node's sockets, loaded at its first use.

        Raises:
            bpf.BpfError: The kernel refuses it.
        """
        if self._records is None:
            self._records = Records(self.balancer.maps["sockets"])
        return self._records

    def close(self) -> None:
        """Lets go of the descriptors."""
        if self._records is not None:
            self._records.close()
            self._records = None
        self.balancer.close()

    def settle(
        self, config: NodeConfig | None, uplinks: tuple[tuple[str, str], ...], cgroup: Path | None
    ) -> None:
        """Notes that the programs are attached as this configuration wants them."""
        self.config, self.uplinks = config, uplinks
        self.indexes = indexes_of(uplinks)
        self.links, self.pinned = link_state(self.balancer.pins), pinned_names(self.balancer.pins)
        self.cgroup = (cgroup, inode_of(cgroup)) if cgroup is not None else None

    def unsettle(self) -> None:
        """Has the next change look at everything, as if another process had left it."""
        self.uplinks = ()
        self.stray_look = 0.0

    def is_in_step(self, config: NodeConfig | None) -> bool:
        """Whether they still are: the same configuration, on interfaces and a cgroup that nobody made anew."""
        return (
            bool(self.uplinks)
            and self.config == config
            and self.indexes == indexes_of(self.uplinks)
            and (self.cgroup is None or self.cgroup[1] == inode_of(self.cgroup[0]))
        )


def count_connected(
    sockets: bpf.Map | None, choose: Callable[[Any], Mapping[BackendRow, tuple[Address, int]]]
) -> int:
    """How many sockets are connected to the backends that are chosen among them; 0 where the kernel does not say."""
    if sockets is None:
        return 0
    with suppress(bpf.BpfError):
        found = live_sockets(sockets)
        rows = choose(found)
        given = zip(found["backend"].tolist(), found["generation"].tolist(), strict=True)
        return sum(row in rows for row in given)
    return 0


def every_row(found: NDArray[np.void]) -> dict[BackendRow, tuple[Address, int]]:
    """The backends of all these sockets, also those whose rows are gone: records outlive a change of their row."""
    rows = zip(found["backend"].tolist(), found["generation"].tolist(), strict=True)
    return {
        row: (address_of(one["remote"]), int(one["remote_port"].byteswap()))
        for row, one in zip(rows, found, strict=True)
    }


def end_sockets(plan: Plan, sockets: bpf.Map, rows: Mapping[BackendRow, tuple[Address, int]]) -> None:
    """Ends the sockets of these backends, and notes in the plan what became of them.

    Raises:
        bpf.BpfError: The kernel refuses the walk over sockets.
    """
    if not rows:
        return
    ended = destroy_sockets(sockets, rows)
    plan.sockets_ended += ended.tcp + ended.udp
    plan.warnings.extend(f"{count} {NOT_ENDED}: {why}" for why, count in ended.left.items())


def end_every_socket(plan: Plan, sockets: bpf.Map) -> None:
    """The same for all that are connected to a backend which they were given.

    Raises:
        bpf.BpfError: The kernel refuses the walk over sockets.
    """
    end_sockets(plan, sockets, every_row(live_sockets(sockets)))


def not_ended(plan: Plan) -> list[str]:
    """What a plan says of sockets that should have ended and did not."""
    return [warning for warning in plan.warnings if NOT_ENDED in warning]


def inode_of(path: Path) -> int:
    """A folder's number, 0 for one that is not there."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def indexes_of(uplinks: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """The interfaces' numbers, 0 for one that is not there."""
    found = []
    for name, _ in uplinks:
        try:
            found.append(socket.if_nametoindex(name))
        except OSError:
            found.append(0)
    return tuple(found)


def usage_of(kernel: Serving, change: TableChange) -> dict[str, Usage]:
    """How full the maps are once a change is made."""
    tables, maps = kernel.tables, kernel.balancer.maps
    keys = {frontend_key(frontend) for pool in change.pools for frontend in pool.new_frontends} | set(
        change.addresses
    )
    backends = sum(len(pool.new) - len(pool.gone_rows) for pool in change.pools)
    replaced = {pool.key for pool in change.pools if pool.rebuild or pool.pool is None}
    pages = (
        tables.pages_in_use
        - sum(tables.used_pages(replaced).values())
        + sum(pool.pages for pool in change.pools)
    )
    return {
        "services": Usage(
            len(tables.services) + len(keys - tables.services.keys()) - len(change.removed),
            maps["services"].max_entries,
        ),
        "backends": Usage(tables.backends_in_use() + backends, maps["backends"].max_entries - 1),
        "maglev": Usage(pages, tables.table_pages),
    }
