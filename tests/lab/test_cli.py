"""``hookline lab``: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hookline import lab
from hookline.cli.lab import app
from hookline.lab import Lab, LabError, LabSummary, ProbeFailed
from tests.lab.conftest import EXAMPLE, traces

RUN = "from hookline.cli.lab import app; app()"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def read(*arguments: str) -> Any:
    """The JSON document of a command that succeeds."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def execute(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``hookline lab exec``, which becomes the command and so needs a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", RUN, "exec", *arguments], capture_output=True, text=True, check=False
    )


def test_from_up_to_down(lab_name: str) -> None:
    result = call("up", "-f", str(EXAMPLE), "--name", lab_name)
    assert result.exit_code == 0
    assert result.stdout == f"lab {lab_name} is up: 2 nodes, 6 pods, 2 external hosts\n"
    assert result.stderr == "", "progress is for terminals"
    listed = next(line for line in call("list").stdout.splitlines() if line.startswith(lab_name))
    assert listed.split() == [lab_name, "up", "node-1", "node-2", "6", "2"]
    members = call("list", "--name", lab_name).stdout
    assert "default/orders-1" in members
    assert "8080/tcp 5353/udp" in members
    answered = call("probe", "external/client", "orders-1:8080", "--name", lab_name, "--family", "6").stdout
    assert answered.startswith("default/orders-1 answered external/client at [fd00:10:244:1::")
    with pytest.raises(LabError, match="up already"):
        raise call("up", "-f", str(EXAMPLE), "--name", lab_name).exception or AssertionError
    assert call("down", "--name", lab_name).stdout == f"lab {lab_name} is gone\n"
    assert traces(lab_name) == []
    gone = call("down", "--name", lab_name)
    assert gone.exit_code == 1
    assert isinstance(gone.exception, LabError)
    assert gone.exception.exit_status == 1


def test_as_json(lab_name: str) -> None:
    made = read("up", "-f", str(EXAMPLE), "--name", lab_name)
    assert made["name"] == lab_name
    assert made["notices"] == []
    assert made["members"] == read("list", "--name", lab_name)["members"]
    (first,) = [one for one in made["members"] if one["endpoint"] == "default/orders-1"]
    assert first["addresses"][0] == "10.244.1.10"
    assert first["ports"][0] == {"name": "http", "port": 8080, "protocol": "tcp"}
    (summary,) = [one for one in read("list")["labs"] if one["name"] == lab_name]
    assert summary == {
        "name": lab_name,
        "status": "up",
        "server": True,
        "nodes": ["node-1", "node-2"],
        "pods": 6,
        "externals": 2,
    }
    answer = read("probe", "external/client", "orders-3:5353/udp", "--name", lab_name)
    assert (answer["answered_by"], answer["protocol"]) == ("default/orders-3", "udp")
    refused = call("probe", "orders-1", "orders-2:9", "--name", lab_name, "--json")
    assert refused.exit_code == 1
    assert isinstance(refused.exception, ProbeFailed)
    assert read("down", "--name", lab_name) == {"removed": [lab_name]}


def test_exec(cluster: Lab) -> None:
    done = execute("orders-1", "--name", cluster.name, "--", "sh", "-c", "readlink /proc/self/ns/net; exit 7")
    assert done.returncode == 7
    assert done.stdout == f"net:[{cluster.member('orders-1').netns.stat().st_ino}]\n"
    assert done.stderr == ""
    absent = execute("orders-1", "--name", cluster.name, "--", "no-such-command")
    assert (absent.returncode, absent.stderr) == (
        127,
        "hookline: cannot run no-such-command: No such file or directory\n",
    )
    assert execute("orders-1", "--name", cluster.name, "--", "/etc").returncode == 126
    written = call(
        "exec", "external/client", "--name", cluster.name, "--json", "--", "sh", "-c", "echo x; exit 3"
    )
    assert written.exit_code == 3
    assert json.loads(written.stdout) == {"exit_status": 3, "stdout": "x\n", "stderr": ""}
    nobody = call("exec", "nobody", "--name", cluster.name, "--", "true")
    assert isinstance(nobody.exception, LabError)


def test_down_all_means_every_lab(
    lab_name: str, other_lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every lab of this test, here: others may be using the machine."""
    for name in (lab_name, other_lab_name):
        read("up", "-f", str(EXAMPLE), "--name", name)
    mine = [LabSummary(name, "up", True) for name in (lab_name, other_lab_name)]
    monkeypatch.setattr(lab, "list_labs", lambda: mine)
    assert call("down", "--all").stdout == f"lab {lab_name} is gone\nlab {other_lab_name} is gone\n"
    assert traces(lab_name) == traces(other_lab_name) == []
    monkeypatch.setattr(lab, "list_labs", list)
    assert call("down", "--all").stdout == "there is no lab\n"
    assert call("list").stdout.startswith("there is no lab")


@pytest.mark.parametrize("command", ["up", "down", "list", "exec", "probe"])
def test_help_has_examples(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"hookline lab {command}" in result.stdout
    assert "Examples:" in result.stdout


def test_usage_errors() -> None:
    assert call("up").exit_code == 2
    assert call("probe", "a", "b:1", "--family", "5").exit_code == 2
    assert call("exec", "a").exit_code == 2


ORDINARY_USER = """
import os, sys
import hookline.lab._lab as lab
from hookline.errors import HooklineError

os.setuid(65534)
for call in (lambda: lab.up([], sys.argv[1]), lambda: lab.down(sys.argv[1])):
    try:
        call()
    except HooklineError as error:
        print(type(error).__name__, error.exit_status, error.remedy)
"""


@pytest.mark.parametrize("there", [False, True])
def test_without_root(lab_name: str, there: bool) -> None:
    if there:
        lab.up([], lab_name)
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY_USER, lab_name], capture_output=True, text=True, check=False
    )
    refused = "LabNotPermitted 3 run as root\n"
    absent = "LabError 1 hookline lab list shows the labs there are; hookline lab up -f FILE makes one\n"
    assert done.stdout == refused + (refused if there else absent), done.stderr
