#!/usr/bin/env python3
"""Compiles every ``src/**/*.bpf.c`` to a ``.bpf.o`` beside it, when something it depends on changed.

Needs clang (14 or newer) and libbpf's headers, and nothing outside Python's standard library, so that it runs
before the virtual environment exists. The same sources and the same clang give the same bytes on every
machine and in every directory: the compiler is given relative paths only, and the C includes no kernel
headers of the machine.

A release object (the default) holds BTF types, CO-RE relocations and line numbers, but no DWARF and no text
of source lines. clang copies a line into BTF by reading the file that the debug information names, so a
release is compiled under a directory name that does not exist (``RELEASE_DIRECTORY``), and the text is empty.
A debug object (``--debug``) keeps the text, for the verifier's log, and defines ``HOOKLINE_DEBUG``, which
compiles ``bpf_printk`` in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # the package need not be installed yet

from hookline.datapath.compiler import FLAGS, Clang, CompileError, find_clang  # noqa: E402

INCLUDE = Path("src/hookline/datapath/include")
RELEASE_DIRECTORY = "/hookline"


def compile_object(source: Path, output: Path, *, root: Path, clang: Clang, debug: bool = False) -> None:
    """Compiles ``source``, a file under ``root``, to ``output``, which appears whole or not at all.

    Raises:
        CompileError: The compiler refused the source, or a release object still held its text.
    """
    relative = source.resolve().relative_to(root.resolve())
    directory = "." if debug else RELEASE_DIRECTORY
    command = [
        clang.path,
        *FLAGS,
        *(["-DHOOKLINE_DEBUG=1"] if debug else []),
        f"-I{INCLUDE}",
        f"-fdebug-compilation-dir={directory}",
        *([] if debug else [f"-fdebug-prefix-map=/usr/include={RELEASE_DIRECTORY}/include"]),
        "-c",
        str(relative),
        "-o",
        "-",
    ]
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=root, capture_output=True, env=environment, check=False)
    messages = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0:
        raise CompileError(f"{relative} does not compile:\n{messages}")
    data = without_dwarf(done.stdout)
    if not debug:
        _refuse_source_text(data, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(output, data)


def _refuse_source_text(data: bytes, source: Path) -> None:
    for line in source.read_bytes().splitlines():
        text = line.strip()
        if len(text) > 12 and text.endswith((b";", b"{", b")")) and text in data:
            raise CompileError(f"{source.name}: the release object holds the source line {text.decode()!r}")


# ELF, as far as stripping a relocatable object of its DWARF goes (System V ABI, "Object Files"): llvm-strip
# does the same, but is 90 MB that nothing else here needs.

_SYMTAB, _RELA, _NOBITS, _REL = 2, 4, 8, 9
_SECTION_FORMAT = "IIQQQQIIQQ"
_HEADER_FORMAT = "16sHHIQQQIHHHHHH"
_SYMBOL_FORMAT = "IBBHQQ"
_FIRST_RESERVED_SECTION = 0xFF00


@dataclass
class _Section:
    name: str
    header: list[int]
    data: bytes
    index: int = field(default=0)

    @property
    def kind(self) -> int:
        return self.header[1]


def without_dwarf(data: bytes) -> bytes:
    """A relocatable 64-bit ELF object without its DWARF sections; BTF and all else is kept as it is."""
    order = "<" if data[5] == 1 else ">"
    header = list(struct.unpack_from(order + _HEADER_FORMAT, data))
    sections = _read_sections(data, order, header)
    kept = [section for section in sections if not _is_debug(section.name)]
    for index, section in enumerate(kept):
        section.index = index
    new_index = {old: section.index for old, section in enumerate(sections) if not _is_debug(section.name)}
    new_symbol: dict[int, int] = {}
    for section in kept:
        if section.kind == _SYMTAB:
            new_symbol = _renumber_symbols(section, order, new_index)
    for section in kept:
        if section.kind in (_REL, _RELA):
            _renumber_relocations(section, order, new_symbol)
            section.header[7] = new_index[section.header[7]]
        section.header[6] = new_index.get(section.header[6], 0)
    return _write_sections(order, header, kept, new_index)


def _is_debug(name: str) -> bool:
    return name.startswith((".debug_", ".rel.debug_", ".rela.debug_")) or name == ".llvm_addrsig"


def _read_sections(data: bytes, order: str, header: list[Any]) -> list[_Section]:
    offset, size, count, names_at = (header[place] for place in (6, 11, 12, 13))
    headers = [
        list(struct.unpack_from(order + _SECTION_FORMAT, data, offset + i * size)) for i in range(count)
    ]
    names = data[headers[names_at][4] :]
    return [
        _Section(
            name=names[fields[0] : names.index(b"\0", fields[0])].decode(),
            header=fields,
            data=b"" if fields[1] == _NOBITS else data[fields[4] : fields[4] + fields[5]],
        )
        for fields in headers
    ]


def _renumber_symbols(section: _Section, order: str, new_index: dict[int, int]) -> dict[int, int]:
    """Drops the symbols of dropped sections; returns each kept symbol's new number by its old one."""
    kept: list[bytes] = []
    numbers: dict[int, int] = {}
    local = 0
    for old, symbol in enumerate(struct.iter_unpack(order + _SYMBOL_FORMAT, section.data)):
        name, information, other, home, value, size = symbol
        if home < _FIRST_RESERVED_SECTION:
            if home not in new_index:
                continue
            home = new_index[home]
        numbers[old] = len(kept)
        local += information >> 4 == 0
        kept.append(struct.pack(order + _SYMBOL_FORMAT, name, information, other, home, value, size))
    section.data = b"".join(kept)
    section.header[7] = local
    return numbers


def _renumber_relocations(section: _Section, order: str, new_symbol: dict[int, int]) -> None:
    form = order + ("QQ" if section.kind == _REL else "QQq")
    entries = []
    for where, what, *addend in struct.iter_unpack(form, section.data):
        symbol = new_symbol[what >> 32]
        entries.append(struct.pack(form, where, symbol << 32 | what & 0xFFFFFFFF, *addend))
    section.data = b"".join(entries)


def _write_sections(order: str, header: list[Any], kept: list[_Section], new_index: dict[int, int]) -> bytes:
    body = bytearray(struct.calcsize(order + _HEADER_FORMAT))
    for section in kept:
        if section.kind == _NOBITS or section.index == 0:
            continue
        alignment = max(section.header[8], 1)
        body.extend(bytes(-len(body) % alignment))
        section.header[4] = len(body)
        section.header[5] = len(section.data)
        body.extend(section.data)
    body.extend(bytes(-len(body) % 8))
    header[6], header[12], header[13] = len(body), len(kept), new_index[header[13]]
    struct.pack_into(order + _HEADER_FORMAT, body, 0, *header)
    for section in kept:
        body.extend(struct.pack(order + _SECTION_FORMAT, *section.header))
    return bytes(body)


# What is up to date


def _read_stamps(path: Path) -> dict[str, str]:
    """What each object was built from: the key of its source's name."""
    try:
        keys = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _write_stamps(path: Path, keys: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, (json.dumps(keys, indent=1, sort_keys=True) + "\n").encode())


def _write_whole(path: Path, data: bytes) -> None:
    """So that a reader at any moment finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def key_of(source: Path, *, root: Path, clang: Clang, debug: bool) -> str:
    """A hash of all that decides an object's bytes."""
    digest = hashlib.sha256(f"{clang.identity} {debug} {FLAGS}".encode())
    for file in (Path(__file__), source, *sorted((root / "src").rglob("*.h"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def object_of(source: Path) -> Path:
    """Where the object of ``x.bpf.c`` goes: ``x.bpf.o`` beside it."""
    return source.with_suffix(".o")


def build_all(root: Path, *, debug: bool = False, force: bool = False) -> list[Path]:
    """Builds what is missing or out of date under ``root``; returns the sources that were compiled."""
    sources = sorted((root / "src").rglob("*.bpf.c"))
    if not sources:
        return []
    clang = find_clang()
    stamps_path = root / "build" / "objects.json"
    stamps = _read_stamps(stamps_path)
    compiled = []
    for source in sources:
        name = str(source.relative_to(root))
        key = key_of(source, root=root, clang=clang, debug=debug)
        if not force and stamps.get(name) == key and object_of(source).exists():
            continue
        print(f"compiling {name}{' (debug)' if debug else ''} with {Path(clang.path).name}", flush=True)
        compile_object(source, object_of(source), root=root, clang=clang, debug=debug)
        stamps[name] = key
        _write_stamps(stamps_path, stamps)
        compiled.append(source)
    return compiled


def check_reproducible(root: Path, *, debug: bool = False) -> None:
    """Builds everything once more from a copy in another directory and compares the bytes.

    Raises:
        CompileError: An object differs.
    """
    clang = find_clang()
    with tempfile.TemporaryDirectory(prefix="hookline-build-") as directory:
        copy = Path(directory)
        shutil.copytree(
            root / "src", copy / "src", ignore=shutil.ignore_patterns("*.o", "*.py", "__pycache__")
        )
        for source in sorted((root / "src").rglob("*.bpf.c")):
            again = copy / source.relative_to(root)
            compile_object(again, object_of(again), root=copy, clang=clang, debug=debug)
            hashes = [_sha256(object_of(file)) for file in (source, again)]
            if hashes[0] != hashes[1]:
                raise CompileError(
                    f"{source.relative_to(root)}: two builds differ, {hashes[0]} and {hashes[1]}"
                )
            print(f"{hashes[0]}  {object_of(source).relative_to(root)}  (the same from another directory)")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the kernel programs.")
    parser.add_argument(
        "--debug", action="store_true", help="keep source lines and bpf_printk (also DEBUG=1)"
    )
    parser.add_argument("--force", action="store_true", help="compile also what is up to date")
    parser.add_argument("--reproduce", action="store_true", help="build a second time elsewhere and compare")
    parser.add_argument(
        "--has-clang", action="store_true", help="only say by the exit status whether a clang is here"
    )
    chosen = parser.parse_args(arguments)
    debug = chosen.debug or os.environ.get("DEBUG", "0") not in ("", "0")
    try:
        if chosen.has_clang:
            find_clang()
            return 0
        build_all(ROOT, debug=debug, force=chosen.force)
        if chosen.reproduce:
            check_reproducible(ROOT, debug=debug)
    except CompileError as error:
        print(f"build_objects: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
