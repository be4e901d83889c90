"""A descriptor of a map: what the map is, the bytes of its keys and values, and single calls on it."""

from __future__ import annotations

import ctypes
import errno as errnos
import functools
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall, pin
from hookline.bpf._btf import Kind
from hookline.bpf._codec import canonical, encode
from hookline.bpf._errors import BpfError, MapFull, failure
from hookline.bpf._map_info import MapDefinition, describe
from hookline.bpf._syscall import Command

__all__ = ["ARRAYS", "MapHandle", "rounded"]

Array = npt.NDArray[Any]

ARRAYS = {"array", "percpu_array", "prog_array", "array_of_maps", "cgroup_array", "perf_event_array"}
_ANY, _ABSENT, _PRESENT = 0, 1, 2
_HOLD_DESCRIPTORS = {"prog_array", "array_of_maps", "hash_of_maps"}


class MapHandle:
    """What every kind of map has; `Map` adds the ways to read and write."""

    def __init__(self, definition: MapDefinition, fd: int | None = None) -> None:
        self._definition = definition
        self._fd = fd
        self._closed = False

    # What it is

    @property
    def fd(self) -> int:
        """The descriptor.

        Raises:
            BpfError: The map is closed, or its object is not loaded yet.
        """
        if self._fd is None:
            state = "closed" if self._closed else "not loaded yet"
            raise BpfError(f"map {self.name!r} is {state}", errno=errnos.EBADF)
        return self._fd

    @property
    def definition(self) -> MapDefinition:
        """Everything that was set when the map was made."""
        return self._definition

    @property
    def name(self) -> str:
        """The name in the object; for an adopted map the kernel's, at most 15 characters."""
        return self._definition.name

    @property
    def type(self) -> str:
        """The kernel's name of its type, such as ``"lru_hash"``."""
        return self._definition.type

    @property
    def id(self) -> int:
        """The kernel's number for it; 0 before the load."""
        return self._definition.id

    @property
    def max_entries(self) -> int:
        """How many entries it can hold."""
        return self._definition.max_entries

    @property
    def per_cpu(self) -> bool:
        """Whether every CPU has its own value for a key."""
        return "percpu" in self.type

    @property
    def memory_bytes(self) -> int:
        """The memory that the kernel accounts to it, in bytes."""
        return int(self._fdinfo("memlock"))

    @property
    def frozen(self) -> bool:
        """Whether user space can no longer change it."""
        return self._fdinfo("frozen") == "1"

    @functools.cached_property
    def key_dtype(self) -> np.dtype[Any]:
        """The dtype of a key.

        Raises:
            BpfError: Its C type has no dtype, such as one with a bitfield.
        """
        return self._dtype("key", self._definition.key_type_id, self._definition.key_size)

    @functools.cached_property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype of a value; of one CPU's value for a per-CPU map.

        Raises:
            BpfError: Its C type has no dtype, such as one with a bitfield.
        """
        return self._dtype("value", self._definition.value_type_id, self._definition.value_size)

    def _dtype(self, what: str, type_id: int, size: int) -> np.dtype[Any]:
        btf = self._definition.btf() if type_id else None
        if btf is None:
            return np.dtype(f"u{size}") if size in (4, 8) else np.dtype(f"V{size}")
        if btf[type_id].kind is Kind.DATASEC:
            return btf.section(type_id)
        dtype = btf.dtype(type_id, f"{what} of map {self.name!r}")
        if dtype.itemsize != size:
            raise BpfError(
                f"the {what} of map {self.name!r} has {size} bytes", why=f"its BTF type has {dtype.itemsize}"
            )
        return dtype

    # One by one

    def __getitem__(self, key: object) -> Any:
        found = self._lookup(self._key(key))
        if found is None:
            raise KeyError(key)
        return found

    def get(self, key: object, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none."""
        found = self._lookup(self._key(key))
        return default if found is None else found

    def __contains__(self, key: object) -> bool:
        return self._lookup(self._key(key)) is not None

    def __setitem__(self, key: object, value: object) -> None:
        self.put(key, value)

    def put(self, key: object, value: object, *, only: Literal["absent", "present"] | None = None) -> None:
        """Set the value of a key.

        Args:
            key: The key.
            value: The value; for a per-CPU map one for all CPUs, or an array of shape ``(CPUs,)``.
            only: Set it only where the key is absent, or only where it is present.

        Raises:
            MapFull: There is no room for another entry.
            KeyError: The key is there and must not be, or is not and must be, or lies beyond an array's end.
        """
        flags = {None: _ANY, "absent": _ABSENT, "present": _PRESENT}[only]
        raw_key = ctypes.create_string_buffer(self._key(key), self._definition.key_size)
        raw_value = self._value(value)
        attr = _syscall.attributes(
            "I4xQQQ", self.fd, _syscall.address(raw_key), _syscall.address(raw_value), flags
        )
        result = _syscall.call(Command.MAP_UPDATE_ELEM, attr)
        if result >= 0:
            return
        if result in (-errnos.EEXIST, -errnos.ENOENT) or (result == -errnos.E2BIG and self.type in ARRAYS):
            raise KeyError(key)
        raise self._write_failure(-result)

    def __delitem__(self, key: object) -> None:
        raw = ctypes.create_string_buffer(self._key(key), self._definition.key_size)
        attr = _syscall.attributes("I4xQ", self.fd, _syscall.address(raw))
        result = _syscall.call(Command.MAP_DELETE_ELEM, attr)
        if result == -errnos.ENOENT:
            raise KeyError(key)
        if result < 0:
            raise self._write_failure(-result, "remove an entry from")

    # Life

    def freeze(self) -> None:
        """Let user space change nothing any more; programs still can."""
        attr = _syscall.attributes("I", self.fd)
        _syscall.checked(Command.MAP_FREEZE, attr, f"cannot freeze map {self.name!r}")

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Keep the map in bpffs; `from_pin` opens it again.

        Raises:
            BpfError: The path is taken, or not in bpffs.
        """
        pin.put(self.fd, path, f"map {self.name!r}")

    def close(self) -> None:
        """Give the descriptor back; closing twice is no error."""
        self._closed = True
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            _syscall.closed_quietly(self.fd)
            self._fd = None

    def __repr__(self) -> str:
        return f"<Map {self.name!r}: {self.type}, {self.max_entries} entries>"

    # The kernel's side

    def _loaded(self, fd: int) -> None:
        """Take over a descriptor after the load; the object's BTF stays the source of types."""
        before, now = self._definition, describe(fd)
        self._definition = MapDefinition(
            before.name,
            now.type,
            now.key_size,
            now.value_size,
            now.max_entries,
            now.flags,
            now.id,
            before.btf,
            before.key_type_id,
            before.value_type_id,
            now.btf_id,
        )
        self._fd = fd

    def _fdinfo(self, field: str) -> str:
        text = Path(f"/proc/self/fdinfo/{self.fd}").read_text()
        found = re.search(rf"^{field}:\s*(\S+)", text, re.MULTILINE)
        return found[1] if found else "0"

    @property
    def _slot_size(self) -> int:
        """How many bytes the kernel copies for one value."""
        size = self._definition.value_size
        return rounded(size) * _syscall.possible_cpus() if self.per_cpu else size

    def _key(self, key: object) -> bytes:
        if not self._definition.key_size:
            raise BpfError(f"map {self.name!r} has no keys", why=f"it is a {self.type}")
        return encode(self.key_dtype, key, f"the key of map {self.name!r}")

    def _value(self, value: object) -> ctypes.Array[ctypes.c_char]:
        if self.type in _HOLD_DESCRIPTORS and hasattr(value, "fd"):
            value = value.fd
        size = self._slot_size
        if isinstance(value, bytes) and len(value) == size:
            return ctypes.create_string_buffer(value, size)
        what = f"the value of map {self.name!r}"
        if not self.per_cpu:
            return ctypes.create_string_buffer(encode(self.value_dtype, value, what), size)
        if isinstance(value, np.ndarray) and value.dtype == self.value_dtype and value.ndim == 1:
            return ctypes.create_string_buffer(self._padded(value[np.newaxis]).tobytes(), size)
        one = encode(self.value_dtype, value, what).ljust(rounded(self._definition.value_size), b"\0")
        return ctypes.create_string_buffer(one * _syscall.possible_cpus(), size)

    def _padded(self, values: Array) -> Array:
        """Per-CPU values of shape ``(n, CPUs)`` as the kernel wants them: shape ``(n, slot bytes)``."""
        size = self._definition.value_size
        slots = np.zeros((*values.shape[:2], rounded(size)), np.uint8)
        slots[:, :, :size] = canonical(values).view(np.uint8).reshape(*values.shape[:2], size)
        return slots.reshape(len(values), self._slot_size)

    def _typed(self, raw: npt.NDArray[np.uint8], count: int) -> Array:
        """What the kernel wrote for `count` values, seen through the dtype."""
        buffer = raw.data
        dtype = self.value_dtype
        base, inner = dtype.subdtype if dtype.subdtype is not None else (dtype, ())
        steps = np.ndarray(inner, base).strides
        if not self.per_cpu:
            return np.ndarray((count, *inner), base, buffer, strides=(dtype.itemsize, *steps))
        stride = rounded(self._definition.value_size)
        cpus = _syscall.possible_cpus()
        return np.ndarray((count, cpus, *inner), base, buffer, strides=(stride * cpus, stride, *steps))

    def _lookup(self, raw: bytes) -> Any:
        key = ctypes.create_string_buffer(raw, len(raw))
        slot = ctypes.create_string_buffer(self._slot_size)
        attr = _syscall.attributes("I4xQQQ", self.fd, _syscall.address(key), _syscall.address(slot), 0)
        result = _syscall.call(Command.MAP_LOOKUP_ELEM, attr)
        if result == -errnos.ENOENT:
            return None
        if result < 0:
            raise failure(-result, f"cannot read map {self.name!r}")
        found = self._typed(np.frombuffer(slot.raw, np.uint8), 1)[0]
        return found.copy() if isinstance(found, np.ndarray | np.void) else found

    def _write_failure(self, errno: int, verb: str = "write to", note: str = "") -> BpfError:
        if errno in (errnos.E2BIG, errnos.ENOSPC):
            why = f"it holds at most {self.max_entries} entries"
            return MapFull(
                f"map {self.name!r} is full",
                errno=errno,
                why=f"{why}; {note}" if note else why,
                remedy="give it more before the load: Object.resize(name, max_entries)",
            )
        if errno == errnos.EPERM and self.frozen:
            return BpfError(f"cannot {verb} map {self.name!r}", errno=errno, why="it is frozen")
        return failure(errno, f"cannot {verb} map {self.name!r}" + (f" ({note})" if note else ""))


def rounded(size: int) -> int:
    """Values in per-CPU and memory-mapped maps are 8 bytes apart or a multiple."""
    return -(-size // 8) * 8
