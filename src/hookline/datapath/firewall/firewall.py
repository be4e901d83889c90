"""The firewall's programs and maps on one node: loaded or adopted, filled, attached, replaced, removed.

It is pinned below the node's folder in bpffs, in ``firewall/``, as `hookline.datapath.pinning` says. `Firewall.open` adopts it if
it is whole and of this version, and else loads the programs anew around the maps that exist, so that no connection is
forgotten. `commit` shows rows to the programs, all at once; `activate` attaches these. An interface without a row of its own
is let nothing through, so rows come before programs, and go after them.

The caller is in the node's network namespace, and holds the node's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal

from hookline import bpf
from hookline.datapath import pinning
from hookline.datapath.pinning import Attachment
from hookline.policy import PolicyRow

OBJECT = Path(__file__).with_name("firewall.bpf.o")
FOLDER = "firewall"

Role = Literal["pod", "uplink"]
IdentityKey = tuple[bytes, int]
"""An address, 16 bytes (IPv4 as ::ffff:a.b.c.d), and how many of its bits count."""
RuleKey = tuple[int, int, int | None, int, int]
"""Rule set, identity (0 is any), protocol (None is any), port, and how many of the port's 16 bits count."""

DIRECTIONS: Mapping[str, pinning.Direction] = {
    "from_pod": "ingress",
    "to_pod": "egress",
    "from_wire": "ingress",
    "to_wire": "egress",
}
PROGRAMS = tuple(DIRECTIONS)
OF_ROLE: Mapping[Role, tuple[str, ...]] = {"pod": ("to_pod", "from_pod"), "uplink": ("to_wire", "from_wire")}
NODE_ITSELF = 0
"""The interface that stands for the node itself in rows."""


@dataclass(frozen=True, slots=True)
class Tunables:
    """What is fixed when the programs are loaded. None leaves the size that they were built with.

    Sizes of ``endpoints``, ``identities``, ``rules`` and ``own_addresses`` are of one bank: as many rows as `Rows` may have.

    Attributes:
        rule_counts: Rule numbers from 0 on that are counted.
    """

    endpoints: int | None = None
    identities: int | None = None
    rules: int | None = None
    own_addresses: int | None = None
    tracked: int | None = None
    fragments: int | None = None
    rule_counts: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of maps by name, those that are given; of those with banks both together."""
        return {
            name: size * (2 if name in BANKED else 1)
            for name, size in asdict(self).items()
            if size is not None
        }

    @property
    def digest(self) -> int:
        """Tells versions apart: 64 bits of a hash over the object and these settings."""
        hashed = hashlib.sha256(pinning.object_bytes(OBJECT) + repr(asdict(self)).encode())
        return int.from_bytes(hashed.digest()[:8], "little")


BANKED = ("endpoints", "identities", "rules", "own_addresses")


@dataclass(frozen=True, slots=True)
class Rows:
    """All that the programs go by.

    Attributes:
        endpoints: Rule sets by index of the pod's host-side interface; `NODE_ITSELF` for the node's own, which is there only
            while a HostPolicy selects it.
        identities: Identity, and the index of the interface of the local pod that has the address (0: none), by prefix.
        rules: Number of the rule and whether it allows, by key.
        own_addresses: The node's own, 16 bytes each.
    """

    endpoints: Mapping[int, PolicyRow] = field(default_factory=dict)
    identities: Mapping[IdentityKey, tuple[int, int]] = field(default_factory=dict)
    rules: Mapping[RuleKey, tuple[int, bool]] = field(default_factory=dict)
    own_addresses: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Tracked:
    """A connection that the firewall knows, as it is now.

    Attributes:
        interface: Index of the pod's host-side interface; `NODE_ITSELF` for the node's own.
        local: The pod's end. Ports are 0 where the protocol has none; of an echo both are its identifier.
        direction: In which it began, as the pod sees it.
        state: ``new``, ``replied``, ``open``, ``closing`` or ``closed``.
        cut: It is not allowed any more.
        rule: Number of the rule that allowed it; 0: none had to.
        generation: By which it was judged last.
    """

    interface: int
    local: IPv4Address | IPv6Address
    remote: IPv4Address | IPv6Address
    local_port: int
    remote_port: int
    protocol: int
    direction: pinning.Direction
    state: str
    cut: bool
    rule: int
    generation: int
    last_seen_ns: int


@dataclass(slots=True)
class Totals:
    """The counters of the whole node, summed over the CPUs.

    Attributes:
        reasons: (packets, bytes) by direction and reason, those that occurred. `DROPS` has the reasons that are drops.
        drops: The reasons among them that are drops.
        rules: (packets, bytes) by rule number, those that occurred.
        suppressed: Verdicts that were not told, since there were too many.
        lost: Verdicts that found no room in the ring.
    """

    reasons: dict[tuple[pinning.Direction, str], tuple[int, int]] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    rules: dict[int, tuple[int, int]] = field(default_factory=dict)
    suppressed: int = 0
    lost: int = 0


class Firewall:
    """A node's firewall. Use `open`; close it, or use it as a context manager: what is pinned stays.

    Attributes:
        maps: The node's maps by name, typed by BTF.
        fresh: The programs were loaded by this call and are not attached yet.
        replaced: Maps that were made anew because their size or layout changed.
    """

    maps: Mapping[str, bpf.Map]
    fresh: bool
    replaced: tuple[str, ...]

    @classmethod
    def open(cls, pins: Path, tunables: Tunables) -> Firewall:
        """Adopts the node's firewall, or loads it.

        Args:
            pins: The node's folder in bpffs; the firewall has ``firewall/`` in it.
            tunables: With what.

        Raises:
            bpf.BpfError: The kernel refuses the programs or maps; nothing is attached or pinned then.
        """
        raise NotImplementedError

    @classmethod
    def exists(cls, pins: Path) -> bool:
        """Whether anything of a firewall is pinned in a node's folder."""
        return pinning.exists(pins / FOLDER)

    @classmethod
    def pinned(cls, pins: Path) -> Firewall | None:
        """What is pinned there, for reading, whatever it was loaded with; None where it is not whole."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the descriptors. What is pinned stays in the kernel."""
        raise NotImplementedError

    def __enter__(self) -> Firewall:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def activate(self, interfaces: Mapping[str, Role], *, adopt_s: float = 60) -> list[Attachment]:
        """Pins everything and attaches the programs to these interfaces, and to no others.

        Args:
            interfaces: Roles by name.
            adopt_s: Where nothing was attached before: for so long the replies of connections that are older than the
                firewall are taken as such.

        Raises:
            bpf.BpfError: An interface does not exist, or the kernel refuses. What was attached by this call is detached again.
        """
        raise NotImplementedError

    def commit(self, rows: Rows) -> int:
        """Makes these the rows that the programs go by, in one step, and returns the new generation.

        Nothing is written where these rows are in force already.

        Raises:
            bpf.MapFull: There are more than a map holds; those before stay in force. `capacity` says how many fit.
        """
        raise NotImplementedError

    def rows(self) -> Rows:
        """What the kernel has in force, read anew."""
        raise NotImplementedError

    def capacity(self) -> dict[str, int]:
        """How many rows of each kind fit: ``endpoints``, ``identities``, ``rules``, ``own_addresses``, ``rule_counts``."""
        raise NotImplementedError

    @property
    def generation(self) -> int:
        """The one in force; 0 before the first commit."""
        raise NotImplementedError

    def sample(self, one_in: int) -> None:
        """Has one in so many new allowed connections told in the ring; 0: none."""
        raise NotImplementedError

    def tracked(self) -> list[Tracked]:
        """The connections that are not over."""
        raise NotImplementedError

    def track(self, connections: Mapping[bytes, bytes]) -> None:
        """Takes over connections that are older than the firewall."""
        raise NotImplementedError

    def totals(self) -> Totals:
        """The node's counters."""
        raise NotImplementedError

    def verdicts(self) -> bpf.Ring:
        """Reads the ring of verdicts, records of ``struct verdict``; it has one reader at a time, who closes it."""
        raise NotImplementedError


def attachments(pins: Path) -> list[Attachment]:
    """Every attachment as it is; those whose interface is gone are left out."""
    return pinning.attachments(pins / FOLDER, DIRECTIONS)


def remove(pins: Path) -> list[Attachment]:
    """Detaches and unpins all that a firewall has in a node's folder, whatever its version."""
    folder = pins / FOLDER
    gone = [
        pinning.detach(folder, program, interface, DIRECTIONS.get(program))
        for program, interface in pinning.attached(folder)
    ]
    pinning.unpin(folder)
    return gone
