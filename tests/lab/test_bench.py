"""The bench's own lab: made for the rows that need one, and gone however the run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LABS = Path("/run/hookline/labs")
COMMAND = [sys.executable, "-m", "hookline", "bench", "--rounds"]


def labs() -> set[str]:
    return {path.name for path in LABS.glob("bench-*")}


def left_of(name: str) -> list[str]:
    """What a lab of that name still has on the machine."""
    places = ("/run/hookline/labs", "/run/netns", "/sys/fs/bpf/hookline/lab", "/var/lib/hookline/lab")
    return [str(path) for place in places for path in Path(place).glob(f"*{name}*")]


def test_a_row_of_the_data_path() -> None:
    before = labs()
    done = subprocess.run([*COMMAND, "1", "xdp-pass", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["id"] == "xdp-pass"
    assert row["unit"] == "ns"
    assert row["value"] > 0
    assert labs() <= before


def test_rows_of_requests_and_connections_through_services() -> None:
    """Measured for real, without their goals, which a busy machine misses; what else runs here is not installed everywhere."""
    before = labs()
    wanted = [
        "request-service-p50",
        "request-service-p99-unpinned",
        "request-nftables-p50",
        "connect-1",
        "connect-10000",
    ]
    done = subprocess.run([*COMMAND, "1", *wanted, "--json"], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    rows = {row["id"]: row for row in document["rows"]}
    assert rows.keys() | document["left_out"].keys() == set(wanted)
    assert document["left_out"].keys() <= {"request-nftables-p50"}
    for name, row in rows.items():
        assert row["unit"] == ("us" if name.startswith("request") else "/s")
        assert row["value"] > 0
        assert row["ratio"] > 0
        assert ("not pinned" in row["method"]) == name.endswith("unpinned")
    assert labs() <= before


def test_a_way_that_is_not_installed_is_left_out(tmp_path: Path) -> None:
    """With a PATH that has what a lab needs, and neither nft nor haproxy."""
    for name in ("sh", "ip"):
        found = shutil.which(name)
        assert found
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        [*COMMAND, "1", "request-service-p50", "request-haproxy-p50", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert [row["id"] for row in document["rows"]] == ["request-service-p50"]
    assert document["left_out"] == {"request-haproxy-p50": "not installed (apt-get install nftables haproxy)"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["while the lab is made", "while it measures"])
def test_an_interrupted_run_leaves_no_lab(number: signal.Signals, moment: str) -> None:
    before = labs()
    process = subprocess.Popen(
        [*COMMAND, "10000", "xdp-pass", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: bool(labs() - before))
        (name,) = labs() - before
        if moment == "while it measures":
            wait_for((Path("/sys/fs/bpf/hookline/lab") / name / "node-1" / "programs" / "balance").exists)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (130, "")
    assert left_of(name) == []


def wait_for(met: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)
