"""The one thread that has the node. Whoever wants something of it puts it in this queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from hookline.control import Node

Answer = TypeVar("Answer")


class Worker:
    """Runs functions of the node one after the other, in a thread of its own, as the state file and namespaces want it.

    Args:
        open_node: Makes the node; called in the thread.

    Attributes:
        after: Called in the thread after every function.
    """

    def __init__(self, open_node: Callable[[], Node]) -> None:
        self.after: Callable[[Node], None] = lambda node: None
        self._open_node = open_node
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="node")
        self._node: Node | None = None

    async def call(self, function: Callable[[Node], Answer]) -> Answer:
        """Waits for the thread's turn, and for the function's answer."""
        return await asyncio.wrap_future(self.submit(function))

    def submit(self, function: Callable[[Node], Answer]) -> Future[Answer]:
        """Puts a function into the queue, from any thread."""
        return self._threads.submit(self._run, function)

    def _run(self, function: Callable[[Node], Answer]) -> Answer:
        if self._node is None:
            self._node = self._open_node()
        try:
            return function(self._node)
        finally:
            self.after(self._node)

    async def close(self) -> None:
        """Lets the node go once what is under way is done. What it has in the kernel stays there."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._close)
        self._threads.shutdown()

    def _close(self) -> None:
        if self._node is not None:
            self._node.close()
            self._node = None
