"""eBPF instructions as text, in the kernel's own syntax: that of the verifier's log and of ``bpftool prog dump xlated``.

The instruction set is RFC 9669 with what came since (Documentation/bpf/standardization/instruction-set.rst), and the
few forms that only the verifier makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["INSTRUCTION", "Instruction", "Pseudo", "disassemble"]

INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("immediate", "<i4")])
"""``struct bpf_insn``; the destination register is in the low half of ``registers``, the source in the high one."""


class Pseudo(IntEnum):
    """What a source register that is none says of a 64-bit constant or of a call (``BPF_PSEUDO_*``)."""

    MAP = 1
    MAP_VALUE = 2
    BTF_ID = 3
    FUNCTION = 4
    MAP_INDEX = 5
    MAP_INDEX_VALUE = 6
    CALL = 1
    KERNEL_CALL = 2


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        index: Its place, counted in slots of 8 bytes.
        code: The operation.
        destination: A register.
        source: A register, or what stands in its place (`Pseudo`).
        offset: The signed 16-bit offset.
        immediate: The signed 32-bit constant; all 64 bits, unsigned, of a wide instruction.
        wide: Whether it takes two slots.
        text: The kernel's syntax: ``(07) r2 += -4``.
    """

    index: int
    code: int
    destination: int
    source: int
    offset: int
    immediate: int
    wide: bool
    text: str

    @property
    def raw(self) -> bytes:
        """The 8 or 16 bytes."""
        registers = self.destination | self.source << 4
        low = (self.immediate & 0xFFFFFFFF).to_bytes(4, "little")
        first = bytes([self.code, registers]) + (self.offset & 0xFFFF).to_bytes(2, "little") + low
        if not self.wide:
            return first
        return first + bytes(4) + (self.immediate >> 32 & 0xFFFFFFFF).to_bytes(4, "little")

    @property
    def target(self) -> int | None:
        """Where a jump may go, as a place; None for other instructions."""
        kind, operation = self.code & 7, self.code & 0xF0
        if kind not in (_JMP, _JMP32) or operation in (_CALL, _EXIT) or self.code == _JMP | _X:
            return None
        distance = self.immediate if kind == _JMP32 and operation == _JA else self.offset
        return self.index + 1 + distance


Called = Callable[[Instruction], str]

_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_X = 0x08
_IMM, _ABS, _IND, _MEM, _MEMSX, _ATOMIC = 0x00, 0x20, 0x40, 0x60, 0x80, 0xC0
# Modes that only the verifier writes: loads that may fault and are then zero, and a barrier against speculation.
_PROBE_MEM, _PROBE_MEMSX, _PROBE_MEM32, _PROBE_MEM32SX, _PROBE_ATOMIC, _NOSPEC = (
    0x20,
    0x40,
    0xA0,
    0xC0,
    0xE0,
    0xC0,
)
_NEG, _MOV, _END = 0x80, 0xB0, 0xD0
_JA, _CALL, _EXIT, _JCOND = 0x00, 0x80, 0x90, 0xE0
_WIDE = 0x18
_SIZES = {0x00: "u32", 0x08: "u16", 0x10: "u8", 0x18: "u64"}
_SIGNED_SIZES = {0x00: "s32", 0x08: "s16", 0x10: "s8", 0x18: "s64"}
_ARITHMETIC = {
    0x00: "+=",
    0x10: "-=",
    0x20: "*=",
    0x30: "/=",
    0x40: "|=",
    0x50: "&=",
    0x60: "<<=",
    0x70: ">>=",
    0x90: "%=",
    0xA0: "^=",
    0xB0: "=",
    0xC0: "s>>=",
}
_COMPARISONS = {
    0x10: "==",
    0x20: ">",
    0x30: ">=",
    0x40: "&",
    0x50: "!=",
    0x60: "s>",
    0x70: "s>=",
    0xA0: "<",
    0xB0: "<=",
    0xC0: "s<",
    0xD0: "s<=",
}
_FETCHES = {0x00: "add", 0x40: "or", 0x50: "and", 0xA0: "xor"}
_FETCH, _XCHG, _CMPXCHG, _LOAD_ACQUIRE, _STORE_RELEASE = 0x01, 0xE1, 0xF1, 0x100, 0x110
_ADDRESS_SPACE_CAST, _PER_CPU_ADDRESS = 1, -1


def disassemble(
    instructions: npt.NDArray[Any] | bytes,
    *,
    called: Called | None = None,
    constant: Called | None = None,
) -> Iterator[Instruction]:
    """Yield the instructions with their text.

    Args:
        instructions: An array of `INSTRUCTION`, or its bytes.
        called: What a call instruction calls; for a call of a function of the program what follows ``pc``.
        constant: What a 64-bit constant with a pseudo source stands for.
    """
    array = np.frombuffer(instructions, INSTRUCTION) if isinstance(instructions, bytes) else instructions
    rows = array.tolist()
    index = 0
    while index < len(rows):
        code, registers, offset, immediate = rows[index]
        wide = code == _WIDE and index + 1 < len(rows)
        if wide:
            immediate = (rows[index + 1][3] & 0xFFFFFFFF) << 32 | immediate & 0xFFFFFFFF
        bare = Instruction(index, code, registers & 15, registers >> 4, offset, immediate, wide, "")
        text = f"({code:02x}) {_text(bare, called or _called, constant or _constant)}"
        yield Instruction(index, code, registers & 15, registers >> 4, offset, immediate, wide, text)
        index += 2 if wide else 1


def _text(one: Instruction, called: Called, constant: Called) -> str:
    match one.code & 7:
        case 4 | 7:
            return _arithmetic(one)
        case 5 | 6:
            return _jump(one, called)
        case 3:
            return _store(one)
        case 2:
            return _store_constant(one)
        case 1:
            return _load(one)
        case _:
            return _load_special(one, constant)


def _called(one: Instruction) -> str:
    return f"{one.immediate:+d}" if one.source == Pseudo.CALL else "unknown"


def _constant(one: Instruction) -> str:
    return f"{one.immediate:#x}"


def _arithmetic(one: Instruction) -> str:
    wide = one.code & 7 == _ALU64
    operation = one.code & 0xF0
    letter = "r" if wide else "w"
    target = f"{letter}{one.destination}"
    if operation == _END:
        order = "bswap" if wide else "be" if one.code & _X else "le"
        return f"r{one.destination} = {order}{one.immediate} r{one.destination}"
    if operation == _NEG:
        return f"{target} = -{target}"
    if operation == _MOV and one.code & _X and wide and one.offset == _ADDRESS_SPACE_CAST:
        spaces = one.immediate & 0xFFFFFFFF
        return f"{target} = addr_space_cast(r{one.source}, {spaces >> 16}, {spaces & 0xFFFF})"
    if operation == _MOV and one.code & _X and wide and one.offset == _PER_CPU_ADDRESS:
        return f"{target} = &(void __percpu *)(r{one.source})"
    sign = _ARITHMETIC.get(operation, f"BUG_alu_{one.code:02x}")
    if operation in (0x30, 0x90) and one.offset == 1:
        sign = f"s{sign}"
    if not one.code & _X:
        return f"{target} {sign} {one.immediate}"
    extended = f"(s{one.offset})" if operation == _MOV and one.offset in (8, 16, 32) else ""
    return f"{target} {sign} {extended}{letter}{one.source}"


def _jump(one: Instruction, called: Called) -> str:
    short = one.code & 7 == _JMP32
    operation = one.code & 0xF0
    if operation == _CALL:
        if one.source == Pseudo.CALL:
            return f"call pc{called(one)}"
        if one.code & _X:
            return f"callx r{one.destination}"
        return f"call {called(one)}#{one.immediate}"
    if operation == _EXIT:
        return "exit"
    if operation == _JA:
        if one.code & _X:
            return f"gotox r{one.destination}"
        return f"gotol pc{one.immediate:+d}" if short else f"goto pc{one.offset:+d}"
    if operation == _JCOND:
        return f"may_goto pc{one.offset:+d}"
    letter = "w" if short else "r"
    other = f"{letter}{one.source}" if one.code & _X else f"{one.immediate & 0xFFFFFFFF:#x}"
    return f"if {letter}{one.destination} {_COMPARISONS.get(operation, '?')} {other} goto pc{one.offset:+d}"


def _store(one: Instruction) -> str:
    place = f"*({_SIZES[one.code & 0x18]} *)(r{one.destination} {one.offset:+d})"
    mode = one.code & 0xE0
    if mode in (_MEM, _PROBE_MEM32):
        return f"{place} = r{one.source}"
    if mode in (_ATOMIC, _PROBE_ATOMIC):
        return _atomic(one, place)
    return f"BUG_{one.code:02x}"


def _atomic(one: Instruction, place: str) -> str:
    address = place[1:]
    width = "64" if one.code & 0x18 == 0x18 else ""
    operation = one.immediate
    if operation in _FETCHES:
        return f"lock {place} {_ARITHMETIC[operation]} r{one.source}"
    if operation & ~0xF0 == _FETCH and operation & 0xF0 in _FETCHES:
        return f"r{one.source} = atomic{width}_fetch_{_FETCHES[operation & 0xF0]}({address}, r{one.source})"
    if operation == _CMPXCHG:
        return f"r0 = atomic{width}_cmpxchg({address}, r0, r{one.source})"
    if operation == _XCHG:
        return f"r{one.source} = atomic{width}_xchg({address}, r{one.source})"
    if operation == _LOAD_ACQUIRE:
        size = _SIZES[one.code & 0x18]
        return f"r{one.destination} = load_acquire(({size} *)(r{one.source} {one.offset:+d}))"
    if operation == _STORE_RELEASE:
        return f"store_release({address}, r{one.source})"
    return f"BUG_{one.code:02x}"


def _store_constant(one: Instruction) -> str:
    if one.code & 0xE0 in (_MEM, _PROBE_MEM32):
        size = _SIZES[one.code & 0x18]
        return f"*({size} *)(r{one.destination} {one.offset:+d}) = {one.immediate}"
    if one.code & 0xE0 == _NOSPEC:
        return "nospec"
    return f"BUG_st_{one.code:02x}"


def _load(one: Instruction) -> str:
    mode = one.code & 0xE0
    if mode in (_MEM, _PROBE_MEM, _PROBE_MEM32):
        size = _SIZES[one.code & 0x18]
    elif mode in (_MEMSX, _PROBE_MEMSX, _PROBE_MEM32SX):
        size = _SIGNED_SIZES[one.code & 0x18]
    else:
        return f"BUG_ldx_{one.code:02x}"
    return f"r{one.destination} = *({size} *)(r{one.source} {one.offset:+d})"


def _load_special(one: Instruction, constant: Called) -> str:
    mode, size = one.code & 0xE0, _SIZES[one.code & 0x18]
    if mode == _ABS:
        return f"r0 = *({size} *)skb[{one.immediate}]"
    if mode == _IND:
        return f"r0 = *({size} *)skb[r{one.source} + {one.immediate}]"
    if one.wide:
        return f"r{one.destination} = {constant(one) if one.source else _constant(one)}"
    return f"BUG_ld_{one.code:02x}"
