"""Each hook of the kernel's and of programs' own code: attached, counted, detached."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf
from hookline.bpf import features
from tests.kernel.bpf.conftest import Wire
from tests.kernel.bpf.hooks import Open, each, fires, getppid, supported


@pytest.fixture
def tracefs() -> None:
    bpf.ensure_tracefs()


# Tracepoints


@pytest.mark.feature("hook", "tracepoint")
@pytest.mark.usefixtures("tracefs")
def test_tracepoint(hooked: Open) -> None:
    hook = hooked("tracepoint")
    for link in each(
        hook.program.attach,
        lambda: hook.program.attach("tracepoint:syscalls/sys_enter_getppid"),
        lambda: hook.program.attach_tracepoint("syscalls/sys_enter_getppid", cookie=7),
    ):
        assert link.hook == "perf_event"
        fires(hook, link, getppid)


@pytest.mark.usefixtures("tracefs")
def test_a_tracepoint_that_is_not_there(hooked: Open) -> None:
    program = hooked("tracepoint").program
    with pytest.raises(bpf.BpfError, match="did you mean syscalls/sys_enter_getppid"):
        program.attach_tracepoint("syscalls/sys_enter_getpppid")
    with pytest.raises(bpf.BpfError, match=r"did you mean sched/…"):
        program.attach_tracepoint("shed/sched_switch")
    for bad in ("sched_switch", "/sched_switch", "a/b/c", ""):
        with pytest.raises(bpf.BpfError, match="is no tracepoint"):
            program.attach_tracepoint(bad)


def test_raw_tracepoint(hooked: Open) -> None:
    hook = hooked("raw_tracepoint")
    for link in each(
        hook.program.attach,
        lambda: hook.program.attach("raw_tracepoint:sys_enter"),
    ):
        assert link.hook == "raw_tracepoint"
        assert link.info.name == "sys_enter"
        assert link.info.target == "sys_enter"
        fires(hook, link, getppid)
    with pytest.raises(bpf.BpfError, match="there is none of that name"):
        hook.program.attach_raw_tracepoint("sys_entre")


@pytest.mark.feature("hook", "tp_btf")
def test_tp_btf(hooked: Open) -> None:
    hook = hooked("tp_btf")
    for link in each(
        hook.program.attach,
        hook.program.attach_tracing,
    ):
        fires(hook, link, getppid)


# Kernel functions


@pytest.mark.feature("hook", "kprobe")
def test_kprobe(hooked: Open) -> None:
    supported("kprobe")
    hook = hooked("kprobe")
    function = bpf.system_call("getppid")
    for link in each(
        hook.program.attach,
        lambda: hook.program.attach(f"kprobe:{function}"),
        lambda: hook.program.attach("ksyscall:getppid"),
        lambda: hook.program.attach_kprobe(function, cookie=3),
    ):
        assert isinstance(link, bpf.Link)
        if link.info.event:
            assert (link.info.event, link.info.name, link.info.offset) == ("kprobe", function, 0)
            assert link.info.target == f"kprobe {function}"
        fires(hook, link, getppid)


@pytest.mark.feature("hook", "kretprobe")
def test_kretprobe(hooked: Open) -> None:
    supported("kprobe")
    hook = hooked("kretprobe")
    function = bpf.system_call("getppid")
    for link in each(
        lambda: hook.program.attach(f"kretprobe:{function}"),
        lambda: hook.program.attach_kprobe(function, returns=True),
    ):
        fires(hook, link, getppid)
    with pytest.raises(bpf.BpfError, match="a return has no offset"):
        hook.program.attach_kprobe(function, offset=4, returns=True)


@pytest.mark.usefixtures("tracefs")
def test_a_function_that_is_not_there(hooked: Open) -> None:
    supported("kprobe")
    program = hooked("kprobe").program
    with pytest.raises(bpf.BpfError, match=r"did you mean tcp_v4_connect\?"):
        program.attach_kprobe("tcp_v4_conect")
    with pytest.raises(bpf.BpfError, match="no such function"):
        program.attach_kprobe("qqqqqqqqqqqqqqqqqq")


@pytest.mark.feature("hook", "kprobe.multi")
@pytest.mark.usefixtures("tracefs")
@pytest.mark.parametrize("returns", [False, True])
def test_kprobe_multi(hooked: Open, returns: bool) -> None:
    supported("kprobe.multi")
    hook = hooked("kretprobe_multi" if returns else "kprobe_multi")
    one, other = bpf.system_call("getcwd"), bpf.system_call("getpgid")
    kind = "kretprobe.multi" if returns else "kprobe.multi"
    for link in each(
        lambda: hook.program.attach_kprobe_multi([one, other], returns=returns),
        lambda: hook.program.attach(f"{kind}:{one},{other}"),
        lambda: hook.program.attach_kprobe_multi(one.replace("getcwd", "get[cp][wg][di]*"), returns=returns),
    ):
        assert isinstance(link, bpf.Link)
        assert link.hook == "kprobe_multi"
        assert link.info.count in (0, 2)  # told from Linux 6.6 on
        with hook.more(5):
            for _ in range(5):
                os.getpgid(0)
        fires(hook, link, os.getcwd)
    with pytest.raises(bpf.BpfError, match="no function of the kernel matches 'qq\\*'"):
        hook.program.attach_kprobe_multi("qq*")
    with pytest.raises(bpf.BpfError, match="did you mean"):
        hook.program.attach_kprobe_multi([one, one + "x"])
    with pytest.raises(bpf.BpfError, match=r"loaded for trace_kprobe_multi.*expect_attach_type"):
        hook.program.attach_kprobe(one)


def test_without_kprobes_it_says_so(hooked: Open) -> None:
    if features.attach("kprobe"):
        pytest.skip("this kernel has kprobes")
    with pytest.raises(bpf.FeatureMissing, match=r"no kprobes.*CONFIG_KPROBE_EVENTS.*fentry"):
        hooked("kprobe").program.attach_kprobe("tcp_v4_connect")


# Typed tracing


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.feature("hook", name)) for name in ("fentry", "fexit", "fmod_ret")],
)
def test_entry_exit_and_return(hooked: Open, name: str) -> None:
    supported(name)
    # A return may be changed only where the kernel says so; security_* functions are such.
    hook = hooked(name, target=("security_socket_create", None))
    for link in each(
        hook.program.attach,
        lambda: hook.program.attach("tracing"),
        hook.program.attach_tracing,
    ):
        assert link.hook == "tracing"
        assert link.info.target == {"fmod_ret": "modify_return"}.get(name, name)
        fires(hook, link, lambda: socket.socket().close())


@pytest.mark.feature("hook", "LSM")
def test_lsm(hooked: Open) -> None:
    supported("lsm")
    hook = hooked("lsm")
    with hook.program.attach() as link:
        fires(hook, link, lambda: socket.socket().close())


@pytest.mark.feature("hook", "freplace")
def test_freplace(hooked: Open, wire: Wire) -> None:
    supported("freplace")
    whole = hooked("xdp")
    part = hooked("freplace", target=("decide", whole.program))
    packet = bytes(64)
    assert whole.program.test_run(packet).verdict == 2
    with part.program.attach() as link:
        assert link.hook == "tracing"
        assert whole.program.test_run(packet).verdict == 1
        with whole.program.attach_xdp("near"), part.more(3):
            wire.send(3)
    assert whole.program.test_run(packet).verdict == 2


def test_a_function_without_a_type_is_named(hooks_file: Path) -> None:
    with bpf.Object.open(hooks_file) as obj:
        obj.only("on_fentry")
        with pytest.raises(bpf.BpfError, match="'on_fentry' cannot attach to 'qqqq'"):
            obj.set_attach_target("on_fentry", "qqqq")


# Programs and libraries


LIBC = ctypes.CDLL("libc.so.6")


def a64l() -> None:
    LIBC.a64l(b"A")


@pytest.mark.feature("hook", "uprobe")
def test_uprobe_in_a_library(hooked: Open) -> None:
    hook = hooked("uprobe")
    for link in each(
        hook.program.attach,
        lambda: hook.program.attach("uprobe:libc.so.6:a64l"),
        lambda: hook.program.attach_uprobe("libc.so.6", "a64l", cookie=9),
        lambda: hook.program.attach_uprobe("libc.so.6", "a64l", pid=os.getpid()),
    ):
        assert isinstance(link, bpf.Link)
        if link.info.event:
            assert link.info.event == "uprobe"
            assert link.info.name.endswith("libc.so.6")
            assert link.info.offset > 0
        fires(hook, link, a64l)


@pytest.mark.feature("hook", "uretprobe")
def test_uretprobe(hooked: Open) -> None:
    hook = hooked("uretprobe")
    for link in each(
        lambda: hook.program.attach("uretprobe:libc.so.6:a64l"),
        lambda: hook.program.attach_uprobe("libc.so.6", "a64l", returns=True),
    ):
        fires(hook, link, a64l)


def test_uprobe_in_a_program(executable: Path, hooks_file: Path) -> None:
    """A position-independent program's own symbols, local ones too; counted by its process number."""
    with bpf.Object.open(hooks_file) as obj:
        obj.only("on_uprobe")
        started = subprocess.Popen(
            [sys.executable, "-c", f"input(); import os; os.execv({str(executable)!r}, ['program', '6'])"],
            stdin=subprocess.PIPE,
        )
        obj.constants["only_process"] = started.pid
        program = obj.load().programs["on_uprobe"]
        hook = int(obj.btf.enums()["hook"]["HOOK_uprobe"])
        with program.attach_uprobe(executable, "work"):
            started.communicate(b"\n")
            assert started.returncode == 0
        assert int(obj.maps["hits"][hook]) == 6


@pytest.mark.feature("hook", "uprobe.multi")
@pytest.mark.parametrize("returns", [False, True])
def test_uprobe_multi(hooked: Open, returns: bool) -> None:
    supported("uprobe.multi")
    hook = hooked("uretprobe_multi" if returns else "uprobe_multi")
    kind = "uretprobe.multi" if returns else "uprobe.multi"
    for link in each(
        lambda: hook.program.attach_uprobe_multi("libc.so.6", ["a64l", "l64a"], returns=returns),
        lambda: hook.program.attach_uprobe_multi("libc.so.6", "?64?", returns=returns, pid=os.getpid()),
        lambda: hook.program.attach(f"{kind}:libc.so.6:a64l,l64a"),
    ):
        assert isinstance(link, bpf.Link)
        assert link.hook == "uprobe_multi"
        if link.info.name:
            assert link.info.name.endswith("libc.so.6")
            assert link.info.count == 2
        with hook.more(5):
            for number in range(5):
                LIBC.l64a(number)
        fires(hook, link, a64l)
    with pytest.raises(bpf.BpfError, match="matches 'qq\\*'"):
        hook.program.attach_uprobe_multi("libc.so.6", "qq*")
    with pytest.raises(bpf.BpfError, match="there is no process"):
        hook.program.attach_uprobe_multi("libc.so.6", "a64l", pid=0x3FFFFF)


def test_without_uprobe_multi_it_says_so(hooked: Open) -> None:
    program = hooked("uprobe_multi").program
    if features.attach("uprobe.multi"):
        pytest.skip("this kernel has uprobe.multi")
    with pytest.raises(bpf.FeatureMissing, match=r"Linux 6\.6"):
        program.attach_uprobe_multi("libc.so.6", "a64l")


# Iterators


@pytest.mark.feature("hook", "iterator over tasks")
def test_task_iterator(hooked: Open) -> None:
    hook = hooked("iter_task")
    with hook.program.attach() as link:
        assert isinstance(link, bpf.Iterator)
        assert (link.hook, link.info.name) == ("iter", "task")
        listed = {int(line.split()[0]) for line in link.text().splitlines()}
        assert {os.getpid(), os.getppid()} <= listed
        with link.open() as file:
            assert file.readline().split()
    count = hook.hits()
    assert count >= 2 * len(listed)
    with hook.program.attach_iterator(process=os.getpid()) as link:
        threads = {line.split()[1] for line in link.text().splitlines()}
        assert threads == set(os.listdir("/proc/self/task"))
    with hook.program.attach_iterator(thread=os.getpid()) as link:
        assert link.read() == f"{os.getpid()} {os.getpid()}\n".encode()
        if link.info.process_id:
            assert link.info.process_id == os.getpid()
        with hook.more(1):
            link.read()


@pytest.mark.feature("hook", "iterator over a map")
def test_map_iterator(hooked: Open) -> None:
    hook = hooked("iter_map")
    numbers = hook.object.maps["numbers"]
    for key, value in ((1, 10), (2, 20), (3, 30)):
        numbers[key] = value
    with hook.program.attach_iterator(map=numbers) as link:
        assert link.info.name == "bpf_map_elem"
        assert link.info.map_id == numbers.id
        with hook.more(3):
            data = link.read()
    assert sorted(memoryview(data).cast("Q")) == [10, 20, 30]
    with pytest.raises(bpf.BpfError, match=r"attach_iterator\(map=…\)"):
        hook.program.attach()
    with pytest.raises(bpf.BpfError, match="more than one"):
        hook.program.attach_iterator(map=numbers, process=1)
    with pytest.raises(bpf.BpfError, match="use attach_iterator"):
        hook.program.attach_tracing()


def test_cgroup_iterator(hooked: Open, unique_name: Callable[[], str]) -> None:
    hook = hooked("iter_cgroup")
    top = bpf.cgroup_folder() / unique_name()
    folders = [top, top / "a", top / "a" / "b"]
    for folder in folders:
        folder.mkdir()
    try:
        numbers = [folder.stat().st_ino for folder in folders]
        for order, expected in (
            ("self", numbers[:1]),
            ("descendants", numbers),
            ("descendants-last", numbers[::-1]),
        ):
            with hook.program.attach_iterator(cgroup=top, order=order) as link:  # type: ignore[arg-type]
                assert link.info.cgroup_id in (0, numbers[0])
                assert [int(line) for line in link.text().split()] == expected
        with hook.program.attach_iterator(cgroup=folders[2], order="ancestors") as link:
            assert [int(line) for line in link.text().split()][:3] == numbers[::-1]
    finally:
        for folder in reversed(folders):
            folder.rmdir()


def test_iterators_see_their_network_namespace(hooked: Open, wire: Wire) -> None:
    hook = hooked("iter_tcp")
    with hook.program.attach() as link, contextlib.ExitStack() as opened:
        assert isinstance(link, bpf.Iterator)
        with hook.more(0):
            link.read()
        for _ in range(3):
            server = opened.enter_context(socket.socket())
            server.bind(("127.0.0.1", 0))
            server.listen()
        with hook.more(3):
            link.read()


def test_a_pinned_iterator_is_a_file(hooked: Open, pins: Path) -> None:
    hook = hooked("iter_task")
    with hook.program.attach_iterator(process=os.getpid()) as link:
        link.pin(pins / "threads")
    text = (pins / "threads").read_text()
    assert text.startswith(f"{os.getpid()} ")
    with bpf.Iterator.from_pin(pins / "threads") as adopted:
        assert adopted.text() == text
        adopted.detach()
    assert not (pins / "threads").exists()


# Perf events


def touch_pages(count: int) -> None:
    with mmap.mmap(-1, count * mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(count):
            memory[page * mmap.PAGESIZE] = 1


@pytest.mark.feature("hook", "perf event: page faults")
def test_page_faults_of_this_process(hooked: Open) -> None:
    hook = hooked("perf_event")
    with hook.program.attach_perf_event("page-faults", pid=os.getpid()) as link:
        assert isinstance(link, bpf.LinkGroup)
        assert link.hook == "perf_event"
        before = hook.hits()
        touch_pages(200)
        assert hook.hits() - before >= 200
    with hook.more(0):
        touch_pages(200)


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.feature("hook", "perf event: clock of every CPU")
def test_clock_samples_every_cpu(hooked: Open) -> None:
    hook = hooked("perf_event")
    with hook.program.attach("perf:cpu-clock:1000") as link:
        assert isinstance(link, bpf.LinkGroup)
        assert len(link.links) == os.cpu_count()
        before = hook.hits()
        busy(0.3)
        assert hook.hits() - before > 30
    with hook.more(0):
        busy(0.1)


def test_perf_events_are_pinned_together(hooked: Open, pins: Path) -> None:
    hook = hooked("perf_event")
    with hook.program.attach_perf_event("cpu-clock", period=1_000_000) as link:
        link.pin(pins / "samples")
        with pytest.raises(bpf.BpfError, match=r"it has a pin .*unpin\(\) it first"):
            link.pin(pins / "others")
        with (
            hook.program.attach_perf_event("cpu-clock", period=1_000_000) as other,
            pytest.raises(bpf.BpfError, match="something is pinned there"),
        ):
            other.pin(pins / "samples")
    before = hook.hits()
    busy(0.1)
    assert hook.hits() > before
    with bpf.LinkGroup.from_pin(pins / "samples") as adopted:
        assert len(adopted.links) == os.cpu_count()
        with pytest.raises(bpf.BpfError, match="no update for links of type perf_event"):
            adopted.update(hook.program)
        adopted.detach()
    assert not (pins / "samples").exists()
    with hook.more(0):
        busy(0.1)
    with pytest.raises(bpf.BpfError, match="no folder of pinned links"):
        bpf.LinkGroup.from_pin(pins / "absent")
    with pytest.raises(bpf.BpfError, match="no software event 'cpu-clok'"):
        hook.program.attach("perf:cpu-clok")


# Syscall programs


@pytest.mark.feature("hook", "syscall program")
def test_a_syscall_program_is_run(hooked: Open, loaded: bpf.Object) -> None:
    hook = hooked("syscall")
    context = (ctypes.c_uint32 * 3)(20, 22, 0)
    with hook.more(1):
        outcome = hook.program.run(context)
    assert outcome.verdict == 7
    assert list(context) == [20, 22, 42]
    assert hook.program.run(bytes(context)).context == bytes(context)
    with pytest.raises(bpf.BpfError, match="cannot be run by itself"):
        loaded.programs["xdp_pass"].run()


@pytest.mark.usefixtures("tracefs")
def test_cookies_tell_one_attachment_from_another(hooked: Open) -> None:
    def check(name: str, attach: Callable[[bpf.Program], Any], event: Callable[[], object]) -> None:
        hook = hooked(name)
        number = int(hook.object.btf.enums()["hook"][f"HOOK_{name}"])
        with attach(hook.program), hook.more(1):
            event()
        assert hook.object.maps["numbers"][number] == 0x1234567890

    cookie = 0x1234567890
    function = bpf.system_call("getcwd")
    check("tracepoint", lambda p: p.attach_tracepoint("syscalls/sys_enter_getppid", cookie=cookie), getppid)
    check("uprobe", lambda p: p.attach_uprobe("libc.so.6", "a64l", cookie=cookie), a64l)
    if features.attach("uprobe.multi"):
        check("uprobe_multi", lambda p: p.attach_uprobe_multi("libc.so.6", ["a64l"], cookie=cookie), a64l)
    if features.attach("kprobe"):
        check("kprobe", lambda p: p.attach_kprobe(function, cookie=cookie), os.getcwd)
    if features.attach("kprobe.multi"):
        check("kprobe_multi", lambda p: p.attach_kprobe_multi([function], cookie=cookie), os.getcwd)


def test_a_program_for_another_hook_is_refused(hooked: Open, loaded: bpf.Object) -> None:
    stranger = loaded.programs["xdp_pass"]
    attempts: list[Callable[[], object]] = [
        lambda: stranger.attach_tracepoint("sched/sched_switch"),
        lambda: stranger.attach_kprobe("tcp_v4_connect"),
        lambda: stranger.attach_kprobe_multi(["tcp_v4_connect"]),
        lambda: stranger.attach_uprobe("libc.so.6", "a64l"),
        lambda: stranger.attach_uprobe_multi("libc.so.6", "a64l"),
        stranger.attach_tracing,
        stranger.attach_iterator,
        stranger.attach_perf_event,
        lambda: stranger.attach_cgroup("/"),
        stranger.attach_netns,
        lambda: stranger.attach_netfilter("ipv4", "input"),
        lambda: stranger.attach_netkit("lo", "primary"),
        lambda: stranger.attach_socket(0),
        lambda: stranger.attach_socket_of(os.getpid(), 0),
        lambda: stranger.attach_sockmap(loaded.maps["words_hash"]),
    ]
    for attempt in attempts:
        with pytest.raises(bpf.BpfError, match=r"'xdp_pass'.*it is of type xdp, and the hook takes"):
            attempt()
