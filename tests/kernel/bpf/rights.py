"""Tries what a process may do, and prints it: ``python -m tests.kernel.bpf.rights OBJECT [nobody]``.

With ``nobody`` it becomes an ordinary user first, when all is imported: the checkout may be closed to one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hookline import bpf
from hookline.bpf import features

MAPS: dict[str, dict[str, Any]] = {
    "hash": {"key": "u4", "value": "u8"},
    "array": {"value": "u8"},
    "lru_hash": {"key": "u4", "value": "u8"},
    "ringbuf": {},
    "prog_array": {},
    "sockmap": {},
    "devmap": {},
    "xskmap": {},
}


def said(error: bpf.BpfError) -> dict[str, str]:
    """An error's class, the capability that it names, and its text."""
    return {
        "kind": type(error).__name__,
        "capability": getattr(error, "capability", ""),
        "text": str(error),
        "status": str(error.exit_status),
    }


def program(data: bytes, name: str) -> dict[str, str] | None:
    """Load one program alone; None, or what was said."""
    try:
        with bpf.Object.open(data, name="every_type") as obj:
            obj.only(name)
            obj.load()
    except bpf.BpfError as error:
        return said(error)
    return None


def table(kind: str) -> dict[str, str] | None:
    """Make a map; None, or what was said."""
    try:
        bpf.Map.create(kind, max_entries=4096, **MAPS[kind]).close()
    except bpf.BpfError as error:
        return said(error)
    return None


def findings() -> dict[str, tuple[str, str]]:
    """Every probe's answer and why."""
    found = [
        *(features.attach(name) for name in features.hooks()),
        *(features.program_type(name) for name in features.program_types()),
        *(features.map_type(name) for name in features.map_types()),
        features.helper("xdp", "bpf_redirect_map"),
        features.helper("kprobe", "bpf_get_stack"),
    ]
    return {one.feature: (one.answer.value, one.why) for one in found}


def main() -> None:
    """Prints what is allowed."""
    data = Path(sys.argv[1]).read_bytes()
    with bpf.Object.open(data) as obj:
        programs = {name: one.type for name, one in obj.programs.items()}
    if "nobody" in sys.argv:
        # What the work below imports on its first use.
        program(data, next(iter(programs)))
        table("hash")
        findings()
        features.forget()
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    print(
        json.dumps(
            {
                "types": programs,
                "programs": {name: program(data, name) for name in programs},
                "maps": {kind: table(kind) for kind in MAPS},
                "findings": findings(),
            }
        )
    )


if __name__ == "__main__":
    main()
