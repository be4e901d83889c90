"""A descriptor of a map: what the map is, the bytes of its keys and values, and single calls on it."""

from __future__ import annotations

import ctypes
import dataclasses
import errno as errnos
import fcntl
import functools
import os
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import ENOTSUPP, BpfError, MapFull, failure
from hookline.bpf._maps import _map_forms
from hookline.bpf._maps._map_info import MapDefinition, describe
from hookline.bpf._owner import Owner
from hookline.bpf._syscall import Command
from hookline.bpf._types._btf import Kind
from hookline.bpf._types._codec import canonical, encode, fill_each, unknown_name

__all__ = ["ARRAYS", "UNSUPPORTED", "MapHandle", "rounded"]

Array = npt.NDArray[Any]

ARRAYS = {
    "array",
    "percpu_array",
    "prog_array",
    "array_of_maps",
    "cgroup_array",
    "perf_event_array",
    "sockmap",
    "devmap",
    "cpumap",
    "xskmap",
    "reuseport_sockarray",
}
"""Types whose indices are all below `max_entries`: another index is a KeyError, not a full map."""

# BPF_ANY, BPF_NOEXIST and BPF_EXIST.
_ONLY = {None: 0, "absent": 1, "present": 2}
UNSUPPORTED = {ENOTSUPP, errnos.EOPNOTSUPP}


class MapHandle(Owner):
    """What every kind of map has; `Map` adds the ways to read and write."""

    def __init__(
        self,
        definition: MapDefinition,
        fd: int | None = None,
        *,
        key: np.dtype[Any] | None = None,
        value: np.dtype[Any] | None = None,
    ) -> None:
        self._definition = definition
        self._fd = fd
        self._closed = False
        # Dtypes that the caller gave; the kernel keeps types only for some kinds of maps.
        self._given = {"key": key, "value": value}

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
        given = self._given[what] or _map_forms.default_dtype(self.type, what, size)
        if given is not None:
            if given.itemsize != size:
                raise BpfError(
                    f"the {what} of map {self.name!r} has {size} bytes", why=f"{given} has {given.itemsize}"
                )
            return given
        btf = self._definition.btf() if type_id else None
        if btf is None:
            return np.dtype(f"u{size}") if size in (4, 8) else np.dtype(f"V{size}")
        if btf[type_id].kind is Kind.DATASEC:
            return btf.section(type_id)
        dtype = btf.dtype(type_id, f"{what} of map {self.name!r}")
        if dtype.itemsize != size:
            raise BpfError(
                f"the {what} of map {self.name!r} has {size} bytes",
                why=f"its BTF type has {dtype.itemsize}",
                remedy="compile the object again: its types are not its map's",
            )
        return dtype

    # One by one

    def __getitem__(self, key: object) -> Any:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return found

    def get(self, key: object, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none."""
        found = self._find(key)
        return default if found is None else found

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def __setitem__(self, key: object, value: object) -> None:
        self.put(key, value)

    def put(
        self,
        key: object,
        value: object,
        *,
        only: Literal["absent", "present"] | None = None,
        cpu: int | None = None,
    ) -> None:
        """Set the value of a key.

        Args:
            key: The key. For the storage of sockets, processes, files and cgroups, its owner: a socket or
                descriptor (of a process: a pidfd); a file's or cgroup's path will do.
            value: The value; for a per-CPU map one for all CPUs, or one for each: a list, of structs an array of
                shape ``(CPUs,)``. For maps that hold
                something else, that thing: a `Program`, a `Map`, a socket, a cgroup's path, an interface's name or
                ``(interface, program)``, a CPU map's queue size or ``(queue size, program)``.
            only: Set it only where the key is absent, or only where it is present.
            cpu: Per-CPU maps only: set this CPU's value and leave the others. The others are read and written
                back, so what programs add to them meanwhile is lost.

        Raises:
            MapFull: There is no room for another entry.
            KeyError: The key is there and must not be, or is not and must be, or lies beyond an array's end.
            BpfError: The key or value does not fit its dtype: nothing wraps around, is cut off or becomes infinite.
        """
        flags = _ONLY.get(only)
        if flags is None:
            raise unknown_name("condition", only, ["absent", "present"], "put(only=…)")
        with ExitStack() as opened:
            if self.type in _map_forms.SPECIAL:
                key = _map_forms.key(self.type, key, opened)
                value = _map_forms.value(self.type, value, self._definition.value_size, opened)
            if cpu is not None:
                value = self._others(key, value, cpu)
            self._put(key, value, flags)

    def _put(self, key: object, value: object, flags: int) -> None:
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

    def _others(self, key: object, value: object, cpu: int) -> bytes:
        """The values of all CPUs as they are now, one CPU's replaced."""
        cpus = _syscall.possible_cpus()
        if not self.per_cpu or not 0 <= cpu < cpus:
            why = f"there are {cpus} CPUs" if self.per_cpu else f"it is a {self.type}"
            raise BpfError(
                f"map {self.name!r} has no value of CPU {cpu}",
                why=why,
                remedy="leave the CPU out, or name one that there is",
            )
        found = self._find(key)
        slots = np.zeros((cpus, rounded(self._definition.value_size)), np.uint8)
        if found is not None:
            slots[...] = self._padded(found[np.newaxis]).reshape(slots.shape)
        raw = encode(self.value_dtype, value, f"the value of map {self.name!r}")
        slots[cpu, : len(raw)] = np.frombuffer(raw, np.uint8)
        return slots.tobytes()

    def __delitem__(self, key: object) -> None:
        with ExitStack() as opened:
            raw = self._key(_map_forms.key(self.type, key, opened))
            buffer = ctypes.create_string_buffer(raw, self._definition.key_size)
            attr = _syscall.attributes("I4xQ", self.fd, _syscall.address(buffer))
            result = _syscall.call(Command.MAP_DELETE_ELEM, attr)
        if result == -errnos.ENOENT:
            raise KeyError(key)
        if result < 0:
            raise self._write_failure(-result, "remove an entry from")

    def _find(self, key: object) -> Any:
        """The value of a key, None where there is none."""
        if self.type not in _map_forms.OWNED:
            return self._lookup(self._key(key))
        with ExitStack() as opened:
            return self._lookup(self._key(_map_forms.key(self.type, key, opened)))

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
        before = self._definition
        self._definition = dataclasses.replace(
            describe(fd),
            name=before.name,
            btf=before.btf,
            key_type_id=before.key_type_id,
            value_type_id=before.value_type_id,
        )
        self._fd = fd

    def _fdinfo(self, field: str) -> str:
        text = Path(f"/proc/self/fdinfo/{self.fd}").read_text()
        found = re.search(rf"^{field}:\s*(\S+)", text, re.MULTILINE)
        return found[1] if found else "0"

    @property
    def _access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR: the kernel keeps this with the descriptor, not in the map's flags."""
        return fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE

    @property
    def _slot_size(self) -> int:
        """How many bytes the kernel copies for one value."""
        size = self._definition.value_size
        return rounded(size) * _syscall.possible_cpus() if self.per_cpu else size

    def _key(self, key: object) -> bytes:
        self._require_keys()
        return encode(self.key_dtype, key, f"the key of map {self.name!r}")

    def _require_keys(self) -> None:
        if not self._definition.key_size:
            raise BpfError(
                f"map {self.name!r} has no keys",
                why=f"it is a {self.type}",
                remedy="a queue or stack: push(), pop() and peek(); a Bloom filter: push() and might_contain()",
            )

    def _value(self, value: object) -> ctypes.Array[ctypes.c_char]:
        size = self._slot_size
        if isinstance(value, bytes) and len(value) == size:
            return ctypes.create_string_buffer(value, size)
        what = f"the value of map {self.name!r}"
        if not self.per_cpu:
            return ctypes.create_string_buffer(encode(self.value_dtype, value, what), size)
        base, inner = self.value_dtype.subdtype or (self.value_dtype, ())
        whole = np.zeros((_syscall.possible_cpus(), *inner), base)
        fill_each(whole, value, what, inner)
        return ctypes.create_string_buffer(self._padded(whole[np.newaxis]).tobytes(), size)

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
        return self._fetch(Command.MAP_LOOKUP_ELEM, raw)

    def _fetch(self, command: Command, raw: bytes) -> Any:
        """The value that a command gives for a key, None where there is no such entry."""
        key = ctypes.create_string_buffer(raw, len(raw))
        slot = ctypes.create_string_buffer(self._slot_size)
        attr = _syscall.attributes(
            "I4xQQQ", self.fd, _syscall.address(key) if raw else 0, _syscall.address(slot), 0
        )
        result = _syscall.call(command, attr)
        if result == -errnos.ENOENT:
            return None
        if result < 0:
            raise self._read_failure(-result)
        found = self._typed(np.frombuffer(slot.raw, np.uint8), 1)[0]
        return found.copy() if isinstance(found, np.ndarray | np.void) else found

    def _read_failure(self, errno: int) -> BpfError:
        what = f"cannot read map {self.name!r}"
        if errno == errnos.EPERM and self._access == os.O_WRONLY:
            return BpfError(what, errno=errno, why="it was made for writing only (BPF_F_WRONLY)")
        if errno == errnos.ENOSPC and self.type in ("sockmap", "sockhash", "reuseport_sockarray"):
            return BpfError(
                what,
                errno=errno,
                why="its values have 4 bytes, and a socket is told by its cookie of 8",
                remedy="give the map values of type __u64",
            )
        if errno in UNSUPPORTED:
            return BpfError(
                what,
                errno=errno,
                why=f"only programs read the entries of a {self.type} map",
                remedy="let a program read it, or keep a copy in a map of another type",
            )
        return failure(errno, what)

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
            return BpfError(
                f"cannot {verb} map {self.name!r}",
                errno=errno,
                why="it is frozen",
                remedy="load the object again: what is frozen stays so",
            )
        if errno == errnos.EPERM and self._access == os.O_RDONLY:
            why = "it was made for reading only (BPF_F_RDONLY)"
            return BpfError(f"cannot {verb} map {self.name!r}", errno=errno, why=why)
        return failure(errno, f"cannot {verb} map {self.name!r}" + (f" ({note})" if note else ""))


def rounded(size: int) -> int:
    """Values in per-CPU and memory-mapped maps are 8 bytes apart or a multiple."""
    return -(-size // 8) * 8
