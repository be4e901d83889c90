"""Maglev's properties, on the table built in Python; the kernel's is held against it in tests/kernel/loadbalancer."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hookline.datapath.loadbalancer import maglev

SIZE = 65_537


def _identities(count: int) -> list[bytes]:
    return [b"\x0a\xf4%b/8080" % number.to_bytes(2, "big") for number in range(count)]


def _owners(identities: list[bytes], weights: list[int], size: int) -> NDArray[np.bytes_]:
    """The identity that has each slot."""
    return np.array(identities)[maglev.build(identities, weights, size)]


# Sizes


def test_is_prime() -> None:
    primes = [number for number in range(2, 3000) if all(number % divisor for divisor in range(2, number))]
    assert [number for number in range(3000) if maglev.is_prime(number)] == primes
    assert maglev.is_prime(maglev.SMALLEST_TABLE)
    assert maglev.is_prime(maglev.LARGEST_TABLE)


def test_table_size_is_the_smallest_prime_with_a_hundred_slots_each() -> None:
    assert maglev.table_size(1) == 1021
    assert maglev.table_size(10) == 1021
    assert maglev.table_size(11) == 1103
    assert maglev.table_size(655) == 65_519
    for count in (656, 1000, 16384):
        assert maglev.table_size(count) == 65_537
    for count in range(11, 655, 13):
        size = maglev.table_size(count)
        assert maglev.is_prime(size)
        assert not any(maglev.is_prime(number) for number in range(100 * count, size))
    assert all(a <= b for a, b in pairwise(maglev.table_size(count) for count in range(1, 800)))


# Evenness


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 100, 999, 1000])
@pytest.mark.parametrize("size", [1021, 10_007, SIZE])
def test_equal_backends_have_equal_shares(count: int, size: int) -> None:
    shares = np.bincount(maglev.build(_identities(count), [100] * count, size), minlength=count)
    assert set(shares.tolist()) <= {size // count, -(-size // count)}
    assert shares.sum() == size


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_shares_follow_weights_to_within_one_slot(weights: list[int]) -> None:
    size = 10_007
    shares = np.bincount(maglev.build(_identities(len(weights)), weights, size), minlength=len(weights))
    ideal = np.array(weights) * size / sum(weights)
    starved = ideal < 1
    assert shares.min() >= 1
    # Those that would have none are given one, at the cost of the largest.
    assert (np.abs(shares - ideal)[~starved] < 1 + starved.sum()).all()
    if not starved.any():
        assert (np.abs(shares - ideal) < 1).all()


def test_a_light_backend_beside_heavy_ones_has_a_slot() -> None:
    weights = [65535, 1, 65535, 1]
    shares = np.bincount(maglev.build(_identities(4), weights, 1021))
    assert shares[1] == shares[3] == 1
    assert shares.sum() == 1021


def test_as_many_backends_as_slots() -> None:
    assert sorted(maglev.build(_identities(1021), [1] * 1021, 1021)) == list(range(1021))


# Disruption


def _moved(before: NDArray[np.bytes_], after: NDArray[np.bytes_], gone: set[bytes]) -> float:
    """The part of the survivors' slots that have another owner."""
    survivors = ~np.isin(before, list(gone))
    return float((before[survivors] != after[survivors]).mean())


@pytest.mark.parametrize(("removed", "bound"), [(1, 0.0080), (10, 0.028)])
def test_disruption_beside_modulo(removed: int, bound: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1,000 backends some are removed: what of the others' slots moves, and what modulo would move."""
    identities = _identities(1000)
    chosen = random.Random(2024)
    before = _owners(identities, [1] * 1000, SIZE)
    flows = np.array([chosen.getrandbits(32) for _ in range(200_000)], np.uint64)
    results = []
    for _ in range(3 if removed > 1 else 5):
        gone = set(chosen.sample(identities, removed))
        rest = [identity for identity in identities if identity not in gone]
        results.append(_moved(before, _owners(rest, [1] * len(rest), SIZE), gone))
    by_modulo = _moved(
        np.array(identities)[maglev.modulo([1] * 1000)[flows % 1000]],
        np.array(rest)[maglev.modulo([1] * len(rest))[flows % len(rest)]],
        gone,
    )
    with capsys.disabled():
        print(
            f"\n{removed} of 1,000 removed moves {max(results):.2%} of the others' slots, modulo {by_modulo:.1%}"
        )
    assert max(results) <= bound
    assert by_modulo > 0.9


def test_a_backend_that_comes_takes_its_share_and_little_more() -> None:
    identities = _identities(101)
    before = _owners(identities[:100], [1] * 100, 10_007)
    after = _owners(identities, [1] * 101, 10_007)
    elsewhere = (before != after) & (after != identities[100])
    assert (after == identities[100]).sum() in (99, 100)
    assert elsewhere.mean() < 0.02


def test_another_weight_moves_little() -> None:
    identities = _identities(100)
    before = _owners(identities, [100] * 100, 10_007)
    after = _owners(identities, [50] + [100] * 99, 10_007)
    assert (before != after).mean() < 0.03


# Order, identity, errors


@given(order=st.permutations(range(20)))
@settings(max_examples=50, deadline=None)
def test_the_order_of_listing_does_not_matter(order: list[int]) -> None:
    identities = _identities(20)
    weights = [1 + number % 4 for number in range(20)]
    shuffled = _owners([identities[i] for i in order], [weights[i] for i in order], 1021)
    assert (shuffled == _owners(identities, weights, 1021)).all()


def test_the_same_table_on_every_machine() -> None:
    """What other versions and machines built: a change here moves every connection of a mixed cluster."""
    table = maglev.build([b"a", b"b", b"c", b"d"], [1, 2, 3, 4], 1021)
    assert np.bincount(table).tolist() == [102, 204, 306, 409]
    assert int((table.astype(np.uint64) * np.arange(1, 1022, dtype=np.uint64)).sum()) == GOLDEN


GOLDEN = 1045520


@pytest.mark.parametrize(
    ("identities", "weights", "size", "words"),
    [
        ([], [], 1021, "do not fit"),
        (_identities(1022), [1] * 1022, 1021, "do not fit"),
        (_identities(2), [1, 1], 1024, "not prime"),
        ([b"a", b"a"], [1, 1], 1021, "same identity"),
        (_identities(2), [1, 0], 1021, "below 1"),
    ],
)
def test_refused(identities: list[bytes], weights: list[int], size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        maglev.turns(identities, weights, size)


@given(count=st.integers(1, 300), size=st.sampled_from([1021, 4099, SIZE]))
@settings(max_examples=50, deadline=None)
def test_turns(count: int, size: int) -> None:
    plan = maglev.turns(_identities(count), [1] * count, size)
    assert sorted(plan.order.tolist()) == list(range(count))
    assert plan.offset.max() < size
    assert plan.skip.min() >= 1
    assert plan.skip.max() < size
    assert int(plan.quota.sum()) == size


# Modulo


def test_modulo_repeats_by_weight() -> None:
    assert maglev.modulo([100, 100, 100]).tolist() == [0, 1, 2]
    assert maglev.modulo([200, 100]).tolist() == [0, 0, 1]
    assert maglev.modulo([7]).tolist() == [0]


def test_modulo_refuses_what_it_cannot_express() -> None:
    with pytest.raises(ValueError, match="rounder"):
        maglev.modulo([65_537, 2])


# What a table may not have


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    st.sampled_from([1021, 4099]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_every_table_that_is_built_is_in_order(weights: list[int], size: int, chance: random.Random) -> None:
    rows = chance.sample(range(1, 65_536), len(weights))
    slots = np.array(rows, np.uint32)[maglev.build(_identities(len(weights)), weights, size)]
    assert maglev.violation(slots, rows, weights) == ""
    wrong = slots.copy()
    wrong[chance.randrange(size)] = chance.choice([0, *(set(range(1, 70)) - set(rows))])
    assert "not the service's" in maglev.violation(wrong, rows, weights)
    wrong = slots.copy()
    wrong[wrong == rows[0]] = rows[-1]
    assert ("weight asks for" in maglev.violation(wrong, rows, weights)) == (len(rows) > 1)


def test_two_slots_too_many_are_found() -> None:
    rows, weights = [3, 5, 9], [1, 1, 2]
    slots = np.array(rows, np.uint32)[maglev.build(_identities(3), weights, 1021)]
    slots[np.flatnonzero(slots == 9)[:2]] = 3
    assert maglev.violation(slots, rows, weights).startswith(
        "row 3 has 257 of 1021 slots, and its weight asks for 255."
    )


def test_light_backends_have_one_slot_each_and_the_heavy_pay_for_it() -> None:
    weights = [1] * 50 + [1_000_000]
    rows = list(range(1, 52))
    slots = np.array(rows, np.uint32)[maglev.build(_identities(51), weights, 1021)]
    assert maglev.violation(slots, rows, weights) == ""
    slots[slots == 7] = 51
    assert maglev.violation(slots, rows, weights).startswith("row 7 has 0 of")


@pytest.mark.parametrize("weights", [[1], [2, 3], [100, 50, 25]])
def test_modulo_tables_are_exact(weights: list[int]) -> None:
    rows = [10 + number for number in range(len(weights))]
    slots = np.array(rows, np.uint32)[maglev.modulo(weights)]
    assert maglev.violation(slots, rows, weights) == ""
