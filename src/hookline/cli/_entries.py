"""A map's entries as JSON and as text: typed by BTF, raw bytes in hexadecimal where there are no types."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from hookline.bpf import Map

Document = dict[str, Any]
_MOST_IN_AN_INTERVAL = 1 << 53
# What has entries that only a program, or a reader of its own, can take out.
_WITHOUT_ENTRIES = {
    "ringbuf": "its records go to one reader: bpf.Ring reads them",
    "user_ringbuf": "it is written by user space and read by a program",
    "perf_event_array": "it holds perf events, whose records go to one reader",
    "queue": "it has no keys, and reading would take its values out",
    "stack": "it has no keys, and reading would take its values out",
    "bloom_filter": "it only answers whether a value is in it",
    "arena": "it is memory that its programs lay out themselves",
    "sk_storage": "its entries hang on sockets: they are found by a socket's descriptor",
    "task_storage": "its entries hang on tasks: they are found by a task's descriptor",
    "inode_storage": "its entries hang on files: they are found by a file's descriptor",
    "cgrp_storage": "its entries hang on cgroups: they are found by a cgroup's descriptor",
    "struct_ops": "it holds an implementation, not entries",
}


def refuse_without_entries(opened: Map) -> None:
    """Raises where a map has no entries to list."""
    from hookline.errors import HooklineError

    why = _WITHOUT_ENTRIES.get(opened.type)
    if why:
        raise HooklineError(
            f"map {opened.name!r} (id {opened.id}) cannot be dumped", why=f"it is a {opened.type} map: {why}"
        )


def readable(opened: Map) -> Map:
    """The map, or the same one without its types where these cannot be shown (bitfields)."""
    from hookline import bpf

    try:
        _ = opened.key_dtype, opened.value_dtype
    except bpf.BpfError:
        import os

        plain = dataclasses.replace(opened.definition, key_type_id=0, value_type_id=0)
        return bpf.Map(plain, os.dup(opened.fd))
    return opened


def entries(opened: Map) -> Iterator[Document]:
    """Every entry: ``{key, value}``; of a per-CPU map ``{key, value, cpus}``, where ``value`` is the sum."""
    for key, value in opened.items():
        yield {"key": plain(key), **value_document(opened, value)}


def value_document(opened: Map, value: Any) -> Document:
    """One value: ``{value}``, or ``{value, cpus}`` of a per-CPU map."""
    if not opened.per_cpu:
        return {"value": plain(value)}
    cpus = [plain(one) for one in value]
    return {"value": total(cpus), "cpus": cpus}


def total(values: list[Any]) -> Any:
    """The sum over CPUs, member by member; None for what is no number, such as text."""
    first = values[0]
    if isinstance(first, dict):
        return {name: total([one[name] for one in values]) for name in first}
    if isinstance(first, list):
        return [total(list(column)) for column in zip(*values, strict=True)]
    if isinstance(first, int | float) and not isinstance(first, bool):
        # Numbers that one CPU counts up and another down go below 0 on the latter, which unsigned is near 2**64.
        return sum(values) % (1 << 64) if sum(values) >= 1 << 64 and isinstance(first, int) else sum(values)
    return None


def plain(value: Any) -> Any:
    """A NumPy scalar as JSON has it: numbers, dicts of members, lists, text, bytes in hexadecimal."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return [plain(one) for one in value]
    if isinstance(value, np.void):
        if value.dtype.names:
            return {name: plain(value[name]) for name in value.dtype.names}
        return value.tobytes().hex(" ")
    if isinstance(value, bytes):
        text = value.split(b"\0", 1)[0]
        return text.decode() if text.isascii() and text.decode().isprintable() else value.hex(" ")
    return value.item() if hasattr(value, "item") else value


def text(value: Any) -> str:
    """A plain value on one line, for a table."""
    if isinstance(value, dict):
        return " ".join(f"{name}={text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return f"[{' '.join(map(text, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "-" if value is None else str(value)


def growth(opened: Map, before: Document, now: Document) -> Any:
    """By how much the numbers of an entry grew, member by member; of a per-CPU map the CPUs' growth together."""
    if "cpus" not in now:
        return change(before["value"], now["value"], opened.value_dtype)
    pairs = zip(before["cpus"], now["cpus"], strict=True)
    return _together([change(old, new, opened.value_dtype) for old, new in pairs])


def change(before: Any, now: Any, dtype: np.dtype[Any]) -> Any:
    """By how much numbers grew, member by member; None for what is no number, did not change, or was set anew.

    A counter that has begun again at 0 behind its largest number grew all the same. Nothing grows by more than 2**53
    between two looks: such a number was set anew, and has no rate.
    """
    dtype = dtype.base
    if isinstance(now, dict) and isinstance(before, dict):
        found = {name: change(before.get(name), one, dtype[name]) for name, one in now.items()}
        return {name: one for name, one in found.items() if one is not None} or None
    if isinstance(now, list) and isinstance(before, list):
        columns = [change(old, new, dtype) for old, new in zip(before, now, strict=False)]
        return columns if any(one is not None for one in columns) else None
    if not (isinstance(now, int | float) and isinstance(before, int | float)) or isinstance(now, bool):
        return None
    grown = now - before
    bits = 8 * dtype.itemsize
    # A number of 32 bits may well grow by more than half of its range, one of 64 bits cannot.
    if dtype.kind in "iu" and (bits == 64 or (bits == 32 and grown < 0)):
        half = 1 << bits - 1
        grown = (grown + half) % (2 * half) - half
    return grown if 0 < abs(grown) <= _MOST_IN_AN_INTERVAL else None


def _together(parts: list[Any]) -> Any:
    """Changes added up, those that are none left out."""
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _together([part.get(name) for part in parts]) for name in names}
    if isinstance(parts[0], list):
        return [_together(list(column)) for column in zip(*parts, strict=True)]
    return sum(parts)
