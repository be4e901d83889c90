"""``hookline maps``: what is in maps of all types, beside bpftool; changes as they happen; entries set and removed."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import bpf, cli
from hookline.cli import _entries
from tests.requirements import missing_program, need


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that succeeds; its output."""

    def call(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        ended = cli.run(["maps", *map(str, arguments)])
        shown = capsys.readouterr()
        assert ended == status, shown.err
        if status:
            told = re.findall(r"^(error|why|do): ", shown.err, re.MULTILINE)
            assert told == ["error", "why", "do"], shown.err
        return shown.out if not status else shown.err

    return call


@pytest.fixture
def read(run: Callable[..., str]) -> Callable[..., Any]:
    return lambda *arguments: json.loads(run(*arguments, "--json"))


def bpftool(*words: str) -> Any:
    need("kernel", missing_program("bpftool"))
    return json.loads(
        subprocess.run(["bpftool", "-j", *words], check=True, capture_output=True, text=True).stdout
    )


def test_list_agrees_with_bpftool(read: Callable[..., Any], loaded: bpf.Object, pins: Path) -> None:
    loaded.maps["routes"].pin(pins / "routes")
    before = {one["id"]: one for one in bpftool("map", "list")}
    listed = {one["id"]: one for one in read("list")["maps"]}
    after = {one["id"] for one in bpftool("map", "list")}
    assert set(before) & after <= set(listed)
    names = {
        "bytes_key": "key_bytes",
        "bytes_value": "value_bytes",
        "max_entries": "max_entries",
        "flags": "flags",
    }
    for number in set(before) & after:
        one, other = listed[number], before[number]
        assert (one["type"], one["name"]) == (other["type"], other.get("name", ""))
        assert {name: one[ours] for name, ours in names.items()} == {name: other[name] for name in names}
        assert one["frozen"] == bool(other["frozen"])
    mine = {one.id: one for one in loaded.maps.values()}
    assert set(mine) <= set(listed)
    for number, one_map in mine.items():
        assert listed[number]["memory_bytes"] == one_map.memory_bytes == before[number]["bytes_memlock"]
        # Asked one by one: in a list, bpftool 7.1 gives a map without types those of the map before it.
        assert listed[number]["btf_id"] == bpftool("map", "show", "id", str(number)).get("btf_id", 0)
    assert listed[loaded.maps["routes"].id]["pins"] == [str(pins / "routes")]
    users = set(listed[loaded.maps["cpu_array"].id]["programs"])
    assert users == {p.id for p in loaded.programs.values() if loaded.maps["cpu_array"].id in p.info.map_ids}
    only = read("list", "--type", "lpm_trie")["maps"]
    assert {one["type"] for one in only} == {"lpm_trie"}


def raw(words: list[str]) -> bytes:
    return bytes(int(word, 16) for word in words)


def test_entries_agree_with_bpftool(read: Callable[..., Any], loaded: bpf.Object) -> None:
    """The same bytes, and for plain numbers the same typed form."""
    table, words, cpus = loaded.maps["table_hash"], loaded.maps["words_array"], loaded.maps["cpu_hash"]
    for number in range(5):
        words[number] = number * 0x01010101
        cpus[number] = np.array(
            [(1, 10 * number + cpu) for cpu in range(bpf.possible_cpus())], cpus.value_dtype
        )
        table[{"address": number, "port": 80, "protocol": 6}] = {
            "counter": 1 << 40 | number,
            "nested": {"flag": 7, "number": number},
            "comm": b"name",
            "negative": -number,
            "v4": 0x0A000001,
        }
    for name in ("words_array", "words_hash", "cpu_hash", "table_hash", "routes", "lru", "macs"):
        found = loaded.maps[name]
        shown = bpftool("map", "dump", "id", str(found.id))
        entries = read("dump", found.id)["entries"]
        assert len(entries) == len(shown)
        typed = {found._key(key).hex(): key for key in found}
        for one in shown:
            key = typed[raw(one["key"]).hex()]
            mine = next(entry for entry in entries if entry["key"] == _entries.plain(key))
            if name in ("words_array", "words_hash", "lru"):
                assert mine == one["formatted"]
            elif found.per_cpu:
                assert mine["cpus"] == [cpu["value"] for cpu in one["formatted"]["values"]]
                assert mine["value"]["number"] == sum(cpu["number"] for cpu in mine["cpus"])
            else:
                assert found[key].tobytes() == raw(one["value"])
    (entry,) = [one for one in read("dump", table.id)["entries"] if one["key"]["address"] == 3]
    other = next(
        one["formatted"]
        for one in bpftool("map", "dump", "id", str(table.id))
        if one["formatted"]["key"]["address"] == 3
    )
    for name in ("first", "counter", "nested", "mac", "negative", "grid", "last"):
        assert entry["value"][name] == other["value"][name]
    assert entry["value"]["comm"] == "name"
    assert entry["key"] == {name: other["key"][name] for name in ("address", "port", "protocol")}


def test_tables_for_people(run: Callable[..., str], loaded: bpf.Object) -> None:
    loaded.maps["cpu_array"][3] = np.array(range(1, bpf.possible_cpus() + 1), "u4")
    total = sum(range(1, bpf.possible_cpus() + 1))
    lines = run("dump", loaded.maps["cpu_array"].id).splitlines()
    assert lines[0].split() == ["KEY", "SUM", "OF", str(bpf.possible_cpus()), "CPUS"]
    assert lines[4].split() == ["3", str(total)]
    lines = run("dump", loaded.maps["cpu_array"].id, "--per-cpu").splitlines()
    assert lines[0].split() == ["KEY", "CPU", "VALUE"]
    assert lines[1 + 3 * bpf.possible_cpus() + 1].split() == ["3", "1", "2"]
    loaded.maps["untyped"][bytes(range(8))] = bytes(range(12))
    assert "00 01 02 03 04 05 06 07 08 09 0a 0b" in run("dump", loaded.maps["untyped"].id)
    # A bitfield has no dtype; its bytes are shown all the same.
    assert "0" in run("dump", loaded.maps["bitfields"].id)
    run("dump", loaded.maps["words_hash"].id)


def test_what_has_no_entries_says_so(run: Callable[..., str], loaded: bpf.Object) -> None:
    said = run("dump", loaded.maps["ring"].id, status=1)
    assert "cannot be dumped" in said
    assert "its records go to one reader" in said
    assert "cannot be dumped" in run("watch", loaded.maps["ring"].id, status=1)


def test_ways_to_name_a_map(
    run: Callable[..., str], read: Callable[..., Any], kinds: Path, loaded: bpf.Object, pins: Path
) -> None:
    routes = loaded.maps["routes"]
    routes[{"length": 8, "address": bytes([10, 0, 0, 0])}] = 7
    routes.pin(pins / "routes")
    document = read("dump", pins / "routes")
    assert document == read("dump", routes.id)
    assert document["map"] == {"id": routes.id, "name": "routes", "type": "lpm_trie"}
    assert document["entries"] == [{"key": {"length": 8, "address": [10, 0, 0, 0]}, "value": 7}]
    with bpf.Object.open(kinds) as other:
        other.load()
        said = run("dump", "routes", status=1)
        assert "maps are called 'routes'" in said
        assert str(other.maps["routes"].id) in said
    assert "the pin" in run("dump", _program_pin(loaded, pins), status=1)


def _program_pin(loaded: bpf.Object, pins: Path) -> Path:
    loaded.programs["add"].pin(pins / "add")
    return pins / "add"


def test_changes_as_they_happen(run: Callable[..., str], loaded: bpf.Object) -> None:
    counts = loaded.maps["words_hash"]
    counts[1] = 100
    counts[2] = 5

    def work() -> None:
        time.sleep(0.5)
        del counts[2]
        counts[3] = 9
        counts[1] = 1100

    worker = threading.Thread(target=work)
    worker.start()
    shown = run("watch", counts.id, "--interval", "0.25", "--seconds", "1.5", "--json")
    worker.join()
    changes = [json.loads(line) for line in shown.splitlines()]
    found = {(one["change"], one["key"], one["value"]) for one in changes}
    assert found == {("changed", 1, 1100), ("removed", 2, 5), ("added", 3, 9)}
    (rate,) = [one["rate"] for one in changes if one["change"] == "changed"]
    # 1000 more within an interval of about a quarter of a second.
    assert 200 < rate <= 4000
    assert all(abs(one["time"] - time.time()) < 60 for one in changes)


def test_rates_of_per_cpu_counters(run: Callable[..., str], loaded: bpf.Object) -> None:
    program = loaded.programs["xdp_pass"]
    worker = threading.Timer(0.3, lambda: program.test_run(bytes(64), repeat=500))
    worker.start()
    shown = run("watch", loaded.maps["cpu_array"].id, "--interval", "0.2", "--seconds", "1.2")
    worker.join()
    (line,) = shown.splitlines()
    assert f" ~ 0: sum of {bpf.possible_cpus()} CPUs 500  (" in line
    assert line.endswith(" a second)")


def test_a_number_that_is_set_anew_has_no_rate(read: Callable[..., Any], run: Callable[..., str]) -> None:
    value = np.dtype([("count", "<u8"), ("short", "<u4"), ("state", "u1")])
    with bpf.Map.create("array", value=value, max_entries=4) as made:
        made[0] = (2**63 + 5, 2**32 - 10, 200)
        made[1] = (2**64 - 10, 5, 3)
        made[2] = (50, 0, 0)

        def later() -> None:
            made[0] = (5, 90, 100)
            made[1] = (90, 5, 3)
            made[2] = (30, 2**32 - 1, 0)

        worker = threading.Timer(0.25, later)
        worker.start()
        lines = run("watch", made.id, "--interval", "0.2", "--seconds", "0.8", "--json").splitlines()
        worker.join()
    changes = [json.loads(line) for line in lines]
    rates: dict[int, dict[str, float]] = {one["key"]: {} for one in changes}
    for one in changes:
        rates[one["key"]] |= one["rate"] or {}
    signs = {key: {name: np.sign(rate) for name, rate in found.items()} for key, found in rates.items()}
    assert signs == {0: {"short": 1, "state": -1}, 1: {"count": 1}, 2: {"count": -1, "short": 1}}
    # 100 more within about 0.2 s, though the number is small again.
    for rate in (rates[0]["short"], rates[1]["count"]):
        assert 100 < rate < 2000


def test_each_cpu_grows_by_itself(run: Callable[..., str]) -> None:
    """A CPU's number that goes below 0, or around, is added to the others as what it means."""
    cpus = bpf.possible_cpus()
    with bpf.Map.create("percpu_array", value="u8", max_entries=1) as made:
        made.put(0, 3, cpu=0)
        made.put(0, 2**64 - 2, cpu=cpus - 1)
        lines = run("dump", made.id).splitlines()
        assert lines[1].split() == ["0", "1"]
        worker = threading.Timer(0.25, lambda: made.put(0, 18, cpu=cpus - 1))
        worker.start()
        shown = run("watch", made.id, "--interval", "0.2", "--seconds", "0.8", "--json").splitlines()
        worker.join()
        (change,) = [json.loads(line) for line in shown]
        assert change["value"] == 21
        assert 20 < change["rate"] < 400
        assert run("update", made.id, 0, 7) == f"0 is [{' '.join(['7'] * cpus)}], by CPU\n"


def test_entries_are_set_and_removed(
    run: Callable[..., str], read: Callable[..., Any], loaded: bpf.Object
) -> None:
    table, words = loaded.maps["table_hash"], loaded.maps["words_hash"]
    assert run("update", words.id, 7, 1000) == "7 is 1000\n"
    assert words[7] == 1000
    key = {"address": 1, "port": 80, "protocol": 6}
    document = read("update", table.id, json.dumps(key), '{"counter": 9, "mac": [1, 2, 3, 4, 5, 6]}')
    assert document["key"] == key
    assert table[key]["counter"] == 9
    assert table[key]["mac"].tolist() == [1, 2, 3, 4, 5, 6]
    assert "no JSON" in run("update", words.id, "seven", 1, status=2)
    assert run("update", words.id, 1, '"text"', status=1)
    assert run("delete", words.id, 7) == "7 is removed\n"
    assert 7 not in words
    assert "has no entry 7" in run("delete", words.id, 7, status=1)
    loaded.maps["words_array"].freeze()
    assert "frozen" in run("update", loaded.maps["words_array"].id, 1, 1, status=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], 3),
        ([{"a": 1, "b": {"c": 2.5}}, {"a": 2, "b": {"c": 1.0}}], {"a": 3, "b": {"c": 3.5}}),
        ([[1, 2], [3, 4]], [4, 6]),
        (
            [{"comm": "x", "n": 1, "yes": True}, {"comm": "y", "n": 1, "yes": False}],
            {"comm": None, "n": 2, "yes": None},
        ),
    ],
)
def test_sums_over_cpus(values: list[Any], expected: Any) -> None:
    assert _entries.total(values) == expected


def test_every_type_is_dumped_or_refused_with_a_reason(
    compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: dict[str, set[str]] = {"dumped": set(), "refused": set()}
    with bpf.Object.open(compiled("maps")) as obj:
        obj.load()
        for found in obj.maps.values():
            if not found.id:
                continue
            capsys.readouterr()
            status = cli.run(["maps", "dump", str(found.id), "--json"])
            shown = capsys.readouterr()
            if status == 0:
                document = json.loads(shown.out)
                assert document["map"]["type"] == found.type
                outcomes["dumped"].add(found.type)
            else:
                assert status == 1
                assert json.loads(shown.err)["why"], found.type
                outcomes["refused"].add(found.type)
    assert outcomes["dumped"] >= {"hash", "array", "percpu_hash", "lpm_trie", "array_of_maps", "sockmap"}
    assert outcomes["refused"] >= {"queue", "stack", "bloom_filter", "sk_storage"}


NAMED = """
#include "types.h"
enum color { RED = 3, BLUE = 7 };
struct record { enum color first; char name[8]; struct { enum color inner; }; enum color both[2]; };
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, unsigned int);
	__type(value, struct record);
} records SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 2);
	__type(key, enum color);
	__type(value, enum color);
} colors SEC(".maps");
const volatile char greeting[16] = "hello %d\\n";
SEC("xdp") int greet(void *ctx)
{
	unsigned int key = 0;
	return bpf_map_lookup_elem(&records, &key) && bpf_map_lookup_elem(&colors, &key) ? greeting[3] : XDP_PASS;
}
char _license[] SEC("license") = "GPL";
"""


def test_enums_are_named_and_text_is_whole(
    read: Callable[..., Any], run: Callable[..., str], compiled: Callable[..., Path]
) -> None:
    with bpf.Object.open(compiled(NAMED)) as obj:
        obj.load()
        records, colors = obj.maps["records"], obj.maps["colors"]
        shown = '{"first": "BLUE", "name": "hi", "inner": "RED", "both": ["RED", 9]}'
        assert read("update", records.id, 0, shown)["value"] == json.loads(shown)
        records.put(1, {"first": 5, "name": b"a\xff\1z"})
        found = [one["value"] for one in read("dump", records.id)["entries"]]
        theirs = bpftool("map", "dump", "id", str(records.id))
        assert found[0] == json.loads(shown)
        assert found[1] == {"first": 5, "name": "61 ff 01 7a 00 00 00 00", "inner": 0, "both": [0, 0]}
        for ours, one in zip(found, theirs, strict=True):
            assert (ours["first"], ours["both"]) == (
                one["formatted"]["value"]["first"],
                one["formatted"]["value"]["both"],
            )
        assert '"RED" is [BLUE' in run("update", colors.id, '"RED"', '"BLUE"')
        (entry,) = read("dump", colors.id)["entries"]
        assert entry["key"] == "RED"
        assert set(entry["cpus"]) == {"BLUE"}
        assert run("delete", colors.id, '"RED"') == '"RED" is removed\n'
        assert "takes a number" in run("delete", colors.id, '"PINK"', status=1)
        (entry,) = read("dump", obj.maps[".rodata"].id)["entries"]
        assert entry["value"] == {"greeting": "hello %d\n"}
        assert "hello %d\\n" in run("dump", obj.maps[".rodata"].id)
