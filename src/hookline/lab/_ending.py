"""Ending in order: a lab is gone when whoever made it for a while is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ending_in_order() -> Iterator[Callable[[], None]]:
    """Has Ctrl-C, a request to end or a terminal that closes end the block where it asks, so that its lab goes too.

    They only leave word, and the function that is given asks for it. An exception out of the handler would be lost where
    it happened to meet a finaliser, and could come between taking a lock and noting that it is taken.

    Raises:
        KeyboardInterrupt: From that function, once one of them came.
    """
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield check
    except Exception:
        check()  # a command that the same Ctrl-C ended did not fail by itself
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
