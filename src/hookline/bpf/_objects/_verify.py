"""What the verifier says of each program of an object, one by one. Nothing is attached, and nothing stays loaded."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from hookline.bpf._errors import BpfError, ObjectError
from hookline.bpf._objects._object import Object
from hookline.bpf._types._codec import unknown_name

__all__ = ["Verdict", "verify"]

_STATISTICS = 4


@dataclass(frozen=True)
class Verdict:
    """What the kernel says of one program.

    Attributes:
        program: Its name.
        section: The section it was compiled into.
        type: Its type; the kernel's name.
        duration_ns: How long making its maps and loading it took, in nanoseconds.
        instructions: How many it has after verification; 0 where it was refused.
        verified_instructions: How many the verifier walked through (the limit is one million); 0 where it was refused.
        stack_bytes: The stack of the program and of each function in it, in bytes; empty where it was refused.
        error: Why it was refused, or None.
    """

    program: str
    section: str
    type: str
    duration_ns: int
    instructions: int = 0
    verified_instructions: int = 0
    stack_bytes: tuple[int, ...] = ()
    error: BpfError | None = None

    @property
    def accepted(self) -> bool:
        """Whether it was loaded."""
        return self.error is None


def verify(source: str | os.PathLike[str] | bytes, program: str = "") -> list[Verdict]:
    """Load each program of an object alone, and say what became of it.

    Args:
        source: A path, or the file's bytes.
        program: Only this one.

    Raises:
        ObjectError: The object cannot be opened, or has no programs.
        BpfError: It has no program of that name.
    """
    data = source if isinstance(source, bytes) else None
    name = "object" if data is not None else Path(os.fspath(source)).name  # type: ignore[arg-type]
    with Object.open(source) as obj:
        name = obj.name
        data = obj._data
        programs = {one.name: (one.section, one.type) for one in obj.programs.values()}
    if not programs:
        raise ObjectError(
            f"{name} has no programs",
            remedy='a program is a function with a section: SEC("xdp")',
            why="no function of it is in a section of its own",
        )
    if program and program not in programs:
        raise unknown_name("program", program, list(programs), name)
    return [_verdict(data, name, one, *programs[one]) for one in programs if not program or one == program]


def _verdict(data: bytes, name: str, program: str, section: str, kind: str) -> Verdict:
    begun = time.monotonic_ns()
    try:
        with _loaded(data, name, program) as obj:
            duration = time.monotonic_ns() - begun
            info = obj.programs[program].info
    except BpfError as error:
        return Verdict(program, section, kind, time.monotonic_ns() - begun, error=error)
    # Once more for the statistics: the verifier writes either them or the steps to a refusal.
    with _loaded(data, name, program, _STATISTICS) as obj:
        depth = re.search(r"^stack depth ([\d+]+)", obj.log, re.MULTILINE)
    stack = tuple(map(int, depth[1].split("+"))) if depth else ()
    return Verdict(program, section, kind, duration, info.instructions, info.verified_instructions, stack)


def _loaded(data: bytes, name: str, program: str, log_level: int = 0) -> Object:
    obj = Object.open(data, name=name, log_level=log_level)
    obj.only(program)
    return obj.load()
