"""Runs a command of this checkout on Debian's kernels, in virtual machines.

    .venv/bin/python -m tools.vm .venv/bin/python -m pytest tests/kernel      on each kernel in turn
    .venv/bin/python -m tools.vm --kernel 6.1 bash -c 'uname -r; ip link'

The exit status is the command's, the first that is not 0; 125 where a machine itself failed. What each kernel is and where
it is kept: kernels.py. What the machine is: machine.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tools.vm import kernels
from tools.vm.kernels import VmError
from tools.vm.machine import Machine, Outcome

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
    parser.add_argument("--accelerator", default="tcg,thread=multi", help="kvm where that works")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command")
    results: dict[str, tuple[int, str]] = {}
    for name in arguments.kernel or kernels.SUITES:
        begun = time.monotonic()
        try:
            kernel = kernels.get(name)
            print(f"vm: Linux {kernel.release}", flush=True)
            machine = Machine(kernel, arguments.cpus, arguments.memory, arguments.accelerator)
            outcome = machine.run(command, folder=Path.cwd(), timeout_s=arguments.timeout)
            results[name] = outcome.status, _told(kernel.release, outcome)
        except VmError as error:
            print(f"vm: {name}: {error}", file=sys.stderr, flush=True)
            results[name] = MACHINE_FAILED, f"Linux {name}: no answer, {time.monotonic() - begun:.1f} s"
    for _, told in results.values():
        print(f"vm: {told}")
    return next((status for status, _ in results.values() if status), 0)


def _told(release: str, outcome: Outcome) -> str:
    told = "passed" if outcome.status == 0 else f"exit status {outcome.status}"
    text = f"Linux {release}: {told}, booted in {outcome.boot_s:.1f} s, ran {outcome.command_s:.1f} s"
    if outcome.complaints:
        text += f"; the kernel complained {len(outcome.complaints)} times, first: {outcome.complaints[0]}"
    return text


if __name__ == "__main__":
    sys.exit(main())
