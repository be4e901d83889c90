"""Python values to the bytes of a dtype and back, strictly: nothing wraps around or is cut off.

One rule says what fits, for single values, batches, rings and constants alike:

- an integer takes whole numbers of its range and no floating-point ones, which may have been rounded on their way;
- a bool takes False, True, 0 and 1;
- a floating-point number takes every real number, rounded to the nearest, that does not become infinite by it;
- text takes str (as UTF-8) and bytes that are no longer;
- a struct takes a dict or a tuple of its members, or a record; what names two members of a union must say the same in both;
- an array takes as many elements as it has, a dimension of a batch as many as it is long;
- everything takes raw bytes of its exact size.

Padding is always zero. The kernel compares hash keys byte by byte, so a key whose padding holds leftovers
would never be found.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import operator
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from hookline.bpf._errors import BpfError

__all__ = ["canonical", "encode", "encode_rows", "fill", "fill_each", "layout", "unknown_name"]

Array = npt.NDArray[Any]
_RAW = (bytes, bytearray, memoryview)


def layout(given: npt.DTypeLike, what: str) -> np.dtype[Any]:
    """A dtype whose elements are memory that the kernel may have.

    Args:
        given: What NumPy can make a dtype of.
        what: What has it, for error messages.

    Raises:
        BpfError: It is no dtype, or one of Python objects: these are pointers into this process.
    """
    try:
        dtype = np.dtype(given)
    except (TypeError, ValueError) as error:
        raise BpfError(f"{given!r} is no dtype for {what}", why=str(error)) from None
    if dtype.hasobject:
        raise BpfError(
            f"{what} cannot be {dtype}", why="Python objects are pointers that mean nothing outside"
        )
    return dtype


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
        # The commonest case, ten times as fast as by way of an array.
        try:
            return value.to_bytes(dtype.itemsize, sys.byteorder, signed=dtype.kind == "i")
        except OverflowError:
            raise _beyond(dtype, value, what) from None
    if _is_raw(value) and dtype.kind != "S":
        return _exactly(bytes(value), dtype.itemsize, what)  # type: ignore[call-overload]
    slot = np.zeros((), dtype)
    fill(slot, value, what)
    return slot.tobytes()


def encode_rows(dtype: np.dtype[Any], values: object, what: str, *, each: int = 0) -> Array:
    """Many values, contiguous, all padding zero; arrays of the right dtype are taken as they are.

    Args:
        dtype: What each value is.
        values: An array, a sequence, or anything that can be gone through.
        what: What the values are for, for error messages.
        each: Per-CPU values: the number of CPUs; a value is then one for all of them, or as many.

    Returns:
        An array of shape ``(n,)``, or ``(n, each)``, and the dimensions of the dtype itself, if it is an array's.

    Raises:
        BpfError: A value does not fit.
    """
    base, inner = dtype.subdtype or (dtype, ())
    given = _gathered(values, what)
    array = _fitted(given, base, what)
    if array is None:
        return _row_by_row(dtype, given, what, each)
    shapes = [(len(array), *inner)] if array.ndim else []
    if each:
        shapes.append((len(array), each, *inner)) if array.ndim else None
        wanted = f"(n, {', '.join(map(str, (each, *inner)))}) or (n, {', '.join(map(str, inner))})"
    else:
        wanted = f"(n, {', '.join(map(str, inner))})"
    if not array.size and array.ndim == 1:
        array = array.reshape(0, *inner)
        shapes = [array.shape]
    if array.shape not in shapes:
        raise BpfError(f"{what} have shape {array.shape}", why=f"{wanted.replace(', )', ',)')} is wanted")
    if each and array.shape == shapes[0]:
        array = np.repeat(array[:, np.newaxis], each, axis=1)
    return canonical(array)


def fill_each(slot: Array, value: object, what: str, inner: tuple[int, ...]) -> None:
    """Fill one slot per CPU from one value for all, or from as many.

    Which of them it is, its dimensions say: members of a struct may be a list, so its values per CPU are an array.

    Args:
        slot: Zeros, of shape ``(CPUs,)`` and the dimensions of a value.
        value: What to write.
        what: For error messages.
        inner: The dimensions of a value.
    """
    depth = _depth(value) if slot.dtype.names is None or isinstance(value, np.ndarray) else 0
    if depth == len(inner) + 1:
        fill(slot, value, what)
        return
    one = np.zeros(inner, slot.dtype)
    fill(one, value, what)
    slot[...] = one


def fill(slot: Array, value: object, what: str) -> None:
    """Write a value into an array of no dimensions, or of a subarray's; `slot` must be zero before.

    Raises:
        BpfError: The value does not fit.
    """
    if type(value) is int and not slot.ndim and slot.dtype.kind in "iu":
        # The commonest case.
        _fill_whole(slot, value, what)
    elif _is_raw(value) and (slot.ndim or slot.dtype.kind != "S"):
        raw = _exactly(bytes(value), slot.nbytes, what)  # type: ignore[call-overload]
        if raw:
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
    return _relaid(values, values.dtype)


def _relaid(values: Array, dtype: np.dtype[Any]) -> Array:
    """The same members in another layout, all padding zero."""
    clean = np.zeros(values.shape, dtype)
    _copy_members(values, clean)
    return clean


def _same_members(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether two structs have the same members in the same order, wherever these lie.

    NumPy packs members anew when it joins or promotes arrays.
    """
    if one.subdtype is not None and other.subdtype is not None:
        return one.shape == other.shape and _same_members(one.base, other.base)
    if one.fields is None or other.fields is None:
        return one == other
    return one.names == other.names and all(
        _same_members(one.fields[name][0], other.fields[name][0]) for name in one.fields
    )


def unknown_name(kind: str, name: object, known: Sequence[str], owner: str) -> BpfError:
    """The error for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(str(name), known, 1)
    if near:
        remedy = f"did you mean {near[0]!r}?"
    else:
        remedy = f"there are {', '.join(known)}" if known else "there are none"
    return BpfError(f"{owner} has no {kind} {name!r}", remedy=remedy)


def _is_raw(value: object) -> bool:
    return isinstance(value, _RAW)


def _exactly(raw: bytes, size: int, what: str) -> bytes:
    if len(raw) != size:
        raise BpfError(
            f"{what} takes {size} bytes",
            why=f"{len(raw)} were given",
            remedy="give exactly so many, or a number, dict or tuple",
        )
    return raw


def _beyond(dtype: np.dtype[Any], value: object, what: str) -> BpfError:
    """The error for a number outside a dtype's range."""
    if dtype.kind == "b":
        why = "it is a bool, which is 0 or 1"
    elif dtype.kind == "f":
        why = f"it is a {dtype}, and this would be infinite"
    else:
        limits = np.iinfo(dtype)
        why = f"it is a {dtype}, from {limits.min} to {limits.max}"
    return BpfError(f"{_shown(value)} does not fit {what}", why=why)


def _shown(value: object) -> str:
    """A value as Python writes it, shortened, without the name of NumPy's type."""
    return reprlib.repr(value.item() if isinstance(value, np.generic) else value)


# Many at once


def _gathered(values: object, what: str) -> Array | Sequence[Any]:
    if isinstance(values, np.ndarray | list | tuple | range):
        return values
    if hasattr(values, "__array__") or isinstance(values, memoryview):
        return np.asarray(values)
    if isinstance(values, str | Mapping) or _is_raw(values) or not isinstance(values, Iterable):
        raise BpfError(f"{what} must be an array or a sequence", why=f"{_shown(values)} was given")
    return list(values)


def _fitted(given: Array | Sequence[Any], base: np.dtype[Any], what: str) -> Array | None:
    """The values as an array of this dtype and of their own shape; None where they must be looked at one by one."""
    if isinstance(given, np.ndarray):
        if given.dtype == base:
            return given
        if base.names is not None:
            if given.dtype.kind in "biuf":
                why = f"they are {given.dtype} of shape {given.shape}, and {base} is wanted"
                raise BpfError(f"{what} do not fit", why=why)
            return _relaid(given, base) if _same_members(given.dtype, base) else None
    elif base.kind not in "biuf":
        return None
    try:
        plain = np.asarray(given)
    except (ValueError, TypeError, OverflowError):
        return None
    if not plain.size and plain.ndim == 1:
        return np.zeros(0, base)
    if plain.dtype.kind not in "biuf" or base.kind not in "biuf":
        return None
    if plain.dtype.kind == "f" and base.kind != "f":
        # NumPy makes one dtype of all, so integers may have become floats: look at each of them.
        return None
    return _converted(plain, base, what)


def _converted(plain: Array, base: np.dtype[Any], what: str) -> Array:
    """Numbers in another dtype, each checked.

    Raises:
        BpfError: One does not fit.
    """
    if base.kind == "f":
        # Through float, as a single number goes, so that both round alike.
        with np.errstate(over="ignore"):
            numbers = plain if plain.dtype == base else plain.astype("f8").astype(base)
        wrong = np.isinf(numbers) & ~np.isinf(plain)
    else:
        low, high = (0, 1) if base.kind == "b" else (np.iinfo(base).min, np.iinfo(base).max)
        if not plain.size or (low <= int(plain.min()) and int(plain.max()) <= high):
            return plain.astype(base)
        # Compared as Python's integers: int64 and uint64 meet as floats in NumPy.
        held = np.array([low <= int(one) <= high for one in plain.flat], bool)
        wrong, numbers = ~held.reshape(plain.shape), plain
    if wrong.any():
        place = tuple(int(one) for one in np.argwhere(wrong)[0])
        # The same refusal as that of a single value.
        _fill_scalar(np.zeros((), base), plain[place], f"{what}{list(place)}")
    return numbers


def _row_by_row(dtype: np.dtype[Any], given: Array | Sequence[Any], what: str, each: int) -> Array:
    base, inner = dtype.subdtype or (dtype, ())
    if isinstance(given, np.ndarray) and not given.ndim:
        raise BpfError(f"{what} have shape ()", why="each has a row")
    rows = np.zeros((len(given), *([each] if each else []), *inner), base)
    for index, item in enumerate(given):
        if each:
            fill_each(rows[index], item, f"{what}[{index}]", inner)
        else:
            fill(rows[index, ...], item, f"{what}[{index}]")
    return rows


def _depth(value: object) -> int:
    """How many dimensions a value has; text and raw bytes have none."""
    if isinstance(value, np.ndarray):
        return value.ndim
    if isinstance(value, list | tuple | range):
        return 1 + (_depth(value[0]) if len(value) else 0)
    return 0


# One value


def _fill_array(slot: Array, value: object, what: str) -> None:
    if isinstance(value, Set):
        raise BpfError(
            f"{what} takes {len(slot)} elements in their order",
            why="a set was given",
            remedy="give a list of so many",
        )
    items = _gathered(value, what)
    numbers = _fitted(items, slot.dtype, what)
    if numbers is not None:
        if numbers.shape != slot.shape:
            raise BpfError(
                f"{what} has shape {slot.shape}",
                why=f"a value of shape {numbers.shape} was given",
                remedy="give as many elements as it has",
            )
        slot[...] = canonical(numbers)
        return
    if (isinstance(items, np.ndarray) and not items.ndim) or len(items) != len(slot):
        raise BpfError(
            f"{what} takes {len(slot)} elements",
            why=f"{_shown(value)} was given",
            remedy="give a list of so many",
        )
    for index, item in enumerate(items):
        fill(slot[index, ...], item, f"{what}[{index}]")


def _fill_members(slot: Array, names: tuple[str, ...], value: object, what: str) -> None:
    given = getattr(value, "dtype", None)
    if given is not None and given.names is not None and np.ndim(value) == 0:  # type: ignore[arg-type]
        if _same_members(given, slot.dtype):
            _copy_members(np.asarray(value), slot)
            return
        value = {name: value[name] for name in given.names}  # type: ignore[index]
    if isinstance(value, Mapping):
        _fill_named(slot, names, value, what)
        return
    if not isinstance(value, tuple | list):
        raise BpfError(
            f"{what} takes {', '.join(names)}", why=f"{_shown(value)} was given", remedy="give a dict"
        )
    if _overlaps(slot.dtype):
        raise BpfError(
            f"{what} holds a union, so a tuple is ambiguous",
            remedy="give a dict that names one of its members",
            why="its members share their place",
        )
    if len(value) != len(names):
        raise BpfError(
            f"{what} has {len(names)} members", why=f"{len(value)} were given", remedy=f"give {names}"
        )
    for name, member in zip(names, value, strict=True):
        fill(slot[name], member, f"{what}.{name}")


def _fill_named(slot: Array, names: tuple[str, ...], value: Mapping[Any, object], what: str) -> None:
    for name, member in value.items():
        if name not in names:
            raise unknown_name("member", name, names, what)
        fill(slot[name], member, f"{what}.{name}")
    if len(value) < 2 or not _overlaps(slot.dtype):
        return
    for name, member in value.items():
        alone = np.zeros_like(slot[name])
        fill(alone, member, what)
        if canonical(slot[name]).tobytes() != alone.tobytes():
            raise BpfError(
                f"the members given for {what} contradict each other",
                why=f"{name} shares its memory with another of them",
                remedy="name one member of a union",
            )


def _fill_scalar(slot: Array, value: object, what: str) -> None:
    dtype = slot.dtype
    if isinstance(value, np.ndarray):
        if value.ndim:
            raise BpfError(f"{what} takes one value", why=f"an array of shape {value.shape} was given")
        value = value[()]
    if isinstance(value, np.generic) and value.dtype == dtype:
        slot[...] = value
    elif dtype.kind == "S":
        try:
            # Bytes that are no UTF-8 are such in file names too (PEP 383).
            text = value.encode(errors="surrogateescape") if isinstance(value, str) else value
        except UnicodeEncodeError as error:
            raise BpfError(
                f"{_shown(value)} does not fit {what}",
                why=str(error),
                remedy="give a list of numbers in their range",
            ) from None
        if not isinstance(text, bytes | bytearray):
            raise BpfError(
                f"{what} takes text", why=f"{_shown(value)} was given", remedy='give a string: in JSON "text"'
            )
        if len(text) > dtype.itemsize:
            raise BpfError(
                f"{_shown(value)} does not fit {what}",
                why=f"it has {dtype.itemsize} bytes",
                remedy="give a shorter text",
            )
        slot[...] = bytes(text)
    elif dtype.kind == "V":
        raw = getattr(value, "tobytes", None)
        if raw is None:
            raise BpfError(
                f"{what} takes {dtype.itemsize} raw bytes",
                why=f"{_shown(value)} was given",
                remedy="give bytes of that length",
            )
        slot[...] = np.frombuffer(_exactly(raw(), dtype.itemsize, what), dtype)[0]
    elif dtype.kind == "f":
        slot[...] = _real(dtype, value, what)
    elif dtype.kind in "biu":
        _fill_whole(slot, value, what)
    else:
        raise BpfError(f"{what} takes {dtype}", why=f"{_shown(value)} was given")


def _fill_whole(slot: Array, value: object, what: str) -> None:
    dtype = slot.dtype
    try:
        number = int(value) if isinstance(value, np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        if isinstance(value, float | np.floating):
            why = f"a {dtype} takes a number that cannot have been rounded, no floating-point one"
            raise BpfError(
                f"{_shown(value)} does not fit {what}", why=why, remedy="give int(…) of it"
            ) from None
        raise BpfError(
            f"{what} takes a number", why=f"{_shown(value)} was given", remedy="give a number, without quotes"
        ) from None
    if dtype.kind == "b" and not 0 <= number <= 1:
        raise _beyond(dtype, value, what)
    try:
        slot[...] = number
    except OverflowError:
        raise _beyond(dtype, value, what) from None


def _real(dtype: np.dtype[Any], value: object, what: str) -> Array:
    try:
        if isinstance(value, str | complex | np.complexfloating) or _is_raw(value):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise _beyond(dtype, value, what) from None
    except (TypeError, ValueError):
        raise BpfError(
            f"{what} takes a number", why=f"{_shown(value)} was given", remedy="give a number, without quotes"
        ) from None
    with np.errstate(over="ignore"):
        rounded = np.array(number).astype(dtype)
    if np.isinf(rounded) and value != float(rounded):
        raise _beyond(dtype, value, what)
    return rounded


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
