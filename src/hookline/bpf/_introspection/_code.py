"""The code of loaded programs: the verified instructions, and the machine code that was made of them."""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, NotPermitted
from hookline.bpf._introspection import _symbols
from hookline.bpf._introspection._disassemble import INSTRUCTION, Instruction, Pseudo, disassemble
from hookline.bpf._programs._info import Info
from hookline.bpf._types import _kernel_types
from hookline.bpf._types._btf import Btf

__all__ = [
    "Function",
    "Jited",
    "MachineFunction",
    "MachineInstruction",
    "SourceLine",
    "Xlated",
    "jited",
    "xlated",
]

_CAPABILITIES = "CAP_BPF CAP_PERFMON"
_REMEDY = "pip install 'hookline[disassembly]' brings the disassembler; without it there are the bytes"


@dataclass(frozen=True)
class SourceLine:
    """A line of the C source.

    Attributes:
        place: The first instruction made from it; of machine code, its address.
        text: The line itself, without the space before it.
    """

    place: int
    file: str
    line: int
    column: int
    text: str


@dataclass(frozen=True)
class Function:
    """A function of a program.

    Attributes:
        name: The C function's name, or the program's where it came without types.
        prototype: As C, empty without types.
        first: The place of its first instruction.
        count: How many slots of 8 bytes it has.
    """

    name: str
    prototype: str
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Xlated:
    """Verified instructions.

    Attributes:
        array: The slots, an array of shape ``(slots,)`` with the fields ``code``, ``registers``, ``offset``, ``immediate``.
        functions: In their order, the program's own first.
        lines: The source lines that are known, in the order of their places.
    """

    array: npt.NDArray[Any]
    functions: tuple[Function, ...]
    lines: tuple[SourceLine, ...]
    _called: dict[int, str]

    def instructions(self) -> Iterator[Instruction]:
        """Every instruction with its text."""
        return disassemble(self.array, called=self._call, constant=_constant)

    def __len__(self) -> int:
        return len(self.array)

    def __str__(self) -> str:
        return "\n".join(self.listing())

    def listing(self, *, opcodes: bool = False, places: bool = False) -> Iterator[str]:
        """The lines of a listing as bpftool prints it, functions and source lines between.

        Args:
            opcodes: With the bytes of each instruction.
            places: With each source line's file, line and column.
        """
        starts = {one.first: one for one in self.functions if one.prototype}
        sources = {one.place: one for one in self.lines}
        for one in self.instructions():
            if one.index in starts:
                yield f"{starts[one.index].prototype}:"
            if one.index in sources:
                yield source_text(sources[one.index], places=places)
            yield f"{one.index:4}: {one.text}"
            if opcodes:
                yield f"       {one.raw.hex(' ')}"

    def _call(self, one: Instruction) -> str:
        if one.source == Pseudo.CALL:
            # The kernel keeps the distance in the offset, and puts the function's number where it was.
            name = self._called.get(one.immediate)
            return f"{one.offset:+d}#{name}" if name else f"{one.immediate:+d}"
        if one.source == Pseudo.KERNEL_CALL:
            return _symbols.kfunc(one.immediate) if not one.offset else "unknown"
        if one.immediate == _symbols.TAIL_CALL:
            return _symbols.helper(one.immediate)
        return _symbols.kernel_function(one.immediate)


@dataclass(frozen=True)
class MachineInstruction:
    """One instruction of the processor."""

    address: int
    raw: bytes
    text: str


@dataclass(frozen=True)
class MachineFunction:
    """The machine code of one function.

    Attributes:
        address: Where it is in the kernel.
        code: Its bytes.
        lines: The source lines that are known, by address.
    """

    name: str
    address: int
    code: bytes
    lines: tuple[SourceLine, ...]


@dataclass(frozen=True)
class Jited:
    """A program's machine code.

    Attributes:
        functions: In their order, the program's own first.
        machine: The processor, as ``uname -m`` calls it.
    """

    functions: tuple[MachineFunction, ...]
    machine: str

    def disassemble(self, function: MachineFunction) -> Iterator[MachineInstruction]:
        """A function's instructions as text; after a call of a known function its name.

        Raises:
            BpfError: The disassembler is not installed, or does not know the processor.
        """
        engine = _engine(self.machine)
        place = function.address
        for address, size, operation, operands in engine.disasm_lite(function.code, function.address):
            raw = function.code[address - function.address : address - function.address + size]
            yield MachineInstruction(address, raw, f"{operation} {operands}".rstrip() + self._named(operands))
            place = address + size
        for address in range(place, function.address + len(function.code)):
            byte = function.code[address - function.address]
            yield MachineInstruction(address, bytes([byte]), f".byte {byte:#04x}")

    def _named(self, operands: str) -> str:
        """The name of a function whose address is an instruction's only operand."""
        if not operands.startswith("0x"):
            return ""
        try:
            address = int(operands, 16)
        except ValueError:
            return ""
        own = {function.address: function.name for function in self.functions}
        name = own.get(address) or _symbols.at(address)
        return f" <{name}>" if name else ""

    def __str__(self) -> str:
        return "\n".join(self.listing())

    def listing(self, *, opcodes: bool = False, places: bool = False) -> Iterator[str]:
        """The lines of a listing; see `Xlated.listing`. Raises `BpfError` as `disassemble` does."""
        for function in self.functions:
            yield f"{function.name}: {function.address:#018x}"
            sources = {one.place: one for one in function.lines}
            for one in self.disassemble(function):
                if one.address in sources:
                    yield source_text(sources[one.address], places=places)
                yield f"{one.address - function.address:4x}: {one.text}"
                if opcodes:
                    yield f"      {one.raw.hex(' ')}"

    def dump(self) -> Iterator[str]:
        """The lines of a dump in hexadecimal, which needs no disassembler."""
        for function in self.functions:
            yield f"{function.name}: {function.address:#018x}"
            for place in range(0, len(function.code), 16):
                yield f"{place:4x}: {function.code[place : place + 16].hex(' ')}"


def source_text(line: SourceLine, *, places: bool) -> str:
    """A source line in a listing."""
    if not places:
        return f"; {line.text}"
    return f"; {line.text} [file:{line.file} line_num:{line.line} line_col:{line.column}]"


def xlated(fd: int, name: str) -> Xlated:
    """See `Program.xlated`."""
    found = _details(fd, name, code=True)
    array = np.frombuffer(found.instructions, INSTRUCTION).copy()
    starts = found.functions or [(0, name, "")]
    ends = [first for first, _, _ in starts[1:]] + [len(array)]
    functions = tuple(
        Function(function, prototype, first, end - first)
        for (first, function, prototype), end in zip(starts, ends, strict=True)
    )
    return Xlated(array, functions, found.lines, found.symbols)


def jited(fd: int, name: str) -> Jited:
    """See `Program.jited`."""
    found = _details(fd, name, code=False)
    if not found.machine_code:
        raise BpfError(
            f"program {name!r} has no machine code",
            why="it is interpreted",
            remedy="sysctl net.core.bpf_jit_enable=1, and load it again",
        )
    functions = []
    place = 0
    for number, length in enumerate(found.lengths):
        start = found.addresses[number]
        lines = tuple(one for one in found.machine_lines if start <= one.place < start + length)
        title = found.functions[number][1] if number < len(found.functions) else name
        functions.append(MachineFunction(title, start, found.machine_code[place : place + length], lines))
        place += length
    return Jited(tuple(functions), platform.machine())


@dataclass
class _Details:
    """The parts of ``struct bpf_prog_info`` that are behind pointers."""

    instructions: bytes
    machine_code: bytes
    addresses: tuple[int, ...]
    lengths: tuple[int, ...]
    functions: list[tuple[int, str, str]]
    lines: tuple[SourceLine, ...]
    machine_lines: tuple[SourceLine, ...]
    symbols: dict[int, str]


# What is behind a pointer: how many records, and the size of each, a number or the field that has it.
_PARTS: dict[str, tuple[str, int | str]] = {
    "jited_ksyms": ("nr_jited_ksyms", 8),
    "jited_func_lens": ("nr_jited_func_lens", 4),
    "func_info": ("nr_func_info", "func_info_rec_size"),
    "line_info": ("nr_line_info", "line_info_rec_size"),
    "jited_line_info": ("nr_jited_line_info", "jited_line_info_rec_size"),
    "prog_tags": ("nr_prog_tags", 8),
}


def _details(fd: int, name: str, *, code: bool) -> _Details:
    """Ask twice: for the sizes, and with room for everything."""
    sizes = Info()
    _syscall.info(fd, sizes, "a program")
    if not sizes.xlated_prog_len:
        raise NotPermitted(f"cannot read the code of program {name!r}", capability=_CAPABILITIES)
    wanted, buffers = _request(sizes, code=code)
    _syscall.info(fd, wanted, "a program")
    if not (wanted.xlated_prog_insns if code else wanted.jited_prog_insns or not sizes.jited_prog_len):
        raise NotPermitted(
            f"cannot read the code of program {name!r}",
            capability=_CAPABILITIES,
            why="the kernel hides it: its addresses are secret here, or the program's constants are blinded",
            remedy="sysctl kernel.kptr_restrict=0 net.core.bpf_jit_harden=0, as root",
        )
    return _read(name, wanted, {key: buffer.raw for key, buffer in buffers.items()})


def _request(sizes: Info, *, code: bool) -> tuple[Info, dict[str, ctypes.Array[ctypes.c_char]]]:
    """A description to be filled, and the memory that its pointers point to."""
    wanted = Info()
    buffers: dict[str, ctypes.Array[ctypes.c_char]] = {}

    def room(pointer: str, size: int) -> None:
        if size:
            buffers[pointer] = ctypes.create_string_buffer(size)
            setattr(wanted, pointer, _syscall.address(buffers[pointer]))

    kind = "xlated" if code else "jited"
    length = f"{kind}_prog_len"
    setattr(wanted, length, getattr(sizes, length))
    room(f"{kind}_prog_insns", getattr(sizes, length))
    for pointer, (count, size) in _PARTS.items():
        each = size if isinstance(size, int) else getattr(sizes, size)
        if isinstance(size, str):
            setattr(wanted, size, each)
        setattr(wanted, count, getattr(sizes, count))
        room(pointer, getattr(sizes, count) * each)
    return wanted, buffers


def _read(name: str, info: Info, parts: dict[str, bytes]) -> _Details:
    btf = _kernel_types.by_id(info.btf_id) if info.btf_id else None
    functions = _functions(btf, parts.get("func_info", b""), info.func_info_rec_size)
    addresses = _numbers("Q", parts.get("jited_ksyms", b""))
    tags = [tag.hex() for (tag,) in struct.iter_unpack("8s", parts.get("prog_tags", b""))]
    names = [function for _, function, _ in functions] or [name]
    lines = _lines(btf, parts.get("line_info", b""), info.line_info_rec_size)
    machine = _numbers("Q", parts.get("jited_line_info", b""))
    return _Details(
        instructions=parts.get("xlated_prog_insns", b""),
        machine_code=parts.get("jited_prog_insns", b""),
        addresses=addresses if any(addresses) else (0,) * max(1, len(addresses)),
        lengths=_numbers("I", parts.get("jited_func_lens", b"")),
        functions=functions,
        lines=lines,
        machine_lines=tuple(
            SourceLine(address, one.file, one.line, one.column, one.text)
            for address, one in zip(machine, lines, strict=False)
        ),
        # A function without types has its program's name.
        symbols={
            number: f"bpf_prog_{tag}_{names[number] if number < len(names) else name}"
            for number, tag in enumerate(tags)
        },
    )


def _numbers(kind: str, data: bytes) -> tuple[int, ...]:
    return tuple(number for (number,) in struct.iter_unpack(f"={kind}", data))


def _functions(btf: Btf | None, records: bytes, size: int) -> list[tuple[int, str, str]]:
    """Of each function its first instruction, its name and its prototype."""
    if btf is None or not size:
        return []
    found = []
    for place in range(0, len(records), size):
        first, type_id = struct.unpack_from("=II", records, place)
        found.append((first, btf[type_id].name, btf.c_name(type_id)))
    return found


def _lines(btf: Btf | None, records: bytes, size: int) -> tuple[SourceLine, ...]:
    if btf is None or not size:
        return ()
    found = []
    for place in range(0, len(records), size):
        index, file, line, where = struct.unpack_from("=IIII", records, place)
        found.append(SourceLine(index, btf.text(file), where >> 10, where & 0x3FF, btf.text(line).strip()))
    return tuple(found)


def _constant(one: Instruction) -> str:
    """A map, a function or a plain number; the kernel put a map's id in the place of its address."""
    low, high = one.immediate & 0xFFFFFFFF, one.immediate >> 32
    match one.source:
        case Pseudo.MAP:
            return f"map[id:{low}]"
        case Pseudo.MAP_VALUE:
            return f"map[id:{low}][0]+{high}"
        case Pseudo.MAP_INDEX_VALUE:
            return f"map[idx:{low}]+{high}"
        case Pseudo.FUNCTION:
            return f"subprog[{low - (1 << 32) if low >> 31 else low:+d}]"
        case _:
            return f"{one.immediate:#x}"


def _engine(machine: str) -> Any:
    try:
        import capstone
    except ImportError:
        raise BpfError(
            "machine code cannot be shown as text", why="capstone is not installed", remedy=_REMEDY
        ) from None
    known = {
        "x86_64": ("CS_ARCH_X86", "CS_MODE_64"),
        "aarch64": ("CS_ARCH_ARM64", "CS_MODE_LITTLE_ENDIAN"),
        "riscv64": ("CS_ARCH_RISCV", "CS_MODE_RISCV64"),
        "s390x": ("CS_ARCH_SYSZ", "CS_MODE_BIG_ENDIAN"),
        "ppc64le": ("CS_ARCH_PPC", "CS_MODE_64"),
    }
    if machine not in known:
        raise BpfError(
            "machine code cannot be shown as text",
            why=f"capstone has no {machine} here",
            remedy="see its bytes instead: hookline programs dump --jited",
        )
    architecture, mode = known[machine]
    return capstone.Cs(getattr(capstone, architecture), getattr(capstone, mode))
