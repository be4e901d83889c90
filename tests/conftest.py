"""What all tests share: what the machine has, names of their own for what they make, and a check that nothing
is left behind.

``HOOKLINE_TEST_RUN`` is a random word, new for every run. What a test makes on the machine (a lab, a pin, a
namespace) carries it in its name: take one from the ``unique_name`` fixture. After the last test nothing with
that word may exist, no process that inherited it may run, and this process may hold no bpf link. Other runs
on the same machine have other words and are not looked at.
"""

from __future__ import annotations

import itertools
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.requirements import is_mounted, missing_for, need, required

RUN = os.environ.setdefault("HOOKLINE_TEST_RUN", f"t{secrets.token_hex(3)}")
if worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    # Processes that share a run's tests (pytest -n) are runs of their own: each looks for what it left.
    RUN = os.environ["HOOKLINE_TEST_RUN"] = f"{RUN}{chr(ord('g') + int(worker))}"
FEATURE_KINDS = ("hook", "map", "ring", "other")
GRACE_S = 3.0  # for processes that are ending when the last test does


def pytest_report_header() -> list[str]:
    """Says what this machine has."""
    kernel = missing_for("kernel")
    tracefs = is_mounted("/sys/kernel/tracing", "tracefs")
    return [
        f"machine: Linux {platform.release()} on {platform.machine()}, {os.cpu_count()} CPUs",
        f"kernel tests: {'cannot run, missing ' + kernel if kernel else 'yes'}",
        f"tracefs: {'yes' if tracefs else 'not mounted'}, bpftool: {_bpftool_version()}",
        f"run: HOOKLINE_TEST_RUN={RUN}, required groups: {', '.join(sorted(required())) or 'none'}",
    ]


def _bpftool_version() -> str:
    path = shutil.which("bpftool")
    if path is None:
        return "not installed"
    output = subprocess.run([path, "version"], capture_output=True, text=True, check=False).stdout
    return output.split("\n", 1)[0].removeprefix("bpftool ")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips or fails the tests of a folder whose group this machine cannot run."""
    group = item.path.parent.name
    if group in ("kernel", "lab"):
        need(group, missing_for(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes in a report (``--junit-xml``) what a test shows of a kernel: ``tools/vm/results.py`` reads it."""
    for item in items:
        for marker in item.iter_markers("feature"):
            kind, name = marker.args
            if kind not in FEATURE_KINDS:
                raise pytest.UsageError(
                    f"{item.nodeid}: a feature is one of {', '.join(FEATURE_KINDS)}, not {kind}"
                )
            item.user_properties.append(("feature", f"{kind}: {name}"))


@pytest.fixture(scope="session")
def test_run() -> str:
    """The word that marks all that this run makes."""
    return RUN


@pytest.fixture(scope="session")
def unique_name() -> Callable[[], str]:
    """Makes a new name at each call, short enough for labs: ``t1a2b3c0``."""
    numbers = itertools.count()
    return lambda: f"{RUN}{next(numbers)}"


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the run if its tests left namespaces, pins, lab files, processes or links of theirs."""
    links_before = _own_links()
    state_before = os.environ.get("HOOKLINE_STATE")
    with tempfile.TemporaryDirectory(prefix=f"hookline-{RUN}-") as state:
        os.environ["HOOKLINE_STATE"] = state_before or state
        yield
        if state_before is None:
            del os.environ["HOOKLINE_STATE"]
    deadline = time.monotonic() + GRACE_S
    while (left := _left_behind(links_before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        pytest.fail("the tests left behind:\n  " + "\n  ".join(left), pytrace=False)


def _left_behind(links_before: set[str]) -> list[str]:
    places = {
        "network namespace": Path("/run/netns"),
        "pin": Path("/sys/fs/bpf/hookline"),
        "lab": Path("/run/hookline/labs"),
        "state": Path("/var/lib/hookline"),
    }
    places |= {f"cgroup of {mount}": mount / "hookline" for mount in _cgroup_mounts()}
    left = [
        f"{what} {path}"
        for what, folder in places.items()
        for path in _listing(folder, deep=what in ("state", "pin"))
        if RUN in path.name
    ]
    left += [f"process {line}" for line in _processes()]
    left += [f"bpf link {number} held by pytest" for number in sorted(_own_links() - links_before)]
    return left


def _cgroup_mounts() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]


def _listing(folder: Path, *, deep: bool) -> list[Path]:
    try:
        return sorted(folder.glob("**/*" if deep else "*"))
    except OSError:
        return []


def _processes() -> list[str]:
    """Processes that inherited this run's word: all it started that still run."""
    mark = f"HOOKLINE_TEST_RUN={RUN}".encode()
    family = _ancestors()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) in family:
            continue
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found.append(f"{folder.name}: {b' '.join(words).decode(errors='replace').strip()[:150]}")
        except OSError:
            continue
    return found


def _ancestors() -> set[int]:
    family, number = set(), os.getpid()
    while number > 0:
        family.add(number)
        status = Path(f"/proc/{number}/stat").read_text()
        number = int(status.rpartition(")")[2].split()[1])
    return family


def _own_links() -> set[str]:
    links = set()
    for file in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        links |= {line.split()[1] for line in lines if line.startswith("link_id:")}
    return links
