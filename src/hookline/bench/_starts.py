"""How long processes take from their start to their end, Python's among them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hookline.errors import HooklineError


def timed(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Milliseconds that a command takes.

    Raises:
        HooklineError: It failed, or may not be run.
    """
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
        )
    except OSError as error:
        raise HooklineError(
            f"cannot run {command[0]}",
            why=error.strerror or str(error),
            remedy="measure as a user that may run it, for example with sudo",
        ) from None
    took = (time.perf_counter() - start) * 1e3
    if done.returncode != 0:
        raise HooklineError(
            f"{Path(command[0]).name} failed",
            why=(done.stderr or done.stdout).strip(),
            remedy=f"run it by itself: {' '.join(command[:3])}",
        )
    return took


class Python:
    """This interpreter, its modules compiled once, as in an installation, whatever PYTHONDONTWRITEBYTECODE says here."""

    def __init__(self, compiled: Path) -> None:
        self._environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
        } | {"PYTHONPYCACHEPREFIX": str(compiled)}

    def timed(self, code: str) -> float:
        """Milliseconds that a process takes to run the code."""
        return timed([sys.executable, "-c", code], self._environment)


@contextmanager
def python() -> Iterator[Python]:
    """An interpreter whose compiled modules are kept while the block runs."""
    with tempfile.TemporaryDirectory(prefix="hookline-bench-") as folder:
        yield Python(Path(folder))
