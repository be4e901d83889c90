"""What is loaded, where it is attached and who holds it: ours and what other programs put there."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf
from hookline.bpf import _syscall
from hookline.bpf._syscall import Command
from hookline.bpf._types import _kernel_types
from hookline.bpf._types._btf import Kind
from tests.kernel.bpf.conftest import Wire, elsewhere, in_thread
from tests.requirements import missing_program, need


def bpftool(*words: str) -> Any:
    need("kernel", missing_program("bpftool"))
    return json.loads(
        subprocess.run(["bpftool", "-j", *words], check=True, capture_output=True, text=True).stdout
    )


def of(program: bpf.Program, namespace: str | None = None) -> list[bpf.Placement]:
    found = [one for one in bpf.placements() if one.program_id == program.id]
    return [one for one in found if namespace is None or one.namespace == namespace]


# Programs and types


def test_programs_are_described_as_bpftool_does(loaded: bpf.Object) -> None:
    shown = {one["id"]: one for one in bpftool("prog", "list")}
    compared = 0
    for info in bpf.programs():
        other = shown.get(info.id)
        if other is None:
            continue  # loaded after bpftool's look
        compared += 1
        assert (info.name, info.type, info.tag) == (other.get("name", ""), other["type"], other["tag"])
        assert (info.uid, info.gpl_compatible) == (other["uid"], other["gpl_compatible"])
        assert (info.memory_bytes, info.btf_id) == (other["bytes_memlock"], other.get("btf_id", 0))
        assert info.recursion_misses == other.get("recursion_misses", 0)
    assert compared >= len(loaded.programs)


def test_types_are_listed_as_bpftool_does(loaded: bpf.Object) -> None:
    ours = {info.id: info for info in bpf.btfs()}
    shown = {one["id"]: one for one in bpftool("btf", "list")}
    mine = loaded.programs["add"].info.btf_id
    assert {1, mine} <= set(ours) & set(shown)
    for number in set(ours) & set(shown):
        assert ours[number].size == shown[number]["size"]
        assert (ours[number].origin != "program") == shown[number].get("kernel", False)
    assert (ours[1].name, ours[1].origin) == ("vmlinux", "kernel")
    assert bpf.Btf.from_id(mine).find("value", Kind.STRUCT)
    with pytest.raises(bpf.BpfError, match="cannot open BTF"):
        bpf.Btf.from_id(0x7FFFFFFF)


def test_the_kernels_types() -> None:
    kernel = bpf.Btf.vmlinux()
    assert kernel is bpf.Btf.vmlinux()
    assert bpf.Btf.from_id(1) is kernel
    number = kernel.find("tcp_v4_rcv", Kind.FUNC)
    assert number is not None
    assert kernel.c_name(number) == "int tcp_v4_rcv(struct sk_buff * skb)"
    structure = kernel.find("sk_buff", Kind.STRUCT)
    assert structure is not None
    assert _kernel_types.names(0, [number, structure, 0x7FFFFFFF]) == {
        number: "tcp_v4_rcv",
        structure: "sk_buff",
    }


def test_a_modules_types_go_on_from_the_kernels() -> None:
    modules = [info for info in bpf.btfs() if info.origin == "module"]
    if not modules:
        pytest.skip("this kernel has no modules with types (CONFIG_MODULES); Debian's have")
    kernel = bpf.Btf.vmlinux()
    for info in modules:
        types = bpf.Btf.from_id(info.id)
        assert len(types) > len(kernel)
        number = len(types) - 1
        assert _kernel_types.names(info.id, [number]) == {number: types[number].name}
        functions = types.named(Kind.FUNC)
        shown = subprocess.run(
            ["bpftool", "-B", "/sys/kernel/btf/vmlinux", "btf", "dump", "id", str(info.id)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        own = {name: number for name, number in functions.items() if number >= len(kernel)}
        assert all(f"[{number}] FUNC '{name}'" in shown for name, number in own.items())


# Where programs are


def test_links_are_found_on_their_hooks(loaded: bpf.Object, wire: Wire) -> None:
    programs = loaded.programs
    name = wire.namespace.name
    with programs["xdp_pass"].attach_xdp("near") as native, programs["xdp_pass"].attach_xdp("far", "generic"):
        found = {str(one): one for one in of(programs["xdp_pass"])}
        assert set(found) == {"xdp:near:native", "xdp:far:generic"}
        assert found["xdp:near:native"].link_id == native.id
    with programs["on_exception"].attach_raw_tracepoint("xdp_exception") as link:
        assert of(programs["on_exception"]) == [
            bpf.Placement(link.info.program_id, "raw_tracepoint", "xdp_exception", link_id=link.id)
        ]
    # From another namespace, the same has that namespace's name.
    with programs["xdp_drop"].attach_xdp("near"):

        def look() -> list[bpf.Placement]:
            with elsewhere():
                return of(programs["xdp_drop"])

        outside = in_thread(look)
        assert [str(one) for one in outside] == [f"xdp:near:native @{name}"]
    assert of(programs["xdp_pass"]) == []


def test_tcx_is_found_with_and_without_links(loaded: bpf.Object, wire: Wire) -> None:
    if not bpf.features.tcx():
        pytest.skip("this kernel has no tcx (Linux 6.6)")
    tc = loaded.programs["tcx_next"]
    with (
        tc.attach_tc("near", "ingress") as link,
        loaded.programs["tc_mark"].attach_tc("near", "ingress") as other,
    ):
        assert isinstance(link, bpf.Link)
        assert isinstance(other, bpf.Link)
        (found,) = of(tc)
        assert (str(found), found.link_id) == ("tcx:near:ingress", link.id)
    # BPF_PROG_ATTACH makes no link: a raw call, as a foreign program would make it.
    index = _syscall.interface_index("near")
    attach = _syscall.attributes("IIIIIIQ", index, tc.fd, bpf.AttachType.TCX_EGRESS, 0, 0, 0, 0)
    assert _syscall.call(8, attach) == 0  # type: ignore[arg-type]
    try:
        (found,) = of(tc)
        assert (str(found), found.link_id) == ("tcx:near:egress", None)
    finally:
        detach = _syscall.attributes("IIIIIIQ", index, tc.fd, bpf.AttachType.TCX_EGRESS, 0, 0, 0, 0)
        assert _syscall.call(9, detach) == 0  # type: ignore[arg-type]


def test_what_ip_and_tc_attached_is_found(kinds: Path, wire: Wire, pins: Path, loaded: bpf.Object) -> None:
    bpf.pin.directory(pins)
    drop, mark = loaded.programs["xdp_drop"], loaded.programs["tc_mark"]
    drop.pin(pins / "drop")
    mark.pin(pins / "mark")
    wire.run("ip", "link", "set", "dev", "near", "xdpgeneric", "pinned", str(pins / "drop"))
    wire.run("tc", "qdisc", "add", "dev", "near", "clsact")
    for direction in ("ingress", "egress"):
        wire.run(*f"tc filter add dev near {direction} bpf da pinned {pins / 'mark'}".split())
    (xdp,) = of(drop)
    assert (str(xdp), xdp.link_id) == ("xdp:near:generic", None)
    assert sorted(map(str, of(mark))) == ["clsact:near:egress", "clsact:near:ingress"]
    shown = bpftool("net", "show")[0]
    assert (
        shown["xdp"][0]["id"] == drop.id if "id" in shown["xdp"][0] else shown["xdp"][0]["devname"] == "near"
    )


def test_interfaces_that_come_and_go(loaded: bpf.Object, wire: Wire, unique_name: Callable[[], str]) -> None:
    """What stays is found each time, whatever else is made and removed meanwhile."""
    stop = threading.Event()
    name = unique_name()

    def come_and_go() -> None:
        while not stop.is_set():
            subprocess.run(["ip", "netns", "add", name], check=True)
            for words in ("link add left type veth peer name right", "link del left"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
            wire.run("ip", "link", "add", "come", "type", "veth", "peer", "name", "go")
            wire.run("tc", "qdisc", "add", "dev", "come", "clsact")
            wire.run("ip", "link", "del", "come")
            subprocess.run(["ip", "netns", "del", name], check=True)

    with (
        loaded.programs["xdp_pass"].attach_xdp("near"),
        loaded.programs["tc_mark"].attach_tc("near", "egress", hook="clsact"),
    ):
        other = threading.Thread(target=come_and_go)
        other.start()
        try:
            for _ in range(15):
                assert [str(one) for one in of(loaded.programs["xdp_pass"])] == ["xdp:near:native"]
                assert [str(one) for one in of(loaded.programs["tc_mark"])] == ["clsact:near:egress"]
        finally:
            stop.set()
            other.join()
            if (Path("/run/netns") / name).exists():
                subprocess.run(["ip", "netns", "del", name], check=True)


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((words[1] for words in mounts if words[2] == "cgroup2"), "")
    need("kernel", "" if root else "a cgroup2 mount")
    folder = Path(root) / name
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


EGRESS = """
#include "types.h"
SEC("cgroup_skb/egress") int allow(struct __sk_buff *skb)
{
	return 1;
}
char _license[] SEC("license") = "GPL";
"""


def test_cgroups_with_and_without_links(
    compiled: Callable[..., Path], unique_name: Callable[[], str]
) -> None:
    with bpf.Object.open(compiled(EGRESS)) as obj, cgroup(unique_name()) as folder:
        program = obj.load().programs["allow"]
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            attr = _syscall.attributes("IIII", program.fd, directory, 1, 0)
            with bpf.Link(_syscall.checked(Command.LINK_CREATE, attr, "link")) as link:
                (found,) = of(program)
                assert (found.hook, found.target) == ("cgroup", str(folder))
                assert (found.detail, found.link_id) == ("cgroup_inet_egress", link.id)
            attach = _syscall.attributes("IIII", directory, program.fd, 1, 0)
            assert _syscall.call(8, attach) == 0  # type: ignore[arg-type]
            (found,) = of(program)
            assert (found.target, found.detail, found.link_id) == (str(folder), "cgroup_inet_egress", None)
            shown = bpftool("cgroup", "show", str(folder))
            assert [one["id"] for one in shown] == [program.id]
            assert _syscall.call(9, attach) == 0  # type: ignore[arg-type]
        finally:
            os.close(directory)
        assert of(program) == []


TRACING = """
#include "types.h"
SEC("tp_btf/sched_switch") int traced(__u64 *ctx)
{
	return 0;
}
SEC("tracepoint/sched/sched_switch") int scheduled(void *ctx)
{
	return 0;
}
SEC("uprobe") int probed(void *ctx)
{
	return 0;
}
SEC("sk_lookup") int looked(void *ctx)
{
	return 1;
}
SEC("iter/task") int walked(void *ctx)
{
	return 0;
}
char _license[] SEC("license") = "GPL";
"""


def test_what_is_on_no_interface(compiled: Callable[..., Path], wire: Wire) -> None:
    library = next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line
    )
    with bpf.Object.open(compiled(TRACING)) as obj:
        programs = obj.load().programs
        with programs["traced"].attach() as link:
            (found,) = of(programs["traced"])
            assert found.target == "sched_switch"
            assert found.hook in ("raw_tracepoint", "tracing")
            assert isinstance(link, bpf.Link)
            assert found.link_id == link.id
            assert programs["traced"].info.attach_target == "sched_switch"
        with programs["looked"].attach("netns"):
            (found,) = of(programs["looked"])
            assert (found.hook, found.detail, found.namespace) == ("netns", "sk_lookup", "")
        with programs["walked"].attach():
            (found,) = of(programs["walked"])
            assert str(found) == "iter:task"
        release = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]]
        told = release >= [6, 6]
        with programs["scheduled"].attach():
            (found,) = of(programs["scheduled"])
            assert str(found) == ("tracepoint:sched_switch" if told else "perf_event")
        with programs["probed"].attach(f"uprobe:{library}:malloc"):
            (found,) = of(programs["probed"])
            assert found.hook == ("uprobe" if told else "perf_event")
            assert found.target.startswith(library) or not told


def test_perf_events_without_links(compiled: Callable[..., Path]) -> None:
    """As older programs attach: perf_event_open(2) and an ioctl. The process that holds the event tells it."""
    bpf.ensure_tracefs()
    number = int((bpf.pin.TRACEFS / "events/sched/sched_switch/id").read_text())
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(struct.pack("=IIQ", 2, 64, number).ljust(64, b"\0"), 64)
    # The numbers of perf_event_open(2), PERF_EVENT_IOC_SET_BPF and PERF_EVENT_IOC_ENABLE.
    open_event = {"x86_64": 298}.get(os.uname().machine, 241)
    with bpf.Object.open(compiled(TRACING)) as obj:
        program = obj.load().programs["scheduled"]
        event = libc.syscall(open_event, attributes, -1, 0, -1, 8)
        assert event >= 0
        try:
            assert libc.ioctl(event, 0x40042408, program.fd) == 0
            assert libc.ioctl(event, 0x2400, 0) == 0
            assert of(program) == [bpf.Placement(program.id, "tracepoint", "sched_switch")]
        finally:
            os.close(event)


# Who holds it

_HOLD = """
import sys
from hookline import bpf
held = bpf.Program.from_pin(sys.argv[1]), bpf.Map.from_pin(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


def test_holders_and_pins(loaded: bpf.Object, pins: Path, wire: Wire, kinds: Path) -> None:
    program, table = loaded.programs["xdp_pass"], loaded.maps["words_hash"]
    bpf.pin.directory(pins)
    program.pin(pins / "program")
    program.pin(pins / "again")
    table.pin(pins / "map")
    with program.attach_xdp("near") as link:
        link.pin(pins / "link")
        found = bpf.pinned()
        assert found["program", program.id] == (pins / "again", pins / "program")
        assert found["map", table.id] == (pins / "map",)
        assert found["link", link.id] == (pins / "link",)
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _HOLD,
                pins / "program",
                pins / "map",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            assert child.stdout.readline() == b"ready\n"
            held = bpf.holders()
            for key in (("program", program.id), ("map", table.id)):
                by_process = {one.process: one for one in held[key]}
                assert {child.pid, os.getpid()} <= set(by_process)
                assert by_process[child.pid].command == Path(f"/proc/{child.pid}/comm").read_text().strip()
                assert len(by_process[child.pid].descriptors) == 1
            assert [one.process for one in held["link", link.id]] == [os.getpid()]
        finally:
            child.stdin.close()
            child.wait()
            child.stdout.close()
        link.unpin()
    assert not any(kind == "link" and pins in places[0].parents for (kind, _), places in bpf.pinned().items())


# While things come and go


def test_a_thousand_programs_are_listed_soon(loaded: bpf.Object) -> None:
    """And none of those that stay is missed while others go away."""
    with copies_of(loaded.programs["add"], 1000) as copies:
        ids = [bpf.Program._from_fd(os.dup(fd)).id for fd in copies]
        started = time.monotonic()
        listed = {info.id for info in bpf.programs()}
        # A tenth of a second on an idle machine.
        assert time.monotonic() - started < 10
        assert set(ids) <= listed

        def leave() -> None:
            for _ in range(500):
                os.close(copies.pop())

        going = threading.Thread(target=leave)
        going.start()
        while going.is_alive():
            assert set(ids[:500]) <= {info.id for info in bpf.programs()}
        going.join()


@contextmanager
def copies_of(program: bpf.Program, count: int) -> Iterator[list[int]]:
    """Descriptors of many programs with the same instructions; what is left in the list is closed in the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * count + 1000)), hard))
    copies: list[int] = []
    try:
        raw = program.xlated().array.tobytes()
        while len(copies) < count:
            copies.append(load_raw(raw))
        yield copies
    finally:
        for fd in copies:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def load_raw(raw: bytes) -> int:
    """Load a syscall program from its instructions; its descriptor."""
    code, text = ctypes.create_string_buffer(raw, len(raw)), ctypes.create_string_buffer(b"GPL")
    kind = _syscall.PROGRAM_TYPES.index("syscall")
    flags = 1 << 4  # BPF_F_SLEEPABLE, which programs of this type have
    attr = _syscall.attributes(
        "IIQQIIQII",
        kind,
        len(raw) // 8,
        _syscall.address(code),
        _syscall.address(text),
        0,
        0,
        0,
        0,
        flags,
    )
    return _syscall.checked(Command.PROG_LOAD, attr, "cannot load a copy")
