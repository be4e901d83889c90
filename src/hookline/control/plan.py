"""A plan: everything that one change would do, as data. Made before anything is touched, shown by ``--dry-run``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal

from hookline.control.catalogue import Catalogue
from hookline.control.lives import Lives
from hookline.control.moves import Moves
from hookline.control.pools import Pool
from hookline.control.tables import TableChange
from hookline.datapath.firewall.firewall import Role, Rows
from hookline.model import NodeConfig, Resource
from hookline.policy import Compiled, World

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
class PolicyChange:
    """What happens to the firewall. Rows that are changed count as removed and as added.

    Attributes:
        detaches: It goes, since no policy is for this node any more.
        loads: Its programs are loaded.
        endpoints: Pods, and the node itself, whose rule sets are others.
        identities: Addresses and prefixes that are of another class.
        connections_cut: Open connections that this change forbids; None: not worked out.
    """

    detaches: bool = False
    loads: bool = False
    rules_added: int = 0
    rules_removed: int = 0
    endpoints: int = 0
    identities: int = 0
    connections_cut: int | None = None

    def __bool__(self) -> bool:
        return (
            self.detaches
            or self.loads
            or bool(self.rules_added or self.rules_removed or self.endpoints or self.identities)
        )


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
        sockets_ended: Sockets of this node that are connected to backends which go, or that policies no longer allow: those
            that were ended, or of the first kind would be.
        policies: What happens to the firewall; None where no policy is for this node, before or after.
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
    policies: PolicyChange | None = None

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return (
            self.loads
            or self.detaches
            or bool(self.attaches)
            or bool(self.pools)
            or bool(self.policies)
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
            "policies": asdict(self.policies) if self.policies is not None else None,
            "warnings": list(self.warnings),
        }


@dataclass(slots=True)
class PolicyDraft:
    """What carrying out the firewall's part of a change needs; private to `control.policies`.

    Attributes:
        wanted: Whether the firewall is to be on the node.
        stays: The firewall stays as it is, as the state was lost and what it enforces is not known.
        before: The rows that were in force when it was carried out.
        interfaces: Where the programs are to be.
        ports: Interface and its index by pod and address; one pod's may have one each.
        in_step: The programs are where they are to be.
        problems: Pods that are not served.
    """

    world: World = field(default_factory=World)
    wanted: bool = False
    stays: bool = False
    compiled: Compiled | None = None
    rows: Rows = field(default_factory=Rows)
    before: Rows = field(default_factory=Rows)
    interfaces: Mapping[str, Role] = field(default_factory=dict)
    ports: Mapping[str, Mapping[IPv4Address | IPv6Address, tuple[str, int]]] = field(default_factory=dict)
    in_step: bool = False
    problems: list[str] = field(default_factory=list)


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
    policies: PolicyDraft = field(default_factory=PolicyDraft)
