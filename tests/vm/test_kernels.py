"""The core of `tests/kernel` on Debian's kernels: both are started at the same time, once, and run the tests that show a
feature (the marker ``feature``), which are those behind docs/kernels.md.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.requirements import need
from tools import kernels_table
from tools.vm import kernels, results
from tools.vm.kernels import VmError
from tools.vm.machine import RESULTS, Machine, Outcome

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("qemu-system-x86_64", "busybox", "modprobe", "cpio", "zstd", "setpriv")
# Only the files that have such tests: to import the others takes longer than to run these.
CORE = (
    *("env", "HOOKLINE_REQUIRE=", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
    *(
        "-m",
        kernels_table.MARKED,
        f"--junit-xml={RESULTS}/{kernels_table.REPORT}",
        *kernels_table.test_files(),
    ),
)
TIMEOUT_S = 1500.0  # five minutes alone

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Run:
    """The core tests on one kernel: how the machine ended, what it printed, test by test."""

    release: str
    outcome: Outcome
    output: str
    results: list[results.Result]


@pytest.fixture(scope="module")
def machines() -> dict[str, kernels.Kernel]:
    """The kernels, fetched if they are not there."""
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    need("vm", ", ".join(lacking) and f"{', '.join(lacking)} (tools/setup test-vm brings them)")
    found, missing = {}, ""
    for name in kernels.SUITES:
        try:
            found[name] = kernels.get(name)
        except VmError as error:
            missing = f"Linux {name}, which cannot be fetched: {error}"
    need("vm", missing)
    return found


@pytest.fixture(scope="module")
def runs(
    machines: dict[str, kernels.Kernel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """The core tests' run on each kernel; what prevented it is raised where that kernel is asked for."""

    def run(name: str) -> Run | VmError:
        output, folder = io.StringIO(), tmp_path_factory.getbasetemp() / f"vm-{name}"
        folder.mkdir()
        try:
            outcome = Machine(machines[name]).run(
                CORE, folder=ROOT, timeout_s=TIMEOUT_S, stdout=output, stderr=output, results=folder
            )
            return Run(
                machines[name].release,
                outcome,
                output.getvalue(),
                results.read(folder / kernels_table.REPORT),
            )
        except VmError as error:
            return VmError(f"{error}\n{output.getvalue()}")

    with ThreadPoolExecutor(len(machines)) as pool:
        found = dict(zip(machines, pool.map(run, machines), strict=True))

    def one(name: str) -> Run:
        answer = found[name]
        if isinstance(answer, VmError):
            pytest.fail(str(answer), pytrace=False)
        return answer

    return one


@pytest.mark.parametrize("name", kernels.SUITES)
def test_the_core_tests_pass(
    runs: Callable[[str], Run], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(name)
    times = f"booted in {run.outcome.boot_s:.0f} s, ran {run.outcome.command_s:.0f} s"
    with capsys.disabled():
        print(f"\nLinux {run.release}: {results.counted(run.results)}, {times}")
        for result in run.results:
            print(f"  {result.outcome:7} {result.test}{result.reason and ': ' + result.reason}")
    problem = results.judge(run.results, run.outcome.status)
    assert not problem, f"{problem}\n{run.output}"
    assert run.release.startswith(f"{name}.")
    assert not run.outcome.complaints, "the kernel's log speaks of trouble"


@pytest.mark.parametrize("name", kernels.SUITES)
def test_the_page_of_kernels_says_so(runs: Callable[[str], Run], name: str) -> None:
    """docs/kernels.md has a row for each feature, with what this kernel has just shown."""
    recorded = kernels_table.load(kernels_table.RECORD)
    wrong = kernels_table.differences(recorded, name, runs(name).results)
    assert not wrong, "make kernels-table, or mend what changed:\n  " + "\n  ".join(wrong)
