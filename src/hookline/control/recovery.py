"""What is left when a node's wanted state is lost: the kernel goes on, and its services are claimed again one by one.

The state file is the only copy of what is wanted, but not of what is: services, backends and tables are in the kernel, and
serve. A state that was damaged, or is gone while the kernel has services, is *lost* until every service of the kernel is wanted
by an object again. As long as it is,

- a service of the kernel that no object wants is unclaimed: it stays as it is, whatever else changes;
- a service whose backends no object describes (pods or slices that were lost, too) keeps those that the kernel has;
- maps keep their sizes, also where the NodeConfig was lost;
- the next hops of all stay resolved.

Applying the files again claims their services, since a pool is known by what it is called. `Node.recover` takes the first
steps, and can drop at the end what nobody claims.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np

from hookline.control.tables import PROTOCOLS, Tables, address_of, key_address

_DSR = 4  # BACKEND_DSR


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """A service of the kernel that no object wants.

    Attributes:
        frontends: As ``192.0.2.10:80/TCP``.
        backends: As ``10.244.1.2:8080``.
        direct: Backends that are reached by direct server return, and have the service's address.
    """

    pool: int
    addresses: frozenset[IPv4Address | IPv6Address]
    frontends: tuple[str, ...]
    backends: tuple[str, ...]
    direct: frozenset[IPv4Address | IPv6Address] = frozenset()

    def __str__(self) -> str:
        return f"{', '.join(self.frontends)} ({len(self.backends)} backend{'s' * (len(self.backends) != 1)})"

    def as_dict(self) -> dict[str, Any]:
        """The service as plain values."""
        return {"frontends": list(self.frontends), "backends": list(self.backends)}


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `Node.recover` or `Node.check_state` found, and the former did.

    Attributes:
        damage: What is wrong with the file; empty: nothing.
        lost: Why the state is, or was found to be, lost; empty: it is whole.
        kept_at: Where the damaged file was moved to.
        restored: References of the objects that were taken over from it.
        unreadable: References of those that were not, as far as they can be told.
        unclaimed: Services of the kernel that no object wants.
    """

    damage: str = ""
    lost: str = ""
    kept_at: Path | None = None
    restored: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    unclaimed: tuple[Unclaimed, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is or was wrong."""
        return not (self.damage or self.lost)

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {
            "healthy": self.healthy,
            "damage": self.damage,
            "lost": self.lost,
            "kept_at": str(self.kept_at) if self.kept_at else None,
            "restored": list(self.restored),
            "unreadable": list(self.unreadable),
            "unclaimed": [one.as_dict() for one in self.unclaimed],
        }


def unclaimed(tables: Tables, wanted: Set[int]) -> tuple[Unclaimed, ...]:
    """The services of the kernel whose pools are not among the wanted ones, each once."""
    names = {number: name for name, number in PROTOCOLS.items()}
    keys: dict[int, list[bytes]] = {}
    for key, row in tables.services.items():
        if row.pool and row.pool not in wanted:
            keys.setdefault(row.pool, []).append(key)
    found = []
    for pool, mine in sorted(keys.items(), key=lambda item: min(item[1])):
        rows = tables.rows_of(pool)
        direct = rows["flags"] & _DSR != 0
        found.append(
            Unclaimed(
                pool,
                frozenset(key_address(key) for key in mine if not key[19]),
                tuple(
                    f"{_host(key_address(key))}:{int.from_bytes(key[16:18], 'big')}/{names.get(key[18], key[18])}"
                    for key in sorted(mine)
                ),
                tuple(
                    f"{_host(address_of(one['address']))}:{int(np.uint16(one['port']).byteswap())}"
                    for one in rows
                ),
                frozenset(address_of(one["address"]) for one in rows[direct]),
            )
        )
    return tuple(found)


def _host(address: IPv4Address | IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
