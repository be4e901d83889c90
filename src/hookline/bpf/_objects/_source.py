"""Which line of C an instruction of a program came from, by the object's ``.BTF.ext``.

The kernel numbers a program's instructions as libbpf laid them out: the program itself, then every function that it calls,
each once, in the order in which calls are met, depth first. ``.BTF.ext`` numbers them by section and offset.
Its layout: Documentation/bpf/btf.rst of the Linux source, "The .BTF.ext section".
"""

from __future__ import annotations

import bisect
import io
import os
import struct
from dataclasses import dataclass
from typing import Any

__all__ = ["SourceMap", "SourcePlace"]

_EXT_HEADER = struct.Struct("<HBBIIIII")
_BTF_HEADER = struct.Struct("<HBBIIIII")
_CALL, _LOAD_ADDRESS = 0x85, 0x18
_TO_PROGRAM = 1


@dataclass(frozen=True)
class SourcePlace:
    """A line of C.

    Attributes:
        file: The file's name without folders.
        line: Its number, from 1.
        text: What stands there, without indentation; ``""`` where the object does not have it.
    """

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class _Function:
    section: int
    start: int
    size: int


class SourceMap:
    """The lines of an object's programs.

    Args:
        data: The bytes of the ELF file. An object without line information, or a damaged one, has no lines.
    """

    def __init__(self, data: bytes) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile

        self._code: dict[int, bytes] = {}
        self._calls: dict[tuple[int, int], tuple[int, int]] = {}
        self._functions: dict[tuple[int, int], _Function] = {}
        self._named: dict[str, _Function] = {}
        self._lines: dict[str, list[tuple[int, SourcePlace]]] = {}
        self._sections: dict[int, str] = {}
        try:
            self._read(ELFFile(io.BytesIO(data)))
        except (ELFError, struct.error, ValueError, IndexError, KeyError, AttributeError, TypeError):
            # The error that this is for is more important than its line.
            self._lines = {}

    def find(self, program: str, instruction: int) -> SourcePlace | None:
        """The line of an instruction as the kernel numbers them, or None where it is not known."""
        main = self._named.get(program)
        if main is None or not self._lines:
            return None
        before = 0
        for function in self._layout(main):
            if instruction < before + function.size // 8:
                place = function.start + (instruction - before) * 8
                return self._line(self._sections[function.section], place)
            before += function.size // 8
        return None

    def _line(self, section: str, place: int) -> SourcePlace | None:
        lines = self._lines.get(section, [])
        index = bisect.bisect_right([offset for offset, _ in lines], place) - 1
        return lines[index][1] if index >= 0 else None

    def _layout(self, main: _Function) -> list[_Function]:
        """The functions in the order in which libbpf appends them."""
        order = [main]

        def visit(function: _Function) -> None:
            for place in range(function.start, function.start + function.size, 8):
                target = self._target(function.section, place)
                called = self._functions.get(target) if target else None
                if called is not None and called not in order:
                    order.append(called)
                    visit(called)

        visit(main)
        return order

    def _target(self, section: int, place: int) -> tuple[int, int] | None:
        """Where an instruction that calls or takes a function's address points to."""
        code, registers = self._code[section][place], self._code[section][place + 1]
        number = struct.unpack_from("<i", self._code[section], place + 4)[0]
        relocated = self._calls.get((section, place))
        if code == _CALL and registers >> 4 == _TO_PROGRAM:
            if relocated:
                return relocated[0], relocated[1] + (number + 1) * 8
            return section, place + (number + 1) * 8
        if code == _LOAD_ADDRESS and relocated:
            return relocated[0], relocated[1] + number
        return None

    def _read(self, elf: Any) -> None:
        names = {section.name: section for section in elf.iter_sections()}
        for index, section in enumerate(elf.iter_sections()):
            if section["sh_type"] == "SHT_PROGBITS" and section["sh_flags"] & 4:
                self._code[index], self._sections[index] = section.data(), section.name
        symbols = names[".symtab"]
        for symbol in symbols.iter_symbols():
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] in self._code:
                function = _Function(symbol["st_shndx"], symbol["st_value"], symbol["st_size"])
                self._functions[function.section, function.start] = function
                self._named[symbol.name] = function
        for section in elf.iter_sections():
            if section["sh_type"] == "SHT_REL" and section["sh_info"] in self._code:
                for entry in section.iter_relocations():
                    symbol = symbols.get_symbol(entry["r_info_sym"])
                    if symbol["st_shndx"] in self._code:
                        place = section["sh_info"], entry["r_offset"]
                        self._calls[place] = symbol["st_shndx"], symbol["st_value"]
        self._read_lines(names[".BTF"].data(), names[".BTF.ext"].data())

    def _read_lines(self, btf: bytes, ext: bytes) -> None:
        header = _BTF_HEADER.unpack_from(btf)
        texts = btf[header[3] + header[6] :]

        def text(offset: int) -> str:
            return texts[offset : texts.index(0, offset)].decode(errors="replace")

        _, _, _, length, _, _, line_offset, line_length = _EXT_HEADER.unpack_from(ext)
        place = length + line_offset
        end = place + line_length
        size = struct.unpack_from("<I", ext, place)[0]
        place += 4
        while place < end:
            section, count = struct.unpack_from("<II", ext, place)
            place += 8
            lines = []
            for number in range(count):
                offset, file, line, column = struct.unpack_from("<IIII", ext, place + number * size)
                where = SourcePlace(os.path.basename(text(file)), column >> 10, text(line).strip())
                lines.append((offset, where))
            self._lines[text(section)] = lines
            place += count * size
