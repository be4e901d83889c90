"""Who is checked when: real servers on loopback, the supervisor's own thread, and no clock but the machine's.

Bounds are generous, since the machine is shared; what they would not tell apart is counted instead.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookline.agent.health import HealthSupervisor
from hookline.agent.health.supervisor import Lane, period
from hookline.control.health import ACTIVE, DOWN, UNCHECKED, Health, HealthKey, Life, Rules
from hookline.control.pools import Frontend, Pool, State, Target
from hookline.model import HealthCheck

LOOPBACK = ("127.0.0.1", "::1")
PATIENCE_S = 20.0


def how(kind: str = "tcp", **fields: Any) -> HealthCheck:
    quick = {"intervalSeconds": 0.1, "timeoutSeconds": 0.05, "jitterPercent": 0, "rise": 2, "fall": 3}
    return HealthCheck.model_validate({"type": kind, **quick, **fields})


def pool(
    *backends: tuple[str, int],
    service: str = "VirtualService/default/a",
    check: HealthCheck | None = None,
    **more: Any,
) -> Pool:
    version: Literal[4, 6] = 6 if ":" in backends[0][0] else 4
    frontend = Frontend(ip_address("2001:db8::1" if version == 6 else "192.0.2.1"), 80, "TCP")
    targets = tuple(Target(ip_address(address), port, 100, f"{address}:{port}") for address, port in backends)
    return Pool(
        service, "80", version, "TCP", (frontend,), targets, "nat", "maglev", 1021, health_check=check, **more
    )


def key(of: Pool, index: int = 0) -> HealthKey:
    return HealthKey.of(of, of.targets[index])


class Server:
    """A TCP server that can be taken away and brought back, or that no longer accepts."""

    def __init__(self, address: str) -> None:
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.handle: socket.socket | None = None
        self.address = (address, 0)
        self.accepted = 0
        self._filling: list[socket.socket] = []
        self.up()

    def up(self) -> None:
        self.handle = socket.create_server(self.address, family=self.family, backlog=128)
        self.address = self.handle.getsockname()[:2]
        threading.Thread(target=self._serve, args=(self.handle,), daemon=True).start()

    def _serve(self, handle: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = handle.accept()
                self.accepted += 1
                connection.close()

    def down(self) -> None:
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.shutdown(socket.SHUT_RDWR)
            self.handle.close()
            self.handle = None

    def close(self) -> None:
        self.down()
        for handle in self._filling:
            handle.close()


@pytest.fixture
def server() -> Iterator[Callable[[str], Server]]:
    made: list[Server] = []

    def make(address: str = "127.0.0.1") -> Server:
        made.append(Server(address))
        return made[-1]

    yield make
    for one in made:
        one.close()


@contextlib.contextmanager
def silent(address: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """An address and port that answers nothing: the kernel drops what a full backlog has no room for."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 0), family=family, backlog=0) as listener,
        contextlib.ExitStack() as held,
    ):
        for _ in range(4):
            handle = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            handle.setblocking(False)
            handle.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield listener.getsockname()[:2]


class Said:
    """What a supervisor reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, dict[HealthKey, Health]]] = []
        self.now: dict[HealthKey, Health] = {}
        self._changed = threading.Condition()

    def __call__(self, changes: Mapping[HealthKey, Health]) -> None:
        with self._changed:
            self.reports.append((time.monotonic(), dict(changes)))
            self.now.update(changes)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> float:
        with self._changed:
            assert self._changed.wait_for(condition, seconds), self.now
            return time.monotonic()

    def of(self, which: HealthKey) -> list[Health]:
        return [changes[which] for _, changes in self.reports if which in changes]


@pytest.fixture
def said() -> Said:
    return Said()


@contextlib.contextmanager
def supervised(
    said: Callable[[Mapping[HealthKey, Health]], Any],
    pools: Sequence[Pool] = (),
    known: Mapping[HealthKey, Health] | None = None,
    lanes: Mapping[Lane, int] | None = None,
) -> Iterator[HealthSupervisor]:
    supervisor = HealthSupervisor(said, lanes=lanes)
    supervisor.start(by_service(*pools), known)
    try:
        yield supervisor
    finally:
        supervisor.stop()
        assert not [thread for thread in threading.enumerate() if thread.name == "health"]


def by_service(*pools: Pool) -> dict[str, tuple[Pool, ...]]:
    found: dict[str, tuple[Pool, ...]] = {}
    for one in pools:
        found[one.service] = (*found.get(one.service, ()), one)
    return found


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_dead_backend_is_found_after_fall_checks_and_comes_back(
    address: str, server: Callable[[str], Server], said: Said
) -> None:
    one, other = server(address), server(address)
    mine = pool(one.address, other.address, check=how())
    dead, alive = key(mine, 0), key(mine, 1)
    with supervised(said, [mine]) as supervisor:
        time.sleep(0.35)
        assert said.reports == [], "who took connections before is well until checks say otherwise"
        assert one.accepted >= 2
        one.down()
        began = time.monotonic()
        found = said.wait(lambda: said.now.get(dead) == DOWN)
        # fall × interval + 100 ms, and what a shared machine may add
        assert found - began < 3 * 0.1 + 0.1 + 1.0
        failures = supervisor.counters().results["tcp", "failed", "refused"]
        assert 3 <= failures <= 4 + (found - began) / 0.1
        one.up()
        said.wait(lambda: said.now.get(dead) == ACTIVE)
        assert said.of(alive) == []
        counters = supervisor.counters()
        assert counters.transitions[("active", "down")] == counters.transitions[("down", "active")] == 1
        checks = sum(count for (kind, _, _), count in counters.results.items() if kind == "tcp")
        assert sum(counters.durations["tcp"]) == checks
        assert 0 < counters.seconds["tcp"] < checks
        standing = supervisor.standings()[dead]
        assert (standing.health, standing.last and standing.last.outcome) == (ACTIVE, "passed")
        assert standing.age_seconds is not None


@given(
    fall=st.integers(2, 10),
    interval=st.floats(0.05, 60),
    part=st.floats(0.01, 1),
    jitter=st.integers(0, 50),
)
def test_timeouts_do_not_add_up(fall: int, interval: float, part: float, jitter: int) -> None:
    """A backend that goes silent right after a check has passed: every check takes its whole timeout."""
    timeout = interval * (fall - 1) / fall * part
    check = how(intervalSeconds=interval, timeoutSeconds=max(timeout, 0.01), jitterPercent=jitter, fall=fall)
    life = Life(Rules(fall=fall), 0, established=True)
    start = period(check, failing=False)
    while True:
        end = start + check.timeout_seconds
        life.failed(end)
        if life.health(end) == DOWN:
            break
        start = max(end, start + period(check, failing=life.is_failing))
    assert end <= fall * interval + 0.011 * fall


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_silent_backend_is_found_in_time(address: str, server: Callable[[str], Server], said: Said) -> None:
    """Its machine is dead: nothing refuses, every check takes its whole timeout."""
    good = server(address)
    with silent(address) as nobody:
        mine = pool(nobody, good.address, check=how(intervalSeconds=0.3, timeoutSeconds=0.2, fall=3))
        began = time.monotonic()
        with supervised(said, [mine]) as supervisor:
            found = said.wait(lambda: said.now.get(key(mine)) == DOWN)
            # The first check is at once, so one interval less; a stall of this machine decides nothing and is made up for.
            assert found - began < 3 * 0.3 + 0.1 + 1.0
            assert supervisor.counters().results["tcp", "failed", "timeout"] == 3


def test_a_new_backend_is_checked_at_once_and_one_check_decides(
    server: Callable[[str], Server], said: Said
) -> None:
    good, bad = server("127.0.0.1"), server("127.0.0.1")
    bad.down()
    slow = how(intervalSeconds=60, timeoutSeconds=30, rise=3, fall=3)
    with supervised(said) as supervisor:
        mine = pool(good.address, bad.address, check=slow)
        supervisor.update(by_service(mine))
        said.wait(lambda: said.now == {key(mine, 0): ACTIVE, key(mine, 1): DOWN}, 5)
        assert UNCHECKED not in said.of(key(mine))[1:]
        assert supervisor.states() == {"active": 1, "down": 1}


def test_what_was_known_is_kept_and_said_again_only_when_it_changes(
    server: Callable[[str], Server], said: Said
) -> None:
    up, down = server("127.0.0.1"), server("127.0.0.1")
    down.down()
    mine = pool(up.address, down.address, check=how())
    with supervised(said, [mine], {key(mine, 1): DOWN}):
        time.sleep(0.4)
        assert said.reports == []
    with supervised(said, [mine], {key(mine, 0): DOWN, key(mine, 1): DOWN}):
        said.wait(lambda: said.now.get(key(mine, 0)) == ACTIVE)
        assert key(mine, 1) not in said.now


def test_documents_come_and_go(server: Callable[[str], Server], said: Said) -> None:
    one, other = server("127.0.0.1"), server("127.0.0.1")
    a = pool(one.address, check=how())
    b = pool(other.address, service="VirtualService/default/b", check=how())
    with supervised(said, [a, b]) as supervisor:
        assert set(supervisor.standings()) == {key(a), key(b)}
        supervisor.update(by_service(a))
        assert set(supervisor.standings([key(a), key(b)])) == {key(a)}
        time.sleep(0.2)
        other.accepted = 0
        # draining: nobody checks; what comes back is checked first
        drained = replace(a, targets=(replace(a.targets[0], state="draining"),))
        supervisor.update(by_service(drained))
        time.sleep(0.2)
        one.accepted = 0
        time.sleep(0.4)
        assert (one.accepted, other.accepted) == (0, 0)
        one.down()
        supervisor.update(by_service(a))
        said.wait(lambda: said.now.get(key(a)) == DOWN)
        # nobody checks it any longer: it is as the documents have it
        supervisor.update(by_service(replace(a, health_check=None, slow_start_seconds=0.01)))
        said.wait(lambda: said.now.get(key(a)) == ACTIVE)
        supervisor.update({})
        assert supervisor.standings() == {}


def test_other_settings_hold_at_once(server: Callable[[str], Server], said: Said) -> None:
    one = server("127.0.0.1")
    mine = pool(one.address, check=how(intervalSeconds=3600, timeoutSeconds=1, fall=1))
    with supervised(said, [mine]) as supervisor:
        time.sleep(0.3)
        assert one.accepted == 1
        one.down()
        supervisor.update(by_service(replace(mine, health_check=how(fall=1))))
        said.wait(lambda: said.now.get(key(mine)) == DOWN, 5)


def test_slow_start_is_reported_as_it_grows(server: Callable[[str], Server], said: Said) -> None:
    one = server("127.0.0.1")
    mine = pool(one.address, check=how(), slow_start_seconds=2)
    with supervised(said, [mine], {key(mine): UNCHECKED}):
        began = said.wait(lambda: said.now.get(key(mine), UNCHECKED).share > 0)
        ended = said.wait(lambda: said.now.get(key(mine)) == ACTIVE)
    shares = [health.share for health in said.of(key(mine))]
    assert shares == sorted(set(shares))
    assert len(shares) >= 8
    assert ended - began > 1.5


@pytest.mark.parametrize("hanging", [3, 40])
def test_checks_that_hang_hold_up_no_others(
    hanging: int, server: Callable[[str], Server], said: Said
) -> None:
    """With four and two places: more that hang than there are places for."""
    good = [server("127.0.0.1") for _ in range(4)]
    with silent() as nobody:
        stuck = [
            pool(
                nobody, service=f"VirtualService/default/h{n}", check=how(intervalSeconds=1, timeoutSeconds=1)
            )
            for n in range(hanging)
        ]
        lively = pool(*(one.address for one in good), check=how())
        with supervised(said, [*stuck, lively], lanes={"usual": 4, "slow": 2}) as supervisor:
            # The first round of those that hang is over: from here on they have places of their own.
            deadline = time.monotonic() + PATIENCE_S + hanging
            while not all(one.last for one in supervisor.standings(map(key, stuck)).values()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for one in good:
                one.accepted = 0
            time.sleep(2)
            counts = [one.accepted for one in good]
            late = supervisor.counters().late
    assert min(counts) >= 8, "20 each, were this machine ours alone"
    assert (late["slow"] > 0) == (hanging > 2)
    assert not any(changes.get(key(lively, n)) for _, changes in said.reports for n in range(4))


def test_commands_that_hang_hold_up_no_others(server: Callable[[str], Server], said: Said) -> None:
    good = server("127.0.0.1")
    sleeps = how("command", command=["/bin/sleep", "60"], intervalSeconds=1, timeoutSeconds=1)
    stuck = pool(*(("127.0.0.1", n) for n in range(1, 9)), service="VirtualService/default/h", check=sleeps)
    lively = pool(good.address, check=how())
    with supervised(said, [stuck, lively], lanes={"command": 2}) as supervisor:
        time.sleep(2.5)
        counters = supervisor.counters()
        assert counters.late["command"] > 0
        assert good.accepted >= 8
        assert 2 <= counters.results["command", "failed", "timeout"] <= 6


def test_a_backend_that_flaps_each_100_ms_changes_ever_more_rarely(
    server: Callable[[str], Server], said: Said
) -> None:
    one = server("127.0.0.1")
    mine = pool(one.address, check=how(intervalSeconds=0.05, timeoutSeconds=0.05, rise=1, fall=1))
    with supervised(said, [mine]):
        for _ in range(30):
            one.down()
            time.sleep(0.1)
            one.up()
            time.sleep(0.1)
        flaps = len(said.of(key(mine)))
        assert 1 <= flaps <= 10, "60 changes of the server"
        # It comes back for good all the same.
        said.wait(lambda: said.now[key(mine)] == ACTIVE)


def test_reports_wait_for_the_last_one_and_come_together(server: Callable[[str], Server]) -> None:
    servers = [server("127.0.0.1") for _ in range(6)]
    mine = pool(*(one.address for one in servers), check=how(fall=1))
    calls: list[tuple[dict[HealthKey, Health], Future[object]]] = []

    def report(changes: Mapping[HealthKey, Health]) -> Future[object]:
        calls.append((dict(changes), Future()))
        return calls[-1][1]

    with supervised(report, [mine]):
        time.sleep(0.2)
        servers[0].down()
        _until(lambda: len(calls) == 1)
        for one in servers[1:]:
            one.down()
            time.sleep(0.15)
        assert len(calls) == 1
        calls[0][1].set_result(None)
        _until(lambda: len(calls) == 2)
        assert set(calls[1][0]) == {key(mine, n) for n in range(1, 6)}
        # what could not be carried out is reported again, with what came since
        servers[0].up()
        time.sleep(0.4)
        calls[1][1].set_exception(OSError("the kernel is out of sorts"))
        _until(lambda: len(calls) == 3)
        assert set(calls[2][0]) == {key(mine, n) for n in range(6)}
        assert calls[2][0][key(mine, 0)] == ACTIVE
        calls[2][1].set_result(None)


def test_a_report_that_raises_comes_again(server: Callable[[str], Server], said: Said) -> None:
    one = server("127.0.0.1")
    mine = pool(one.address, check=how(fall=1))
    tries = itertools.count()

    def report(changes: Mapping[HealthKey, Health]) -> None:
        if next(tries) == 0:
            raise OSError("the kernel is out of sorts")
        said(changes)

    with supervised(report, [mine]):
        time.sleep(0.1)
        one.down()
        said.wait(lambda: said.now.get(key(mine)) == DOWN)
        assert next(tries) == 2


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_backends_cost_little() -> None:
    """Two thousand, each checked once an hour: no task and no timer of its own while it waits."""
    import tracemalloc

    check = how(intervalSeconds=3600, timeoutSeconds=0.2, fall=100)
    pools = [
        pool(
            *((f"127.{n >> 8}.{n & 255}.{i + 1}", 9) for i in range(10)),
            service=f"VirtualService/default/s{n}",
            check=check,
        )
        for n in range(200)
    ]
    tracemalloc.start()
    try:
        with supervised(lambda changes: None, pools) as supervisor:
            _until(lambda: sum(supervisor.counters().results.values()) >= 2000)
            used, _ = tracemalloc.get_traced_memory()
            supervisor.update(by_service(*pools))
            assert len(supervisor.standings()) == 2000
    finally:
        tracemalloc.stop()
    assert used / 2000 < 3000, "bytes for each"


def test_it_can_be_stopped_at_any_time(server: Callable[[str], Server], said: Said) -> None:
    with silent() as nobody:
        mine = pool(nobody, check=how(intervalSeconds=60, timeoutSeconds=60))
        supervisor = HealthSupervisor(said)
        with pytest.raises(RuntimeError, match="not started"):
            supervisor.update({})
        supervisor.stop()
        supervisor.start(by_service(mine))
        with pytest.raises(RuntimeError, match="twice"):
            supervisor.start()
        time.sleep(0.2)
        began = time.monotonic()
        supervisor.stop()
        supervisor.stop()
        assert time.monotonic() - began < 3


def test_states_are_named_as_pools_name_them() -> None:
    states: tuple[State, ...] = ("starting", "active", "draining", "down")
    assert {ACTIVE.state, DOWN.state, UNCHECKED.state} < set(states)
