"""How a command ends when something is wrong: three lines on standard error, and an exit status.

    error: what failed
    why:   the cause
    do:    the remedy

With ``--json`` it is one document, ``{error, why, remedy}``. A traceback is shown only to those who ask for it with
``HOOKLINE_TRACEBACK=1``. Exit statuses: 1 failure, 2 usage, 3 a missing capability or kernel feature, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import ClassVar

from hookline.errors import HooklineError

TRACEBACK = "HOOKLINE_TRACEBACK"
FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


class UsageError(HooklineError):
    """The command line asks for something that it cannot mean."""

    exit_status: ClassVar[int] = USAGE


def show(error: BaseException, arguments: Sequence[str], *, as_json: bool) -> int:
    """Prints an error, and returns the exit status that goes with it.

    Args:
        error: What ended the command.
        arguments: The command's own, to say how it can be run with the rights that it needs.
        as_json: Print one JSON document.
    """
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    shown = error if isinstance(error, HooklineError) else _unexpected(error, arguments)
    document = shown.as_dict()
    if _wants_privilege(shown):
        document["remedy"] = privileged_command(arguments)
    if as_json:
        import json

        _print(json.dumps(document))
        return shown.exit_status
    _print(_labelled("error: ", document["error"]))
    if document["why"]:
        _print(_labelled("why:   ", document["why"]))
    if document["remedy"]:
        _print(_labelled("do:    ", document["remedy"]))
    return shown.exit_status


def privileged_command(arguments: Sequence[str]) -> str:
    """The same command, to be run as root."""
    return f"sudo {_command_line(arguments)}"


def _wants_privilege(error: HooklineError) -> bool:
    """Whether it was refused to an ordinary user for want of a capability, and not for want of a kernel feature."""
    return error.exit_status == 3 and os.geteuid() != 0 and not hasattr(error, "feature")


def _unexpected(error: BaseException, arguments: Sequence[str]) -> HooklineError:
    name = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        what, why = f"{error.strerror}{place}", f"an unexpected {name}"
    else:
        what, why = f"an unexpected {name}: {error}", "this is a fault of Hookline itself"
    return HooklineError(
        what, why=why, remedy=f"{TRACEBACK}=1 {_command_line(arguments)} shows where; please report it"
    )


def _command_line(arguments: Sequence[str]) -> str:
    import shlex

    program = os.path.abspath(sys.argv[0])
    # Root's path need not be this user's, so the program is named in full.
    started = [sys.executable, "-m", "hookline"] if program.endswith("__main__.py") else [program]
    return shlex.join([*started, *arguments])


def _labelled(label: str, text: str) -> str:
    return label + text.replace("\n", "\n" + " " * len(label))


def _print(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)
