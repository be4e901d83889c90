"""What attaching refuses: the kernel would take it for something else, or answer without a reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import Wire
from tests.kernel.bpf.hooks import Open, supported
from tests.kernel.bpf.test_link import grows


def attached(wire: Wire) -> tuple[str, ...]:
    """What ``near`` and ``far`` have of programs, by ip(8), tc(8) and the kernel."""
    devices = json.loads(wire.run("ip", "-j", "-d", "link", "show"))
    said = [str([device.get("xdp") for device in devices]), wire.run("tc", "qdisc", "show")]
    for place in ("near", "far"):
        said += [wire.run("tc", "filter", "show", "dev", place, way) for way in ("ingress", "egress")]
        if bpf.features.tcx():
            said += [str(bpf.query(f"tcx:{place}:{way}").programs) for way in ("ingress", "egress")]
    return tuple(said)


@pytest.mark.parametrize(
    ("program", "attach", "refusal"),
    [
        ("tc_mark", lambda p: p.attach_tc("near", "in"), "no direction 'in'.*ingress, egress"),
        ("tc_mark", lambda p: p.attach_tc("near", "Ingress", hook="tcx"), "mean ingress"),
        ("tc_mark", lambda p: p.attach_tc("near", "ingress", hook="foo"), "no hook of traffic control 'foo'"),
        ("tc_mark", lambda p: p.attach_netkit("near", "pear"), "no end of a netkit pair 'pear'.*mean peer"),
        ("tc_mark", lambda p: p.attach_tc("near", "ingress", before="first"), "'first' is no place"),
        (
            "tc_mark",
            lambda p: p.attach_tc("near", "ingress", before="all", after="all"),
            "takes one neighbour",
        ),
        ("tc_mark", lambda p: p.attach_tc("near", "ingress", expected_revision=-1), "-1 is no revision"),
        ("tc_mark", lambda p: p.attach_tc("near", "ingress", expected_revision=1 << 64), "no revision"),
        ("xdp_pass", lambda p: p.attach_xdp("near", mode="skb"), "no mode of XDP 'skb'.*auto, native"),
        ("xdp_pass", lambda p: p.attach_xdp("near\0by"), r"no interface 'near\\x00by'.*near"),
        ("xdp_pass", lambda p: p.attach_xdp(-1), "no interface -1 "),
        ("xdp_pass", lambda p: p.attach_xdp(1 << 40), "no interface 1099511627776 "),
        ("tc_mark", lambda p: p.attach_xdp("near"), "of type sched_cls, and the hook takes xdp"),
        ("xdp_pass", lambda p: p.attach_tc("near", "ingress"), "of type xdp, and the hook takes sched_cls"),
        (
            "xdp_pass",
            lambda p: p.attach_tc("near", "ingress", hook="clsact"),
            "of type xdp, and the hook takes sched_cls",
        ),
        ("on_switch", lambda p: p.attach_raw_tracepoint("sched_switch\0x"), "zero byte"),
        (
            "xdp_pass",
            lambda p: p.attach_raw_tracepoint("sched_switch"),
            "of type xdp, and the hook takes raw",
        ),
        ("whole", lambda p: p.attach_socket(1 << 40), "it is closed"),
        ("whole", lambda p: p.attach_socket_of(1 << 40, 0), "1099511627776 is no process"),
        ("whole", lambda p: p.attach_socket_of(os.getpid(), 1 << 40), "1099511627776 is no descriptor"),
    ],
)
def test_nothing_is_attached(
    loaded: bpf.Object,
    wire: Wire,
    program: str,
    attach: Callable[[bpf.Program], object],
    refusal: str,
) -> None:
    before = attached(wire)
    with pytest.raises(bpf.BpfError, match=refusal):
        attach(loaded.programs[program])
    assert attached(wire) == before


@pytest.mark.parametrize("priority", [0, -1, 0x10000, 0x10001])
def test_a_priority_that_the_kernel_would_change(loaded: bpf.Object, wire: Wire, priority: int) -> None:
    before = attached(wire)
    for hook in ("auto", "clsact"):
        with pytest.raises(bpf.BpfError, match=f"{priority} is no priority.*from 1 to 65535"):
            loaded.programs["tc_mark"].attach_tc("near", "ingress", hook=hook, priority=priority)
    assert attached(wire) == before
    for fitting in (1, 0xFFFF):
        with loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact", priority=fitting):
            assert grows(loaded, wire) == 5
    assert attached(wire) == before


def test_one_neighbour(loaded: bpf.Object, wire: Wire) -> None:
    supported("tcx")
    ends, goes_on = loaded.programs["tc_mark"], loaded.programs["tcx_next"]
    with ends.attach_tc("near", "ingress") as link:
        assert isinstance(link, bpf.Link)
        before = attached(wire)
        with pytest.raises(bpf.BpfError, match="takes one neighbour"):
            goes_on.attach_tc("near", "ingress", before=link, after=ends)
        with loaded.programs["tc_drop"].attach_tc("far", "ingress") as far:
            assert isinstance(far, bpf.Link)
            for absent in (far, loaded.programs["tc_drop"]):
                with pytest.raises(bpf.BpfError, match="is not on this hook; nothing was changed"):
                    goes_on.attach_tc("near", "ingress", before=absent)
        assert attached(wire) == before


def test_no_direction_to_find_a_filter_in(loaded: bpf.Object, wire: Wire, pins: Path) -> None:
    with loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact", pin=pins / "filter") as made:
        with pytest.raises(bpf.BpfError, match="no direction 'in'"):
            bpf.ClsactFilter.from_pin(pins / "filter", "near", "in")  # type: ignore[arg-type]
        made.detach()


def test_a_link_keeps_its_type_of_program(loaded: bpf.Object, hooked: Open, wire: Wire) -> None:
    tc, xdp = loaded.programs["tc_mark"], loaded.programs["xdp_pass"]
    for hook, way in (("auto", "tcx"), ("clsact", "filter")):
        with tc.attach_tc("near", "ingress", hook=hook) as link:  # type: ignore[arg-type]
            if hook == "auto" and link.hook != "tcx":
                continue
            with pytest.raises(bpf.BpfError, match=f"'xdp_pass'.*{way}.*is of type xdp|of type xdp.*{way}"):
                link.update(xdp)
            assert grows(loaded, wire) == 5
    lookup = hooked("sk_lookup")
    with (
        lookup.program.attach_netns() as link,
        pytest.raises(bpf.BpfError, match=f"of the type.*of the netns link's program {lookup.program.id}"),
    ):
        link.update(tc)


# Namespaces and cgroups


def test_what_is_no_network_namespace(hooked: Open, tmp_path: Path, wire: Wire) -> None:
    program = hooked("sk_lookup").program
    os.mkfifo(tmp_path / "pipe")
    with open("/dev/null") as other:
        for wrong in ("/etc/passwd", "/proc/self/ns/uts", tmp_path, tmp_path / "pipe", other.fileno()):
            with pytest.raises(bpf.BpfError, match="is no network namespace") as caught:
                program.attach_netns(wrong)
            assert not isinstance(caught.value, bpf.FeatureMissing)
    for closed in (-1, 1 << 20):
        with pytest.raises(bpf.BpfError, match=f"no network namespace {closed}"):
            program.attach_netns(closed)
    with pytest.raises(bpf.BpfError, match="zero byte"):
        program.attach_netns("/proc/self/ns/net\0x")
    with pytest.raises(bpf.BpfError, match="/etc/passwd is no network namespace"):
        bpf.query("netns:/etc/passwd:sk_lookup")
    with open(wire.namespace) as there, program.attach_netns(there.fileno()) as link:
        assert link.info.netns_inode == os.fstat(there.fileno()).st_ino


def test_what_is_no_cgroup(hooked: Open) -> None:
    with pytest.raises(bpf.BpfError, match=r"no folder of cgroup v2.*cgroup v2 is at"):
        bpf.query("cgroup:/:connect4")
    with pytest.raises(bpf.BpfError, match="there is no cgroup nope"):
        bpf.query("cgroup:nope:connect4")
    with pytest.raises(bpf.BpfError, match="zero byte"):
        hooked("connect4").program.attach_cgroup("app\0", "connect4")
    walk = hooked("iter_cgroup").program
    with pytest.raises(bpf.BpfError, match="there is no cgroup nope"):
        walk.attach_iterator(cgroup="nope")
    with pytest.raises(bpf.BpfError, match=r"no order of cgroups 'ancestor'.*mean ancestors"):
        walk.attach_iterator(cgroup="", order="ancestor")  # type: ignore[arg-type]


# Processes, events, places in files


@pytest.mark.parametrize(
    ("name", "attach", "refusal"),
    [
        ("uprobe", lambda p: p.attach_uprobe("libc.so.6", "a64l", pid=0), "0 is no process.*getpid"),
        ("uprobe", lambda p: p.attach_uprobe("libc.so.6", "a64l", pid=-1), "-1 is no process"),
        ("uprobe_multi", lambda p: p.attach_uprobe_multi("libc.so.6", "a64l", pid=0), "0 is no process"),
        ("iter_task", lambda p: p.attach_iterator(process=0), "0 is no process"),
        ("iter_task", lambda p: p.attach_iterator(thread=0), "0 is no process"),
        ("perf_event", lambda p: p.attach_perf_event(pid=0), "0 is no process"),
        ("perf_event", lambda p: p.attach_perf_event(cpus=[]), "no CPU was given.*None stands for all"),
        ("perf_event", lambda p: p.attach_perf_event(cpus=[0, 99]), "CPU 99 is not there"),
        ("perf_event", lambda p: p.attach_perf_event(frequency_hz=9, period=9), "both were given"),
        (
            "connect4",
            lambda p: p.attach_cgroup(bpf.cgroup_folder(), -1),
            "-1 is no hook of a cgroup.*connect4",
        ),
        ("perf_event", lambda p: p.attach_perf_event(frequency_hz=1 << 62), "at most.*sample_rate"),
        ("perf_event", lambda p: p.attach_perf_event(frequency_hz=-9), "-9 is no frequency"),
        ("perf_event", lambda p: p.attach_perf_event(period=-1), "-1 is no period"),
        ("perf_event", lambda p: p.attach_perf_event(cookie=1 << 64), "is no cookie.*from 0 to"),
        ("perf_event", lambda p: p.attach_perf_event("cpu-clok"), "no software event.*mean cpu-clock"),
        ("uprobe", lambda p: p.attach_uprobe("libc.so.6", "a64l", cookie=-1), "-1 is no cookie"),
        ("uprobe", lambda p: p.attach_uprobe("libc.so.6", -8), "no instruction at offset -0x8"),
        ("uprobe", lambda p: p.attach_uprobe("libc.so.6", 1 << 40), "no instruction.*it has [0-9]+ bytes"),
        ("uprobe_multi", lambda p: p.attach_uprobe_multi("libc.so.6", [1 << 40]), "no instruction"),
        ("tracepoint", lambda p: p.attach_tracepoint("raw_syscalls/sys_enter\0"), "zero byte"),
    ],
)
def test_a_value_that_means_something_else(
    hooked: Open, name: str, attach: Callable[[bpf.Program], object], refusal: str
) -> None:
    if name == "uprobe_multi":
        supported("uprobe.multi")
    hook = hooked(name)
    with pytest.raises(bpf.BpfError, match=refusal):
        attach(hook.program)


def test_a_kind_is_for_sk_skb_alone(hooked: Open) -> None:
    hook = hooked("sk_msg")
    with pytest.raises(bpf.BpfError, match="kinds are those of sk_skb"):
        hook.program.attach_sockmap(hook.object.maps["sockets"], "verdict")


def test_an_iterator_of_something_else(hooked: Open, loaded: bpf.Object) -> None:
    """The kernel took a map's descriptor for a thread's number."""
    tasks, entries = hooked("iter_task").program, hooked("iter_map").program
    with pytest.raises(bpf.BpfError, match=r"over one map: an iterator of task takes process or thread"):
        tasks.attach_iterator(map=loaded.maps["words_hash"])
    with pytest.raises(bpf.BpfError, match="over one process: an iterator of bpf_map_elem takes map"):
        entries.attach_iterator(process=os.getpid())
    with pytest.raises(bpf.BpfError, match="an iterator of tcp takes no target"):
        hooked("iter_tcp").program.attach_iterator(process=os.getpid())
    with pytest.raises(bpf.BpfError, match="does not iterate over a ringbuf"):
        entries.attach_iterator(map=loaded.maps["ring"])


# Pins


def test_a_second_pin_is_refused(loaded: bpf.Object, wire: Wire, pins: Path) -> None:
    for hook in ("xdp", "clsact"):
        program = loaded.programs["xdp_pass" if hook == "xdp" else "tc_mark"]
        made = (
            program.attach_xdp("near")
            if hook == "xdp"
            else program.attach_tc("near", "ingress", hook="clsact")
        )
        with made as link:
            link.pin(pins / "first")
            with pytest.raises(bpf.BpfError, match=r"it has a pin .*unpin\(\) it first"):
                link.pin(pins / "second")
            assert not (pins / "second").exists()
            link.unpin()
            link.pin(pins / "second")
            link.unpin()
        assert list(pins.iterdir()) == []


def test_a_name_that_bpffs_takes_not(loaded: bpf.Object, pins: Path, tmp_path: Path) -> None:
    words = loaded.maps["words_hash"]
    for place in (pins / "v1.2", pins / "a.b" / "words", pins / "deep" / "a.b" / "words"):
        for refused in (words.pin, bpf.Map.from_pin, bpf.pin.remove, bpf.pin.directory):
            with pytest.raises(bpf.BpfError, match="no names with a dot") as caught:
                refused(place)
            assert not isinstance(caught.value, bpf.NotPermitted)
        for refused_group in (bpf.LinkGroup.from_pin, bpf.LinkGroup([]).pin):
            with pytest.raises(bpf.BpfError, match="no names with a dot"):
                refused_group(place)
    for refused in (words.pin, bpf.Map.from_pin, bpf.pin.remove, bpf.pin.directory):
        with pytest.raises(bpf.BpfError, match="zero byte"):
            refused(pins / "words\0more")
    assert not pins.exists()
    # A dot in the way to the mount is nobody's concern.
    dotted = tmp_path / "bpf.d"
    dotted.mkdir()
    bpf.ensure_bpffs(dotted)
    try:
        words.pin(dotted / "deep" / "words")
        with bpf.Map.from_pin(dotted / "deep" / "words") as adopted:
            assert adopted.id == words.id
    finally:
        subprocess.run(["umount", dotted], check=True)
