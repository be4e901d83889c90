"""Rings: what programs wrote is read, once, in order, or counted as lost."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import descriptors, in_thread

EVENT_BYTES, STRIDE = 64, 72
FITTING = 4096 // STRIDE  # events that a ring of 4096 bytes can hold


@pytest.fixture
def rings(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("rings")) as obj:
        yield obj.load()


@pytest.fixture
def large(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("rings")) as obj:
        obj.resize("events", 1 << 20)
        yield obj.load()


def fill(obj: bpf.Object, count: int, first: int = 0, *, discard_every: int = 0, by: str = "fill") -> int:
    """Let a program write records on this thread's CPU; returns how many found no room."""
    job = struct.pack("=QIIQ", first, count, discard_every, 0)
    (failed,) = struct.unpack_from("=Q", obj.programs[by].test_run(context=job).context, 16)
    return int(failed)


def mixed(number: int) -> bytes:
    return bytes([number % 256]) * (1 + number % 64)


@pytest.mark.feature("ring", "fixed-size records as an array")
def test_events_are_an_array(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        assert ring.dtype == rings.btf.struct("event")
        assert ring.read().shape == (0,)
        fill(rings, 5, 100)
        assert ring.backlog == (5 * STRIDE, 5)
        events = ring.read()
        assert ring.backlog == (0, 0)
    assert events.dtype.names == ("number", "cpu", "kind", "words")
    assert events["number"].tolist() == [100, 101, 102, 103, 104]
    assert events["kind"].tolist() == [7] * 5
    assert events["words"][4].tolist() == [104 + i for i in range(24)]
    assert set(events["cpu"]) <= set(range(bpf.possible_cpus()))


@pytest.mark.feature("ring", "lost and backlog counts")
def test_a_full_ring_counts_what_it_loses(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        assert ring.lost == 0
        assert fill(rings, FITTING + 44) == 44
        assert ring.lost == 44
        assert ring.read()["number"].tolist() == list(range(FITTING))
        fill(rings, 3, 1000)
        assert ring.read()["number"].tolist() == [1000, 1001, 1002]
        assert ring.lost == 44
        in_thread(lambda: fill(rings, 100))
        assert ring.lost == 44 + 100 - FITTING
    assert int(rings.maps["events_lost"][0].sum()) == 44 + 100 - FITTING


def test_lost_is_unknown_without_a_counter(rings: bpf.Object) -> None:
    with rings.ring("uncounted", "odd") as ring:
        assert ring.lost is None
        fill(rings, 1, 9, by="fill_odd")
        (record,) = ring.read()
        assert (record["number"], record["letters"].tobytes()) == (9, b"abcd\0")
    with rings.ring("uncounted", "odd", lost="events_lost") as ring:
        assert ring.lost == 0


def test_wrapping_around_many_times(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        expected = 0
        for round_ in range(500):
            count = 1 + round_ * 7 % FITTING
            fill(rings, count, expected)
            events = ring.read()
            assert events["number"].tolist() == list(range(expected, expected + count))
            assert (events["words"] == (events["number"][:, None] + np.arange(24)).astype(np.uint16)).all()
            expected += count
        assert expected * STRIDE > 200 * ring.size
        assert ring.lost == 0


def test_a_limit_leaves_the_rest(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        fill(rings, 10)
        assert ring.read(limit=3)["number"].tolist() == [0, 1, 2]
        assert ring.read(limit=0).shape == (0,)
        assert ring.backlog.records == 7
        assert ring.read(limit=100)["number"].tolist() == list(range(3, 10))


def test_discarded_records_are_passed_over(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        for every in (1, 2, 3):
            fill(rings, 12, discard_every=every)
            kept = [n for n in range(12) if n % every != every - 1]
            assert ring.read()["number"].tolist() == kept
            fill(rings, 12, discard_every=every)
            assert [int(record["number"]) for record in ring.records()] == kept
            assert ring.backlog.bytes == 0
        assert ring.lost == 0


@pytest.mark.feature("ring", "records of any size, one by one")
def test_records_of_any_size(rings: bpf.Object) -> None:
    with rings.ring("mixed") as ring:
        number = 0
        for _ in range(60):
            fill(rings, 50, number, by="fill_mixed")
            assert list(ring.records()) == [mixed(n) for n in range(number, number + 50)]
            number += 50
        assert ring.backlog == (0, None)
        assert ring.lost == 0
        with pytest.raises(bpf.BpfError, match=r"no dtype.*records\(\)"):
            ring.read()


def test_an_iteration_ends_however_busy_the_ring_is(rings: bpf.Object) -> None:
    with rings.ring("mixed") as ring:
        fill(rings, 3, by="fill_mixed")
        seen = []
        for record in ring.records():
            seen.append(record)
            fill(rings, 2, 3 + 2 * len(seen), by="fill_mixed")
        assert seen == [mixed(n) for n in range(3)]
        assert list(ring.records()) == [mixed(n) for n in range(5, 11)]


def test_leaving_the_iteration_loses_nothing(rings: bpf.Object) -> None:
    with rings.ring("mixed") as ring:
        fill(rings, 10, by="fill_mixed")
        for record in ring.records():
            if record == mixed(3):
                break
        pending = ring.records()
        assert next(pending) == mixed(4)
        # It is handed out: nobody gets it again, also while its iterator is alive.
        assert next(ring.records()) == mixed(5)

        def fail() -> None:
            for record in ring.records():
                assert record == mixed(6)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert next(pending) == mixed(7)
        assert list(ring.records()) == [mixed(8), mixed(9)]
        pending.close()
    fill(rings, 2, 50, by="fill_mixed")
    with rings.ring("mixed") as ring:
        assert next(ring.records()) == mixed(50)
    with rings.ring("mixed") as ring:
        assert list(ring.records()) == [mixed(51)]


def test_other_sizes_are_refused_not_misread(rings: bpf.Object) -> None:
    dtype = np.dtype("V10")
    with rings.ring("mixed", dtype) as ring:
        # Records 0, 1, 2 … have 1, 2, 3 bytes; number 9 has 10, as does 73.
        for first in (9, 73):
            fill(rings, 1, first, by="fill_mixed")
        fill(rings, 3, 10, by="fill_mixed")
        assert [bytes(record) for record in ring.read()] == [mixed(9), mixed(73)]
        for _ in range(2):
            with pytest.raises(bpf.BpfError, match=r"a record of 11 bytes.*its dtype has 10.*records\(\)"):
                ring.read()
            with pytest.raises(bpf.BpfError, match="a record of 11 bytes"):
                next(ring.records())
    with rings.ring("mixed") as ring:
        assert list(ring.records()) == [mixed(10), mixed(11), mixed(12)]
    # A shorter one, of which less is there than a record of the dtype would take.
    with rings.ring("mixed", np.dtype("V60")) as ring:
        fill(rings, 1, 0, by="fill_mixed")
        with pytest.raises(bpf.BpfError, match=r"a record of 1 bytes.*has 60"):
            ring.read()


def test_records_with_a_dtype(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        fill(rings, 3)
        numbers = []
        for record in ring.records():
            assert record.dtype == ring.dtype
            numbers.append(int(record["number"]))
        assert numbers == [0, 1, 2]
    with rings.ring("events", np.dtype(("<u8", (8,)))) as ring:
        fill(rings, 3, 5)
        assert ring.read()[:, 0].tolist() == [5, 6, 7]
        fill(rings, 1, 8)
        assert next(ring.records())[0] == 8


def test_waiting(rings: bpf.Object) -> None:
    with rings.ring("events", "event") as ring:
        assert not ring.wait(0)
        begun = time.monotonic()
        assert not ring.wait(0.05)
        assert 0.05 <= time.monotonic() - begun < 5
        later = threading.Timer(0.1, fill, (rings, 2))
        later.start()
        begun = time.monotonic()
        assert ring.wait(30)
        assert 0.05 < time.monotonic() - begun < 10
        later.join()
        assert ring.wait()
        assert len(ring.read()) == 2
        assert not ring.wait(0)
    with rings.ring("uncounted", "odd") as ring:
        # A program that asks for no wake-up: the record is there, whoever looks.
        fill(rings, 1, by="fill_quietly")
        assert ring.wait(0)


def test_waking_after_every_batch(rings: bpf.Object) -> None:
    """No wake-up is missed: the reader empties the ring and sleeps, over and over."""
    rounds = 300
    with rings.ring("events", "event") as ring:
        turn = threading.Semaphore(1)

        def produce() -> None:
            for number in range(rounds):
                turn.acquire()
                fill(rings, 1, number)

        producer = threading.Thread(target=produce)
        producer.start()
        seen: list[int] = []
        while len(seen) < rounds:
            assert ring.wait(20)
            seen += ring.read()["number"].tolist()
            turn.release()
        producer.join()
    assert seen == list(range(rounds))


def test_concurrent_producers(large: bpf.Object) -> None:
    """A producer on each CPU while we read: every record once, in order for each, or counted as lost."""
    cpus = sorted(os.sched_getaffinity(0))
    each, wanted = 500, 100_000
    written, failed = [0, 0], [0, 0]
    enough = threading.Event()
    with large.ring("events", "event") as ring:

        def produce(place: int) -> None:
            os.sched_setaffinity(0, {cpus[place % len(cpus)]})
            while not enough.is_set():
                failed[place] += fill(large, each, (place << 32) + written[place])
                written[place] += each

        producers = [threading.Thread(target=produce, args=(place,)) for place in range(2)]
        for producer in producers:
            producer.start()
        batches = []
        seen = np.zeros(2, np.int64)
        deadline = time.monotonic() + 120
        while seen.min() < wanted and time.monotonic() < deadline:
            batches.append(ring.read())
            seen += np.bincount((batches[-1]["number"] >> np.uint64(32)).astype(np.int64), minlength=2)
        enough.set()
        for producer in producers:
            producer.join()
        batches.append(ring.read())
        assert len(ring.read()) == 0
        lost = ring.lost
    assert seen.min() >= wanted
    numbers = np.concatenate([batch["number"] for batch in batches])
    words = np.concatenate([batch["words"] for batch in batches])
    assert lost == sum(failed)
    assert len(numbers) == sum(written) - lost
    assert (words == (numbers[:, None] + np.arange(24, dtype=np.uint64)).astype(np.uint16)).all()
    for place in range(2):
        own = numbers[numbers >> np.uint64(32) == place].astype(np.int64)
        assert len(own) == written[place] - failed[place]
        assert (np.diff(own) > 0).all()


@pytest.mark.feature("ring", "events in an event loop")
def test_events_in_an_event_loop(rings: bpf.Object) -> None:
    async def main() -> list[int]:
        seen: list[int] = []
        with rings.ring("events", "event") as ring:
            loop = asyncio.get_running_loop()
            for turn in range(5):
                loop.call_later(0.02 * turn, fill, rings, 10, turn * 10)
            async for batch in ring:
                assert len(batch)
                seen += batch["number"].tolist()
                if len(seen) == 50:
                    break
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ring.wait_async(), 0.05)
            loop.call_soon(fill, rings, 1, 50)
            await asyncio.wait_for(ring.wait_async(), 20)
            seen += ring.read()["number"].tolist()
        return seen

    assert asyncio.run(main()) == list(range(51))


def test_batches_without_a_dtype_are_lists(rings: bpf.Object) -> None:
    async def main() -> object:
        with rings.ring("mixed") as ring:
            fill(rings, 3, by="fill_mixed")
            async for batch in ring:
                return batch
        return None

    assert asyncio.run(main()) == [mixed(0), mixed(1), mixed(2)]


def test_waiting_tasks_are_cancelled_and_told(rings: bpf.Object) -> None:
    async def main() -> None:
        ring = rings.ring("events", "event")

        async def consume() -> int:
            return sum([len(batch) async for batch in ring])

        waiting = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        with pytest.raises(bpf.BpfError, match="another task waits"):
            await ring.wait_async()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # Nothing is left of it: the next may wait, and is told when the ring goes.
        waiting = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        ring.close()
        with pytest.raises(bpf.BpfError, match="'events' is closed"):
            await waiting
        fill(rings, 1)
        with rings.ring("events", "event") as again:
            await asyncio.wait_for(again.wait_async(), 20)
            assert len(again.read()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_closing_wakes_a_thread_that_waits(rings: bpf.Object, timeout: float | None) -> None:
    before = descriptors()
    ring = rings.ring("uncounted", "odd")
    found: list[str] = []

    def wait() -> None:
        try:
            found.append(str(ring.wait(timeout)))
        except bpf.BpfError as error:
            found.append(str(error))

    # A thread that stays would keep pytest from ending.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    begun = time.monotonic()
    ring.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert time.monotonic() - begun < 5
    assert found
    assert found[0].startswith("ring 'uncounted' is closed")
    assert descriptors() == before
    # The next reader is free to come, and to wait.
    with rings.ring("uncounted", "odd") as again:
        assert again.wait(0.01) is False
        fill(rings, 1, 9, by="fill_odd")
        assert again.wait(10) is True


def test_closing_in_a_thread_wakes_a_task_that_waits(rings: bpf.Object) -> None:
    before = descriptors()

    async def main() -> None:
        ring = rings.ring("events", "event")
        closing = threading.Timer(0.1, ring.close)
        closing.start()
        with pytest.raises(bpf.BpfError, match="'events' is closed"):
            await asyncio.wait_for(ring.wait_async(), 10)
        closing.join()

    asyncio.run(main())
    assert descriptors() == before


def test_a_signal_handler_may_close_the_ring_that_is_waited_for(rings: bpf.Object) -> None:
    before = descriptors()
    ring = rings.ring("uncounted", "odd")
    usual = signal.signal(signal.SIGALRM, lambda *_: ring.close())
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(bpf.BpfError, match="'uncounted' is closed"):
            ring.wait(30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert descriptors() == before


def test_one_reader_only(rings: bpf.Object, pins: Path) -> None:
    rings.maps["events"].pin(pins / "events")
    with rings.ring("events", "event"), bpf.Map.from_pin(pins / "events") as adopted:
        for another in (rings.maps["events"], adopted):
            with pytest.raises(bpf.BpfError, match=r"'events' is being read already.*one consumer.*close"):
                another.ring(rings.btf.struct("event"))
        # Another ring is another's.
        rings.ring("mixed").close()
    rings.ring("events").close()


def test_closing(rings: bpf.Object) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("bpf-map")

    open_before, mapped_before = descriptors(), mappings()
    ring = rings.ring("events", "event")
    assert mappings() == mapped_before + 2
    fill(rings, 3)
    events = ring.read()
    rings.close()
    assert ring.wait(0) is False  # it lives on without the object
    ring.close()
    ring.close()
    assert mappings() == mapped_before
    assert descriptors() < open_before
    assert events["number"].tolist() == [0, 1, 2]
    for use in (ring.read, ring.wait, lambda: ring.backlog, lambda: ring.lost, lambda: ring.fd):
        with pytest.raises(bpf.BpfError, match="'events' is closed"):
            use()
    with pytest.raises(bpf.BpfError, match="closed"):
        next(ring.records())


def test_a_forgotten_ring_gives_everything_back(rings: bpf.Object) -> None:
    before = descriptors()
    rings.ring("events", "event")
    assert descriptors() == before
    rings.ring("events", "event").close()


def test_what_cannot_be_read_is_refused(rings: bpf.Object, pins: Path) -> None:
    with pytest.raises(bpf.BpfError, match=r"'events_lost' is no ring.*percpu_array"):
        rings.ring("events_lost")
    with pytest.raises(bpf.BpfError, match="did you mean 'events'"):
        rings.ring("evens")
    with pytest.raises(bpf.BpfError, match=r"no struct 'evnt'.*did you mean 'event'"):
        rings.ring("events", "evnt")
    with pytest.raises(bpf.BpfError, match=r"const struct nothing_near \*unused_nothing_near __attr"):
        rings.ring("events", "nothing_near")
    with pytest.raises(bpf.BpfError, match=r"bits\.low is a bitfield"):
        rings.ring("events", "bits")
    with pytest.raises(bpf.BpfError, match="cannot have 0 bytes"):
        rings.ring("events", np.dtype([]))
    rings.maps["events"].pin(pins / "events")
    with (
        bpf.Map.from_pin(pins / "events") as adopted,
        pytest.raises(bpf.BpfError, match=r"has no types.*btf\.struct"),
    ):
        adopted.ring("event")
    with rings.ring("events", "struct event") as ring:
        assert "64" in repr(ring) or "number" in repr(ring)


READER = """
import sys, time
from hookline import bpf
obj = bpf.Object.open(sys.argv[1])
with bpf.Map.from_pin(sys.argv[2]) as events:
    ring = events.ring(obj.btf.struct("event"))
print(*ring.read(limit=4)["number"], flush=True)
for record in ring.records():
    print(record["number"], flush=True)
    if record["number"] == 6:
        time.sleep(600)
"""


def test_a_killed_readers_place_is_adopted(
    rings: bpf.Object, compiled: Callable[..., Path], pins: Path
) -> None:
    """A reader that dies by kill -9 in the middle of record 6 loses no record; 6 is given again."""
    rings.maps["events"].pin(pins / "events")
    rings.maps["events_lost"].pin(pins / "events_lost")
    fill(rings, 10)
    command = [sys.executable, "-c", textwrap.dedent(READER), str(compiled("rings")), str(pins / "events")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout
        assert [reader.stdout.readline().strip() for _ in range(4)] == ["0 1 2 3", "4", "5", "6"]
        reader.send_signal(signal.SIGKILL)
        assert reader.wait() == -signal.SIGKILL
    fill(rings, 2, 10)
    with (
        bpf.Map.from_pin(pins / "events") as events,
        bpf.Map.from_pin(pins / "events_lost") as lost,
        events.ring(rings.btf.struct("event"), lost=lost) as ring,
    ):
        assert ring.read()["number"].tolist() == [6, 7, 8, 9, 10, 11]
        assert ring.lost == 0
        fill(rings, FITTING + 1)
        assert ring.lost == 1
