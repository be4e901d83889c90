"""What virtual machines' reports say, and the page that is made of them; the reports are of real runs of pytest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import kernels_table
from tools.kernels_table import Column
from tools.vm import kernels, results
from tools.vm.kernels import VmError

ROOT = Path(__file__).resolve().parents[2]
Reported = Callable[..., tuple[list[results.Result], int]]


@pytest.fixture
def reported(tmp_path: Path) -> Reported:
    """Runs tests given as text, with this project's own conftest; what the report says, and pytest's exit status."""

    def run(text: str, *arguments: str) -> tuple[list[results.Result], int]:
        path, report = tmp_path / "test_sample.py", tmp_path / "report.xml"
        path.write_text(f"import pytest\n{text}")
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest"]
        settings = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", f"--junit-xml={report}"]
        done = subprocess.run(
            [*command, *settings, *arguments, str(path)], cwd=ROOT, capture_output=True, check=False
        )
        return results.read(report), done.returncode

    return run


SAMPLE = """
@pytest.fixture
def broken_in_the_end():
    yield
    raise OSError("could not be undone")

@pytest.mark.feature("hook", "there")
@pytest.mark.feature("map", "there too")
def test_passes():
    pass

@pytest.mark.feature("hook", "absent")
@pytest.mark.parametrize("number", [1, 2])
def test_skips(number):
    pytest.skip(f"missing: thing {number}" if number == 1 else "this kernel has no absent: thing 2")
"""


def test_a_report_is_read(reported: Reported) -> None:
    found, status = reported(SAMPLE)
    assert status == 0
    assert [(r.test, r.outcome, r.reason, r.features) for r in found] == [
        ("test_sample::test_passes", "passed", "", ("map: there too", "hook: there")),
        ("test_sample::test_skips[1]", "skipped", "thing 1", ("hook: absent",)),
        ("test_sample::test_skips[2]", "skipped", "thing 2", ("hook: absent",)),
    ]
    assert results.counted(found) == "1 passed, 2 skipped"
    assert results.judge(found, status) == ""
    assert kernels_table.features(found) == {
        "map: there too": "yes",
        "hook: there": "yes",
        "hook: absent": "thing 1",
    }


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("def test_it():\n    assert 1 == 2", (), "1 failed:\n  test_sample::test_it: assert 1 == 2"),
        (f"{SAMPLE}\ndef test_it(broken_in_the_end):\n    pass", (), "could not be undone"),
        ("def test_it(no_such_fixture):\n    pass", (), "1 failed"),
        (SAMPLE, ("-k", "skips"), "no test ran (2 skipped)"),
        (SAMPLE, ("-k", "nothing"), "exit status 5"),
        ("raise SystemError('not even imported')", (), "1 failed"),
    ],
)
def test_what_is_no_success(reported: Reported, text: str, arguments: tuple[str, ...], said: str) -> None:
    found, status = reported(text, *arguments)
    assert said in results.judge(found, status)


def test_a_machine_that_left_no_report_ran_nothing(tmp_path: Path) -> None:
    assert results.judge(results.read(tmp_path / "absent.xml"), 0) == "no test ran (none)"
    (tmp_path / "cut.xml").write_text("<testsuites><testsuite")
    with pytest.raises(VmError, match=r"cut\.xml cannot be read"):
        results.read(tmp_path / "cut.xml")


def test_a_failure_is_not_recorded(reported: Reported) -> None:
    found, _ = reported('@pytest.mark.feature("ring", "x")\ndef test_it():\n    assert 1 == 2')
    with pytest.raises(VmError, match="nothing is recorded"):
        kernels_table.features(found)


def test_a_feature_of_no_known_kind_is_refused(reported: Reported) -> None:
    _, status = reported('@pytest.mark.feature("hok", "x")\ndef test_it():\n    pass')
    assert status == 4


def test_differences_from_the_record(reported: Reported) -> None:
    found, _ = reported(SAMPLE)
    recorded = [Column("6.1", "6.1.0", "x", {}, {"hook: there": "no reason", "hook: absent": "another"})]
    assert kernels_table.differences(recorded, "6.1", found) == [
        "map: there too is not in the record",
        "hook: there: the record says 'no reason', Linux 6.1 'yes'",
    ]
    assert len(kernels_table.differences(recorded, "6.12", found)) == 3


def test_a_page() -> None:
    columns = [
        Column(
            "6.1", "6.1.0-50", "Debian's", {"passed": 1, "skipped": 1}, {"hook: b": "yes", "map: a|b": "no|t"}
        ),
        Column("6.18", "6.18.44", "here", {"passed": 2}, {"hook: A": "yes", "hook: b": "yes"}),
    ]
    text = kernels_table.page(columns)
    assert "| 6.1, Debian's | 6.1.0-50 | 1 passed, 1 skipped |" in text
    assert (
        "## Hooks\n\n| | 6.1 | 6.18 |\n| --- | --- | --- |\n| A | no: not tested | yes |\n| b | yes | yes |\n"
        in text
    )
    assert "| a\\|b | no: no\\|t | no: not tested |" in text
    assert "## Rings" not in text


def test_the_page_is_what_the_record_says() -> None:
    """`make kernels-table` makes both; nobody edits the page."""
    recorded = kernels_table.load(kernels_table.RECORD)
    assert kernels_table.PAGE.read_text() == kernels_table.page(recorded)
    assert [column.name for column in recorded][: len(kernels.SUITES)] == list(kernels.SUITES)
    assert all("yes" in column.features.values() for column in recorded)
    assert json.loads(kernels_table.RECORD.read_text())


def test_the_core_tests_are_found() -> None:
    assert "tests/kernel/bpf/test_link.py" in kernels_table.test_files()
    assert "tests/kernel/test_shipped_objects.py" in kernels_table.test_files()
