"""A map's entries as JSON and as text: typed by BTF, raw bytes in hexadecimal where there are no types."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from hookline.bpf import Btf, Map

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
            f"map {opened.name!r} (id {opened.id}) cannot be dumped",
            why=f"it is a {opened.type} map: {why}",
            remedy="hookline maps list shows its sizes and which programs use it",
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
    keys, values = names_of(opened, "key"), names_of(opened, "value")
    key_bytes = opened.key_dtype.itemsize
    for key, value in opened.items():
        yield {"key": plain(key, keys, key_bytes), **value_document(opened, value, values)}


def value_document(opened: Map, value: Any, names: Any = None) -> Document:
    """One value: ``{value}``, or ``{value, cpus}`` of a per-CPU map."""
    size = opened.value_dtype.itemsize
    if not opened.per_cpu:
        return {"value": plain(value, names, size)}
    cpus = [plain(one, names, size) for one in value]
    return {"value": total(cpus), "cpus": cpus}


def given(opened: Map, what: Literal["key", "value"], wanted: Any) -> Any:
    """What a person gave for a key or value, the names of enums replaced by their numbers."""
    return _numbers(wanted, names_of(opened, what))


def names_of(opened: Map, what: Literal["key", "value"]) -> Any:
    """Where a map's type has enums: ``{number: name}``, of a struct ``{member: …}``, of an array ``[…]``, else None."""
    definition = opened.definition
    type_id = definition.key_type_id if what == "key" else definition.value_type_id
    btf = definition.btf() if type_id else None
    return None if btf is None else _named(btf, type_id)


def _named(btf: Btf, type_id: int) -> Any:
    _, found = btf.resolve(type_id)
    match found.kind.name:
        case "ENUM" | "ENUM64":
            return {number: name for name, number in reversed(found.values)}
        case "ARRAY":
            inner = _named(btf, found.target)
            return None if inner is None else [inner]
        case "DATASEC":
            variables = [btf[one.type_id] for one in found.members]
            members = {one.name: _named(btf, one.target) for one in variables}
        case "STRUCT" | "UNION":
            members = {}
            for one in found.members:
                inner = _named(btf, one.type_id)
                # The members of one without a name are the outer one's.
                members |= {one.name: inner} if one.name else inner if isinstance(inner, dict) else {}
        case _:
            return None
    return {name: inner for name, inner in members.items() if inner is not None} or None


def _numbers(wanted: Any, names: Any) -> Any:
    if isinstance(wanted, str) and isinstance(names, dict):
        return next((number for number, name in names.items() if name == wanted), wanted)
    if isinstance(wanted, dict) and isinstance(names, dict):
        return {name: _numbers(one, names.get(name)) for name, one in wanted.items()}
    if isinstance(wanted, list) and isinstance(names, list):
        return [_numbers(one, names[0]) for one in wanted]
    return wanted


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


def plain(value: Any, names: Any = None, size: int = 0) -> Any:
    """A NumPy scalar as JSON has it: numbers, dicts of members, lists, text, bytes in hexadecimal.

    Args:
        value: The scalar.
        names: What enums are called, as `names_of` has it.
        size: How many bytes it has: NumPy leaves out the zeros that a text ends with.
    """
    import numpy as np

    if isinstance(value, np.ndarray):
        inner = names[0] if names else None
        return [plain(one, inner, value.dtype.itemsize) for one in value]
    if isinstance(value, np.void):
        members = value.dtype.fields
        if members:
            names = names or {}
            return {
                name: plain(value[name], names.get(name), one[0].base.itemsize)
                for name, one in members.items()
            }
        return value.tobytes().hex(" ")
    if isinstance(value, bytes):
        text = value.split(b"\0", 1)[0].decode("latin-1")
        return text if all(map(_is_text, text)) else value.ljust(size, b"\0").hex(" ")
    number = value.item() if hasattr(value, "item") else value
    return names.get(number, number) if names else number


def _is_text(character: str) -> bool:
    return character in "\t\n\r" or " " <= character <= "~"


def text(value: Any) -> str:
    """A plain value on one line, for a table."""
    if isinstance(value, dict):
        return " ".join(f"{name}={text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return f"[{' '.join(map(text, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value.encode("unicode_escape").decode() if "\n" in value or "\r" in value else value
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
