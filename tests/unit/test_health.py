"""The life of a backend: the table of states row by row, and what no sequence of events may do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from ipaddress import ip_address
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookline.control.health import (
    ACTIVE,
    DAMPING_MOST,
    DAMPING_SECONDS,
    DOWN,
    DRAINING,
    UNCHECKED,
    Health,
    HealthKey,
    Life,
    Rules,
    living,
    settle,
)
from hookline.control.pools import Frontend, Pool, State, Target

STATES: tuple[State, ...] = get_args(State)
HALF = Health("starting", 50)


def expected(documents: State, health: Health | None, past: bool) -> Health:
    """The table of docs/health.md, written once more, the other way round."""
    if documents == "down":
        return DOWN
    if documents == "draining":
        return DOWN if past else DRAINING
    if health in (None, ACTIVE, DRAINING):
        return ACTIVE if documents == "active" or health == ACTIVE else Health(documents)
    assert health is not None
    return health


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("health", [None, ACTIVE, DOWN, DRAINING, UNCHECKED, HALF])
@pytest.mark.parametrize("documents", STATES)
def test_the_table_of_states(documents: State, health: Health | None, past: bool) -> None:
    assert settle(documents, health, past_deadline=past) == expected(documents, health, past)


def test_only_starting_and_active_can_take_connections() -> None:
    for documents, health, past in itertools.product(STATES, (None, ACTIVE, DOWN, HALF), (False, True)):
        found = settle(documents, health, past_deadline=past)
        target = Target(ip_address("10.0.0.1"), 80, 100, "a", found.state, found.share)
        takes = documents in ("active", "starting") and health != DOWN
        assert bool(target.effective_weight) == takes


# -- checks


def run(life: Life, results: str, *, at: float = 0.0, interval: float = 1.0) -> list[Health]:
    """What is said after each result: + passes, - fails."""
    said = []
    for number, result in enumerate(results):
        now = at + number * interval
        (life.passed if result == "+" else life.failed)(now)
        said.append(life.health(now))
    return said


def test_the_first_check_decides() -> None:
    assert Life(Rules(rise=3, fall=3), 0).health(0) == UNCHECKED
    assert run(Life(Rules(rise=3, fall=3), 0), "+") == [ACTIVE]
    assert run(Life(Rules(rise=3, fall=3), 0), "-") == [DOWN]


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ("--+", "UUU"),
        ("---", "UUD"),
        ("--+--", "UUUUU"),
        ("---+", "UUDD"),
        ("---++", "UUDDU"),
        ("---+-+-+", "UUDDDDDD"),
        ("---++---", "UUDDUUUD"),
    ],
)
def test_rise_and_fall_are_consecutive(results: str, said: str) -> None:
    life = Life(Rules(rise=2, fall=3), 0, established=True)
    assert run(life, results) == [ACTIVE if letter == "U" else DOWN for letter in said]


@given(
    rise=st.integers(1, 5),
    fall=st.integers(1, 5),
    results=st.text("+-", max_size=60),
    interval=st.floats(0.05, 30),
)
def test_no_sequence_shorter_than_fall_or_rise_changes_anything(
    rise: int, fall: int, results: str, interval: float
) -> None:
    life = Life(Rules(rise=rise, fall=fall), 0, established=True)
    streak, last, up = 0, "", True
    for number, result in enumerate(results):
        streak = streak + 1 if result == last else 1
        last = result
        (said,) = run(life, result, at=number * interval)
        if up and said == DOWN:
            assert result == "-"
            assert streak >= fall
        if not up and said == ACTIVE:
            assert result == "+"
            assert streak >= rise
        if result == "-" and streak >= fall:
            assert said == DOWN, "falls are never put off"
        if result == "+" and streak >= rise << DAMPING_MOST:
            assert said == ACTIVE, "damping has an end"
        up = said != DOWN


def test_a_backend_that_flaps_comes_back_ever_more_rarely() -> None:
    """Up and down by turns every 100 ms, for a minute: without damping 300 changes either way."""
    interval, rules = 0.1, Rules(rise=1, fall=1)
    life = Life(rules, 0, established=True)
    said = run(life, "-+" * 300, interval=interval)
    changes = sum(one != other for one, other in itertools.pairwise(said))
    assert changes <= 3, "never two passes in a row"
    # The worst flapper: exactly as many passes as it needs, then a failure.
    life, changes, now = Life(rules, 0, established=True), 0, 0.0
    while now < DAMPING_SECONDS:
        before = life.health(now)
        (life.failed if before == ACTIVE else life.passed)(now)
        changes += life.health(now) != before
        now += interval
    assert 10 < changes <= 2 * (DAMPING_MOST + 1 + DAMPING_SECONDS / (interval * 2**DAMPING_MOST)) + 2


def test_damping_is_forgotten_after_a_quiet_minute() -> None:
    life = Life(Rules(), 0, established=True)
    run(life, "-+-++-")
    assert life.passes_needed(6) == 4
    assert life.passes_needed(6 + DAMPING_SECONDS) == 1


# -- documents

EVENTS = st.lists(
    st.tuples(st.sampled_from("+-ad"), st.floats(0.01, 20)),
    max_size=40,
)


@given(events=EVENTS, slow=st.sampled_from([0.0, 3.0]), checked=st.booleans())
def test_draining_ends_by_documents_alone(
    events: list[tuple[str, float]], slow: float, checked: bool
) -> None:
    life = Life(Rules(checked, 2, 2, slow), 0)
    now, documents = 0.0, "active"
    states: dict[str, State] = {"a": "active", "d": "draining"}
    for event, wait in events:
        now += wait
        if event in states:
            documents = states[event]
            life.document(states[event], now)
        elif event == "+":
            life.passed(now)
        else:
            life.failed(now)
        said = life.health(now)
        state = settle(states["d" if documents == "draining" else "a"], said)
        assert (state.state == "draining") == (documents == "draining")
        assert life.is_checked == (checked and documents == "active")
        assert (state.state == "starting") <= (said.share < 100)
        change = life.next_change(now)
        assert change is None or change > now - 1e-6


def test_who_comes_back_from_a_drain_is_checked_first() -> None:
    life = Life(Rules(rise=3, fall=3), 0, established=True)
    life.document("draining", 1)
    life.document("active", 2)
    assert life.health(2) == UNCHECKED
    life.passed(2.1)
    assert life.health(2.1) == ACTIVE


# -- slow start


def test_slow_start_grows_by_steps_and_ends() -> None:
    life = Life(Rules(slow_start_seconds=10), 100)
    assert life.health(100) == UNCHECKED
    life.passed(101)
    now, shares = 101.0, []
    while (change := life.next_change(now)) is not None:
        health = life.health(now)
        assert health.state == "starting"
        shares.append(health.share)
        assert life.health(change - 0.01) == health
        now = change
    assert life.health(now) == ACTIVE
    assert now == pytest.approx(111)
    assert shares == sorted(set(shares))
    assert len(shares) == 10
    assert 0 < shares[0] < 15
    assert shares[-1] < 100


def test_slow_start_without_checks_begins_at_once_and_a_short_one_has_few_steps() -> None:
    life = Life(Rules(checked=False, slow_start_seconds=0.5), 0)
    assert life.health(0).state == "starting"
    now, steps = 0.0, 0
    while (change := life.next_change(now)) is not None:
        now, steps = change, steps + 1
    assert steps == 2
    assert now == pytest.approx(0.5)


def test_a_failure_ends_a_slow_start_and_a_return_begins_another() -> None:
    life = Life(Rules(slow_start_seconds=10), 0)
    life.passed(0)
    life.failed(5)
    assert (life.health(5), life.next_change(5)) == (DOWN, None)
    life.passed(6)
    assert life.health(6) == Health("starting", 9)


@pytest.mark.parametrize("share", [9, 18, 45, 81, 90])
def test_a_process_that_follows_goes_on_where_the_last_one_was(share: int) -> None:
    known = Health("starting", share)
    life = Life(Rules(slow_start_seconds=10), 0, known=known)
    assert life.health(0) == known
    assert life.health(10 - share / 10 + 0.01) == ACTIVE
    assert Life(Rules(), 0, known=known).health(0) == ACTIVE


def test_what_was_known_stays_known() -> None:
    for known in (ACTIVE, DOWN, UNCHECKED):
        assert Life(Rules(rise=2, fall=2, slow_start_seconds=5), 0, known=known).health(0) == known
    down = Life(Rules(rise=2, fall=2), 0, known=DOWN)
    assert run(down, "++") == [DOWN, ACTIVE]
    assert Life(Rules(checked=False), 0, known=DOWN).health(0) == ACTIVE
    assert Life(Rules(checked=False), 0, known=UNCHECKED).health(0) == ACTIVE


def test_other_rules() -> None:
    life = Life(Rules(fall=1), 0, established=True)
    life.failed(0)
    life.follow(Rules(checked=False), 1)
    assert life.health(1) == ACTIVE, "what nobody checks any more is not down"
    life.follow(Rules(checked=True), 2)
    assert life.health(2) == ACTIVE
    growing = Life(Rules(checked=False, slow_start_seconds=10), 0)
    growing.follow(Rules(checked=False, slow_start_seconds=100), 5)
    assert growing.health(5) == Health("starting", 54)
    growing.follow(Rules(checked=False), 6)
    assert growing.health(6) == ACTIVE


# -- pools


def pool(*targets: Target, algorithm: Literal["maglev", "modulo"] = "maglev") -> Pool:
    frontend = Frontend(ip_address("192.0.2.1"), 80, "TCP")
    return Pool("Service/default/a", "http", 4, "TCP", (frontend,), targets, "nat", algorithm, 1021)


def target(number: int, state: State = "active", weight: int = 100) -> Target:
    return Target(ip_address(f"10.0.0.{number}"), 80, weight, f"p{number}", state)


def said(of: Pool, **health: Health) -> dict[HealthKey, Health]:
    return {HealthKey.of(of, one): health[one.name] for one in of.targets if one.name in health}


def states(of: Pool) -> dict[str, tuple[State, int]]:
    return {one.name: (one.state, one.effective_weight) for one in of.targets}


def test_a_pool_as_its_backends_lives_make_it() -> None:
    plain = pool(target(1), target(2), target(3), target(4, "draining"))
    assert living(plain, {}) is plain
    lived = living(plain, said(plain, p1=DOWN, p2=HALF, p3=ACTIVE, p4=ACTIVE))
    assert states(lived) == {
        "p1": ("down", 0),
        "p2": ("starting", 50),
        "p3": ("active", 100),
        "p4": ("draining", 0),
    }
    assert (lived.key, lived.table_size) == (plain.key, plain.table_size)
    assert living(plain, said(plain, p1=ACTIVE)) is plain


@pytest.mark.parametrize("last", [DOWN, UNCHECKED])
def test_all_down(last: Health) -> None:
    plain = pool(target(1), target(2), target(3, "draining"), target(4, "down"))
    health = said(plain, p1=DOWN, p2=last)
    opened = living(plain, health, fail_open=True)
    assert living(replace(plain, all_down="failOpen"), health).targets == opened.targets
    assert {one.name for one in opened.active} == {"p1", "p2"}
    assert states(opened)["p3"] == ("draining", 0)
    assert states(opened)["p4"] == ("down", 0)
    closed = living(plain, health)
    assert closed.active == ()
    one = living(plain, said(plain, p1=DOWN, p2=Health("starting", 9)))
    assert {target.name for target in one.active} == {"p2"}, "one is enough"


def test_who_leaves_drains_until_its_deadline() -> None:
    plain = pool(target(1))
    lived = living(plain, {}, leaving=[target(2)])
    assert states(lived) == {"p1": ("active", 100), "p2": ("draining", 0)}
    past = frozenset({(target(2).address, target(2).port)})
    assert states(living(plain, {}, leaving=[target(2)], past_deadline=past))["p2"] == ("down", 0)
    assert living(plain, {}, leaving=[replace(target(1), weight=5)]) is plain, "it is back"


def test_a_table_by_remainder_knows_no_shares() -> None:
    plain = pool(target(1), target(2), algorithm="modulo")
    lived = living(plain, said(plain, p1=HALF, p2=UNCHECKED))
    assert states(lived) == {"p1": ("starting", 100), "p2": ("starting", 0)}


def test_the_pools_of_one_port_share_the_health_of_their_backends() -> None:
    cluster = pool(target(1))
    local = replace(cluster, reach="local")
    assert cluster.key != local.key
    assert HealthKey.of(cluster, target(1)) == HealthKey.of(local, target(1))
    key = HealthKey("Service/default/a", "http", "TCP", ip_address("fd00::1"), 80)
    assert str(key) == "Service/default/a port http/tcp: [fd00::1]:80"
