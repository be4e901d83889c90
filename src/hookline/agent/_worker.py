"""The one thread that has the node. Whoever wants something of it puts it in this queue."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from hookline.agent._errors import AgentError
from hookline.control import Node

Answer = TypeVar("Answer")
Entry = tuple[float, int, Future[Any] | None, Callable[[Node], Any]]
LOOK_PATIENCE_S = 2.0
"""How long looks at the kernel let changes that came later go first."""


class Worker:
    """Runs functions of the node one after the other, in a thread of its own, as the state file and namespaces want it.

    Whoever is patient lets those who come later go first, for so long at most: a change need not wait for the looks that
    have gathered.

    Args:
        open_node: Makes the node; called in the thread.

    Attributes:
        after: Called in the thread after every function.
    """

    def __init__(self, open_node: Callable[[], Node]) -> None:
        self.after: Callable[[Node], None] = lambda node: None
        self._open_node = open_node
        self._queue: queue.PriorityQueue[Entry] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._node: Node | None = None
        self._thread = threading.Thread(target=self._work, name="node", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[Node], Answer], *, patience_s: float = 0.0) -> Answer:
        """Waits for the thread's turn, and for the function's answer.

        Raises:
            AgentError: The agent ends.
        """
        return await asyncio.wrap_future(self.submit(function, patience_s=patience_s))

    def submit(self, function: Callable[[Node], Answer], *, patience_s: float = 0.0) -> Future[Answer]:
        """Puts a function into the queue, from any thread."""
        found: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                found.set_exception(_ending())
            else:
                self._queue.put((time.monotonic() + patience_s, next(self._numbers), found, function))
        return found

    def _work(self) -> None:
        while True:
            _, _, found, function = self._queue.get()
            if found is None:
                break
            if not found.set_running_or_notify_cancel():
                continue
            try:
                answer = self._run(function)
            except BaseException as error:
                found.set_exception(error)
            else:
                found.set_result(answer)
            del found, function  # the next may be long in coming
        if self._node is not None:
            self._node.close()
            self._node = None

    def _run(self, function: Callable[[Node], Answer]) -> Answer:
        if self._node is None:
            self._node = self._open_node()
        try:
            return function(self._node)
        finally:
            self.after(self._node)

    async def close(self) -> None:
        """Lets the node go once what is under way is done. What it has in the kernel stays there; who waits is told."""
        with self._lock:
            self._closed = True
            waiting = []
            with contextlib.suppress(queue.Empty):  # the thread takes some of them meanwhile
                while True:
                    waiting.append(self._queue.get_nowait()[2])
            self._queue.put((0.0, next(self._numbers), None, lambda _: None))
        for one in waiting:
            if one is not None and one.set_running_or_notify_cancel():
                one.set_exception(_ending())
        await asyncio.to_thread(self._thread.join)


def _ending() -> AgentError:
    return AgentError("the agent is ending", why="it was told to", remedy="ask again once it runs")
