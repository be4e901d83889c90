"""The firewall's programs and maps on one node: loaded or adopted, filled, attached, replaced, removed.

It is pinned below the node's folder in bpffs, in ``firewall/``, as `hookline.datapath.pinning` says. `Firewall.open` adopts it if
it is whole and of this version, and else loads the programs anew around the maps that exist, so that no connection is
forgotten. `commit` shows rows to the programs, all at once; `activate` attaches these. An interface without a row of its own
is let nothing through, so rows come before programs, and go after them.

The caller is in the node's network namespace, and holds the node's lock.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hookline import bpf
from hookline.bpf import features
from hookline.datapath import pinning
from hookline.datapath.pinning import Attachment
from hookline.errors import HooklineError
from hookline.policy import PolicyRow

OBJECT = Path(__file__).with_name("firewall.bpf.o")
FOLDER = "firewall"

Role = Literal["pod", "uplink"]
Address = IPv4Address | IPv6Address
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
# These speak of each other's banks: where one of them is made anew, all are.
TABLES = (*BANKED, "active")
CARRIED_OVER = ("tracked", "active")
MAPS = (
    *TABLES,
    "tracked",
    "fragments",
    "firewall_metrics",
    "rule_counts",
    "verdict_limits",
    "verdicts",
    "verdicts_lost",
)
SIDES: tuple[pinning.Direction, ...] = ("ingress", "egress")
"""By enum policy_direction: as the pod sees it."""
VERDICTS = ("allow", "deny", "audit")
FIRST_DROP = "no_rule"
TCP_OPEN_S = 28_800  # as in maps.h
GRACE_NS = 1_000_000_000


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
        exempt: No policy is asked about it.
        rule: Number of the rule that allowed it; 0: none had to.
        generation: By which it was judged last.
    """

    interface: int
    local: Address
    remote: Address
    local_port: int
    remote_port: int
    protocol: int
    direction: pinning.Direction
    state: str
    cut: bool
    exempt: bool
    rule: int
    generation: int
    last_seen_ns: int


@dataclass(slots=True)
class Totals:
    """The counters of the whole node, summed over the CPUs.

    Attributes:
        reasons: (packets, bytes) by direction and reason, those that occurred.
        drops: The reasons that are drops, whether or not they occurred.
        rules: (packets, bytes) by rule number, those that occurred.
        suppressed: Verdicts that were not told, since there were too many.
        lost: Verdicts that found no room in the ring.
    """

    reasons: dict[tuple[pinning.Direction, str], tuple[int, int]] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    rules: dict[int, tuple[int, int]] = field(default_factory=dict)
    suppressed: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Older:
    """A TCP connection that is older than the firewall.

    Attributes:
        interface: Index of the pod's host-side interface; `NODE_ITSELF` for the node's own.
        direction: In which it began, as the pod sees it.
    """

    interface: int
    local: Address
    remote: Address
    local_port: int
    remote_port: int
    direction: pinning.Direction


class Firewall:
    """A node's firewall. Use `open`; close it, or use it as a context manager: what is pinned stays.

    Attributes:
        maps: The node's maps by name, typed by BTF.
        programs: The programs by name.
        fresh: The programs were loaded by this call and are not attached yet.
        replaced: Maps that were made anew because their size or layout changed.
    """

    def __init__(
        self,
        folder: Path,
        tunables: Tunables,
        programs: Mapping[str, bpf.Program],
        maps: Mapping[str, bpf.Map],
        *,
        fresh: bool,
        replaced: tuple[str, ...] = (),
        origin: bpf.Object | None = None,
    ) -> None:
        self.folder = folder
        self.tunables = tunables
        self.maps = maps
        self.fresh = fresh
        self.replaced = replaced
        self.programs = programs
        self._object = origin
        self._active = maps["active"].view()
        # What each bank holds, as far as this process knows.
        self._banks: list[Rows | None] = [None, None]

    # -- opening and closing

    @classmethod
    def open(cls, pins: Path, tunables: Tunables) -> Firewall:
        """Adopts the node's firewall, or loads it.

        Args:
            pins: The node's folder in bpffs; the firewall has ``firewall/`` in it.
            tunables: With what.

        Raises:
            bpf.BpfError: The kernel refuses the programs or maps; nothing is attached or pinned then.
        """
        adopted = cls._adopt(pins / FOLDER, tunables)
        return adopted if adopted is not None else cls._load(pins / FOLDER, tunables)

    @classmethod
    def exists(cls, pins: Path) -> bool:
        """Whether anything of a firewall is pinned in a node's folder."""
        return pinning.exists(pins / FOLDER)

    @classmethod
    def pinned(cls, pins: Path) -> Firewall | None:
        """What is pinned there, for reading, whatever it was loaded with; None where it is not whole."""
        return cls._adopt(pins / FOLDER, None)

    @classmethod
    def _adopt(cls, folder: Path, tunables: Tunables | None) -> Firewall | None:
        if not pinning.whole(folder, MAPS, PROGRAMS):
            return None
        with bpf.Map.from_pin(folder / "maps" / "active") as active:
            if "digest" not in (active.value_dtype.names or ()):
                return None
            if tunables is not None and int(active[0]["digest"]) != tunables.digest:
                return None
        maps = {name: bpf.Map.from_pin(folder / "maps" / name) for name in MAPS}
        programs = {name: bpf.Program.from_pin(folder / "programs" / name) for name in PROGRAMS}
        return cls(folder, tunables or Tunables(), programs, maps, fresh=False)

    @classmethod
    def _load(cls, folder: Path, tunables: Tunables) -> Firewall:
        obj = bpf.Object.open(pinning.object_bytes(OBJECT), name="firewall")
        try:
            for name, size in tunables.sizes.items():
                obj.resize(name, size)
            there = [name for name in MAPS if (folder / "maps" / name).exists()]
            replaced = [
                name for name in there if not pinning.same_shape(obj.maps[name], folder / "maps" / name)
            ]
            if any(name in TABLES for name in replaced):
                replaced.extend(name for name in TABLES if name in there and name not in replaced)
            for name in there:
                if name not in replaced:
                    with bpf.Map.from_pin(folder / "maps" / name) as old:
                        obj.reuse(name, old)
            obj.load()
            maps = {name: obj.maps[name] for name in MAPS}
            for name in CARRIED_OVER:
                if name in replaced:
                    pinning.carry_over(folder / "maps" / name, maps[name])
        except BaseException:
            obj.close()
            raise
        programs = {name: obj.programs[name] for name in PROGRAMS}
        return cls(folder, tunables, programs, maps, fresh=True, replaced=tuple(replaced), origin=obj)

    def close(self) -> None:
        """Lets go of the descriptors. What is pinned stays in the kernel."""
        if self._object is not None:
            self._object.close()
            return
        for table in self.maps.values():
            table.close()
        for program in self.programs.values():
            program.close()

    def __enter__(self) -> Firewall:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- attaching

    def activate(self, interfaces: Mapping[str, Role], *, adopt_s: float = 60) -> list[Attachment]:
        """Pins everything and attaches the programs to these interfaces, and to no others.

        Args:
            interfaces: Roles by name.
            adopt_s: Where nothing was attached before: for so long the replies of connections that are older than the
                firewall, and not known from `remember`, are taken as such.

        Raises:
            bpf.BpfError: An interface does not exist, or the kernel refuses. What was attached by this call is detached again.
        """
        if not pinning.attached(self.folder):
            self._active["adopt_until_ns"][0] = _now_ns() + int(adopt_s * 1e9)
        self._pin()
        made: list[Attachment] = []
        try:
            for interface, role in interfaces.items():
                made.extend(self._attach(name, interface) for name in OF_ROLE[role])
        except BaseException:
            for item in made:
                if item.change == "attached":
                    _detach(self.folder, item.program, item.interface)
            if not pinning.attached(self.folder):
                pinning.unpin(self.folder)
            raise
        wanted = {(item.program, item.interface) for item in made}
        for program, interface in pinning.attached(self.folder):
            if (program, interface) not in wanted:
                made.append(_detach(self.folder, program, interface))
        self.fresh = False
        return made

    def _attach(self, name: str, interface: str) -> Attachment:
        """Attaches a program where it is not, replaces an older version where it is."""
        program = self.programs[name]
        path = pinning.link_pin(self.folder, name, interface)
        link = pinning.open_link(path, interface, DIRECTIONS[name])
        if link is not None:
            with link:
                if pinning.program_id(link) == program.id:
                    return Attachment(name, pinning.hook_of(link), interface, "kept")
                link.update(program)
                return Attachment(name, pinning.hook_of(link), interface, "updated")
        if path.exists():
            path.unlink()  # of an interface that is gone; one of the same name may have come
        # The load balancer's `reply` gives a pod's packets the node's address: what is the node's own is told before that.
        first = name == "to_wire"
        if first and features.tcx().answer is features.Answer.YES:
            made = program.attach_tc(interface, DIRECTIONS[name], before="all", pin=path)
        else:
            made = program.attach_tc(interface, DIRECTIONS[name], priority=40 if first else 50, pin=path)
        with made:
            if made.pinned is None:
                made.pin(path)
            return Attachment(name, pinning.hook_of(made), interface, "attached")

    def _pin(self) -> None:
        (self.folder / "links").mkdir(parents=True, exist_ok=True)
        if self.fresh:
            # Nobody adopts a mixture of two versions' maps and programs, if this process ends in between.
            self._active["digest"][0] = 0
            there = self.folder / "maps" / "active"
            if there.exists():
                with bpf.Map.from_pin(there) as older:
                    if "digest" in (older.value_dtype.names or ()):
                        older.view()["digest"][0] = 0
        pinning.pin_all(self.folder, self.maps, self.programs)
        if self.fresh:
            self._active["digest"][0] = self.tunables.digest

    # -- rows

    @property
    def generation(self) -> int:
        """The one in force; 0 before the first commit."""
        return int(self._active["generation"][0])

    def capacity(self) -> dict[str, int]:
        """How many rows of each kind fit: ``endpoints``, ``identities``, ``rules``, ``own_addresses``, ``rule_counts``."""
        sizes = {name: self.maps[name].max_entries // 2 for name in BANKED}
        return sizes | {"rule_counts": self.maps["rule_counts"].max_entries}

    def commit(self, rows: Rows) -> int:
        """Makes these the rows that the programs go by, in one step, and returns the new generation.

        Nothing is written where these rows are in force already.

        Raises:
            HooklineError: There are more than a map holds; those before stay in force.
            bpf.BpfError: The kernel refuses one; those before stay in force.
        """
        generation = self.generation
        if generation and self._bank(generation & 1) == rows:
            return generation
        self._check(rows)
        following = (generation + 1) % (1 << 32) or 2
        bank = following & 1
        before = self._bank(bank)
        since = _now_ns() - int(self._active["flipped_ns"][0])
        if since < GRACE_NS:
            # A packet may still be on its way by the rows that are to change.
            _wait_for_readers()
        self._banks[bank] = None  # unknown, should this end half-way
        for table, old, new in (
            ("endpoints", before.endpoints, rows.endpoints),
            ("identities", before.identities, rows.identities),
            ("rules", before.rules, rows.rules),
            ("own_addresses", dict.fromkeys(before.own_addresses, 1), dict.fromkeys(rows.own_addresses, 1)),
        ):
            self._patch(table, bank, old, new)
        self._banks[bank] = rows
        self._active["flipped_ns"][0] = _now_ns()
        self._active["generation"][0] = following
        return following

    def rows(self) -> Rows:
        """What the kernel has in force, read anew."""
        self._banks = [None, None]
        return self._bank(self.generation & 1)

    def _check(self, rows: Rows) -> None:
        capacity = self.capacity()
        for name in BANKED:
            wanted = len(getattr(rows, name))
            if wanted > capacity[name]:
                raise HooklineError(
                    f"{wanted:,} {name.replace('_', ' ')} do not fit",
                    why=f"the firewall's map has room for {capacity[name]:,}",
                    remedy=f"raise spec.maps.{name} of the NodeConfig, or have fewer policies",
                )

    def _patch(self, name: str, bank: int, old: Mapping[Any, Any], new: Mapping[Any, Any]) -> None:
        """Writes a bank's missing difference."""
        if old is new:
            return
        table, encode_key, encode_value = self.maps[name], _KEYS[name], _VALUES[name]
        gone = [encode_key(bank, key) for key in old if key not in new]
        if gone:
            table.remove(_array(gone, table.key_dtype))
        come = {key: value for key, value in new.items() if old.get(key) != value}
        if come:
            table.write(
                _array([encode_key(bank, key) for key in come], table.key_dtype),
                _array([encode_value(value) for value in come.values()], table.value_dtype),
            )

    def _bank(self, bank: int) -> Rows:
        known = self._banks[bank]
        if known is None:
            both = _read_banks(self.maps)
            self._banks = [mine or read for mine, read in zip(self._banks, both, strict=True)]
            known = both[bank]
            self._banks[bank] = known
        return known

    # -- settings, connections, counters

    def sample(self, one_in: int) -> None:
        """Has one in so many new allowed connections told in the ring; 0: none."""
        self._active["sample"][0] = one_in

    def tracked(self) -> list[Tracked]:
        """The connections that are not over."""
        keys, values = self.maps["tracked"].read()
        now = _now_ns()
        alive = (
            values["last_seen_ns"].astype(np.int64) + values["timeout_s"].astype(np.int64) * 1_000_000_000
            > now
        )
        keys, values = keys[alive], values[alive]
        names = self._names("track_state", "TRACK_")
        flags = self._enum("track_flags")
        columns: dict[str, list[Any]] = {
            name: np.ascontiguousarray(keys[name]).view(">u2").astype(int).tolist()
            for name in ("local_port", "remote_port")
        }
        for name in ("local", "remote"):
            octets = np.ascontiguousarray(keys[name]).view("V16").reshape(-1)
            every, places = np.unique(octets, return_inverse=True)
            addresses = [_address(one.tobytes()) for one in every]
            columns[name] = [addresses[place] for place in places.tolist()]
        columns |= {name: keys[name].tolist() for name in ("interface", "protocol")}
        columns |= {name: values[name].tolist() for name in ("rule", "generation", "last_seen_ns")}
        columns["direction"] = [SIDES[side] for side in values["direction"].tolist()]
        columns["state"] = [names[state] for state in values["state"].tolist()]
        for name in ("cut", "exempt"):
            columns[name] = (values["flags"] & flags[f"TRACK_{name.upper()}"] != 0).tolist()
        order = [column.name for column in fields(Tracked)]
        return [Tracked(*row) for row in zip(*(columns[name] for name in order), strict=True)]

    def remember(self, connections: Iterable[Older]) -> None:
        """Takes over connections that are older than the firewall, unless it knows them: policies judge their next packet."""
        table = self.maps["tracked"]
        state = self._enum("track_state")["TRACK_OPEN"]
        for one in connections:
            key = struct.pack(
                "=16s16s2s2sB3xI",
                packed(one.local),
                packed(one.remote),
                one.local_port.to_bytes(2, "big"),
                one.remote_port.to_bytes(2, "big"),
                socket.IPPROTO_TCP,
                one.interface,
            )
            if table.get(key) is None:
                table[key] = {
                    "last_seen_ns": _now_ns(),
                    "generation": (self.generation - 1) % (1 << 32),
                    "timeout_s": TCP_OPEN_S,
                    "direction": SIDES.index(one.direction),
                    "state": state,
                }

    def totals(self) -> Totals:
        """The node's counters."""
        names = self._names("policy_reason", "POLICY_")
        metrics = self.maps["firewall_metrics"][0]
        packets, octets = (metrics["reasons"][part].sum(axis=0) for part in ("packets", "bytes"))
        reasons = {
            (SIDES[side], names[number]): (int(packets[side, number]), int(octets[side, number]))
            for side, number in zip(*np.nonzero(packets), strict=True)
        }
        keys, counts = self.maps["rule_counts"].read()
        per_rule = counts["packets"].sum(axis=1), counts["bytes"].sum(axis=1)
        rules = {
            int(keys[row]): (int(per_rule[0][row]), int(per_rule[1][row]))
            for row in np.flatnonzero(per_rule[0])
            if keys[row]
        }
        return Totals(
            reasons,
            self.drops,
            rules,
            int(metrics["suppressed"].sum()),
            int(self.maps["verdicts_lost"][0].sum()),
        )

    @property
    def drops(self) -> frozenset[str]:
        """The reasons that are drops; all others let a packet pass."""
        names = self._names("policy_reason", "POLICY_")
        return frozenset(names[names.index(FIRST_DROP) : -1])

    def verdicts(self) -> bpf.Ring:
        """Reads the ring of verdicts, records of ``struct verdict``; it has one reader at a time, who closes it.

        Members ``reason``, ``verdict`` and ``direction`` are places in `reasons`, `VERDICTS` and `SIDES`.
        """
        return self.maps["verdicts"].ring(_verdict_dtype(), lost=self.maps["verdicts_lost"])

    @property
    def reasons(self) -> list[str]:
        """Names of reasons by their numbers."""
        return self._names("policy_reason", "POLICY_")[:-1]

    def _enum(self, name: str) -> Mapping[str, int]:
        btf = self.maps["firewall_metrics"].definition.btf()
        return btf.enums()[name] if btf else {}

    def _names(self, name: str, prefix: str) -> list[str]:
        return [text.removeprefix(prefix).lower() for text in self._enum(name)]


def attachments(pins: Path) -> list[Attachment]:
    """Every attachment as it is; those whose interface is gone are left out."""
    return pinning.attachments(pins / FOLDER, DIRECTIONS)


def remove(pins: Path) -> list[Attachment]:
    """Detaches and unpins all that a firewall has in a node's folder, whatever its version."""
    folder = pins / FOLDER
    gone = [_detach(folder, program, interface) for program, interface in pinning.attached(folder)]
    pinning.unpin(folder)
    return gone


def packed(address: Address) -> bytes:
    """An address as the programs keep it: 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _address(octets: bytes) -> Address:
    found = IPv6Address(octets)
    return found.ipv4_mapped or found


def _detach(folder: Path, program: str, interface: str) -> Attachment:
    return pinning.detach(folder, program, interface, DIRECTIONS.get(program))


# Rows as octets; the layouts are policies.h's, whose sizes `_array` checks.


def _endpoint(row: PolicyRow) -> bytes:
    numbers = (row.ingress, row.egress, row.audit_ingress, row.audit_egress)
    return struct.pack("=4I2B6x", *numbers, row.default_allow_ingress, row.default_allow_egress)


def _rule_key(bank: int, key: RuleKey) -> bytes:
    group, identity, protocol, port, bits = key
    length = 96 if protocol is None else 104 + bits
    return struct.pack("=4IB2sx", length, bank, group, identity, protocol or 0, port.to_bytes(2, "big"))


_KEYS: Mapping[str, Callable[[int, Any], bytes]] = {
    "endpoints": lambda bank, index: struct.pack("=II", bank, index),
    "identities": lambda bank, key: struct.pack("=II16s", 32 + key[1], bank, key[0]),
    "rules": _rule_key,
    "own_addresses": lambda bank, address: struct.pack("=I16s", bank, address),
}
_VALUES: Mapping[str, Callable[[Any], bytes]] = {
    "endpoints": _endpoint,
    "identities": lambda value: struct.pack("=II", *value),
    "rules": lambda value: struct.pack("=IB3x", value[0], not value[1]),
    "own_addresses": lambda value: struct.pack("=I", value),
}


def _array(rows: Sequence[bytes], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(b"".join(rows), dtype)


def _read_banks(maps: Mapping[str, bpf.Map]) -> tuple[Rows, Rows]:
    """What both banks hold."""
    endpoints: tuple[dict[int, PolicyRow], ...] = ({}, {})
    identities: tuple[dict[IdentityKey, tuple[int, int]], ...] = ({}, {})
    rules: tuple[dict[RuleKey, tuple[int, bool]], ...] = ({}, {})
    own: tuple[set[bytes], ...] = (set(), set())
    for key, value in _octets(maps["endpoints"]):
        bank, index = struct.unpack("=II", key)
        row = struct.unpack("=4I2?6x", value)
        endpoints[bank][index] = PolicyRow(*row)
    for key, value in _octets(maps["identities"]):
        length, bank, address = struct.unpack("=II16s", key)
        identities[bank][address, length - 32] = struct.unpack("=II", value)
    for key, value in _octets(maps["rules"]):
        length, bank, group, identity, protocol, port = struct.unpack("=4IB2sx", key)
        number, verdict = struct.unpack("=IB3x", value)
        named = (None, 0, 0) if length == 96 else (protocol, int.from_bytes(port, "big"), length - 104)
        rules[bank][group, identity, *named] = (number, not verdict)
    for key, _ in _octets(maps["own_addresses"]):
        bank, address = struct.unpack("=I16s", key)
        own[bank].add(address)
    first, second = (
        Rows(endpoints[bank], identities[bank], rules[bank], frozenset(own[bank])) for bank in (0, 1)
    )
    return first, second


def _octets(table: bpf.Map) -> Iterable[tuple[bytes, bytes]]:
    keys, values = table.read()
    return zip((key.tobytes() for key in keys), (value.tobytes() for value in values), strict=True)


@cache
def _verdict_dtype() -> np.dtype[Any]:
    with bpf.Object.open(pinning.object_bytes(OBJECT), name="firewall") as obj:
        return obj.btf.struct("verdict")


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
_MEMBARRIER_GLOBAL = 1


def _wait_for_readers() -> None:
    """Returns when every program that runs now has ended: membarrier(2) waits for a grace period of RCU."""
    number = _MEMBARRIER.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if number is None or libc.syscall(number, _MEMBARRIER_GLOBAL, 0, 0) != 0:
        # Refused with nohz_full CPUs. A program ends within microseconds.
        time.sleep(0.05)
