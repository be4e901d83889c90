"""How a command ends when something is wrong: three lines on standard error, and an exit status.

    error: what failed
    why:   the cause
    do:    the remedy

With ``--json`` it is one document, ``{error, why, remedy}``. A traceback is shown only to those who ask for it with
``HOOKLINE_TRACEBACK=1``. Exit statuses: 1 failure, 2 usage, 3 a missing capability or kernel feature, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import ClassVar, TypeGuard

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
    document = {name: _readable(text) for name, text in explained(shown, arguments).items()}
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


def explained(error: HooklineError, arguments: Sequence[str]) -> dict[str, str]:
    """An error as ``{error, why, remedy}``; to whom only the rights are missing, the remedy is the command that has them."""
    document = error.as_dict()
    if _wants_privilege(error):
        document["remedy"] = privileged_command(arguments)
    return document


def usage(error: Exception) -> UsageError:
    """What the library that reads command lines says of a wrong one, as an error of ours."""
    what = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    if context is None:
        return UsageError(what, why="the command line cannot mean that", remedy="hookline --help")
    form = " ".join(context.get_usage().removeprefix("Usage:").split())
    return UsageError(what, why=f"the form is: {form}", remedy=f"{context.command_path} --help")


def is_lost_output(error: Exception | None) -> TypeGuard[OSError]:
    """Whether it is the failure of a write; those to files that a command writes itself are errors of its own."""
    lost = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return isinstance(error, OSError) and error.filename is None and error.errno in lost


def output_lost(error: OSError) -> HooklineError:
    """Standard output took not all that the command had to say."""
    return HooklineError(
        "the output could not be written",
        why=str(error.strerror),
        remedy="write it where there is room; what the command has changed stays changed",
    )


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


def _readable(text: str) -> str:
    """Bytes that are no UTF-8 as a shell writes them, whether they stand there themselves or in a quotation: ``\\xff``."""
    import re

    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", text)


def _labelled(label: str, text: str) -> str:
    return label + text.replace("\n", "\n" + " " * len(label))


def _print(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)
