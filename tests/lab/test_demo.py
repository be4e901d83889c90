"""The demo: it holds, it fails when the balancer is taken away, and it leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hookline import net


def demo(*arguments: str) -> tuple[int, dict[str, object]]:
    """Runs ``hookline demo --json``."""
    command = [sys.executable, "-m", "hookline", "demo", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def places() -> set[str]:
    """Namespaces, labs and pins of demos."""
    pins = Path("/sys/fs/bpf/hookline/lab")
    labs = Path("/run/hookline/labs")
    return {
        *net.list_names("hl.demo-"),
        *(path.name for folder in (pins, labs) for path in folder.glob("demo-*")),
    }


def test_the_demo_holds_and_leaves_nothing() -> None:
    before = places()
    status, result = demo("--seconds", "6")
    assert status == 0, result
    assert result["ok"] is True
    assert result["broken_surviving"] == 0
    assert result["failed_to_open"] == 0
    assert result["datagrams_unanswered"] == 0
    assert isinstance(result["opened"], int)
    assert result["opened"] > 100
    assert result["opened"] == result["kernel_connections"] == result["server_accepts"]
    assert result["datagrams_sent"] == result["kernel_datagrams"] == result["server_datagrams"]
    assert result["drop_reasons"] == {}
    assert places() <= before


def test_the_demo_fails_without_the_balancer() -> None:
    before = places()
    status, result = demo("--seconds", "9", "--detach-at", "3")
    assert status == 1
    assert result["ok"] is False
    assert isinstance(result["broken_surviving"], int)
    assert result["broken_surviving"] > 0
    assert places() <= before
