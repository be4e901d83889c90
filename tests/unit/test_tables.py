"""Diff and carry out, on maps of plain memory: any change from anything, also after being killed anywhere in between."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookline.control import tables as tables_module
from hookline.control._errors import DoesNotFit
from hookline.control.pools import Pool
from hookline.control.tables import Tables, frontend_key, key_address, service_key, still_wanted
from hookline.datapath.loadbalancer._object import OBJECT
from tests.pool_sets import (
    Interrupted,
    bring,
    check,
    check_nothing_is_half_done,
    interrupted,
    make_pool,
    memory_balancer,
    placements,
    pool_sets,
)
from tests.requirements import need

BOUNDED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _compiled() -> None:
    need("kernel", "" if Path(OBJECT).exists() else "the compiled kernel programs (make setup)")


@given(sets=st.lists(pool_sets(), min_size=1, max_size=5))
@settings(BOUNDED, max_examples=70)
def test_any_sequence_of_sets(sets: list[list[Pool]]) -> None:
    """One process that remembers: after each change the maps are what a fresh start would have made."""
    balancer, _ = memory_balancer()
    tables = Tables(balancer)
    for pools in sets:
        change = tables.diff(pools, placements())
        tables.check_fits(change)
        tables.carry_out(change)
        check(balancer, pools)
        assert not tables.diff(pools, placements())


@given(sets=st.lists(pool_sets(), min_size=2, max_size=4))
@settings(BOUNDED, max_examples=50)
def test_only_the_pools_that_changed(sets: list[list[Pool]]) -> None:
    """What `Node` does from the second apply on: it names the pools that may differ."""
    balancer, _ = memory_balancer()
    tables = Tables(balancer)
    before: list[Pool] = []
    for pools in sets:
        old, new = ({pool.key: pool for pool in group} for group in (before, pools))
        only = frozenset(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        change = tables.diff([new[key] for key in only if key in new], placements(), only=only)
        tables.check_fits(change)
        tables.carry_out(change)
        check(balancer, pools)
        before = pools


@given(
    before=pool_sets(),
    wanted=pool_sets(),
    afterwards=st.one_of(st.none(), pool_sets()),
    changes=st.integers(0, 14),
    halfway=st.booleans(),
)
@settings(BOUNDED, max_examples=120)
def test_killed_anywhere(
    before: list[Pool], wanted: list[Pool], afterwards: list[Pool] | None, changes: int, halfway: bool
) -> None:
    """At no moment do the programs see half a change, and the next process finishes, or makes something else."""
    balancer, interruption = memory_balancer()
    bring(balancer, before)
    with interrupted(interruption, changes, halfway=halfway):
        bring(balancer, wanted)
    check_nothing_is_half_done(balancer)
    # Killed a second time, at another place.
    with interrupted(interruption, changes // 2, halfway=not halfway):
        bring(balancer, wanted)
    check_nothing_is_half_done(balancer)
    final = wanted if afterwards is None else afterwards
    bring(balancer, final)
    check(balancer, final)


def test_every_step_can_be_the_last() -> None:
    """One change that has all five steps, interrupted at every one of its writes, half done and not begun."""
    before = [make_pool("a"), make_pool("gone", addresses=["192.0.2.9"]), make_pool("b", number=81)]
    wanted = [
        make_pool("a", targets={"10.244.0.5": 1, "10.244.0.6": 3}),
        make_pool("new", addresses=["192.0.2.7", "192.0.2.8"]),
        make_pool("b", number=81, algorithm="modulo"),
    ]
    places = 0
    for halfway in (False, True):
        for changes in range(100):
            balancer, interruption = memory_balancer()
            bring(balancer, before)
            interruption.after(changes, halfway=halfway)
            try:
                bring(balancer, wanted)
            except Interrupted:
                places += 1
            else:
                break
            finally:
                interruption.off()
            check_nothing_is_half_done(balancer)
            bring(balancer, wanted)
            check(balancer, wanted)
    assert places >= 2 * 7


# What a diff says


def test_nothing_to_do() -> None:
    balancer, interruption = memory_balancer()
    tables = Tables(balancer)
    assert not tables.diff([], placements())
    pools = [make_pool()]
    bring(balancer, pools)
    interruption.after(0, halfway=False)
    tables = Tables(balancer)
    tables.carry_out(tables.diff(pools, placements()))


def test_one_weight_rebuilds_one_table_and_no_rows() -> None:
    balancer, _ = memory_balancer()
    bring(balancer, [make_pool("a"), make_pool("b", number=81)])
    tables = Tables(balancer)
    wanted = [make_pool("a", targets={"10.244.0.4": 100, "10.244.0.5": 50}), make_pool("b", number=81)]
    change = tables.diff(wanted, placements())
    assert [(pool.key, pool.rebuild, pool.new, pool.gone_rows) for pool in change.pools] == [
        (wanted[0].key, True, (), ())
    ]
    assert not change.removed
    assert not change.addresses


def test_the_order_of_backends_matters_to_modulo_only() -> None:
    algorithms: tuple[Literal["maglev", "modulo"], ...] = ("maglev", "modulo")
    for algorithm in algorithms:
        balancer, _ = memory_balancer()
        bring(balancer, [make_pool(algorithm=algorithm)])
        turned = make_pool(algorithm=algorithm, targets={"10.244.0.5": 100, "10.244.0.4": 100})
        assert bool(Tables(balancer).diff([turned], placements())) == (algorithm == "modulo")


def test_a_backend_of_weight_0_keeps_its_row_and_loses_its_slots() -> None:
    balancer, _ = memory_balancer()
    first = make_pool()
    rows = bring(balancer, [first]).pool_rows(first)
    drained = make_pool(targets={"10.244.0.4": 0, "10.244.0.5": 100})
    tables = bring(balancer, [drained])
    assert tables.pool_rows(drained) == rows
    assert set(tables.table(drained.frontends[0]).tolist()) == {rows[_key("10.244.0.5")]}


def _key(address: str) -> tuple[bytes, int]:
    return bytes(10) + b"\xff\xff" + IPv4Address(address).packed, 8080


def test_another_forwarding_gives_other_rows() -> None:
    """What connections were made with stays valid until they end: the row is not rewritten in place."""
    balancer, _ = memory_balancer()
    nat = make_pool(targets={"10.244.0.5": 1})
    before = set(bring(balancer, [nat]).pool_rows(nat).values())
    dsr = dataclasses.replace(nat, forwarding="dsr")
    tables = bring(balancer, [dsr])
    assert not before & set(tables.pool_rows(dsr).values())
    check(balancer, [dsr])


def test_a_row_used_again_has_another_generation() -> None:
    balancer, _ = memory_balancer()
    one, other = make_pool(targets={"10.244.0.4": 1}), make_pool(targets={"10.244.0.5": 1})
    (row,) = bring(balancer, [one]).pool_rows(one).values()
    first = int(balancer.maps["backends"].read()[1]["generation"][row])
    bring(balancer, [])
    assert list(bring(balancer, [other]).pool_rows(other).values()) == [row]
    assert int(balancer.maps["backends"].read()[1]["generation"][row]) == first + 1


def test_generations_wrap() -> None:
    balancer, _ = memory_balancer()
    balancer.maps["backends"].view()["generation"] = 0xFFFF
    pool = make_pool(targets={"10.244.0.4": 1})
    (row,) = bring(balancer, [pool]).pool_rows(pool).values()
    assert balancer.maps["backends"].read()[1]["generation"][row] == 0


def test_the_same_backend_in_two_pools_has_two_rows() -> None:
    balancer, _ = memory_balancer()
    pools = [make_pool("a"), make_pool("b", number=81)]
    tables = bring(balancer, pools)
    rows = [set(tables.pool_rows(pool).values()) for pool in pools]
    assert not rows[0] & rows[1]


def test_service_numbers_stay() -> None:
    """They are rows of counters."""
    balancer, _ = memory_balancer()
    pools = [make_pool(f"s{number}", number=80 + number) for number in range(4)]
    tables = bring(balancer, pools)
    before = {key: row.id for key, row in tables.services.items() if row.pool}
    kept = [make_pool("s1", number=81, targets={"10.244.0.4": 1}), make_pool("s3", number=83)]
    after = {key: row.id for key, row in bring(balancer, kept).services.items() if row.pool}
    assert after == {
        frontend_key(pool.frontends[0]): before[frontend_key(pool.frontends[0])] for pool in kept
    }


def test_keys() -> None:
    pool = make_pool(addresses=["2001:db8::1"], protocol="UDP")
    key = frontend_key(pool.frontends[0])
    assert key == pool.frontends[0].address.packed + b"\0\x50\x11\0"
    for address in (pool.frontends[0].address, make_pool().frontends[0].address):
        assert key_address(service_key(address)) == address


# Pages


def test_a_tables_pages_are_not_given_out_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that still holds the old row of the service reads a whole table."""
    monkeypatch.setattr(tables_module, "QUARANTINE_SECONDS", 3600)
    balancer, _ = memory_balancer()
    tables = Tables(balancer)
    pages = []
    for weight in (1, 2, 3):
        tables.carry_out(
            tables.diff([make_pool(targets={"10.244.0.4": weight, "10.244.0.5": 7})], placements())
        )
        pages.append(next(iter(tables.used_pages())))
    assert len(set(pages)) == 3
    monkeypatch.setattr(tables_module, "QUARANTINE_SECONDS", 0)
    tables.carry_out(tables.diff([make_pool(targets={"10.244.0.4": 9, "10.244.0.5": 7})], placements()))
    assert next(iter(tables.used_pages())) == pages[0]


def _sized(number: int, size: int, weight: int = 1) -> Pool:
    targets = {"10.244.0.4": weight, "10.244.0.5": 7}
    return make_pool(f"s{number}", number=number, targets=targets, size=size)


def test_gaps_are_filled_first_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "QUARANTINE_SECONDS", 0)
    balancer, _ = memory_balancer(pages=8)
    bring(balancer, [_sized(number, 1021) for number in range(1, 9)])
    # Every other page free: tables of one page fit, one of two does not.
    kept = [_sized(number, 1021) for number in (2, 4, 6, 8)]
    bring(balancer, kept)
    wanted = [*kept, _sized(10, 1021), _sized(11, 1021)]
    bring(balancer, wanted)
    check(balancer, wanted)
    with pytest.raises(DoesNotFit, match="tables of 2 pages") as error:
        bring(balancer, [*wanted, _sized(12, 2039)])
    assert "2 of them free" in str(error.value)
    check(balancer, wanted)


def test_old_and_new_tables_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "QUARANTINE_SECONDS", 0)
    balancer, _ = memory_balancer(pages=3)
    bring(balancer, [_sized(1, 2039)])
    with pytest.raises(DoesNotFit):
        bring(balancer, [_sized(1, 2039, weight=2)])
    check(balancer, [_sized(1, 2039)])
    bring(balancer, [])
    bring(balancer, [_sized(1, 2039, weight=2)])
    check(balancer, [_sized(1, 2039, weight=2)])


@given(sizes=st.lists(st.sampled_from([1021, 2039, 3067, 5119]), min_size=1, max_size=8), data=st.data())
@settings(BOUNDED, max_examples=25)
def test_pages_come_back(sizes: list[int], data: st.DataObject) -> None:
    """After any removals all free pages can be used: as tables of one page, whatever the gaps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tables_module, "QUARANTINE_SECONDS", 0)
        balancer, _ = memory_balancer(pages=40, services=128)
        pools = [_sized(number, size) for number, size in enumerate(sizes, 1)]
        bring(balancer, pools)
        kept = [pool for pool in pools if data.draw(st.booleans())]
        tables = bring(balancer, kept)
        free = 40 - sum(tables.used_pages().values())
        filled = [*kept, *(_sized(100 + number, 1021) for number in range(free))]
        bring(balancer, filled)
        check(balancer, filled)


# What does not fit


def test_too_many_backends() -> None:
    balancer, _ = memory_balancer(backends=4)
    three = {f"10.244.0.{number}": 1 for number in (4, 5, 6)}
    bring(balancer, [make_pool(targets=three)])
    with pytest.raises(DoesNotFit, match="4 backends") as error:
        bring(balancer, [make_pool(targets=three | {"10.244.0.8": 1})])
    assert "backends has room for 3" in str(error.value)
    check(balancer, [make_pool(targets=three)])


def test_old_and_new_backends_stand_side_by_side() -> None:
    balancer, _ = memory_balancer(backends=4)
    bring(balancer, [make_pool()])
    with pytest.raises(DoesNotFit, match="4 backends"):
        bring(balancer, [make_pool(target_port=9090)])
    check(balancer, [make_pool()])


def test_too_many_services() -> None:
    balancer, _ = memory_balancer(services=4)
    three = [make_pool(f"s{number}", number=number) for number in (1, 2, 3)]
    bring(balancer, three)
    with pytest.raises(DoesNotFit, match="5 rows of services"):
        bring(balancer, [*three, make_pool("s4", number=4)])
    check(balancer, three)


def test_as_many_services_as_there_is_room_for() -> None:
    balancer, _ = memory_balancer(services=4)
    pools = [make_pool(f"s{number}", number=number) for number in (1, 2, 3)]
    tables = bring(balancer, pools)
    assert sorted(row.id for row in tables.services.values() if row.pool) == [1, 2, 3]


def test_too_many_backends_for_the_builder() -> None:
    balancer, _ = memory_balancer(backends=40_000, pages=80)
    targets = {f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}": 1 for number in range(16_385)}
    with pytest.raises(DoesNotFit, match="16385 backends in one service"):
        bring(balancer, [make_pool(targets=targets, size=65_537)])


def test_refused_changes_change_nothing() -> None:
    balancer, interruption = memory_balancer(pages=1)
    interruption.after(0, halfway=False)
    tables = Tables(balancer)
    with pytest.raises(DoesNotFit):
        tables.check_fits(tables.diff([_sized(1, 2039)], placements()))
    assert not interruption.met


# Reading back


def test_adoption_knows_all_that_was_known() -> None:
    balancer, _ = memory_balancer()
    pools = [make_pool("a"), make_pool("b", addresses=["2001:db8:f::1"], targets={"2001:db8:1::4": 3})]
    first = bring(balancer, pools)
    second = Tables(balancer)
    assert second.services == first.services
    assert [second.pool_rows(pool) for pool in pools] == [first.pool_rows(pool) for pool in pools]
    assert second.used_pages() == first.used_pages()
    assert second.backends_in_use() == first.backends_in_use() == 3
    for pool in pools:
        for frontend in pool.frontends:
            assert np.array_equal(first.table(frontend), second.table(frontend))


def test_no_table_for_what_is_not_there() -> None:
    balancer, _ = memory_balancer()
    tables = bring(balancer, [make_pool(targets={})])
    assert not len(tables.table(make_pool().frontends[0]))
    assert not len(tables.table(make_pool(number=81).frontends[0]))


def test_nobody_is_retired_by_another_name_of_the_pool() -> None:
    """The rows are others then, but who is still the service's with this protocol has not left."""
    balancer, _ = memory_balancer()
    tables = Tables(balancer)
    before = [make_pool("a"), make_pool("a", "dns", protocol="UDP"), make_pool("b", addresses=["192.0.2.9"])]
    tables.carry_out(tables.diff(before, placements()))
    after = [
        make_pool("a", "web", targets={"10.244.0.4": 100}),
        make_pool("a", "names", protocol="UDP", targets={"10.244.0.5": 100}),
        make_pool("b", "web", addresses=["192.0.2.9"], target_port=9090),
    ]

    def by_service(pools: list[Pool]) -> dict[str, list[Pool]]:
        found: dict[str, list[Pool]] = {}
        for pool in pools:
            found.setdefault(pool.service, []).append(pool)
        return found

    change = tables.diff(after, placements())
    wanted = still_wanted(change, by_service(before), by_service(after))
    gone = sorted((str(address), port) for address, port in tables.retired(change, wanted=wanted).values())
    four, five = ("10.244.0.4", 8080), ("10.244.0.5", 8080)
    assert gone == [four, four, five, five], "a's UDP and TCP one each, and both of b, whose port is another"
    assert still_wanted(tables.diff(before, placements()), by_service(before), by_service(before)) == {}
