"""The command line without a node: what it imports, how it speaks, how it ends."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hookline
from hookline import cli
from hookline.bpf import FeatureMissing, NotPermitted
from hookline.cli import COMMANDS, _errors, _output
from hookline.errors import HooklineError

HEAVY = ("pydantic", "numpy", "pyroute2", "yaml", "rich", "elftools", "hookline.control", "hookline.model")


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "hookline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def imported(statement: str) -> set[str]:
    """The modules that a statement brings in."""
    code = f"import sys\n{statement}\nprint(*sys.modules, file=sys.__stdout__)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1].split())


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Has every command end with this."""

    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_invoke", fail)


# -- starting


@pytest.mark.parametrize(
    "module",
    ["hookline.cli", "hookline.cli._app", *sorted({f"hookline.cli.{c.module}" for c in COMMANDS.values()})],
)
def test_importing_the_command_line_brings_nothing_heavy(module: str) -> None:
    found = imported(f"import {module}")
    assert not found & set(HEAVY)


def test_help_does_not_even_load_typer() -> None:
    found = imported("from hookline import cli; cli.run(['--help'])")
    assert not found & {*HEAVY, "typer", "inspect", "subprocess", "asyncio"}


def test_help_of_a_command_brings_nothing_heavy() -> None:
    found = imported("from hookline import cli; cli.run(['apply', '--help'])")
    assert "typer" in found
    assert not found & {*HEAVY} - {"pydantic"}, "typer itself takes pydantic to read arguments"


def test_hookline_is_imported_lazily() -> None:
    assert not imported("import hookline; hookline.HooklineError; hookline.__version__") & set(HEAVY)
    assert "hookline.control" in imported("from hookline import Node")


def test_names_of_the_package() -> None:
    from hookline.api import Node, lab_up

    assert hookline.Node is Node
    assert hookline.lab_up is lab_up
    assert set(hookline.__all__) <= set(dir(hookline))
    with pytest.raises(AttributeError, match="Nodes"):
        _ = hookline.Nodes


# -- help


def test_help_lists_every_command() -> None:
    shown = start("--help")
    assert shown.returncode == 0
    assert shown.stdout == cli.help_text() + "\n"
    assert all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_no_command_is_a_usage_error_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: hookline {name} ")
    if not hasattr(importlib.import_module(f"hookline.cli.{COMMANDS[name].module}"), "app"):
        assert "Examples:" in shown
        assert f"hookline {name}" in shown.partition("Examples:")[2]
        assert "--json" in shown


@pytest.mark.parametrize(
    ("group", "name"),
    [
        *(("lab", name) for name in ("up", "down", "list", "exec", "probe")),
        *(("programs", name) for name in ("list", "inspect", "dump", "log", "stats", "load", "unload")),
        *(("maps", name) for name in ("list", "dump", "watch", "update", "delete")),
    ],
)
def test_groups_have_their_commands(group: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([group, name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: hookline {group} {name} ")
    assert f"hookline {group} {name}" in shown.partition("Examples:")[2]
    assert "--json" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name: str) -> None:
    module = importlib.import_module(f"hookline.cli.{COMMANDS[name].module}")
    assert hasattr(module, "app") or callable(getattr(module, name))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hookline d", {"describe", "delete", "demo", "doctor"}),
        ("hookline get virt", {"virtualservices"}),
        ("hookline get ba", {"backends"}),
        ("hookline apply --node h", {"host"}),
        ("hookline lab pr", {"probe"}),
    ],
)
def test_completion(words: str, expected: set[str]) -> None:
    asked = {
        "_HOOKLINE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PATH": "/usr/bin:/bin",
    }
    assert set(start(env=asked).stdout.split()) == expected


# -- versions


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hookline"] == hookline.__version__
    for arguments in (["version"], ["--version"]):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out.startswith(f"hookline {hookline.__version__} (Python ")


# -- usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["appply"], "No such command"),
        (["apply"], "Missing option '--file'"),
        (["apply", "-f", "x", "--nodes", "host"], "No such option"),
        (["get"], "Missing argument 'KIND'"),
        (["get", "vs", "-o", "xml"], "xml"),
        (["lab", "bogus"], "No such command"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    what, why, remedy = shown.err.splitlines()
    assert what.startswith("error: ")
    assert said in what
    assert why.startswith("why:   the form is: hookline ")
    assert remedy.startswith("do:    hookline ")
    assert remedy.endswith(" --help")
    assert shown.out == ""


def test_usage_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["apply", "--json"]) == 2
    assert json.loads(capsys.readouterr().err) == {
        "error": "Missing option '--file' / '-f'.",
        "why": "the form is: hookline apply [OPTIONS]",
        "remedy": "hookline apply --help",
    }


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["programs"]) == 2
    assert capsys.readouterr().err.startswith("Usage: hookline programs ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["programs", "inspect", "99999999999999999999"],
        ["programs", "inspect", "4294967296"],
        ["programs", "dump", "0"],
        ["maps", "dump", "99999999999999999999"],
        ["maps", "watch", "4294967296"],
        ["programs", "stats", "--seconds", "inf"],
        ["programs", "stats", "--seconds", "nan"],
        ["programs", "log", "--seconds", "1e300"],
        ["maps", "watch", "1", "--interval", "inf"],
        ["maps", "watch", "1", "--seconds", "nan"],
        ["agent", "--metrics", "foo"],
        ["agent", "--metrics", "127.0.0.1:99999"],
        ["agent", "--metrics", "::1:9469"],
        ["agent", "--metrics", "[127.0.0.1]:9469"],
        ["verify", ""],
        ["programs", "load", ""],
        ["programs", "load", "x.bpf.o", "--pin", ""],
        *(["programs", "load", "x.bpf.o", f"--name={name}"] for name in ("", ".", "-x", "a/b")),
    ],
)
def test_what_the_command_line_alone_shows_to_be_nonsense(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err
    assert [line.split(":")[0] for line in said.splitlines()] == ["error", "why", "do"], said


def test_bytes_that_are_no_text_are_shown_as_a_shell_shows_them() -> None:
    for arguments in ([b"maps", b"a\xff"], [b"programs", b"load", b"x.bpf.o", b"--name=a\xff"]):
        shown = subprocess.run(
            [sys.executable, "-m", "hookline", *arguments], capture_output=True, text=True, check=False
        )
        assert "a\\xff" in shown.stderr
        assert "udcff" not in shown.stderr


def test_json_of_a_command_in_a_lab_is_its_own() -> None:
    assert not cli._wants_json(["lab", "exec", "a", "--", "ip", "--json", "address"])
    assert cli._wants_json(["lab", "exec", "a", "--json", "--", "ip"])
    assert cli._wants_json(["get", "all", "-o", "json"])
    assert not cli._wants_json(["get", "all", "-o", "yaml"])


# -- errors


def test_an_error_is_what_why_and_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, HooklineError("it failed", why="two\nlines", remedy="mend it"))
    assert cli.run(["get", "all"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: it failed\nwhy:   two\n       lines\ndo:    mend it\n"
    assert shown.out == ""


def test_an_error_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, HooklineError("it failed", why="because"))
    assert cli.run(["get", "all", "--json"]) == 1
    assert json.loads(capsys.readouterr().err) == {"error": "it failed", "why": "because", "remedy": ""}


def test_an_unexpected_error_shows_no_traceback_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, TypeError("no such thing"))
    monkeypatch.delenv("HOOKLINE_TRACEBACK", raising=False)
    assert cli.run(["get", "all"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: an unexpected TypeError: no such thing\n")
    assert "HOOKLINE_TRACEBACK=1" in said
    assert "Traceback" not in said
    monkeypatch.setenv("HOOKLINE_TRACEBACK", "1")
    assert cli.run(["get", "all"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_of_the_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, OSError(28, "No space left on device", "/var/x"))
    assert cli.run(["get", "all"]) == 1
    assert capsys.readouterr().err.startswith("error: No space left on device: /var/x\n")


def test_an_ordinary_user_is_told_the_exact_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/hookline"])
    failing(monkeypatch, NotPermitted("cannot load", capability="CAP_BPF", why="it lacks CAP_BPF"))
    assert cli.run(["apply", "-f", "my file.yaml"]) == 3
    assert "do:    sudo /opt/venv/bin/hookline apply -f 'my file.yaml'\n" in capsys.readouterr().err


def test_sudo_does_not_help_where_the_kernel_lacks_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    failing(monkeypatch, FeatureMissing("tcx", minimum_kernel="6.6"))
    assert cli.run(["apply", "-f", "x"]) == 3
    assert "sudo" not in capsys.readouterr().err


def test_interrupted_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.run(["get", "all"]) == 130
    assert capsys.readouterr() == ("", "")


def test_nobody_reads_the_output() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hookline", "apply", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert said == b""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_output_cannot_be_written(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hookline", "version"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: the output could not be written",
        "why:   No space left on device",
        "do:    write it where there is room; what the command has changed stays changed",
    ]


def test_without_locale_terminal_and_streams() -> None:
    for locale in ({}, {"LC_ALL": "POSIX"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        shown = start("get", "--help", env={"PATH": "/usr/bin", **locale}, stdin=subprocess.DEVNULL)
        assert (shown.returncode, shown.stderr) == (0, "")
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -m hookline version >&- 2>&- <&-', sys.executable], check=False
    )
    assert closed.returncode == 0


# -- tables


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Prints a table and returns it."""

    def shown() -> str:
        _output.print_table(("NAME", "COUNT", "SHARE"), [("a", 5, 0.25), ("longer", 1234, 1.0), ("", 0, 0.0)])
        return capsys.readouterr().out

    return shown


def test_a_table_is_plain_where_there_is_no_terminal(table: Callable[[], str]) -> None:
    assert table() == (
        "NAME    COUNT   SHARE\na           5   25.0%\nlonger   1234  100.0%\n-           0    0.0%\n"
    )


def test_a_table_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for variables, coloured in (
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
    ):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        _output.print_table(("NAME",), [("[red]a[/red]",)])
        shown = terminal.getvalue()
        assert "[red]a[/red]" in shown, "cells are text, never markup"
        assert ("─" in shown) == coloured
        assert "\x1b[3" not in shown, "no colours are needed"
        assert ("\x1b[1m" in shown) == (variables == {"NO_COLOR": ""})


def test_a_table_wider_than_the_terminal_has_no_rule_to_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for columns, drawn in ((40, False), (80, True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        _output.print_table(("NAME", "PLACE"), [("a" * 30, "b" * 30)])
        assert ("─" in terminal.getvalue()) == drawn
        assert "a" * 30 in terminal.getvalue()


def test_counts_and_shares() -> None:
    assert [_output.count(number, "backend") for number in (0, 1, 2)] == [
        "0 backends",
        "1 backend",
        "2 backends",
    ]
    assert _output.share(0.2) == "20.0%"


def test_exit_statuses_are_the_documented_ones() -> None:
    assert (_errors.FAILURE, _errors.USAGE, _errors.INTERRUPTED, _errors.BROKEN_PIPE) == (1, 2, 130, 141)
    assert _errors.UsageError("x").exit_status == 2
