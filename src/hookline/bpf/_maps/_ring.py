"""Rings: the events of programs, read from the memory that the kernel shares.

    with obj.ring("events", "event") as ring:
        while ring.wait(timeout=1.0):
            events = ring.read()                # a structured array of all that is there
            print(events["bytes"].sum(), ring.lost)

A ring buffer has one consumer: its position is one number, kept in the kernel with the map. Whoever opens a
pinned ring goes on where the last reader stopped, even one that was killed. Two readers at once would each miss
what the other takes, so a second `Ring` of the same map is refused within a process; between processes it
is the caller's to prevent.
"""

from __future__ import annotations

import contextlib
import errno as errnos
import os
import select
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError
from hookline.bpf._maps._ring_memory import BUSY, DISCARD, HEADER_BYTES, RingMemory
from hookline.bpf._owner import Owner
from hookline.bpf._types._codec import layout

if TYPE_CHECKING:
    import asyncio

    from hookline.bpf._maps._map import Map

__all__ = ["Backlog", "Ring"]

Array = npt.NDArray[Any]

_LENGTH = DISCARD - 1
# How long to look away from a record that its program has not finished: programs take microseconds.
_BUSY_PAUSE_S = 0.0001
_open_rings: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()


class Backlog(NamedTuple):
    """What waits in a ring.

    Attributes:
        bytes: With headers, padding and discarded records.
        records: How many records of the ring's dtype that is at most; None without a dtype.
    """

    bytes: int
    records: int | None


class Ring(Owner):
    """The reader of a ring buffer map; not for several threads at once, nor for both sides of a fork.

    Args:
        ring: A map of type ``ringbuf``. The reader has a descriptor of its own: the map may be closed.
        dtype: What each record is; None where records differ in size (`records` gives their bytes).
        lost: A per-CPU array or array of counters whose entry 0 programs add to when the ring is full, as
            ``ring.h`` does; `Object.ring` finds it as ``NAME_lost``.

    Raises:
        BpfError: The map is no ring buffer, it is being read in this process already, or cannot be mapped.
    """

    def __init__(self, ring: Map, dtype: npt.DTypeLike | None = None, *, lost: Map | None = None) -> None:
        if ring.type != "ringbuf":
            raise BpfError(f"map {ring.name!r} is no ring", why=f"it is a {ring.type}")
        self.name = ring.name
        self.dtype: np.dtype[Any] | None = None
        if dtype is not None:
            self.dtype = layout(dtype, f"the records of ring {self.name!r}")
        if self.dtype is not None and not self.dtype.itemsize:
            raise BpfError(f"the records of ring {self.name!r} cannot have 0 bytes", why=f"{self.dtype}")
        self.size = ring.max_entries
        self._fd = -1
        self._waiter: asyncio.Future[None] | None = None
        self._handed_out: int | None = None
        self._id = ring.id
        if self._id in _open_rings:
            raise BpfError(
                f"ring {self.name!r} is being read already",
                why="a ring buffer has one consumer",
                remedy="close the other Ring first, or give its records to both",
            )
        self._memory: RingMemory | None = RingMemory.of(ring.fd, self.size, f"ring {self.name!r}")
        self._lost = lost.duplicate() if lost is not None else None
        self._fd = os.dup(ring.fd)
        self._poll = select.epoll()
        self._poll.register(self._fd, select.EPOLLIN)
        # Readable once the ring is closed: epoll wakes nobody because a descriptor is given back.
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._closing, select.EPOLLIN)
        self._lock = threading.RLock()
        # Who still needs the descriptors; after the close the last of them gives them back.
        self._users = 0
        _open_rings[self._id] = self

    # What is there

    @property
    def fd(self) -> int:
        """A descriptor that polls as readable while there are records."""
        self._mapped()
        return self._fd

    @property
    def backlog(self) -> Backlog:
        """What was reserved and not yet consumed."""
        memory = self._mapped()
        self._settle()
        waiting = memory.load_producer() - memory.load_consumer()
        return Backlog(waiting, None if self.dtype is None else waiting // _stride(self.dtype.itemsize))

    @property
    def lost(self) -> int | None:
        """How many records programs could not put into the ring; None where nothing counts them.

        The kernel does not count. ``ring.h`` declares a counter beside the ring and adds to it.
        """
        self._mapped()
        return None if self._lost is None else int(np.sum(self._lost[0]))

    # Reading

    def read(self, limit: int | None = None) -> Array:
        """All records that are there, up to the first that its program has not finished.

        They are copied out of the ring in one go and given back to the kernel. What a program discarded
        is left out.

        Args:
            limit: At most so many records, discarded ones included; the others stay.

        Returns:
            An array of the ring's dtype and shape ``(records,)``, its own memory.

        Raises:
            BpfError: The ring has no dtype, or the next record has another size than the dtype; records before such a one
                are returned first.
        """
        memory = self._mapped()
        if self.dtype is None:
            raise BpfError(
                f"ring {self.name!r} has no dtype",
                remedy="give one, as in obj.ring('events', 'event'), or iterate over records()",
            )
        self._settle()
        size = self.dtype.itemsize
        stride = _stride(size)
        position = memory.load_consumer()
        end = memory.load_producer()
        memory.acquire()
        # Rounded up, so that a shorter record at the end is seen, and refused.
        count = -(-(end - position) // stride)
        if limit is not None:
            count = min(count, max(limit, 0))
        headers = memory.headers(position, count, stride)
        memory.acquire()
        usable, discarded = self._usable(headers, size)
        found = memory.data(position, usable, stride, size)
        memory.release()
        memory.store_consumer(position + usable * stride)
        if len(discarded):
            found = np.delete(found, discarded)
        return _typed(found, self.dtype)

    def _usable(self, headers: npt.NDArray[np.uint32], size: int) -> tuple[int, npt.NDArray[np.intp]]:
        """How many records from the first on are finished and of this size, and which of them are discarded.

        A header is one only if all records before it have the expected size, so the first that has not
        ends the run, whatever is behind it.
        """
        odd = np.flatnonzero(headers != size)
        if not len(odd):
            return len(headers), odd
        kinds = headers[odd]
        stops = np.flatnonzero((kinds & BUSY != 0) | (kinds & _LENGTH != size))
        if not len(stops):
            return len(headers), odd
        usable = int(odd[stops[0]])
        header = int(kinds[stops[0]])
        if not usable and not header & BUSY:
            raise BpfError(
                f"ring {self.name!r} holds a record of {header & _LENGTH} bytes",
                why=f"its dtype has {size}",
                remedy="iterate over records() of a Ring without a dtype, or give the dtype that the program writes",
            )
        return usable, odd[: stops[0]]

    def records(self) -> Generator[Any, None, None]:
        """The records that are there at the call, one by one, whatever their sizes.

        Those that come meanwhile are left for the next call, so the loop ends however busy the ring is. A
        record is consumed when the next is asked for, or the loop is left in any way: nothing is lost or given
        twice. If the process is killed meanwhile, the next reader gets that record again.

        Yields:
            A record's bytes; with a dtype, a NumPy scalar (or array, for an array's dtype).

        Raises:
            BpfError: The ring has a dtype and a record another size; the record stays.
        """
        memory = self._mapped()
        end = memory.load_producer()
        memory.acquire()
        while True:
            memory = self._mapped()
            self._settle()
            found = self._next(memory, end)
            if found is None:
                return
            record, self._handed_out = found
            try:
                yield record
            finally:
                self._settle()

    def _next(self, memory: RingMemory, end: int) -> tuple[Any, int] | None:
        """The next record before `end` that is not discarded, and the position behind it; None where there is none."""
        position = memory.load_consumer()
        while position < end:
            header = memory.header(position)
            if header & BUSY:
                return None
            memory.acquire()
            length = header & _LENGTH
            behind = position + _stride(length)
            if header & DISCARD:
                memory.release()
                memory.store_consumer(behind)
                position = behind
                continue
            if self.dtype is None:
                return memory.record(position, length), behind
            if length != self.dtype.itemsize:
                raise BpfError(
                    f"ring {self.name!r} holds a record of {length} bytes",
                    why=f"its dtype has {self.dtype.itemsize}",
                    remedy="iterate over records() of a Ring without a dtype",
                )
            return _typed(memory.data(position, 1, behind - position, length), self.dtype)[0], behind
        return None

    def _settle(self) -> None:
        """Consume the record that `records` has handed out."""
        if self._handed_out is not None and self._memory is not None:
            self._memory.release()
            self._memory.store_consumer(self._handed_out)
            self._handed_out = None

    # Waiting

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a record is there; returns whether one is.

        A program that submits with ``BPF_RB_NO_WAKEUP`` wakes nobody: the record is seen at the timeout.

        Args:
            timeout: In seconds; None for as long as it takes, 0 to look only.

        Raises:
            BpfError: The ring is closed, or was by another thread meanwhile.
        """
        with self._using():
            return self._wait(None if timeout is None else time.monotonic() + timeout)

    def _wait(self, deadline: float | None) -> bool:
        self._settle()
        while not self._ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._poll.poll(left):
                # It is readable from the reservation on; the record may not be finished.
                if self._ready():
                    return True
                time.sleep(_BUSY_PAUSE_S)
        return True

    async def wait_async(self) -> None:
        """Wait in an event loop until a record is there; can be cancelled at any time.

        Raises:
            BpfError: Another task waits for this ring, or the ring was closed meanwhile.
        """
        import asyncio

        self._settle()
        loop = asyncio.get_running_loop()
        while not self._ready():
            if self._waiter is not None:
                raise BpfError(f"another task waits for ring {self.name!r}", why="a ring has one consumer")
            self._waiter = loop.create_future()
            loop.add_reader(self._fd, _wake, self._waiter)
            try:
                await self._waiter
            finally:
                if self._fd >= 0:
                    loop.remove_reader(self._fd)
                self._waiter = None
            if not self._ready():
                await asyncio.sleep(_BUSY_PAUSE_S)

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Batches as they come, never empty: arrays as `read` gives, without a dtype lists of bytes."""
        import asyncio

        while True:
            batch = list(self.records()) if self.dtype is None else self.read()
            if len(batch):
                yield batch
                # Others have their turn, however busy the ring is.
                await asyncio.sleep(0)
            else:
                await self.wait_async()

    def _ready(self) -> bool:
        """Whether the next record is finished."""
        memory = self._mapped()
        memory.full()
        position = memory.load_consumer()
        if memory.load_producer() <= position:
            return False
        memory.acquire()
        return not memory.header(position) & BUSY

    # Life

    def close(self) -> None:
        """Unmap the ring; arrays that were handed out stay. Closing twice is no error.

        Who waits for it, in another thread or task, gets `BpfError`.
        """
        if self._memory is None:
            return
        self._settle()
        with self._lock:
            self._memory = None
            _open_rings.pop(self._id, None)
            if self._forked:
                # A child of a fork: who waits does so in the parent, and shares the eventfd.
                self._users, self._waiter = 0, None
            self._fail_waiter()
            if self._users:
                os.eventfd_write(self._closing, 1)
            else:
                self._release()

    def _fail_waiter(self) -> None:
        """Tell the task that waits for this ring that it is closed, from whatever thread."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        loop = waiter.get_loop()
        if _running_loop() is loop or not loop.is_running():
            self._fail(waiter)
            return
        self._users += 1
        loop.call_soon_threadsafe(self._fail_and_leave, waiter)

    def _fail(self, waiter: asyncio.Future[None]) -> None:
        waiter.get_loop().remove_reader(self._fd)
        if not waiter.done():
            waiter.set_exception(self._closed())

    def _fail_and_leave(self, waiter: asyncio.Future[None]) -> None:
        self._fail(waiter)
        self._leave()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the descriptors while they are waited on."""
        with self._lock:
            self._mapped()
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._memory is None and self._users <= 0:
                self._release()

    def _release(self) -> None:
        if self._fd < 0:
            return
        self._poll.close()
        for fd in (self._fd, self._closing):
            os.close(fd)
        self._fd = self._closing = -1
        if self._lost is not None:
            self._lost.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        for fd in (getattr(self, "_fd", -1), getattr(self, "_closing", -1)):
            if fd >= 0:
                _syscall.closed_quietly(fd)

    def __repr__(self) -> str:
        return f"<Ring {self.name!r}: {self.size} bytes, {self.dtype or 'records of any size'}>"

    def _mapped(self) -> RingMemory:
        if self._memory is None:
            raise self._closed()
        return self._memory

    def _closed(self) -> BpfError:
        return BpfError(f"ring {self.name!r} is closed", errno=errnos.EBADF)


def _stride(size: int) -> int:
    """How many bytes of the ring a record of this size takes."""
    return (size + HEADER_BYTES + 7) // 8 * 8


def _typed(records: npt.NDArray[np.void], dtype: np.dtype[Any]) -> Array:
    """Raw records seen through their dtype: shape ``(records,)`` and that of the dtype's own array, if any."""
    if dtype.subdtype is None:
        return records.view(dtype)
    base, inner = dtype.subdtype
    return records.view(base).reshape(len(records), *inner)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if any."""
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
