"""The bench without measuring: statistics, goals, comparing runs, choosing rows and CPUs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hookline import bench, cli
from hookline.bench import Row, Settings, _starts
from hookline.bench import _rows as rows
from hookline.bench._settings import pinned
from hookline.errors import HooklineError


def made(
    name: str = "a", value: float = 100.0, *, spread: float = 0.0, unit: str = "ms", machine: str = "m"
) -> Row:
    return Row(name, value, unit, "r", 1.0, spread, 5, "", None, machine, "how")


# -- statistics


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([10.0, 10.0, 10.0, 10.0], 0.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.0),  # quartiles 1.5 and 4.5, median 3
        ([9.0, 10.0, 11.0], 0.2),
        ([7.0], 0.0),
        ([-1.0, 0.0, 1.0], 0.0),
    ],
)
def test_spread(values: list[float], spread: float) -> None:
    assert rows.spread(values) == pytest.approx(spread)


def test_a_row_is_medians() -> None:
    row = rows.row("a", "ms", [3.0, 1.0, 50.0], reference="b", reference_values=[4.0, 2.0], method="by hand")
    assert (row.value, row.ratio, row.n, row.met, row.goal) == (3.0, 1.0, 3, None, "")
    assert f"Linux {os.uname().release}" in row.machine
    assert row.as_dict()["method"] == "by hand"


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({"most": 10.0}, True),
        ({"most": 9.9}, False),
        ({"least": 10.0}, True),
        ({"least": 10.1}, False),
        ({"most_ratio": 2.0}, True),
        ({"most_ratio": 1.9}, False),
        ({"most": 11.0, "most_ratio": 1.9}, False),
        ({"least_ratio": 2.0}, True),
        ({"least_ratio": 2.1}, False),
    ],
)
def test_goals(limits: dict[str, float], met: bool) -> None:
    row = rows.row("a", "ms", [10.0], reference="b", reference_values=[5.0], goal="g", **limits)  # type: ignore[arg-type]
    assert row.met is met


def test_things_are_measured_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    told: list[tuple[str, int, int]] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    settings = Settings(rounds=2, tell=lambda *args: told.append(args))
    found = settings.in_turn("x", 15, lambda: measure("a"), lambda: measure("b"))
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert found == [[3.0, 5.0], [4.0, 6.0]]
    assert told == [("x", 0, 2), ("x", 1, 2), ("x", 2, 2)]
    assert len(Settings().in_turn("x", 4, lambda: 1.0)[0]) == 4


# -- CPUs


def test_a_cpu_is_chosen_and_left_again() -> None:
    before = os.sched_getaffinity(0)
    cpu = bench.choose_cpu()
    assert cpu == max(before)
    with pinned(cpu):
        assert os.sched_getaffinity(0) == {cpu}
        # As on a machine with one CPU.
        assert bench.choose_cpu() == cpu
        others = before - {cpu}
        with pytest.raises(HooklineError, match="this process may use"):
            bench.choose_cpu(min(others) if others else cpu + 1)
    with pytest.raises(ZeroDivisionError), pinned(cpu):
        _ = 1 / 0
    with pinned(None):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before
    assert Settings(cpu=3).where == "on CPU 3"
    assert Settings().where == "not pinned to a CPU"


# -- comparing


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (made(value=100), made(value=114), "noise"),
        (made(value=100), made(value=116), "worse"),
        (made(value=100), made(value=80), "better"),
        (made(value=100), made(value=90), "noise"),
        (made(value=100, spread=0.2), made(value=130, spread=0.2), "noise"),
        (made(value=100, spread=0.2), made(value=150, spread=0.2), "worse"),
        (made(value=100, unit="M/s"), made(value=80, unit="M/s"), "worse"),
        (made(value=100, unit="M/s"), made(value=120, unit="M/s"), "better"),
        (made(value=100, unit="M/s"), made(value=90, unit="M/s"), "noise"),
        (made(value=100, unit="ms"), made(value=90, unit="s"), "other unit"),
    ],
)
def test_a_change_is_noise_or_not(old: Row, new: Row, verdict: str) -> None:
    (change,) = bench.compare([old], [new])
    assert change.verdict == verdict
    if verdict != "other unit":
        assert change.change == pytest.approx(new.value / old.value - 1)


def test_rows_of_one_run_only_are_said() -> None:
    changes = bench.compare([made("gone"), made("both")], [made("both", machine="other"), made("fresh")])
    assert [(change.id, change.verdict, change.old, change.new) for change in changes] == [
        ("both", "noise", 100.0, 100.0),
        ("fresh", "new", None, 100.0),
        ("gone", "not measured", 100.0, None),
    ]
    assert changes[0].remark == "then on m"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"rows": [made().as_dict()], "left_out": {}}))
    assert bench.read(path) == [made()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"rows": [{}]}',
        '{"rows": [7]}',
        json.dumps({"rows": [made().as_dict() | {"more": 1}]}),
        json.dumps({"rows": [made().as_dict() | {"value": "7"}]}),
        json.dumps({"rows": [made().as_dict() | {"value": 0}]}),
    ],
)
def test_what_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(HooklineError, match="holds no rows of a bench"):
        bench.read(path)
    with pytest.raises(HooklineError, match="cannot read"):
        bench.read(tmp_path / "absent.json")


# -- the command


def test_every_row_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["id"] for entry in listed] == [name for group in bench.GROUPS for name in group.rows]
    assert {entry["needs"] for entry in listed} == {"nothing", "root", "a lab"}
    assert len({entry["id"] for entry in listed}) == len(listed)
    assert cli.run(["bench", "--list"]) == 0
    assert "ring-consume" in capsys.readouterr().out
    assert cli.run(["bench", "--list", "cli-help"]) == 0
    shown = capsys.readouterr().out
    assert "cli-help" in shown
    assert "ring-consume" not in shown


def test_what_may_not_be_run_is_no_fault_of_hookline(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program")
    with pytest.raises(HooklineError, match=r"cannot run .*Permission denied"):
        _starts.timed([str(tmp_path / "python")])


def test_the_functions_that_measure_exist() -> None:
    from importlib import import_module

    for group in bench.GROUPS:
        assert callable(getattr(import_module(f"hookline.bench.{group.module}"), group.function))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["ring-consum"], 2, "there is no row 'ring-consum'"),
        (["--list", "ring-consum"], 2, "there is no row 'ring-consum'"),
        (["import-bpf", "--pin", "4096"], 1, "cannot measure on CPU 4096"),
        (["import-bpf", "--pin", "first"], 2, "neither the number of a CPU nor none"),
        (["import-bpf", "--pin", "-1"], 2, "neither the number of a CPU nor none"),
        (["import-bpf", "--rounds", "0"], 2, "--rounds"),
        (["import-bpf", "--compare", "/absent.json"], 1, "cannot read /absent.json"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *arguments]) == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert re.findall(r"^(error|why|do): ", shown.err, re.MULTILINE) == ["error", "why", "do"]
    assert shown.out == ""


def test_a_run_is_held_against_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two real measurements of a process's start, one made to look slow and one fast."""
    command = ["bench", "cli-help", "--rounds", "3", "--json"]
    cli.run(command)
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert row["method"].endswith(f"on CPU {max(os.sched_getaffinity(0))}")
    path = tmp_path / "old.json"
    for factor, verdict in ((100.0, "better"), (0.001, "worse")):
        old = row | {"value": row["value"] * factor, "spread": 0.0}
        path.write_text(json.dumps({"rows": [old, old | {"id": "other"}]}))
        status = cli.run([*command, "--compare", str(path), "--pin", "none"])
        shown = capsys.readouterr()
        new = json.loads(shown.out)
        assert [change["verdict"] for change in new["compared"]] == [verdict, "not measured"]
        assert new["rows"][0]["method"].endswith("not pinned to a CPU")
        assert ("worse than before: cli-help" in shown.err) == (verdict == "worse")
        assert status == (1 if verdict == "worse" or new["rows"][0]["met"] is False else 0)


def test_a_row_without_privilege_needs_none() -> None:
    """As root without a capability: what loads programs is refused before anything is measured."""
    dropped = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*dropped, sys.executable, "-m", "hookline", "bench", "--rounds", "1"]
    alone = subprocess.run([*command, "cli-help"], capture_output=True, text=True, check=False)
    assert "cli-help" in alone.stdout
    refused = subprocess.run(
        [*command, "cli-help", "ring-consume"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 3
    assert "cannot measure what loads programs" in refused.stderr
    assert "CAP_" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_rows_are_comparable_as_data() -> None:
    assert {field.name for field in dataclasses.fields(Row)} == {
        *("id", "value", "unit", "reference", "ratio", "spread", "n", "goal", "met", "machine", "method")
    }
