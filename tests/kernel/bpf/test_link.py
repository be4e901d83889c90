"""Onto hooks and off again, with real packets: XDP, tcx, clsact, raw tracepoints; pins, updates, foreign programs."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from hookline import bpf
from hookline.bpf import features
from tests.kernel.bpf.conftest import Wire, elsewhere, in_thread, inside
from tests.requirements import need


def counted(obj: bpf.Object) -> int:
    return int(obj.maps["cpu_array"][0].sum())


def grows(obj: bpf.Object, wire: Wire, count: int = 5) -> int:
    """How many of some packets the program met."""
    before = counted(obj)
    wire.send(count)
    deadline = time.monotonic() + 2
    while counted(obj) < before + count and time.monotonic() < deadline:
        time.sleep(0.005)
        if counted(obj) == before and time.monotonic() > deadline - 1.7:
            break
    return counted(obj) - before


def own_links(before: set[int]) -> set[int]:
    """New links that this process holds, or that hold one of its programs: others' come and go meanwhile."""
    held: dict[str, set[int]] = {"link_id": set(), "prog_id": set()}
    for file in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            for name, number in re.findall(r"^(link_id|prog_id):\s*(\d+)", file.read_text(), re.MULTILINE):
                held[name].add(int(number))
    return {
        link.id for link in bpf.links() if link.id in held["link_id"] or link.program_id in held["prog_id"]
    } - before


@pytest.fixture
def links_before() -> set[int]:
    return {link.id for link in bpf.links()}


@pytest.fixture
def tcx() -> None:
    need("kernel", "" if features.tcx() else "tcx (Linux 6.6)")


# XDP


@pytest.mark.feature("hook", "XDP, native and generic")
def test_xdp_native_on_veth_generic_on_lo(loaded: bpf.Object, wire: Wire, links_before: set[int]) -> None:
    program = loaded.programs["xdp_drop"]
    with program.attach_xdp("near") as link:
        assert link.mode == "native"
        assert link.hook == "xdp"
        assert link.info.program_id == program.id
        assert grows(loaded, wire) == 5
        assert own_links(links_before) == {link.id}
    assert grows(loaded, wire) == 0
    assert own_links(links_before) == set()
    with program.attach_xdp("near", mode="generic") as link:
        assert link.mode == "generic"
        assert grows(loaded, wire) == 5
    with program.attach_xdp("lo") as link:
        assert link.mode == "generic"
    with pytest.raises(bpf.BpfError, match="use mode auto or generic"):
        program.attach_xdp("lo", mode="native")
    with pytest.raises(bpf.BpfError, match="use mode auto, native or generic"):
        program.attach_xdp("near", mode="offload")
    assert own_links(links_before) == set()


@pytest.mark.parametrize("interface", ["absent", 54321])
def test_no_such_interface(loaded: bpf.Object, wire: Wire, interface: str | int) -> None:
    def xdp() -> object:
        return loaded.programs["xdp_pass"].attach_xdp(interface)

    def tc() -> object:
        return loaded.programs["tc_mark"].attach_tc(interface, "ingress")

    for attach in (xdp, tc):
        with pytest.raises(bpf.BpfError, match=rf"no interface {interface!r} in this") as caught:
            attach()
        assert "near" in caught.value.remedy


def test_a_program_of_another_type_is_refused(loaded: bpf.Object, wire: Wire) -> None:
    with pytest.raises(bpf.BpfError, match="cannot attach program 'tc_mark'"):
        loaded.programs["tc_mark"].attach_xdp("near")
    for hook in ("auto", "tcx", "clsact"):
        refusal = "cannot attach program 'xdp_pass'"
        if hook == "tcx" and not bpf.features.tcx():
            refusal = "the kernel has no tcx"
        with pytest.raises(bpf.BpfError, match=refusal):
            loaded.programs["xdp_pass"].attach_tc("near", "ingress", hook=hook)
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")


def test_someone_elses_xdp_program_stays(loaded: bpf.Object, wire: Wire) -> None:
    ours, theirs = loaded.programs["xdp_drop"], loaded.programs["xdp_pass"]
    with theirs.attach_xdp("near") as link:
        for mode in ("auto", "native", "generic"):
            with pytest.raises(bpf.BpfError) as caught:
                ours.attach_xdp("near", mode=mode)
            text = str(caught.value)
            assert f"id {theirs.id} 'xdp_pass'" in text
            assert "nothing was changed" in text
            assert f"link {link.id}" in text
        assert link.info.program_id == theirs.id
        assert link.mode == "native"
    near = socket.if_nametoindex("near")
    with IPRoute() as netlink:
        # As ip(8) attaches, without a link.
        netlink.link("set", index=near, xdp_fd=theirs.fd)
        with pytest.raises(bpf.BpfError, match=rf"id {theirs.id} .*ip link set dev near xdp off"):
            ours.attach_xdp("near")
        netlink.link("set", index=near, xdp_fd=-1)
    with ours.attach_xdp("near"):
        pass


@pytest.mark.feature("other", "a link's program replaced in place")
def test_update_with_the_expected_program(loaded: bpf.Object, kinds: Path, wire: Wire) -> None:
    with bpf.Object.open(kinds) as other:
        other.load()
        first, second, third = (
            loaded.programs["xdp_drop"],
            other.programs["xdp_drop"],
            other.programs["xdp_pass"],
        )
        with first.attach_xdp("near") as link:
            link.update(second, expected=first)
            assert link.info.program_id == second.id
            assert (grows(loaded, wire), grows(other, wire)) == (0, 5)
            with pytest.raises(
                bpf.LinkChanged, match=rf"it holds program id {second.id}; nothing was changed"
            ):
                link.update(third, expected=first)
            assert link.info.program_id == second.id
            link.update(third)
            assert link.info.program_id == third.id
            with pytest.raises(bpf.BpfError, match="cannot put program 'tc_mark'"):
                link.update(loaded.programs["tc_mark"])
            assert link.mode == "native"


# Life


@pytest.mark.feature("other", "a pinned link outlives its process")
def test_a_pinned_link_outlives_its_process(
    kinds: Path, pins: Path, wire: Wire, links_before: set[int]
) -> None:
    script = f"""
import os, signal
from hookline import bpf
obj = bpf.Object.open({str(kinds)!r}).load()
link = obj.programs["xdp_drop"].attach_xdp("near")
link.pin({str(pins / "link")!r})
obj.maps["cpu_array"].pin({str(pins / "deep" / "counters")!r})
obj.programs["xdp_drop"].pin({str(pins / "program")!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    with bpf.Map.from_pin(pins / "deep" / "counters") as counters, bpf.Link.from_pin(pins / "link") as link:
        assert link.pinned == pins / "link"
        before = int(counters[0].sum())
        wire.send(7)
        time.sleep(0.1)
        assert int(counters[0].sum()) - before == 7
        with bpf.Program.from_pin(pins / "program") as program:
            assert link.info.program_id == program.id
            assert program.name == "xdp_drop"
            assert counters.id in program.info.map_ids
        # The with block of an adopted link closes it only.
    with bpf.Link.from_pin(pins / "link") as link:
        assert len(own_links(links_before)) == 1
        link.detach()
        assert not (pins / "link").exists()
        assert link.info.interface_index == 0
        link.detach()
    assert own_links(links_before) == set()


def test_unpinning_gives_the_link_back_to_the_descriptor(
    loaded: bpf.Object, pins: Path, wire: Wire, links_before: set[int]
) -> None:
    with loaded.programs["xdp_drop"].attach_xdp("near") as link:
        link.pin(pins / "link")
        link.unpin()
        assert not (pins / "link").exists()
        assert grows(loaded, wire) == 5
    assert own_links(links_before) == set()


def test_bad_pins(loaded: bpf.Object, pins: Path, tmp_path: Path) -> None:
    words = loaded.maps["words_hash"]
    with pytest.raises(bpf.BpfError, match=r"not in a BPF file system.*mount -t bpf"):
        words.pin(tmp_path / "words")
    words.pin(pins / "words")
    with pytest.raises(bpf.BpfError, match=r"something is pinned there.*from_pin"):
        words.pin(pins / "words")
    with pytest.raises(bpf.BpfError, match=r"holds a map.*a link is wanted"):
        bpf.Link.from_pin(pins / "words")
    with pytest.raises(bpf.BpfError, match=r"holds a map.*a program is wanted"):
        bpf.Program.from_pin(pins / "words")
    with pytest.raises(bpf.BpfError, match="nothing is pinned at"):
        bpf.Map.from_pin(pins / "absent")
    with pytest.raises(bpf.BpfError, match="is no pin: it is a directory"):
        bpf.Map.from_pin(tmp_path)
    bpf.pin.remove(pins / "absent")
    bpf.pin.remove(pins / "words")
    assert not (pins / "words").exists()


def test_file_systems_are_mounted_once(unique_name: Any, tmp_path: Path) -> None:
    assert bpf.ensure_bpffs() is False
    assert bpf.ensure_tracefs() in (True, False)
    assert bpf.ensure_tracefs() is False
    place = tmp_path / unique_name()
    place.mkdir()
    assert bpf.ensure_bpffs(place) is True
    try:
        assert bpf.ensure_bpffs(place) is False
        assert bpf.pin.directory(place / "a" / "b").is_dir()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_forgotten_link_warns(loaded: bpf.Object, wire: Wire, pins: Path, links_before: set[int]) -> None:
    def forget(hook: str) -> None:
        if hook == "xdp":
            loaded.programs["xdp_drop"].attach_xdp("near")
        else:
            loaded.programs["tc_mark"].attach_tc("near", "ingress")
        gc.collect()

    for hook in ("xdp", "tc"):
        with pytest.warns(ResourceWarning, match="neither closed nor pinned"):
            forget(hook)
    assert own_links(links_before) == set()
    link = loaded.programs["xdp_drop"].attach_xdp("near")
    link.pin(pins / "link")
    del link
    gc.collect()
    assert len(own_links(links_before)) == 1


def test_a_link_whose_interface_went(loaded: bpf.Object, wire: Wire) -> None:
    with loaded.programs["xdp_drop"].attach_xdp("near") as link:
        wire.run("ip", "link", "del", "near")
        assert link.info.interface_index == 0
        assert link.mode is None


# Traffic control


@pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=pytest.mark.feature("hook", hook)) for hook in ("tcx", "clsact")]
)
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_traffic_control(
    loaded: bpf.Object, wire: Wire, hook: Any, direction: Any, request: pytest.FixtureRequest
) -> None:
    if hook == "tcx":
        request.getfixturevalue("tcx")
    interface = "near" if direction == "ingress" else "far"
    program = loaded.programs["tc_mark"]
    with program.attach_tc(interface, direction, hook=hook) as link:
        assert link.hook == hook
        assert grows(loaded, wire) == 5
    assert grows(loaded, wire) == 0
    link.close()
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", interface)


@pytest.mark.usefixtures("tcx")
def test_the_best_hook_is_chosen(loaded: bpf.Object, wire: Wire) -> None:
    with loaded.programs["tc_mark"].attach_tc("near", "ingress") as link:
        assert link.hook == "tcx"
        assert isinstance(link, bpf.Link)
        assert link.info.attach_type == bpf.AttachType.TCX_INGRESS
        link.update(loaded.programs["tc_drop"], expected=loaded.programs["tc_mark"])
        assert grows(loaded, wire) == 5
        with pytest.raises(bpf.LinkChanged):
            link.update(loaded.programs["tc_mark"], expected=loaded.programs["tc_mark"])


def test_without_tcx_clsact_is_chosen(
    loaded: bpf.Object, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a 6.1 kernel answers, played."""
    from hookline.bpf._links import _attach_tc

    monkeypatch.setattr(_attach_tc, "link_at_interface", lambda *_, **__: -22)
    monkeypatch.setattr(features, "tcx", lambda: features.Finding("tcx", features.Answer.NO, "played"))
    with loaded.programs["tc_mark"].attach_tc("near", "ingress") as link:
        assert link.hook == "clsact"
        assert grows(loaded, wire) == 5
    with pytest.raises(bpf.FeatureMissing, match=r"no tcx: it needs Linux 6\.6") as caught:
        loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="tcx")
    assert caught.value.exit_status == 3


@pytest.mark.feature("hook", "tcx: order and expected revision")
@pytest.mark.usefixtures("tcx")
def test_order_and_revision(loaded: bpf.Object, wire: Wire) -> None:
    """tcx_next goes on to the next program, tc_mark ends the chain."""
    ends, goes_on = loaded.programs["tc_mark"], loaded.programs["tcx_next"]
    with ends.attach_tc("near", "ingress") as first:
        assert isinstance(first, bpf.Link)
        with goes_on.attach_tc("near", "ingress", after="all"):
            assert grows(loaded, wire, 3) == 3
        with goes_on.attach_tc("near", "ingress", before=first):
            before = counted(loaded)
            wire.send(3)
            time.sleep(0.1)
            assert counted(loaded) - before == 6
        with (
            goes_on.attach_tc("near", "ingress", before=ends),
            goes_on.attach_tc("far", "ingress", before="all"),
        ):
            pass
        with pytest.raises(bpf.LinkChanged, match="not at revision 1 any more"):
            goes_on.attach_tc("near", "ingress", expected_revision=1)
    with pytest.raises(bpf.BpfError, match="no order relative"):
        ends.attach_tc("near", "ingress", hook="clsact", before="all")


def test_clsact_leaves_what_others_made(loaded: bpf.Object, wire: Wire) -> None:
    near = socket.if_nametoindex("near")
    wire.run("tc", "qdisc", "add", "dev", "near", "clsact")
    theirs = {"fd": loaded.programs["tcx_next"].fd, "name": "theirs", "direct_action": True}
    with IPRoute() as netlink:
        netlink.tc("add-filter", "bpf", near, 1, parent=0xFFFFFFF2, prio=50, **theirs)
    before = wire.run("tc", "filter", "show", "dev", "near", "ingress")
    for priority in (49, 50):
        with loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact", priority=priority):
            assert grows(loaded, wire) == 5
    assert wire.run("tc", "filter", "show", "dev", "near", "ingress") == before
    assert "clsact" in wire.run("tc", "qdisc", "show", "dev", "near")


def test_the_qdisc_goes_with_the_last_filter(loaded: bpf.Object, wire: Wire) -> None:
    program = loaded.programs["tcx_next"]
    first = program.attach_tc("near", "ingress", hook="clsact")
    second = program.attach_tc("near", "ingress", hook="clsact")
    third = program.attach_tc("near", "egress", hook="clsact")
    assert grows(loaded, wire) == 10
    first.close()
    assert grows(loaded, wire) == 5
    third.close()
    assert "clsact" in wire.run("tc", "qdisc", "show", "dev", "near")
    second.close()
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")


def test_a_clsact_filter_is_updated_pinned_and_adopted(
    loaded: bpf.Object, kinds: Path, wire: Wire, pins: Path
) -> None:
    with bpf.Object.open(kinds) as other:
        other.load()
        with loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact") as link:
            link.pin(pins / "filter")
        assert grows(loaded, wire) == 5
        adopted = bpf.ClsactFilter.from_pin(pins / "filter", "near", "ingress")
        with pytest.raises(bpf.LinkChanged, match="nothing was changed"):
            adopted.update(other.programs["tc_drop"], expected=other.programs["tc_mark"])
        adopted.update(other.programs["tc_drop"], expected=loaded.programs["tc_mark"])
        assert (grows(loaded, wire), grows(other, wire)) == (0, 5)
        adopted.close()
        assert grows(other, wire) == 5
        again = bpf.ClsactFilter.from_pin(pins / "filter", "near", "ingress")
        assert again.program_id == other.programs["tc_drop"].id
        with pytest.raises(bpf.BpfError, match="no egress filter"):
            bpf.ClsactFilter.from_pin(pins / "filter", "near", "egress")
        again.detach()
        again.detach()
        assert not (pins / "filter").exists()
        assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")


def test_a_clsact_filter_survives_a_kill_at_any_step(
    loaded: bpf.Object, kinds: Path, wire: Wire, pins: Path
) -> None:
    """Killed between the pin and the filter, and between the filter's new program and the pin's."""
    place = pins / "filter"
    loaded.programs["tc_mark"].pin(place)
    with pytest.raises(bpf.BpfError, match="no ingress filter"):
        bpf.ClsactFilter.from_pin(place, "near", "ingress")
    place.unlink()
    loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact", pin=place).close()
    with bpf.Object.open(kinds) as other:
        newer = other.load().programs["tc_mark"]
        coming = pins / "filter~"
        newer.pin(coming)
        unchanged = bpf.ClsactFilter.from_pin(place, "near", "ingress")
        assert unchanged.program_id == loaded.programs["tc_mark"].id
        unchanged.pinned = None
        unchanged.update(newer)
        unchanged.pinned = place
        adopted = bpf.ClsactFilter.from_pin(place, "near", "ingress")
        assert adopted.program_id == newer.id
        with bpf.Program.from_pin(place) as pinned:
            assert pinned.id == newer.id
        assert not coming.exists()
        newer.pin(coming)
        adopted.detach()
        assert not coming.exists()
    assert not place.exists()
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")


def test_a_clsact_filter_of_the_same_name_is_another(
    loaded: bpf.Object, kinds: Path, wire: Wire, pins: Path
) -> None:
    """Whose filter has gone does not get hold of somebody else's, made of the same source."""
    place = pins / "filter"
    loaded.programs["tc_mark"].pin(place)
    with bpf.Object.open(kinds) as other:
        newer = other.load().programs["tc_mark"]
        with newer.attach_tc("near", "ingress", hook="clsact") as theirs:
            with pytest.raises(bpf.BpfError, match="no ingress filter"):
                bpf.ClsactFilter.from_pin(place, "near", "ingress")
            assert isinstance(theirs, bpf.ClsactFilter)
            assert theirs.program_id == newer.id


def test_no_pin_is_left_where_attaching_fails(loaded: bpf.Object, wire: Wire, pins: Path) -> None:
    wire.run("tc", "qdisc", "add", "dev", "near", "ingress")
    with pytest.raises(bpf.BpfError, match="no room for clsact"):
        loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact", pin=pins / "filter")
    assert not (pins / "filter").exists()
    wire.run("tc", "qdisc", "del", "dev", "near", "ingress")
    with loaded.programs["tc_mark"].attach_tc("near", "ingress", pin=pins / "link") as link:
        assert link.pinned == pins / "link"
        with pytest.raises(bpf.BpfError, match="something is pinned there"):
            loaded.programs["tc_mark"].attach_tc("near", "egress", pin=pins / "link")
        link.detach()


def test_an_ingress_qdisc_is_named(loaded: bpf.Object, wire: Wire) -> None:
    wire.run("tc", "qdisc", "add", "dev", "near", "ingress")
    with pytest.raises(bpf.BpfError, match=r"a qdisc of kind ingress.*nothing was changed"):
        loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact")


def test_a_clsact_filter_whose_interface_went(loaded: bpf.Object, wire: Wire) -> None:
    with loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact"):
        wire.run("ip", "link", "del", "near")


# Namespaces


def test_a_thread_attaches_in_its_own_namespace(loaded: bpf.Object, wire: Wire) -> None:
    """The test's thread is in the wire's namespace; a new thread begins there too, and leaves it."""

    def away() -> str:
        with elsewhere():
            try:
                loaded.programs["xdp_drop"].attach_xdp("near").close()
            except bpf.BpfError as error:
                return str(error)
        return "attached"

    assert "no interface 'near'" in in_thread(away)

    def here() -> int:
        with (
            inside(wire.namespace),
            loaded.programs["tc_mark"].attach_tc("near", "ingress", hook="clsact") as link,
        ):
            assert "clsact" in wire.run("tc", "qdisc", "show", "dev", "near")
            with elsewhere(), pytest.raises(bpf.BpfError, match="another network namespace"):
                link.detach()
            return grows(loaded, wire)

    assert in_thread(here) == 5


# Raw tracepoints


@pytest.mark.feature("hook", "raw tracepoint")
def test_raw_tracepoint(
    loaded: bpf.Object, pins: Path, kinds: Path, wire: Wire, links_before: set[int]
) -> None:
    with loaded.programs["on_switch"].attach_raw_tracepoint("sched_switch") as link:
        assert link.hook == "raw_tracepoint"
        before = counted(loaded)
        time.sleep(0.05)
        assert counted(loaded) > before
        link.pin(pins / "link")
    before = counted(loaded)
    time.sleep(0.05)
    assert counted(loaded) > before
    bpf.Link.from_pin(pins / "link").detach()
    assert not (pins / "link").exists()
    assert own_links(links_before) == set()
    with pytest.raises(bpf.BpfError, match="there is none of that name"):
        loaded.programs["on_switch"].attach_raw_tracepoint("sched_swich")


def test_xdp_exceptions_are_seen(loaded: bpf.Object, compiled: Callable[..., Path], wire: Wire) -> None:
    aborting = '#include "types.h"\nSEC("xdp") int aborts(struct xdp_md *ctx) { return XDP_ABORTED; }\n'
    with bpf.Object.open(compiled(aborting)) as other:
        other.load()
        with (
            loaded.programs["on_exception"].attach_raw_tracepoint("xdp_exception"),
            other.programs["aborts"].attach_xdp("near"),
        ):
            assert grows(loaded, wire) == 5


# Features


def test_probes_change_nothing_and_are_cached(links_before: set[int]) -> None:
    features.forget()
    found = features.tcx()
    assert found is features.tcx()
    assert found.answer is not features.Answer.UNKNOWN
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert bool(found) == (release >= (6, 6))
    assert features.btf()
    assert own_links(links_before) == set()


def test_links_agree_with_bpftool(loaded: bpf.Object, wire: Wire) -> None:
    with loaded.programs["xdp_drop"].attach_xdp("near") as link:
        output = subprocess.run(["bpftool", "-j", "link", "show"], check=True, capture_output=True, text=True)
        shown = next(entry for entry in json.loads(output.stdout) if entry["id"] == link.id)
        assert shown["prog_id"] == link.info.program_id
