"""The tables of tests/policy: each case says where it is from, and the evaluator answers all of them as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from hookline import trials
from hookline.model import PolicyTest, PolicyTestSpec, PolicyTestStep
from hookline.sources import files

TABLES = sorted((Path(__file__).parents[1] / "policy").glob("*.yaml"))
LEAST_CASES, LEAST_PROBES = 110, 1100


def cases(path: Path) -> list[PolicyTestSpec | PolicyTestStep]:
    (table,) = files.load([path])
    assert isinstance(table, PolicyTest)
    stages: list[PolicyTestSpec | PolicyTestStep] = [table.spec, *table.spec.steps]
    return [case for case in stages if case.probes]


def test_there_are_enough() -> None:
    found = [case for path in TABLES for case in cases(path)]
    assert len(found) >= LEAST_CASES
    assert sum(len(case.probes) for case in found) >= LEAST_PROBES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_each_case_says_what_it_is_about_and_who_says_so(path: Path) -> None:
    for case in cases(path):
        assert case.description
        assert case.source.startswith(("page, ", "types, ", "meta/v1 types, ", "docs/policy.md, ")), (
            case.source
        )
        assert {probe.expect for probe in case.probes} <= {"allow", "deny"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_evaluator_agrees(path: Path) -> None:
    rows = trials.run([path], mode="offline")
    assert rows
    assert [row.as_dict() for row in rows if row.mismatch] == []
