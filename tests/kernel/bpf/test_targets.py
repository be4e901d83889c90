"""Where to attach, as text: every form, from sections too, and what is said of texts that are none."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookline import bpf
from hookline.bpf._links._targets import from_section
from tests.kernel.bpf.conftest import Wire
from tests.kernel.bpf.hooks import Open, supported


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("tracepoint/sched/sched_switch", "tracepoint:sched/sched_switch"),
        ("tp/sched/sched_switch", "tracepoint:sched/sched_switch"),
        ("raw_tp/sys_enter", "raw_tracepoint:sys_enter"),
        ("raw_tracepoint.w/nbd_send_request", "raw_tracepoint:nbd_send_request"),
        ("kprobe/tcp_connect+0x10", "kprobe:tcp_connect+0x10"),
        ("kretprobe/tcp_connect", "kretprobe:tcp_connect"),
        ("ksyscall/getppid", "ksyscall:getppid"),
        ("kprobe.multi/tcp_*", "kprobe.multi:tcp_*"),
        ("kretprobe.multi/tcp_*", "kretprobe.multi:tcp_*"),
        ("uprobe//usr/bin/app:main", "uprobe:/usr/bin/app:main"),
        ("uprobe.s/libc.so.6:malloc", "uprobe:libc.so.6:malloc"),
        ("uretprobe/libc.so.6:malloc", "uretprobe:libc.so.6:malloc"),
        ("uprobe.multi.s/libc.so.6:mall*", "uprobe.multi:libc.so.6:mall*"),
        ("fentry/tcp_connect", "tracing"),
        ("fexit.s/tcp_connect", "tracing"),
        ("fmod_ret/security_file_open", "tracing"),
        ("tp_btf/sched_switch", "tracing"),
        ("lsm.s/file_open", "tracing"),
        ("freplace", "tracing"),
        ("iter/task", "iterator"),
        ("iter.s/task", "iterator"),
        ("sk_lookup", "netns"),
        ("flow_dissector", "netns"),
        ("xdp", ""),
        ("tc", ""),
        ("kprobe", ""),
        ("cgroup/connect4", ""),
        ("socket", ""),
        ("", ""),
    ],
)
def test_sections_name_their_target(section: str, target: str) -> None:
    assert from_section(section) == target


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("xdp", "", r"cannot tell where.*section 'xdp'.*say where: xdp:IFACE"),
        ("xdp", "xpd:near", r"'xpd:near' is no place.*did you mean xdp\?.*Write xdp:IFACE"),
        ("xdp", "xdp", r"'xdp' does not say where.*write xdp:IFACE\[:native"),
        ("xdp", "xdp:near:natve", r"no mode of XDP 'natve'.*did you mean native\?"),
        ("xdp", "xdp:absent", r"there is no interface 'absent'"),
        ("xdp", "tc:near:ingress", r"it is of type xdp, and tc takes sched_cls.*write xdp:IFACE"),
        ("tc", "tc:near", r"no direction ''.*ingress, egress"),
        ("tc", "tc:near:inside", r"no direction 'inside'"),
        ("tc", "netkit:near:middle", r"no end of a netkit pair 'middle'"),
        ("syscall", "", r"attaches to nothing: run\(\)"),
        ("syscall", "xdp:near", r"of type syscall.*run\(\) runs it"),
        ("socket_filter", "", r"attach_socket, attach_socket_of"),
        ("sk_msg", "", r"attach_sockmap"),
        ("connect4", "", r"say where: cgroup:PATH\[:HOOK\]"),
        ("connect4", "cgroup", r"write cgroup:PATH\[:HOOK\]"),
        ("connect4", "cgroup:/sys/fs/absent", r"there is no cgroup /sys/fs/absent"),
        ("connect4", "cgroup:/sys/fs/absent:conect4", r"no hook of a cgroup 'conect4'.*connect4"),
        ("kprobe", "kprobe:do_exit+ten", r"'ten' is no offset"),
        ("uprobe", "uprobe:main", r"'main' is no PATH:FUNCTION.*write uprobe:PATH:FUNCTION"),
        ("uprobe", "uprobe:libc.so.6:", r"is no PATH:FUNCTION"),
        ("perf_event", "perf:cpu-clock:fast", r"'fast' is no frequency"),
        ("perf_event", "perf:cpu-clok", r"no software event 'cpu-clok'.*cpu-clock"),
        ("tracepoint", "tracepoint:", r"'tracepoint' does not say where"),
        ("netfilter", "netfilter:middle", r"no netfilter hook 'middle'.*prerouting"),
        ("netfilter", "netfilter:input:1:2", r"'2' is too much"),
        ("netfilter", "netfilter:input:first", r"'first' is no priority"),
    ],
)
def test_what_is_no_target(hooked: Open, wire: Wire, name: str, text: str, said: str) -> None:
    if name == "netfilter":
        supported("netfilter")
    with pytest.raises(bpf.BpfError, match=f"(?s){said}"):
        hooked(name).program.attach(text)


_WORDS = ["xdp", "tc", "tcx", "cgroup", "netns", "tracepoint", "kprobe", "kprobe.multi", "uprobe", "uprobe.multi", "perf",
          "netfilter", "netkit", "near", "sched/sched_switch", "libc.so.6", "a64l", "ingress", "ipv4", "/", "+", 
          ",", "0x1", "-1", "99999999999999999999", "\0", "\udcff", "é", ""]  # fmt: skip

# A pattern could be put on every function of a library, which all processes would feel.
_LETTERS = st.characters(exclude_characters="*?[")


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(
    words=st.lists(st.sampled_from(_WORDS) | st.text(_LETTERS, max_size=5), max_size=5),
    glue=st.sampled_from(":/+,"),
)
def test_any_text_is_a_target_or_a_bpf_error(some: list[bpf.Program], words: list[str], glue: str) -> None:
    text = glue.join(words)
    for program in some:
        with contextlib.suppress(bpf.BpfError):
            program.attach(text or ":").close()


@pytest.fixture
def some(hooked: Open, wire: Wire) -> list[bpf.Program]:
    """Programs of several types, and an interface in a namespace of its own."""
    names = ("xdp", "tc", "connect4", "tracepoint", "uprobe", "uprobe_multi", "perf_event")
    return [hooked(name).program for name in names]


def test_an_adopted_program_has_no_section(hooked: Open) -> None:
    with (
        bpf.Program.from_id(hooked("xdp").program.id) as adopted,
        pytest.raises(bpf.BpfError, match="it was adopted"),
    ):
        adopted.attach()


def test_a_uprobe_at_an_offset(hooked: Open) -> None:
    from hookline.bpf._links._elf_symbols import Executable, find_file
    from tests.kernel.bpf.test_hooks_trace import a64l

    hook = hooked("uprobe")
    libc = find_file("libc.so.6")
    with hook.program.attach(f"uprobe:{libc}:{Executable(libc).offset_of('a64l'):#x}"), hook.more(3):
        for _ in range(3):
            a64l()


def test_every_kind_is_written_down() -> None:
    assert {re.split(r"[:\[]", form)[0] for form in bpf.TARGETS} >= {
        "xdp", "tc", "tcx", "clsact", "netkit", "netfilter", "cgroup", "netns", "tracepoint", "raw_tracepoint",
        "kprobe", "kretprobe", "kprobe.multi", "uprobe", "uretprobe", "uprobe.multi", "perf",
    }  # fmt: skip


# What is attached to a hook


def test_query_of_tcx(hooked: Open, wire: Wire) -> None:
    if not bpf.features.attach("tcx"):
        with pytest.raises(bpf.FeatureMissing, match="tcx_ingress"):
            bpf.query("tcx:near:ingress")
        return
    hook, other = hooked("tcx_ingress"), hooked("tcx_ingress")
    before = bpf.query("tcx:near:ingress")
    assert before.programs == ()
    with hook.program.attach("tcx:near") as first, other.program.attach_tc("near", "ingress", before="all"):
        assert isinstance(first, bpf.Link)
        found = bpf.query("tcx:near:ingress")
        assert [one.program_id for one in found.programs] == [other.program.id, hook.program.id]
        assert found.programs[1].link_id == first.id
        assert found.revision == before.revision + 2
        with pytest.raises(bpf.BpfError, match="the program is on this hook already"):
            hook.program.attach_tc("near", "ingress")
        third = hooked("tcx_ingress").program
        with third.attach_tc("near", "ingress", expected_revision=found.revision, after=first):
            assert len(bpf.query("tcx:near:ingress").programs) == 3
        # By the number of a link, and of a program, as a command line knows them.
        with (
            bpf.Link.from_id(first.id) as link,
            bpf.Program.from_id(hook.program.id) as program,
            third.attach_tc("near", "ingress", before=link) as placed,
        ):
            assert [one.program_id for one in bpf.query("tcx:near:ingress").programs][1] == third.id
            placed.close()
            with third.attach_tc("near", "ingress", after=program):
                assert [one.program_id for one in bpf.query("tcx:near:ingress").programs][2] == third.id
    assert bpf.query("tcx:near:egress").programs == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tcx:absent:ingress", "no interface 'absent'"),
        ("tcx:near:inside", "no hook of tcx 'inside'"),
        ("cgroup:/absent:connect4", "there is no cgroup /absent"),
        ("cgroup:/:conect4", "did you mean connect4"),
        ("netns:sk_lokup", "did you mean sk_lookup"),
        ("netns:absent:sk_lookup", "no network namespace /run/netns/absent"),
        ("xdp:near", "'xdp:near' is no hook that can be asked.*tcx:IFACE"),
    ],
)
def test_hooks_that_cannot_be_asked(wire: Wire, text: str, said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        bpf.query(text)


# Links of every family: pins, adoption, updates


@pytest.mark.parametrize(
    ("name", "target", "updates"),
    [
        ("xdp", "xdp:near", True),
        ("tcx_ingress", "tcx:near", True),
        ("sk_lookup", "netns", True),
        ("raw_tracepoint", "", False),
        ("tp_btf", "", False),
        ("tracepoint", "", False),
        ("kprobe", "", False),
        ("kprobe_multi", "kprobe.multi:do_nanosleep", False),
        ("uprobe", "", False),
        ("uprobe_multi", "uprobe.multi:libc.so.6:a64l", False),
        ("netfilter", "netfilter:input:77", False),
        ("iter_task", "", True),
    ],
)
def test_links_are_pinned_adopted_and_updated(
    hooked: Open, wire: Wire, pins: Path, name: str, target: str, updates: bool
) -> None:
    probe = {"iter_task": "iter", "tcx_ingress": "tcx"}.get(name, name.replace("_multi", ".multi"))
    supported(probe)
    bpf.ensure_tracefs()
    first, second = hooked(name), hooked(name)
    with first.program.attach(target) as link:
        assert isinstance(link, bpf.Link)
        if updates:
            link.update(second.program, expected=first.program)
            assert link.info.program_id == second.program.id
            with pytest.raises(bpf.LinkChanged, match="nothing was changed"):
                link.update(first.program, expected=first.program)
        else:
            with pytest.raises(bpf.BpfError, match=r"has no update for links of type.*beside the old one"):
                link.update(second.program, expected=first.program)
        link.pin(pins / "link")
        number, kind = link.id, link.hook
    with bpf.Link.from_pin(pins / "link") as adopted:
        assert (adopted.id, adopted.hook) == (number, kind)
        with bpf.Link.from_id(number) as same:
            assert same.info == adopted.info
        # Neither detached it.
        assert adopted.info.program_id == (second if updates else first).program.id
        adopted.detach()
    assert not (pins / "link").exists()
    with pytest.raises(bpf.BpfError, match=f"cannot open a link with id {number}"):
        bpf.Link.from_id(number)


@pytest.mark.parametrize("name", ["raw_tracepoint", "tp_btf", "uprobe", "iter_task", "sk_lookup"])
def test_a_forgotten_link_of_any_family_warns(hooked: Open, name: str) -> None:
    hook = hooked(name)
    with pytest.warns(ResourceWarning, match="neither closed nor pinned"):
        hook.program.attach()


def test_a_detached_link_does_not_warn(hooked: Open, wire: Wire, recwarn: pytest.WarningsRecorder) -> None:
    def forget(attach: Callable[[], object]) -> None:
        attach().detach()  # type: ignore[attr-defined]

    forget(lambda: hooked("xdp").program.attach("xdp:near"))
    forget(hooked("raw_tracepoint").program.attach)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        forget(lambda: hooked("socket_filter").program.attach_socket(one))
    assert not recwarn.list
