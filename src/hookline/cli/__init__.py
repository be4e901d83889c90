"""The command line.

`main` is the console script. It calls the commands, and is the one place that turns errors into words and exit statuses; the
commands have no logic of their own beyond reading arguments and printing.

It has to start fast. `COMMANDS` says what there is, so that ``hookline --help`` loads nothing and a command only its own
module. typer, which reads arguments, takes several times a Python start; NumPy, pyroute2 and all that knows kernels are
imported inside the commands that need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from hookline.cli import _errors


class Command(NamedTuple):
    """Where a command is, and what it does in a few words."""

    module: str
    summary: str


COMMANDS = {
    "apply": Command("objects", "Add and change objects, and bring the kernel to it"),
    "get": Command("objects", "List objects with their state and counters"),
    "describe": Command("objects", "Show everything about one object"),
    "delete": Command("objects", "Remove objects"),
    "explain": Command("explain", "Which backend a connection gets, why, and what would stop it"),
    "policy": Command("policy", "Network policies: try tables of who may reach whom"),
    "verdicts": Command("verdicts", "What a node's firewall lets through and what it does not"),
    "rollback": Command("objects", "Go back to what was wanted before the last changes"),
    "agent": Command("agent", "Keep a node: watch files, repair drift, answer other commands"),
    "state": Command("state", "A node's wanted state: check its file, repair it"),
    "lab": Command("lab", "A small cluster of network namespaces on this machine"),
    "programs": Command("programs", "The eBPF programs of this machine: list, inspect, dump, load"),
    "maps": Command("maps", "The eBPF maps of this machine: list, dump, watch"),
    "doctor": Command("doctor", "What this kernel and user can do, what is missing, how to mend it"),
    "verify": Command("verify", "What the kernel's verifier says of an object's programs"),
    "demo": Command("demo", "Balance real connections while things break"),
    "bench": Command("bench", "Measure every claim on this machine"),
    "version": Command("version", "Show the versions of Hookline, Python and the kernel"),
}

HELP = """\
Usage: hookline [OPTIONS] COMMAND [ARGS]...

  An eBPF data plane for this machine: services balanced in the kernel.

Commands:
{commands}

Options:
  --version             Show the version and exit.
  --install-completion  Install completion for the current shell.
  --show-completion     Show completion for the current shell.
  -h, --help            Show this message and exit.

Examples:
  hookline lab up -f examples/lab/cluster.yaml
  hookline apply -f examples/services/ --node lab/lab
  hookline get backends --node lab/lab

hookline COMMAND --help has the options and examples of a command."""


def main() -> NoReturn:
    """The console script ``hookline``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line, and returns its exit status. Errors are printed, never raised."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without UTF-8 shows ? and does not fail
    status, failed = 0, None
    try:
        status = _invoke(list(arguments))
    except KeyboardInterrupt:
        return _errors.INTERRUPTED
    except Exception as error:
        failed = error
    failed = _unwritten(failed)
    if failed is None:
        return status
    if isinstance(failed, BrokenPipeError):
        return _errors.BROKEN_PIPE  # whoever read it has gone: nothing more can be said
    return _errors.show(failed, arguments, as_json=_wants_json(arguments))


def _unwritten(failed: Exception | None) -> Exception | None:
    """Writes what is buffered. What ended the command: an error of its own, or that its output could not be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        failed = failed or error
    return _errors.output_lost(failed) if _errors.is_lost_output(failed) else failed


def _drop_output() -> None:
    """Has what is buffered go nowhere: the interpreter would try again to write it when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """What ``hookline --help`` prints."""
    width = max(map(len, COMMANDS))
    return HELP.format(
        commands="\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    )


def _invoke(arguments: list[str]) -> int:
    completing = "_HOOKLINE_COMPLETE" in os.environ
    if not completing and arguments in ([], ["-h"], ["--help"]):
        print(help_text())
        return 0 if arguments else _errors.USAGE
    import typer

    from hookline.cli import _app

    command = _app.command()
    if completing:
        command.main(arguments, prog_name="hookline")
    try:
        with command.make_context("hookline", arguments.copy()) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        return _errors.INTERRUPTED
    except typer.TyperException as error:
        return _show_usage(error, arguments)
    return 0


def _show_usage(error: Exception, arguments: Sequence[str]) -> int:
    """A wrong command line; a group without a command shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError" and hasattr(error, "show"):
        error.show()
        return _errors.USAGE
    return _errors.show(_errors.usage(error), arguments, as_json=_wants_json(arguments))


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors are to be JSON, also where the command line could not be read."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    following = zip(own, own[1:], strict=False)  # noqa: RUF007  (itertools is one more import)
    return "--json" in own or any(
        option in ("-o", "--output") and value == "json" for option, value in following
    )
