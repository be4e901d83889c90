"""What a run of pytest says in its report (``--junit-xml``), test by test.

A report names the features that a test shows (the marker ``feature``, by ``tests/conftest.py``), so it tells what a kernel
has and what it lacks, and why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tools.vm.kernels import VmError

__all__ = ["Result", "counted", "judge", "read"]

# How a skip begins that a probe, or need(), decided; what follows is the reason.
_PREFIX = re.compile(r"^(missing: |this kernel has no [^:(]+: )")


@dataclass(frozen=True)
class Result:
    """One test.

    Attributes:
        test: Its name, parameters included.
        outcome: ``passed``, ``skipped`` or ``failed``; an error around a test is a failure.
        reason: Why it was skipped or failed; one line.
        features: What it shows of a kernel: ``hook: tcx``.
        seconds: How long it took.
    """

    test: str
    outcome: str
    reason: str
    features: tuple[str, ...]
    seconds: float


def read(report: Path) -> list[Result]:
    """The tests of a report; none where there is no report.

    Raises:
        VmError: The report is not whole.
    """
    if not report.exists():
        return []
    try:
        root = ElementTree.parse(report).getroot()
    except ElementTree.ParseError as error:
        raise VmError(f"the report {report.name} cannot be read: {error}") from error
    return list(_results(root))


def judge(results: Sequence[Result], status: int) -> str:
    """Why a run of tests is no success: the failures, a status that is not 0, or that nothing ran. Empty for a success."""
    failed = [f"{result.test}: {result.reason}" for result in results if result.outcome == "failed"]
    if failed:
        return f"{len(failed)} failed:\n  " + "\n  ".join(failed)
    if status != 0:
        return f"exit status {status}"
    if not any(result.outcome == "passed" for result in results):
        return f"no test ran ({counted(results)})"
    return ""


def counted(results: Sequence[Result]) -> str:
    """``41 passed, 12 skipped``."""
    counts = Counter(result.outcome for result in results)
    return (
        ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "skipped", "failed") if counts[kind])
        or "none"
    )


def _results(root: ElementTree.Element) -> Iterator[Result]:
    # A test whose teardown failed after it passed or failed has two entries: the worse one counts.
    found: dict[str, Result] = {}
    for case in root.iter("testcase"):
        result = _result(case)
        if result.test not in found or result.outcome == "failed":
            found[result.test] = result
    yield from found.values()


def _result(case: ElementTree.Element) -> Result:
    outcome, reason = "passed", ""
    for kind, meaning in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        told = case.find(kind)
        if told is not None:
            outcome, reason = meaning, (told.get("message") or "").partition("\n")[0]
    # A file that cannot even be imported has no class name.
    module = case.get("classname", "").removeprefix("tests.").replace(".", "/")
    return Result(
        f"{module}::{case.get('name')}" if module else case.get("name", ""),
        outcome,
        _PREFIX.sub("", reason),
        tuple(entry.get("value", "") for entry in case.iter("property") if entry.get("name") == "feature"),
        float(case.get("time", "0")),
    )
