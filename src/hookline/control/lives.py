"""What a node knows of its backends' lives beyond the documents: health that was reported, and drains with their deadlines.

`Lives` is pure data that is never changed, only followed by another one; `State` keeps it. Times are CLOCK_BOOTTIME's, which
nobody sets and which also runs while the machine sleeps; what another boot wrote is void, as its connections are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from hookline.control.health import ACTIVE, Address, Health, HealthKey, Life, living, rules_of
from hookline.control.placement import packed
from hookline.control.pools import Pool, Target

K = TypeVar("K")
V = TypeVar("V")
TAKING = ("starting", "active")


class LeavingKey(NamedTuple):
    """Which backend of which pool."""

    service: str
    pool: int
    address: Address
    number: int


class Leaving(NamedTuple):
    """A backend that drains.

    Attributes:
        target: As the documents had it last.
        deadline: When its drain is over.
        removed: Whether the documents hold it no longer: then it is gone altogether at its deadline, else down.
    """

    target: Target
    deadline: float
    removed: bool


def boottime() -> float:
    """Seconds since the machine started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """What tells this start of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Lives:
    """Health and drains, by service. Backends that are active and well have no entry."""

    health: Mapping[str, Mapping[HealthKey, Health]] = field(default_factory=dict)
    leaving: Mapping[str, Mapping[LeavingKey, Leaving]] = field(default_factory=dict)

    def living(self, service: str, documents: Sequence[Pool], now: float) -> tuple[Pool, ...]:
        """A service's pools of the documents as its backends' lives make them."""
        health, leaving = self.health.get(service, {}), self.leaving.get(service, {})
        if not health and not leaving:
            return tuple(documents)
        found = []
        for pool in documents:
            mine = [item for key, item in leaving.items() if key.pool == pool.key]
            past = frozenset((item.target.address, item.target.port) for item in mine if item.deadline <= now)
            # One that is removed goes at its deadline.
            stays = [item.target for item in mine if item.removed and item.deadline > now]
            found.append(living(pool, health, leaving=stays, past_deadline=past))
        return tuple(found)

    def observed(self, changes: Mapping[HealthKey, Health]) -> Lives:
        """With what was reported."""
        health = dict(self.health)
        by_service: dict[str, dict[HealthKey, Health]] = {}
        for key, said in changes.items():
            mine = by_service.get(key.service)
            if mine is None:
                mine = by_service[key.service] = dict(health.get(key.service, {}))
            if said == ACTIVE:
                mine.pop(key, None)
            else:
                mine[key] = said
        _replace_all(health, by_service)
        return Lives(health, self.leaving)

    def followed(
        self,
        before: Mapping[str, Sequence[Pool]],
        after: Mapping[str, Sequence[Pool]],
        now: float,
        *,
        watched: bool,
    ) -> tuple[Lives, set[str]]:
        """After a change of the documents, with the services that it concerns.

        Args:
            before: The documents' pools, by service.
            after: Those after the change.
            now: The time.
            watched: Whether somebody checks backends: then those that begin to take connections are to be checked first, or
                start slowly.
        """
        concerned = {service for service in before if service not in after}
        concerned |= {service for service, pools in after.items() if before.get(service) is not pools}
        health: dict[str, Mapping[HealthKey, Health]] = dict(self.health)
        leaving: dict[str, Mapping[LeavingKey, Leaving]] = dict(self.leaving)
        for service in concerned:
            old, new = before.get(service, ()), after.get(service, ())
            _replace_all(health, {service: self._health_after(service, old, new, watched=watched)})
            _replace_all(leaving, {service: dict(self._leaving_after(service, old, new, now))})
        return Lives(health, leaving), concerned

    def _health_after(
        self, service: str, before: Sequence[Pool], after: Sequence[Pool], *, watched: bool
    ) -> dict[HealthKey, Health]:
        known = self.health.get(service, {})
        took = {
            HealthKey.of(pool, target) for pool in before for target in pool.targets if target.state in TAKING
        }
        found: dict[HealthKey, Health] = {}
        for pool in after:
            rules = rules_of(pool)
            if not rules.checked and not rules.slow_start_seconds:
                continue
            ports = [one.port for one in _forerunners(pool, before, after)]
            for target in pool.targets:
                key = HealthKey.of(pool, target)
                former = next((old for port in ports if (old := key._replace(port=port)) in took), key)
                health = known.get(key, known.get(former))
                if watched and target.state in TAKING and key not in took and former not in took:
                    health = Life(rules, 0.0).health(0.0)
                if health is not None and health != ACTIVE:
                    found[key] = health
        return found

    def _leaving_after(
        self, service: str, before: Sequence[Pool], after: Sequence[Pool], now: float
    ) -> Iterator[tuple[LeavingKey, Leaving]]:
        known = self.leaving.get(service, {})
        same = {pool.key: pool for pool in before}
        for pool in after:
            if not pool.drain_seconds:
                continue
            deadline = now + pool.drain_seconds
            there = {(target.address, target.port) for target in pool.targets}
            old = [same[pool.key]] if pool.key in same else []
            old += _forerunners(pool, before, after)
            keys = {pool.key, *(one.key for one in old)}
            drains = {(key.address, key.number): item for key, item in known.items() if key.pool in keys}
            for target in pool.targets:
                if target.state == "draining":
                    key = LeavingKey(service, pool.key, target.address, target.port)
                    since = drains.get((target.address, target.port))
                    yield (
                        key,
                        Leaving(target, since.deadline if since and not since.removed else deadline, False),
                    )
            for (address, number), item in drains.items():
                if (address, number) not in there and item.deadline > now:
                    yield LeavingKey(service, pool.key, address, number), item._replace(removed=True)
            for target in (target for one in old for target in one.targets):
                place = (target.address, target.port)
                if place not in there and place not in drains and target.state != "down":
                    yield LeavingKey(service, pool.key, *place), Leaving(target, deadline, True)

    def past(self, now: float) -> set[str]:
        """The services with drains that are over."""
        return {
            service
            for service, items in self.leaving.items()
            if any(item.deadline <= now for item in items.values())
        }

    def drained(self, now: float) -> frozenset[tuple[int, bytes, int]]:
        """Pool, packed address and port of backends that are named still and whose drain is over."""
        return frozenset(
            (key.pool, packed(key.address), key.number)
            for items in self.leaving.values()
            for key, item in items.items()
            if item.deadline <= now and not item.removed
        )

    def expired(self, now: float) -> Lives:
        """Without those that are gone by now."""
        leaving: dict[str, Mapping[LeavingKey, Leaving]] = dict(self.leaving)
        for service in self.past(now):
            kept = {
                key: item
                for key, item in self.leaving[service].items()
                if item.deadline > now or not item.removed
            }
            _replace_all(leaving, {service: kept})
        return Lives(self.health, leaving)

    def next_deadline(self, now: float) -> float | None:
        """Seconds until the next drain is over; None where none is under way."""
        ahead = [
            item.deadline - now
            for items in self.leaving.values()
            for item in items.values()
            if item.deadline > now
        ]
        return min(ahead, default=None)


def _forerunners(pool: Pool, before: Sequence[Pool], after: Sequence[Pool]) -> list[Pool]:
    """The pools that are there no longer and whose addresses and ports this one has: their names or reach were others."""
    kept = {one.key for one in after}
    places = {(one.address, one.port) for one in pool.frontends}
    return [
        one
        for one in before
        if one.key not in kept
        and (one.version, one.protocol) == (pool.version, pool.protocol)
        and any((frontend.address, frontend.port) in places for frontend in one.frontends)
    ]


def _replace_all(within: dict[str, Mapping[K, V]], by_service: Mapping[str, Mapping[K, V]]) -> None:
    for service, entries in by_service.items():
        if entries:
            within[service] = entries
        else:
            within.pop(service, None)
