"""BTF, the kernel's type format, and the NumPy dtype of each type in it.

The format is Documentation/bpf/btf.rst of the Linux source: a header, one section of types numbered from 1,
one of strings. Sizes, offsets and padding of a dtype are exactly those that the compiler wrote down:

- integers, enums and booleans are NumPy's of the same size and sign; pointers are unsigned 64-bit integers;
- an array of plain ``char`` is a byte string (``S16``), every other array a subarray;
- a struct is a structured dtype with explicit offsets; members of an anonymous struct or union appear as
  members of the outer one, as in C;
- a union is a structured dtype whose members share their place; set one of them by a dict;
- bitfields are refused by name; a global variable that has some is raw bytes, so that the others can be read.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from hookline.bpf._errors import BpfError, ObjectError

__all__ = ["Btf", "Kind", "Member", "Type"]

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")


class Kind(IntEnum):
    """``BTF_KIND_*``."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_QUALIFIERS = {Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}
# How many bytes follow the common part: fixed, and for each of vlen entries.
_EXTRA = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
    Kind.ENUM64: (0, 12),
}
_INT_SIGNED, _INT_BOOL = 1, 4


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union, a variable of a data section, or a parameter of a function.

    Attributes:
        offset: In bits for members, in bytes for variables.
        bits: The width of a bitfield, 0 for anything else; for variables, the size in bytes.
    """

    name: str
    type_id: int
    offset: int
    bits: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type.

    Attributes:
        size: In bytes, where the kind has one.
        target: The type that this one refers to, such as an array's element, else 0.
        members: Of structs, unions and data sections; a function's parameters (a type of 0 ends an open list).
        values: Of enums.
        count: An array's length.
        signed: Of integers and enums.
        boolean: An integer that is a C bool.
        width: An integer's width in bits, and where it starts (0 unless it is an old-style bitfield).
    """

    kind: Kind
    name: str
    size: int = 0
    target: int = 0
    members: tuple[Member, ...] = ()
    values: tuple[tuple[str, int], ...] = ()
    count: int = 0
    signed: bool = False
    boolean: bool = False
    width: int = 0


class Btf:
    """The types of one object or of one object's maps in the kernel.

    Args:
        data: The bytes of a ``.BTF`` section.
        base: The types that these continue: a kernel module's go on from the kernel's.

    Raises:
        ObjectError: The bytes are not BTF, or are damaged.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        self._texts = b""
        self._base = base
        try:
            self._texts, types = _sections(data)
            self._types: list[Type] = [
                *(base._types if base else ()),
                *_parse(types, self._text, first=base is None),
            ]
        except (struct.error, ValueError, IndexError) as error:
            raise ObjectError(
                "the type information (BTF) is damaged",
                why=str(error),
                remedy="compile again with clang -g -target bpf",
            ) from None
        self._dtypes: dict[int, np.dtype[Any]] = {}

    @classmethod
    def vmlinux(cls) -> Btf:
        """The kernel's own types, read once (about a second).

        Raises:
            FeatureMissing: The kernel was built without them.
        """
        from hookline.bpf._types import _kernel_types

        return _kernel_types.vmlinux()

    @classmethod
    def from_id(cls, btf_id: int) -> Btf:
        """The types that the kernel holds under a number (needs CAP_SYS_ADMIN)."""
        from hookline.bpf._types import _kernel_types

        return _kernel_types.by_id(btf_id)

    def __len__(self) -> int:
        return len(self._types)

    def __getitem__(self, type_id: int) -> Type:
        if not 0 <= type_id < len(self._types):
            raise ObjectError(
                f"BTF type {type_id} does not exist",
                why=f"there are {len(self._types)}",
                remedy="compile again with clang -g -target bpf",
            )
        return self._types[type_id]

    def find(self, name: str, *kinds: Kind) -> int | None:
        """The number of the type of this name and one of these kinds (any kind where none is given)."""
        for type_id, found in enumerate(self._types):
            if found.name == name and (not kinds or found.kind in kinds):
                return type_id
        return None

    def named(self, *kinds: Kind) -> dict[str, int]:
        """The numbers of all named types of these kinds."""
        return {found.name: i for i, found in enumerate(self._types) if found.name and found.kind in kinds}

    def resolve(self, type_id: int) -> tuple[int, Type]:
        """Follow typedefs and qualifiers to the type they stand for."""
        for _ in range(len(self._types)):
            found = self[type_id]
            if found.kind not in _QUALIFIERS:
                return type_id, found
            type_id = found.target
        raise ObjectError(
            "the type information (BTF) is damaged",
            why="a type refers to itself",
            remedy="compile again with clang -g -target bpf",
        )

    def is_volatile(self, type_id: int) -> bool:
        """Whether a variable's type is volatile, itself or as an array of volatile elements."""
        for _ in range(len(self._types)):
            found = self[type_id]
            if found.kind is Kind.VOLATILE:
                return True
            if found.kind not in _QUALIFIERS and found.kind is not Kind.ARRAY:
                return False
            type_id = found.target
        return False

    def dtype(self, type_id: int, name: str = "") -> np.dtype[Any]:
        """The NumPy dtype of a type.

        Args:
            type_id: Its number.
            name: What it belongs to, for error messages.

        Raises:
            BpfError: It has a bitfield, or is a kind that has no place in memory.
        """
        label = name or self[type_id].name or f"type {type_id}"
        try:
            return self._build(type_id, label, 0)
        except (ValueError, TypeError, OverflowError) as error:
            # NumPy's refusal of sizes and names that no compiler writes.
            raise ObjectError(
                f"the type information (BTF) of {label} is damaged",
                why=str(error),
                remedy="compile again with clang -g -target bpf",
            ) from None

    def section(self, type_id: int, *, volatile: bool = False) -> np.dtype[Any]:
        """The dtype of a data section: one field per variable, only the volatile ones on request."""
        section = self[type_id]
        variables = [
            variable
            for variable in section.members
            if not volatile or self.is_volatile(self[variable.type_id].target)
        ]
        try:
            return np.dtype(
                {
                    "names": [self[variable.type_id].name for variable in variables],
                    "formats": [self._variable(variable) for variable in variables],
                    "offsets": [variable.offset for variable in variables],
                    "itemsize": section.size,
                }
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise ObjectError(
                f"the type information (BTF) of {section.name} is damaged",
                why=str(error),
                remedy="compile again with clang -g -target bpf",
            ) from None

    def layout(self, type_id: int) -> object:
        """How a type lies in memory, bitfields too: equal for types of the same members, whatever their own names."""
        return self._laid_out(type_id, 0)

    def struct(self, name: str) -> np.dtype[Any]:
        """The dtype of a struct, union or typedef by its C name, such as a ring's record.

        Raises:
            BpfError: There is none of that name, or it has no dtype, such as one with a bitfield.
        """
        kinds = (Kind.STRUCT, Kind.UNION, Kind.TYPEDEF)
        name = name.removeprefix("struct ")
        type_id = self.find(name, *kinds)
        if type_id is None:
            near = difflib.get_close_matches(name, list(self.named(*kinds)), 1)
            anchor = f"const struct {name} *unused_{name} __attribute__((unused));"
            raise BpfError(
                f"the type information (BTF) has no struct {name!r}",
                why="the compiler leaves out what no map, function or variable uses",
                remedy=f"did you mean {near[0]!r}? Else anchor it: {anchor}"
                if near
                else f"anchor it: {anchor}",
            )
        return self.dtype(type_id, name)

    def enums(self) -> dict[str, dict[str, int]]:
        """Every named enum: its members and their values."""
        return {
            found.name: dict(found.values)
            for found in self._types
            if found.name and found.kind in (Kind.ENUM, Kind.ENUM64)
        }

    def text(self, offset: int) -> str:
        """A string by its place, as line information names source lines; empty where there is none."""
        try:
            return self._text(offset)
        except ValueError:
            return ""

    def c_name(self, type_id: int) -> str:
        """A type as C and bpftool write it: ``struct xdp_md *``; a function with its parameters."""
        return self._spelt(type_id, 0).rstrip()

    def _text(self, offset: int) -> str:
        if self._base is not None:
            below = self._base._text_size()
            if offset < below:
                return self._base._text(offset)
            offset -= below
        if offset >= len(self._texts):
            raise ValueError("a name lies outside the strings")
        return self._texts[offset : self._texts.index(0, offset)].decode("utf-8", "replace")

    def _text_size(self) -> int:
        return len(self._texts) + (self._base._text_size() if self._base else 0)

    def _spelt(self, type_id: int, depth: int) -> str:
        found = self[type_id]
        if depth > 16:
            return "... "
        match found.kind:
            case Kind.PTR:
                return self._spelt(found.target, depth + 1) + "* "
            case Kind.CONST | Kind.VOLATILE | Kind.RESTRICT:
                return f"{found.kind.name.lower()} " + self._spelt(found.target, depth + 1)
            case Kind.TYPE_TAG:
                return self._spelt(found.target, depth + 1)
            case Kind.ARRAY:
                return self._spelt(found.target, depth + 1) + f"[{found.count}]"
            case Kind.STRUCT | Kind.FWD:
                return f"struct {found.name} "
            case Kind.UNION:
                return f"union {found.name} "
            case Kind.ENUM | Kind.ENUM64:
                return f"enum {found.name} "
            case Kind.FUNC:
                return self._signature(found.target, found.name, depth)
            case Kind.FUNC_PROTO:
                return self._signature(type_id, "", depth)
            case _:
                return f"{found.name} "

    def _signature(self, type_id: int, name: str, depth: int) -> str:
        prototype = self[type_id]
        parameters = [
            (self._spelt(one.type_id, depth + 1) + one.name).rstrip() if one.type_id else "..."
            for one in prototype.members
        ]
        return f"{self._spelt(prototype.target, depth + 1)}{name}({', '.join(parameters)})"

    def _variable(self, variable: Member) -> np.dtype[Any]:
        """The dtype of a section's variable; raw bytes where NumPy has none."""
        found = self[variable.type_id]
        try:
            return self.dtype(found.target, found.name)
        except ObjectError:
            raise
        except BpfError:
            return np.dtype(f"V{variable.bits}")

    def _laid_out(self, type_id: int, depth: int) -> object:
        if depth > 64:
            raise ObjectError(
                "the type information (BTF) is damaged",
                why="a type contains itself",
                remedy="compile again with clang -g -target bpf",
            )
        _, found = self.resolve(type_id)
        match found.kind:
            case Kind.ARRAY:
                return found.kind, found.count, self._laid_out(found.target, depth + 1)
            case Kind.STRUCT | Kind.UNION | Kind.DATASEC:
                return (
                    found.kind,
                    found.size,
                    tuple(
                        (one.name, one.offset, one.bits, self._laid_out(one.type_id, depth + 1))
                        for one in found.members
                    ),
                )
            case Kind.VAR:
                return found.kind, found.name, self._laid_out(found.target, depth + 1)
            case _:
                return found.kind, found.size, found.signed, found.boolean, found.width

    def _build(self, type_id: int, where: str, depth: int) -> np.dtype[Any]:
        if depth > 64:
            raise ObjectError(
                "the type information (BTF) is damaged",
                why=f"{where} contains itself",
                remedy="compile again with clang -g -target bpf",
            )
        type_id, found = self.resolve(type_id)
        if type_id not in self._dtypes:
            self._dtypes[type_id] = self._make(found, where, depth)
        return self._dtypes[type_id]

    def _make(self, found: Type, where: str, depth: int) -> np.dtype[Any]:
        match found.kind:
            case Kind.INT:
                return self._integer(found, where)
            case Kind.ENUM | Kind.ENUM64:
                return np.dtype(f"{'i' if found.signed else 'u'}{found.size}")
            case Kind.PTR:
                return np.dtype("u8")
            case Kind.FLOAT if found.size in (4, 8):
                return np.dtype(f"f{found.size}")
            case Kind.ARRAY:
                return self._array(found, where, depth)
            case Kind.STRUCT | Kind.UNION:
                return self._structure(found, where, depth)
            case _:
                raise BpfError(
                    f"{where} has no NumPy dtype",
                    why=f"it is a {found.kind.name.lower()} in BTF",
                    remedy="use a struct, a number or an array in its place",
                )

    def _integer(self, found: Type, where: str) -> np.dtype[Any]:
        if found.width != found.size * 8:
            raise _bitfield(where)
        if found.boolean and found.size == 1:
            return np.dtype("?")
        if found.size in (1, 2, 4, 8):
            return np.dtype(f"{'i' if found.signed else 'u'}{found.size}")
        return np.dtype(f"V{found.size}")

    def _array(self, found: Type, where: str, depth: int) -> np.dtype[Any]:
        _, element = self.resolve(found.target)
        if element.kind is Kind.INT and element.name == "char" and found.count:
            return np.dtype(f"S{found.count}")
        inner = self._build(found.target, where, depth + 1)
        base, shape = inner.subdtype or (inner, ())
        return np.dtype((base, (found.count, *shape)))

    def _structure(self, found: Type, where: str, depth: int) -> np.dtype[Any]:
        names: list[str] = []
        formats: list[np.dtype[Any]] = []
        offsets: list[int] = []
        self._collect(found, where, 0, names, formats, offsets, depth)
        if not names:
            return np.dtype(f"V{found.size}")
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": found.size})

    def _collect(
        self,
        found: Type,
        where: str,
        base: int,
        names: list[str],
        formats: list[np.dtype[Any]],
        offsets: list[int],
        depth: int,
    ) -> None:
        """Append a struct's members, with those of anonymous inner ones as its own."""
        if depth > 64:
            raise ObjectError(
                "the type information (BTF) is damaged",
                why=f"{where} contains itself",
                remedy="compile again with clang -g -target bpf",
            )
        for member in found.members:
            label = f"{where}.{member.name or '(anonymous)'}"
            if member.bits or member.offset % 8:
                raise _bitfield(label)
            offset = base + member.offset // 8
            _, inner = self.resolve(member.type_id)
            if not member.name and inner.kind in (Kind.STRUCT, Kind.UNION):
                self._collect(inner, where, offset, names, formats, offsets, depth + 1)
                continue
            names.append(member.name)
            formats.append(self._build(member.type_id, label, depth + 1))
            offsets.append(offset)


def _bitfield(where: str) -> BpfError:
    return BpfError(
        f"{where} is a bitfield",
        why="NumPy has no dtype for one",
        remedy="use a whole integer in the C struct, with masks",
    )


def _sections(data: bytes) -> tuple[bytes, bytes]:
    """The strings and the types."""
    magic, version, _, header, type_offset, type_length, text_offset, text_length = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1:
        raise ValueError(f"magic {magic:#x}, version {version}")
    types = data[header + type_offset : header + type_offset + type_length]
    texts = data[header + text_offset : header + text_offset + text_length]
    if len(types) != type_length or len(texts) != text_length or not texts or texts[-1]:
        raise ValueError("a section ends beyond the data")
    return texts, types


def _parse(types: bytes, text: Callable[[int], str], *, first: bool) -> Iterator[Type]:
    """Yield every type by its number, beginning with number 0, void, where these are the first."""
    if first:
        yield Type(Kind.VOID, "void")
    place = 0
    while place < len(types):
        name, info, size = _TYPE.unpack_from(types, place)
        place += _TYPE.size
        kind = Kind(info >> 24 & 0x1F)
        fixed, each = _EXTRA.get(kind, (0, 0))
        length = info & 0xFFFF
        extra = types[place : place + fixed + each * length]
        if len(extra) != fixed + each * length:
            raise ValueError("a type ends beyond the data")
        place += len(extra)
        yield _type(kind, text(name), bool(info >> 31), size, extra, text)


def _type(kind: Kind, name: str, flag: bool, size: int, extra: bytes, text: Any) -> Type:
    match kind:
        case Kind.INT:
            encoding, offset, width = extra[3] & 0xF, extra[2], extra[0]
            return Type(
                kind,
                name,
                size=size,
                signed=bool(encoding & _INT_SIGNED),
                boolean=bool(encoding & _INT_BOOL),
                width=width if not offset else 0,
            )
        case Kind.ARRAY:
            target, _, count = struct.unpack("<III", extra)
            return Type(kind, name, target=target, count=count)
        case Kind.STRUCT | Kind.UNION:
            members = tuple(
                Member(text(n), target, where & 0xFFFFFF if flag else where, where >> 24 if flag else 0)
                for n, target, where in _MEMBER.iter_unpack(extra)
            )
            return Type(kind, name, size=size, members=members)
        case Kind.ENUM:
            layout = "<Ii" if flag else "<II"
            values = tuple((text(n), value) for n, value in struct.iter_unpack(layout, extra))
            return Type(kind, name, size=size, signed=flag, values=values)
        case Kind.ENUM64:
            values = tuple(
                (text(n), (high << 32 | low) - (1 << 64 if flag and high >> 31 else 0))
                for n, low, high in struct.iter_unpack("<III", extra)
            )
            return Type(kind, name, size=size, signed=flag, values=values)
        case Kind.DATASEC:
            # A variable's name is on its own type.
            members = tuple(
                Member("", target, offset, length) for target, offset, length in _MEMBER.iter_unpack(extra)
            )
            return Type(kind, name, size=size, members=members)
        case Kind.FUNC_PROTO:
            members = tuple(Member(text(n), target, 0, 0) for n, target in struct.iter_unpack("<II", extra))
            return Type(kind, name, target=size, members=members)
        case Kind.FLOAT:
            return Type(kind, name, size=size)
        case _:
            return Type(kind, name, target=size)
