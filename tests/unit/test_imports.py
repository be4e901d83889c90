"""What importing the library may bring along: `import hookline.bpf` has a budget of 100 ms, of which NumPy takes most."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    *(
        "asyncio",
        "capstone",
        "ctypes.util",
        "elftools",
        "email",
        "hashlib",
        "http",
        "inspect",
        "json",
        "logging",
    ),
    *(
        "pydantic",
        "pyroute2",
        "rich",
        "secrets",
        "sqlite3",
        "subprocess",
        "tempfile",
        "typer",
        "unittest",
        "yaml",
    ),
)


def brought(statement: str) -> set[str]:
    """The modules that a statement brings in, beyond those that NumPy does."""
    code = f"import sys, numpy\nbefore = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - before)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_library_brings_nothing_heavy() -> None:
    assert brought("import hookline.bpf") & set(HEAVY) == set()


def test_the_library_brings_no_other_layer() -> None:
    ours = {name for name in brought("import hookline.bpf") if name.startswith("hookline.")}
    assert {name for name in ours if not name.startswith(("hookline.bpf", "hookline.errors"))} == set()


@pytest.mark.parametrize("name", ["_disassemble", "_placements", "_code", "_query", "_attach_user"])
def test_modules_for_one_purpose_wait_for_it(name: str) -> None:
    assert f"hookline.bpf.{name}" not in brought("import hookline.bpf")
