"""What fits into a map: one rule for single values, batches, CPUs and rings; nothing wraps, is cut off or becomes infinite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline import bpf

UNION = np.dtype({"names": ["whole", "half"], "formats": ["<u4", "<u2"], "offsets": [0, 0]})
DTYPES = {
    name: np.dtype(name)
    for name in ("u1", "i1", "<u4", ">u4", "<i4", "<u8", "<i8", "?", "<f4", "<f8", "S3", "V4")
}
DTYPES |= {
    "bytes": np.dtype(("u1", (4,))),
    "grid": np.dtype(("<i2", (2, 2))),
    "words": np.dtype(("<u8", (2,))),
    "names": np.dtype(("S2", (2,))),
    "struct": np.dtype([("a", "<u2"), ("b", ">i4"), ("c", "<f4", (2,))], align=True),
    "union": UNION,
}


@pytest.fixture(scope="module")
def tables() -> Iterator[dict[str, tuple[bpf.Map, bpf.Map]]]:
    """For each dtype a map of such values, and one with a value for each CPU."""
    made = {}
    for name, dtype in DTYPES.items():
        kinds = ("hash", "percpu_hash")
        made[name] = tuple(bpf.Map.create(kind, key="u4", value=dtype, max_entries=8) for kind in kinds)
    yield made  # type: ignore[misc]
    for pair in made.values():
        for one in pair:
            one.close()


def written(table: bpf.Map, value: object, how: str) -> bytes | None:
    """The bytes that are in the map after a value was written, None where it was refused."""
    table.clear()
    try:
        match how:
            case "put":
                table.put(1, value)
            case "list":
                table.write([1], [value])
            case "array":
                table.write([1, 2], np.array([value, value]))
    except bpf.BpfError:
        assert table.used == 0
        return None
    return table.read()[1][:1].tobytes()


NUMBERS = st.one_of(
    st.integers(-(2**65), 2**65),
    st.sampled_from([-1, 0, 1, 2, 255, 256, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]),
    st.floats(),
    st.booleans(),
    st.sampled_from([np.uint8(200), np.int64(-1), np.uint64(2**63 + 1), np.float32(1.5), np.bool_(True)]),
)
PLAIN = NUMBERS | st.text(max_size=4) | st.binary(max_size=8) | st.none() | st.just(1j)
LISTS = st.lists(PLAIN, min_size=1, max_size=4) | st.lists(NUMBERS, min_size=2, max_size=2).flatmap(
    lambda row: st.just([row, row])
)
STRUCTS = st.fixed_dictionaries(
    {}, optional={"a": NUMBERS, "b": NUMBERS, "c": LISTS, "whole": NUMBERS, "half": NUMBERS}
) | st.tuples(NUMBERS, NUMBERS, LISTS)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(sorted(DTYPES)), per_cpu=st.booleans(), value=PLAIN | LISTS | STRUCTS)
def test_writing_takes_what_putting_takes_with_the_same_result(
    tables: dict[str, tuple[bpf.Map, bpf.Map]], name: str, per_cpu: bool, value: Any
) -> None:
    table = tables[name][per_cpu]
    one = written(table, value, "put")
    slot_sized = isinstance(value, bytes) and len(value) != table.value_dtype.itemsize
    if not slot_sized:
        assert written(table, value, "list") == one
    dtype = DTYPES[name]
    if dtype.kind in "iub" and isinstance(value, float):
        assert one is None
    if dtype.kind == "f" and type(value) is float and one is not None:
        found = float(np.frombuffer(one, dtype)[0])
        assert np.isclose(found, value, rtol=1e-6, atol=1e-44, equal_nan=True)
        assert np.isinf(found) == np.isinf(value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whole_numbers_come_back_or_are_refused(
    tables: dict[str, tuple[bpf.Map, bpf.Map]], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([name for name, dtype in DTYPES.items() if dtype.kind in "iu"]))
    limits = np.iinfo(DTYPES[name])
    value = data.draw(st.integers(limits.min - 3, limits.max + 3))
    for table in tables[name]:
        for how in ("put", "list", "array"):
            found = written(table, value, how)
            assert (found is not None) == (limits.min <= value <= limits.max)
            if found is not None:
                assert set(np.frombuffer(found, DTYPES[name]).tolist()) == {value}
                assert np.all(table[1] == value)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["u1", "<u4", ">u4", "<i8", "<u8", "?", "<f4", "<f8"]), value=NUMBERS)
def test_an_array_of_another_dtype_is_held_to_the_same(
    tables: dict[str, tuple[bpf.Map, bpf.Map]], name: str, value: Any
) -> None:
    for table in tables[name]:
        array = np.array([value, value])
        if array.dtype.kind in "biuf":
            assert written(table, value, "array") == written(table, array[0], "put")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_lists_of_64_bits_keep_every_bit(entries: dict[int, int]) -> None:
    with bpf.Map.create("hash", key="u8", value="u8", max_entries=32) as table:
        table.write(list(entries), list(entries.values()))
        assert {int(key): int(value) for key, value in table.items()} == entries
        assert table.remove(list(entries)) == len(entries)
        assert len(table) == 0


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("u4", np.zeros((5, 0), "u4")),
        ("u4", np.array([[1, 9], [3, 9]], "u4")),
        ("u4", np.array(1, "u4")),
        (("u1", (4,)), np.zeros((2, 2, 4), "u1")),
        (("u1", (4,)), np.zeros((2, 3), "u1")),
        (("u1", (4,)), [[300, -1, 256, 1]]),
        ("u8", [2.0**60 + 1]),
        ("u8", np.array([1.0])),
        ("u8", [2**64, 0]),
        ("u4", b"abcd"),
        ("u4", "1"),
        ("u4", 7),
    ],
)
def test_keys_that_are_none(key: Any, keys: Any) -> None:
    with bpf.Map.create("hash", key=key, value="u4", max_entries=9) as table:
        for call in (lambda: table.write(keys, [1] * 5), lambda: table.remove(keys)):
            with pytest.raises(bpf.BpfError, match="the keys of map"):
                call()
        assert len(table) == 0


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        (("u1", (3,)), {1, 2, 3}, "in their order"),
        (("u1", (3,)), "abc", "an array or a sequence"),
        ("S4", "\ud800", "surrogates not allowed"),
        ("f4", 10**400, "would be infinite"),
        ("u4", np.array([1]), r"takes one value|have shape"),
        ("c8", 1j, "takes complex64"),
    ],
)
def test_what_is_no_value(dtype: Any, value: object, said: str) -> None:
    with bpf.Map.create("array", value=dtype, max_entries=2) as made:
        with pytest.raises(bpf.BpfError, match=said) as caught:
            made.put(0, value)
        assert len(str(caught.value)) < 250
        with pytest.raises(bpf.BpfError, match=said):
            made.write([0], [value])


def test_whatever_can_be_gone_through_is_written() -> None:
    numbers = np.arange(3, dtype="u4")
    ways: list[Any] = [
        range(3),
        (n for n in range(3)),
        {0: 1, 1: 1, 2: 1}.keys(),
        numbers[::-1],
        numbers.data,
    ]
    with bpf.Map.create("hash", key="u4", value="u4", max_entries=9) as table:
        for keys in ways:
            table.write(keys, (7, 7, 7))
            assert sorted(table.keys().tolist()) == [0, 1, 2]
            table.clear()


def test_a_batch_that_does_not_fit_says_which(tables: dict[str, tuple[bpf.Map, bpf.Map]]) -> None:
    table = tables["u1"][0]
    with pytest.raises(bpf.BpfError, match=r"^300 does not fit the values of map ''\[2\]: it is a uint8"):
        table.write([1, 2, 3], [0, 1, 300])
    with pytest.raises(bpf.BpfError, match=r"^1\.5 does not fit the values of map ''\[1\]"):
        table.write([1, 2, 3], [0, 1.5, 3])
    with pytest.raises(bpf.BpfError, match="would be infinite"):
        tables["<f4"][0].write([1, 2], [0, 1e300])


def test_members_of_a_union_must_agree(tables: dict[str, tuple[bpf.Map, bpf.Map]]) -> None:
    table = tables["union"][0]
    with pytest.raises(bpf.BpfError, match="contradict each other"):
        table[1] = {"whole": 0x10002, "half": 3}
    table[1] = {"half": 2, "whole": 0x10002}
    assert table[1]["whole"] == 0x10002
    table[2] = table[1]
    assert table[2].tobytes() == table[1].tobytes()


def test_values_of_each_cpu(tables: dict[str, tuple[bpf.Map, bpf.Map]]) -> None:
    cpus = bpf.possible_cpus()
    numbers = list(range(5, 5 + cpus))
    for name in ("<u8", ">u4"):
        table = tables[name][1]
        table[1] = numbers
        table.write([2, 3], [numbers, 9])
        assert [table[key].tolist() for key in (1, 2, 3)] == [numbers, numbers, [9] * cpus]
        with pytest.raises(bpf.BpfError, match="shape"):
            table[1] = [*numbers, 1]


@pytest.mark.parametrize("dtype", [True, "O", [("a", "O"), ("b", "u4")], ("O", (2,)), "nonsense"])
def test_python_objects_are_no_values(dtype: Any) -> None:
    with bpf.Map.create("array", value="u8", max_entries=2) as made:
        with pytest.raises(bpf.BpfError, match=r"cannot be|is no dtype"):
            bpf.Map.from_id(made.id, value=dtype)
        for kind in ("array", "hash", "queue"):
            with pytest.raises(bpf.BpfError, match=r"cannot be|is no dtype"):
                bpf.Map.create(kind, key=None if kind == "queue" else "u4", value=dtype, max_entries=2)
    with bpf.Map.create("ringbuf", max_entries=4096) as ring:
        with pytest.raises(bpf.BpfError, match=r"cannot be|is no dtype"):
            bpf.Ring(ring, dtype)
        with bpf.Ring(ring):
            pass


@pytest.mark.feature("map", "user_ringbuf")
@pytest.mark.parametrize(
    ("dtype", "records", "said"),
    [
        ("u4", [1.7, 2.2], "does not fit"),
        ("u1", [1, 300], r"300 does not fit .*\[1\]"),
        ("?", [2], "it is a bool"),
        ("u4", np.zeros((2, 2), "u4"), "have shape"),
        ([("a", "u4")], [{"b": 1}], "no member 'b'"),
        ("O", [1], "cannot be object"),
        ([], [()], "0 bytes"),
    ],
)
def test_records_that_are_none(dtype: Any, records: Any, said: str) -> None:
    with (
        bpf.Map.create("user_ringbuf", max_entries=4096) as made,
        pytest.raises(bpf.BpfError, match=said),
        bpf.UserRing(made, dtype) as ring,
    ):
        ring.write(records)


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype(">u4"),
        np.dtype("f2"),
        np.dtype("<M8[ns]"),
        np.dtype([("address", ">u4"), ("port", ">u2"), ("ours", "<u2")]),
        np.dtype([("a", "u1"), ("b", "<f8")]),
        np.dtype({"names": ["late", "early"], "formats": ["<u4", "<i4"], "offsets": [4, 0]}),
    ],
)
def test_what_btf_cannot_say_is_bytes_for_others_and_never_wrong(dtype: np.dtype[Any]) -> None:
    raw = bytes(range(1, 1 + dtype.itemsize))
    with bpf.Map.create("hash", key=dtype, value=dtype, max_entries=2) as made:
        made[raw] = raw
        with bpf.Map.from_id(made.id) as again, bpf.Map.from_id(made.id, key=dtype, value=dtype) as told:
            for opened in (told, again):
                assert [found.tobytes() for found in opened.read()] == [raw, raw]
            assert again.key_dtype.itemsize == dtype.itemsize
            for name in dtype.names or ():
                mine, seen = dtype[name], again.key_dtype[name]
                if mine.isnative and mine.kind != "f":
                    assert (mine, dtype.fields[name][1]) == (seen, again.key_dtype.fields[name][1])  # type: ignore[index]
                else:
                    assert seen == np.dtype(("u1", (mine.itemsize,)))


def test_network_order_is_kept_on_this_side() -> None:
    key = np.dtype([("address", ">u4"), ("port", ">u2")])
    with bpf.Map.create("hash", key=key, value="u4", max_entries=2) as made:
        made.write([(0x0A000001, 80)], [1])
        assert made.keys().tolist() == [(0x0A000001, 80)]
        assert made[bytes([10, 0, 0, 1, 0, 80])] == 1
        with bpf.Map.from_id(made.id) as again:
            assert again.keys()[0].tobytes() == bytes([10, 0, 0, 1, 0, 80])
    assert sys.byteorder == "little" or key.isnative


@pytest.mark.parametrize(
    ("flags", "works", "fails", "said"),
    [
        (1 << 3, lambda table: table[0], lambda table: table.put(0, 1), "for reading only"),
        (1 << 3, lambda table: table.read(), lambda table: table.write([0], [1]), "for reading only"),
        (1 << 4, lambda table: table.put(0, 1), lambda table: table[0], "for writing only"),
        (1 << 4, lambda table: table.write([0], [1]), lambda table: table.read(), "for writing only"),
    ],
)
def test_one_way_maps_say_so(flags: int, works: Any, fails: Any, said: str) -> None:
    with bpf.Map.create("array", value="u4", max_entries=2, flags=flags) as made:
        works(made)
        with pytest.raises(bpf.BpfError, match=said) as caught:
            fails(made)
        assert not isinstance(caught.value, bpf.NotPermitted)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("hash", {"key": 4, "value": 4, "max_entries": 1 << 32}, "max_entries=4294967296"),
        ("hash", {"key": 4, "value": 4, "max_entries": -1}, "max_entries=-1"),
        ("hash", {"key": 4, "value": 4, "flags": -1}, "flags=-1"),
        ("bloom_filter", {"value": 4, "extra": 1 << 64}, "extra="),
        ("hash", {"key": -4, "value": 4}, "the key of a map cannot have -4 bytes"),
        ("ringbuf", {"max_entries": 5000}, r"power of two.*max_entries=8192"),
        ("user_ringbuf", {"max_entries": 1000}, r"power of two.*max_entries=4096"),
        ("hash_of_maps", {"key": 4}, "inner="),
        ("hash", {"key": 4, "value": 4, "max_entries": 0}, "no room for any entry"),
        ("hash", {"key": 0, "value": 4}, "keys have no bytes"),
        ("hash", {"key": 4, "value": 0}, "values have no bytes"),
        ("array", {"key": 8, "value": 4}, "numbers of 4 bytes, and not of 8"),
        ("prog_array", {"value": 8}, "values have 4 bytes, and not 8"),
        ("array", {"value": 4, "flags": 1 << 31}, "no array map has 16 entries"),
    ],
)
def test_maps_that_cannot_be_say_why(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        bpf.Map.create(kind, **{"max_entries": 16, **options})


def test_mistakes_are_told_as_such() -> None:
    empty = np.dtype([("a", "<u4"), ("nothing", np.dtype([]))])
    with bpf.Map.create("array", value=empty, max_entries=2) as made:
        with pytest.raises(bpf.BpfError, match="there are absent, present"):
            made.put(0, (1, ()), only="sometimes")  # type: ignore[arg-type]
        made[0] = {"a": 3, "nothing": b""}
        assert made[0]["a"] == 3
    for number in (-1, 1 << 40):
        with pytest.raises(bpf.BpfError, match=f"with id {number}: nothing loaded has this id"):
            bpf.Map.from_id(number)
