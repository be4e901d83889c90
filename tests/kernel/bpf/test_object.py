"""Opening, configuring and loading objects; what is said of bad ones."""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from hookline import bpf
from hookline.bpf._objects._elf import validate
from hookline.bpf._syscall import PROGRAM_TYPES, name_of
from hookline.bpf._types._btf import Kind
from tests.kernel.bpf.conftest import descriptors

OLD_STYLE = """
#include "types.h"
struct bpf_map_def { unsigned int type, key_size, value_size, max_entries, map_flags; };
struct bpf_map_def counts SEC("maps") = {.type = 1, .key_size = 4, .value_size = 8, .max_entries = 1};
SEC("xdp") int use(struct xdp_md *ctx) { __u32 key = 0; return bpf_map_lookup_elem(&counts, &key) ? 1 : 2; }
"""
UNCHECKED = """
#include "types.h"
SEC("xdp") int reads_wild(struct xdp_md *ctx) { return *(__u8 *)(long)ctx->data; }
"""
WORKING = """
#include "types.h"
SEC("xdp") int fine(struct xdp_md *ctx) { return 2; }
"""


def test_constants_are_typed_and_reach_the_program(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        assert set(obj.constants) == {"port_min", "small", "table", "config", "wanted"}
        assert obj.constants["port_min"] == 1024
        obj.constants["port_min"] = 4242
        obj.constants["table"] = (9, 8, 7, 6)
        obj.constants["config"] = {"high": 3, "mac": b"abcdef"}
        obj.load()
        assert obj.constants["port_min"] == 4242
        assert obj.constants["table"].tolist() == [9, 8, 7, 6]
        assert obj.constants["config"]["low"] == 0
        assert obj.constants["config"]["mac"].tobytes() == b"abcdef"
        assert obj.programs["xdp_grow"].test_run(bytes(64), ingress="lo").verdict == 1
        rodata = obj.maps[".rodata"][0]
        assert rodata["port_min"] == 4242
        with pytest.raises(bpf.BpfError, match="set it before load"):
            obj.constants["port_min"] = 1
    assert obj.constants["port_min"] == 4242


def test_constants_switch_code(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        obj.constants["wanted"] = True
        obj.load()
        assert obj.programs["xdp_grow"].test_run(bytes(64)).verdict == 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("prt_min", 1, "did you mean 'port_min'"),
        ("plain", 1, "has no constant"),
        ("small", 300, "from 0 to 255"),
        ("small", -1, "does not fit"),
        ("small", "1", "takes a number"),
        ("small", 1.5, "takes a number"),
        ("table", [1, 2, 3], r"shape \(4,\)"),
        ("table", [1, 2, 3, 70000], "does not fit"),
        ("table", b"short", "takes 8 bytes"),
        ("config", {"hight": 1}, "did you mean 'high'"),
        ("config", (1, 2), "has 3 members"),
        ("config", 7, "takes low, high, mac"),
    ],
)
def test_constants_refuse(kinds: Path, name: str, value: object, said: str) -> None:
    with bpf.Object.open(kinds) as obj:
        before = {name: np.array(obj.constants[name]).tobytes() for name in obj.constants}
        with pytest.raises(bpf.BpfError, match=said):
            obj.constants[name] = value
        assert {name: np.array(obj.constants[name]).tobytes() for name in obj.constants} == before


def test_resize_and_leave_out(kinds: Path) -> None:
    with bpf.Object.open(kinds.read_bytes(), name="kinds") as obj:
        obj.resize("words_hash", 5000)
        obj.only("xdp_pass", "xdp_drop")
        obj.leave_out("xdp_drop")
        with pytest.raises(bpf.BpfError, match="did you mean 'words_hash'"):
            obj.resize("word_hash", 1)
        with pytest.raises(bpf.BpfError, match="cannot hold 0"):
            obj.resize("words_hash", 0)
        obj.load()
        assert obj.maps["words_hash"].max_entries == 5000
        assert [name for name, program in obj.programs.items() if program.loaded] == ["xdp_pass"]
        with pytest.raises(bpf.BpfError, match="'xdp_drop' is not loaded"):
            _ = obj.programs["xdp_drop"].fd
        with pytest.raises(bpf.BpfError, match="loaded already"):
            obj.load()
        with pytest.raises(bpf.BpfError, match="loaded already"):
            obj.resize("words_hash", 1)


def test_a_map_is_shared_by_reuse(kinds: Path, loaded: bpf.Object) -> None:
    with bpf.Object.open(kinds) as second:
        second.reuse("cpu_array", loaded.maps["cpu_array"])
        second.load()
        assert second.maps["cpu_array"].id == loaded.maps["cpu_array"].id
        assert second.maps["cpu_array"].name == "cpu_array"
        second.programs["xdp_pass"].test_run(bytes(64), repeat=3)
        assert loaded.maps["cpu_array"][0].sum() == 3


def test_a_map_of_another_layout_is_not_reused(
    kinds: Path, loaded: bpf.Object, compiled: Callable[..., Path]
) -> None:
    with bpf.Object.open(kinds) as second:
        with pytest.raises(bpf.ObjectError, match="its type is hash"):
            second.reuse("lru", loaded.maps["words_hash"])
        with pytest.raises(bpf.ObjectError, match="its key_size is"):
            second.reuse("words_hash", loaded.maps["table_hash"])
    swapped = """
#include "types.h"
struct key { __u16 port; __u16 pad; __u32 address; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, struct key); __uint(value_size, 152);
         __uint(max_entries, 64); } table_hash SEC(".maps");
SEC("xdp") int use(struct xdp_md *ctx) { return bpf_map_lookup_elem(&table_hash, &(struct key){}) ? 1 : 2; }
"""
    with (
        bpf.Object.open(compiled(swapped)) as other,
        pytest.raises(bpf.ObjectError, match="laid out differently"),
    ):
        other.reuse("table_hash", loaded.maps["table_hash"])


def test_everything_is_closed_with_the_object(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        obj.load()
        program, counters = obj.programs["xdp_pass"], obj.maps["cpu_array"]
        kept, kept_map = program.duplicate(), counters.duplicate()
    with pytest.raises(bpf.BpfError, match="is closed"):
        program.test_run(bytes(64))
    with pytest.raises(bpf.BpfError, match="is closed"):
        counters.read()
    with kept, kept_map:
        kept.test_run(bytes(64))
        assert kept_map[0].sum() == 1


def test_descriptors_are_not_leaked(kinds: Path, compiled: Callable[..., Path]) -> None:
    bad = compiled(UNCHECKED)

    def once() -> None:
        with bpf.Object.open(kinds) as obj:
            obj.load()
        bpf.Object.open(kinds).close()
        with bpf.Object.open(bad) as refused, pytest.raises(bpf.VerifierError):
            refused.load()

    once()
    before = descriptors()
    for _ in range(100):
        once()
    assert descriptors() == before


def test_truncated_anywhere(kinds: Path) -> None:
    whole = kinds.read_bytes()
    before = descriptors()
    for length in (0, 1, 3, 4, 20, 63, 64, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        with pytest.raises(bpf.ObjectError) as caught:
            bpf.Object.open(whole[:length], name="cut")
        assert caught.value.remedy
        if length >= 4:
            assert "cut is truncated" in str(caught.value)
    assert descriptors() == before


def test_damaged_bytes_are_refused_before_libbpf_sees_them(kinds: Path) -> None:
    """No flipped bit may make the check raise anything but Hookline's own error (test_fuzz.py opens and loads)."""
    whole = kinds.read_bytes()
    choice = random.Random(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(choice.randint(1, 4)):
            place = choice.choice((choice.randrange(64), choice.randrange(len(whole))))
            damaged[place] ^= 1 << choice.randrange(8)
        try:
            validate(bytes(damaged), "damaged")
        except bpf.ObjectError:
            refused += 1
    assert refused > 30


def section_resized(path: Path, name: str, size: int, offset: int) -> bytes:
    """The object, with another size of a section in its types, and another offset of the section's first variable."""
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        start = ELFFile(file).get_section_by_name(".BTF")["sh_offset"]
    header, types, _, texts, _ = struct.unpack_from("<5I", data, start + 4)
    named = data.index(b"\0" + name.encode() + b"\0", start + header + texts) + 1 - (start + header + texts)
    place = start + header + types
    while struct.unpack_from("<I", data, place)[0] != named or data[place + 7] & 0x1F != Kind.DATASEC:
        place += 4
    struct.pack_into("<I", data, place + 8, size)
    struct.pack_into("<I", data, place + 16, offset)
    return bytes(data)


@pytest.mark.parametrize("section", [".rodata", ".bss"])
@pytest.mark.parametrize(("size", "offset"), [(0x40000000, 0x30000000), (0x2000, 0x1000), (4096, 0)])
def test_types_of_a_section_that_has_other_memory(kinds: Path, section: str, size: int, offset: int) -> None:
    """The types of a damaged object speak of memory that is not the section's: nothing is read or written there."""
    with pytest.raises(bpf.ObjectError, match=f"section {section} {size} bytes, and it has"):
        bpf.Object.open(section_resized(kinds, section, size, offset))


def test_foreign_and_old_objects(compiled: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(bpf.ObjectError, match=r"big-endian machines.*-target bpfel"):
        bpf.Object.open(compiled(WORKING, "-g", "-target", "bpfeb"))
    with pytest.raises(bpf.ObjectError, match=r"old style.*__uint\(type"):
        bpf.Object.open(compiled(OLD_STYLE))
    with pytest.raises(bpf.ObjectError, match=r"no type information.*-g"):
        bpf.Object.open(compiled(WORKING, "-g0"))
    with pytest.raises(bpf.ObjectError, match="ELF for machine"):
        bpf.Object.open("/bin/true")
    with pytest.raises(bpf.ObjectError, match="magic number"):
        bpf.Object.open(Path(__file__))
    os.mkfifo(tmp_path / "pipe.bpf.o")
    with (tmp_path / "vast.bpf.o").open("wb") as vast:
        vast.truncate(1 << 40)
    for path, said in (
        (tmp_path / "pipe.bpf.o", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path / "vast.bpf.o", r"1099511627776 bytes.*no object has more"),
        (tmp_path, r"Is a directory.*the object's file in it"),
        ("", "No such file"),
    ):
        with pytest.raises(bpf.ObjectError, match=said):
            bpf.Object.open(path)
    with pytest.raises(bpf.ObjectError, match=r"cannot read.*No such file.*programs build"):
        bpf.Object.open(tmp_path / "absent.bpf.o")


def test_the_verifier_says_why(compiled: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    with bpf.Object.open(compiled(UNCHECKED)) as obj, pytest.raises(bpf.VerifierError) as caught:
        obj.load()
    text = str(caught.value)
    assert "invalid access to packet" in text
    assert "'reads_wild'" in text
    assert "omitted" in text
    assert "\n" not in text
    assert "processed" in caught.value.log
    assert len(caught.value.log.splitlines()) > 4
    assert capfd.readouterr().err == ""


def test_a_program_type_that_does_not_exist(compiled: Callable[..., Path]) -> None:
    strange = WORKING.replace('SEC("xdp")', 'SEC("strange")')
    with bpf.Object.open(compiled(strange)) as obj, pytest.raises(bpf.ObjectError, match="strange"):
        obj.load()


def test_enums_of_the_object(kinds: Path) -> None:
    with bpf.Object.open(kinds) as obj:
        enums = obj.btf.enums()
    assert enums["colour"] == {"RED": 0, "GREEN": 5, "BLUE": 0x80000000}
    assert enums["signed_colour"] == {"DARK": -1, "LIGHT": 1}
    assert enums["wide"] == {"NARROW": 1, "WIDE": 1 << 32}


AT_ONCE = """
import sys, threading
from hookline import bpf
failed = []
def attempt(function):
    try:
        function()
    except bpf.BpfError as error:
        failed.append(str(error))
for number in range(20):
    obj = bpf.Object.open(sys.argv[1])
    more = [obj.close] if number % 2 else [lambda: dict(obj.constants), lambda: obj.resize("words_hash", 9)]
    threads = [threading.Thread(target=attempt, args=(f,)) for f in (obj.load, *more, obj.load)]
    for one in threads: one.start()
    for one in threads: one.join()
    obj.close()
    assert not any(program.loaded for program in obj.programs.values())
    assert obj.constants["port_min"] == 1024
assert len(failed) >= 20, failed
assert all("is loaded already" in said or "is closed" in said for said in failed), failed
"""


def test_threads_load_and_close_one_object(kinds: Path) -> None:
    """In a process of its own: what goes wrong here ends it."""
    words = [sys.executable, "-c", AT_ONCE, str(kinds)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_without_descriptors_nothing_stays(kinds: Path) -> None:
    """Whichever step meets the limit (maps, programs, taking them over), the error says so and all is closed."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = descriptors()
    with bpf.Object.open(kinds) as obj:
        obj.load()
        needed = descriptors() - held
    failed = set()
    # Nearly twice as many are needed while libbpf's own are there.
    for room in range(5, 2 * needed - 8, 3):
        obj = bpf.Object.open(kinds)
        held = descriptors()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (held + room, before[1]))
            with pytest.raises(bpf.BpfError) as caught:
                obj.load()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert not isinstance(caught.value, bpf.VerifierError)
        assert caught.value.errno == errno.EMFILE, caught.value
        failed.add(str(caught.value).partition(":")[0].partition("'")[0])
        assert not obj.loaded
        assert descriptors() == held
        with pytest.raises(bpf.BpfError, match="is closed"):
            obj.load()
    assert failed == {"cannot make map ", "cannot load program ", "cannot load kinds"}


def test_the_log_has_every_program(compiled: Callable[..., Path]) -> None:
    """libbpf empties its log for each program."""
    two = WORKING + WORKING.replace('#include "types.h"', "").replace("fine", "also_fine")
    with bpf.Object.open(compiled(two), log_level=4) as obj:
        assert obj.load().log.count("processed 2 insns") == 2
    with bpf.Object.open(compiled(WORKING + UNCHECKED.replace('#include "types.h"', "")), log_level=4) as obj:
        with pytest.raises(bpf.VerifierError) as caught:
            obj.load()
        assert caught.value.program == "reads_wild"
        assert "invalid access to packet" in caught.value.log
        assert caught.value.log.count("processed ") == 1


def test_a_closed_object_says_so(kinds: Path) -> None:
    obj = bpf.Object.open(kinds)
    obj.close()
    with pytest.raises(bpf.BpfError, match="cannot be set any more: the object is closed"):
        obj.constants["port_min"] = 1
    assert obj.constants["port_min"] == 1024


BITS = """
#include "types.h"
struct bits { __u32 low : 3, high : HIGH, rest : 24; __u32 plain; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, __u32); __type(value, struct bits); __uint(max_entries, 8); }
held SEC(".maps");
const volatile struct bits wanted;
struct bits flags;
__u32 runs;
SEC("xdp") int fine(struct xdp_md *ctx)
{
	__u32 key = 0;
	runs++;
	flags.low = wanted.low;
	return bpf_map_lookup_elem(&held, &key) ? 1 : 2;
}
"""


def test_a_map_with_bitfields_is_reused(compiled: Callable[..., Path]) -> None:
    same = compiled(BITS, "-g", "-DHIGH=5")
    other = compiled(BITS, "-g", "-DHIGH=4")
    with bpf.Object.open(same) as first, bpf.Object.open(same) as second, bpf.Object.open(other) as third:
        first.load()
        second.reuse("held", first.maps["held"])
        with bpf.Map.from_id(first.maps["held"].id) as adopted:
            second.reuse("held", adopted)
        assert second.load().maps["held"].id == first.maps["held"].id
        with pytest.raises(bpf.ObjectError, match="laid out differently"):
            third.reuse("held", first.maps["held"])


def test_a_variable_with_bitfields_leaves_the_others_readable(compiled: Callable[..., Path]) -> None:
    with bpf.Object.open(compiled(BITS, "-g", "-DHIGH=5")) as obj:
        with pytest.raises(bpf.BpfError, match="takes 8 raw bytes"):
            obj.constants["wanted"] = 5
        obj.constants["wanted"] = struct.pack("=II", 5 | 9 << 3, 0)
        obj.load().programs["fine"].test_run(bytes(64), repeat=3)
        variables = obj.maps[".bss"][0]
        assert variables["runs"] == 3
        assert variables["flags"].tobytes() == struct.pack("=II", 5, 0)
        assert obj.constants["wanted"].tobytes() == struct.pack("=II", 5 | 9 << 3, 0)


def test_what_is_no_value_is_refused_by_name(kinds: Path) -> None:
    data = kinds.read_bytes()
    with bpf.Object.open(bytearray(data)) as obj:
        assert obj.name == "object"
        for refused, said in (
            (lambda: bpf.Object.open("a\0b"), "cannot read"),
            (lambda: bpf.Object.open(data, log_level=-1), "no log level -1"),
            (lambda: bpf.Object.open(data, log_level=8), "no log level 8"),
            (lambda: obj.expect_attach_type("xdp_pass", -1), "no attach type -1"),
            (lambda: obj.expect_attach_type("xdp_pass", 1 << 32), "no attach type"),
            (lambda: obj.set_attach_target("xdp_pass", "schedule\0x"), "it is no name"),
            (lambda: bpf.features.helper("xdp", 1 << 31), "no helper 2147483648"),
            (lambda: bpf.features.native_xdp(-1), "no interface -1"),
        ):
            with pytest.raises(bpf.BpfError, match=said):
                refused()
    assert name_of(PROGRAM_TYPES, -1) == "type -1"


def test_an_object_has_any_name_that_a_file_has(kinds: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xe9.bpf.o")
    path.write_bytes(kinds.read_bytes())
    with bpf.Object.open(path) as obj:
        assert obj.programs
