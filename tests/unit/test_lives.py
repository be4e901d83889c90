"""What a node remembers of backends beyond the documents, change by change; and that none of it reads a clock that can be set."""

from __future__ import annotations

import ast
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookline.control.health import ACTIVE, DOWN, UNCHECKED, Health, HealthKey
from hookline.control.lives import Lives
from hookline.control.pools import Frontend, Pool, State, Target
from hookline.model import HealthCheck

SOURCE = Path(__file__).parents[2] / "src" / "hookline"
SERVICE = "VirtualService/default/a"
CHECK = HealthCheck(type="tcp")


def target(number: int, state: State = "active", weight: int = 100) -> Target:
    return Target(ip_address(f"10.0.0.{number}"), 80, weight, f"p{number}", state)


def pool(*targets: Target, **more: Any) -> Pool:
    frontend = Frontend(ip_address("192.0.2.1"), 80, "TCP")
    return Pool(SERVICE, "http", 4, "TCP", (frontend,), targets, "nat", "maglev", 1021, **more)


def after(
    lives: Lives, before: Pool | None, now: float, then: Pool | None, *, watched: bool = False
) -> Lives:
    old = {SERVICE: (before,)} if before else {}
    new = {SERVICE: (then,)} if then else {}
    found, concerned = lives.followed(old, new, now, watched=watched)
    assert concerned == {SERVICE}
    return found


def states(lives: Lives, documents: Pool, now: float) -> dict[str, State]:
    (found,) = lives.living(SERVICE, (documents,), now)
    return {one.name: one.state for one in found.targets}


def test_who_is_removed_drains_and_goes() -> None:
    both, one = pool(target(1), target(2), drain_seconds=10), pool(target(1), drain_seconds=10)
    lives = after(Lives(), both, 100, one)
    assert states(lives, one, 105) == {"p1": "active", "p2": "draining"}
    assert lives.next_deadline(105) == 5
    assert (lives.past(109.9), lives.past(110)) == (set(), {SERVICE})
    assert states(lives, one, 110) == {"p1": "active"}
    assert lives.expired(110) == Lives()
    assert lives.drained(110) == frozenset(), "its row goes, which ends its sockets"
    # another change meanwhile keeps the deadline
    again = after(lives, one, 105, replace(one, affinity_seconds=5))
    assert again.next_deadline(105) == 5
    # who is back is back; who has no time to drain is gone
    assert after(lives, one, 105, both).leaving == {}
    assert after(Lives(), pool(target(1), target(2)), 0, pool(target(1))).leaving == {}
    assert after(lives, one, 105, replace(one, drain_seconds=0)).leaving == {}
    assert after(lives, one, 105, None) == Lives()


def test_who_is_named_still_goes_down_at_its_deadline_and_keeps_it() -> None:
    both = pool(target(1), target(2), drain_seconds=10)
    resting = pool(target(1), target(2, "draining"), drain_seconds=10)
    lives = after(Lives(), both, 100, resting)
    assert states(lives, resting, 105) == {"p1": "active", "p2": "draining"}
    assert states(lives, resting, 110) == {"p1": "active", "p2": "down"}
    assert {number for _, _, number in lives.drained(110)} == {80}
    assert lives.expired(110) == lives
    assert lives.next_deadline(110) is None
    # removed in the middle: the deadline is the same; removed after it: it is gone at once
    removed = pool(target(1), drain_seconds=10)
    assert after(lives, resting, 105, removed).next_deadline(105) == 5
    assert after(lives, resting, 111, removed).leaving == {}
    # back in use, and resting again: a new deadline
    back = after(lives, resting, 112, both)
    assert back.leaving == {}
    assert after(back, both, 113, resting).next_deadline(113) == 10


def test_health_is_forgotten_with_its_backend_or_its_check() -> None:
    both = pool(target(1), target(2), health_check=CHECK)
    keys = [HealthKey.of(both, one) for one in both.targets]
    lives = Lives().observed({keys[0]: DOWN, keys[1]: Health("starting", 45)})
    assert states(lives, both, 0) == {"p1": "down", "p2": "starting"}
    one = pool(target(1), health_check=CHECK)
    assert dict(after(lives, both, 0, one).health[SERVICE]) == {keys[0]: DOWN}
    assert after(lives, both, 0, replace(both, health_check=None)).health == {}
    assert lives.observed(dict.fromkeys(keys, ACTIVE)) == Lives()


@pytest.mark.parametrize("watched", [True, False])
def test_who_begins_to_take_connections_is_checked_first(watched: bool) -> None:
    one = pool(target(1), health_check=CHECK)
    both = pool(target(1), target(2), health_check=CHECK)
    key = HealthKey.of(both, target(2))
    lives = after(Lives(), one, 0, both, watched=watched)
    assert dict(lives.health.get(SERVICE, {})) == ({key: UNCHECKED} if watched else {})
    rested = pool(target(1), target(2, "draining"), health_check=CHECK)
    lives = after(Lives(), rested, 0, both, watched=watched)
    assert dict(lives.health.get(SERVICE, {})) == ({key: UNCHECKED} if watched else {})
    slow = pool(target(1), target(2), slow_start_seconds=10)
    lives = after(Lives(), pool(target(1), slow_start_seconds=10), 0, slow, watched=watched)
    assert dict(lives.health.get(SERVICE, {})) == ({key: Health("starting", 9)} if watched else {})


@given(
    steps=st.lists(
        st.tuples(st.sets(st.integers(1, 4)), st.sets(st.integers(1, 4)), st.floats(0, 20)), max_size=12
    ),
    drain=st.sampled_from([0.0, 10.0]),
)
def test_any_sequence_of_documents(steps: list[tuple[set[int], set[int], float]], drain: float) -> None:
    """Who is named and not resting takes connections; who is not named never does, and is gone once it has drained."""
    lives, before, now = Lives(), None, 0.0
    left: dict[int, float] = {}
    for named, resting, wait in steps:
        now += wait
        then = pool(
            *(target(n, "draining" if n in resting else "active") for n in sorted(named)), drain_seconds=drain
        )
        lives = after(lives, before, now, then).expired(now)
        was: set[int] = {int(one.name[1:]) for one in before.targets} if before else set()
        for n in was - named:
            left.setdefault(n, now)
        for n in named:
            left.pop(n, None)
        found = states(lives, then, now)
        assert {n for n in named if found[f"p{n}"] == "active"} == named - resting
        for name, state in found.items():
            n = int(name[1:])
            if n not in named:
                assert state == "draining"
                assert now <= left[n] + drain
        assert (lives.next_deadline(now) is not None) <= (drain > 0)
        before = then


@pytest.mark.parametrize(
    "path",
    [
        *(SOURCE / "agent" / "health").glob("*.py"),
        *(SOURCE / "control" / name for name in ("health.py", "lives.py")),
    ],
    ids=lambda path: path.name,
)
def test_a_clock_step_changes_nothing_since_nobody_reads_that_clock(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("time.time", "time.time_ns", "time.localtime", "time.CLOCK_REALTIME")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert "datetime" not in names


def test_a_pool_that_is_called_otherwise_keeps_its_backends_lives() -> None:
    """A port's name and the reach are in the pool's key; its drains and its health are the backends' all the same."""
    both = pool(target(1), target(2), drain_seconds=10, health_check=CHECK)
    every: tuple[dict[str, Any], ...] = (
        {"port": "web"},
        {"reach": "local"},
        {"port": "web", "reach": "local"},
    )
    for changes in every:
        renamed = replace(both, **changes)
        assert renamed.key != both.key
        keys = [HealthKey.of(renamed, one) for one in renamed.targets]
        # Whoever stays neither drains nor begins anew, and who is known to be down is down.
        known = Lives().observed({HealthKey.of(both, target(2)): DOWN})
        lives = after(known, both, 0, renamed, watched=True)
        assert dict(lives.health[SERVICE]) == {keys[1]: DOWN}
        assert lives.leaving == {}
        assert after(Lives(), both, 0, renamed, watched=True) == Lives()
        # Who leaves with the old name drains under the new one, and who drained goes on until its deadline.
        fewer = replace(pool(target(1), drain_seconds=10), **changes)
        assert states(after(Lives(), both, 0, fewer), fewer, 5) == {"p1": "active", "p2": "draining"}
        one = pool(target(1), drain_seconds=10)
        lives = after(after(Lives(), both, 0, one), one, 4, fewer)
        assert states(lives, fewer, 5) == {"p1": "active", "p2": "draining"}
        assert lives.next_deadline(5) == 5
    # A pool of other addresses, another protocol or that is there beside is no other's successor.
    elsewhere = replace(
        both, port="web", targets=(target(1),), frontends=(Frontend(ip_address("192.0.2.9"), 80, "TCP"),)
    )
    assert after(Lives(), both, 0, elsewhere).leaving == {}
