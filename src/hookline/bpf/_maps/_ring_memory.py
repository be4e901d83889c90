"""The memory that a ring buffer shares with the kernel, and the order in which it may be touched.

``BPF_MAP_TYPE_RINGBUF`` (Documentation/bpf/ringbuf.rst, kernel/bpf/ringbuf.c) is mapped as three parts: a page
with the consumer's position, which is ours to write; a page with the producers' position; and the data twice in a
row, so that a record at the end goes on without a break. Positions count bytes and never wrap; the place in the
data is the position modulo the ring's size. A record is 8 bytes of header (32 bits of length whose two top bits
are BUSY and DISCARD, then 32 bits for the kernel), the data, and padding to a multiple of 8.

Kernel and consumer run at once on different processors and share no lock. Each position and each header is read
and written whole, by one aligned access (ctypes copies 8 bytes by one instruction; a header is read as one
32-bit integer). What remains is order. Four pairs must not be turned around, neither by a compiler (each access is
a call, which no compiler sees through) nor by the processor (the fences):

- **acquire after the producers' position.** The kernel writes a record's header, then publishes the position
  beyond it (``smp_store_release``). Read the other way round, a header could be older than the position that
  covers it: the leftovers of an earlier round.
- **acquire after the headers, before the data.** A producer writes the data, then clears BUSY by ``xchg``, a full
  barrier. Without the fence, data read early could be older than a header that says they are complete.
- **release before the consumer's position is stored.** The kernel reads it (``smp_load_acquire``) and lets
  producers write over everything before it. Stored too early, a record could be overwritten while we copy.
- **full between storing the consumer's position and looking whether to sleep.** A producer wakes only a reader that has
  read everything before its record: it finishes the record, then reads our position. We store our position, then read
  theirs. Were our two turned around, each could miss the other, and the reader would sleep beside a record.

The fences are C11's ``atomic_thread_fence``. An acquire fence after a plain load, and a release fence before a plain store, order
at least as much as the load-acquire and store-release that libbpf uses (tools/memory-model, LKMM). On x86-64 the
processor keeps loads in order with loads, and stores behind all earlier accesses (Intel SDM vol. 3A, 9.2.2: total
store order), so neither fence is an instruction there and none is called. The full fence is there the locked
instruction by which ``epoll_wait`` takes its lock before it asks the ring once more. Elsewhere, arm64 above all, all
are called in ``libatomic``.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hookline.bpf._errors import BpfError, failure

__all__ = ["BUSY", "DISCARD", "HEADER_BYTES", "Fences", "RingMemory"]

BUSY = 1 << 31
DISCARD = 1 << 30
HEADER_BYTES = 8

_ACQUIRE, _RELEASE, _FULL = 2, 3, 5  # C11's memory_order
_KEEPS_ORDER = {"x86_64", "i686", "s390x"}  # total store order


class Fences:
    """The fences, as calls that suit a processor.

    Args:
        machine: The processor, by ``uname``'s name; this one's where it is left out.

    Raises:
        BpfError: The processor needs real fences and libatomic is not installed.
    """

    def __init__(self, machine: str = "") -> None:
        self.acquire: Callable[[], None] = _nothing
        self.release: Callable[[], None] = _nothing
        self.full: Callable[[], None] = _nothing
        if (machine or platform.machine()) in _KEEPS_ORDER:
            return
        try:
            fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
        except (OSError, AttributeError) as error:
            raise BpfError(
                "a ring cannot be read on this processor without memory fences",
                why=str(error),
                remedy="apt-get install libatomic1",
            ) from None
        fence.argtypes, fence.restype = [ctypes.c_int], None
        self.acquire = lambda: fence(_ACQUIRE)
        self.release = lambda: fence(_RELEASE)
        self.full = lambda: fence(_FULL)


class RingMemory:
    """A ring's three parts, and the accesses that reading it takes.

    Positions are bytes since the ring was made. The caller orders the accesses by `acquire`, `release` and `full`.

    Args:
        consumer: The page that begins with the consumer's position, writable.
        producer: The page that begins with the producers' position.
        data: The data, twice in a row: ``2 * size`` bytes.
        fences: The fences to use.
    """

    def __init__(
        self,
        consumer: Any,
        producer: npt.NDArray[np.uint8],
        data: npt.NDArray[np.uint8],
        fences: Fences | None = None,
    ) -> None:
        self.size = len(data) // 2
        self._consumer = ctypes.c_uint64.from_buffer(consumer)
        # ctypes takes no read-only buffers: the address, and the array that keeps it mapped.
        self._producer = ctypes.c_uint64.from_address(producer.ctypes.data)
        self._data = data
        self._bytes: memoryview = data.data
        self._words = self._bytes.cast("I")
        self._kept = producer
        fences = fences or Fences()
        self.acquire = fences.acquire
        self.release = fences.release
        self.full = fences.full

    @classmethod
    def of(cls, fd: int, size: int, what: str) -> RingMemory:
        """Map a ring buffer; it stays mapped until this object is gone.

        Args:
            fd: The map's descriptor.
            size: Its data's size in bytes.
            what: Its name, for error messages.

        Raises:
            BpfError: The kernel refuses, or the processor's fences are missing.
        """
        fences = Fences()
        page = mmap.PAGESIZE
        try:
            consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            rest = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except OSError as error:
            raise failure(error.errno or 0, f"cannot map the memory of {what}") from None
        whole = np.frombuffer(rest, np.uint8)
        return cls(consumer, whole[:page], whole[page:], fences)

    def load_producer(self) -> int:
        """Up to where records were reserved."""
        return self._producer.value

    def load_consumer(self) -> int:
        """Up to where records were consumed."""
        return self._consumer.value

    def store_consumer(self, position: int) -> None:
        """Give everything before a position back to the kernel."""
        self._consumer.value = position

    def headers(self, position: int, count: int, stride: int) -> npt.NDArray[np.uint32]:
        """Copies of `count` headers from a position on, `stride` bytes apart."""
        return np.ndarray((count,), np.uint32, self._data, position % self.size, (stride,)).copy()

    def data(self, position: int, count: int, stride: int, size: int) -> npt.NDArray[np.void]:
        """Copies of `size` bytes of `count` records whose headers are from a position on, `stride` bytes apart."""
        place = position % self.size + HEADER_BYTES
        return np.ndarray((count,), f"V{size}", self._data, place, (stride,)).copy()

    def header(self, position: int) -> int:
        """One header."""
        return self._words[position % self.size // 4]

    def record(self, position: int, size: int) -> bytes:
        """A copy of one record's data."""
        place = position % self.size + HEADER_BYTES
        return self._bytes[place : place + size].tobytes()


def _nothing() -> None:
    """The fence of a processor that keeps the order by itself."""
