"""What the firewall tells, with the names of pods and policies in place of numbers."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Any, Literal, Self

from hookline.control._errors import ControlError
from hookline.datapath.firewall.firewall import SIDES, VERDICTS, Firewall
from hookline.model.names import NodeName
from hookline.policy import RuleSource, World

Address = IPv4Address | IPv6Address
Direction = Literal["ingress", "egress"]

WOULD_DENY = "would_deny"


@dataclass(frozen=True, slots=True)
class VerdictEvent:
    """One verdict of the firewall.

    Attributes:
        time: When, in seconds since 1970.
        verdict: ``allow``, ``deny``, or ``audit``: it passed, and an audited policy would have denied it.
        reason: One word: why; of an audit always ``would_deny``.
        direction: As the pod sees it whose policies decided: ``ingress`` is what comes to it.
        source: Who sent the packet: ``namespace/pod``, ``node/name``, ``external/name`` or an address; ``destination`` likewise.
        policy: Reference of the policy whose rule allowed it; empty where no rule did.
        rule: The rule's place in the policy's list for that direction; None where no rule did.
        generation: The firewall's, by which it was judged.
        policies_changed: The firewall's rows are others since, so what is said of policies may not be what decided.
    """

    time: float
    verdict: str
    reason: str
    direction: Direction
    source: str
    destination: str
    source_address: str
    destination_address: str
    source_port: int
    destination_port: int
    protocol: int
    policy: str
    rule: int | None
    interface: int
    generation: int
    bytes: int
    tcp_flags: int
    policies_changed: bool

    def as_dict(self) -> dict[str, Any]:
        """The event as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RuleCount:
    """What a rule let through. Counters are sums over the CPUs since the rule came."""

    policy: str
    direction: Direction
    rule: int
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection that the firewall knows, with names.

    Attributes:
        source: Who began it, as in `VerdictEvent`.
        direction: As the pod sees it in whose table it is.
        policy: As in `VerdictEvent`; ``rule`` likewise.
        cut: It is not allowed any more.
    """

    source: str
    destination: str
    source_address: Address
    destination_address: Address
    source_port: int
    destination_port: int
    protocol: int
    direction: Direction
    state: str
    cut: bool
    policy: str
    rule: int | None


class Names:
    """Who has an address."""

    def __init__(self, world: World, own: str) -> None:
        self._names: dict[Address, str] = {}
        for name, external in world.externals.items():
            self._names.update(dict.fromkeys(external.addresses, f"external/{name}"))
        for name, pod in world.pods.items():
            if not pod.spec.host_network and not pod.has_ended:
                self._names.update(dict.fromkeys(pod.addresses, name))
        for name, node in world.nodes.items():
            self._names.update(dict.fromkeys(node.service_addresses, f"node/{name}"))
        self._names.update((address, f"node/{own}") for address in world.own_addresses)

    def __getitem__(self, address: Address) -> str:
        return self._names.get(address) or str(address)


def lock_verdicts(name: NodeName) -> int:
    """Has no other process read a node's verdicts, as a ring has one position. The descriptor holds the lock until it is closed.

    Raises:
        ControlError: Another process has it, or the folder cannot be made.
    """
    path = name.run_dir / "verdicts.lock"
    try:
        name.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ControlError(
            f"the verdicts of node {name} cannot be read",
            why=f"{path}: {error.strerror or error}",
            remedy="run as root, with a writable /run/hookline",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ControlError(
            f"the verdicts of node {name} are being read",
            why="each is told once, and somebody reads them now: hookline verdicts --follow, perhaps",
            remedy="end that one first, or read what it prints",
        ) from None
    return descriptor


class Verdicts:
    """Reads the firewall's verdicts as they come. Close it, or use it as a context manager; there is one reader at a time.

    Args:
        firewall: The node's; closed with this.
        names: Asked anew for who has an address and where rules are written, before each reading.
        lock: What `lock_verdicts` gave; let go of with this.
    """

    def __init__(
        self, firewall: Firewall, names: Callable[[], tuple[Names, Mapping[int, RuleSource]]], lock: int
    ) -> None:
        self._firewall = firewall
        self._lock = lock
        self._ring = firewall.verdicts()
        self._reasons = firewall.reasons
        self._ask_names = names
        # The kernel's clock does not follow steps of the wall clock.
        self._began = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)

    def close(self) -> None:
        """Lets the next reader come."""
        self._ring.close()
        self._firewall.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for a verdict; False where none came in that time."""
        return bool(self._ring.wait(timeout=seconds))

    def read(self) -> list[VerdictEvent]:
        """The verdicts that came since the last reading, which may be none."""
        batch = self._ring.read()
        if not len(batch):
            return []
        names, sources = self._ask_names()
        generation = self._firewall.generation
        return [self._event(record, names, sources, generation) for record in batch]

    @property
    def lost(self) -> int:
        """Verdicts that found no room, since the firewall was loaded."""
        return int(self._ring.lost or 0)

    @property
    def suppressed(self) -> int:
        """Verdicts that were not told since there were too many of them, since the firewall was loaded."""
        return self._firewall.totals().suppressed

    def _event(
        self, record: Any, names: Names, sources: Mapping[int, RuleSource], generation: int
    ) -> VerdictEvent:
        direction = SIDES[int(record["direction"])]
        ends = [
            (address_of(record[side].tobytes()), int(record[f"{side}_port"].byteswap()))
            for side in ("local", "remote")
        ]
        (source, source_port), (destination, port) = ends if direction == "egress" else reversed(ends)
        written = sources.get(int(record["rule"]))
        verdict = VERDICTS[int(record["verdict"])]
        return VerdictEvent(
            self._began + int(record["at_ns"]) / 1e9,
            verdict,
            # The programs say of these why they passed, which is not why they are told.
            WOULD_DENY if verdict == "audit" else self._reasons[int(record["reason"])],
            direction,
            names[source],
            names[destination],
            str(source),
            str(destination),
            source_port,
            port,
            int(record["protocol"]),
            written.policy if written else "",
            written.index if written else None,
            int(record["interface"]),
            int(record["generation"]),
            int(record["bytes"]),
            int(record["tcp_flags"]),
            int(record["generation"]) != generation,
        )


def connections(firewall: Firewall, names: Names, sources: Mapping[int, RuleSource]) -> Iterable[Connection]:
    """The connections that are not over, named."""
    for one in firewall.tracked():
        ends = [(one.local, one.local_port), (one.remote, one.remote_port)]
        (source, source_port), (destination, port) = ends if one.direction == "egress" else reversed(ends)
        written = sources.get(one.rule)
        yield Connection(
            names[source],
            names[destination],
            source,
            destination,
            source_port,
            port,
            one.protocol,
            one.direction,
            one.state,
            one.cut,
            written.policy if written else "",
            written.index if written else None,
        )


def address_of(octets: bytes) -> Address:
    """An address of 16 bytes, IPv4's being ::ffff:a.b.c.d."""
    found = IPv6Address(octets)
    return found.ipv4_mapped or found
