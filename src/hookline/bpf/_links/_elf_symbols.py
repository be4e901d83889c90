"""Where the functions of a program or shared library are in its file, for uprobes."""

from __future__ import annotations

import difflib
import errno as errnos
import fnmatch
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline.bpf._errors import BpfError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from elftools.elf.elffile import ELFFile

__all__ = ["Executable", "find_file"]

_GO_SECTIONS = (".go.buildinfo", ".gopclntab", ".note.go.buildid")
_COMPRESSED = 0x800  # SHF_COMPRESSED
_HIDDEN_VERSION = 0x8000
_FUNCTION, _INDIRECT = 2, 10  # STT_FUNC, STT_GNU_IFUNC
# What pyelftools and the tables' own indices let through when headers point to nowhere.
_NONSENSE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    AssertionError,
    struct.error,
)
_LIBRARIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")


def find_file(name: str | os.PathLike[str]) -> Path:
    """The file of a program or library: a path, a program in PATH, or a library's name as the linker knows it.

    Raises:
        BpfError: There is none.
    """
    text = os.fspath(name)
    if "/" in text:
        if not os.path.isfile(text):
            raise BpfError(
                f"there is no file {text}",
                errno=errnos.ENOENT,
                remedy="give the path of a program or library, or a name that PATH or the linker knows",
            )
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
        self._size = path.stat().st_size
        self._values: dict[str, int] = {}
        self._indirect: set[str] = set()
        try:
            with path.open("rb") as file:
                elf = ELFFile(file)
                self.is_go = any(elf.get_section_by_name(name) is not None for name in _GO_SECTIONS)
                self._segments = [
                    _Segment(part["p_vaddr"], part["p_offset"], part["p_filesz"])
                    for part in elf.iter_segments("PT_LOAD")
                ]
                for name in (".symtab", ".dynsym"):
                    self._add(elf, name)
        except OSError as error:
            raise BpfError(
                f"cannot read {path}",
                errno=error.errno or 0,
                remedy="check that it is a program or library that this user may read",
            ) from None
        except ELFError as error:
            raise BpfError(
                f"{path} is no ELF file",
                errno=errnos.ENOEXEC,
                why=str(error),
                remedy="name the program itself, not a script that starts it",
            ) from None
        except _NONSENSE as error:
            raise BpfError(
                f"{path} is damaged",
                errno=errnos.ENOEXEC,
                why=f"its headers make no sense: {error}",
                remedy="install it again",
            ) from None

    def offset_of(self, symbol: str) -> int:
        """The offset of a function in the file.

        Raises:
            BpfError: It has no such function, or one that is chosen when the program starts.
        """
        if symbol in self._values:
            return self._file_offset(self._values[symbol], symbol)
        if symbol in self._indirect:
            raise BpfError(
                f"{symbol!r} of {self.path} cannot be probed by its name",
                why="it is an indirect function: the name is that of a chooser, which runs once when a program "
                "starts, not of the function that it chooses for this processor",
                remedy="give the chosen function's offset, or its own name where the file is not stripped",
            )
        close = difflib.get_close_matches(symbol, self._values, 1, 0.6)
        raise BpfError(
            f"{self.path} has no function {symbol!r}",
            errno=errnos.ENOENT,
            why="" if self._values else "it is stripped: it has no symbols",
            remedy=f"did you mean {close[0]}?" if close else "nm and nm -D list what it has",
        )

    def matching(self, pattern: str) -> dict[str, int]:
        """The offsets of the functions whose name matches a shell pattern, one name for each place."""
        found: dict[int, str] = {}
        for name, value in self._values.items():
            if fnmatch.fnmatchcase(name, pattern):
                found.setdefault(self._file_offset(value, name), name)
        return {name: offset for offset, name in found.items()}

    def functions(self) -> list[str]:
        """The names of all functions."""
        return sorted(self._values)

    def _add(self, elf: ELFFile, table: str) -> None:
        """Take the defined functions of a symbol table."""
        import numpy as np

        section = elf.get_section_by_name(table)
        if section is None or section["sh_type"] == "SHT_NOBITS":  # stripped into a file of its own
            return
        data = self._read(section)
        layout = _symbol_layout(elf.elfclass == 64, elf.little_endian)
        symbols = np.frombuffer(data[: len(data) // layout.itemsize * layout.itemsize], layout)
        names = self._read(elf.get_section(section["sh_link"]))
        # Of several versions of a name, the one that programs are linked to today comes first.
        symbols = symbols[np.argsort(self._old_versions(elf, table, len(symbols)), kind="stable")]
        symbols = symbols[(symbols["shndx"] != 0) & np.isin(symbols["info"] & 15, (_FUNCTION, _INDIRECT))]
        for place, info, value in symbols[["name", "info", "value"]].tolist():
            name = names[place : names.index(b"\0", place)].decode(errors="replace")
            if not name or name in self._values or name in self._indirect:
                continue
            if info & 15 == _INDIRECT:
                self._indirect.add(name)
            else:
                self._values[name] = value

    def _old_versions(self, elf: ELFFile, table: str, count: int) -> npt.NDArray[np.bool_]:
        """Which symbols are kept only for programs that were linked long ago."""
        import numpy as np

        section = elf.get_section_by_name(".gnu.version") if table == ".dynsym" else None
        old = np.zeros(count, dtype=bool)
        if section is not None:
            data = self._read(section)[: 2 * count]
            versions = np.frombuffer(data, "<u2" if elf.little_endian else ">u2")
            old[: len(versions)] = versions & _HIDDEN_VERSION != 0
        return old

    def _read(self, section: Any) -> bytes:
        """A section's bytes, which must lie in the file as they are."""
        if section["sh_flags"] & _COMPRESSED or section["sh_offset"] + section["sh_size"] > self._size:
            raise ValueError(f"section {section.name!r} is not in the file")
        return bytes(section.data())

    def _file_offset(self, address: int, symbol: str) -> int:
        for part in self._segments:
            if part.address <= address < part.address + part.size:
                return address - part.address + part.offset
        raise BpfError(
            f"{symbol!r} of {self.path} is in no part of the file that is loaded",
            why="the symbol has an address outside of all segments",
            remedy="probe another function",
        )


def _symbol_layout(wide: bool, little: bool) -> np.dtype[Any]:
    """``Elf64_Sym`` or ``Elf32_Sym``."""
    import numpy as np

    number = "u8" if wide else "u4"
    head = [("info", "u1"), ("other", "u1"), ("shndx", "u2")]
    place = [("value", number), ("size", number)]
    members = [("name", "u4"), *head, *place] if wide else [("name", "u4"), *place, *head]
    return np.dtype([(name, ("<" if little else ">") + kind) for name, kind in members])
