"""Rings that Python writes and programs drain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hookline import bpf

STRIDE = 24
FITTING = 4096 // STRIDE


@pytest.fixture
def orders(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("user_ring")) as obj:
        yield obj.load()


def batch(dtype: np.dtype[np.void], first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    records = np.zeros(count, dtype)
    records["number"] = np.arange(first, first + count)
    records["amount"] = records["number"] % 7
    return records


@pytest.mark.feature("map", "user_ringbuf")
def test_a_program_takes_what_python_wrote(orders: bpf.Object) -> None:
    dtype = orders.btf.struct("order")
    seen = orders.maps[".bss"].view()
    drain = orders.programs["drain"]
    with bpf.UserRing(orders.maps["orders"], dtype) as ring:
        assert ring.room == FITTING
        written = 0
        for turn in range(300):
            records = batch(dtype, written, 1 + turn * 11 % FITTING)
            assert ring.write(records) == len(records)
            assert ring.room == FITTING - len(records)
            assert drain.test_run(context=bytes(8)).verdict == len(records)
            written += len(records)
        assert seen["taken"][0] == written
        assert written * STRIDE > 50 * ring.size
        assert seen["sum"][0] == sum(number % 7 for number in range(written))
        assert seen["out_of_order"][0] == 0


def test_a_full_ring_takes_the_first_records(orders: bpf.Object) -> None:
    dtype = orders.btf.struct("order")
    seen = orders.maps[".bss"].view()
    with bpf.UserRing(orders.maps["orders"], dtype) as ring:
        records = batch(dtype, 0, FITTING + 5)
        assert ring.write(records) == FITTING
        assert ring.write(records[FITTING:]) == 0
        assert ring.room == 0
        orders.programs["drain"].test_run(context=bytes(8))
        assert ring.write(records[FITTING:]) == 5
        assert ring.write([(FITTING + 5, 1)]) == 1
    # What was written outlives the writer; the next one goes on behind it.
    with bpf.UserRing(orders.maps["orders"], dtype) as ring:
        assert ring.room == FITTING - 6
        assert ring.write(batch(dtype, FITTING + 6, 1)) == 1
    orders.programs["drain"].test_run(context=bytes(8))
    assert seen["taken"][0] == FITTING + 7
    assert seen["out_of_order"][0] == 0


def test_user_rings_refuse(orders: bpf.Object) -> None:
    dtype = orders.btf.struct("order")
    with pytest.raises(bpf.BpfError, match="is no user ring"):
        bpf.UserRing(orders.maps[".bss"], dtype)
    with pytest.raises(bpf.BpfError, match="is no ring"):
        orders.ring("orders")
    ring = bpf.UserRing(orders.maps["orders"], dtype)
    for wrong in (np.zeros(3, "u4"), np.zeros((2, 2), dtype)):
        with pytest.raises(bpf.BpfError, match=r"do not fit|have shape"):
            ring.write(wrong)
    ring.close()
    ring.close()
    with pytest.raises(bpf.BpfError, match="'orders' is closed"):
        ring.write(batch(dtype, 0, 1))
