"""clang, for those who write kernel programs: which one, and how it is called.

Nobody needs it to run Hookline, whose programs are compiled when it is built. `compile_program` is for programs of one's own: it
finds the headers in ``include/``, and libbpf's. This module imports the standard library only, since the build uses it before
anything is installed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
from collections.abc import Callable
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


def compile_program(source: Path, output: Path, *, warn: Callable[[str], None] = lambda text: None) -> Path:
    """Compile a program with its types and its source lines, for `hookline.bpf.Object.open`.

    ``kernel.h`` and what includes it need nothing of the machine. The kernel's UAPI headers (``linux/bpf.h``) are found, too,
    where they are installed.

    Args:
        source: The C file.
        output: Where the object goes. A file appears whole or not at all; a device or pipe is written to.
        warn: Told what the compiler warns of.

    Raises:
        CompileError: There is no compiler, or it refused the source.
    """
    if not source.is_file():
        why = "it is a folder" if source.is_dir() else "there is no such file"
        raise CompileError(f"cannot read {source}", why=why, remedy="name a program in C: NAME.bpf.c")
    if source.suffix != ".c":
        raise CompileError(
            f"{source} is no program in C", why="its name does not end with .c", remedy="name NAME.bpf.c"
        )
    flags = [flag for flag in FLAGS if flag not in ("-Wextra", "-Werror")]
    command = [find_clang().path, *flags, f"-I{INCLUDE}", *_uapi_headers(), "-c", str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0:
        raise CompileError(f"{source} does not compile", why=said, remedy=_remedy(said))
    if said:
        warn(said)
    _write(output.resolve(), done.stdout)
    return output


def _write(output: Path, data: bytes) -> None:
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if output.exists() and not output.is_file():
            output.write_bytes(data)
            return
        fresh.write_bytes(data)
        fresh.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise CompileError(
            f"cannot write {output}",
            why=error.strerror or str(error),
            remedy="name another place by --output",
        ) from None


def _uapi_headers() -> list[str]:
    """Where Debian keeps the headers of the machine's architecture, which ``linux/bpf.h`` includes; searched last."""
    return [f"-idirafter{folder}" for folder in sorted(glob.glob("/usr/include/*-linux-gnu"))]


def _remedy(said: str) -> str:
    if "bpf/bpf_helpers.h" in said or "bpf/bpf_endian.h" in said:
        return "apt-get install libbpf-dev"
    if re.search(r"'(linux|asm)/[a-z_/]+\.h' file not found", said):
        return 'apt-get install linux-libc-dev, or include "kernel.h", which has the kernel\'s types for programs'
    return "mend the source where the compiler points"


def _ask_version(path: str) -> int:
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"clang version (\d+)", output)
    return int(found[1]) if found else 0
