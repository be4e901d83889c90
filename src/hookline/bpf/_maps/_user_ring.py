"""Rings in the other direction: Python writes records, programs take them with ``bpf_user_ringbuf_drain`` (Linux 6.1).

The memory is that of ``_ring_memory`` with the roles exchanged: the producers' page and the data are ours to write, the
consumer's page is the kernel's. One writer may write; it never leaves a record unfinished: headers and data first, a
release fence, then the position, which the kernel reads by load-acquire (``__bpf_user_ringbuf_peek``). Before it writes over old
records it reads the consumer's position, and an acquire fence keeps the writing behind that.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import mmap
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf._errors import BpfError, failure
from hookline.bpf._maps._ring_memory import HEADER_BYTES, Fences
from hookline.bpf._owner import Owner
from hookline.bpf._types._codec import encode_rows, layout

if TYPE_CHECKING:
    from hookline.bpf._maps._map import Map

__all__ = ["UserRing"]


class UserRing(Owner):
    """The writer of a user ring buffer map; not for several threads or processes at once.

    Args:
        ring: A map of type ``user_ringbuf``; it may be closed afterwards.
        dtype: What each record is.

    Raises:
        BpfError: The map is no such ring, or cannot be mapped, or there can be no such records.
    """

    def __init__(self, ring: Map, dtype: npt.DTypeLike) -> None:
        if ring.type != "user_ringbuf":
            raise BpfError(f"map {ring.name!r} is no user ring", why=f"it is a {ring.type}")
        self.name = ring.name
        self.size = ring.max_entries
        self.dtype: np.dtype[Any] = layout(dtype, f"the records of user ring {self.name!r}")
        if not self.dtype.itemsize:
            raise BpfError(f"the records of user ring {self.name!r} cannot have 0 bytes", why=f"{self.dtype}")
        self._stride = (self.dtype.itemsize + HEADER_BYTES + 7) // 8 * 8
        self._fences = Fences()
        page = mmap.PAGESIZE
        try:
            consumer = mmap.mmap(ring.fd, page, mmap.MAP_SHARED, mmap.PROT_READ)
            access = mmap.PROT_READ | mmap.PROT_WRITE
            rest = mmap.mmap(ring.fd, page + 2 * self.size, mmap.MAP_SHARED, access, offset=page)
        except OSError as error:
            raise failure(error.errno or 0, f"cannot map the memory of user ring {self.name!r}") from None
        self._kept = np.frombuffer(consumer, np.uint8)
        self._consumer = ctypes.c_uint64.from_address(self._kept.ctypes.data)
        self._producer = ctypes.c_uint64.from_buffer(rest)
        self._data: npt.NDArray[np.uint8] | None = np.frombuffer(rest, np.uint8)[page:]

    @property
    def room(self) -> int:
        """How many records can be written now."""
        self._memory()
        return int((self.size - (self._producer.value - self._consumer.value)) // self._stride)

    def write(self, records: npt.ArrayLike | Iterable[Any]) -> int:
        """Write records; returns how many found room, the first ones of those given.

        A program that is waiting to be run is not: run it, or attach it to what happens anyway.

        Args:
            records: An array of the ring's dtype and shape ``(n,)``, or a sequence of such values as `Map.put` takes.

        Raises:
            BpfError: One of them does not fit the dtype; none is written.
        """
        data = self._memory()
        given = encode_rows(self.dtype, records, f"the records for user ring {self.name!r}")
        count = min(len(given), self.room)
        self._fences.acquire()
        position = self._producer.value
        place, size = position % self.size, self.dtype.itemsize
        headers: npt.NDArray[np.uint32] = np.ndarray((count, 2), np.uint32, data, place, (self._stride, 4))
        headers[...] = size, 0  # not BUSY; the second half is the kernel's
        target: npt.NDArray[Any] = np.ndarray(
            (count,), f"V{size}", data, place + HEADER_BYTES, (self._stride,)
        )
        target[...] = given[:count].view(np.uint8).reshape(count, size).view(f"V{size}").reshape(count)
        self._fences.release()
        self._producer.value = position + count * self._stride
        return count

    def close(self) -> None:
        """Unmap the ring; what was written stays for programs. Closing twice is no error."""
        if self._data is not None:
            self._data = None
            del self._consumer, self._producer, self._kept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<UserRing {self.name!r}: {self.size} bytes, {self.dtype}>"

    def _memory(self) -> npt.NDArray[np.uint8]:
        if self._data is None:
            raise BpfError(f"user ring {self.name!r} is closed", errno=errnos.EBADF)
        return self._data
