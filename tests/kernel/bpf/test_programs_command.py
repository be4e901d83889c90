"""``hookline programs``: what it says of programs of all kinds, ours and others', beside bpftool; programs of one's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf, cli
from hookline.control import user_objects
from tests.kernel.bpf.conftest import Wire
from tests.kernel.bpf.test_introspection import copies_of
from tests.requirements import missing_program, need

PACKET = bytes(64)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that succeeds; its output."""

    def call(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        ended = cli.run(["programs", *map(str, arguments)])
        shown = capsys.readouterr()
        assert ended == status, shown.err
        if status:
            told = re.findall(r"^(error|why|do): ", shown.err, re.MULTILINE)
            assert told == ["error", "why", "do"], shown.err
        return shown.out if not status else shown.err

    return call


@pytest.fixture
def read(run: Callable[..., str]) -> Callable[..., Any]:
    return lambda *arguments: json.loads(run(*arguments, "--json"))


@pytest.fixture
def own(unique_name: Callable[[], str]) -> Iterator[str]:
    """A name for an object, which is unloaded in the end."""
    name = unique_name()
    yield name
    if (user_objects.FOLDER / name).exists():
        user_objects.unload(name)


def bpftool(*words: str) -> Any:
    need("kernel", missing_program("bpftool"))
    return json.loads(
        subprocess.run(["bpftool", "-j", *words], check=True, capture_output=True, text=True).stdout
    )


# list


def test_list_agrees_with_bpftool(read: Callable[..., Any], loaded: bpf.Object) -> None:
    before = {one["id"]: one for one in bpftool("prog", "list")}
    listed = {one["id"]: one for one in read("list")["programs"]}
    after = {one["id"] for one in bpftool("prog", "list")}
    # Others load and unload programs meanwhile: those that were there all the time are listed, exactly.
    assert set(before) & after <= set(listed)
    for number in set(before) & after:
        one, other = listed[number], before[number]
        assert one["name"] == other.get("name", "")
        assert one["instructions"] * 8 == other["bytes_xlated"]
        assert one["jited_bytes"] == other["bytes_jited"]
        assert one["memory_bytes"] == other["bytes_memlock"]
        for name in ("id", "type", "tag", "uid", "gpl_compatible"):
            assert one[name] == other[name]
        assert one["map_ids"] == other.get("map_ids", [])
        assert one["btf_id"] == other.get("btf_id", 0)
        assert abs(one["loaded_at"] - other["loaded_at"]) <= 1
        if "run_cnt" in other:
            assert one["run_count"] >= other["run_cnt"]
    assert {program.id for program in loaded.programs.values()} <= set(listed)


def test_list_shows_where_programs_are(
    read: Callable[..., Any], run: Callable[..., str], loaded: bpf.Object, wire: Wire
) -> None:
    programs = loaded.programs
    with (
        programs["xdp_pass"].attach_xdp("near") as xdp,
        programs["tc_mark"].attach_tc("near", "egress") as tc,
    ):
        listed = {one["id"]: one for one in read("list")["programs"]}
        (place,) = listed[programs["xdp_pass"].id]["attached"]
        assert isinstance(xdp, bpf.Link)
        assert place == {
            "hook": "xdp",
            "target": "near",
            "detail": "native",
            "namespace": "",
            "link_id": xdp.id,
        }
        (place,) = listed[programs["tc_mark"].id]["attached"]
        assert (place["hook"], place["target"], place["detail"]) == (tc.hook, "near", "egress")
        text = run("list", "--type", "xdp")
        row = next(line for line in text.splitlines() if line.split()[0] == str(programs["xdp_pass"].id))
        assert "xdp:near:native" in row
        assert "tc_mark" not in text
    assert listed[programs["add"].id]["attached"] == []


def test_a_link_whose_interface_is_gone_is_detached(
    run: Callable[..., str], loaded: bpf.Object, wire: Wire
) -> None:
    program = loaded.programs["xdp_pass"]
    with program.attach_xdp("near"):
        wire.run("ip", "link", "del", "near")
        row = next(line for line in run("list").splitlines() if line.split()[0] == str(program.id))
        assert "xdp:detached" in row


def test_programs_that_go_away_while_they_are_listed(run: Callable[..., str], kinds: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with bpf.Object.open(kinds) as obj:
                obj.load()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(10):
            json.loads(run("list", "--json"))
    finally:
        stop.set()
        other.join()


def test_a_thousand_programs_are_listed_soon(read: Callable[..., Any], loaded: bpf.Object) -> None:
    with copies_of(loaded.programs["add"], 1000):
        started = time.monotonic()
        listed = read("list")["programs"]
        # About a third of a second on an idle machine.
        assert time.monotonic() - started < 20
        assert len(listed) >= 1000 + len(loaded.programs)


# inspect


def test_inspect_says_everything(
    read: Callable[..., Any], run: Callable[..., str], loaded: bpf.Object, wire: Wire, pins: Path
) -> None:
    program = loaded.programs["xdp_pass"]
    program.pin(pins / "program")
    with program.attach_xdp("near") as link:
        link.pin(pins / "link")
        document = read("inspect", program.id)["program"]
        assert read("inspect", pins / "program")["program"] == document
        shown = bpftool("prog", "show", "id", str(program.id))
        assert (document["tag"], document["map_ids"]) == (shown["tag"], shown["map_ids"])
        assert document["pins"] == [str(pins / "program")]
        assert document["functions"] == [
            {
                "name": "xdp_pass",
                "prototype": "int xdp_pass(struct xdp_md * ctx)",
                "instructions": document["instructions"],
            }
        ]
        assert document["links"] == [
            {"id": link.id, "type": "xdp", "pins": [str(pins / "link")], "holders": []}
        ]
        assert document["maps"][0]["name"] == "cpu_array"
        assert document["verified_instructions"] == program.info.verified_instructions
        text = run("inspect", program.id)
        assert "xdp:near:native" in text
        assert str(pins / "link") in text
        link.unpin()


def test_inspect_names_the_processes(
    read: Callable[..., Any], kinds: Path, pins: Path, loaded: bpf.Object
) -> None:
    loaded.programs["add"].pin(pins / "add")
    script = "import sys; from hookline import bpf; held = bpf.Program.from_pin(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, pins / "add"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        holders = read("inspect", pins / "add")["program"]["holders"]
        assert [one["process"] for one in holders] == [holder.pid]
        assert holders[0]["command"].startswith("python")
        holder.stdin.write("\n")


def test_names_that_mean_several_or_none(run: Callable[..., str], kinds: Path, loaded: bpf.Object) -> None:
    with bpf.Object.open(kinds) as other:
        other.load()
        said = run("inspect", "xdp_grow", status=1)
        numbers = [loaded.programs["xdp_grow"].id, other.programs["xdp_grow"].id]
        assert re.search(r"error: \d+ programs are called 'xdp_grow'", said)
        assert all(str(number) in said for number in numbers)
    assert "did you mean" in run("dump", "xdp_gro", status=1)
    assert "cannot open a program with id 2147483647" in run("inspect", 0x7FFFFFFF, status=1)
    assert "nothing is pinned at" in run("inspect", "/sys/fs/bpf/hookline-absent", status=1)


# dump


def test_dump_agrees_with_bpftool(
    read: Callable[..., Any], run: Callable[..., str], loaded: bpf.Object
) -> None:
    program = loaded.programs["on_switch"]
    shown = bpftool("prog", "dump", "xlated", "id", str(program.id), "opcodes")
    document = read("dump", program.id)
    for one, other in zip(document["instructions"], shown, strict=True):
        # bpftool 7.1 does not know the address of a per-CPU variable: test_code.py.
        if "__percpu" not in one["text"]:
            assert one["text"] == other["disasm"]
        assert bytes.fromhex(one["bytes"])[0] == int(other["opcodes"]["code"], 16)
        assert one.get("source", {}).get("text", "") == other.get("src", "")
    text = run("dump", program.id, "--xlated")
    assert text.startswith("int on_switch(")
    assert "; count();" in text or "return ctx[0] == 7;" in text
    assert "line_num:" in run("dump", program.id, "--lines")
    assert len(run("dump", program.id, "--opcodes").splitlines()) > len(text.splitlines())


def test_dump_of_machine_code(read: Callable[..., Any], run: Callable[..., str], loaded: bpf.Object) -> None:
    program = loaded.programs["on_switch"]
    document = read("dump", program.id, "--jited")
    (function,) = document["functions"]
    assert len(function["bytes"]) // 2 == program.info.jited_bytes
    assert "".join(one["bytes"] for one in function["instructions"]) == function["bytes"]
    text = run("dump", program.id, "--jited")
    assert text.startswith("on_switch: 0x")
    assert "ret" in text or "jmp" in text
    assert "two different dumps" in run("dump", program.id, "--jited", "--xlated", status=2)


# stats and log


def test_stats_of_what_runs(read: Callable[..., Any], loaded: bpf.Object) -> None:
    program = loaded.programs["xdp_pass"]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            program.test_run(PACKET, repeat=1000)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        document = read("stats", "--seconds", 0.5)
    finally:
        stop.set()
        worker.join()
    mine = next(one for one in document["programs"] if one["id"] == program.id)
    assert mine["runs"] >= 1000
    assert mine["runs_per_second"] == pytest.approx(mine["runs"] / document["seconds"])
    assert mine["ns_per_run"] == pytest.approx(mine["run_time_ns"] / mine["runs"])
    assert 0 < mine["cpu_share"] <= os.cpu_count()
    assert document["seconds"] >= 0.5
    assert all(one["runs"] for one in document["programs"])


TALKING = """
#include "types.h"
SEC("syscall") int talk(__u32 *number)
{
	bpf_printk("{word} %u", *number);
	return 0;
}
char _license[] SEC("license") = "GPL";
"""


def test_log_shows_what_programs_write(
    run: Callable[..., str], compiled: Callable[..., Path], unique_name: Callable[[], str]
) -> None:
    word = unique_name()
    with bpf.Object.open(compiled(TALKING.replace("{word}", word))) as obj:
        talk = obj.load().programs["talk"]
        later = threading.Timer(0.3, lambda: talk.test_run(context=(7).to_bytes(4, "little")))
        later.start()
        shown = run("log", "--seconds", "1.5", "--json")
        later.join()
        lines = [json.loads(line) for line in shown.splitlines()]
        (mine,) = [line for line in lines if line["text"].startswith(word)]
        assert (mine["text"], mine["event"], mine["lost"]) == (f"{word} 7", "bpf_trace_printk", 0)
    assert "say one of them" in run("log", "--follow", "--seconds", "1", status=2)


def test_log_ends_quietly_when_interrupted() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hookline", "programs", "log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        held = [os.path.realpath(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        if any(path.endswith("/trace_pipe") for path in held):
            break
        time.sleep(0.05)
    process.send_signal(2)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, b"")


# load and unload


def pinned_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_an_object_outlives_the_command_that_loads_it(
    read: Callable[..., Any], run: Callable[..., str], kinds: Path, wire: Wire, own: str
) -> None:
    command = [sys.executable, "-m", "hookline", "programs", "load", str(kinds), "--name", own]
    places = ["xdp_pass=xdp:near", "tcx_next=tc:near:ingress", "tc_mark=clsact:near:egress"]
    places += ["on_exception=raw_tracepoint:xdp_exception"]
    for place in places:
        command += ["--attach", place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 programs, 20 maps, 4 attachments" in done.stdout
    folder = user_objects.FOLDER / own
    mine = [one for one in read("list", "--mine")["programs"] if any(own in pin for pin in one["pins"])]
    hooks = {one["name"]: [place["hook"] for place in one["attached"]] for one in mine}
    assert len(mine) == 10
    traffic_control = "tcx" if bpf.features.tcx() else "clsact"
    assert {name: hook for name, hook in hooks.items() if hook} == {
        "xdp_pass": ["xdp"],
        "tcx_next": [traffic_control],
        "tc_mark": ["clsact"],
        "on_exception": ["raw_tracepoint"],
    }
    # It works, with nobody there: packets are counted.
    with bpf.Map.from_pin(folder / "maps" / "cpu_array") as counts:
        wire.send(5)
        assert counts[0].sum() >= 5
    assert "is loaded already" in run("load", kinds, "--name", own, status=1)
    assert run("unload", own) == f"{own} is unloaded\n"
    assert not folder.exists()
    assert [one for one in read("list")["programs"] if any(own in pin for pin in one["pins"])] == []
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")
    assert "no object" in run("unload", own, status=1)


def test_a_place_is_given_to_the_program_that_fits(
    read: Callable[..., Any], run: Callable[..., str], kinds: Path, wire: Wire, own: str
) -> None:
    document = read(
        "load",
        kinds,
        "--program",
        "xdp_drop",
        "--program",
        "add",
        "--attach",
        "xdp:near:generic",
        "--name",
        own,
    )
    assert document["object"]["programs"] == ["add", "xdp_drop"]
    assert document["object"]["attachments"] == ["xdp_drop-0"]
    with bpf.Link.from_pin(user_objects.FOLDER / own / "links" / "xdp_drop-0") as link:
        assert link.mode == "generic"
    run("unload", own)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["xdp:near"], "say which: xdp_pass=xdp:near"),
        (["xdp_pass=xdp:near", "absent=xdp:near"], "there is no program 'absent'"),
        (["xdp_pass=xdp:near", "kprobe:tcp_connect"], "no program can be attached to kprobe:tcp_connect"),
        (["xdp_pass=xdp:near", "elsewhere:near"], "no place to attach to"),
        (["xdp_pass=xdp:near", "tc_mark=tc:near:ingress", "xdp_drop=xdp:near"], "XDP program already"),
        (
            ["xdp_pass=xdp:near", "tc_mark=clsact:near:ingress", "tc_drop=tc:absent:egress"],
            "no interface 'absent'",
        ),
        (["xdp_pass=xdp:near", "on_exception=raw_tracepoint:nothing_of_that_name"], "none of that name"),
        (["xdp_pass=xdp:near", "whole=socket:1"], "no place to attach to"),
        ([""], "no place to attach to"),
    ],
)
def test_nothing_stays_of_what_fails(
    run: Callable[..., str], kinds: Path, wire: Wire, own: str, places: list[str], said: str
) -> None:
    options = [word for place in places for word in ("--attach", place)]
    # A place that is none is nonsense in itself, whatever the machine has.
    shown = run("load", kinds, "--name", own, *options, status=2 if said == "no place to attach to" else 1)
    assert said in shown
    assert not (user_objects.FOLDER / own).exists()
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")
    assert "xdp" not in wire.run("ip", "link", "show", "dev", "near")
    assert not [one for one in bpf.placements() if one.target == "near" and not one.namespace]


COUNTING = """
#include "types.h"
__u64 switches = 0, samples = 0;
SEC("tracepoint/sched/sched_switch") int switched(void *ctx)
{
	__sync_fetch_and_add(&switches, 1);
	return 0;
}
SEC("perf_event") int sampled(void *ctx)
{
	__sync_fetch_and_add(&samples, 1);
	return 0;
}
char _license[] SEC("license") = "GPL";
"""


def test_perf_events_outlive_the_command_too(
    run: Callable[..., str], compiled: Callable[..., Path], own: str
) -> None:
    """A tracepoint's link is pinned, and the links of a sampled event, one for each CPU."""
    places = ["tracepoint:sched/sched_switch", "perf:cpu-clock:100"]
    options = [word for place in places for word in ("--attach", place)]
    command = [
        sys.executable,
        "-m",
        "hookline",
        "programs",
        "load",
        str(compiled(COUNTING)),
        "--name",
        own,
        *options,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    links = user_objects.FOLDER / own / "links"
    assert len(list((links / "sampled-1").iterdir())) == os.cpu_count()

    def counted() -> tuple[int, int]:
        with bpf.Map.from_pin(user_objects.FOLDER / own / "maps" / "bss") as memory:
            return int(memory[0]["switches"]), int(memory[0]["samples"])

    before = counted()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(
        now > then for now, then in zip(counted(), before, strict=True)
    ):
        sum(range(1_000_000))  # samples are taken of what runs
        time.sleep(0.05)
    assert all(now > then for now, then in zip(counted(), before, strict=True))
    run("unload", own)
    assert not (user_objects.FOLDER / own).exists()


def test_a_folder_of_ones_own(run: Callable[..., str], kinds: Path, pins: Path) -> None:
    shown = run("load", kinds, "--program", "add", "--pin", pins)
    assert f"pinned at {pins}" in shown
    assert "programs/add" in pinned_below(pins)
    with bpf.Program.from_pin(pins / "programs" / "add") as program:
        assert program.test_run(context=bytes([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])).verdict == 3
    run("unload", pins)
    assert not pins.exists()
    assert "say one of them" in run("load", kinds, "--pin", pins, "--name", "x", status=2)
    assert "cannot be an object's name" in run("load", kinds, "--name", "a/b", status=2)


def test_an_interface_that_went_is_no_obstacle(
    run: Callable[..., str], kinds: Path, wire: Wire, own: str
) -> None:
    run(
        "load",
        kinds,
        "--name",
        own,
        "--attach",
        "xdp_pass=xdp:near",
        "--attach",
        "tc_mark=clsact:near:egress",
    )
    wire.run("ip", "link", "del", "near")
    run("unload", own)
    assert not (user_objects.FOLDER / own).exists()


# Without rights

# Run once with all rights, so that nothing has to be imported later, when the files may not be readable.
_ORDINARY = """
import contextlib, io, os, shlex, sys
from hookline import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    cli.run(sys.argv[1:])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["programs", "list"],
        ["programs", "inspect", "1"],
        ["programs", "dump", "1"],
        ["programs", "stats"],
        ["programs", "log", "--seconds", "1"],
        ["maps", "list"],
        ["maps", "dump", "1"],
    ],
)
def test_an_ordinary_user_is_told_what_it_takes(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ORDINARY, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "CAP_SYS_ADMIN" in done.stderr
    assert "sudo" in done.stderr
    assert done.stdout == ""


def test_an_ordinary_user_loads_nothing(run: Callable[..., str], own: str) -> None:
    """Refused before anything is read."""
    for words in (["load", "absent.bpf.o", "--name", own], ["unload", own]):
        done = subprocess.run(
            [sys.executable, "-c", _ORDINARY, "programs", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "lacks CAP_BPF" in done.stderr
        assert "sudo " in done.stderr


def test_ids_names_and_pins_are_completed(loaded: bpf.Object, pins: Path) -> None:
    program = loaded.programs["xdp_grow"]
    program.pin(pins / "grown")

    def completed(words: str) -> set[str]:
        asked = {
            "_HOOKLINE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "PATH": "/usr/bin:/bin",
        }
        command = [sys.executable, "-m", "hookline"]
        return set(
            subprocess.run(command, env=asked, capture_output=True, text=True, check=False).stdout.split()
        )

    assert "xdp_grow" in completed("hookline programs inspect xdp_g")
    assert str(program.id) in completed(f"hookline programs dump {program.id}")
    assert str(pins / "grown") in completed(f"hookline programs inspect {pins}")
    assert "words_hash" in completed("hookline maps dump words")
