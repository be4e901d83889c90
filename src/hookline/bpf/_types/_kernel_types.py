"""The types that the kernel holds: its own, its modules', and those that came with programs and maps."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, FeatureMissing
from hookline.bpf._syscall import Command
from hookline.bpf._types._btf import _EXTRA, _HEADER, _TYPE, Btf, Kind

__all__ = ["BtfInfo", "by_id", "describe", "name", "names", "vmlinux"]

VMLINUX = Path("/sys/kernel/btf/vmlinux")


class _Info(ctypes.Structure):
    """``struct bpf_btf_info``."""

    _fields_ = [
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class BtfInfo:
    """What the kernel says of types that it holds.

    Attributes:
        id: The kernel's number for them.
        name: ``"vmlinux"``, a module's name, or ``""`` for those of a program or map.
        size: In bytes.
        origin: ``"kernel"``, ``"module"`` or ``"program"`` (whatever user space loaded).
    """

    id: int
    name: str
    size: int
    origin: str


def describe(fd: int) -> BtfInfo:
    """What the kernel says of a BTF descriptor."""
    room = ctypes.create_string_buffer(64)
    info = _Info(name=_syscall.address(room), name_len=len(room))
    _syscall.info(fd, info, "BTF")
    text = room.value.decode(errors="replace")
    origin = "program" if not info.kernel_btf else "kernel" if text == "vmlinux" else "module"
    return BtfInfo(info.id, text, info.btf_size, origin)


@functools.cache
def vmlinux() -> Btf:
    """See `Btf.vmlinux`."""
    return Btf(_vmlinux_bytes())


@functools.lru_cache(maxsize=32)
def by_id(btf_id: int) -> Btf:
    """See `Btf.from_id`."""
    data, found = _read(btf_id)
    if found.origin == "kernel":
        return vmlinux()
    return Btf(data, base=vmlinux() if found.origin == "module" else None)


def names(btf_id: int, wanted: Iterable[int]) -> dict[int, str]:
    """The names of some types of the kernel or a module, without parsing the others (about 0.1 s).

    Args:
        btf_id: Whose types; 0 for the kernel's own.
        wanted: Their numbers. Those that do not exist are absent in the answer.
    """
    left = set(wanted)
    base = _vmlinux_bytes()
    found, count = _scan(base, left, 1, b"")
    if btf_id and left - set(found):
        data, info = _read(btf_id)
        if info.origin == "module":
            found |= _scan(data, left, count, _texts(base))[0]
    return found


def name(btf_id: int, type_id: int) -> str:
    """The name of one type of a program's or map's own types; empty where it has none."""
    data, _ = _read(btf_id)
    return _scan(data, {type_id}, 1, b"")[0].get(type_id, "")


def _read(btf_id: int) -> tuple[bytes, BtfInfo]:
    fd = _syscall.fd_by_id(Command.BTF_GET_FD_BY_ID, btf_id, "BTF")
    try:
        found = describe(fd)
        data = ctypes.create_string_buffer(found.size)
        _syscall.info(fd, _Info(btf=_syscall.address(data), btf_size=len(data)), "BTF")
    finally:
        os.close(fd)
    return data.raw, found


@functools.cache
def _vmlinux_bytes() -> bytes:
    try:
        return VMLINUX.read_bytes()
    except FileNotFoundError:
        raise FeatureMissing("BTF of its own (CONFIG_DEBUG_INFO_BTF)", minimum_kernel="5.2") from None
    except OSError as error:
        raise BpfError(
            f"cannot read {VMLINUX}",
            errno=error.errno or 0,
            remedy="check that sysfs is mounted, and that this user may read the file",
        ) from None


def _texts(data: bytes) -> bytes:
    *_, header, _, _, place, length = _HEADER.unpack_from(data)
    return data[header + place : header + place + length]


def _scan(data: bytes, wanted: set[int], number: int, base: bytes) -> tuple[dict[int, str], int]:
    """Walk over the types from one number on; the wanted ones' names, and the number after the last."""
    *_, header, start, length, _, _ = _HEADER.unpack_from(data)
    texts = base + _texts(data)
    place, end = header + start, header + start + length
    found: dict[int, str] = {}
    extra = {kind.value: _EXTRA.get(kind, (0, 0)) for kind in Kind}
    unpack, size = _TYPE.unpack_from, _TYPE.size
    while place < end:
        text, info, _ = unpack(data, place)
        if number in wanted:
            found[number] = texts[text : texts.index(0, text)].decode(errors="replace")
        fixed, each = extra[info >> 24 & 0x1F]
        place += size + fixed + each * (info & 0xFFFF)
        number += 1
    return found, number
