"""Making a map without an object."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno as errnos
import mmap
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from hookline.bpf import _rights, _syscall
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._maps import _map_forms
from hookline.bpf._maps._map_info import MapDefinition, describe
from hookline.bpf._syscall import Command, Flag
from hookline.bpf._types._btf import Btf
from hookline.bpf._types._btf_encode import Encoder
from hookline.bpf._types._codec import unknown_name

__all__ = ["create"]

# What the kernel demands of a type whatever is asked for.
_REQUIRED_FLAGS = {
    "lpm_trie": Flag.NO_PREALLOC,
    "arena": Flag.MMAPABLE,
    **dict.fromkeys(_map_forms.OWNED, Flag.NO_PREALLOC),
}
_OF_MAPS = {"array_of_maps", "hash_of_maps"}
_RINGS = {"ringbuf", "user_ringbuf"}
_NO_KEYS = {"queue", "stack", "bloom_filter", "ringbuf", "user_ringbuf", "arena"}
_INDEXED = {
    "array",
    "percpu_array",
    "array_of_maps",
    "prog_array",
    "perf_event_array",
    "cgroup_array",
    "stack_trace",
    "devmap",
    "devmap_hash",
    "sockmap",
    "cpumap",
    "xskmap",
    "reuseport_sockarray",
    *_map_forms.OWNED,
}
_VALUE_SIZES = {
    "prog_array": 4,
    "perf_event_array": 4,
    "cgroup_array": 4,
    "array_of_maps": 4,
    "hash_of_maps": 4,
    "xskmap": 4,
    "devmap": 8,
    "devmap_hash": 8,
    "cpumap": 8,
    "sockmap": 8,
    "sockhash": 8,
    "reuseport_sockarray": 8,
    "stack_trace": 127 * 8,
    "ringbuf": 0,
    "user_ringbuf": 0,
    "arena": 0,
}
# The types for which the kernel takes BTF.
_TYPED = {
    "hash",
    "array",
    "percpu_hash",
    "percpu_array",
    "lru_hash",
    "lru_percpu_hash",
    "lpm_trie",
    *_map_forms.OWNED,
}


def create(
    kind: str,
    key: np.dtype[Any] | None,
    value: np.dtype[Any] | None,
    max_entries: int,
    flags: int,
    name: str,
    extra: int,
    inner_fd: int,
) -> tuple[MapDefinition, int]:
    """Make a map; see `Map.create`. Returns what it became and its descriptor."""
    if kind not in _syscall.MAP_TYPES[1:]:
        raise unknown_name("map type", kind, _syscall.MAP_TYPES[1:], "the kernel")
    if key is None and kind in _INDEXED:
        key = np.dtype("u4")
    key_size = 0 if key is None else key.itemsize
    value_size = _VALUE_SIZES.get(kind, 0) if value is None else value.itemsize
    if (key is None and kind not in _NO_KEYS) or (value is None and kind not in _VALUE_SIZES):
        raise BpfError(
            f"a {kind} map needs a {'value' if key is not None else 'key'}", remedy="give its dtype or size"
        )
    flags |= _REQUIRED_FLAGS.get(kind, 0)
    for what, number, bits in (("max_entries", max_entries, 32), ("flags", flags, 32), ("extra", extra, 64)):
        if not 0 <= number < 1 << bits:
            raise BpfError(
                f"a map cannot have {what}={number}", why=f"the kernel's number for it has {bits} bits"
            )
    if kind in _OF_MAPS and not inner_fd:
        raise BpfError(
            f"a map of type {kind} needs an inner map", remedy="give inner=, one like those that it will hold"
        )
    short = re.sub(r"[^A-Za-z0-9_.]", "_", name)[:15].encode()
    with _types(kind, key, value) as (btf_fd, key_type, value_type, types):
        attr = _syscall.attributes(
            "IIIIIIIQQIIIIIQ",
            _syscall.MAP_TYPES.index(kind),
            key_size,
            value_size,
            max_entries,
            flags,
            inner_fd,
            0,
            *struct.unpack("=QQ", short.ljust(16, b"\0")),
            0,
            btf_fd,
            key_type,
            value_type,
            0,
            extra,
        )
        result = _syscall.call(Command.MAP_CREATE, attr)
    if result < 0:
        raise _refusal(kind, name, -result, max_entries, key_size, value_size)
    try:
        definition = describe(result)
    except BaseException:
        os.close(result)
        raise
    # The types as they were given: also where the kernel keeps none.
    return dataclasses.replace(
        definition,
        name=name or definition.name,
        btf=lambda: types or definition.btf(),
        key_type_id=key_type,
        value_type_id=value_type,
    ), result


@contextlib.contextmanager
def _types(
    kind: str, key: np.dtype[Any] | None, value: np.dtype[Any] | None
) -> Iterator[tuple[int, int, int, Btf | None]]:
    """Load the dtypes into the kernel as BTF where the map's type takes it."""
    encoder = Encoder()
    key_type = encoder.add(key) if key is not None else 0
    value_type = encoder.add(value) if value is not None else 0
    plain_key = key is not None and key.names is None
    if kind not in _TYPED or not key_type or not value_type or (kind == "lpm_trie" and plain_key):
        yield 0, 0, 0, None
        return
    data = encoder.data()
    source = ctypes.create_string_buffer(data, len(data))
    attr = _syscall.attributes("QQIII", _syscall.address(source), 0, len(data), 0, 0)
    fd = _syscall.call(Command.BTF_LOAD, attr)
    if fd == -errnos.EPERM:
        # Where unprivileged users may make maps, they may not bring types: the handle knows them all the same.
        yield 0, 0, 0, None
        return
    if fd < 0:
        raise failure(-fd, "cannot load the map's types (BTF)")
    try:
        yield fd, key_type, value_type, Btf(data)
    finally:
        os.close(fd)


def _refusal(kind: str, name: str, errno: int, max_entries: int, key_size: int, value_size: int) -> BpfError:
    what = f"cannot make the {kind} map {name!r}"
    if errno == errnos.EINVAL:
        from hookline.bpf import features

        finding = features.map_type(kind)
        if finding.answer is features.Answer.NO:
            return finding.error()
        why, remedy = _mistake(kind, max_entries, key_size, value_size)
        return BpfError(what, errno=errno, why=why, remedy=remedy)
    if errno in (errnos.ENOMEM, errnos.E2BIG):
        return BpfError(
            what, errno=errno, why=f"there is no memory for {max_entries} entries, or they are too large"
        )
    return failure(errno, what, capability=" ".join(_rights.for_maps([kind])))


def _mistake(kind: str, max_entries: int, key_size: int, value_size: int) -> tuple[str, str]:
    """Why the kernel takes such a map for invalid, and what helps."""
    if kind in _RINGS and (max_entries % mmap.PAGESIZE or max_entries.bit_count() != 1):
        least = 1 << max(max_entries - 1, mmap.PAGESIZE - 1).bit_length()
        return (
            f"a ring has a power of two of bytes, whole pages of {mmap.PAGESIZE}, and not {max_entries}",
            f"give max_entries={least}",
        )
    if not max_entries and kind not in _map_forms.OWNED:
        return "it has no room for any entry", "give max_entries"
    if kind in _INDEXED and key_size != 4:
        return f"its keys are numbers of 4 bytes, and not of {key_size}", "leave the key out"
    if kind not in _NO_KEYS and not key_size:
        return "its keys have no bytes", "give a key of at least one byte"
    if kind in _VALUE_SIZES and value_size != _VALUE_SIZES[kind]:
        return f"its values have {_VALUE_SIZES[kind]} bytes, and not {value_size}", "leave the value out"
    if not value_size and kind not in _VALUE_SIZES:
        return "its values have no bytes", "give a value of at least one byte"
    why = f"no {kind} map has {max_entries} entries, keys of {key_size} bytes, values of {value_size} and these flags"
    return why, ""
