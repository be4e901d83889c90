"""What a map is: its type, sizes and BTF, before the load and as the kernel tells it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from hookline.bpf import _syscall
from hookline.bpf._types import _kernel_types
from hookline.bpf._types._btf import Btf

__all__ = ["MapDefinition", "describe"]


class _Info(ctypes.Structure):
    """``struct bpf_map_info``."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class MapDefinition:
    """What a map is, in an object before the load or in the kernel after it.

    Attributes:
        type: The kernel's name: ``"hash"``, ``"lru_percpu_hash"``, …
        key_size: In bytes.
        value_size: In bytes, of one CPU's value for a per-CPU map.
        max_entries: How many entries it can hold (for a ring buffer, its bytes).
        flags: ``BPF_F_*`` of the map's creation.
        id: The kernel's number for it, 0 before the load.
        btf_id: The kernel's number for its types, 0 before the load or where it came without.
        extra: ``map_extra``: a Bloom filter's number of hashes, an arena's address.
    """

    name: str
    type: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    id: int
    btf: Callable[[], Btf | None]
    key_type_id: int
    value_type_id: int
    btf_id: int = 0
    extra: int = 0


def describe(fd: int) -> MapDefinition:
    """What the kernel says of a map; its BTF is read when it is asked for."""
    info = _Info()
    _syscall.info(fd, info, "a map")
    btf_id = info.btf_id

    def types() -> Btf | None:
        return _kernel_types.by_id(btf_id) if btf_id else None

    return MapDefinition(
        name=info.name.decode(errors="replace"),
        type=_syscall.name_of(_syscall.MAP_TYPES, info.type),
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        id=info.id,
        btf=types,
        key_type_id=info.btf_key_type_id,
        value_type_id=info.btf_value_type_id,
        btf_id=btf_id,
        extra=info.map_extra,
    )
