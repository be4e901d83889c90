"""Maps made from Python: of every type, typed for everyone who opens them; values of any dtype come back whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hookline import bpf
from hookline.bpf._types._codec import canonical
from tests.requirements import missing_program, need

VALUE = np.dtype(
    {
        "names": ["number", "flag", "name", "grid", "share", "nested"],
        "formats": [
            "<i8",
            "?",
            "S5",
            ("<u2", (2, 3)),
            "<u8",
            np.dtype([("a", "u1"), ("b", "<i4")], align=True),
        ],
        "offsets": [0, 8, 9, 14, 32, 40],
        "itemsize": 48,
    }
)


def test_types_are_kept_for_who_opens_it_later(pins: Path) -> None:
    key = np.dtype([("address", "<u4"), ("port", "<u2")])
    with bpf.Map.create("hash", key=key, value=VALUE, max_entries=8, name="made-by_python_itself") as made:
        assert (made.name, made.type, made.max_entries) == ("made-by_python_itself", "hash", 8)
        made[(1, 2)] = {
            "number": -3,
            "flag": True,
            "name": b"abc",
            "grid": [[1, 2, 3], [4, 5, 6]],
            "share": 1 << 40,
        }
        made.pin(pins / "made")
        with bpf.Map.from_pin(pins / "made") as again:
            assert again.name == "made_by_python_"
            assert again.key_dtype.names == key.names
            assert again.value_dtype == VALUE
            found = again[(1, 2)]
            assert found["number"] == -3
            assert found["name"] == b"abc"
            assert found["grid"].tolist() == [[1, 2, 3], [4, 5, 6]]
            assert (found["flag"], found["share"]) == (True, 1 << 40)
        need("kernel", missing_program("bpftool"))
        output = subprocess.run(
            ["bpftool", "-j", "map", "dump", "id", str(made.id)], check=True, capture_output=True, text=True
        ).stdout
        (entry,) = json.loads(output)
        assert entry["formatted"]["key"] == {"address": 1, "port": 2}
        assert entry["formatted"]["value"]["grid"] == [[1, 2, 3], [4, 5, 6]]
        assert entry["formatted"]["value"]["number"] == -3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hash", {"key": 4, "value": 8}),
        ("array", {"value": 8}),
        ("percpu_hash", {"key": 4, "value": 12}),
        ("percpu_array", {"value": "u4"}),
        ("lru_hash", {"key": "u4", "value": "u8"}),
        ("lru_percpu_hash", {"key": "u4", "value": "u8"}),
        ("lpm_trie", {"key": [("length", "u4"), ("address", "u1", 4)], "value": "u4"}),
        ("lpm_trie", {"key": 8, "value": "u4"}),
        ("prog_array", {}),
        ("perf_event_array", {}),
        ("cgroup_array", {}),
        ("stack_trace", {}),
        ("devmap", {}),
        ("devmap_hash", {}),
        ("cpumap", {"max_entries": 2}),
        ("sockmap", {}),
        ("sockhash", {"key": 4}),
        ("xskmap", {}),
        ("reuseport_sockarray", {}),
        ("queue", {"value": VALUE}),
        ("stack", {"value": 4}),
        ("bloom_filter", {"value": 4, "extra": 3}),
        ("ringbuf", {"max_entries": 4096}),
        ("sk_storage", {"value": "u8", "max_entries": 0}),
        ("task_storage", {"value": VALUE, "max_entries": 0}),
    ],
)
def test_every_type(kind: str, options: dict[str, Any]) -> None:
    with bpf.Map.create(kind, **{"max_entries": 16, "name": "made", **options}) as made:
        assert made.type == kind
        with bpf.Map.from_id(made.id) as again:
            assert again.definition.type == kind
            assert again.definition.max_entries == options.get("max_entries", 16)
        if "extra" in options:
            assert made.definition.extra == 3
        if isinstance(options.get("value"), np.dtype):
            assert made.value_dtype == VALUE


def test_maps_of_maps() -> None:
    with (
        bpf.Map.create("array", value=[("number", "u8")], max_entries=4) as inner,
        bpf.Map.create("array_of_maps", max_entries=2, inner=inner) as by_index,
        bpf.Map.create("hash_of_maps", key="S8", max_entries=2, inner=inner) as by_name,
    ):
        inner[2] = (5,)
        by_index[0] = inner
        by_name["blue"] = inner
        for outer, key in ((by_index, 0), (by_name, "blue")):
            with outer.inner(key) as found:
                assert found[2]["number"] == 5
        with by_index.inner(0, value="i8") as found:
            assert found[2] == 5
        assert by_index.fullness == 0.5


def test_a_ring_without_an_object() -> None:
    with bpf.Map.create("ringbuf", max_entries=4096) as made, made.ring() as ring:
        assert ring.backlog.bytes == 0
        assert list(ring.records()) == []


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("hahs", {}, "did you mean 'hash'"),
        ("hash", {"value": 4}, "needs a key"),
        ("hash", {"key": 4}, "needs a value"),
        ("hash", {"key": 4, "value": 4, "max_entries": 0}, "cannot make the hash map 'made'"),
        ("ringbuf", {"max_entries": 1000}, "cannot make the ringbuf map"),
        ("array", {"key": 8, "value": 4}, "cannot make the array map"),
        ("array_of_maps", {}, "array_of_maps needs an inner map"),
    ],
)
def test_what_cannot_be_made(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        bpf.Map.create(kind, **{"max_entries": 16, "name": "made", **options})


def test_dtypes_that_btf_cannot_say() -> None:
    """Overlapping members and names that are none in C: this handle knows them, the kernel keeps sizes."""
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["u4", "u2"], "offsets": [0, 2], "itemsize": 8})
    odd = np.dtype([("not a name", "u4"), ("b", "u4")])
    union = np.dtype({"names": ["whole", "halves"], "formats": ["<u8", ("<u4", 2)], "offsets": [0, 0]})
    crooked = np.dtype([("a", "u1"), ("b", "<f4")])
    for dtype, kept in ((overlapping, False), (odd, False), (crooked, False), (union, True)):
        with bpf.Map.create("array", value=dtype, max_entries=2) as made, bpf.Map.from_id(made.id) as again:
            assert made.value_dtype == dtype
            assert (again.value_dtype == dtype) is kept
            with bpf.Map.from_id(made.id, value=dtype) as told:
                made[0] = {dtype.names[-1]: [1, 2] if dtype is union else 9}  # type: ignore[index]
                assert told[0] == made[0]
    with (
        bpf.Map.create("array", value=8, max_entries=2) as made,
        bpf.Map.from_id(made.id, value="u4") as wrong,
        pytest.raises(bpf.BpfError, match="has 8 bytes"),
    ):
        _ = wrong[0]


# Round trips: any keys and values that a dtype can hold.


def scalars() -> st.SearchStrategy[np.dtype[Any]]:
    return st.sampled_from(
        [np.dtype(name) for name in ("u1", "<u2", "<u4", "<u8", "<i2", "<i4", "<i8", "?", "S3", "<f8", "<f4")]
    )


def dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    nested = hypothesis.extra.numpy.nested_dtypes(scalars(), max_leaves=5, max_itemsize=64)
    aligned = nested.map(
        lambda found: np.dtype({"names": ["all"], "formats": [found], "itemsize": found.itemsize + 3})
    )
    return (nested | aligned).filter(lambda found: found.itemsize > 0 and found.subdtype is None)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Any, Any]:
    """Distinct keys and as many values."""
    key, value = draw(dtypes()), draw(dtypes())
    count = draw(st.integers(1, 20))
    keys = draw(hypothesis.extra.numpy.arrays(key, count))
    values = draw(hypothesis.extra.numpy.arrays(value, count))
    keys = canonical(keys)
    _, places = np.unique(np.array([one.tobytes() for one in keys], object), return_index=True)
    return keys[np.sort(places)], values[np.sort(places)]


@settings(max_examples=40, deadline=None, report_multiple_bugs=False, phases=(Phase.explicit, Phase.generate))
@given(tables())
def test_values_come_back(table: tuple[Any, Any]) -> None:
    keys, values = table
    for kind in ("hash", "percpu_hash"):
        with bpf.Map.create(kind, key=keys.dtype, value=values.dtype, max_entries=64) as made:
            made.write(keys, values)
            assert made.used == len(keys)
            got_keys, got = made.read()
            place = {canonical(got_keys[i : i + 1]).tobytes(): i for i in range(len(keys))}
            for key, value in zip(keys, values, strict=True):
                raw = canonical(np.array([key], keys.dtype)).tobytes()
                one = got[place[raw]]
                single = made[raw]
                expected = canonical(np.array([value], values.dtype)).tobytes()
                for seen in (one, single):
                    for of_cpu in seen if kind == "percpu_hash" else [seen]:
                        assert canonical(np.array([of_cpu], values.dtype)).tobytes() == expected
            with bpf.Map.from_id(made.id) as again:
                assert len(again.keys()) == len(keys)
            if kind == "hash":
                raw = canonical(np.array([keys[0]], keys.dtype)).tobytes()
                made.pop(raw)
                assert raw not in made
            made.clear()
            assert made.used == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.sampled_from(["queue", "stack"]))
def test_queues_and_stacks_keep_their_order(numbers: list[int], kind: str) -> None:
    with bpf.Map.create(kind, value="u8", max_entries=32) as made:
        for number in numbers:
            made.push(number)
        taken = [int(made.pop()) for _ in numbers]
        assert taken == (numbers if kind == "queue" else numbers[::-1])
        assert made.pop(None) is None


@pytest.fixture
def batchless() -> Iterator[Callable[..., bpf.Map]]:
    made: list[bpf.Map] = []

    def make(kind: str, **options: Any) -> bpf.Map:
        made.append(bpf.Map.create(kind, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_writing_and_reading_without_batches(batchless: Callable[..., bpf.Map]) -> None:
    """Types that know no batch calls are read and written entry by entry, by the same calls."""
    devices = batchless("devmap_hash", key="u4", max_entries=8)
    devices.write([1, 2], ["lo", ("lo", None)])
    keys, values = devices.read()
    assert sorted(keys.tolist()) == [1, 2]
    assert values["ifindex"].tolist() == [1, 1]
    assert devices.remove([1, 5]) == 1
    devices.clear()
    assert devices.used == 0
    with pytest.raises(ValueError, match="shorter"):
        devices.write([1, 2], ["lo"])


def test_values_that_are_arrays() -> None:
    """Also of an odd size, per CPU, by batch, for one CPU, and as memory."""
    cpus = bpf.possible_cpus()
    address = np.dtype(("u1", (6,)))
    with bpf.Map.create("percpu_array", value=address, max_entries=3) as made:
        each = np.arange(cpus * 6, dtype="u1").reshape(cpus, 6)
        made[1] = each
        assert made[1].tolist() == each.tolist()
        made.put(1, b"abcdef", cpu=1)
        assert made[1].tolist() == [each[0].tolist(), list(b"abcdef"), *each[2:].tolist()]
        made.write([2], [each])
        assert made.read()[1].tolist() == [[[0] * 6] * cpus, made[1].tolist(), each.tolist()]
        made[0] = (1, 2, 3, 4, 5, 6)
        assert made[0].tolist() == [[1, 2, 3, 4, 5, 6]] * cpus
        with pytest.raises(bpf.BpfError):
            made[0] = each[:-1]
    with bpf.Map.create("array", value=address, max_entries=3, flags=1 << 10) as made:
        view = made.view()
        assert view.shape == (3, 6)
        view[2] = list(b"uvwxyz")
        assert bytes(made[2]) == b"uvwxyz"
        made[1] = b"abcdef"
        assert bytes(view[1]) == b"abcdef"


def test_what_cannot_be_emptied_while_it_is_read() -> None:
    with (
        bpf.Map.create("array", value=4, max_entries=3) as made,
        pytest.raises(bpf.FeatureMissing, match="no read-and-empty in one call for array maps"),
    ):
        made.drain()


def test_fullness() -> None:
    with bpf.Map.create("hash", key="u4", value="u8", max_entries=1000) as made:
        assert made.fullness == 0.0
        made.write(np.arange(250), np.arange(250))
        assert (made.used, made.fullness) == (250, 0.25)
        made.write(np.arange(1000), np.arange(1000))
        assert made.fullness == 1.0
        with pytest.raises(bpf.MapFull):
            made[1000] = 1
    with bpf.Map.create("lru_hash", key="u4", value="u8", max_entries=1024) as made:
        made.write(np.arange(5000), np.arange(5000))
        assert made.fullness is not None
        assert 0.5 < made.fullness <= 1
    with bpf.Map.create("ringbuf", max_entries=4096) as made:
        assert (made.used, made.fullness) == (None, None)
