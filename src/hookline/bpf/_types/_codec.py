"""Python values to the bytes of a dtype and back, strictly: nothing wraps around or is cut off.

Padding is always zero. The kernel compares hash keys byte by byte, so a key whose padding holds leftovers
would never be found.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hookline.bpf._errors import BpfError

__all__ = ["canonical", "encode", "fill", "relaid", "same_members", "unknown_name"]

Array = npt.NDArray[Any]


def encode(dtype: np.dtype[Any], value: object, what: str) -> bytes:
    """The bytes of one value.

    Args:
        dtype: What the bytes must be.
        value: A scalar of that dtype, a number, a dict or a tuple of members (nested as needed), or bytes of
            the exact size.
        what: What the value is for, for error messages.

    Raises:
        BpfError: The value does not fit the dtype.
    """
    if type(value) is int and dtype.kind in "ui" and dtype.isnative:
        # The commonest case, ten times as fast as by way of an array; what does not fit is refused below.
        with contextlib.suppress(OverflowError):
            return value.to_bytes(dtype.itemsize, sys.byteorder, signed=dtype.kind == "i")
    if isinstance(value, bytes | bytearray | memoryview) and dtype.kind != "S":
        return _exactly(bytes(value), dtype.itemsize, what)
    if dtype.subdtype is not None:
        slots = np.zeros(1, [("whole", dtype)])
        fill(slots["whole"][0], value, what)
        return slots.tobytes()
    slot = np.zeros((), dtype)
    fill(slot, value, what)
    return slot.tobytes()


def fill(slot: Array, value: object, what: str) -> None:
    """Write a value into an array of no dimensions, or of a subarray's; `slot` must be zero before."""
    if isinstance(value, bytes | bytearray | memoryview) and (slot.ndim or slot.dtype.kind != "S"):
        raw = _exactly(bytes(value), slot.nbytes, what)
        slot[...] = np.frombuffer(raw, slot.dtype).reshape(slot.shape)
    elif slot.ndim:
        _fill_array(slot, value, what)
    elif slot.dtype.names is not None:
        _fill_members(slot, slot.dtype.names, value, what)
    else:
        _fill_scalar(slot, value, what)


def canonical(values: Array) -> Array:
    """The same values in contiguous memory with all padding zero."""
    values = np.ascontiguousarray(values)
    if not _has_padding(values.dtype):
        return values
    return relaid(values, values.dtype)


def relaid(values: Array, dtype: np.dtype[Any]) -> Array:
    """The same members in another layout, all padding zero."""
    clean = np.zeros(values.shape, dtype)
    _copy_members(values, clean)
    return clean


def same_members(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether two structs have the same members in the same order, wherever these lie.

    NumPy packs members anew when it joins or promotes arrays.
    """
    if one.subdtype is not None and other.subdtype is not None:
        return one.shape == other.shape and same_members(one.base, other.base)
    if one.fields is None or other.fields is None:
        return one == other
    return one.names == other.names and all(
        same_members(one.fields[name][0], other.fields[name][0]) for name in one.fields
    )


def unknown_name(kind: str, name: object, known: Sequence[str], owner: str) -> BpfError:
    """The error for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(str(name), known, 1)
    if near:
        remedy = f"did you mean {near[0]!r}?"
    else:
        remedy = f"there are {', '.join(known)}" if known else "there are none"
    return BpfError(f"{owner} has no {kind} {name!r}", remedy=remedy)


def _exactly(raw: bytes, size: int, what: str) -> bytes:
    if len(raw) != size:
        raise BpfError(f"{what} takes {size} bytes", why=f"{len(raw)} were given")
    return raw


def _fill_array(slot: Array, value: object, what: str) -> None:
    if slot.dtype.names is not None or slot.dtype.kind in "SV":
        items = list(value) if isinstance(value, Sequence | np.ndarray) else None
        if items is None or len(items) != len(slot):
            raise BpfError(f"{what} takes {len(slot)} elements", why=f"{value!r} was given")
        for index, item in enumerate(items):
            fill(slot[index, ...], item, f"{what}[{index}]")
        return
    try:
        given = np.asarray(value)
        exact = np.array(value, slot.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise BpfError(f"{value!r} does not fit {what}", why=str(error)) from None
    if given.shape != slot.shape:
        raise BpfError(f"{what} has shape {slot.shape}", why=f"a value of shape {given.shape} was given")
    if given.dtype.kind not in "biuf" or not np.array_equal(given, exact):
        raise BpfError(f"{value!r} does not fit {what}", why=f"its elements are {slot.dtype}")
    slot[...] = exact


def _fill_members(slot: Array, names: tuple[str, ...], value: object, what: str) -> None:
    given = getattr(value, "dtype", None)
    if given is not None and given.names is not None:
        value = {name: value[name] for name in given.names}  # type: ignore[index]
    if isinstance(value, Mapping):
        for name, member in value.items():
            if name not in names:
                raise unknown_name("member", name, names, what)
            fill(slot[name], member, f"{what}.{name}")
        return
    if not isinstance(value, tuple | list):
        raise BpfError(f"{what} takes {', '.join(names)}", why=f"{value!r} was given", remedy="give a dict")
    if _overlaps(slot.dtype):
        raise BpfError(
            f"{what} holds a union, so a tuple is ambiguous",
            remedy="give a dict that names one of its members",
        )
    if len(value) != len(names):
        raise BpfError(
            f"{what} has {len(names)} members", why=f"{len(value)} were given", remedy=f"give {names}"
        )
    for name, member in zip(names, value, strict=True):
        fill(slot[name], member, f"{what}.{name}")


def _fill_scalar(slot: Array, value: object, what: str) -> None:
    dtype = slot.dtype
    if dtype.kind == "S":
        text = value.encode() if isinstance(value, str) else value
        if not isinstance(text, bytes | bytearray):
            raise BpfError(f"{what} takes text", why=f"{value!r} was given")
        if len(text) > dtype.itemsize:
            raise BpfError(f"{value!r} does not fit {what}", why=f"it has {dtype.itemsize} bytes")
        slot[...] = bytes(text)
        return
    if dtype.kind == "V":
        raw = getattr(value, "tobytes", None)
        if raw is None:
            raise BpfError(f"{what} takes {dtype.itemsize} raw bytes", why=f"{value!r} was given")
        slot[...] = np.frombuffer(_exactly(raw(), dtype.itemsize, what), dtype)[0]
        return
    try:
        slot[...] = float(value) if dtype.kind == "f" else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        if isinstance(value, np.bool_):
            slot[...] = int(value)
            return
        raise BpfError(f"{what} takes a number", why=f"{value!r} was given") from None
    except OverflowError:
        limits = np.iinfo(dtype)
        raise BpfError(
            f"{value!r} does not fit {what}", why=f"it is a {dtype}, from {limits.min} to {limits.max}"
        ) from None


@functools.cache
def _has_padding(dtype: np.dtype[Any]) -> bool:
    if dtype.subdtype is not None:
        return _has_padding(dtype.subdtype[0])
    if dtype.fields is None:
        return False
    covered = np.zeros(dtype.itemsize, bool)
    for inner, offset, *_ in dtype.fields.values():
        covered[offset : offset + inner.itemsize] = True
        if _has_padding(inner):
            return True
    return not covered.all()


@functools.cache
def _overlaps(dtype: np.dtype[Any]) -> bool:
    places = sorted((offset, inner.itemsize) for inner, offset, *_ in (dtype.fields or {}).values())
    return any(start + size > after for (start, size), (after, _) in itertools.pairwise(places))


def _copy_members(source: Array, target: Array) -> None:
    if source.dtype.names is None:
        target[...] = source
        return
    for name in source.dtype.names:
        _copy_members(source[name], target[name])
