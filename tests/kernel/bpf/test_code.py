"""Disassembly of loaded programs, beside bpftool's; of every form of instruction, beside the verifier's own log."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hookline
from hookline import bpf
from hookline.bpf import _syscall
from hookline.bpf._introspection import _symbols
from hookline.bpf._syscall import Command
from tests.requirements import missing_program, need

LOADBALANCER = Path(hookline.__file__).parent / "datapath" / "loadbalancer" / "loadbalancer.bpf.o"


def bpftool(*words: str) -> Any:
    need("kernel", missing_program("bpftool"))
    done = subprocess.run(["bpftool", "-j", *words], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture
def corpus(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("code")) as obj:
        yield obj.load()


def as_version_7_1(one: bpf.Instruction) -> str:
    """What bpftool 7.1, which is of Linux 6.1, prints: it does not know what came later.

    Forms that share an operation with an older one it shows as that one; of others it says that they are a bug.
    """
    kind, mode = one.code & 7, one.code & 0xE0
    register = f"{'r' if kind == 7 else 'w'}{{}}".format
    match one.code:
        case 0xD7:  # bswap
            return "BUG_alu64_d7"
        case 0xBF | 0xBC if one.offset:  # sign extension, per-CPU addresses, casts between address spaces
            return f"({one.code:02x}) {register(one.destination)} = {register(one.source)}"
        case 0x34 | 0x37 | 0x3C | 0x3F | 0x94 | 0x97 | 0x9C | 0x9F:  # signed division
            return one.text.replace("s/=", "/=").replace("s%=", "%=")
        case 0x06:  # gotol
            return f"(06) if w{one.destination} jmp {one.immediate & 0xFFFFFFFF:#x} goto pc{one.offset:+d}"
        case 0x85 if one.source == 2:  # kernel functions, which it takes for helpers
            return f"(85) call {_symbols.kernel_function(one.immediate)}#{one.immediate}"
        case 0xC2:
            return "BUG_st_c2"
    if kind == 1 and mode == 0x80:  # loads that extend the sign
        return f"BUG_ldx_{one.code:02x}"
    if kind == 3 and mode == 0xC0 and one.immediate in (0x100, 0x110):  # load_acquire, store_release
        return f"BUG_{one.code:02x}"
    return one.text


def same_call(ours: str, theirs: str) -> bool:
    """Whether two texts name the same kernel function: an address may have several names, and bpftool takes any."""
    pattern = r"\(85\) call (\w+)#(-?\d+)"
    mine, other = re.fullmatch(pattern, ours), re.fullmatch(pattern, theirs)
    return bool(mine and other and mine[2] == other[2] and other[1] in _symbols.aliases(mine[1]))


def assert_same_code(program: bpf.Program) -> int:
    """Compare a program's listing with bpftool's: text, bytes, functions, source lines. Returns its length."""
    code = program.xlated()
    shown = bpftool("prog", "dump", "xlated", "id", str(program.id), "opcodes")
    if shown is None or (isinstance(shown, dict) and "error" in shown):
        return 0  # it went away meanwhile
    ours = list(code.instructions())
    assert len(ours) == len(shown)
    functions = {function.first: function.prototype for function in code.functions if function.prototype}
    sources = {line.place: line.text for line in code.lines}
    for one, other in zip(ours, shown, strict=True):
        assert as_version_7_1(one) == other["disasm"] or same_call(one.text, other["disasm"])
        opcodes = other["opcodes"]
        assert [one.code, one.source, one.destination] == [
            int(opcodes[name], 16) for name in ("code", "src_reg", "dst_reg")
        ]
        assert one.offset == struct.unpack("<h", bytes(int(byte, 16) for byte in opcodes["off"]))[0]
        # bpftool 7.1 prints a wide constant as 12 bytes, the second instruction's without its constant.
        low = bytes(int(byte, 16) for byte in opcodes["imm"][:4])
        assert one.raw[4:8] == low
        assert other.get("proto", "") == functions.get(one.index, "")
        if sources.get(one.index):
            assert other["src"] == sources[one.index]
    assert code.array.tobytes() == b"".join(one.raw for one in ours)
    return len(ours)


def test_everything_loaded_reads_as_bpftool_has_it(corpus: bpf.Object, loaded: bpf.Object) -> None:
    compared = 0
    for info in bpf.programs():
        try:
            program = bpf.Program.from_id(info.id)
        except bpf.BpfError:
            continue  # it went away meanwhile
        with program:
            compared += bool(assert_same_code(program))
    assert compared >= len(corpus.programs) + len(loaded.programs)


def test_the_balancer_reads_as_bpftool_has_it() -> None:
    with bpf.Object.open(LOADBALANCER) as obj:
        obj.load()
        assert sum(assert_same_code(program) for program in obj.programs.values()) > 2500


NEWER = """
#include "types.h"
volatile __s64 wide;
volatile __s32 narrow;
volatile __s16 half;
volatile __s8 byte;
SEC("syscall") int newer(__s32 *context)
{
	__s64 sum = narrow + half + byte;
	__s32 divisor = narrow | 3;
	sum += wide / divisor + wide % divisor + narrow / divisor;
	sum += (__s8)sum + (__s16)(sum * 3) + (__s32)(sum * 5);
	narrow = (__s8)divisor;
	wide = __builtin_bswap64(sum) + __builtin_bswap32(divisor) + __builtin_bswap16(half);
	asm volatile("gotol +0;");
	return sum;
}
char _license[] SEC("license") = "GPL";
"""


def test_newer_instructions_are_what_bpftool_does_not_know(compiled: Callable[..., Path]) -> None:
    """Those of BPF version 4; test_every_form_reads_as_the_verifier_writes_it has their right text."""
    release = tuple(int(word) for word in re.findall(r"\d+", os.uname().release)[:2])
    if release < (6, 6):
        pytest.skip("this kernel has no such instructions: Linux 6.6 has")
    with bpf.Object.open(compiled(NEWER, "-g", "-mcpu=v4")) as obj:
        program = obj.load().programs["newer"]
        assert assert_same_code(program) > 20
        text = str(program.xlated())
        for form in (
            "s/=",
            "s%=",
            "(s8)",
            "(s32)",
            "bswap64",
            "*(s32 *)",
            "*(s16 *)",
            "*(s8 *)",
            "gotol",
        ):
            assert form in text, form


def test_lines_have_their_places(corpus: bpf.Object) -> None:
    program = corpus.programs["arithmetic"]
    shown = bpftool("prog", "dump", "xlated", "id", str(program.id), "linum")
    listed = {line.place: line for line in program.xlated().lines}
    places = [one.index for one in program.xlated().instructions()]
    compared = 0
    for place, other in zip(places, shown, strict=True):
        if "file" in other:
            line = listed[place]
            assert (line.file, line.line, line.column) == (
                other["file"],
                other["line_num"],
                other.get("line_col", 0),
            )
            assert f"line_num:{line.line} " in "\n".join(program.xlated().listing(places=True))
            compared += 1
    assert compared > 20
    source = Path(listed[0].file).read_text().splitlines()
    assert all(source[line.line - 1].strip() == line.text for line in listed.values())


def test_functions_and_references(corpus: bpf.Object) -> None:
    code = corpus.programs["calls"].xlated()
    assert [function.name for function in code.functions] == ["calls", "add_up", "step"]
    assert code.functions[1].prototype == "int add_up(__u32 rounds)"
    assert sum(function.count for function in code.functions) == len(code) == len(code.array)
    text = str(code)
    assert re.search(r"call pc\+\d+#bpf_prog_[0-9a-f]{16}_add_up", text)
    assert re.search(r"= subprog\[\+\d+\]", text)
    assert "call bpf_tail_call#12" in text
    assert f"map[id:{corpus.maps['ring'].id}]" in text
    assert f"map[id:{corpus.maps['.bss'].id}][0]+8" in text
    plain, opcodes = list(code.listing()), list(code.listing(opcodes=True))
    assert len(opcodes) == len(plain) + len(list(code.instructions()))
    jumps = [one for one in code.instructions() if one.target is not None]
    assert jumps
    assert all(0 <= one.target < len(code) for one in jumps if one.target is not None)


@pytest.mark.feature("other", "machine code with source lines")
def test_machine_code(corpus: bpf.Object) -> None:
    program = corpus.programs["calls"]
    machine = program.jited()
    assert [function.name for function in machine.functions] == ["calls", "add_up", "step"]
    assert sum(len(function.code) for function in machine.functions) == program.info.jited_bytes
    for function in machine.functions:
        assert function.address > 1 << 63
        assert function.lines
        shown = list(machine.disassemble(function))
        assert b"".join(one.raw for one in shown) == function.code
        assert not any(one.text.startswith(".byte") for one in shown)
        assert {line.place for line in function.lines} <= {one.address for one in shown}
    listing = str(machine)
    assert "add_up: 0x" in listing
    if machine.machine == "x86_64":
        assert "push rbp" in listing
        # One function calls another at the address that the kernel gives for it.
        assert f"call {machine.functions[1].address:#x} <add_up>" in listing
        assert re.search(r"call 0x[0-9a-f]+ <bpf_ringbuf_submit>", listing)
    dumped = [line for line in machine.dump() if re.match(r" *[0-9a-f]+: ", line)]
    whole = "".join(line.partition(": ")[2] for line in dumped)
    assert bytes.fromhex(whole) == b"".join(function.code for function in machine.functions)


def test_machine_code_without_its_disassembler(kinds: Path) -> None:
    """An installation without the extra says what to install, and still has the bytes."""
    script = (
        "import sys; sys.modules['capstone'] = None\n"
        "from hookline import bpf\n"
        "with bpf.Object.open(sys.argv[1]) as obj:\n"
        "    machine = obj.load().programs['add'].jited()\n"
        "    print(len(list(machine.dump())))\n"
        "    try: str(machine)\n"
        "    except bpf.BpfError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, kinds], check=True, capture_output=True, text=True
    ).stdout
    count, _, message = said.partition("\n")
    assert int(count) >= 2
    assert "capstone is not installed" in message
    assert "pip install 'hookline[disassembly]'" in message


# Every form, beside the verifier's log


def slot(code: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhI", code, destination | source << 4, offset, immediate & 0xFFFFFFFF)


R0_ZERO, EXIT = slot(0xB7), slot(0x95)
START = slot(0xBF, 6, 1) + slot(0xB7, 1, immediate=5) + slot(0xB7, 2, immediate=7)
STACK = b"".join(slot(0x7A, 10, offset=-8 * n, immediate=n) for n in (1, 2))


def verified(instructions: bytes, kind: str = "socket_filter") -> list[str] | None:
    """The instructions as the verifier's log has them; None where this kernel refuses the program."""
    log = ctypes.create_string_buffer(1 << 20)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license_text = ctypes.create_string_buffer(b"GPL")
    attr = _syscall.attributes(
        "IIQQIIQ",
        _syscall.PROGRAM_TYPES.index(kind),
        len(instructions) // 8,
        _syscall.address(code),
        _syscall.address(license_text),
        2,
        len(log),
        _syscall.address(log),
    )
    fd = _syscall.call(Command.PROG_LOAD, attr)
    if fd < 0:
        return None
    os.close(fd)
    text = log.value.decode(errors="replace")
    found: dict[int, str] = {}
    for match in re.finditer(r"^(?:from .*|)(\d+): (\([0-9a-f]{2}\) .*?)\s*(?:;.*)?$", text, re.MULTILINE):
        found.setdefault(int(match[1]), match[2])
    return [found[place] for place in sorted(found)]


def arithmetic() -> bytes:
    found = b""
    for operation in (0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x90, 0xA0, 0xB0, 0xC0):
        for code in (0x04, 0x07):
            found += slot(operation | code, 1, immediate=3)
            # Shifts by a register that is too large are refused: it is 7 here.
            found += slot(0xB7, 3, immediate=7) + slot(operation | code | 8, 1, 3)
    return found + slot(0x87, 1) + slot(0x84, 1)


def jumps() -> bytes:
    found = b""
    for operation in (0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0xA0, 0xB0, 0xC0, 0xD0):
        for code in (0x05, 0x06):
            found += slot(operation | code, 1, immediate=-2) + slot(operation | code | 8, 1, 2)
    return found + slot(0x05)


def memory() -> bytes:
    found = STACK
    for size in (0x00, 0x08, 0x10, 0x18):
        found += slot(0x62 | size, 10, offset=-8, immediate=-1) + slot(0x63 | size, 10, 1, -16)
        found += slot(0x61 | size, 3, 10, -8)
    return (
        found + slot(0x18, 4, immediate=-2) + slot(0, immediate=0x1234) + slot(0x18, 4, immediate=7) + slot(0)
    )


def atomics() -> bytes:
    found = STACK
    for size in (0x00, 0x18):
        for operation in (0x00, 0x40, 0x50, 0xA0):
            found += slot(0xC3 | size, 10, 1, -8, operation) + slot(0xC3 | size, 10, 2, -16, operation | 1)
        found += slot(0xC3 | size, 10, 2, -8, 0xE1) + R0_ZERO + slot(0xC3 | size, 10, 1, -8, 0xF1)
    return found


def byte_order() -> bytes:
    return b"".join(slot(code, 1, immediate=bits) for code in (0xD4, 0xDC) for bits in (16, 32, 64))


def packet_loads() -> bytes:
    found = b""
    for size in (0x00, 0x08, 0x10):
        found += slot(0x20 | size, immediate=4) + slot(0xB7, 7, immediate=1) + slot(0x40 | size, 0, 7, 0, 4)
    return found


def signed() -> bytes:
    found = b""
    for code in (0x34, 0x37, 0x94, 0x97):
        found += slot(code, 1, offset=1, immediate=3) + slot(0xB7, 3, immediate=7) + slot(code | 8, 1, 3, 1)
    found += b"".join(slot(0xBF, 1, 2, bits) for bits in (8, 16, 32))
    found += b"".join(slot(0xBC, 1, 2, bits) for bits in (8, 16))
    found += STACK + b"".join(slot(0x81 | size, 3, 10, -8) for size in (0x00, 0x08, 0x10))
    found += b"".join(slot(0xD7, 1, immediate=bits) for bits in (16, 32, 64))
    return found + slot(0x06)


def may_goto() -> bytes:
    # Linux 6.12 refuses one that goes nowhere.
    return slot(0xE5, offset=2) + R0_ZERO + slot(0xE5, offset=1) + R0_ZERO


def ordered() -> bytes:
    found = STACK
    for size in (0x00, 0x08, 0x10, 0x18):
        found += slot(0xC3 | size, 3, 10, -8, 0x100) + slot(0xC3 | size, 10, 1, -16, 0x110)
    return found


def helpers() -> bytes:
    return slot(0x85, immediate=5) + slot(0x85, immediate=7) + slot(0x85, immediate=8)


def functions() -> bytes:
    return slot(0x85, 0, 1, 0, 2) + R0_ZERO + EXIT


FORMS: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "arithmetic": (arithmetic, (5, 1)),
    "jumps": (jumps, (5, 1)),
    "memory": (memory, (4, 0)),
    "atomics": (atomics, (5, 12)),
    "byte order": (byte_order, (4, 0)),
    "packet loads": (packet_loads, (4, 0)),
    "signed": (signed, (6, 6)),
    "may_goto": (may_goto, (6, 9)),
    "ordered": (ordered, (6, 15)),
    "helpers": (helpers, (4, 0)),
    "functions": (functions, (4, 16)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_as_the_verifier_writes_it(name: str) -> None:
    make, since = FORMS[name]
    release = tuple(int(word) for word in re.findall(r"\d+", os.uname().release)[:2])
    program = START + make() + R0_ZERO + EXIT
    written = verified(program)
    if release < since:
        assert written is None
        pytest.skip(f"this kernel has no such instructions: Linux {since[0]}.{since[1]} has")
    assert written is not None

    def called(one: bpf.Instruction) -> str:
        return f"{one.immediate:+d}" if one.source == 1 else _symbols.helper(one.immediate)

    ours = {one.index: one.text for one in bpf.disassemble(program, called=called)}
    assert [ours[place] for place in sorted(ours)] == written
    assert b"".join(one.raw for one in bpf.disassemble(program)) == program


def test_what_only_the_verifier_makes() -> None:
    """Forms that no log shows: their text is that of the kernel's kernel/bpf/disasm.c of Linux 6.18."""
    wanted = {
        slot(0xBF, 1, 2, 1, 1 << 16): "(bf) r1 = addr_space_cast(r2, 1, 0)",
        slot(0xBF, 1, 2, -1): "(bf) r1 = &(void __percpu *)(r2)",
        slot(0xC2): "(c2) nospec",
        slot(0x21, 1, 2, 4): "(21) r1 = *(u32 *)(r2 +4)",
        slot(0x0D, 3): "(0d) gotox r3",
        slot(0xC3, 1, 2, 4, 0x77): "(c3) BUG_c3",
        slot(0xC1 ^ 0xC0 | 0xE0, 1): "(e1) BUG_ldx_e1",
        slot(0x00): "(00) BUG_ld_00",
    }
    for raw, text in wanted.items():
        assert [one.text for one in bpf.disassemble(raw)] == [text]


def test_any_bytes_are_disassembled() -> None:
    """Nothing that a kernel may give stops a listing."""
    for code in range(256):
        for offset in (0, 1, -1, 8):
            raw = slot(code, 3, 4, offset, 0xF1)
            (one,) = bpf.disassemble(raw)
            assert one.text.startswith(f"({code:02x}) ")
            assert one.raw == raw
