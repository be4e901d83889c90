"""hookline doctor on this machine, without its mounts, as nobody, and beside others' programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf, cli
from hookline.bpf import features
from hookline.control.doctor import examine
from hookline.datapath import hooks
from tests.kernel.bpf.conftest import Wire

HOOKLINE = [sys.executable, "-m", "hookline"]


def run(*words: str, before: str = "", status: int = 0) -> Any:
    """A doctor's report in JSON, from a process that first runs a shell's words in a mount namespace of its own."""
    command = [*HOOKLINE, "doctor", "--json", *words]
    if before:
        command = ["unshare", "-m", "sh", "-ec", f'{before}; exec "$@"', "sh", *command]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == status, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


def check(report: Any, name: str) -> Any:
    return next(one for one in report["checks"] if one["name"] == name)


def test_everything_needed_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.run(["doctor"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert "everything needed is there" in text
    assert os.uname().release in text
    assert "MISSING" not in text
    for function in hooks.FUNCTIONS:
        assert re.search(rf"^{function.name} ", text, re.MULTILINE)


def test_the_machine_is_described() -> None:
    report = run()
    assert report["healthy"] is True
    assert report["fixed"] == []
    assert all(one["status"] in ("ok", "note", "missing", "unknown") for one in report["checks"])
    assert [one["name"] for one in report["checks"] if one["status"] == "unknown"] == []
    assert check(report, "lockdown")["value"] in ("none", "integrity")
    assert "capability" in check(report, "security modules")["value"]
    assert re.match(r"\d+\.\d+", check(report, "libbpf")["value"])
    assert f"{os.cpu_count()} online, {bpf.possible_cpus()} possible" in check(report, "CPUs")["value"]
    mounts = Path("/proc/self/mounts").read_text()
    assert f" {check(report, 'cgroup2')['value'].split(', ')[0]} cgroup2 " in mounts
    current = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    assert check(report, "clock")["value"] == current
    assert all(one["remedy"] for one in report["checks"] if one["status"] in ("note", "missing"))


def test_the_hook_of_each_function_is_the_first_that_is_there() -> None:
    report = examine()
    chosen = {one.name: one for one in report.functions}
    assert set(chosen) == {function.name for function in hooks.FUNCTIONS}
    tracer = next((name for name in ("fentry", "kprobe", "tracepoint") if features.attach(name)), "")
    assert chosen["tracer"].hook == tracer
    assert chosen["firewall"].hook == ("tcx" if features.attach("tcx") else "clsact")
    shapers = [("EDT + fq", "tcx", "fq"), ("EDT + fq by clsact", "clsact", "fq"), ("HTB", "xdp", "htb")]
    assert chosen["shaper"].hook == next(
        (name for name, hook, kind in shapers if features.attach(hook) and features.qdisc(kind)), "police"
    )
    for one in report.functions:
        assert one.usable
        assert one.why
        for passed in one.passed_over:
            assert passed["why"]


def test_native_xdp_where_the_driver_has_it(wire: Wire) -> None:
    balancer = hooks.FUNCTIONS[0]
    features.forget()
    choice = hooks.choose(balancer, interface=wire.near)
    assert choice.hook == f"native XDP on {wire.near}"
    assert choice.certain == (features.native_xdp(wire.near).answer is features.Answer.YES)
    if choice.certain:
        choice = hooks.choose(balancer, interface="lo")
        assert choice.hook == "generic XDP on lo"
        assert [hook for hook, _ in choice.passed_over] == ["native XDP on lo"]
    features.forget()


UNMOUNT = "umount /sys/fs/bpf; while umount /sys/kernel/tracing 2>/dev/null; do :; done"


def test_missing_mounts_are_found_and_mended() -> None:
    report = run(before=UNMOUNT, status=3)
    assert report["healthy"] is False
    for name in ("bpffs", "tracefs"):
        assert check(report, name)["status"] == "missing"
        assert "hookline doctor --fix" in check(report, name)["remedy"]
    report = run("--fix", before=UNMOUNT)
    assert report["healthy"] is True
    assert report["fixed"] == ["bpffs mounted at /sys/fs/bpf", "tracefs mounted at /sys/kernel/tracing"]
    assert check(report, "bpffs")["status"] == "ok"
    # A second time there is nothing to do.
    assert run("--fix")["fixed"] == []


def test_as_nobody_it_says_what_it_could_not_tell() -> None:
    code = (
        # The checkout may be closed to others: everything is imported before the rights are dropped.
        "import os, sys\n"
        "from hookline import bpf, cli\n"
        "import hookline.cli.doctor, hookline.control.doctor, hookline.cli._output, hookline.cli._app\n"
        "from hookline import net; net.default_interface; import pyroute2, numpy.ctypeslib, typer.completion\n"
        "from hookline.control.doctor import examine; examine()\n"
        "from hookline.bpf import features; features.forget()\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3, ended.stderr
    report = json.loads(ended.stdout)
    assert report["healthy"] is False
    assert report["foreign"] is None
    assert check(report, "capabilities")["value"] == "none"
    for one in report["functions"]:
        assert one["lacking"] == one["capabilities"]
        assert one["usable"] is False
    firewall = next(one for one in report["functions"] if one["name"] == "firewall")
    assert firewall["certain"] is False
    assert "CAP_NET_ADMIN" in firewall["why"]
    ended = subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3
    assert "could not tell" in ended.stdout
    assert "sudo" in ended.stdout


def test_others_programs_are_named(loaded: bpf.Object, wire: Wire, pins: Path, unique_name: Any) -> None:
    with loaded.programs["xdp_pass"].attach_xdp(wire.near) as link:
        found = [one for one in examine().foreign or () if one.link_id == link.id]
        assert len(found) == 1
        assert found[0].name.startswith("xdp_pass")
        assert "xdp" in found[0].place
        assert wire.near in found[0].place
        assert any(f"({os.getpid()})" in process for process in found[0].processes)
        link.pin(pins / "theirs")
        (again,) = [one for one in examine().foreign or () if one.link_id == link.id]
        assert again.pins == (str(pins / "theirs"),)
        link.unpin()
    # What Hookline has pinned is its own.
    ours = bpf.pin.BPFFS / "hookline" / unique_name()
    with loaded.programs["xdp_pass"].attach_xdp(wire.near) as link:
        try:
            link.pin(ours)
            assert [one for one in examine().foreign or () if one.link_id == link.id] == []
        finally:
            link.detach()
            bpf.pin.remove(ours)


def test_the_kernels_without_rights_are_told_the_capability() -> None:
    ended = subprocess.run(
        ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all", *HOOKLINE, "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    report = json.loads(ended.stdout)
    lacking = {one["name"]: one["lacking"] for one in report["functions"]}
    assert lacking["load balancer"] == ["CAP_NET_ADMIN"]
    assert lacking["tracer"] == []
