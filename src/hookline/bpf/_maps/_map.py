"""Maps as NumPy sees them: keys and values typed by BTF, one by one or whole maps in one call.

`Map` is the surface. Below it: ``_map_kinds`` for what only some types do, ``_map_batch`` for many entries at once,
``_map_handle`` for what every map has, ``_map_info`` for what the kernel says of one; ``_map_forms`` knows the
types whose entries stand for something else.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._maps._map_handle import Array, rounded
from hookline.bpf._maps._map_info import MapDefinition, describe
from hookline.bpf._maps._map_kinds import MapKinds
from hookline.bpf._syscall import Command, Flag
from hookline.bpf._types._codec import layout

if TYPE_CHECKING:
    from hookline.bpf._maps._ring import Ring

Layout = npt.DTypeLike | int | None

__all__ = ["Map", "MapDefinition", "describe"]


class Map(MapKinds):
    """A map of the kernel as a mapping from keys to values.

    A key or value is given as a scalar of its dtype, a number, a dict or tuple of members, or bytes. What is
    read is a NumPy scalar, a copy; for per-CPU maps an array of shape ``(CPUs,)``, the possible CPUs.

    Maps that hold something else (programs, maps, sockets, devices, cgroups) are given the thing and answer the
    kernel's number for it: an id, a cookie, an index. A socket that is put into a sockmap or sockhash may answer 0 to
    ``ioctl(FIONREAD)`` on some kernels: see `Program.attach_sockmap`.

    A map from an object lives until the object is closed; `duplicate` makes one that lives on. Maps from
    `from_pin` and `from_id` are the caller's to close. The kernel keeps a map while anything refers to it.
    """

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        key: Layout = None,
        value: Layout = None,
        max_entries: int = 0,
        flags: int = 0,
        name: str = "",
        inner: Map | None = None,
        extra: int = 0,
    ) -> Self:
        """Make a map without an object; it is the caller's to close.

        Hash maps, arrays, prefix tries and storages keep the dtypes in the kernel (as BTF), so that whoever opens them
        finds them typed. BTF cannot say all: who opens the map finds as bytes (``u1`` arrays) what has another byte order
        than the machine, such as ports of the network, and floating-point numbers that are not ``f4``
        or ``f8`` or lie out of line; members in the order of their offsets; and the whole map without types where members
        overlap and do not all begin at 0, or have names that are none in C. Give ``key`` and ``value`` to `from_pin`
        then. Flags and sizes that a type must have are set by themselves.

        Args:
            kind: The kernel's name of the type, such as ``"lru_hash"``.
            key: The key's dtype, or its size in bytes; indices are ``u4`` where it is left out.
            value: The value's dtype or size; what stands for something else (a program, a socket) has one already.
            max_entries: How many entries; for a ring its bytes, for an arena its pages; 0 for storages.
            flags: ``BPF_F_*`` of the map's creation.
            name: In the kernel at most 15 characters of it.
            inner: Maps of maps: one like those that it will hold.
            extra: A Bloom filter's number of hashes, an arena's address (chosen where it is left out).

        Raises:
            FeatureMissing: The kernel does not know the type.
            NotPermitted: CAP_BPF is missing.
            BpfError: The kernel refuses.
        """
        from hookline.bpf._maps import _arena, _map_create

        if kind == "arena" and not extra:
            extra = _arena.new_address()
        key_dtype, value_dtype = _layout(key, "the key"), _layout(value, "the value")
        definition, fd = _map_create.create(
            kind, key_dtype, value_dtype, max_entries, flags, name, extra, 0 if inner is None else inner.fd
        )
        return cls(definition, fd, key=key_dtype, value=value_dtype)

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str], *, key: Layout = None, value: Layout = None) -> Self:
        """Open a pinned map, typed by the kernel's own BTF.

        Args:
            path: The pin.
            key: The key's dtype, where the kernel has no BTF for it.
            value: The value's dtype, where the kernel has no BTF for it.

        Raises:
            BpfError: Nothing is pinned there, or it is no map.
        """
        return cls._from_fd(pin.get(path, "map"), _layout(key, "the key"), _layout(value, "the value"))

    @classmethod
    def from_id(cls, map_id: int, *, key: Layout = None, value: Layout = None) -> Self:
        """Open a map by the kernel's number for it (needs CAP_SYS_ADMIN); dtypes as for `from_pin`."""
        fd = _syscall.fd_by_id(Command.MAP_GET_FD_BY_ID, map_id, "a map")
        return cls._from_fd(fd, _layout(key, "the key"), _layout(value, "the value"))

    @classmethod
    def _from_fd(cls, fd: int, key: np.dtype[Any] | None = None, value: np.dtype[Any] | None = None) -> Self:
        """Take over a descriptor."""
        try:
            return cls(describe(fd), fd, key=key, value=value)
        except BaseException:
            os.close(fd)
            raise

    def duplicate(self) -> Map:
        """Another handle of the same map with a life of its own."""
        return Map(self._definition, os.dup(self.fd), key=self._given["key"], value=self._given["value"])

    def inner(self, key: object, *, value: Layout = None) -> Map:
        """The map that a map of maps holds under a key (needs CAP_SYS_ADMIN); the caller's to close.

        Args:
            key: The key.
            value: The dtype of the inner map's values, where the kernel has no BTF for it.

        Raises:
            KeyError: There is none.
        """
        self._require("look for a map in", "array_of_maps", "hash_of_maps")
        return Map.from_id(int(self[key]), value=value)

    # As memory

    def view(self, dtype: npt.DTypeLike | None = None, *, first: int = 0, count: int | None = None) -> Array:
        """The memory of an array map or arena itself: live, writable, of shape ``(max_entries,)`` for an array map.

        The array keeps the memory alive. It is read-only where the map is frozen. An arena is bytes, or as many
        elements of a dtype as fit; a program's pointer into it is an address from ``view().ctypes.data`` on. Touching
        a page of an arena allocates it.

        Args:
            dtype: Arenas only: what lies in it.
            first: Array maps only: the first entry that is wanted.
            count: Array maps only: how many; None: all from there. What is mapped counts as this process's memory.

        Raises:
            BpfError: There are no such entries, the map was not made with ``BPF_F_MMAPABLE``, or an arena's place is taken in
                this process.
        """
        if self.type == "arena":
            return self._arena(layout("u1" if dtype is None else dtype, f"the memory of arena {self.name!r}"))
        if not self._definition.flags & Flag.MMAPABLE or self.type != "array":
            raise BpfError(
                f"map {self.name!r} cannot be seen as memory",
                why=f"it is a {self.type} map"
                + ("" if self._definition.flags & Flag.MMAPABLE else " without BPF_F_MMAPABLE"),
                remedy="give an array map __uint(map_flags, BPF_F_MMAPABLE)",
            )
        stride = rounded(self._definition.value_size)
        number = self.max_entries - first if count is None else count
        if first < 0 or number < 0 or first + number > self.max_entries:
            raise BpfError(
                f"map {self.name!r} has no entries {first} to {first + number - 1}",
                why=f"it has {self.max_entries}",
            )
        if not number:
            return np.empty(0, self.value_dtype)
        begin = first * stride // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = -(-((first + number) * stride - begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            try:
                memory = mmap.mmap(self.fd, length, mmap.MAP_SHARED, offset=begin)
            except PermissionError:  # it is frozen; asking first takes longer than trying
                memory = mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin)
        except OSError as error:
            raise failure(error.errno or 0, f"cannot map the memory of map {self.name!r}") from None
        base, inner = self.value_dtype.subdtype or (self.value_dtype, ())
        steps = (stride, *np.ndarray(inner, base).strides)
        return np.ndarray((number, *inner), base, buffer=memory, offset=first * stride - begin, strides=steps)

    def _arena(self, dtype: np.dtype[Any]) -> Array:
        from hookline.bpf._maps._arena import ArenaMemory

        size = self.max_entries * mmap.PAGESIZE
        what = f"the memory of arena {self.name!r}"
        memory = ArenaMemory.of(self.id, self.fd, self._definition.extra, size, what)
        if not dtype.itemsize:
            raise BpfError(f"{what} cannot be seen as {dtype}", why="it has 0 bytes")
        base, inner = dtype.subdtype or (dtype, ())
        return memory[: size // dtype.itemsize * dtype.itemsize].view(base).reshape(-1, *inner)

    def ring(self, record: str | npt.DTypeLike | None = None, *, lost: Map | None = None) -> Ring:
        """Read a ring buffer; the reader is the caller's to close, and outlives this handle.

        Args:
            record: What each record is: a dtype, or the name of a struct in the map's object; None for
                records of any size.
            lost: The map whose entry 0 counts lost records.

        Raises:
            BpfError: The map is no ring buffer, somebody reads it already, or there is no such struct.
        """
        from hookline.bpf._maps._ring import Ring

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


def _layout(given: Layout, what: str) -> np.dtype[Any] | None:
    """A dtype, where only a size may be given."""
    if given is None:
        return None
    if isinstance(given, bool):
        raise BpfError(f"{given} is no dtype for {what} of a map", remedy='a truth value is "?"')
    if isinstance(given, int):
        if not 0 <= given < 1 << 31:
            raise BpfError(f"{what} of a map cannot have {given} bytes")
        return np.dtype(f"u{given}") if given in (1, 2, 4, 8) else np.dtype(f"V{given}")
    return layout(given, f"{what} of a map")
