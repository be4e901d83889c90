"""A backend's life: starting, active, draining, down. Pure: no clock, no kernel, no sockets.

Three things decide where a backend is, and `settle` is the one place where they meet:

- what the documents say: it takes connections, it drains, or it is gone (weights, an EndpointSlice's conditions, removal);
- what its checks and its slow start say, which `Life` works out and calls its `Health`;
- a deadline, at which a drain ends.

| documents | deadline | health | state |
| --- | --- | --- | --- |
| down | any | any | down |
| draining | passed | any | down |
| draining | none, or ahead | any | draining |
| active, starting | any | none is known | as the documents say |
| active, starting | any | down | down |
| active, starting | any | starting | starting, with its share |
| active, starting | any | active | active |

So a health check never ends a drain, and a drain never hides that a backend is gone. Times are seconds of a clock that is never
set (CLOCK_MONOTONIC or CLOCK_BOOTTIME) and are given in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from hookline.control.pools import Pool, Protocol, State, Target

Address = IPv4Address | IPv6Address

SHARE_STEPS = 10
"""Slow start grows by this many steps: each one rebuilds a table."""

SHORTEST_STEP_SECONDS = 0.2
"""A slow start that is short has fewer steps."""

DAMPING_SECONDS = 60.0
"""How long a fall is held against a backend."""

DAMPING_MOST = 6
"""A flapping backend needs at most ``rise × 2 ** DAMPING_MOST`` passes to come back."""


class HealthKey(NamedTuple):
    """Which backend of which port of which service: what a health check is of.

    Attributes:
        service: The service's reference.
        port: The port's name, or its number; with the protocol as in `Pool`.
        number: The backend's port.
    """

    service: str
    port: str
    protocol: Protocol
    address: Address
    number: int

    @classmethod
    def of(cls, pool: Pool, target: Target) -> HealthKey:
        """The key of a pool's target. The pools of one port share it, whatever their scope."""
        return cls(pool.service, pool.port, pool.protocol, target.address, target.port)

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.service} port {self.port}/{self.protocol.lower()}: {host}:{self.number}"


class Health(NamedTuple):
    """What checks and slow start say of a backend, and, from `settle`, what it is.

    Attributes:
        share: Percent of its weight while it is starting; 0 until its first check has passed.
    """

    state: State
    share: int = 100


ACTIVE, DOWN, DRAINING, UNCHECKED = (
    Health("active"),
    Health("down", 0),
    Health("draining", 0),
    Health("starting", 0),
)


def settle(documents: State, health: Health | None, *, past_deadline: bool = False) -> Health:
    """The state of a backend, by the table above.

    Args:
        documents: What the documents say.
        health: What its checks and its slow start say; None where nobody checks it and it does not start slowly.
        past_deadline: Whether its drain is over.
    """
    if documents == "down" or (documents == "draining" and past_deadline):
        return DOWN
    if documents == "draining":
        return DRAINING
    if health is None or health.state == "draining":
        return ACTIVE if documents == "active" else Health(documents)
    return DOWN if health.state == "down" else health


@dataclass(frozen=True, slots=True)
class Rules:
    """How one backend's life goes.

    Attributes:
        checked: Whether it has a health check. Without one it passes at once.
        rise: Passes in a row that bring a backend back which is down.
        fall: Failures in a row that take one down.
        slow_start_seconds: How long its share grows once it takes connections; 0: it has all of it at once.
    """

    checked: bool = True
    rise: int = 1
    fall: int = 1
    slow_start_seconds: float = 0.0


def rules_of(pool: Pool) -> Rules:
    """The rules of a pool's backends."""
    how = pool.health_check
    return Rules(
        how is not None, how.rise if how else 1, how.fall if how else 1, float(pool.slow_start_seconds)
    )


class Life:
    """What checks and slow start say of one backend, over time.

    A new backend is *unchecked*: its first check decides, whatever ``rise`` and ``fall`` are. After that, ``fall`` failures in a
    row take it down, and ``rise`` passes in a row bring it back.

    **Damping**: every fall within the last `DAMPING_SECONDS` beyond the first doubles the passes that the next return needs, up
    to ``2 ** DAMPING_MOST`` times ``rise``, so a backend that flaps changes tables ever more rarely. Falls are never put off.

    Whenever a backend begins to take connections, its slow start begins, too.

    Args:
        rules: Its rules.
        now: The time, in seconds of a clock that is never set.
        known: What an earlier process said of it last; it goes on from there.
        established: Whether it took connections before anybody watched it: then it is active until checks say otherwise, and does
            not start slowly.
    """

    __slots__ = ("_documents", "_falls", "_since", "_streak", "_up", "rules")

    def __init__(
        self, rules: Rules, now: float, *, known: Health | None = None, established: bool = False
    ) -> None:
        self.rules = rules
        self._documents: State = "active"
        self._falls: tuple[float, ...] = ()
        self._streak = 0
        self._up: bool | None = None
        self._since: float | None = None
        if known is None:
            if established:
                self._up = True
            elif not rules.checked:
                self._begin(now)
        elif known.state == "down" and rules.checked:
            self._up = False
        elif known.state == "starting" and known.share and rules.slow_start_seconds:
            self._up = True
            self._since = now - rules.slow_start_seconds * known.share / 100
        elif known.state != "starting" or known.share or not rules.checked:
            self._up = True

    # -- what happens

    def passed(self, now: float) -> None:
        """A check passed."""
        if self._up:
            self._streak = 0
            return
        self._streak += 1
        if self._up is None or self._streak >= self.passes_needed(now):
            self._begin(now)

    def failed(self, now: float) -> None:
        """A check failed."""
        if self._up is False:
            self._streak = 0
            return
        self._streak += 1
        if self._up is None or self._streak >= self.rules.fall:
            recent = (at for at in self._falls if now - at < DAMPING_SECONDS)
            self._falls = (*recent, now)[-DAMPING_MOST - 1 :]
            self._up, self._since, self._streak = False, None, 0

    def document(self, documents: State, now: float) -> None:
        """The documents say something else. Who takes connections again after a drain begins anew."""
        took, takes = (state in ("active", "starting") for state in (self._documents, documents))
        self._documents = documents
        if took == takes:
            return
        self._since, self._streak = None, 0
        if takes:
            self._up = None
            if not self.rules.checked:
                self._begin(now)

    def follow(self, rules: Rules, now: float) -> None:
        """Other rules, from now on. What was found by a check does not outlive it."""
        before, self.rules = self.rules, rules
        if before.checked and not rules.checked and self._up is not True:
            self._begin(now)
        if not rules.slow_start_seconds:
            self._since = None
        elif self._since is not None and before.slow_start_seconds:
            grown = min(1.0, (now - self._since) / before.slow_start_seconds)
            self._since = now - grown * rules.slow_start_seconds

    def _begin(self, now: float) -> None:
        self._up, self._streak = True, 0
        self._since = now if self.rules.slow_start_seconds > 0 else None

    # -- what follows

    @property
    def is_checked(self) -> bool:
        """Whether it is to be checked now: not while the documents keep connections away from it anyway."""
        return self.rules.checked and self._documents in ("active", "starting")

    @property
    def is_failing(self) -> bool:
        """Whether it takes connections, and its last check failed."""
        return self._up is True and self._streak > 0

    def passes_needed(self, now: float) -> int:
        """How many passes in a row bring it back: ``rise``, and more where it flaps."""
        recent = sum(now - at < DAMPING_SECONDS for at in self._falls)
        return self.rules.rise * (1 << min(max(recent - 1, 0), DAMPING_MOST))

    def health(self, now: float) -> Health:
        """What is to be said of it now."""
        if self._up is None:
            return UNCHECKED
        if not self._up:
            return DOWN
        if self._since is None:
            return ACTIVE
        step, steps = self._step(now)
        return Health("starting", 100 * step // (steps + 1)) if step <= steps else ACTIVE

    def next_change(self, now: float) -> float | None:
        """When time alone changes its health next; None where it does not."""
        if not self._up or self._since is None:
            return None
        step, steps = self._step(now)
        return self._since + step * self.rules.slow_start_seconds / steps if step <= steps else None

    def _step(self, now: float) -> tuple[int, int]:
        """Which step of its slow start it is at, from 1, and of how many; one more than these once it is over."""
        seconds = self.rules.slow_start_seconds
        if self._since is None or seconds <= 0:
            return 1, 0
        steps = max(1, min(SHARE_STEPS, int(seconds / SHORTEST_STEP_SECONDS)))
        # Timers are rounded: what comes a moment early has come.
        return int((now - self._since) * steps / seconds + 1e-6) + 1, steps


def living(
    pool: Pool,
    health: Mapping[HealthKey, Health],
    *,
    leaving: Iterable[Target] = (),
    past_deadline: frozenset[tuple[Address, int]] = frozenset(),
    fail_open: bool | None = None,
) -> Pool:
    """A pool of the documents as its backends' lives make it: what the tables are made of.

    The size of its table is left alone, so that only the slots of backends that change go elsewhere.

    Args:
        pool: As the documents have it.
        health: By backend.
        leaving: Targets that the documents hold no longer and whose connections may stay for a while.
        past_deadline: Addresses and ports of those whose drain is over.
        fail_open: Where no backend is left, all take connections that the documents let, or none does; None: as the pool says.
    """
    kept = {(target.address, target.port) for target in pool.targets}
    gone = (replace(target, state="draining") for target in leaving)
    every = (*pool.targets, *(target for target in gone if (target.address, target.port) not in kept))
    if not health and len(every) == len(pool.targets) and not past_deadline:
        return pool
    targets = []
    for target in every:
        key = HealthKey.of(pool, target)
        past = (target.address, target.port) in past_deadline
        now = settle(target.state, health.get(key), past_deadline=past)
        if now.state == "starting" and target.state == "active":
            # A table by remainder takes its size from the weights: a share would move every slot.
            share = 100 if pool.algorithm == "modulo" and now.share else now.share
            targets.append(replace(target, state="starting", share=share))
        elif now.state != target.state:
            targets.append(replace(target, state=now.state, share=100))
        else:
            targets.append(target)
    if fail_open is None:
        fail_open = pool.all_down == "failOpen"
    if fail_open and not any(target.effective_weight for target in targets):
        targets = [
            wanted if wanted.effective_weight else target
            for wanted, target in zip(every, targets, strict=True)
        ]
    return replace(pool, targets=tuple(targets)) if tuple(targets) != pool.targets else pool
