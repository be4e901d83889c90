"""``build_maglev`` in the kernel gives the very table that `maglev.build` gives in Python."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hookline import bpf
from hookline.datapath.loadbalancer import maglev
from hookline.datapath.loadbalancer.balancer import LoadBalancer, Tunables
from hookline.errors import HooklineError

PAGES = 80
SIZES = [1021, 4099, 16_381, 65_519, 65_521, 65_537]


@pytest.fixture(scope="module")
def builder(compiled: Path) -> Iterator[LoadBalancer]:
    """A load balancer that is neither pinned nor attached."""
    tunables = Tunables(connections=64, services=64, backends=64, maglev_pages=PAGES)
    with LoadBalancer.open(Path("/sys/fs/bpf/hookline-test-nothing"), tunables) as opened:
        yield opened


def _identities(count: int) -> list[bytes]:
    return [b"\x0a\xf4%b/8080" % number.to_bytes(2, "big") for number in range(count)]


def _built(builder: LoadBalancer, weights: list[int], size: int, first_page: int = 0) -> NDArray[np.uint32]:
    plan = maglev.turns(_identities(len(weights)), weights, size)
    rows = np.arange(1, len(weights) + 1, dtype=np.uint32)
    builder.build_table(first_page, size, rows, plan)
    slots = builder.pages[first_page:].reshape(-1)
    page_end = -(-size // 1024) * 1024
    assert not slots[size:page_end].any()
    return slots[:size].copy() - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 10, 333, 1000])
def test_equal_weights(builder: LoadBalancer, size: int, count: int) -> None:
    builder.pages[:] = 7
    table = _built(builder, [100] * count, size)
    assert np.array_equal(table, maglev.build(_identities(count), [100] * count, size))


@pytest.mark.parametrize("size", [1021, 65_537])
@pytest.mark.parametrize(
    "weights",
    [
        [1, 65_535],
        [65_535] + [1] * 499,
        list(range(1, 501)),
        [1 + number % 7 * 40 for number in range(1000)],
    ],
    ids=["two", "one heavy", "rising", "mixed"],
)
def test_skewed_weights(builder: LoadBalancer, size: int, weights: list[int]) -> None:
    builder.pages[:] = 0
    table = _built(builder, weights, size)
    assert np.array_equal(table, maglev.build(_identities(len(weights)), weights, size))


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=200), size=st.sampled_from([1021, 4099]))
@settings(max_examples=60, deadline=None)
def test_any_weights(builder: LoadBalancer, weights: list[int], size: int) -> None:
    table = _built(builder, weights, size)
    assert np.array_equal(table, maglev.build(_identities(len(weights)), weights, size))


def test_the_largest_table_with_the_most_backends(builder: LoadBalancer) -> None:
    """16,384 backends have four slots each, most found after many probes."""
    table = _built(builder, [1] * 16_384, 65_537)
    assert set(np.bincount(table).tolist()) <= {4, 5}
    assert np.array_equal(table, maglev.build(_identities(16_384), [1] * 16_384, 65_537))


def test_slots_and_skips_near_the_size_never_wrap(builder: LoadBalancer) -> None:
    """`slot + skip` passes 65,536: the arithmetic must not lose the carry."""
    size = 65_537
    last = np.array([size - 1], np.uint32)
    for skip in (1, 2, size - 2, size - 1):
        plan = maglev.Turns(np.array([0]), last, np.array([skip], np.uint32), np.array([size], np.uint32))
        builder.build_table(0, size, np.array([9], np.uint32), plan)
        assert (builder.pages[:].reshape(-1)[:size] == 9).all()


def test_pages_beside_the_table_stay_as_they_are(builder: LoadBalancer) -> None:
    builder.pages[:] = 7
    _built(builder, [1] * 10, 4099, first_page=5)
    assert (builder.pages[:5] == 7).all()
    assert (builder.pages[10:] == 7).all()
    assert builder.pages[5:10].reshape(-1)[:4099].all()


def test_two_tables_side_by_side(builder: LoadBalancer) -> None:
    first = _built(builder, [1] * 10, 4099, first_page=0)
    second = _built(builder, [1] * 20, 1021, first_page=5)
    assert np.array_equal(first, builder.pages[:5].reshape(-1)[:4099] - 1)
    assert np.array_equal(second, builder.pages[5].reshape(-1)[:1021] - 1)


def test_too_many_backends(builder: LoadBalancer) -> None:
    count = 16_385
    plan = maglev.turns(_identities(count), [1] * count, 65_537)
    with pytest.raises(HooklineError, match="16385 backends"):
        builder.build_table(0, 65_537, np.arange(1, count + 1, dtype=np.uint32), plan)


def test_a_table_that_is_not_filled_is_an_error(builder: LoadBalancer) -> None:
    """Pages beyond the map, or quotas that are less than the table."""
    plan = maglev.turns(_identities(2), [1, 1], 1021)
    rows = np.array([1, 2], np.uint32)
    with pytest.raises(HooklineError, match=r"not filled|no entries"):
        builder.build_table(PAGES, 1021, rows, plan)
    size_too_large = struct.pack("=IIII", PAGES - 1, 4099, 1, 4099)
    outcome = builder._programs["build_maglev"].test_run(context=size_too_large)
    assert outcome.verdict == 0xFFFFFFFF
    assert struct.unpack("=IIII", outcome.context)[3] > 0


def test_bad_jobs_end(builder: LoadBalancer) -> None:
    program: bpf.Program = builder._programs["build_maglev"]
    for job in ((0, 0, 0, 0), (0, 1021, 1 << 20, 0), (1 << 31, 1021, 0, 0)):
        assert program.test_run(context=struct.pack("=IIII", *job)).verdict == 0xFFFFFFFF
