"""Maps: typed access, batches, per-CPU values, views, limits."""

from __future__ import annotations

import numpy as np
import pytest

from hookline import bpf
from hookline.bpf._types._codec import canonical

KEYS = ("table_hash", "words_hash", "lazy_hash", "cpu_hash", "lru", "cpu_lru", "macs")


def test_keys_and_values_in_every_form(loaded: bpf.Object) -> None:
    table = loaded.maps["table_hash"]
    table[{"address": 1, "port": 2, "protocol": 6}] = {
        "first": 255,
        "counter": 1 << 63,
        "nested": {"flag": 1, "number": 2},
        "pair": [(1, 2), {"flag": 3}],
        "mac": b"\x02\0\0\0\0\1",
        "comm": "python",
        "grid": [[1, 2, 3], [4, 5, 6]],
        "dark": -1,
        "wide": 1 << 32,
        "yes": True,
        "negative": -5,
        "v6": bytes(range(16)),
        "named_union": {"halves": (1, 2)},
        "unnamed_type": (7, 8),
        "last": 9,
    }
    value = table[(1, 2, 6)]
    assert value["first"] == 255
    assert value["counter"] == 1 << 63
    assert value["nested"].tolist() == (1, 2)
    assert value["pair"].tolist() == [(1, 2), (3, 0)]
    assert value["mac"].tobytes() == b"\x02\0\0\0\0\1"
    assert value["comm"] == b"python"
    assert value["grid"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (value["dark"], value["wide"], value["yes"], value["negative"]) == (-1, 1 << 32, True, -5)
    assert value["v4"] == 0x03020100
    assert value["named_union"]["whole"] == 1 + (2 << 32)
    assert value["unnamed_type"].tolist() == (7, 8)
    scalar = np.zeros(1, table.key_dtype)[0]
    scalar["address"], scalar["port"], scalar["protocol"] = 1, 2, 6
    assert table[scalar]["last"] == 9
    assert table[scalar.tobytes()]["last"] == 9
    assert (1, 2, 6) in table
    assert (1, 2, 7) not in table
    table[(9, 9, 9)] = value
    assert table[(9, 9, 9)].tobytes() == value.tobytes()
    del table[(1, 2, 6)]
    with pytest.raises(KeyError):
        del table[(1, 2, 6)]
    with pytest.raises(KeyError):
        _ = table[(1, 2, 6)]
    assert table.get((1, 2, 6), "none") == "none"
    assert len(table) == 1


def test_padding_of_keys_never_matters(loaded: bpf.Object) -> None:
    table = loaded.maps["table_hash"]
    dirty = np.frombuffer(b"\1\0\0\0\2\0\6\xff", table.key_dtype)
    table[dirty[0]] = {"last": 3}
    assert table[(1, 2, 6)]["last"] == 3
    table.write(np.repeat(dirty, 1), np.zeros(1, table.value_dtype))
    assert len(table) == 1
    assert table.remove(dirty) == 1
    assert len(table) == 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (b"short", {}, "takes 8 bytes"),
        (5, {}, "takes address, port, protocol"),
        ((1, 2), {}, "has 3 members"),
        ({"adress": 1}, {}, "did you mean 'address'"),
        ((1, 70000, 6), {}, "from 0 to 65535"),
        ((1, 2, 6), (1, 2), "holds a union"),
        ((1, 2, 6), {"comm": "x" * 17}, "it has 16 bytes"),
        ((1, 2, 6), {"mac": b"12345"}, "takes 6 bytes"),
        ((1, 2, 6), {"pair": [1]}, "takes 2 elements"),
        ((1, 2, 6), {"grid": [1, 2, 3]}, "shape"),
        ((1, 2, 6), {"yes": "no"}, "takes a number"),
    ],
)
def test_what_does_not_fit_is_refused(loaded: bpf.Object, key: object, value: object, said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        loaded.maps["table_hash"][key] = value
    assert len(loaded.maps["table_hash"]) == 0


@pytest.mark.parametrize("name", KEYS)
def test_a_batch_reads_what_a_batch_wrote(loaded: bpf.Object, name: str) -> None:
    table = loaded.maps[name]
    count = min(table.max_entries, 100)
    keys = np.zeros((count, table.key_dtype.itemsize), np.uint8)
    keys[:, 0] = np.arange(count)
    keys = keys.view(table.key_dtype) if table.key_dtype.subdtype is None else keys
    keys = keys.reshape(count, *(table.key_dtype.subdtype or (None, ()))[1])
    values = np.zeros(count, table.value_dtype)
    first = values if values.dtype.names is None else values[values.dtype.names[-1]]
    first[...] = np.arange(count)
    table.write(keys, values)
    assert len(table) == count
    got_keys, got = table.read()
    assert got.shape == ((count, bpf.possible_cpus()) if table.per_cpu else (count,))
    order = np.argsort([key.tobytes()[0] for key in got_keys])
    expected = np.repeat(values[:, None], bpf.possible_cpus(), axis=1) if table.per_cpu else values
    # NumPy leaves padding unset when it picks elements.
    assert canonical(got[order]).tobytes() == canonical(expected).tobytes()
    assert {key.tobytes() for key, _ in table.items()} == {key.tobytes() for key in keys}
    assert table.remove(np.concatenate([keys[:3], keys[:3], keys[count - 1 :]])) == 4
    assert len(table) == count - 4
    drained, _ = table.drain()
    assert len(drained) == count - 4
    assert len(table) == 0
    assert table.read()[1].shape == got[:0].shape
    table.write(keys[:0], values[:0])
    table.clear()


def test_reading_spans_many_batches(
    kinds: object, loaded: bpf.Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = loaded.maps["words_hash"]
    words.write(np.arange(1000), np.arange(1000) * 3)
    from hookline.bpf._maps import _map_batch

    monkeypatch.setattr(_map_batch, "_CHUNK_BYTES", 64)
    keys, values = words.read()
    assert len(keys) == 1000
    assert np.array_equal(values, keys.astype(np.uint64) * 3)
    monkeypatch.setattr("builtins.max", lambda *numbers: sorted(numbers)[-1] if 256 not in numbers else 1)
    keys, _ = words.read()
    assert sorted(keys.tolist()) == list(range(1000))


def test_arrays(loaded: bpf.Object) -> None:
    words = loaded.maps["words_array"]
    words[3] = 33
    assert words[3] == 33
    assert len(words) == 10
    assert words.read()[1].tolist() == [0, 0, 0, 33, 0, 0, 0, 0, 0, 0]
    words.write([1, 2], [11, 22])
    assert words.values().tolist()[:4] == [0, 11, 22, 33]
    with pytest.raises(KeyError):
        words[10] = 1
    with pytest.raises(KeyError):
        _ = words[10]
    with pytest.raises(KeyError):
        words.write([9, 10], [1, 2])
    with pytest.raises(bpf.BpfError, match="cannot remove"):
        del words[3]
    odd = loaded.maps["odd_array"]
    odd[2] = {"length": 24, "address": b"\x0a\0\0\0"}
    assert odd.read()[1][2]["address"].tobytes() == b"\x0a\0\0\0"


def test_per_cpu_values(loaded: bpf.Object) -> None:
    cpus = bpf.possible_cpus()
    for name in ("cpu_array", "cpu_hash"):
        counters = loaded.maps[name]
        one = np.zeros(cpus, counters.value_dtype)
        field = one if one.dtype.names is None else one["number"]
        field[...] = np.arange(1, cpus + 1)
        counters[4] = one
        assert counters[4].shape == (cpus,)
        assert counters[4].tobytes() == one.tobytes()
        counters[5] = 7 if one.dtype.names is None else (1, 7)
        same = counters[5] if one.dtype.names is None else counters[5]["number"]
        assert same.tolist() == [7] * cpus
        counters.write([4], one[None])
        keys, values = counters.read()
        assert values.shape == (len(keys), cpus)
        assert values[keys.tolist().index(4)].tobytes() == one.tobytes()
        with pytest.raises(bpf.BpfError, match="have shape"):
            counters.write([4], np.zeros((1, cpus + 1), counters.value_dtype))


def test_longest_prefix(loaded: bpf.Object) -> None:
    routes = loaded.maps["routes"]
    routes[(8, b"\x0a\0\0\0")] = 8
    routes[{"length": 24, "address": (10, 1, 2, 0)}] = 24
    assert routes[(32, b"\x0a\1\2\3")] == 24
    assert routes[(32, b"\x0a\2\2\3")] == 8
    with pytest.raises(KeyError):
        _ = routes[(32, b"\x0b\0\0\0")]
    assert len(routes) == 2
    routes[(0, bytes(4))] = 0
    routes[(1, bytes(4))] = 1
    with pytest.raises(bpf.MapFull, match=r"'routes' is full.*at most 4.*resize"):
        routes[(2, bytes(4))] = 2


def test_full_maps_say_so(loaded: bpf.Object) -> None:
    for name in ("words_hash", "lazy_hash"):
        words = loaded.maps[name]
        size = words.max_entries
        words.write(np.arange(size), np.arange(size))
        with pytest.raises(bpf.MapFull, match=rf"map '{name}' is full.*at most {size} entries.*resize"):
            words[size] = 1
        words[size - 1] = 5
        del words[0]
        with pytest.raises(bpf.MapFull, match="1 of 3 entries were written"):
            words.write([size, size + 1, size + 2], [1, 2, 3])
        assert len(words) == size
    lru = loaded.maps["lru"]
    for key in range(1000):
        lru[key] = key
    assert len(lru) <= lru.max_entries


def test_only_absent_or_present(loaded: bpf.Object) -> None:
    words = loaded.maps["words_hash"]
    with pytest.raises(KeyError):
        words.put(1, 1, only="present")
    words.put(1, 1, only="absent")
    with pytest.raises(KeyError):
        words.put(1, 2, only="absent")
    words.put(1, 3, only="present")
    assert words[1] == 3


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        ([1, 2], [1], "there are 2 keys"),
        ([1 << 40], [1], "it is a uint32, from 0 to"),
        ([-1], [1], "keys of map"),
        (["a"], [1], "keys of map"),
        ([1.5], [1], "does not fit"),
    ],
)
def test_batches_refuse(loaded: bpf.Object, keys: list[object], values: list[object], said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        loaded.maps["words_hash"].write(keys, values)
    assert len(loaded.maps["words_hash"]) == 0


def test_structs_in_batches_from_plain_python(loaded: bpf.Object) -> None:
    routes = loaded.maps["routes"]
    routes.write([(8, b"\x0a\0\0\0"), {"length": 16, "address": b"\x0b\0\0\0"}], [1, 2])
    assert routes[(32, b"\x0b\0\1\1")] == 2


@pytest.mark.feature("map", "array in mapped memory")
def test_a_view_is_the_memory_itself(loaded: bpf.Object) -> None:
    memory = loaded.maps["seen_memory"]
    view = memory.view()
    assert view.shape == (5,)
    assert view.dtype == memory.value_dtype
    view[3] = (24, [10, 0, 0, 1])
    assert memory[3]["length"] == 24
    memory[4] = {"length": 8}
    assert view[4]["length"] == 8
    narrow = loaded.maps["shared"].view()
    assert narrow.strides == (8,)
    narrow[:] = [1, 2, 3, 4, 5]
    assert loaded.maps["shared"].values().tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(bpf.BpfError, match="BPF_F_MMAPABLE"):
        loaded.maps["words_array"].view()
    bss = loaded.maps[".bss"].view()
    loaded.programs["xdp_pass"].test_run(bytes(64), repeat=10)
    assert bss[0]["seen"] == 10
    assert loaded.maps[".data"].view()[0]["initial"] == 17
    assert not loaded.maps[".rodata"].view().flags.writeable


@pytest.mark.feature("other", "frozen maps; a map's memory")
def test_freeze_and_memory(loaded: bpf.Object) -> None:
    words = loaded.maps["words_hash"]
    assert words.memory_bytes > 1000 * 16
    assert not words.frozen
    words.freeze()
    assert words.frozen
    with pytest.raises(bpf.BpfError, match="it is frozen") as caught:
        words[1] = 1
    assert not isinstance(caught.value, bpf.NotPermitted)


def test_programs_in_an_array(loaded: bpf.Object) -> None:
    jumps = loaded.maps["jumps"]
    jumps[2] = loaded.programs["xdp_drop"]
    keys, values = jumps.read()
    assert dict(zip(keys.tolist(), values.tolist(), strict=True)) == {2: loaded.programs["xdp_drop"].id}
    del jumps[2]
    assert 2 not in jumps


def test_maps_without_keys(loaded: bpf.Object) -> None:
    ring = loaded.maps["ring"]
    assert ring.type == "ringbuf"
    with pytest.raises(bpf.BpfError, match="has no keys"):
        _ = ring[0]
    with pytest.raises(bpf.BpfError, match="has no keys"):
        ring.read()
