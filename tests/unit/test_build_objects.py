"""The objects that ship: the same bytes from every directory, no text of the source in a release."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from hookline import bpf
from hookline.cli import run
from hookline.datapath.compiler import Clang, CompileError, compile_program, find_clang
from tests.requirements import missing_program
from tools.build_objects import INCLUDE, build_all, compile_object, object_of

SAMPLE = """
#include "sample.h"
#ifdef HOOKLINE_DEBUG
static long (*const trace)(const char *text, unsigned int size, ...) = (void *)6;
#endif
struct {
	int (*type)[1];
	int (*max_entries)[4];
	unsigned int *key;
	struct counted *value;
} counts __attribute__((section(".maps"), used));
static void *(*const lookup)(void *map, const void *key) = (void *)1;
char LICENSE[] __attribute__((section("license"), used)) = "GPL";

__attribute__((section("xdp"), used)) int sample(struct xdp_md *context)
{
	unsigned int marker_of_the_source = context->data_end - context->data;
	struct counted *counted = lookup(&counts, &marker_of_the_source);
#ifdef HOOKLINE_DEBUG
	char text[] = "counting";
	trace(text, sizeof(text));
#endif
	if (counted)
		counted->packets += 1;
	return 2;
}
"""
HEADER = """
struct counted {
	unsigned long packets;
};
struct xdp_md {
	unsigned int data;
	unsigned int data_end;
} __attribute__((preserve_access_index));
"""
MARKER = b"marker_of_the_source = context"


@pytest.fixture(scope="module")
def clang() -> Clang:
    try:
        return find_clang()
    except CompileError as error:
        pytest.skip(str(error))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


def make_checkout(root: Path) -> Path:
    (root / INCLUDE).mkdir(parents=True)
    (root / INCLUDE / "sample.h").write_text(HEADER)
    source(root).write_text(SAMPLE)
    return root


def source(root: Path) -> Path:
    return root / "src" / "hookline" / "datapath" / "sample.bpf.c"


def compiled(root: Path, clang: Clang, *, debug: bool = False) -> bytes:
    output = root / ("debug.o" if debug else "release.o")
    compile_object(source(root), output, root=root, clang=clang, debug=debug)
    return output.read_bytes()


@pytest.mark.parametrize("debug", [False, True])
def test_two_directories_give_the_same_bytes(tmp_path: Path, clang: Clang, debug: bool) -> None:
    roots = [make_checkout(tmp_path / "a"), make_checkout(tmp_path / "elsewhere" / "b")]
    first, second = (hashlib.sha256(compiled(root, clang, debug=debug)).hexdigest() for root in roots)
    assert first == second


def test_release_holds_no_source_text(checkout: Path, clang: Clang) -> None:
    release = compiled(checkout, clang)
    assert MARKER not in release
    assert b"counting" not in release
    assert str(checkout).encode() not in release


def test_debug_holds_source_text_and_prints(checkout: Path, clang: Clang) -> None:
    debug = compiled(checkout, clang, debug=True)
    assert MARKER in debug
    assert b"counting" in debug or b"gnitnuoc" in debug


@pytest.mark.parametrize("debug", [False, True])
def test_object_keeps_types_and_relocations_but_no_dwarf(checkout: Path, clang: Clang, debug: bool) -> None:
    elf = ELFFile(io.BytesIO(compiled(checkout, clang, debug=debug)))
    names = {section.name for section in elf.iter_sections()}
    assert {".BTF", ".BTF.ext", ".maps", "license", "xdp", ".relxdp", ".symtab"} <= names
    assert not {name for name in names if "debug" in name}
    symbols = elf.get_section_by_name(".symtab")
    sample = symbols.get_symbol_by_name("sample")[0]
    assert elf.get_section(sample["st_shndx"]).name == "xdp"
    (relocation,) = elf.get_section_by_name(".relxdp").iter_relocations()
    assert symbols.get_symbol(relocation["r_info_sym"]).name == "counts"
    core_relocations_length = int.from_bytes(elf.get_section_by_name(".BTF.ext").data()[28:32], "little")
    assert core_relocations_length > 0


def test_bpftool_reads_the_stripped_object(checkout: Path, clang: Clang) -> None:
    if missing := missing_program("bpftool"):
        pytest.skip(f"missing: {missing}")
    compiled(checkout, clang)
    command = ["bpftool", "btf", "dump", "-j", "file", str(checkout / "release.o")]
    types = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["types"]
    assert {"counted", "xdp_md", "sample", "counts"} <= {entry.get("name") for entry in types}


def test_only_what_changed_is_compiled(checkout: Path, clang: Clang) -> None:
    assert build_all(checkout) == [source(checkout)]
    assert build_all(checkout) == []
    (checkout / INCLUDE / "sample.h").write_text(HEADER + "struct another { int member; };\n")
    assert build_all(checkout) == [source(checkout)]
    assert build_all(checkout, debug=True) == [source(checkout)]
    object_of(source(checkout)).unlink()
    assert build_all(checkout, debug=True) == [source(checkout)]


def test_error_names_the_file_and_leaves_the_old_object(checkout: Path, clang: Clang) -> None:
    build_all(checkout)
    before = object_of(source(checkout)).read_bytes()
    source(checkout).write_text(SAMPLE.replace("return 2;", "return two;"))
    with pytest.raises(CompileError, match=r"sample\.bpf\.c does not compile:\n.*two"):
        build_all(checkout)
    assert object_of(source(checkout)).read_bytes() == before


def test_no_clang_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="apt-get install clang-19"):
        find_clang()


def test_a_program_of_ones_own_is_compiled(clang: Clang, tmp_path: Path) -> None:
    source, output = tmp_path / "own.bpf.c", tmp_path / "own.bpf.o"
    source.write_text(
        '#include "packet.h"\nSEC("xdp") int own(struct xdp_md *ctx) { return ctx->rx_queue_index; }\n'
    )
    assert compile_program(source, output) == output
    assert b"return ctx->rx_queue_index" in output.read_bytes()
    before = output.read_bytes()
    source.write_text("int broken(")
    with pytest.raises(CompileError, match=r"own.bpf.c does not compile: .*expected"):
        compile_program(source, output)
    assert output.read_bytes() == before
    for header, remedy in (("absent/bpf/bpf_helpers.h", "libbpf-dev"), ("linux/absent.h", "kernel.h")):
        source.write_text(f"#include <{header}>\n")
        with pytest.raises(CompileError) as caught:
            compile_program(source, output)
        assert remedy in caught.value.remedy
    for name, said in (
        ("absent.c", "no such file"),
        (".", "it is a folder"),
        ("own.bpf.o", "does not end with .c"),
    ):
        with pytest.raises(CompileError, match=said):
            compile_program(tmp_path / name, tmp_path / "other.o")
    source.write_text("int fine;\n")
    with pytest.raises(CompileError, match="cannot write"):
        compile_program(source, tmp_path / "absent" / "own.bpf.o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.bpf.c", "own.bpf.o"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    compile_program(source, pipe)
    assert os.read(reader, 1 << 16).startswith(b"\x7fELF")
    os.close(reader)
    assert pipe.is_fifo()


def test_no_clang_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    with pytest.raises(CompileError, match=r"no clang 14 or newer \(apt-get install clang-19\)"):
        find_clang()


def test_the_command_builds_beside_the_source(
    clang: Clang, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.bpf.c").write_text('#include "ring.h"\nRING(events, 4096);\n')
    sources = [str(tmp_path / f"{name}.bpf.c") for name in ("one", "two")]
    assert run(["programs", "build", *sources, "--json"]) == 0
    objects = [str(tmp_path / f"{name}.bpf.o") for name in ("one", "two")]
    assert json.loads(capsys.readouterr().out) == {"objects": objects}
    assert all(Path(path).read_bytes()[:4] == b"\x7fELF" for path in objects)
    assert run(["programs", "build", sources[0], "-o", str(tmp_path / "other.o")]) == 0
    assert (tmp_path / "other.o").exists()
    assert run(["programs", "build", *sources, "-o", "x"]) == 2
    (tmp_path / "one.bpf.c").write_text("int broken(")
    capsys.readouterr()
    assert run(["programs", "build", sources[0]]) == 1
    assert "does not compile" in capsys.readouterr().err


def test_kernel_h_knows_every_map_type(clang: Clang, tmp_path: Path) -> None:
    source = tmp_path / "types.bpf.c"
    names = [f"BPF_MAP_TYPE_{name.upper()}" for name in bpf.features.map_types()]
    source.write_text(
        '#include "kernel.h"\n' + "".join(f"int v{i} = {name};\n" for i, name in enumerate(names))
    )
    warned: list[str] = []
    compile_program(source, tmp_path / "types.bpf.o", warn=warned.append)
    assert warned == []
    source.write_text('#include "kernel.h"\nint v = BPF_MAP_TYPE_ABSENT;\n')
    with pytest.raises(CompileError, match="undeclared"):
        compile_program(source, tmp_path / "types.bpf.o")


def test_warnings_are_told_and_links_followed(clang: Clang, tmp_path: Path) -> None:
    source, output, link = tmp_path / "own.bpf.c", tmp_path / "own.bpf.o", tmp_path / "link.o"
    source.write_text('#include "packet.h"\nSEC("xdp") int f(struct xdp_md *ctx) { int unused; return 2; }\n')
    link.symlink_to(output)
    warned: list[str] = []
    compile_program(source, link, warn=warned.append)
    assert len(warned) == 1
    assert "unused variable" in warned[0]
    assert link.is_symlink()
    assert output.read_bytes().startswith(b"\x7fELF")
