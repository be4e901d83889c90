"""Maps as NumPy sees them: keys and values typed by BTF, one by one or whole maps in one call.

`Map` is the surface. Below it: ``_map_batch`` for many entries at once, ``_map_handle`` for what every map has,
``_map_info`` for what the kernel says of one.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall, pin
from hookline.bpf._errors import BpfError, failure
from hookline.bpf._map_batch import MapBatches
from hookline.bpf._map_handle import Array, rounded
from hookline.bpf._map_info import MapDefinition, describe
from hookline.bpf._syscall import Command, Flag

if TYPE_CHECKING:
    from hookline.bpf._ring import Ring

__all__ = ["Map", "MapDefinition", "describe"]


class Map(MapBatches):
    """A map of the kernel as a mapping from keys to values.

    A key or value is given as a scalar of its dtype, a number, a dict or tuple of members, or bytes. What is
    read is a NumPy scalar, a copy; for per-CPU maps an array of shape ``(CPUs,)``, the possible CPUs.

    A map from an object lives until the object is closed; `duplicate` makes one that lives on. Maps from
    `from_pin` and `from_id` are the caller's to close. The kernel keeps a map while anything refers to it.
    """

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

    # As memory

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
        stride = rounded(self._definition.value_size)
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
