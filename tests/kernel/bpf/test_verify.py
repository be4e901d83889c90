"""The gallery: what is said of each refusal, in plain words and with the line, and that the mended twin is accepted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hookline import bpf, cli
from hookline.bpf import _errors
from hookline.bpf._objects._source import SourceMap

GALLERY = Path(__file__).with_name("gallery")
# What is said of each, wherever it is tested; alternatives where a kernel finds another reason first.
SAID = {
    "unbounded_loop": ("loop may run for ever", "fixed bound|has an end|give the loop an end"),
    "recursion": ("calls itself", "loop with a fixed bound|fixed bound"),
    "packet_access": ("it was not checked that the packet is so long", r"compare with data_end.*12 \+ 1"),
    "pointer_arithmetic": ("without a known limit is added to a map_value pointer", "limit the number"),
    "prohibited_arithmetic": ("arithmetic is not allowed on a pointer", "calculate with numbers"),
    "uninitialised": ("read that may not have been written", "value where it is declared"),
    "leaked_reference": ("not given back on every way out", "submit or discard"),
    "stack": ("bytes of stack together, and 512 is all", "per-CPU array"),
    "stack_frame": ("beyond the 512 bytes of stack", "per-CPU array"),
    "stack_index": ("index of which the verifier does not know", "limit the index"),
    "spill_size": ("less than its 64 bits", "keep pointers in pointers"),
    "null_value": ("may be NULL", r"if \(!value\) return"),
    "value_bounds": ("the value has 64 bytes", "limit the index"),
    "wrong_helper": (r"have no bpf_skb_store_bytes\(\)", "which types have it"),
    "sleeping_helper": ("may sleep", "sleepable program"),
    "too_large": ("one million instructions", "bpf_loop"),
    "licence": ("for programs under the GPL", r'SEC\("license"\) = "GPL"'),
    "spin_lock": ("lock that is held is not given back", "bpf_spin_unlock"),
    "context": ("member of the context", "members that the program type allows"),
    "return_value": ("return a number that its hook does not know", "verdicts"),
    "negative_length": ("may be negative", "unsigned"),
}
NAMES = sorted(SAID)


def marked(name: str) -> set[int]:
    """The lines that a refusal may name: those with a mark, and all of a loop that is marked."""
    lines = (GALLERY / f"{name}.bpf.c").read_text().splitlines()
    found = {number for number, line in enumerate(lines, 1) if re.search(r"// (refused|reserved)$", line)}
    for number, line in enumerate(lines, 1):
        if line.endswith("// loop"):
            found |= {number, number + 1, number + 2}
    if name == "spin_lock":
        # Both returns are one place in the compiled program: the function's end.
        found |= {number for number, line in enumerate(lines, 1) if line == "}"}
    if name == "stack":
        # The refusal is of the whole program, which begins here.
        found = {number + 3 for number, line in enumerate(lines, 1) if line.startswith('SEC("xdp")')}
    return found


def test_every_picture_is_tested() -> None:
    assert sorted(path.name.removesuffix(".bpf.c") for path in GALLERY.glob("*.bpf.c")) == NAMES
    assert all(marked(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_refusal_is_explained(compiled: Callable[..., Path], name: str) -> None:
    (verdict,) = bpf.verify(compiled(f"../gallery/{name}", "-g"))
    error = verdict.error
    assert isinstance(error, bpf.VerifierError), error
    meaning, mend = SAID[name]
    assert re.search(meaning, error.advice), error.log[-1500:]
    assert re.search(mend, error.mend)
    assert error.source is not None
    assert error.source.file == f"{name}.bpf.c"
    assert error.source.line in marked(name), (error.source, error.log[-1500:])
    text = (GALLERY / f"{name}.bpf.c").read_text().splitlines()[error.source.line - 1]
    assert error.source.text == text.strip()
    assert "\n" not in str(error)
    assert error.omitted > 0
    assert not verdict.accepted


@pytest.mark.parametrize("name", NAMES)
def test_the_mended_twin_is_accepted(compiled: Callable[..., Path], name: str) -> None:
    before = {found.id for found in bpf.programs() if found.name == "example"}
    (verdict,) = bpf.verify(compiled(f"../gallery/{name}", "-g", "-DMENDED"))
    assert verdict.accepted, verdict.error
    assert verdict.instructions > 0
    assert verdict.verified_instructions > 0
    assert verdict.stack_bytes
    assert verdict.duration_ns > 0
    assert {found.id for found in bpf.programs() if found.name == "example"} <= before


@pytest.mark.parametrize("name", [name for name in NAMES if name != "too_large"])
def test_lines_by_the_object_are_the_kernels(compiled: Callable[..., Path], name: str) -> None:
    """Every instruction's line, from ``.BTF.ext``, against the line that the kernel writes beside it (Linux 6.9)."""
    path = compiled(f"../gallery/{name}", "-g")
    with bpf.Object.open(path) as obj, pytest.raises(bpf.VerifierError) as caught:
        obj.load()
    lines = SourceMap(path.read_bytes())
    compared, place = 0, None
    for line in caught.value.log.splitlines()[:2000]:
        told = re.search(r"^; .* @ (\S+):(\d+)$", line)
        step = re.match(r"^(\d+): \([0-9a-f]{2}\)", line)
        if told:
            place = (told[1], int(told[2]))
        elif step and place:
            # The kernel writes a line once, before the first instruction that has it.
            found = lines.find("example", int(step[1]))
            assert found is not None
            if (found.file, found.line) == place:
                compared += 1
            place = None
        elif not line.startswith(";"):
            continue
    if "@ " in caught.value.log and name not in ("stack", "unbounded_loop"):
        assert compared > 0
    assert lines.find("example", 1 << 20) is None
    assert lines.find("nobody", 0) is None


CALLS = """
#include "types.h"
static __noinline int last(int n) { return bpf_get_prandom_u32() + n; }
static __noinline int middle(int n) { return last(n) * 3; }
static long step(__u32 index, void *context) { return (*(int *)context + last(index)) & 1; }
__noinline int visible(int n) { volatile int room[4]; room[n & 3] = n; return room[(n >> 2) & 3]; }
SEC("xdp") int other(struct xdp_md *ctx) { return visible(ctx->ingress_ifindex) & 3; }
SEC("xdp") int example(struct xdp_md *ctx)
{
	int n = middle(ctx->ingress_ifindex);
	bpf_loop(4, step, &n, 0);
	n += last(n) + visible(n);
	return *(__u8 *)(long)ctx->data + n;
}
"""


def test_lines_of_functions_that_are_called(compiled: Callable[..., Path]) -> None:
    """libbpf lays a program and its functions out in its own order; the kernel's lines say which."""
    path = compiled(CALLS)
    with bpf.Object.open(path) as obj:
        obj.only("example")
        with pytest.raises(bpf.VerifierError) as caught:
            obj.load()
    lines = SourceMap(path.read_bytes())
    assert caught.value.source is not None
    assert "ctx->data" in caught.value.source.text
    mended = compiled(CALLS.replace("*(__u8 *)(long)ctx->data + n", "n & 3"))
    fine = SourceMap(mended.read_bytes())
    with bpf.Object.open(mended) as obj:
        obj.only("example")
        obj.load()
        theirs = [line.text for line in obj.programs["example"].xlated().lines]
    # The kernel numbers instructions as they are after verification; the lines follow each other as ours do.
    ours: list[str] = []
    instruction = 0
    while (found := fine.find("example", instruction)) is not None:
        if not ours or ours[-1] != found.text:
            ours.append(found.text)
        instruction += 1
    assert [text for text, before in zip(theirs, ["", *theirs], strict=False) if text != before] == ours
    assert len(set(ours)) > 6
    assert lines.find("other", 0) is not None


def test_without_line_information(compiled: Callable[..., Path]) -> None:
    """A damaged or absent .BTF.ext costs the line, not the error."""
    data = compiled("../gallery/packet_access", "-g").read_bytes()
    (verdict,) = bpf.verify(data.replace(b".BTF.ext\0", b".BTF.gone"[:8] + b"\0"))
    assert isinstance(verdict.error, bpf.VerifierError)
    assert "packet is so long" in verdict.error.advice
    if "@ " not in verdict.error.log:
        assert verdict.error.source is None
    for length in range(0, len(data), 997):
        assert SourceMap(data[:length]).find("example", 0) is None


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("func#0 @0\n0: R1=ctx\ninfinite loop detected at insn 3\n", "for ever"),
        ("back-edge from insn 11 to 7\n", "calls itself"),
        ("recursive call from f() to f()\n", "calls itself"),
        ("R7 !read_ok\n", "not have been written"),
        ("R1 invalid mem access 'scalar'\n", "number is used as a pointer"),
        ("R1 invalid mem access 'inv'\n", "number is used as a pointer"),
        ("bpf_spin_unlock is missing\n", "lock"),
        ("unknown func bpf_skb_store_bytes#9\n", "have no bpf_skb_store_bytes"),
        ("calling kernel function bpf_x is not allowed\n", "may not call"),
        ("invalid access to packet, off=3 size=4, R2(id=0,off=3,r=0)\n", "offset 3"),
        ("something that nobody ever saw\n", ""),
    ],
)
def test_the_words_of_other_kernels(words: str, meaning: str) -> None:
    error = bpf.VerifierError("p", words + "processed 4 insns (limit 1000000)\n")
    assert meaning in error.advice
    assert bool(error.advice) == bool(meaning)
    assert error.mend
    assert words.splitlines()[-1] in str(error)


def test_summaries_of_damaged_logs() -> None:
    for log in ("", "\n\n", "\0\0", "0: (95) exit\n", "; x @ \n", "\x80\n"):
        text, omitted = _errors.summary(log)
        assert text
        assert omitted >= 0
        assert str(bpf.VerifierError("p", log))


# The command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.run(words)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_says_it(compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = compiled("../gallery/null_value", "-g")
    status, text, _ = run(capsys, "verify", str(path))
    assert status == 1
    line = min(marked("null_value"))
    assert f"null_value.bpf.c:{line}  *count += 1;" in text
    assert "may be NULL" in text
    assert "if (!value) return" in text
    assert "processed" not in text
    status, text, _ = run(capsys, "verify", str(path), "--log")
    assert status == 1
    assert "processed" in text


def test_the_command_in_json(
    compiled: Callable[..., Path], kinds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, "verify", str(compiled("../gallery/stack", "-g")), "--json")
    assert status == 1
    (program,) = json.loads(text)["programs"]
    assert program["accepted"] is False
    assert program["refusal"]["source"]["file"] == "stack.bpf.c"
    assert "512" in program["refusal"]["meaning"]
    assert "log" not in program["refusal"]
    status, text, _ = run(capsys, "verify", str(kinds), "--json", "--program", "xdp_pass")
    assert status == 0
    (program,) = json.loads(text)["programs"]
    assert program["program"] == "xdp_pass"
    assert program["refusal"] is None


def test_the_command_of_an_accepted_object(kinds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "verify", str(kinds), "--program", "xdp_pass")
    assert status == 0
    head, row = text.splitlines()
    assert head.split() == ["PROGRAM", "TYPE", "VERDICT", "INSTRUCTIONS", "VERIFIED", "STACK", "TIME"]
    assert row.split()[:3] == ["xdp_pass", "xdp", "accepted"]
    status, _, errors = run(capsys, "verify", str(kinds), "--program", "xdp_pas")
    assert status == 1
    assert "did you mean 'xdp_pass'" in errors


def test_without_rights_it_says_which(kinds: Path) -> None:
    words = [sys.executable, "-m", "hookline", "verify", str(kinds), "--program", "xdp_pass"]
    dropped = ["setpriv", "--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-all"]
    ended = subprocess.run([*dropped, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert "CAP_BPF" in ended.stdout
