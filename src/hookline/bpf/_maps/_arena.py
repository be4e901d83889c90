"""Arenas: memory that programs and processes share, with pointers that mean the same to both (Linux 6.9).

A pointer stored by a program is an address in user space, so every process must map an arena at the same place. That
place is chosen when the map is made (``map_extra``), far from where processes have anything: a random multiple of
4 GiB (the kernel wants the arena within one) between 2^44 and 5 * 2^44.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

from hookline.bpf._errors import BpfError, failure
from hookline.bpf._owner import Owner

__all__ = ["ArenaMemory", "new_address"]

_LOWEST, _SLOT = 1 << 44, 1 << 32
_SLOTS = (4 << 44) // _SLOT
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def new_address() -> int:
    """Where an arena that is yet to be made shall be in every process."""
    return _LOWEST + int.from_bytes(os.urandom(8)) % _SLOTS * _SLOT


_mapped: weakref.WeakValueDictionary[int, ArenaMemory] = weakref.WeakValueDictionary()


class ArenaMemory(Owner):
    """An arena's memory in this process: mapped once, for as long as any array of it is alive."""

    def __init__(self, fd: int, address: int, size: int, what: str) -> None:
        self._size = 0
        access = mmap.PROT_READ | mmap.PROT_WRITE
        found = _libc.mmap(address or None, size, access, mmap.MAP_SHARED, fd, 0)
        if found == _FAILED:
            raise failure(ctypes.get_errno(), f"cannot map {what}")
        self._address, self._size = found, size
        if address and found != address:
            raise BpfError(
                f"cannot map {what} at {address:#x}",
                why="this process has something else there",
                remedy="make the arena anew, or open it before what took the place",
            )
        self.__array_interface__ = {"data": (found, False), "shape": (size,), "typestr": "|u1", "version": 3}

    @classmethod
    def of(cls, map_id: int, fd: int, address: int, size: int, what: str) -> npt.NDArray[np.uint8]:
        """The arena's bytes; the array keeps them mapped.

        Raises:
            BpfError: The kernel refuses, or the arena's place is taken in this process.
        """
        memory = _mapped.get(map_id)
        if memory is None:
            memory = _mapped[map_id] = cls(fd, address, size, what)
        return np.asarray(memory)

    def __del__(self) -> None:
        if self._size:
            _libc.munmap(self._address, self._size)
