"""Maps of values: what a program wrote, Python reads, and the other way round; what no other type does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import bpf

PASS, DROP = 2, 1
PACKET = b"\xff" * 12 + b"\x88\xb5" + bytes(50)


@pytest.fixture
def maps(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("maps")) as obj:
        yield obj.load()


def number(value: Any) -> tuple[int, list[int]]:
    return int(value["number"]), value["words"].tolist()


class Exchange:
    """A program's job, in the object's live ``.bss``."""

    def __init__(self, obj: bpf.Object, name: str) -> None:
        self.program = obj.programs[f"exchange_{name}"]
        self.job = obj.maps[".bss"].view()["job"]

    def run(self, given: int, *, read: int = 0, write: int = 0, wanted: int = 0) -> int:
        self.job[0] = 0
        self.job["given"]["number"], self.job["given"]["words"] = given, [given, given + 1]
        self.job["found"]["number"], self.job["found"]["words"] = wanted, [wanted, wanted + 1]
        self.job["read_key"], self.job["write_key"] = read, write
        verdict = self.program.test_run(PACKET).verdict
        assert self.job["result"][0] == 0
        return verdict

    @property
    def found(self) -> tuple[int, list[int]]:
        return number(self.job["found"][0])


def entry(value: int) -> dict[str, object]:
    return {"number": value, "words": [value, value + 1]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.feature("map", kind))
        for name, kind in (
            ("plain_hash", "hash"),
            ("plain_array", "array"),
            ("cpu_hash", "percpu_hash"),
            ("cpu_array", "percpu_array"),
            ("lru_hash", "lru_hash"),
            ("cpu_lru", "lru_percpu_hash"),
        )
    ],
)
def test_values_go_both_ways(maps: bpf.Object, name: str) -> None:
    table = maps.maps[name]
    exchange = Exchange(maps, name)
    assert table.memory_bytes > 0
    table[3] = entry(30)
    assert exchange.run(40, read=3, write=4) == 1
    assert exchange.found == (30, [30, 31])
    found = table[4]
    if table.per_cpu:
        # The CPU that the program ran on; an array's other values stay zero.
        assert found.shape == (bpf.possible_cpus(),)
        assert sorted(map(number, found)) == [(0, [0, 0])] * (len(found) - 1) + [(40, [40, 41])]
    else:
        assert number(found) == (40, [40, 41])
    keys, values = table.read()
    place = keys.tolist().index(4)
    assert np.array_equal(values[place], found)
    if "array" not in name:
        assert exchange.run(0, read=9, write=4) == 0
        assert table.pop(3)["number"].max() == 30
        assert table.pop(3, "none") == "none"
        with pytest.raises(KeyError):
            table.pop(3)
        assert table.used == len(table) == 1
        assert table.fullness == 1 / 64
    else:
        assert (table.used, table.fullness) == (64, 1.0)
        with pytest.raises(
            bpf.FeatureMissing, match=r"no read-and-remove in one call for \w+ maps.*with del"
        ):
            table.pop(3)


@pytest.mark.feature("map", "lpm_trie")
def test_prefixes_go_both_ways(maps: bpf.Object) -> None:
    routes = maps.maps["routes"]
    routes[(16, b"\x0a\1\0\0")] = entry(16)
    exchange = Exchange(maps, "routes")
    assert exchange.run(24, read=9, write=3) == 1
    assert exchange.found == (16, [16, 17])
    assert number(routes[(24, b"\x0a\1\3\0")]) == (24, [24, 25])
    assert routes.used == 2
    keys, _ = routes.read()
    assert sorted(keys["length"].tolist()) == [16, 24]


def test_one_cpus_value(maps: bpf.Object) -> None:
    for name in ("cpu_hash", "cpu_array", "cpu_lru"):
        table = maps.maps[name]
        table.put(5, entry(1))
        table.put(5, entry(9), cpu=1)
        assert table[5]["number"].tolist() == [1, 9, *[1] * (bpf.possible_cpus() - 2)]
        table.put(6, entry(7), cpu=0)
        assert table[6]["number"].tolist() == [7, *[0] * (bpf.possible_cpus() - 1)]
        for cpu in (-1, bpf.possible_cpus()):
            with pytest.raises(bpf.BpfError, match=rf"no value of CPU {cpu}"):
                table.put(5, entry(1), cpu=cpu)
    with pytest.raises(bpf.BpfError, match=r"no value of CPU 0.*a hash"):
        maps.maps["plain_hash"].put(5, entry(1), cpu=0)


@pytest.mark.feature("map", "queue")
def test_queue(maps: bpf.Object) -> None:
    line = maps.maps["line"]
    exchange = Exchange(maps, "line")
    line.push(entry(1))
    line.push(entry(2))
    assert number(line.peek()) == (1, [1, 2])
    assert exchange.run(3) == 1
    assert exchange.found == (1, [1, 2])
    assert [number(line.pop())[0], number(line.pop())[0]] == [2, 3]
    ends_are_refused(line)


@pytest.mark.feature("map", "stack")
def test_stack(maps: bpf.Object) -> None:
    pile = maps.maps["pile"]
    exchange = Exchange(maps, "pile")
    pile.push(entry(1))
    pile.push(entry(2))
    assert number(pile.peek()) == (2, [2, 3])
    assert exchange.run(3) == 1
    assert exchange.found == (2, [2, 3])
    assert [number(pile.pop())[0], number(pile.pop())[0]] == [3, 1]
    ends_are_refused(pile)


def ends_are_refused(ends: bpf.Map) -> None:
    with pytest.raises(IndexError, match="is empty"):
        ends.pop()
    assert ends.pop(None) is None
    assert ends.peek("none") == "none"
    for value in range(4):
        ends.push(entry(value))
    with pytest.raises(bpf.MapFull, match="is full"):
        ends.push(entry(4))
    ends.push(entry(4), replace_oldest=True)
    assert sorted(number(ends.pop())[0] for _ in range(4)) == [1, 2, 3, 4]
    assert (ends.used, ends.fullness) == (None, None)
    with pytest.raises(bpf.BpfError, match="has no keys"):
        _ = ends[0]
    with pytest.raises(bpf.BpfError, match="has no keys"):
        ends.read()
    with pytest.raises(bpf.BpfError, match=r"cannot add to map.*not a bloom_filter"):
        ends.add(entry(1))
    with pytest.raises(TypeError):
        ends.pop(1, 2)


@pytest.mark.feature("map", "bloom_filter")
def test_bloom_filter(maps: bpf.Object) -> None:
    found = maps.maps["filter"]
    exchange = Exchange(maps, "filter")
    assert entry(5) not in found
    found.add(entry(5))
    assert entry(5) in found
    assert exchange.run(6, wanted=5) == 1
    assert entry(6) in found
    assert exchange.run(6, wanted=1234) == 0
    assert found.used is None
    with pytest.raises(bpf.BpfError, match="cannot push to"):
        found.push(entry(1))
    with pytest.raises(bpf.BpfError, match="not a queue or stack"):
        found.peek()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("outer_array", marks=pytest.mark.feature("map", "array_of_maps")),
        pytest.param("outer_hash", marks=pytest.mark.feature("map", "hash_of_maps")),
    ],
)
def test_maps_of_maps(maps: bpf.Object, name: str) -> None:
    outer, first = maps.maps[name], maps.maps["first"]
    exchange = Exchange(maps, name)
    declared = {"outer_array": {1: first.id}, "outer_hash": {}}[name]
    keys, values = outer.read()
    assert dict(zip(keys.tolist(), values.tolist(), strict=True)) == declared
    outer[1] = first
    first[7] = entry(70)
    assert outer[1] == first.id
    assert exchange.run(80, read=1) == 2
    assert exchange.found == (70, [70, 71])
    with outer.inner(1) as inner:
        assert inner.id == first.id
        assert number(inner[8]) == (80, [80, 81])  # typed by the kernel's BTF
    with bpf.Map.create("hash", key="u4", value=first.value_dtype, max_entries=8, name="second") as second:
        second[7] = entry(700)
        outer.put(1, second)  # replaced at once: a program sees the one or the other
        assert exchange.run(1, read=1) == 2
        assert exchange.found == (700, [700, 701])
        assert outer.used == 1
        outer.write([2, 3], [first, second])
        assert outer.used == 3
        assert outer.fullness == 0.75
        with (
            bpf.Map.create("hash", key="u8", value="u8", max_entries=8) as other,
            pytest.raises(bpf.BpfError),
        ):
            outer[1] = other
    del outer[1]
    assert 1 not in outer
    assert exchange.run(1, read=1) == 0
    with pytest.raises(KeyError):
        outer.inner(1)
    with pytest.raises(bpf.BpfError, match="cannot look for a map in"):
        first.inner(1)
    with pytest.raises(bpf.BpfError, match="a Map is wanted"):
        outer[1] = "hello".join
    # The outer map keeps its inner ones.
    with outer.inner(3) as inner:
        assert number(inner[7]) == (700, [700, 701])


@pytest.mark.feature("map", "prog_array")
def test_program_array(maps: bpf.Object) -> None:
    jumps = maps.maps["jumps"]
    jump = maps.programs["jump"]
    assert jump.test_run(PACKET).verdict == PASS
    jumps[2] = maps.programs["landed"]
    assert jump.test_run(PACKET).verdict == DROP
    assert jumps[2] == maps.programs["landed"].id
    assert (jumps.used, jumps.fullness) == (1, 0.25)
    del jumps[2]
    assert jump.test_run(PACKET).verdict == PASS
    with pytest.raises(KeyError):
        jumps[4] = maps.programs["landed"]
