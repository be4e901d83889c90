"""A plan: everything that one change would do, as data. Made before anything is touched, shown by ``--dry-run``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hookline.control.catalogue import Catalogue
from hookline.control.lives import Lives
from hookline.control.moves import Moves
from hookline.control.pools import Pool
from hookline.control.tables import TableChange
from hookline.model import NodeConfig, Resource

Action = Literal["create", "change", "remove", "keep"]


@dataclass(frozen=True, slots=True)
class ResourceChange:
    """What happens to one object of the wanted state."""

    action: Action
    reference: str


@dataclass(frozen=True, slots=True)
class PoolSummary:
    """What happens to one port of a service in one family.

    Attributes:
        added: Backends that get a row, as ``address:port (placement)``.
        removed: How many backends go.
        pages: Pages of the new table.
        moves: Slots and open connections that move, stay with a backend that goes, or end; None where it was not worked out
            (only a dry run does).
    """

    action: Action
    service: str
    port: str
    family: str
    frontends: tuple[str, ...]
    added: tuple[str, ...]
    removed: int
    pages: int
    moves: Moves | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a map is once the change is made."""

    used: int
    size: int


@dataclass(slots=True)
class Plan:
    """All that a change would do.

    Attributes:
        resources: Objects of the wanted state, those that stay as they are included.
        pools: Services whose tables change.
        usage: Maps of limited size, after the change.
        uplinks: Interfaces with their XDP modes, empty where nothing is to be balanced.
        warnings: What the user should know and may not expect.
        loads: Whether the kernel programs are loaded anew; running connections go on.
        attaches: Programs that are attached, as ``balance to eth0``.
        detaches: Whether they are removed, since nothing is left to balance.
        generation: The number of the generation that the change became; None: nothing that no owner has was changed, or it
            was not carried out.
        sockets_ended: Sockets of this node that are connected to backends which go: those that were ended, or would be.
    """

    resources: list[ResourceChange] = field(default_factory=list)
    pools: list[PoolSummary] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)
    uplinks: tuple[tuple[str, str], ...] = ()
    warnings: list[str] = field(default_factory=list)
    loads: bool = False
    attaches: list[str] = field(default_factory=list)
    detaches: bool = False
    generation: int | None = None
    sockets_ended: int = 0

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return (
            self.loads
            or self.detaches
            or bool(self.attaches)
            or bool(self.pools)
            or any(item.action != "keep" for item in self.resources)
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as the ``--json`` form."""
        return {
            "changes": self.changes,
            "resources": [{"action": item.action, "reference": item.reference} for item in self.resources],
            "services": [
                {
                    "action": item.action,
                    "service": item.service,
                    "port": item.port,
                    "family": item.family,
                    "frontends": list(item.frontends),
                    "backends_added": list(item.added),
                    "backends_removed": item.removed,
                    "table_pages": item.pages,
                    "slots_moved": item.moves.slots if item.moves else None,
                    "slots": item.moves.size if item.moves else None,
                    "new_connections_moved": item.moves.share if item.moves else None,
                    "open_connections_stay": item.moves.stay if item.moves else None,
                    "open_connections_move": item.moves.move if item.moves else None,
                    "open_connections_end": item.moves.end if item.moves else None,
                }
                for item in self.pools
            ],
            "maps": {name: {"used": usage.used, "size": usage.size} for name, usage in self.usage.items()},
            "uplinks": [{"interface": name, "xdp_mode": mode} for name, mode in self.uplinks],
            "loads_programs": self.loads,
            "attaches": list(self.attaches),
            "detaches_programs": self.detaches,
            "generation": self.generation,
            "sockets_ended": self.sockets_ended,
            "warnings": list(self.warnings),
        }


@dataclass(slots=True)
class Draft:
    """A plan together with what carrying it out needs; private to `Node`."""

    plan: Plan
    put: dict[str, tuple[Resource, str]]
    drop: list[str]
    change: TableChange
    config: NodeConfig | None
    cause: str = ""
    pools: dict[str, tuple[Pool, ...]] = field(default_factory=dict)
    catalogue: Catalogue = field(default_factory=Catalogue)
    lives: Lives = field(default_factory=Lives)
    lived: set[str] = field(default_factory=set)
    hops: dict[int, frozenset[tuple[str, str]]] = field(default_factory=dict)
