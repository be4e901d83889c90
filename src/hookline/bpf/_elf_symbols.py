"""Where the functions of a program or shared library are in its file, for uprobes."""

from __future__ import annotations

import difflib
import errno as errnos
import fnmatch
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline.bpf._errors import BpfError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

__all__ = ["Executable", "find_file"]

_GO_SECTIONS = (".go.buildinfo", ".gopclntab", ".note.go.buildid")
_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_LIBRARIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")


def find_file(name: str | os.PathLike[str]) -> Path:
    """The file of a program or library: a path, a program in PATH, or a library's name as the linker knows it.

    Raises:
        BpfError: There is none.
    """
    text = os.fspath(name)
    if "/" in text:
        if not os.path.isfile(text):
            raise BpfError(f"there is no file {text}", errno=errnos.ENOENT)
        return Path(text)
    found = shutil.which(text)
    if found:
        return Path(found)
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    folders += [Path(folder) for folder in _LIBRARIES]
    folders += [place for folder in _LIBRARIES for place in Path(folder).glob("*-linux-gnu*")]
    for folder in folders:
        if (folder / text).is_file():
            return folder / text
    raise BpfError(
        f"there is no program or library {text!r}",
        errno=errnos.ENOENT,
        remedy="give its whole path; ldconfig -p lists libraries",
    )


@dataclass(frozen=True)
class _Segment:
    address: int
    offset: int
    size: int


class Executable:
    """The functions of an ELF file.

    Attributes:
        path: The file.
        is_go: Whether the Go compiler made it: its stacks move, so that uretprobes would crash it.
    """

    def __init__(self, path: Path) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile

        self.path = path
        try:
            with path.open("rb") as file:
                elf = ELFFile(file)
                self.is_go = any(elf.get_section_by_name(name) is not None for name in _GO_SECTIONS)
                self._segments = [
                    _Segment(part["p_vaddr"], part["p_offset"], part["p_filesz"])
                    for part in elf.iter_segments("PT_LOAD")
                ]
                self._tables = [table for name in (".symtab", ".dynsym") if (table := _table(elf, name))]
        except OSError as error:
            raise BpfError(f"cannot read {path}", errno=error.errno or 0) from None
        except (ELFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BpfError(f"{path} is no ELF file", errno=errnos.ENOEXEC, why=str(error)) from None

    def offset_of(self, symbol: str) -> int:
        """The offset of a function in the file.

        Raises:
            BpfError: It has no such function.
        """
        for names, symbols in self._tables:
            wanted = _places(names, symbol.encode())
            for value in symbols["value"][_isin(symbols["name"], wanted)]:
                return self._file_offset(int(value), symbol)
        close = difflib.get_close_matches(symbol, self.functions(), 1, 0.6)
        raise BpfError(
            f"{self.path} has no function {symbol!r}",
            errno=errnos.ENOENT,
            why="" if self.functions() else "it is stripped: it has no symbols",
            remedy=f"did you mean {close[0]}?" if close else "nm and nm -D list what it has",
        )

    def matching(self, pattern: str) -> dict[str, int]:
        """The offsets of the functions whose name matches a shell pattern, one name for each place."""
        found: dict[int, str] = {}
        for name, value in self._all().items():
            if fnmatch.fnmatchcase(name, pattern):
                found.setdefault(self._file_offset(value, name), name)
        return {name: offset for offset, name in found.items()}

    def functions(self) -> list[str]:
        """The names of all functions."""
        return sorted(self._all())

    def _all(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for names, symbols in self._tables:
            for place, value in zip(symbols["name"].tolist(), symbols["value"].tolist(), strict=True):
                name = names[place : names.index(b"\0", place)].decode(errors="replace")
                if name:
                    found.setdefault(name, value)
        return found

    def _file_offset(self, address: int, symbol: str) -> int:
        for part in self._segments:
            if part.address <= address < part.address + part.size:
                return address - part.address + part.offset
        raise BpfError(f"{symbol!r} of {self.path} is in no part of the file that is loaded")


def _table(elf: ELFFile, name: str) -> tuple[bytes, Any] | None:
    """A symbol table's names, and its defined functions as an array of `name`, `value`."""
    import numpy as np

    section = elf.get_section_by_name(name)
    if section is None or section["sh_type"] == "SHT_NOBITS":
        return None
    order = "<" if elf.little_endian else ">"
    wide = [("name", "u4"), ("info", "u1"), ("other", "u1"), ("shndx", "u2"), ("value", "u8"), ("size", "u8")]
    small = [
        ("name", "u4"),
        ("value", "u4"),
        ("size", "u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "u2"),
    ]
    layout = np.dtype([(n, order + t) for n, t in (wide if elf.elfclass == 64 else small)])
    symbols = np.frombuffer(section.data(), layout)
    defined = (symbols["shndx"] != 0) & np.isin(symbols["info"] & 15, _FUNCTIONS)
    return elf.get_section(section["sh_link"]).data(), symbols[defined]


def _places(names: bytes, symbol: bytes) -> list[int]:
    """Where a name is in a string table; linkers let a name be the tail of another."""
    found, place = [], names.find(symbol + b"\0")
    while place >= 0:
        found.append(place)
        place = names.find(symbol + b"\0", place + 1)
    return found


def _isin(values: Any, wanted: list[int]) -> Any:
    import numpy as np

    return np.isin(values, np.array(wanted, dtype=np.uint32))
