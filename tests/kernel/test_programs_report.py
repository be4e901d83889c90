"""``make ebpf-programs``: every program is run, and every verdict of XDP is met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.requirements import missing_program, need

ROOT = Path(__file__).resolve().parents[2]


def test_every_program_is_measured_and_every_verdict_met() -> None:
    need("kernel", missing_program("ip"))
    command = [sys.executable, "-m", "tools.programs_report", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = {one["program"]: one for one in json.loads(done.stdout)}
    assert set(reports) >= {"balance", "resolve", "reply", "count_exceptions"}
    assert {run["verdict"] for run in reports["balance"]["runs"]} == {
        "ABORTED",
        "DROP",
        "PASS",
        "TX",
        "REDIRECT",
    }
    for name in ("from_pod", "to_pod", "from_wire", "to_wire"):
        found = {run["sample"]: run["verdict"] for run in reports[name]["runs"]}
        assert found == {
            "a new connection": "UNSPEC",
            "an established one": "UNSPEC",
            "refused": "SHOT",
            "an echo": "SHOT",
        }
    for one in reports.values():
        assert one["instructions"] > 0
        assert one["verified_instructions"] > 0
        assert all(run["ns"] > 0 for run in one["runs"])
    # The kernel has no trial run of programs of sockets' addresses (BPF_PROG_TEST_RUN): all others are run.
    without = {
        f"{hook}{version}" for hook in ("connect", "sendmsg", "recvmsg", "getpeername") for version in (4, 6)
    }
    assert {name for name, one in reports.items() if not one["runs"]} == without
    assert {name for name, one in reports.items() if not one["empty_ns"]} == without
