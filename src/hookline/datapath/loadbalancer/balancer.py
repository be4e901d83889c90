"""The load balancer's programs and maps on one node: loaded or adopted, attached, replaced, removed.

It is pinned in the node's folder in bpffs, as `hookline.datapath.pinning` says. Its hooks are balance, resolve and reply of each
uplink (a mode that was asked for follows: ``balance:eth0:generic``), exceptions, which has no interface, and
the programs of sockets, on the node's cgroup (``connect4`` …).

`LoadBalancer.open` adopts it if it is whole and of this version, and else loads the programs anew around the maps that
exist, so that no connection is forgotten. Nothing is attached until `activate`, which is called when the tables are filled:
it attaches what is missing and replaces programs in their links, which loses no packet. Every step may be the last one of a
process that is killed; the next `open` and `activate` go on from there:

- maps or programs pinned, links missing: adopted or loaded again, attached by `activate`;
- a link whose program is an older one: `activate` updates it;
- a link attached but not pinned: it ended with the process.

The caller is in the node's network namespace, and holds the node's lock.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hookline import bpf
from hookline.datapath import pinning
from hookline.datapath.loadbalancer._object import object_bytes
from hookline.datapath.loadbalancer.maglev import Turns
from hookline.datapath.pinning import Attachment as Attachment
from hookline.datapath.pinning import attached as attached
from hookline.datapath.pinning import (
    carry_over,
    hook_of,
    link_pin,
    open_link,
    pins_of,
    program_id,
    same_shape,
)
from hookline.errors import HooklineError

XdpMode = Literal["auto", "native", "generic", "offload"]

MAPS = (
    "services",
    "backends",
    "maglev",
    "connections",
    "affinity",
    "metrics",
    "service_metrics",
    "backend_metrics",
    "exceptions",
    "settings",
    "answer_limits",
    "maglev_candidates",
    "sockets",
    "datagrams",
    "spilled_peers",
    "pods",
    "socket_metrics",
)
# These name each other's rows and pages: where one of them is made anew, all are.
TABLES = ("services", "backends", "maglev")
# What is copied where a map is made anew. The rows of backends keep their numbers, which connections name.
CARRIED_OVER = ("connections", "affinity", "backends", "backend_metrics")
PROGRAMS = ("balance", "resolve", "reply", "count_exceptions", "build_maglev")
# Of the sockets of this node, in the order in which they are attached: an answer is never shown as a backend's.
SOCKET_PROGRAMS = tuple(
    f"{hook}{version}" for hook in ("recvmsg", "getpeername", "sendmsg", "connect") for version in (4, 6)
)
PAGE_SLOTS = 1024
# As in maps.h: a connection that was silent for longer is over.
TCP_IDLE_NS, UDP_IDLE_NS = 28_800_000_000_000, 120_000_000_000


@dataclass(frozen=True, slots=True)
class Tunables:
    """What is fixed when the programs are loaded. None leaves the size that they were built with.

    Attributes:
        check_mtu: False where XDP is generic: it sees super-packets that are cut up later.
        tx_by_redirect: True where an uplink is a veth with native XDP, which needs it (docs/kernel.md).
        connect_time: With the programs of the node's own sockets.
    """

    nat_port_min: int = 10240
    nat_port_max: int = 29999
    check_mtu: bool = True
    tx_by_redirect: bool = False
    connections: int | None = None
    affinity: int | None = None
    services: int | None = None
    backends: int | None = None
    maglev_pages: int | None = None
    connect_time: bool = True

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs that are loaded."""
        return PROGRAMS + SOCKET_PROGRAMS if self.connect_time else PROGRAMS

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of maps by name, those that are given."""
        wanted = {
            "connections": self.connections,
            "affinity": self.affinity,
            "services": self.services,
            "service_metrics": self.services,
            "backends": self.backends,
            "backend_metrics": self.backends,
            "maglev": self.maglev_pages,
        }
        return {name: size for name, size in wanted.items() if size is not None}

    @property
    def digest(self) -> int:
        """Tells versions apart: 64 bits of a hash over the object and these settings."""
        hashed = hashlib.sha256(object_bytes() + repr(asdict(self)).encode())
        return int.from_bytes(hashed.digest()[:8], "little")


@dataclass(slots=True)
class Totals:
    """The counters of the whole node, summed over the CPUs.

    Attributes:
        verdicts: (packets, bytes) by ``aborted``, ``drop``, ``pass``, ``tx``, ``redirect``.
        reasons: (packets, bytes) of refused packets by reason, those that occurred.
        answered: (packets, bytes) of refused packets that were answered with a reset or "port unreachable".
        exceptions: What the kernel's ``xdp_exception`` tracepoint reported of the balancer, by verdict.
        sockets: What the programs of sockets counted, ``connected``, ``refused_no_backend``, …: ``struct socket_metrics``.
    """

    verdicts: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: dict[str, tuple[int, int]] = field(default_factory=dict)
    replies: tuple[int, int] = (0, 0)
    handed_to_stack: tuple[int, int] = (0, 0)
    answered: tuple[int, int] = (0, 0)
    exceptions: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)


VERDICTS = ("aborted", "drop", "pass", "tx", "redirect")


class LoadBalancer:
    """A node's load balancer. Use `open`; close it, or use it as a context manager: what is pinned stays.

    Attributes:
        maps: The node's maps by name, typed by BTF.
        fresh: The programs were loaded by this call and are not attached yet.
        replaced: Maps that were made anew because their size or layout changed.
    """

    def __init__(
        self,
        pins: Path,
        tunables: Tunables,
        programs: Mapping[str, bpf.Program],
        maps: Mapping[str, bpf.Map],
        *,
        fresh: bool,
        replaced: tuple[str, ...] = (),
        origin: bpf.Object | None = None,
    ) -> None:
        self.pins = pins
        self.tunables = tunables
        self.maps = maps
        self.fresh = fresh
        self.replaced = replaced
        self._programs = programs
        self._object = origin

    # -- opening and closing

    @classmethod
    def open(cls, pins: Path, tunables: Tunables) -> LoadBalancer:
        """Adopts the node's load balancer, or loads it.

        Raises:
            bpf.BpfError: The kernel refuses the programs or maps; nothing is attached or pinned then.
        """
        adopted = cls._adopt(pins, tunables)
        return adopted if adopted is not None else cls._load(pins, tunables)

    @classmethod
    def exists(cls, pins: Path) -> bool:
        """Whether anything of a load balancer is pinned there."""
        return pinning.exists(pins)

    @classmethod
    def pinned_services(cls, pins: Path) -> int:
        """How many rows the pinned map of services has; 0 where there is none."""
        path = pins / "maps" / "services"
        if not path.exists():
            return 0
        with bpf.Map.from_pin(path) as services:
            return len(services)

    @classmethod
    def pinned_digest(cls, pins: Path) -> int:
        """The digest of the object and tunables that are pinned; 0 where nothing whole is."""
        path = pins / "maps" / "settings"
        if not path.exists():
            return 0
        with bpf.Map.from_pin(path) as settings:
            return int(settings[0]["digest"]) if "digest" in (settings.value_dtype.names or ()) else 0

    @classmethod
    def pinned_sizes(cls, pins: Path) -> dict[str, int]:
        """The sizes of the pinned maps, by the name that `Tunables` has for each."""
        names = {
            "connections": "connections",
            "affinity": "affinity",
            "services": "services",
            "backends": "backends",
            "maglev_pages": "maglev",
        }
        found = {}
        for name, table in names.items():
            if (pins / "maps" / table).exists():
                with bpf.Map.from_pin(pins / "maps" / table) as pinned:
                    found[name] = pinned.max_entries
        return found

    @classmethod
    def pinned(cls, pins: Path) -> LoadBalancer | None:
        """What is pinned there, for reading, whatever it was loaded with; None where it is not whole."""
        return cls._adopt(pins, None)

    @classmethod
    def _adopt(cls, pins: Path, tunables: Tunables | None) -> LoadBalancer | None:
        if not pinning.whole(pins, MAPS, tunables.programs if tunables is not None else PROGRAMS):
            return None
        with bpf.Map.from_pin(pins / "maps" / "settings") as settings:
            names = settings.value_dtype.names or ()
            if "digest" not in names:
                return None
            if tunables is not None and int(settings[0]["digest"]) != tunables.digest:
                return None
        maps = {name: bpf.Map.from_pin(pins / "maps" / name) for name in MAPS}
        programs = {
            name: bpf.Program.from_pin(pins / "programs" / name)
            for name in (*PROGRAMS, *SOCKET_PROGRAMS)
            if (pins / "programs" / name).exists()
        }
        return cls(pins, tunables or Tunables(), programs, maps, fresh=False)

    @classmethod
    def _load(cls, pins: Path, tunables: Tunables) -> LoadBalancer:
        obj = bpf.Object.open(object_bytes(), name="loadbalancer")
        try:
            earlier = _earlier_ports(pins)
            if earlier is not None:
                obj.constants["earlier_port_min"], obj.constants["earlier_port_max"] = earlier
            obj.constants["nat_port_min"] = tunables.nat_port_min
            obj.constants["nat_port_max"] = tunables.nat_port_max
            obj.constants["check_mtu"] = int(tunables.check_mtu)
            obj.constants["tx_by_redirect"] = int(tunables.tx_by_redirect)
            if not tunables.connect_time:
                obj.leave_out(*SOCKET_PROGRAMS)
            for name, size in tunables.sizes.items():
                obj.resize(name, size)
            there = [name for name in MAPS if (pins / "maps" / name).exists()]
            replaced = [name for name in there if not same_shape(obj.maps[name], pins / "maps" / name)]
            if any(name in TABLES for name in replaced):
                replaced.extend(name for name in TABLES if name in there and name not in replaced)
            for name in there:
                if name not in replaced:
                    with bpf.Map.from_pin(pins / "maps" / name) as old:
                        obj.reuse(name, old)
            obj.load()
            maps = {name: obj.maps[name] for name in MAPS}
            programs = {name: obj.programs[name] for name in tunables.programs}
            for name in CARRIED_OVER:
                if name in replaced:
                    carry_over(pins / "maps" / name, maps[name])
        except BaseException:
            obj.close()
            raise
        return cls(pins, tunables, programs, maps, fresh=True, replaced=tuple(replaced), origin=obj)

    def close(self) -> None:
        """Lets go of the descriptors. What is pinned stays in the kernel."""
        if self._object is not None:
            self._object.close()
            return
        for table in self.maps.values():
            table.close()
        for program in self._programs.values():
            program.close()

    def __enter__(self) -> LoadBalancer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- attaching

    def activate(
        self,
        uplinks: Iterable[tuple[str, XdpMode]],
        cgroup: Path | None = None,
        *,
        refused: list[bpf.BpfError] | None = None,
    ) -> list[Attachment]:
        """Pins everything and attaches the programs to the uplinks, and to no other interface.

        Args:
            uplinks: Names of interfaces and their XDP modes.
            cgroup: Whose sockets the programs of sockets serve; None for nobody's.
            refused: Where given, a cgroup that takes no program is noted here, and the rest is attached.

        Raises:
            bpf.BpfError: An interface has somebody else's XDP program, or does not exist, or the cgroup refuses. What
                was attached by this call is detached again.
        """
        self._pin()
        made: list[Attachment] = []
        try:
            for interface, mode in uplinks:
                # The XDP program last: what it leaves to the other two must find them there.
                made.extend(self._attach(name, interface, mode) for name in ("resolve", "reply", "balance"))
            made.append(self._attach("count_exceptions", "", "auto"))
            if cgroup is not None and self.tunables.connect_time:
                try:
                    made.extend(self._attach_cgroup(name, cgroup) for name in SOCKET_PROGRAMS)
                except bpf.BpfError as error:
                    if refused is None:
                        raise
                    refused.append(error)
                    made = [item for item in made if item.program not in SOCKET_PROGRAMS]
        except BaseException:
            for attachment in made:
                if attachment.change == "attached":
                    detach(self.pins, attachment.program, attachment.interface)
            if not attached(self.pins):
                pinning.unpin(self.pins)
            raise
        wanted = {(attachment.program, attachment.interface) for attachment in made}
        for program, interface in attached(self.pins):
            if (program, interface) not in wanted:
                made.append(detach(self.pins, program, interface))
        for name in SOCKET_PROGRAMS:
            if name not in self._programs:
                (self.pins / "programs" / name).unlink(missing_ok=True)
        self.fresh = False
        return made

    def _attach(self, name: str, interface: str, mode: XdpMode) -> Attachment:
        """Attaches a program where it is not, replaces an older version where it is."""
        program = self._programs[name]
        path = link_pin(self.pins, name, interface, mode if name == "balance" else "auto")
        if any(other != path for other in pins_of(self.pins, name, interface)):
            # The kernel changes no link's mode: for a moment the interface is without the program.
            detach(self.pins, name, interface)
        link = open_link(path, interface, DIRECTIONS.get(name))
        if link is not None:
            with link:
                holds = program_id(link)
                if holds == program.id:
                    return Attachment(name, hook_of(link), interface, "kept")
                if name != "count_exceptions":
                    link.update(program)
                    return Attachment(name, hook_of(link), interface, "updated")
                # The kernel updates no tracepoint's link: the new one stands beside the old one for a moment.
                with program.attach_raw_tracepoint("xdp_exception") as new:
                    path.unlink()
                    new.pin(path)
                return Attachment(name, hook_of(link), interface, "updated")
        if path.exists():
            path.unlink()  # of an interface that is gone; one of the same name may have come
        made: bpf.Link | bpf.ClsactFilter
        if name == "count_exceptions":
            made = program.attach_raw_tracepoint("xdp_exception")
        elif name == "balance":
            made = program.attach_xdp(interface, mode=mode)
        else:
            made = program.attach_tc(interface, DIRECTIONS[name], pin=path)
        with made:
            if made.pinned is None:
                made.pin(path)
            return Attachment(name, hook_of(made), interface, "attached")

    def _attach_cgroup(self, name: str, cgroup: Path) -> Attachment:
        """Attaches a program of sockets where it is not, replaces an older version where it is."""
        program = self._programs[name]
        path = link_pin(self.pins, name, "")
        number = os.stat(cgroup).st_ino
        link = open_link(path, "", DIRECTIONS.get(name))
        if link is not None:
            with link:
                if isinstance(link, bpf.Link) and link.info.cgroup_id == number:
                    if program_id(link) == program.id:
                        return Attachment(name, hook_of(link), "", "kept")
                    link.update(program)
                    return Attachment(name, hook_of(link), "", "updated")
        # The other cgroup's, or one of a cgroup that is gone, leaves when the new one is there.
        with program.attach_cgroup(cgroup, name) as made:
            if path.exists():
                detach(self.pins, name, "")
            made.pin(path)
            return Attachment(name, hook_of(made), "", "attached")

    def _pin(self) -> None:
        (self.pins / "links").mkdir(parents=True, exist_ok=True)
        settings = self.maps["settings"]
        ports = [self.tunables.nat_port_min, self.tunables.nat_port_max, *(_earlier_ports(self.pins) or ())]
        values = {"nat_port_min": min(ports), "nat_port_max": max(ports)}
        if self.fresh:
            # Nobody adopts a mixture of two versions' maps and programs, if this process ends in between.
            settings[0] = {**values, "balance_id": int(settings[0]["balance_id"]), "digest": 0}
        pinning.pin_all(self.pins, self.maps, self._programs)
        settings[0] = {
            **values,
            "balance_id": self._programs["balance"].id,
            "digest": self.tunables.digest,
        }

    # -- tables

    @property
    def pages(self) -> NDArray[np.uint32]:
        """All tables' slots, live and writable, shape (pages, 1024): rows of `backends`, 0 where nothing is.

        As much of this process's memory as the map has, as long as it is kept; see `page_range`.
        """
        return self.page_range(0, self.page_count)

    @property
    def page_count(self) -> int:
        """Pages that the map has."""
        return self.maps["maglev"].max_entries

    def page_range(self, first: int, count: int) -> NDArray[np.uint32]:
        """Some of the `pages`, live and writable, shape (count, 1024)."""
        found: NDArray[np.uint32] = self.maps["maglev"].view(first=first, count=count)["backends"]
        return found

    def build_table(self, first_page: int, size: int, rows: NDArray[np.uint32], plan: Turns) -> None:
        """Builds a Maglev table into pages that no service points to.

        Args:
            first_page: Where it begins.
            size: Slots, a prime.
            rows: Row of `backends` for each of the caller's backends, shape (n,).
            plan: Turns and quotas of the same backends.

        Raises:
            HooklineError: The kernel program left slots empty.
        """
        count = len(rows)
        most = self.maps["maglev_candidates"].max_entries
        if count > most:
            raise HooklineError(
                f"{count} backends in one table",
                why=f"the table builder takes {most}",
                remedy="split the service",
            )
        self.page_range(first_page, pages_for(size))[:] = 0
        candidates = self.maps["maglev_candidates"].view(count=count)
        candidates["backend"] = rows[plan.order]
        candidates["slot"] = plan.offset
        candidates["skip"] = plan.skip
        candidates["quota"] = plan.quota
        candidates["next"] = np.roll(np.arange(count, dtype=np.uint32), -1)
        job = np.array([first_page, size, count - 1, size], dtype=np.uint32)
        result = self._programs["build_maglev"].test_run(context=job.tobytes())
        if result.verdict != 0:
            raise HooklineError(
                f"the table at page {first_page} was not filled",
                why=f"the kernel program build_maglev answered {result.verdict} for {count} backends, {size} slots",
                remedy="report this: the tables of the programs and of Python disagree",
            )

    def write_table(self, first_page: int, slots: NDArray[np.uint32]) -> None:
        """Writes a table that was made elsewhere, one row number per slot."""
        count = pages_for(len(slots))
        self.page_range(first_page, count).reshape(-1)[: len(slots)] = slots

    # -- counters

    def open_connections(self) -> dict[tuple[bytes, int], int]:
        """Connections of XDP that were not seen to end and are not idle for so long that they are over, each once.

        Returns:
            Their number by what they were made to (address, port, protocol: 19 octets as in the keys of ``services``) and
            row of ``backends``; row 0: the backend's row has another owner by now.
        """
        table = self.maps["connections"]
        btf = table.definition.btf()
        kinds = btf.enums()["connection_kind"] if btf else {}
        closing = btf.enums()["connection_flags"]["CONNECTION_CLOSING"] if btf else 0
        keys, values = table.read()
        # A translated connection has a second row for its replies; a backend's row may have had another owner.
        forward = [kinds[name] for name in ("CONNECTION_NAT", "CONNECTION_DSR", "CONNECTION_LOCAL")]
        idle = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - values["last_seen_ns"].astype(np.int64)
        limits = np.where(keys["protocol"] == socket.IPPROTO_TCP, TCP_IDLE_NS, UDP_IDLE_NS)
        chosen = np.isin(values["kind"], forward) & (values["flags"] & closing == 0) & (idle <= limits)
        keys, values = keys[chosen], values[chosen]
        _, backends = self.maps["backends"].read()
        current = values["generation"] == backends["generation"][values["backend"]]
        raw = np.empty((len(keys), 23), np.uint8)
        raw[:, :16] = np.ascontiguousarray(keys["destination"]).view(np.uint8).reshape(len(keys), 16)
        raw[:, 16:18] = np.ascontiguousarray(keys["destination_port"]).view(np.uint8).reshape(len(keys), 2)
        raw[:, 18] = keys["protocol"]
        rows = np.where(current, values["backend"], 0).astype("<u4")
        raw[:, 19:] = rows.view(np.uint8).reshape(len(keys), 4)
        every, numbers = np.unique(raw.view("V23").reshape(-1), return_counts=True)
        return {
            ((text := one.tobytes())[:19], int.from_bytes(text[19:], "little")): int(number)
            for one, number in zip(every, numbers.tolist(), strict=True)
        }

    def totals(self) -> Totals:
        """The node's counters."""
        return totals(self.maps)


def totals(maps: Mapping[str, bpf.Map]) -> Totals:
    """The node's counters, read from its maps ``metrics``, ``exceptions`` and ``socket_metrics``."""
    metrics = maps["metrics"][0]
    btf = maps["metrics"].definition.btf()
    names = [name.removeprefix("REASON_").lower() for name in btf.enums()["drop_reason"]] if btf else []

    def pair(tally: NDArray[np.void]) -> tuple[int, int]:
        return int(tally["packets"].sum()), int(tally["bytes"].sum())

    verdicts = {name: pair(metrics["verdicts"][:, number]) for number, name in enumerate(VERDICTS)}
    reasons = {
        name: pair(metrics["reasons"][:, number])
        for number, name in enumerate(names)
        if name not in ("none", "count") and metrics["reasons"]["packets"][:, number].any()
    }
    _, counts = maps["exceptions"].read()
    sockets = maps["socket_metrics"][0]
    return Totals(
        verdicts=verdicts,
        reasons=reasons,
        replies=pair(metrics["replies"]),
        handed_to_stack=pair(metrics["handed"]),
        answered=pair(metrics["answered"]),
        exceptions={name: int(row.sum()) for name, row in zip(VERDICTS, counts, strict=True) if row.any()},
        sockets={name: int(sockets[name].sum()) for name in sockets.dtype.names or ()},
    )


def pages_for(size: int) -> int:
    """Pages that a table of so many slots takes."""
    return -(-size // PAGE_SLOTS)


DIRECTIONS: Mapping[str, pinning.Direction] = {"resolve": "ingress", "reply": "egress"}


def attached_mode(pins: Path, interface: str) -> str | None:
    """The mode of the XDP program on an interface; None where none is attached."""
    for path in pins_of(pins, "balance", interface):
        link = open_link(path, interface, DIRECTIONS.get("balance"))
        if link is not None:
            with link:
                return link.mode
    return None


def not_attached(pins: Path, uplinks: Iterable[str], cgroup: Path | None = None) -> list[tuple[str, str]]:
    """Programs and interfaces of the attachments that `LoadBalancer.activate` would make."""
    there = {(item.program, item.interface) for item in attachments(pins)}
    wanted = [(name, interface) for interface in uplinks for name in ("resolve", "reply", "balance")]
    wanted.append(("count_exceptions", ""))
    if cgroup is not None:
        number = os.stat(cgroup).st_ino
        there -= {(name, "") for name in SOCKET_PROGRAMS if attached_cgroup(pins, name) != number}
        wanted.extend((name, "") for name in SOCKET_PROGRAMS)
    return [item for item in wanted if item not in there]


def attached_cgroup(pins: Path, program: str = SOCKET_PROGRAMS[-1]) -> int | None:
    """The kernel's number of the cgroup that a program of sockets is attached to; None where it is on none."""
    link = open_link(link_pin(pins, program, ""), "", DIRECTIONS.get(program))
    if link is None:
        return None
    with link:
        return link.info.cgroup_id or None if isinstance(link, bpf.Link) else None


def refuse_occupied(pins: Path, uplinks: Iterable[str]) -> None:
    """Checks that no uplink has somebody else's XDP program, before anything is touched.

    Raises:
        bpf.BpfError: Naming the interface and the program.
    """
    for interface in uplinks:
        if attached_mode(pins, interface) is None:
            bpf.refuse_occupied("balance", interface)


def attachments(pins: Path) -> list[Attachment]:
    """Every attachment as it is; those whose interface is gone are left out."""
    return pinning.attachments(pins, DIRECTIONS)


def detach(pins: Path, program: str, interface: str) -> Attachment:
    """Detaches one program and unpins its link."""
    return pinning.detach(pins, program, interface, DIRECTIONS.get(program))


def remove(pins: Path) -> list[Attachment]:
    """Detaches and unpins all that a load balancer has there, whatever its version."""
    gone = [detach(pins, program, interface) for program, interface in attached(pins)]
    pinning.unpin(pins)
    return gone


def _earlier_ports(pins: Path) -> tuple[int, int] | None:
    """The ports that nat gave on this node so far; None where it never did."""
    path = pins / "maps" / "settings"
    if not path.exists():
        return None
    with bpf.Map.from_pin(path) as settings:
        if "nat_port_min" not in (settings.value_dtype.names or ()):
            return None
        row = settings[0]
        return (int(row["nat_port_min"]), int(row["nat_port_max"])) if row["nat_port_max"] else None
