"""A namespace for tests that need nothing but loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.bpf.conftest import inside
from tests.requirements import missing_for, need


@pytest.fixture
def loopback(unique_name: Callable[[], str]) -> Iterator[Path]:
    """A namespace with ``lo`` alone, which has 127.0.0.0/8, ::1, fd00::1 and fd00::2; the test runs inside it."""
    need("kernel", missing_for("kernel"))
    name = unique_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for words in ("link set lo up", "address add fd00::1/128 dev lo", "address add fd00::2/128 dev lo"):
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        with inside(Path("/run/netns") / name):
            yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
