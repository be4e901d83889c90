"""The cheap rows of the bench, measured for real: no goals, which depend on the machine, but what is true everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hookline import bench, bpf
from hookline.bench import Settings, _firewall
from hookline.errors import HooklineError
from tests.requirements import need
from tools.build_objects import ROOT, build_all

CHEAP = ("ring-consume", "percpu-hash-read", "batch-update", "object-load", "maglev-build")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all(ROOT)


@pytest.fixture
def pins_before() -> set[Path]:
    return set(bpf.pin.BPFFS.glob("hookline-bench-*"))


def test_the_cheap_rows(pins_before: set[Path]) -> None:
    need("kernel", "" if shutil.which("bpftool") else "the program bpftool")
    affinity, descriptors = os.sched_getaffinity(0), len(os.listdir("/proc/self/fd"))
    told: list[str] = []
    found: list[str] = []
    settings = Settings(2, bench.choose_cpu(), lambda row, number, of: told.append(row))
    measured = bench.run(CHEAP, settings, found=lambda row: found.append(row.id))
    rows = {row.id: row for row in measured.rows}
    assert set(rows) == set(found) == set(told) == set(CHEAP)
    assert measured.left_out == {}
    assert all(row.value > 0 and row.n == 2 and row.method.endswith(settings.where) for row in rows.values())
    # Whatever the machine: an event without a call, and entries without one, cost less than with.
    assert rows["ring-consume"].ratio > 2
    assert rows["batch-update"].ratio > 2
    assert rows["percpu-hash-read"].ratio < 0.5
    assert os.sched_getaffinity(0) == affinity
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(bpf.pin.BPFFS.glob("hookline-bench-*")) <= pins_before


def test_without_bpftool_a_row_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    measured = bench.run(["object-load"], Settings(1))
    assert measured.rows == []
    assert "bpftool is not installed" in measured.left_out["object-load"]


def test_bpftool_that_fails_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pins_before: set[Path]
) -> None:
    """A bpftool that may not load."""
    failing = tmp_path / "bpftool"
    failing.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set=-all --inh-caps=-all {shutil.which("bpftool")} "$@"\n'
    )
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HooklineError, match="bpftool failed"):
        bench.run(["object-load"], Settings(1))
    assert set(bpf.pin.BPFFS.glob("hookline-bench-*")) <= pins_before


def test_rows_without_a_lab_make_none(tmp_path: Path) -> None:
    """In a mount namespace where nothing can be written to /run, where labs are."""
    command = [sys.executable, "-m", "hookline", "bench", "batch-update", "--rounds", "1", "--json"]
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind -o ro "$0" /run && exec "$@"', str(tmp_path)]
    done = subprocess.run([*hidden, *command], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["rows"][0]["id"] == "batch-update", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_firewall(pins_before: set[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets really pass through the node, under rules of every kind that are there; goals are a quiet machine's."""
    need("kernel", "" if shutil.which("ip") else "the program ip")
    for name, less in (
        ("PACKETS", 2000),
        ("WARM", 500),
        ("MANY_FLOWS", 500),
        ("TABLE_FLOWS", 100),
        ("REPEAT", 1000),
        ("BULK_S", 0.05),
        ("NUMBERS", (100,)),
        ("LINEAR", ()),
    ):
        monkeypatch.setattr(_firewall, name, less)
    wanted = ["firewall-forward-100", "firewall-bulk", "firewall-hot"]
    wanted += ["nftables-forward-set-1000"] if shutil.which("nft") else []
    namespaces = set(Path("/run/netns").glob("hl-bench-*"))
    measured = bench.run(wanted, Settings(1, bench.choose_cpu()))
    rows = {row.id: row for row in measured.rows}
    assert set(rows) == set(wanted)
    assert all(row.value > 0 and row.ratio > 0 for row in rows.values())
    assert set(Path("/run/netns").glob("hl-bench-*")) == namespaces
    assert set(bpf.pin.BPFFS.glob("hookline-bench-*")) <= pins_before
