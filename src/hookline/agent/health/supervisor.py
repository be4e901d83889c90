"""Who is checked when, in one thread of its own.

The thread enters the node's network namespace once and stays there; its asyncio loop opens every socket and starts every command
from within. One heap of times drives all checks: a backend costs a few hundred bytes and no task while it waits.

**When a dead backend is found.** What is periodic is the start of a check. A dead backend whose machine still answers (refused,
reset) is down after ``fall`` starts at most: ``fall × interval``. One that is silent makes each check take its whole timeout; so
that this does not add up, checks come sooner while a backend that is up fails: every ``interval - timeout / (fall - 1)``.
With a timeout of at most ``interval × (fall - 1) / fall`` it is down within ``fall × interval`` as well. Jitter only ever
shortens an interval.

**How many at once.** At most `LANES` checks of each lane run, the others wait in the order of their times. Commands have a
lane of their own, and so have backends whose last check timed out: however many of those hang, they hold up none that answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Literal, TypeVar

from hookline import net
from hookline.agent.health.checks import Backend, Result, check
from hookline.control.health import Health, HealthKey, Life, rules_of
from hookline.control.pools import Pool, State
from hookline.model import HealthCheck

T = TypeVar("T")
Lane = Literal["usual", "slow", "command"]
Report = Callable[[Mapping[HealthKey, Health]], "Future[object] | None"]

LANES: dict[Lane, int] = {"usual": 192, "slow": 64, "command": 16}
BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RETRY_SECONDS = 1.0

log = logging.getLogger("hookline.agent.health")


@dataclass(slots=True)
class Counters:
    """What happened since the start, for a metrics endpoint. Only ever grows.

    Attributes:
        results: Checks by type, outcome and reason: ``("tcp", "failed", "refused")``.
        durations: By type, checks that took up to each of `BUCKETS_SECONDS`, and in the last place longer.
        seconds: Sum of durations by type.
        transitions: Changes of state, ``("active", "down")``.
        late: Checks that had to wait for a place, by lane.
        reports: Changes handed over to be carried out.
    """

    results: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    durations: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transitions: Counter[tuple[State, State]] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    reports: int = 0

    def count(self, kind: str, result: Result) -> None:
        """Counts a check."""
        self.results[kind, result.outcome, result.reason] += 1
        buckets = self.durations.setdefault(kind, [0] * (len(BUCKETS_SECONDS) + 1))
        place = next(
            (n for n, limit in enumerate(BUCKETS_SECONDS) if result.seconds <= limit), len(BUCKETS_SECONDS)
        )
        buckets[place] += 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + result.seconds


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one backend stands.

    Attributes:
        last: What its last check found; None before the first.
        age_seconds: How long ago that was.
    """

    health: Health
    last: Result | None
    age_seconds: float | None


class _Watch:
    """One backend that is watched."""

    __slots__ = (
        "at",
        "backend",
        "how",
        "key",
        "last",
        "last_at",
        "life",
        "reported",
        "running",
        "state",
        "ticket",
    )

    def __init__(self, key: HealthKey, how: HealthCheck | None, life: Life) -> None:
        self.key = key
        self.how = how
        self.life = life
        self.backend = Backend(key.address, key.number, key.service, key.port, key.protocol)
        self.state: State = "active"
        self.reported: Health | None = None
        self.last: Result | None = None
        self.last_at = 0.0
        self.running = False
        self.at = 0.0
        self.ticket = 0

    @property
    def lane(self) -> Lane:
        """Which lane its next check takes."""
        if self.how is not None and self.how.type == "command":
            return "command"
        hangs = self.last.reason == "timeout" if self.last is not None else self.state == "down"
        return "slow" if hangs else "usual"


class HealthSupervisor:
    """Checks the backends of a node's pools, and reports what changes.

    Args:
        report: Told of changes, in the supervisor's thread: it must not block. What it returns is waited for before the next
            changes are reported, all that came meanwhile at once; when that raises, they are reported again.
        namespace: The node's network namespace; None: the one that `start` is called in.
        lanes: How many checks run at once, by lane.
    """

    def __init__(
        self,
        report: Report,
        *,
        namespace: Path | None = None,
        lanes: Mapping[Lane, int] | None = None,
    ) -> None:
        self._report = report
        self._namespace = namespace
        self._limits = {**LANES, **(lanes or {})}
        self._counters = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._pools: Mapping[str, Sequence[Pool]] = {}
        # What follows belongs to the thread alone.
        self._watches: dict[HealthKey, _Watch] = {}
        self._of_service: dict[str, set[HealthKey]] = {}
        self._heap: list[tuple[float, int, _Watch]] = []
        self._tickets = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ticks: dict[HealthKey, asyncio.TimerHandle] = {}
        self._running: dict[Lane, int] = dict.fromkeys(self._limits, 0)
        self._waiting: dict[Lane, deque[_Watch]] = {lane: deque() for lane in self._limits}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed: dict[HealthKey, Health] = {}
        self._reporting = False

    # -- for other threads

    def start(
        self,
        pools: Mapping[str, Sequence[Pool]] | None = None,
        known: Mapping[HealthKey, Health] | None = None,
    ) -> None:
        """Begins. What is known goes on from there; backends that nothing is known of take connections already.

        Args:
            pools: The pools of the documents by service, `Node.pools`.
            known: `Node.health`.

        Raises:
            net.NetworkError: The node's network namespace is not there.
        """
        if self._thread is not None:
            raise RuntimeError("started twice")
        begun: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, args=(begun,), name="health", daemon=True)
        self._thread.start()
        begun.result()
        self._call(lambda: self._follow(pools or {}, known or {}, established=True))

    def update(
        self, pools: Mapping[str, Sequence[Pool]], known: Mapping[HealthKey, Health] | None = None
    ) -> None:
        """Follows a change of the documents; cheap for services whose pools are the same objects as before.

        Args:
            pools: All pools of the documents by service.
            known: What the node has noted of backends that are new.
        """
        self._call(lambda: self._follow(pools, known or {}, established=False))

    def stop(self, *, patience_seconds: float = 5.0) -> None:
        """Ends all checks and the thread. What was reported stays as it is."""
        thread, loop = self._thread, self._loop
        if thread is None or loop is None:
            return
        if (stopping := self._stopping) is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stopping.set)
        thread.join(patience_seconds)
        self._thread = None

    def counters(self) -> Counters:
        """A copy of the counters."""
        return self._ask(
            lambda: Counters(
                self._counters.results.copy(),
                {kind: list(buckets) for kind, buckets in self._counters.durations.items()},
                self._counters.seconds.copy(),
                self._counters.transitions.copy(),
                self._counters.late.copy(),
                self._counters.reports,
            )
        )

    def standings(self, keys: Iterable[HealthKey] | None = None) -> dict[HealthKey, Standing]:
        """Where backends stand, these or all that are watched."""

        def read() -> dict[HealthKey, Standing]:
            now = self._now()
            chosen = self._watches.keys() if keys is None else (key for key in keys if key in self._watches)
            return {key: _standing(self._watches[key], now) for key in chosen}

        return self._ask(read)

    def states(self) -> Counter[State]:
        """How many watched backends are in each state."""
        return self._ask(lambda: Counter(watch.state for watch in self._watches.values()))

    def _call(self, what: Callable[[], object]) -> None:
        if self._loop is None or self._thread is None:
            raise RuntimeError("not started")
        self._loop.call_soon_threadsafe(what)

    def _ask(self, what: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(what())
            except BaseException as error:
                answer.set_exception(error)

        self._call(run)
        return answer.result(timeout=30)

    # -- the thread

    def _main(self, begun: Future[None]) -> None:
        try:
            if self._namespace is not None:
                net.enter(self._namespace)
            loop = asyncio.new_event_loop()
        except BaseException as error:
            begun.set_exception(error)
            return
        self._loop = loop
        try:
            loop.run_until_complete(self._until_stopped(begun))
        finally:
            loop.close()

    async def _until_stopped(self, begun: Future[None]) -> None:
        self._stopping = asyncio.Event()
        begun.set_result(None)
        await self._stopping.wait()
        if self._timer is not None:
            self._timer.cancel()
        for tick in self._ticks.values():
            tick.cancel()
        self._watches.clear()
        self._heap.clear()
        for waiting in self._waiting.values():
            waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Transports that were aborted, and commands that were killed, end in the loop's next rounds.
        await asyncio.sleep(0.05)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    # -- following the documents

    def _follow(
        self, pools: Mapping[str, Sequence[Pool]], known: Mapping[HealthKey, Health], *, established: bool
    ) -> None:
        before, self._pools = self._pools, pools
        now = self._now()
        for service in before.keys() - pools.keys():
            self._drop(self._of_service.pop(service, set()))
        for service, group in pools.items():
            if before.get(service) is not group:
                self._follow_service(service, group, known, now, established=established)
        self._arm()

    def _follow_service(
        self,
        service: str,
        group: Sequence[Pool],
        known: Mapping[HealthKey, Health],
        now: float,
        *,
        established: bool,
    ) -> None:
        wanted: dict[HealthKey, tuple[State, Pool]] = {}
        for pool in group:
            if pool.health_check is None and not pool.slow_start_seconds:
                continue
            for target in pool.targets:
                key = HealthKey.of(pool, target)
                # The pools of two scopes share their backends: one that either sends connections to is checked.
                if key not in wanted or wanted[key][0] not in ("active", "starting"):
                    wanted[key] = target.state, pool
        mine = self._of_service.get(service, set())
        self._drop(mine - wanted.keys())
        if wanted:
            self._of_service[service] = set(wanted)
        else:
            self._of_service.pop(service, None)
        for key, (state, pool) in wanted.items():
            rules = rules_of(pool)
            watch = self._watches.get(key)
            if watch is None:
                health = known.get(key)
                life = Life(rules, now, known=health, established=established and health is None)
                watch = self._watches[key] = _Watch(key, pool.health_check, life)
                watch.state = life.health(now).state
                watch.reported = health if health is not None or not established else life.health(now)
                life.document(state, now)
                self._put(watch, now)
            else:
                again = not watch.life.is_checked
                if watch.how != pool.health_check:
                    watch.how, again = pool.health_check, True
                if rules != watch.life.rules:
                    watch.life.follow(rules, now)
                watch.life.document(state, now)
                if again and not watch.running:
                    self._put(watch, now)
            self._look(watch, now)

    def _drop(self, keys: Iterable[HealthKey]) -> None:
        for key in keys:
            watch = self._watches.pop(key, None)
            if watch is not None:
                watch.ticket = -1
            self._changed.pop(key, None)
            if (tick := self._ticks.pop(key, None)) is not None:
                tick.cancel()

    # -- times

    def _put(self, watch: _Watch, at: float) -> None:
        """Plans a backend's next check, in place of the one that was planned."""
        if not watch.life.is_checked:
            watch.ticket = -1
            return
        self._tickets += 1
        watch.at, watch.ticket = at, self._tickets
        heappush(self._heap, (at, watch.ticket, watch))
        if len(self._heap) > 2 * len(self._watches) + 64:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].ticket]
            heapify(self._heap)

    def _arm(self) -> None:
        """Wakes up for the first check in the heap."""
        assert self._loop is not None
        while self._heap and self._heap[0][1] != self._heap[0][2].ticket:
            heappop(self._heap)
        if self._timer is not None:
            if self._heap and not self._timer.cancelled() and self._timer.when() == self._heap[0][0]:
                return
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._timer = self._loop.call_at(self._heap[0][0], self._due)

    def _due(self) -> None:
        self._timer = None
        now = self._now()
        # The loop's clock has a resolution: what is due within it is due.
        while self._heap and self._heap[0][0] <= now + 0.0005:
            _, ticket, watch = heappop(self._heap)
            if ticket != watch.ticket:
                continue
            watch.ticket = -1
            lane = watch.lane
            if self._running[lane] < self._limits[lane]:
                self._begin(watch, lane)
            else:
                self._counters.late[lane] += 1
                watch.running = True
                self._waiting[lane].append(watch)
        self._arm()

    def _begin(self, watch: _Watch, lane: Lane) -> None:
        assert self._loop is not None
        self._running[lane] += 1
        watch.running = True
        task = self._loop.create_task(self._check(watch, lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, watch: _Watch, lane: Lane) -> None:
        how, planned, begun = watch.how, watch.at, self._now()
        try:
            if how is not None and watch.life.is_checked and self._watches.get(watch.key) is watch:
                result = await check(how, watch.backend)
                if self._watches.get(watch.key) is watch:
                    self._found(watch, how, result, max(planned, begun - how.interval_seconds))
        finally:
            watch.running = False
            self._running[lane] -= 1
            waiting = self._waiting[lane]
            if waiting and self._stopping is not None and not self._stopping.is_set():
                self._begin(waiting.popleft(), lane)
        if self._watches.get(watch.key) is watch and watch.ticket == -1:
            self._put(watch, self._now())  # other settings came while it ran
        self._arm()

    def _found(self, watch: _Watch, how: HealthCheck, result: Result, started: float) -> None:
        now = self._now()
        self._counters.count(how.type, result)
        watch.last, watch.last_at = result, now
        if result.outcome == "passed":
            watch.life.passed(now)
        elif result.outcome == "failed":
            watch.life.failed(now)
        self._look(watch, now)
        if watch.how is not how:
            return
        if result.outcome == "undecided":
            wait = 0.0 if result.reason == "stalled" else how.interval_seconds
            self._put(watch, now + wait)
        else:
            self._put(watch, max(now, started + period(how, failing=watch.life.is_failing)))

    # -- reporting

    def _look(self, watch: _Watch, now: float) -> None:
        """Notes what changed of a backend, and when time alone will change it."""
        assert self._loop is not None
        health = watch.life.health(now)
        if health.state != watch.state:
            self._counters.transitions[watch.state, health.state] += 1
            log.info(
                "%s is %s",
                watch.key,
                health.state,
                extra={
                    "event": "backend",
                    "service": watch.key.service,
                    "backend": f"{watch.backend.host}:{watch.key.number}",
                    "state": health.state,
                    "before": watch.state,
                    "reason": watch.last.reason if watch.last else "",
                    "detail": watch.last.detail if watch.last else "",
                },
            )
            watch.state = health.state
        if health != watch.reported:
            watch.reported = health
            self._changed[watch.key] = health
            if not self._reporting:
                self._reporting = True
                self._loop.call_soon(self._flush_soon)
        if (tick := self._ticks.pop(watch.key, None)) is not None:
            tick.cancel()
        if (at := watch.life.next_change(now)) is not None:
            self._ticks[watch.key] = self._loop.call_at(at, self._tick, watch)

    def _tick(self, watch: _Watch) -> None:
        if self._watches.get(watch.key) is watch:
            self._look(watch, self._now())

    def _flush_soon(self) -> None:
        self._reporting = False
        self._flush()

    def _flush(self) -> None:
        """Hands over all that changed, once the last report is carried out."""
        if self._reporting or not self._changed:
            return
        assert self._loop is not None
        changed, self._changed = self._changed, {}
        self._reporting = True
        self._counters.reports += 1
        try:
            carried_out = self._report(changed)
        except Exception as error:
            self._again(changed, error)
            return
        if carried_out is None:
            self._reporting = False
            return
        loop = self._loop

        def done(future: Future[object]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._carried_out, changed, future)

        carried_out.add_done_callback(done)

    def _carried_out(self, changed: dict[HealthKey, Health], future: Future[object]) -> None:
        error: BaseException | None = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self._again(changed, error)
            return
        self._reporting = False
        self._flush()

    def _again(self, changed: dict[HealthKey, Health], error: BaseException) -> None:
        assert self._loop is not None
        log.error(
            "health changes could not be carried out: %s",
            error,
            extra={"event": "report", "backends": len(changed)},
        )
        self._changed = {
            key: health for key, health in changed.items() if key in self._watches
        } | self._changed
        self._loop.call_later(RETRY_SECONDS, self._flush_soon)


def period(how: HealthCheck, *, failing: bool) -> float:
    """Seconds from the start of a check to the start of the next.

    Args:
        failing: Whether the backend is up and its last check failed: then the next comes sooner, so that timeouts do not add up.
    """
    wait = how.interval_seconds
    if failing and how.fall > 1:
        wait = max(wait - how.timeout_seconds / (how.fall - 1), wait / 10)
    return wait * (1 - random.random() * how.jitter_percent / 100)


def _standing(watch: _Watch, now: float) -> Standing:
    age = now - watch.last_at if watch.last else None
    return Standing(watch.life.health(now), watch.last, age)
