"""A ring's memory: the order in which it is touched, and records that are not finished.

A program cannot keep a record reserved from one run to the next (the verifier counts references), so no real
ring can be caught with a BUSY record at will. Here the kernel's part is played on ordinary memory laid
out as the kernel lays it out; the real ring is in ``tests/kernel/bpf/test_ring.py``.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hookline import bpf
from hookline.bpf._maps._ring_memory import BUSY, DISCARD, Fences, RingMemory

SIZE, PAGE = 4096, 4096


class Recorded(RingMemory):
    """Ring memory that notes each access and each fence."""

    def __init__(self, consumer: Any, producer: npt.NDArray[np.uint8], data: npt.NDArray[np.uint8]) -> None:
        self.calls: list[str] = []
        fences = Fences("x86_64")
        fences.acquire = lambda: self.calls.append("acquire")
        fences.release = lambda: self.calls.append("release")
        fences.full = lambda: self.calls.append("full")
        super().__init__(consumer, producer, data, fences)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in (
            "load_producer",
            "load_consumer",
            "store_consumer",
            "headers",
            "data",
            "header",
            "record",
        ):
            self.calls.append(name)
        return found


class Image:
    """A ring's three parts in ordinary memory, with the kernel's side of it."""

    def __init__(self) -> None:
        self.consumer = bytearray(PAGE)
        self.producer = bytearray(PAGE)
        self.half = bytearray(SIZE)
        self.data = np.zeros(2 * SIZE, np.uint8)
        self.memory = Recorded(self.consumer, np.frombuffer(self.producer, np.uint8), self.data)

    def reserve(self, length: int, content: bytes, flags: int = BUSY) -> int:
        """Write a record as bpf_ringbuf_reserve does, with its content; returns its position."""
        (position,) = struct.unpack_from("=Q", self.producer)
        padded = content.ljust((length + 7) // 8 * 8, b"\0")
        self.put(position, struct.pack("=II", length | flags, 0) + padded)
        struct.pack_into("=Q", self.producer, 0, position + 8 + len(padded))
        return int(position)

    def commit(self, position: int, length: int, flags: int = 0) -> None:
        self.put(position, struct.pack("=I", length | flags))

    def put(self, position: int, content: bytes) -> None:
        for index, byte in enumerate(content):
            place = (position + index) % SIZE
            self.data[place] = self.data[place + SIZE] = byte

    def ring(self, dtype: str | None) -> bpf.Ring:
        """A reader of the image: all of `Ring` but its descriptor."""
        ring = bpf.Ring.__new__(bpf.Ring)
        ring.name, ring.size, ring.dtype = "image", SIZE, None if dtype is None else np.dtype(dtype)
        ring._memory, ring._handed_out, ring._fd = self.memory, None, -1
        return ring


@pytest.fixture
def image() -> Image:
    return Image()


def number(value: int) -> bytes:
    return struct.pack("=Q", value)


def test_the_order_of_a_batch(image: Image) -> None:
    for value in range(3):
        image.reserve(8, number(value), flags=0)
    assert image.ring("u8").read().tolist() == [0, 1, 2]
    assert image.memory.calls == [
        "load_consumer",
        "load_producer",
        "acquire",
        "headers",
        "acquire",
        "data",
        "release",
        "store_consumer",
    ]


def test_the_order_of_single_records(image: Image) -> None:
    image.reserve(8, number(1), flags=0)
    image.reserve(3, b"abc", flags=DISCARD)
    image.reserve(2, b"xy", flags=0)
    assert list(image.ring(None).records()) == [number(1), b"xy"]
    consume = ["release", "store_consumer"]
    look = ["header", "acquire"]
    assert image.memory.calls == [
        "load_producer",
        "acquire",
        "load_consumer",
        *look,
        "record",
        *consume,
        "load_consumer",
        *look,
        *consume,
        *look,
        "record",
        *consume,
        "load_consumer",
    ]


def test_the_order_before_sleeping(image: Image) -> None:
    ring = image.ring("u8")
    image.reserve(8, number(1), flags=0)
    ring.read()
    assert not ring._ready()
    assert image.memory.calls[-4:] == ["store_consumer", "full", "load_consumer", "load_producer"]
    image.reserve(8, number(2), flags=0)
    assert ring._ready()
    assert image.memory.calls[-5:] == ["full", "load_consumer", "load_producer", "acquire", "header"]


def test_reading_stops_at_a_record_that_is_not_finished(image: Image) -> None:
    ring = image.ring("u8")
    image.reserve(8, number(1), flags=0)
    second = image.reserve(8, number(2))
    image.reserve(8, number(3), flags=0)
    assert ring.read().tolist() == [1]
    assert ring.read().tolist() == []
    assert list(ring.records()) == []
    assert not ring._ready()
    assert struct.unpack_from("=Q", image.consumer) == (16,)
    image.commit(second, 8)
    assert ring._ready()
    assert ring.read().tolist() == [2, 3]
    # Of another size, and not finished: not yet an error.
    odd = image.reserve(5, b"12345")
    assert ring.read().tolist() == []
    image.commit(odd, 5)
    with pytest.raises(bpf.BpfError, match="a record of 5 bytes"):
        ring.read()
    assert struct.unpack_from("=Q", image.consumer) == (48,)


@pytest.mark.parametrize("finish", [0, DISCARD])
def test_a_slow_record_holds_up_those_behind_it_at_any_place(image: Image, finish: int) -> None:
    ring = image.ring("u8")
    value = 0
    for place in range(600):
        positions = [image.reserve(8, number(value + index)) for index in range(3)]
        for position in positions[1:]:
            image.commit(position, 8)
        assert ring.read().tolist() == [], place
        image.commit(positions[0], 8, finish)
        expected = [value, value + 1, value + 2][1 if finish else 0 :]
        assert ring.read().tolist() == expected, place
        value += 3
    assert image.memory.load_consumer() == 600 * 3 * 16 > 2 * SIZE


def test_processors_that_reorder_get_real_fences(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """libatomic's fences work here too: the whole path of an arm64 machine but for its processor."""
    fences = Fences("aarch64")
    memory = RingMemory(image.consumer, np.frombuffer(image.producer, np.uint8), image.data, fences)
    assert memory.acquire is not Fences("x86_64").acquire
    ring = image.ring("u8")
    ring._memory = memory
    image.reserve(8, number(5), flags=0)
    assert ring.read().tolist() == [5]
    for fence in (fences.acquire, fences.release, fences.full):
        assert fence() is None

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(bpf.BpfError, match="apt-get install libatomic1"):
        Fences("aarch64")
    Fences("x86_64")
