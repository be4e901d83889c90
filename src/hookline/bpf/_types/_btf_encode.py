"""A NumPy dtype as BTF, so that maps made from Python are typed for everyone who opens them later."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from hookline.bpf._types._btf import Kind

__all__ = ["Encoder"]

_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_SIGNED, _BOOL = 1, 4
_C_NAMES = {"u": "__u{}", "i": "__s{}"}
_FLOATS = {4: "float", 8: "double"}


class Encoder:
    """Collects types; `data` is the whole, as the kernel loads it."""

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._texts = bytearray(b"\0")
        self._known: dict[Any, int] = {}

    def add(self, dtype: np.dtype[Any]) -> int:
        """Add a dtype and return its number, or 0 where BTF or the kernel has no way to say it.

        These are structs whose members overlap without all beginning at 0, or have names that are none in C. Numbers
        that BTF cannot say, such as those of another byte order, are bytes in it: never a wrong number.
        """
        if dtype not in self._known:
            self._known[dtype] = self._make(dtype)
        return self._known[dtype]

    def data(self) -> bytes:
        """All types added, with the header."""
        types = b"".join(self._types)
        header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(self._texts))
        return header + types + bytes(self._texts)

    def _make(self, dtype: np.dtype[Any]) -> int:
        if dtype.subdtype is not None:
            base, shape = dtype.subdtype
            made = self.add(base)
            for length in reversed(shape):
                made = self._array(made, length)
            return made
        if dtype.names is not None:
            return self._structure(dtype)
        if dtype.kind == "S":
            return self._array(self._integer("char", 1, _SIGNED), dtype.itemsize)
        if dtype.kind == "b":
            return self._integer("_Bool", 1, _BOOL)
        if dtype.kind == "f" and dtype.isnative and dtype.itemsize in _FLOATS:
            return self._type(_FLOATS[dtype.itemsize], Kind.FLOAT, 0, dtype.itemsize)
        if dtype.kind in "iu" and dtype.isnative:
            name = _C_NAMES[dtype.kind].format(dtype.itemsize * 8)
            return self._integer(name, dtype.itemsize, _SIGNED if dtype.kind == "i" else 0)
        return self._bytes(dtype.itemsize)

    def _structure(self, dtype: np.dtype[Any]) -> int:
        # The kernel wants them in this order.
        fields = sorted(
            ((name, dtype[name], _offset(dtype, name)) for name in dtype.names or ()),
            key=lambda field: field[2],
        )
        is_union = len(fields) > 1 and not any(offset for _, _, offset in fields)
        offsets = [offset for _, _, offset in fields]
        ends = [0, *(offset + inner.itemsize for _, inner, offset in fields)]
        overlaps = any(offset < end for offset, end in zip(offsets, ends, strict=False))
        members = b""
        for name, inner, offset in fields:
            # The kernel takes no floating-point number out of line.
            crooked = inner.kind == "f" and offset % inner.itemsize
            made = self._bytes(inner.itemsize) if crooked else self.add(inner)
            if not made or not name.isidentifier() or not name.isascii() or (overlaps and not is_union):
                return 0
            members += struct.pack("=III", self._text(name), made, offset * 8)
        kind = Kind.UNION if is_union else Kind.STRUCT
        return self._type("", kind, len(fields), dtype.itemsize, members)

    def _bytes(self, size: int) -> int:
        return self._array(self.add(np.dtype("u1")), size)

    def _array(self, element: int, length: int) -> int:
        if not element:
            return 0
        index = self.add(np.dtype("u4"))
        return self._type("", Kind.ARRAY, 0, 0, struct.pack("=III", element, index, length))

    def _integer(self, name: str, size: int, encoding: int) -> int:
        return self._type(name, Kind.INT, 0, size, struct.pack("=I", encoding << 24 | size * 8))

    def _type(self, name: str, kind: Kind, length: int, size: int, extra: bytes = b"") -> int:
        whole = struct.pack("=III", self._text(name), kind << 24 | length, size) + extra
        self._types.append(whole)
        return len(self._types)

    def _text(self, text: str) -> int:
        if not text:
            return 0
        place = len(self._texts)
        self._texts += text.encode() + b"\0"
        return place


def _offset(dtype: np.dtype[Any], name: str) -> int:
    return int(dtype.fields[name][1]) if dtype.fields is not None else 0
