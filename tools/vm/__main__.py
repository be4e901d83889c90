"""Runs a command of this checkout on Debian's kernels, in virtual machines.

    .venv/bin/python -m tools.vm .venv/bin/python -m pytest tests/kernel      on each kernel in turn
    .venv/bin/python -m tools.vm --kernel 6.1 bash -c 'uname -r; ip link'
    .venv/bin/python -m tools.vm --together …                                  on all at the same time

The exit status is the command's, the first that is not 0; 125 where a machine itself failed. What each kernel is and where
it is kept: kernels.py. What the machine is: machine.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from tools.vm import kernels
from tools.vm.kernels import VmError
from tools.vm.machine import EMULATION, RESULTS, Machine, Outcome, Stream

MACHINE_FAILED = 125


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.vm", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--kernel", action="append", choices=kernels.SUITES, help="one or more; all by default"
    )
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="S", help="for the command, on each kernel"
    )
    parser.add_argument("--accelerator", default=EMULATION, help="kvm where that works")
    parser.add_argument(
        "--together", action="store_true", help="all at the same time; each line with its kernel before it"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help=f"what the command leaves in {RESULTS} is put there, in a folder for each kernel",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    arguments.command = arguments.command[arguments.command[:1] == ["--"] :]
    if not arguments.command:
        parser.error("no command")
    names = arguments.kernel or list(kernels.SUITES)
    if arguments.together and len(names) > 1:
        with ThreadPoolExecutor(len(names)) as pool:
            told = list(pool.map(lambda name: _run_beside(name, arguments), names))
    else:
        told = [_run(name, arguments, sys.stdout, sys.stderr) for name in names]
    for _, text in told:
        print(f"vm: {text}")
    return next((status for status, _ in told if status), 0)


def _run(name: str, arguments: argparse.Namespace, stdout: Stream, stderr: Stream) -> tuple[int, str]:
    """The command on one kernel: its exit status, and what to say of it in the end."""
    begun = time.monotonic()
    try:
        kernel = kernels.get(name)
        print(f"vm: Linux {kernel.release}", file=stdout, flush=True)
        machine = Machine(kernel, arguments.cpus, arguments.memory, arguments.accelerator)
        outcome = machine.run(
            arguments.command,
            folder=Path.cwd(),
            timeout_s=arguments.timeout,
            stdout=stdout,
            stderr=stderr,
            results=arguments.results / name if arguments.results else None,
        )
        return outcome.status, _told(kernel.release, outcome)
    except VmError as error:
        print(f"vm: {name}: {error}", file=stderr, flush=True)
        return MACHINE_FAILED, f"Linux {name}: no answer, {time.monotonic() - begun:.1f} s"


def _run_beside(name: str, arguments: argparse.Namespace) -> tuple[int, str]:
    with _Prefixed(name) as stdout, _Prefixed(name) as stderr:
        return _run(name, arguments, stdout, stderr)


class _Prefixed:
    """Writes whole lines to standard output, the kernel's name before each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rest:
            self.write("\n")

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            sys.stdout.write("".join(f"{self._name:5}| {line}\n" for line in lines))
            sys.stdout.flush()
        return len(text)

    def flush(self) -> None:
        """Each line is shown once it is whole."""


def _told(release: str, outcome: Outcome) -> str:
    told = "passed" if outcome.status == 0 else f"exit status {outcome.status}"
    text = f"Linux {release}: {told}, booted in {outcome.boot_s:.1f} s, ran {outcome.command_s:.1f} s"
    if outcome.complaints:
        text += f"; the kernel complained {len(outcome.complaints)} times, first: {outcome.complaints[0]}"
    return text


if __name__ == "__main__":
    sys.exit(main())
