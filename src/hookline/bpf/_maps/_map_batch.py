"""Whole maps and many entries at once, by the kernel's batch calls, or one by one where a type knows none."""

from __future__ import annotations

import ctypes
import errno as errnos
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, FeatureMissing, failure
from hookline.bpf._maps import _map_forms
from hookline.bpf._maps._map_handle import ARRAYS, UNSUPPORTED, Array, MapHandle
from hookline.bpf._syscall import Command
from hookline.bpf._types._codec import encode_rows

__all__ = ["MapBatches"]

Rows = npt.ArrayLike | Iterable[Any]

# In Linux 6.1 a batch over one with an empty place ends in EINTR.
_NO_BATCHES = {"array_of_maps"}
_CHUNK_BYTES = 4 << 20


class MapBatches(MapHandle):
    """Reading and writing many entries."""

    def __len__(self) -> int:
        """How many entries there are; arrays of values are always full, others count their places in use."""
        if self.type in ("array", "percpu_array"):
            return self.max_entries
        if self._only_keys:
            return len(list(self._walk()))
        return sum(len(keys) for keys, _ in self._chunks())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def keys(self) -> Array:
        """All keys, an array of shape ``(entries,)``."""
        if self._only_keys:
            return self._keys_joined(list(self._walk()))
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
            keys: Array of `key_dtype` and shape ``(n,)``, taken as it is, or a sequence of what `put` takes.
            values: Array of `value_dtype` and shape ``(n,)``; for a per-CPU map ``(n, CPUs)``, or ``(n,)`` for
                the same on all. Or a sequence of what `put` takes.

        Raises:
            MapFull: There was no room for all of them; those before stay written.
            BpfError: A key or value does not fit its dtype; nothing is written.
        """
        if self.type in _map_forms.SPECIAL:
            for key, value in zip(keys, values, strict=True):  # type: ignore[arg-type]
                self.put(key, value)
            return
        keys = self._key_array(keys)
        slots = self._value_slots(values, len(keys))
        done = 0
        while done < len(keys):
            result, count = self._batch(Command.MAP_UPDATE_BATCH, keys[done:], slots[done:])
            if result == 0:
                return
            if -result in UNSUPPORTED:
                for index in range(done, len(keys)):
                    self.put(keys[index], slots[index].tobytes())
                return
            done += count
            if result == -errnos.E2BIG and self.type in ARRAYS:
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
            if -result in UNSUPPORTED:
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

    # Reading

    def _chunks(self, *, remove: bool = False) -> Iterator[tuple[Array, Array]]:
        """Read the map by batches of a few megabytes."""
        definition = self._definition
        self._require_keys()
        if self.type in _NO_BATCHES and not remove:
            yield self._one_by_one()
            return
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
            count = int.from_bytes(attr.raw[32:36], sys.byteorder) if result != -errnos.EFAULT else 0
            if result == -errnos.ENOSPC and not count:
                # One bucket holds more than was asked for.
                capacity *= 2
                continue
            if -result in UNSUPPORTED and not started:
                if remove:
                    raise FeatureMissing(
                        f"read-and-empty in one call for {self.type} maps",
                        errno=-result,
                        remedy="read it, then remove the keys",
                    )
                yield self._one_by_one()
                return
            if result < 0 and result not in (-errnos.ENOENT, -errnos.ENOSPC, -errnos.EINTR):
                raise self._read_failure(-result)
            if count:
                yield self._keys_typed(keys[:count]), self._typed(slots[:count], count)
            if result == -errnos.ENOENT:
                return
            # EINTR: entries went away meanwhile; the cursor has moved only where there are rows.
            started = started or count > 0 or result == 0

    def _keys_typed(self, raw: npt.NDArray[np.uint8]) -> Array:
        dtype = self.key_dtype
        if dtype.subdtype is None:
            return raw.view(dtype).reshape(len(raw))
        base, inner = dtype.subdtype
        return raw.view(base).reshape(len(raw), *inner)

    @property
    def _only_keys(self) -> bool:
        """Whether user space may list the keys and not read the values: sockets in values of 4 bytes."""
        return self.type == "sockhash" and self._definition.value_size == 4

    def _one_by_one(self) -> tuple[Array, Array]:
        """Read a map whose type knows no batches; an array's empty slots are left out."""
        found = {raw: value for raw in self._walk() if (value := self._lookup(raw)) is not None}
        if not found:
            return self._empty()
        values = list(found.values())
        stacked = self.per_cpu or self.value_dtype.subdtype is not None
        return self._keys_joined(list(found)), np.stack(values) if stacked else np.array(
            values, self.value_dtype
        )

    def _walk(self) -> Iterator[bytes]:
        """The bytes of each key, as one leads to the next."""
        self._require_keys()
        size = self._definition.key_size
        key: ctypes.Array[ctypes.c_char] | None = None
        while True:
            following = ctypes.create_string_buffer(size)
            attr = _syscall.attributes("I4xQQ", self.fd, _syscall.address(key), _syscall.address(following))
            result = _syscall.call(Command.MAP_GET_NEXT_KEY, attr)
            if result == -errnos.ENOENT:
                return
            if -result in UNSUPPORTED:
                raise BpfError(
                    f"the keys of map {self.name!r} cannot be listed",
                    errno=-result,
                    why=f"the kernel does not list those of a {self.type} map",
                    remedy="look up a key that you know",
                )
            if result < 0:
                raise failure(-result, f"cannot read the keys of map {self.name!r}")
            yield following.raw
            key = following

    def _keys_joined(self, keys: list[bytes]) -> Array:
        size = self._definition.key_size
        return self._keys_typed(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), size))

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

    # Writing

    def _key_array(self, keys: Rows) -> Array:
        self._require_keys()
        return encode_rows(self.key_dtype, keys, f"the keys of map {self.name!r}")

    def _value_slots(self, values: Rows, count: int) -> Array:
        """Values as the kernel wants them: shape ``(count, slot bytes)``."""
        what = f"the values of map {self.name!r}"
        cpus = _syscall.possible_cpus()
        rows = encode_rows(self.value_dtype, values, what, each=cpus if self.per_cpu else 0)
        if len(rows) != count:
            raise BpfError(f"{what} have shape {rows.shape}", why=f"there are {count} keys")
        if self.per_cpu:
            return self._padded(rows)
        return rows.view(np.uint8).reshape(count, self._slot_size)

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
        done = int.from_bytes(attr.raw[32:36], sys.byteorder)
        return result, done if result < 0 and done < len(keys) else 0

    def _discard(self, key: Any) -> bool:
        try:
            del self[key]
        except KeyError:
            return False
        return True


def _concatenated(parts: list[Array]) -> Array:
    """Arrays one after another, in their own dtype: NumPy's concatenate would pack its members anew."""
    joined = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    place = 0
    for part in parts:
        joined[place : place + len(part)] = part
        place += len(part)
    return joined
