"""clang, for those who write kernel programs: which one, and how it is called.

Nobody needs it to run Hookline, whose programs are compiled when it is built. `compile_program` is for programs of one's own: it
finds the headers in ``include/``, and libbpf's. This module imports the standard library only, since the build uses it before
anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hookline.errors import HooklineError

__all__ = ["FLAGS", "INCLUDE", "OLDEST_CLANG", "Clang", "CompileError", "compile_program", "find_clang"]

INCLUDE = Path(__file__).parent / "include"
OLDEST_CLANG = 14
FLAGS = ("-O2", "-g", "-mcpu=v3", "-target", "bpf", "-std=gnu11", "-Wall", "-Wextra", "-Werror")


class CompileError(HooklineError):
    """A program could not be compiled; ``why`` holds the compiler's words."""


@dataclass(frozen=True)
class Clang:
    """A clang that can compile the programs: its path and its major version."""

    path: str
    version: int

    @property
    def identity(self) -> str:
        """Changes when the compiler does, without having to run it."""
        file = Path(self.path).resolve()
        status = file.stat()
        return f"{file} {status.st_size} {status.st_mtime_ns}"


def find_clang() -> Clang:
    """The compiler to use: ``$CLANG``, else clang-19, else the newest other clang that is new enough.

    Raises:
        CompileError: There is none.
    """
    chosen = os.environ.get("CLANG")
    newest_first = [f"clang-{version}" for version in range(30, OLDEST_CLANG - 1, -1)]
    for name in [chosen] if chosen else ["clang-19", *newest_first, "clang"]:
        path = shutil.which(name)
        if path is None:
            continue
        numbered = re.fullmatch(r"clang-(\d+)", Path(path).name)
        version = int(numbered[1]) if numbered else _ask_version(path)
        if version >= OLDEST_CLANG:
            return Clang(path, version)
    raise CompileError(
        f"no clang {OLDEST_CLANG} or newer" + (f" named {chosen}" if chosen else ""),
        remedy="apt-get install clang-19",
    )


def compile_program(source: Path, output: Path) -> Path:
    """Compile a program with its types and its source lines, for `hookline.bpf.Object.open`.

    Args:
        source: The C file.
        output: Where the object goes; it appears whole or not at all.

    Raises:
        CompileError: There is no compiler, or it refused the source.
    """
    if not source.is_file():
        raise CompileError(f"cannot read {source}", why="there is no such file")
    command = [find_clang().path, *FLAGS, f"-I{INCLUDE}", "-c", str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise CompileError(f"{source} does not compile", why=said, remedy=_headers(said))
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if output.exists() and not output.is_file():
            output.write_bytes(done.stdout)  # a device or pipe is written to, never replaced
            return output
        fresh.write_bytes(done.stdout)
        fresh.replace(output)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise CompileError(f"cannot write {output}", why=error.strerror or str(error)) from None
    return output


def _headers(said: str) -> str:
    """What to do about a header that was not found."""
    if "bpf/bpf_helpers.h" in said or "bpf/bpf_endian.h" in said:
        return "apt-get install libbpf-dev"
    if "asm/types.h" in said or "linux/bpf.h" in said:
        return 'include "kernel.h" instead, which has the kernel\'s types for programs'
    return ""


def _ask_version(path: str) -> int:
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"clang version (\d+)", output)
    return int(found[1]) if found else 0
