"""Damaged objects never take the process with them, and leave no descriptor, no memory and no pin behind."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hookline import bpf
from tests.kernel.bpf.fuzz import damaged

TYPED = """
#include "types.h"
struct task_struct { int pid; unsigned long start_time; } __attribute__((preserve_access_index));
SEC("raw_tp/sched_switch") int switched(__u64 *ctx) {
	struct task_struct *task = (void *)ctx[1];
	int pid = 0;
	bpf_probe_read_kernel(&pid, 4, &task->pid);
	return pid > 7;
}
char _license[] SEC("license") = "GPL";
"""
MEMORY_BYTES = 24 << 20


@pytest.fixture(scope="module")
def objects(compiled: Callable[..., Path], kinds: Path) -> list[Path]:
    return [kinds, compiled("../gallery/recursion", "-g", "-DMENDED"), compiled(TYPED)]


def fuzz(objects: list[Path], progress: Path, first: int, count: int) -> dict[str, int]:
    """Run the cases in a process and a bpffs of its own; how often each outcome was."""
    progress.write_bytes(bytes(8))
    words = [
        sys.executable,
        "-m",
        "tests.kernel.bpf.fuzz",
        str(first),
        str(count),
        str(progress),
        *map(str, objects),
    ]
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-ec", 'mount -t bpf bpf /sys/fs/bpf; exec "$@"', "sh", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    case = struct.unpack("<Q", progress.read_bytes())[0]
    assert ended.returncode == 0, f"case {case} ended with {ended.returncode}: {ended.stderr[-3000:]}"
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert report["descriptors"] == 0, report
    assert report["pins"] == 0, report
    assert report["memory_bytes"] < MEMORY_BYTES, report
    outcomes: dict[str, int] = report["outcomes"]
    assert sum(outcomes.values()) == count
    return outcomes


def test_damaged_objects(objects: list[Path], tmp_path: Path) -> None:
    outcomes = fuzz(objects, tmp_path / "progress", 0, 1_000)
    # The damage is neither always fatal nor never: both ways are tried.
    assert outcomes["loaded"] > 100
    assert outcomes["ObjectError"] > 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_damaged_objects(objects: list[Path], tmp_path: Path, part: int) -> None:
    outcomes = fuzz(objects, tmp_path / "progress", part * 2_500, 2_500)
    assert outcomes["loaded"] > 250
    assert outcomes["ObjectError"] > 750


def test_damage_follows_from_its_number(kinds: Path) -> None:
    data = kinds.read_bytes()
    changed = [damaged(data, number) for number in range(50)]
    assert changed == [damaged(data, number) for number in range(50)]
    assert sum(one != data for one in changed) >= 45


def test_types_that_lead_nowhere(kinds: Path) -> None:
    """Each reference of the types turned into one to nowhere is refused before libbpf sees it."""
    from elftools.elf.elffile import ELFFile

    with kinds.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".BTF")
        start = section["sh_offset"]
    data = kinds.read_bytes()
    header = struct.unpack_from("<I", data, start + 4)[0]
    refused = 0
    for offset in range(start + header, start + header + 1200, 4):
        changed = data[:offset] + struct.pack("<I", 0x00FFFFFF) + data[offset + 4 :]
        try:
            bpf.Object.open(changed).close()
        except bpf.BpfError:
            refused += 1
    assert refused > 50


SELF = [
    ("typedef", struct.pack("<III", 1, 8 << 24, 1)),
    ("const", struct.pack("<III", 0, 10 << 24, 1)),
    ("array", struct.pack("<IIIIII", 0, 3 << 24, 0, 1, 1, 4)),
    ("struct", struct.pack("<IIIIII", 1, 4 << 24 | 1, 4, 1, 1, 0)),
    ("function", struct.pack("<III", 1, 12 << 24, 1)),
]


@pytest.mark.parametrize(("name", "types"), SELF, ids=[name for name, _ in SELF])
def test_types_that_hold_themselves(name: str, types: bytes) -> None:
    from hookline.bpf._objects._elf import _check_types
    from hookline.bpf._types._btf import Btf

    texts = b"\0x\0"
    data = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(texts)) + types + texts
    with pytest.raises(bpf.ObjectError, match=r"holds itself|no prototype"):
        _check_types(Btf(data))
