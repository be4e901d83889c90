"""The unit that runs the agent under systemd."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

UNIT = Path(__file__).with_name("hookline-agent.service")


def unit_text(arguments: Sequence[str] = ()) -> str:
    """The unit as it is shipped, with this installation's command in it.

    Args:
        arguments: What stands after ``hookline agent``; the shipped ones where there are none.
    """
    started = [shutil.which("hookline") or sys.executable]
    if started == [sys.executable]:
        started += ["-m", "hookline"]
    watched = [
        os.path.abspath(value) for word, value in itertools.pairwise(arguments) if word in {"-f", "--file"}
    ]
    lines = []
    for line in UNIT.read_text().splitlines():
        if line.startswith("ExecStart="):
            shipped = shlex.split(line.removeprefix("ExecStart="))[1:]
            line = "ExecStart=" + shlex.join([*started, *(["agent", *arguments] if arguments else shipped)])
        if line.startswith("RequiresMountsFor=") and arguments:
            line = "RequiresMountsFor=" + " ".join(map(_quoted, watched))
        lines.append(line)
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    """A path as systemd reads it: in quotes where it has a space, and no specifier in it (systemd.syntax(7))."""
    path = path.replace("\\", "\\\\").replace("%", "%%")
    return '"' + path.replace('"', '\\"') + '"' if any(one in path for one in " \t'\"") else path
