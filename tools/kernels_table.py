"""docs/kernels.md: what runs on which kernel, from what the tests found there.

    .venv/bin/python -m tools.kernels_table             runs the tests on each kernel, records, writes the page
    .venv/bin/python -m tools.kernels_table --here      the same, but only this machine's tests run again
    .venv/bin/python -m tools.kernels_table --page      writes the page from the record

A row is a feature that a test names by the marker ``feature``. The record is docs/kernels.json. A kernel *has* a feature if
a test that shows it passed; it lacks it if each was skipped, and the first skip says why. A failed test is neither: then
nothing is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.vm import kernels, results
from tools.vm.kernels import VmError
from tools.vm.machine import RESULTS
from tools.vm.results import Result

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "docs" / "kernels.json", ROOT / "docs" / "kernels.md"
REPORTS, REPORT = ROOT / "build" / "kernels", "report.xml"
TESTS = "tests/kernel"
MARKED = "feature and not slow"
YES = "yes"
HEADINGS = {"hook": "Hooks", "map": "Maps", "ring": "Rings", "other": "The rest"}
_TIMEOUT_S = 1800


@dataclass
class Column:
    """What one kernel has.

    Attributes:
        name: ``6.1``, ``6.12``, or the version of the machine's own kernel.
        release: ``uname -r``.
        where: Whose kernel it is.
        tests: How many tests there were, by outcome.
        features: ``yes``, or why not, by the feature (``hook: tcx``).
    """

    name: str
    release: str
    where: str
    tests: dict[str, int] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)


def test_files() -> list[str]:
    """The files with tests that show a feature."""
    found = sorted((ROOT / TESTS).rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if "mark.feature(" in path.read_text()]


def features(found: Iterable[Result]) -> dict[str, str]:
    """Each feature's cell: ``yes``, or the first reason why a test of it was skipped.

    Raises:
        VmError: A test failed.
    """
    cells: dict[str, str] = {}
    for result in found:
        if result.outcome == "failed":
            raise VmError(f"{result.test} failed, so nothing is recorded: {result.reason}")
        for name in result.features:
            if result.outcome == "passed":
                cells[name] = YES
            else:
                cells.setdefault(name, result.reason)
    return cells


def differences(recorded: Sequence[Column], name: str, found: Sequence[Result]) -> list[str]:
    """Where the record says something else of a kernel than its tests have just shown."""
    said = next((column.features for column in recorded if column.name == name), {})
    wrong = []
    for feature, cell in features([result for result in found if result.outcome != "failed"]).items():
        if feature not in said:
            wrong.append(f"{feature} is not in the record")
        elif (said[feature] == YES) != (cell == YES):
            wrong.append(f"{feature}: the record says {said[feature]!r}, Linux {name} {cell!r}")
    return wrong


def load(path: Path) -> list[Column]:
    """The record."""
    return [Column(**column) for column in json.loads(path.read_text())["kernels"]]


def page(columns: Sequence[Column]) -> str:
    """docs/kernels.md."""
    names = list(dict.fromkeys(name for column in columns for name in column.features))
    lines = [
        "# What runs on which kernel",
        "",
        f"Made by `make kernels-table` from what `{TESTS}` found: edit the tests, not this page. A feature is",
        "there if a test that shows it passed; where it is missing, the test's own reason stands.",
        "",
        "| kernel | release | tests that show a feature |",
        "| --- | --- | --- |",
    ]
    for column in columns:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in column.tests.items())
        lines.append(f"| {column.name}, {column.where} | {column.release} | {counts} |")
    for kind, heading in HEADINGS.items():
        rows = sorted((name for name in names if name.startswith(f"{kind}: ")), key=str.casefold)
        if not rows:
            continue
        lines += ["", f"## {heading}", "", f"| | {' | '.join(column.name for column in columns)} |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for name in rows:
            cells = (_cell(column.features.get(name, "not tested")) for column in columns)
            row = (text.replace("|", "\\|") for text in (name.partition(": ")[2], *cells))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _cell(value: str) -> str:
    return YES if value == YES else f"no: {value}"


def record(*, machines: bool = True) -> list[Column]:
    """Runs the tests that show a feature, on each of Debian's kernels at the same time and then here.

    Args:
        machines: Whether Debian's kernels run them again, or their last reports do.

    Raises:
        VmError: A machine, or a test, failed. The reports are kept in `REPORTS`.
    """
    command = ["env", "HOOKLINE_REQUIRE=", sys.executable, "-m", "pytest", "-m", MARKED, "-q", *test_files()]
    if machines:
        shutil.rmtree(REPORTS, ignore_errors=True)
        inside = [*command, "-p", "no:cacheprovider", f"--junit-xml={RESULTS}/{REPORT}"]
        start = [sys.executable, "-m", "tools.vm", "--together", "--timeout", str(_TIMEOUT_S)]
        subprocess.run([*start, "--results", str(REPORTS), *inside], cwd=ROOT, check=False)
    here = REPORTS / "here" / REPORT
    here.unlink(missing_ok=True)
    subprocess.run([*command, f"--junit-xml={here}"], cwd=ROOT, check=False)
    columns = [
        _column(name, kernels.get(name).release, "Debian's", REPORTS / name / REPORT)
        for name in kernels.SUITES
    ]
    release = platform.release()
    own = ".".join(release.split(".")[:2])
    return [*columns, _column(own, release, "the development machine's", here)]


def _column(name: str, release: str, where: str, report: Path) -> Column:
    found = results.read(report)
    cells = features(found)
    if YES not in cells.values():
        raise VmError(f"Linux {release}: {results.judge(found, 0) or 'no test showed a feature'}")
    counts = {kind: sum(result.outcome == kind for result in found) for kind in ("passed", "skipped")}
    return Column(name, release, where, {k: v for k, v in counts.items() if v}, cells)


def write(columns: Sequence[Column]) -> None:
    """The record and the page."""
    document = {"kernels": [asdict(column) for column in columns]}
    RECORD.write_text(json.dumps(document, indent=1, ensure_ascii=False, sort_keys=False) + "\n")
    PAGE.write_text(page(columns))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page, from the record")
    parser.add_argument(
        "--here",
        action="store_true",
        help="only this machine's tests anew; of Debian's kernels the last reports",
    )
    arguments = parser.parse_args()
    try:
        if arguments.page:
            PAGE.write_text(page(load(RECORD)))
        else:
            if os.geteuid() != 0:
                raise VmError("the tests of this machine's kernel need root")
            write(record(machines=not arguments.here))
    except VmError as error:
        print(f"kernels_table: {error}", file=sys.stderr)
        return 1
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
