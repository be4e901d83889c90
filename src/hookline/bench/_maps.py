"""What hookline.bpf does in bulk, beside the way that is open to everybody: rings, maps, loading, importing."""

from __future__ import annotations

import ctypes
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hookline import bpf
from hookline.bench._groups import LeftOutError
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.bench._starts import python, timed
from hookline.errors import HooklineError

OBJECT = Path(__file__).with_name("measured.bpf.o")
EVENTS, RING_BYTES = 200_000, 16 << 20
ENTRIES = 65_536
SAMPLE = 4_096
ROUNDS = 11
_JOB = np.dtype([("count", np.uint32), ("called", np.uint32)])


def ring_rows(settings: Settings) -> Iterator[Row]:
    """Events of 64 bytes taken out of a ring and their sizes added up."""
    with bpf.Object.open(OBJECT) as obj:
        for name in ("mapped", "called"):
            obj.resize(name, RING_BYTES)
        obj.load()
        with obj.ring("mapped", "event") as ring, _CalledRing(obj.maps["called"].fd) as called:

            def mapped() -> float:
                _run(obj, "fill", EVENTS)
                start = time.perf_counter()
                count = total = 0
                while len(events := ring.read()):
                    count += len(events)
                    total += int(events["bytes"].sum())
                return _rate("mapped", count, total, time.perf_counter() - start)

            def by_callback() -> float:
                _run(obj, "fill", EVENTS, called=1)
                called.count = called.total = 0
                start = time.perf_counter()
                called.consume()
                return _rate("called", called.count, called.total, time.perf_counter() - start)

            ours, theirs = settings.in_turn("ring-consume", ROUNDS, mapped, by_callback)
    yield row(
        "ring-consume",
        "M/s",
        ours,
        reference=f"libbpf's ring_buffer with a ctypes callback, {statistics.median(theirs):.2f} M/s",
        reference_values=theirs,
        method=f"{EVENTS:,} events of 64 bytes a round, written before the clock starts; both add up a member; {settings.where}",
        goal="≥ 15 M events/s",
        least=15.0,
    )


def _rate(name: str, count: int, total: int, seconds: float) -> float:
    """Millions a second, once it is sure that all events came through."""
    wanted = sum(range(256)) * (EVENTS // 256) + sum(range(EVENTS % 256))
    if (count, total) != (EVENTS, wanted):
        raise HooklineError(
            f"ring {name} gave {count:,} events of {EVENTS:,}", why=f"their sum is {total:,}, not {wanted:,}"
        )
    return count / seconds / 1e6


class _Event(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("words", ctypes.c_uint32 * 12))


class _CalledRing:
    """libbpf's own reader, as a Python program would use it: called for every event, which it decodes and counts."""

    def __init__(self, fd: int) -> None:
        self.count = self.total = 0
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._callback = kind(self._take)
        self._library = ctypes.CDLL("libbpf.so.1")
        self._library.ring_buffer__new.restype = ctypes.c_void_p
        self._library.ring_buffer__new.argtypes = [ctypes.c_int, kind, ctypes.c_void_p, ctypes.c_void_p]
        self._library.ring_buffer__consume.argtypes = [ctypes.c_void_p]
        self._library.ring_buffer__free.argtypes = [ctypes.c_void_p]
        self._library.ring_buffer__free.restype = None
        self._ring = self._library.ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            raise HooklineError("libbpf cannot read the ring")

    def _take(self, context: int, data: int, size: int) -> int:
        event = _Event.from_address(data)
        self.count += 1
        self.total += event.bytes
        return 0

    def consume(self) -> None:
        """Reads all that is there."""
        self._library.ring_buffer__consume(self._ring)

    def __enter__(self) -> _CalledRing:
        return self

    def __exit__(self, *error: object) -> None:
        self._library.ring_buffer__free(self._ring)


def read_rows(settings: Settings) -> Iterator[Row]:
    """A per-CPU hash read whole and summed over CPUs and entries."""
    with bpf.Object.open(OBJECT) as obj:
        obj.only("fill_flows")
        obj.resize("flows", ENTRIES)
        obj.load()
        flows = obj.maps["flows"]
        _run(obj, "fill_flows", ENTRIES)
        expected = ENTRIES * (ENTRIES - 1) // 2
        sample = [int(key) for key in flows.read()[0][:SAMPLE]]

        def whole() -> float:
            start = time.perf_counter()
            keys, values = flows.read()
            total = int(values["bytes"].sum())
            took = time.perf_counter() - start
            if (len(keys), total) != (ENTRIES, expected):
                raise HooklineError(f"the map gave {len(keys):,} of {ENTRIES:,} entries, their sum {total:,}")
            return took * 1e3

        def one_by_one() -> float:
            start = time.perf_counter()
            total = 0
            for key in sample:
                total += int(flows[key]["bytes"].sum())
            took = time.perf_counter() - start
            if total != sum(sample):
                raise HooklineError(f"the entries' sum is {total:,}, not {sum(sample):,}")
            return took * 1e3 * ENTRIES / SAMPLE

        ours, single = settings.in_turn("percpu-hash-read", ROUNDS, whole, one_by_one)
    yield row(
        "percpu-hash-read",
        "ms",
        ours,
        reference=f"entry by entry, {statistics.median(single):,.0f} ms",
        reference_values=single,
        method=f"{ENTRIES:,} entries of 16 bytes on each CPU; entry by entry: {SAMPLE:,} of them, scaled; {settings.where}",
        goal="≤ 65 ms for 65,536 entries",
        most=65.0,
    )


def write_rows(settings: Settings) -> Iterator[Row]:
    """Entries of a hash written by batch."""
    keys = np.arange(ENTRIES, dtype=np.uint32)
    with bpf.Object.open(OBJECT) as obj:
        obj.only("fill_flows")
        obj.resize("table", ENTRIES)
        obj.load()
        table = obj.maps["table"]
        values = np.zeros(ENTRIES, table.value_dtype)
        values["bytes"] = keys
        plain = [(int(key), values[key]) for key in keys[:SAMPLE]]

        def batch() -> float:
            values["packets"] += 1
            start = time.perf_counter()
            table.write(keys, values)
            return ENTRIES / (time.perf_counter() - start) / 1e6

        def one_by_one() -> float:
            start = time.perf_counter()
            for key, value in plain:
                table[key] = value
            return SAMPLE / (time.perf_counter() - start) / 1e6

        ours, single = settings.in_turn("batch-update", ROUNDS, batch, one_by_one)
        written = table.read()
        if len(written[0]) != ENTRIES:
            raise HooklineError(f"the map holds {len(written[0]):,} of {ENTRIES:,} entries")
    yield row(
        "batch-update",
        "M/s",
        ours,
        reference=f"entry by entry, {statistics.median(single):.2f} M/s",
        reference_values=single,
        method=f"{ENTRIES:,} entries of 4 + 16 bytes that exist; entry by entry: {SAMPLE:,} of them; {settings.where}",
        goal="≥ 1 M entries/s",
        least=1.0,
    )


def load_rows(settings: Settings) -> Iterator[Row]:
    """The object of five programs, opened, loaded and closed again."""
    bpftool = shutil.which("bpftool")
    if bpftool is None:
        raise LeftOutError("bpftool is not installed (apt-get install bpftool)")
    pins = bpf.pin.BPFFS / f"hookline-bench-{secrets.token_hex(3)}"

    def ours() -> float:
        start = time.perf_counter()
        with bpf.Object.open(OBJECT) as obj:
            obj.load()
        return (time.perf_counter() - start) * 1e3

    def theirs() -> float:
        try:
            return timed([bpftool, "prog", "loadall", str(OBJECT), str(pins)])
        finally:
            _unpin(pins)

    bpf.ensure_bpffs()
    loaded, bpftools, starts = settings.in_turn(
        "object-load", ROUNDS, ours, theirs, lambda: timed([bpftool, "version"])
    )
    yield row(
        "object-load",
        "ms",
        loaded,
        reference=f"bpftool prog loadall, {statistics.median(bpftools):.1f} ms",
        reference_values=bpftools,
        method=(
            f"five programs and six maps; ours in a process that runs, closing included; bpftool's start "
            f"({statistics.median(starts):.1f} ms) and pins included; {settings.where}"
        ),
    )


def _unpin(folder: Path) -> None:
    if folder.exists():
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()


def import_rows(settings: Settings) -> Iterator[Row]:
    """``import hookline.bpf``, less the start of Python itself."""
    empty: list[float] = []
    with python() as fresh:

        def less_empty(code: str) -> float:
            empty.append(fresh.timed("pass"))
            return fresh.timed(code) - empty[-1]

        ours, numpys = settings.in_turn(
            "import-bpf", 15, lambda: less_empty("import hookline.bpf"), lambda: less_empty("import numpy")
        )
    yield row(
        "import-bpf",
        "ms",
        ours,
        reference=f"an empty Python start, {statistics.median(empty):.0f} ms",
        reference_values=empty,
        method=(
            f"a process that imports, less an empty one started just before it; modules compiled; importing NumPy alone takes "
            f"{statistics.median(numpys):.0f} ms of it; {settings.where}"
        ),
        goal="≤ 100 ms",
        most=100.0,
    )


def _run(obj: bpf.Object, program: str, count: int, called: int = 0) -> None:
    job: Any = np.array((count, called), _JOB)
    obj.programs[program].test_run(context=job.tobytes())
