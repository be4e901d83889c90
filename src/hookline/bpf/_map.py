"""Maps as NumPy sees them: keys and values typed by BTF, one by one or whole maps in one call."""

from __future__ import annotations

import ctypes
import errno as errnos
import functools
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall, pin
from hookline.bpf._btf import Btf, Kind
from hookline.bpf._codec import canonical, encode, relaid, same_members
from hookline.bpf._errors import ENOTSUPP, BpfError, MapFull, failure
from hookline.bpf._syscall import Command, Flag

if TYPE_CHECKING:
    from hookline.bpf._ring import Ring

__all__ = ["Map", "MapDefinition"]

Array = npt.NDArray[Any]
Rows = npt.ArrayLike | Sequence[Any]

_ARRAYS = {"array", "percpu_array", "prog_array", "array_of_maps", "cgroup_array", "perf_event_array"}
_HOLD_DESCRIPTORS = {"prog_array", "array_of_maps", "hash_of_maps"}
_UNSUPPORTED = {ENOTSUPP, errnos.EOPNOTSUPP}
_CHUNK_BYTES = 4 << 20
_ANY, _ABSENT, _PRESENT = 0, 1, 2


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


class _BtfInfo(ctypes.Structure):
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
class MapDefinition:
    """What a map is, in an object before the load or in the kernel after it.

    Attributes:
        type: The kernel's name: ``"hash"``, ``"lru_percpu_hash"``, …
        key_size: In bytes.
        value_size: In bytes, of one CPU's value for a per-CPU map.
        max_entries: How many entries it can hold (for a ring buffer, its bytes).
        flags: ``BPF_F_*`` of the map's creation.
        id: The kernel's number for it, 0 before the load.
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


class Map:
    """A map of the kernel as a mapping from keys to values.

    A key or value is given as a scalar of its dtype, a number, a dict or tuple of members, or bytes. What is
    read is a NumPy scalar, a copy; for per-CPU maps an array of shape ``(CPUs,)``, the possible CPUs.

    A map from an object lives until the object is closed; `duplicate` makes one that lives on. Maps from
    `from_pin` and `from_id` are the caller's to close. The kernel keeps a map while anything refers to it.
    """

    def __init__(self, definition: MapDefinition, fd: int | None = None) -> None:
        self._definition = definition
        self._fd = fd
        self._closed = False

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """Open a pinned map, typed by the kernel's own BTF.

        Raises:
            BpfError: Nothing is pinned there, or it is no map.
        """
        return cls._from_fd(pin.get(path, "map"))

    @classmethod
    def from_id(cls, map_id: int) -> Self:
        """Open a map by the kernel's number for it (needs CAP_SYS_ADMIN)."""
        return cls._from_fd(_syscall.fd_by_id(Command.MAP_GET_FD_BY_ID, map_id, "a map"))

    @classmethod
    def _from_fd(cls, fd: int) -> Self:
        """Take over a descriptor."""
        try:
            return cls(describe(fd), fd)
        except BaseException:
            os.close(fd)
            raise

    def duplicate(self) -> Map:
        """Another handle of the same map with a life of its own."""
        return Map(self._definition, os.dup(self.fd))

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
        if result in (-errnos.EEXIST, -errnos.ENOENT) or (result == -errnos.E2BIG and self.type in _ARRAYS):
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

    # Whole maps

    def __len__(self) -> int:
        """How many entries there are; arrays are always full."""
        if self.type in _ARRAYS:
            return self.max_entries
        return sum(len(keys) for keys, _ in self._chunks())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def keys(self) -> Array:
        """All keys, an array of shape ``(entries,)``."""
        return self.read()[0]

    def values(self) -> Array:
        """All values, of shape ``(entries,)``, per CPU ``(entries, CPUs)``."""
        return self.read()[1]

    def items(self) -> Iterator[tuple[Any, Any]]:
        """All pairs, from one reading of the map."""
        keys, values = self.read()
        return zip(keys, values, strict=True)

    def read(self) -> tuple[Array, Array]:
        """The whole map: keys ``(entries,)``, values of shape ``(entries,)``, per CPU ``(entries, CPUs)``.

        It is not a snapshot: entries that come or go meanwhile may be missed.
        """
        return self._joined(list(self._chunks()))

    def drain(self) -> tuple[Array, Array]:
        """Read the whole map and empty it; each entry is read and removed at once (hash maps).

        Raises:
            FeatureMissing: The map's type cannot do that.
        """
        return self._joined(list(self._chunks(remove=True)))

    def write(self, keys: Rows, values: Rows) -> None:
        """Set many entries in one call.

        Args:
            keys: Array of `key_dtype` and shape ``(n,)``, or what NumPy can make one of.
            values: Array of `value_dtype` and shape ``(n,)``; for a per-CPU map ``(n, CPUs)``, or ``(n,)`` for
                the same on all.

        Raises:
            MapFull: There was no room for all of them; those before stay written.
        """
        keys = self._key_array(keys)
        slots = self._value_slots(values, len(keys))
        done = 0
        while done < len(keys):
            result, count = self._batch(Command.MAP_UPDATE_BATCH, keys[done:], slots[done:])
            if result == 0:
                return
            if -result in _UNSUPPORTED:
                for index in range(done, len(keys)):
                    self.put(keys[index], slots[index].tobytes())
                return
            done += count
            if result == -errnos.E2BIG and self.type in _ARRAYS:
                raise KeyError(keys[min(done, len(keys) - 1)])
            raise self._write_failure(-result, note=f"{done} of {len(keys)} entries were written")

    def remove(self, keys: Rows) -> int:
        """Remove many entries in one call, passing over those that are not there; returns how many went."""
        keys = self._key_array(keys)
        place = removed = 0
        while place < len(keys):
            result, count = self._batch(Command.MAP_DELETE_BATCH, keys[place:], None)
            if result == 0:
                return removed + len(keys) - place
            if -result in _UNSUPPORTED:
                return removed + sum(self._discard(key) for key in keys[place:])
            removed += count
            place += count
            if result != -errnos.ENOENT:
                raise self._write_failure(-result, "remove entries from")
            place += 1
        return removed

    def clear(self) -> None:
        """Remove every entry."""
        self.remove(self.keys())

    def view(self) -> Array:
        """An array map's memory itself: a live, writable array of shape ``(max_entries,)``.

        The array keeps the map's memory alive. It is read-only where the map is frozen.

        Raises:
            BpfError: The map was not made with ``BPF_F_MMAPABLE``.
        """
        if not self._definition.flags & Flag.MMAPABLE or self.type != "array":
            raise BpfError(
                f"map {self.name!r} cannot be seen as memory",
                why=f"it is a {self.type} map"
                + ("" if self._definition.flags & Flag.MMAPABLE else " without BPF_F_MMAPABLE"),
                remedy="give an array map __uint(map_flags, BPF_F_MMAPABLE)",
            )
        stride = _rounded(self._definition.value_size)
        access = mmap.PROT_READ if self.frozen else mmap.PROT_READ | mmap.PROT_WRITE
        length = -(-stride * self.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            memory = mmap.mmap(self.fd, length, mmap.MAP_SHARED, access)
        except OSError as error:
            raise failure(error.errno or 0, f"cannot map the memory of map {self.name!r}") from None
        return np.ndarray((self.max_entries,), self.value_dtype, buffer=memory, strides=(stride,))

    def ring(self, record: str | npt.DTypeLike | None = None, *, lost: Map | None = None) -> Ring:
        """Read a ring buffer; the reader is the caller's to close, and outlives this handle.

        Args:
            record: What each record is: a dtype, or the name of a struct in the map's object; None for
                records of any size.
            lost: The map whose entry 0 counts lost records.

        Raises:
            BpfError: The map is no ring buffer, somebody reads it already, or there is no such struct.
        """
        from hookline.bpf._ring import Ring

        if isinstance(record, str):
            btf = self._definition.btf()
            if btf is None:
                raise BpfError(
                    f"map {self.name!r} has no types, so {record!r} is unknown",
                    why="the kernel keeps none for a ring buffer",
                    remedy="give a dtype: bpf.Object.open(FILE).btf.struct(NAME)",
                )
            record = btf.struct(record)
        return Ring(self, record, lost=lost)

    def freeze(self) -> None:
        """Let user space change nothing any more; programs still can."""
        attr = _syscall.attributes("I", self.fd)
        _syscall.checked(Command.MAP_FREEZE, attr, f"cannot freeze map {self.name!r}")

    # Life

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
        return _rounded(size) * _syscall.possible_cpus() if self.per_cpu else size

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
            return ctypes.create_string_buffer(self._value_slots(value[np.newaxis], 1).tobytes(), size)
        one = encode(self.value_dtype, value, what).ljust(_rounded(self._definition.value_size), b"\0")
        return ctypes.create_string_buffer(one * _syscall.possible_cpus(), size)

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

    def _discard(self, key: Any) -> bool:
        try:
            del self[key]
        except KeyError:
            return False
        return True

    def _key_array(self, keys: Rows) -> Array:
        return canonical(_as_array(keys, self.key_dtype, 1, f"the keys of map {self.name!r}"))

    def _value_slots(self, values: Rows, count: int) -> Array:
        """Values as the kernel wants them: shape ``(count, slot bytes)``."""
        what = f"the values of map {self.name!r}"
        cpus = _syscall.possible_cpus()
        array = _as_array(values, self.value_dtype, 2 if self.per_cpu else 1, what)
        if self.per_cpu and array.ndim == 1:
            array = np.repeat(array[:, np.newaxis], cpus, axis=1)
        if array.shape != ((count, cpus) if self.per_cpu else (count,)):
            raise BpfError(f"{what} have shape {array.shape}", why=f"there are {count} keys")
        array = canonical(array)
        if not self.per_cpu:
            return array.view(np.uint8).reshape(count, self._slot_size)
        size = self._definition.value_size
        slots = np.zeros((count, cpus, _rounded(size)), np.uint8)
        slots[:, :, :size] = array.view(np.uint8).reshape(count, cpus, size)
        return slots.reshape(count, self._slot_size)

    def _typed(self, raw: npt.NDArray[np.uint8], count: int) -> Array:
        """What the kernel wrote for `count` values, seen through the dtype."""
        buffer = raw.data
        dtype = self.value_dtype
        base, inner = dtype.subdtype if dtype.subdtype is not None else (dtype, ())
        steps = np.ndarray(inner, base).strides
        if not self.per_cpu:
            return np.ndarray((count, *inner), base, buffer, strides=(dtype.itemsize, *steps))
        stride = _rounded(self._definition.value_size)
        cpus = _syscall.possible_cpus()
        return np.ndarray((count, cpus, *inner), base, buffer, strides=(stride * cpus, stride, *steps))

    def _chunks(self, *, remove: bool = False) -> Iterator[tuple[Array, Array]]:
        """Read the map by batches of a few megabytes."""
        definition = self._definition
        if not definition.key_size:
            raise BpfError(f"map {self.name!r} has no keys", why=f"it is a {self.type}")
        command = Command.MAP_LOOKUP_AND_DELETE_BATCH if remove else Command.MAP_LOOKUP_BATCH
        capacity = min(self.max_entries, max(256, _CHUNK_BYTES // (definition.key_size + self._slot_size)))
        # The kernel's cursor is a bucket's number or a key.
        cursor = ctypes.create_string_buffer(max(8, definition.key_size))
        started = False
        while True:
            keys = np.empty((capacity, definition.key_size), np.uint8)
            slots = np.empty((capacity, self._slot_size), np.uint8)
            attr = _syscall.attributes(
                "QQQQIIQQ",
                _syscall.address(cursor) if started else 0,
                _syscall.address(cursor),
                keys.ctypes.data,
                slots.ctypes.data,
                capacity,
                self.fd,
                0,
                0,
            )
            result = _syscall.call(command, attr)
            count = int.from_bytes(attr.raw[32:36], "little") if result != -errnos.EFAULT else 0
            if result == -errnos.ENOSPC and not count:
                # One bucket holds more than was asked for.
                capacity *= 2
                continue
            if -result in _UNSUPPORTED and not started:
                if remove:
                    raise failure(-result, f"a {self.type} map cannot be read and emptied at once")
                yield self._one_by_one()
                return
            if result < 0 and result not in (-errnos.ENOENT, -errnos.ENOSPC):
                raise failure(-result, f"cannot read map {self.name!r}")
            if count:
                yield self._keys_typed(keys[:count]), self._typed(slots[:count], count)
            if result == -errnos.ENOENT:
                return
            started = True

    def _keys_typed(self, raw: npt.NDArray[np.uint8]) -> Array:
        dtype = self.key_dtype
        if dtype.subdtype is None:
            return raw.view(dtype).reshape(len(raw))
        base, inner = dtype.subdtype
        return raw.view(base).reshape(len(raw), *inner)

    def _one_by_one(self) -> tuple[Array, Array]:
        """Read a map whose type knows no batches; an array's empty slots are left out."""
        size = self._definition.key_size
        key: ctypes.Array[ctypes.c_char] | None = None
        keys: list[bytes] = []
        values: list[Any] = []
        while True:
            following = ctypes.create_string_buffer(size)
            attr = _syscall.attributes("I4xQQ", self.fd, _syscall.address(key), _syscall.address(following))
            result = _syscall.call(Command.MAP_GET_NEXT_KEY, attr)
            if result == -errnos.ENOENT:
                break
            if result < 0:
                raise failure(-result, f"cannot read the keys of map {self.name!r}")
            value = self._lookup(following.raw)
            if value is not None:
                keys.append(following.raw)
                values.append(value)
            key = following
        if not keys:
            return self._empty()
        raw = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), size)
        return self._keys_typed(raw), np.stack(values) if self.per_cpu else np.array(values, self.value_dtype)

    def _empty(self) -> tuple[Array, Array]:
        return (
            self._keys_typed(np.empty((0, self._definition.key_size), np.uint8)),
            self._typed(np.empty((1, self._slot_size), np.uint8), 1)[:0],
        )

    def _joined(self, chunks: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        if not chunks:
            return self._empty()
        if len(chunks) == 1:
            return chunks[0]
        return _concatenated([keys for keys, _ in chunks]), _concatenated([values for _, values in chunks])

    def _batch(self, command: Command, keys: Array, slots: Array | None) -> tuple[int, int]:
        """One batch call over whole arrays; the result and how many entries it did."""
        attr = _syscall.attributes(
            "QQQQIIQQ",
            0,
            0,
            keys.ctypes.data,
            0 if slots is None else slots.ctypes.data,
            len(keys),
            self.fd,
            0,
            0,
        )
        result = _syscall.call(command, attr)
        done = int.from_bytes(attr.raw[32:36], "little")
        return result, done if result < 0 and done < len(keys) else 0

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


def describe(fd: int) -> MapDefinition:
    """What the kernel says of a map; its BTF is read when it is asked for."""
    info = _Info()
    _syscall.info(fd, info, "a map")
    btf_id = info.btf_id

    def types() -> Btf | None:
        return kernel_btf(btf_id) if btf_id else None

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
    )


@functools.lru_cache(maxsize=32)
def kernel_btf(btf_id: int) -> Btf:
    """The types that were loaded into the kernel under a number (needs CAP_SYS_ADMIN)."""
    fd = _syscall.fd_by_id(Command.BTF_GET_FD_BY_ID, btf_id, "BTF")
    try:
        info = _BtfInfo()
        _syscall.info(fd, info, "BTF")
        data = ctypes.create_string_buffer(info.btf_size)
        info = _BtfInfo(btf=_syscall.address(data), btf_size=len(data))
        _syscall.info(fd, info, "BTF")
    finally:
        os.close(fd)
    return Btf(data.raw)


def _concatenated(parts: list[Array]) -> Array:
    """Arrays one after another, in their own dtype: NumPy's concatenate would pack its members anew."""
    joined = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    place = 0
    for part in parts:
        joined[place : place + len(part)] = part
        place += len(part)
    return joined


def _rounded(size: int) -> int:
    """Values in per-CPU and memory-mapped maps are 8 bytes apart or a multiple."""
    return -(-size // 8) * 8


def _as_array(values: Rows, dtype: np.dtype[Any], dimensions: int, what: str) -> Array:
    """An array of exactly this dtype; integers may be of another size if every one fits."""
    if isinstance(values, np.ndarray) and values.dtype == dtype:
        return values
    if isinstance(values, np.ndarray) and same_members(values.dtype, dtype):
        return relaid(values, dtype)
    if dtype.subdtype is not None:
        base, inner = dtype.subdtype
        plain = np.asarray(values, base)
        if plain.shape[-len(inner) :] != inner:
            raise BpfError(f"{what} have shape {plain.shape}", why=f"each is an array of shape {inner}")
        whole = np.zeros(plain.shape[: -len(inner)], np.dtype([("whole", dtype)]))
        whole["whole"] = plain
        return whole
    if not isinstance(values, np.ndarray) and dtype.kind in "VS":
        items = list(values)  # type: ignore[arg-type]
        raw = b"".join(encode(dtype, item, what) for item in items)
        return np.frombuffer(raw, dtype)
    try:
        given = np.asarray(values)
        if given.dtype.kind not in "biuf" and given.size:
            raise ValueError(f"they are {given.dtype}, and {dtype} is wanted")
        converted = given.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise BpfError(f"cannot use the given array for {what}", why=str(error)) from None
    if given.ndim > dimensions or not np.array_equal(given, converted):
        raise BpfError(f"cannot use the given array for {what}", why=f"it does not fit {dtype}")
    return converted
