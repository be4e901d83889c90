"""The BTF parser alone: types made by hand, and damaged bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookline.bpf import BpfError, Btf, ObjectError
from hookline.bpf._types._btf import Kind


class Writer:
    """Writes BTF type by type; each method returns the new type's number."""

    def __init__(self) -> None:
        self.types = b""
        self.texts = b"\0"
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        place = len(self.texts)
        self.texts += text.encode() + b"\0"
        return place

    def add(
        self, kind: Kind, name: str, size: int, extra: bytes = b"", length: int = 0, flag: bool = False
    ) -> int:
        self.types += struct.pack("<III", self.name(name), kind << 24 | length | flag << 31, size) + extra
        self.count += 1
        return self.count

    def integer(self, name: str, size: int, encoding: int = 0, width: int | None = None) -> int:
        bits = size * 8 if width is None else width
        return self.add(Kind.INT, name, size, struct.pack("<I", encoding << 24 | bits))

    def array(self, element: int, count: int) -> int:
        return self.add(Kind.ARRAY, "", 0, struct.pack("<III", element, element, count))

    def struct(
        self,
        name: str,
        size: int,
        *members: tuple[str, int, int],
        kind: Kind = Kind.STRUCT,
        flag: bool = False,
    ) -> int:
        extra = b"".join(struct.pack("<III", self.name(n), target, offset) for n, target, offset in members)
        return self.add(kind, name, size, extra, len(members), flag)

    def data(self) -> bytes:
        return (
            struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.texts))
            + self.types
            + self.texts
        )


def sample() -> Writer:
    writer = Writer()
    u8, u32, char = writer.integer("__u8", 1), writer.integer("int", 4, 1), writer.integer("char", 1, 1)
    name = writer.array(char, 16)
    inner = writer.struct("inner", 8, ("flag", u8, 0), ("number", u32, 32))
    writer.struct("outer", 40, ("inner", inner, 0), ("comm", name, 64), ("pair", writer.array(inner, 2), 192))
    writer.add(
        Kind.ENUM, "colour", 4, struct.pack("<IiIi", writer.name("RED"), -1, writer.name("BLUE"), 7), 2, True
    )
    writer.add(Kind.ENUM64, "wide", 8, struct.pack("<III", writer.name("W"), 1, 1), 1)
    return writer


def test_offsets_and_sizes() -> None:
    btf = Btf(sample().data())
    outer = btf.find("outer", Kind.STRUCT)
    assert outer is not None
    inner = np.dtype({"names": ["flag", "number"], "formats": ["u1", "i4"], "offsets": [0, 4], "itemsize": 8})
    assert btf.dtype(outer) == np.dtype(
        {
            "names": ["inner", "comm", "pair"],
            "formats": [inner, "S16", (inner, (2,))],
            "offsets": [0, 8, 24],
            "itemsize": 40,
        }
    )
    assert btf.enums() == {"colour": {"RED": -1, "BLUE": 7}, "wide": {"W": (1 << 32) + 1}}
    assert btf.find("absent") is None


@pytest.mark.parametrize(
    ("encoding", "size", "expected"), [(0, 2, "u2"), (1, 8, "i8"), (4, 1, "?"), (0, 16, "V16")]
)
def test_integers(encoding: int, size: int, expected: str) -> None:
    writer = Writer()
    number = writer.integer("x", size, encoding)
    assert Btf(writer.data()).dtype(number) == np.dtype(expected)


def test_qualifiers_typedefs_and_pointers() -> None:
    writer = Writer()
    number = writer.integer("u32", 4)
    typedef = writer.add(Kind.TYPEDEF, "port_t", number)
    volatile = writer.add(Kind.VOLATILE, "", typedef)
    const = writer.add(Kind.CONST, "", volatile)
    pointer = writer.add(Kind.PTR, "", const)
    floating = writer.add(Kind.FLOAT, "double", 8)
    btf = Btf(writer.data())
    assert btf.dtype(const) == np.dtype("u4")
    assert btf.dtype(pointer) == np.dtype("u8")
    assert btf.dtype(floating) == np.dtype("f8")
    assert btf.is_volatile(const)
    assert not btf.is_volatile(typedef)


def test_anonymous_members_are_the_outer_structs() -> None:
    writer = Writer()
    u32 = writer.integer("u32", 4)
    union = writer.struct("", 4, ("v4", u32, 0), ("other", u32, 0), kind=Kind.UNION)
    outer = writer.struct("outer", 8, ("a", u32, 0), ("", union, 32))
    fields = Btf(writer.data()).dtype(outer).fields
    assert fields is not None
    assert {name: offset for name, (_, offset, *_) in fields.items()} == {"a": 0, "v4": 4, "other": 4}


def test_bitfields_new_and_old_are_refused() -> None:
    writer = Writer()
    u32, narrow = writer.integer("u32", 4), writer.integer("narrow", 4, width=3)
    new = writer.struct("new", 4, ("low", u32, 3 << 24), flag=True)
    old = writer.struct("old", 4, ("low", narrow, 0))
    btf = Btf(writer.data())
    for type_id, name in ((new, "new"), (old, "old")):
        with pytest.raises(BpfError, match=rf"{name}\.low is a bitfield"):
            btf.dtype(type_id)


def test_a_variable_with_bitfields_is_raw_bytes() -> None:
    writer = Writer()
    u32 = writer.integer("u32", 4)
    bits = writer.struct("bits", 4, ("low", u32, 3 << 24), flag=True)
    flags = writer.add(Kind.VAR, "flags", bits, bytes(4))
    plain = writer.add(Kind.VAR, "plain", u32, bytes(4))
    sections = [
        writer.add(Kind.DATASEC, ".bss", 8, struct.pack("<6I", flags, 0, size, plain, 4, 4), 2)
        for size in (4, 9, 0xFFFFFFFF)
    ]
    btf = Btf(writer.data())
    assert btf.section(sections[0]) == np.dtype([("flags", "V4"), ("plain", "u4")])
    # A damaged size is beyond the section, or beyond what NumPy takes at all.
    for damaged in sections[1:]:
        with pytest.raises(ObjectError, match=r"\(BTF\) of \.bss is damaged"):
            btf.section(damaged)


def test_bitfields_tell_layouts_apart() -> None:
    writer = Writer()
    u32 = writer.integer("u32", 4)
    pointer = writer.add(Kind.PTR, "", u32)
    inner = [
        writer.struct(name, 4, ("low", u32, width << 24), flag=True)
        for name, width in (("one", 3), ("two", 3), ("other", 4))
    ]
    outer = [
        writer.struct("outer", 16, ("inner", writer.array(one, 2), 0), ("next", pointer, 64)) for one in inner
    ]
    btf = Btf(writer.data())
    assert btf.layout(outer[0]) == btf.layout(outer[1]) != btf.layout(outer[2])


def test_what_has_no_place_in_memory_is_refused() -> None:
    writer = Writer()
    function = writer.add(Kind.FUNC_PROTO, "", 0)
    itself = writer.struct("itself", 4, ("again", 2, 0))
    loop = writer.add(Kind.TYPEDEF, "loop", 3)
    u32 = writer.integer("u32", 4)
    huge = writer.array(u32, 0xFFFFFFFF)
    twice = writer.struct("twice", 8, ("a", u32, 0), ("a", u32, 32))
    outside = writer.struct("outside", 4, ("a", u32, 320))
    btf = Btf(writer.data())
    assert (itself, loop) == (2, 3)
    for type_id in (0, function, itself, loop, huge, twice, outside):
        with pytest.raises(BpfError):
            btf.dtype(type_id)
    with pytest.raises(ObjectError, match="does not exist"):
        btf.dtype(99)


@given(st.integers(0, 400))
def test_truncated(length: int) -> None:
    data = sample().data()
    if length < len(data):
        with pytest.raises(ObjectError, match="damaged"):
            Btf(data[:length])


@given(st.lists(st.tuples(st.integers(0, 330), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_raise_only_our_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(sample().data())
    for place, value in changes:
        data[place % len(data)] = value
    try:
        btf = Btf(bytes(data))
    except ObjectError:
        return
    for type_id in range(len(btf)):
        try:
            btf.dtype(type_id)
        except BpfError:
            continue
