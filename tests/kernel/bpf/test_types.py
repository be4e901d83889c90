"""dtypes against bpftool's reading of the same BTF."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import bpf
from tests.requirements import missing_program, need

SHIPPED = sorted(Path(bpf.__file__).parents[1].glob("datapath/**/*.bpf.o"))
_SKIPPED = {"TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"}


class Oracle:
    """What bpftool says of an object's types."""

    def __init__(self, path: Path) -> None:
        need("kernel", missing_program("bpftool"))
        output = subprocess.run(
            ["bpftool", "-j", "btf", "dump", "file", path], check=True, capture_output=True, text=True
        )
        self.types: dict[int, dict[str, Any]] = {
            found["id"]: found for found in json.loads(output.stdout)["types"]
        }

    def resolve(self, type_id: int) -> dict[str, Any]:
        found = self.types[type_id]
        return self.resolve(found["type_id"]) if found["kind"] in _SKIPPED else found

    def size(self, type_id: int) -> int:
        found = self.resolve(type_id)
        match found["kind"]:
            case "PTR":
                return 8
            case "ARRAY":
                return int(found["nr_elems"]) * self.size(found["type_id"])
            case _:
                return int(found["size"])

    def members(self, type_id: int, base: int = 0) -> dict[str, tuple[int, int, int]]:
        """By name: offset, size and type, those of anonymous members included."""
        found: dict[str, tuple[int, int, int]] = {}
        for member in self.resolve(type_id)["members"]:
            assert not member.get("bitfield_size"), "a bitfield"
            place = base + member["bits_offset"] // 8
            if member["name"] == "(anon)":
                found |= self.members(member["type_id"], place)
            else:
                found[member["name"]] = (place, self.size(member["type_id"]), member["type_id"])
        return found

    def check(self, type_id: int, dtype: np.dtype[Any]) -> None:
        """Assert that a dtype says the same as the BTF type."""
        assert dtype.itemsize == self.size(type_id)
        found = self.resolve(type_id)
        match found["kind"]:
            case "STRUCT" | "UNION" if found["members"]:
                assert dtype.fields is not None
                members = self.members(type_id)
                assert {
                    name: (place, inner.itemsize) for name, (inner, place, *_) in dtype.fields.items()
                } == {name: (place, size) for name, (place, size, _) in members.items()}
                for name, (_, _, inner_id) in members.items():
                    self.check(inner_id, dtype.fields[name][0])
            case "ARRAY" if dtype.kind == "S":
                assert self.resolve(found["type_id"])["name"] == "char"
            case "ARRAY":
                assert dtype.subdtype is not None
                base, shape = dtype.subdtype
                assert shape[0] == found["nr_elems"]
                self.check(found["type_id"], np.dtype((base, shape[1:])) if shape[1:] else base)
            case "INT":
                expected = {"SIGNED": "i", "BOOL": "b", "(none)": "u", "CHAR": "i"}[found["encoding"]]
                assert dtype.kind == expected
            case "ENUM" | "ENUM64":
                assert dtype.kind == ("i" if found.get("encoding", "") == "SIGNED" else "u")
            case "PTR":
                assert dtype == np.dtype("u8")


@pytest.fixture
def oracle(kinds: Path) -> Oracle:
    return Oracle(kinds)


def _named(oracle: Oracle, *kinds: str) -> dict[str, int]:
    return {t["name"]: n for n, t in oracle.types.items() if t["kind"] in kinds and t["name"] != "(anon)"}


def test_every_struct_agrees_with_bpftool(kinds: Path, oracle: Oracle) -> None:
    with bpf.Object.open(kinds) as obj:
        structs = _named(oracle, "STRUCT", "UNION", "ENUM", "ENUM64")
        assert {"value", "key", "inner", "prefix", "config", "colour", "wide"} <= set(structs)
        for name, type_id in structs.items():
            if name != "bits":
                oracle.check(type_id, obj.btf.dtype(type_id))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_maps_of_shipped_objects_agree_with_bpftool(path: Path) -> None:
    oracle = Oracle(path)
    with bpf.Object.open(path) as obj:
        for found in obj.maps.values():
            for type_id, dtype in (
                (found.definition.key_type_id, found.key_dtype),
                (found.definition.value_type_id, found.value_dtype),
            ):
                if type_id and oracle.types[type_id]["kind"] != "DATASEC":
                    oracle.check(type_id, dtype)


def test_the_layout_that_the_compiler_chose(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        key, value = obj.maps["table_hash"].key_dtype, obj.maps["table_hash"].value_dtype
    assert key == np.dtype(
        {
            "names": ["address", "port", "protocol"],
            "formats": ["u4", "u2", "u1"],
            "offsets": [0, 4, 6],
            "itemsize": 8,
        }
    )
    assert value.fields is not None
    kinds_of = {name: value.fields[name][0] for name in value.names or ()}
    assert kinds_of["comm"] == kinds_of["label"] == np.dtype("S16")
    assert kinds_of["mac"] == np.dtype(("u1", (6,)))
    assert kinds_of["grid"] == np.dtype(("u2", (2, 3)))
    assert kinds_of["pair"].shape == (2,)
    assert [kinds_of[name].str for name in ("colour", "dark", "wide")] == ["<u4", "<i4", "<u8"]
    assert [kinds_of[name].str for name in ("yes", "negative", "pointer")] == ["|b1", "<i2", "<u8"]
    assert value.fields["v4"][1] == value.fields["v6"][1]
    assert kinds_of["named_union"].fields is not None


def test_bitfields_are_refused_by_name(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        obj.load()
        with pytest.raises(bpf.BpfError, match=r"value of map 'bitfields'\.low is a bitfield"):
            _ = obj.maps["bitfields"].value_dtype
        with pytest.raises(bpf.BpfError, match="is a bitfield"):
            obj.maps["bitfields"].read()


def test_untyped_maps_are_bytes(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        assert obj.maps["untyped"].key_dtype == np.dtype("u8")
        assert obj.maps["untyped"].value_dtype == np.dtype("V12")
        obj.load()
        untyped = obj.maps["untyped"]
        untyped[5] = b"twelve bytes"
        assert untyped[5].tobytes() == b"twelve bytes"
        assert untyped.read()[1].tobytes() == b"twelve bytes"


def test_kernel_btf_gives_the_same_types(loaded: bpf.Object) -> None:
    for found in loaded.maps.values():
        if found.name == "bitfields" or not found.definition.key_size:
            continue
        with bpf.Map.from_id(found.id) as adopted:
            assert adopted.key_dtype == found.key_dtype
            assert adopted.value_dtype == found.value_dtype


def test_a_c_program_and_python_read_the_same_bytes(compiled: Callable[..., Path]) -> None:
    """The kernel writes a struct member by member; the dtype finds each."""
    source = """
#include "types.h"
struct inner { __u8 a; __u32 b; };
struct record { __u8 first; __u64 wide; struct inner pair[2]; __s16 low; char text[5]; _Bool yes; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __type(key, __u32); __type(value, struct record);
         __uint(max_entries, 1); } records SEC(".maps");
SEC("xdp") int fill(struct xdp_md *ctx) {
    __u32 key = 0;
    struct record *r = bpf_map_lookup_elem(&records, &key);
    if (!r) return 0;
    r->first = 1; r->wide = 1ULL << 40; r->pair[0].a = 2; r->pair[0].b = 3; r->pair[1].a = 4; r->pair[1].b = 5;
    r->low = -6; r->text[0] = 'o'; r->text[1] = 'k'; r->yes = 1;
    return 2;
}
"""
    with bpf.Object.open(compiled(source)) as obj:
        obj.load()
        obj.programs["fill"].test_run(bytes(64))
        record = obj.maps["records"][0]
    assert (record["first"], record["wide"], record["low"], record["text"], record["yes"]) == (
        1,
        1 << 40,
        -6,
        b"ok",
        True,
    )
    assert record["pair"].tolist() == [(2, 3), (4, 5)]
