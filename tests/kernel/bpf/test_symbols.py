"""Where functions are in programs and libraries: as nm says; what is not there, stripped, indirect, Go's or damaged."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest

from hookline import bpf
from hookline.bpf._links._elf_symbols import Executable, find_file
from tests.kernel.bpf.hooks import Open
from tests.requirements import missing_program, need


def test_symbols_agree_with_nm(executable: Path) -> None:
    need("kernel", missing_program("nm"))
    for path, flag in ((executable, "-a"), (find_file("libc.so.6"), "-D")):
        shown = subprocess.run(["nm", flag, path], check=True, capture_output=True, text=True).stdout
        file = Executable(path)
        functions = re.findall(r"^([0-9a-f]+) [TtWi] ([a-z]\w*)(@@\S+)?$", shown, re.MULTILINE)
        checked = [(int(value, 16), name) for value, name, _ in functions if name in file.functions()]
        assert len(checked) >= 2
        for value, name in checked[:200]:
            # The first loaded segments are at the same place in the file as in memory.
            assert file.offset_of(name) == value
        assert not file.is_go


def test_a_symbol_that_is_not_there(hooked: Open, executable: Path, tmp_path: Path) -> None:
    program = hooked("uprobe").program
    with pytest.raises(bpf.BpfError, match=r"has no function 'wrok'.*did you mean work\?"):
        program.attach_uprobe(executable, "wrok")
    with pytest.raises(bpf.BpfError, match="there is no file /no/such"):
        program.attach_uprobe("/no/such", "work")
    with pytest.raises(bpf.BpfError, match=r"no program or library 'libnosuch\.so'"):
        program.attach_uprobe("libnosuch.so", "work")
    text = tmp_path / "text"
    text.write_text("no program")
    with pytest.raises(bpf.BpfError, match="is no ELF file"):
        program.attach_uprobe(text, "work")
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, executable], check=True)
    with pytest.raises(bpf.BpfError, match="has no function 'work'"):
        program.attach_uprobe(stripped, "work")
    with pytest.raises(bpf.BpfError, match="no process"):
        program.attach_uprobe(executable, "work", pid=0x3FFFFF)


def test_go_programs_get_no_uretprobe(hooked: Open, executable: Path, tmp_path: Path) -> None:
    need("kernel", missing_program("objcopy"))
    marked = tmp_path / "go-program"
    note = tmp_path / "note"
    note.write_bytes(b"go1.22")
    subprocess.run(["objcopy", "--add-section", f".go.buildinfo={note}", executable, marked], check=True)
    program = hooked("uretprobe").program
    with pytest.raises(bpf.BpfError, match="is a Go program"):
        program.attach_uprobe(marked, "work", returns=True)
    with pytest.raises(bpf.BpfError, match="is a Go program"):
        program.attach_uprobe(marked, 0x1000, returns=True)
    with program.attach_uprobe(marked, "work"):
        pass


def test_an_indirect_function_is_refused(hooked: Open) -> None:
    """memcpy's name is its chooser's, which has run long before."""
    with pytest.raises(bpf.BpfError, match=r"'memcpy' of .* cannot be probed.*indirect function"):
        hooked("uprobe").program.attach_uprobe("libc.so.6", "memcpy")
    assert "memcpy" not in Executable(find_file("libc.so.6")).matching("mem*")


def test_damaged_files_are_refused_or_read(executable: Path, tmp_path: Path) -> None:
    """Whatever a file holds, the answer is an offset or a BpfError."""
    whole = executable.read_bytes()
    dice = random.Random(4)
    damaged = tmp_path / "damaged"
    outcomes = {"read": 0, "refused": 0}
    for turn in range(400):
        data = bytearray(whole)
        if turn % 4 == 0:
            del data[dice.randrange(len(data)) :]
        else:
            # Headers are at the beginning and at the end.
            for _ in range(dice.choice((1, 8, 64))):
                places = (range(0x400), range(len(data) - 0x900, len(data)), range(len(data)))
                data[dice.choice(dice.choice(places))] ^= 1 << dice.randrange(8)
        damaged.write_bytes(data)
        try:
            file = Executable(damaged)
            file.matching("w*")
            assert file.offset_of("work") >= 0
            outcomes["read"] += 1
        except bpf.BpfError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10
