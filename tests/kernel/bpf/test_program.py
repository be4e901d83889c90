"""Trial runs and what the kernel says of programs."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time

import numpy as np
import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import Wire
from tests.requirements import missing_program, need

PACKET = bytes(range(64))


def test_xdp_meets_its_interface_and_may_grow_the_packet(loaded: bpf.Object, wire: Wire) -> None:
    grow = loaded.programs["xdp_grow"]
    index = socket.if_nametoindex("near")
    for ingress in ("near", index):
        run = grow.test_run(PACKET, ingress=ingress)
        assert run.verdict == 2
        assert run.data == struct.pack("=I", index) + PACKET
        assert run.duration_ns > 0
    with pytest.raises(bpf.BpfError, match=r"no interface 'absent'.*it has lo, "):
        grow.test_run(PACKET, ingress="absent")
    context = struct.pack("=6I", 0, 64, 0, index, 0, 0)
    assert grow.test_run(PACKET, context=context).data[:4] == struct.pack("=I", index)


def test_tc_meets_its_interfaces(loaded: bpf.Object, wire: Wire) -> None:
    mark = loaded.programs["tc_mark"]
    near = socket.if_nametoindex("near")
    far = socket.if_nametoindex("far")
    for ingress, egress, expected in (
        ("near", None, near * 1001),
        (None, "far", far),
        ("near", "far", far + 1000 * near),
    ):
        run = mark.test_run(PACKET, ingress=ingress, egress=egress)
        assert struct.unpack_from("=I", run.context, 8)[0] == expected
        assert run.data == PACKET


def test_programs_without_packets(loaded: bpf.Object) -> None:
    run = loaded.programs["add"].test_run(context=np.array([40, 2, 0], "u4").tobytes())
    assert run.verdict == 3
    assert np.frombuffer(run.context, "u4").tolist() == [40, 2, 42]
    assert loaded.programs["on_switch"].test_run(context=struct.pack("=4Q", 7, 0, 0, 0)).verdict == 1
    assert loaded.programs["on_switch"].test_run(context=bytes(32), cpu=0).verdict == 0
    assert loaded.programs["whole"].test_run(PACKET).verdict == 50


def test_bad_trial_runs(loaded: bpf.Object) -> None:
    with pytest.raises(bpf.BpfError, match="at least 14 bytes, 5 were given"):
        loaded.programs["xdp_pass"].test_run(b"short")
    with pytest.raises(bpf.BpfError, match="takes no such interface"):
        loaded.programs["add"].test_run(ingress="lo")
    with pytest.raises(bpf.BpfError, match="cannot run program"):
        loaded.programs["xdp_pass"].test_run(PACKET, context=bytes(3))


def test_big_packets_and_repeats(loaded: bpf.Object) -> None:
    big = bytes(3000)
    assert len(loaded.programs["xdp_grow"].test_run(big).data) == 3004
    assert len(loaded.programs["xdp_grow"].test_run(PACKET, repeat=10).data) == 64 + 4 * 10
    tc = loaded.programs["tc_mark"].test_run(big, repeat=1000)
    assert tc.data == big
    assert loaded.maps["cpu_array"][0].sum() == 1000


def test_live_frames_are_sent(loaded: bpf.Object, wire: Wire, kinds: str) -> None:
    with bpf.Object.open(kinds) as other:
        other.constants["wanted"] = True
        other.load()
        # XDP_TX from near arrives at far, where another program counts it.
        with loaded.programs["xdp_drop"].attach_xdp("far"), other.programs["xdp_pass"].attach_xdp("near"):
            other.programs["xdp_grow"].test_run(PACKET, ingress="near", repeat=50, live_frames=True)
            deadline = time.monotonic() + 5
            while loaded.maps["cpu_array"][0].sum() < 50 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert loaded.maps["cpu_array"][0].sum() >= 50


def test_info_agrees_with_bpftool(loaded: bpf.Object) -> None:
    need("kernel", missing_program("bpftool"))
    for program in loaded.programs.values():
        info = program.info
        shown = json.loads(
            subprocess.run(
                ["bpftool", "-j", "prog", "show", "id", str(info.id)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        assert (info.name, info.type, info.tag) == (shown["name"], shown["type"], shown["tag"])
        assert (info.jited_bytes, info.instructions * 8) == (shown["bytes_jited"], shown["bytes_xlated"])
        assert list(info.map_ids) == shown.get("map_ids", [])
        assert abs(info.loaded_at - shown["loaded_at"]) < 2
        assert info.verified_instructions > 0


def test_maps_agree_with_bpftool(loaded: bpf.Object) -> None:
    need("kernel", missing_program("bpftool"))
    for found in loaded.maps.values():
        shown = json.loads(
            subprocess.run(
                ["bpftool", "-j", "map", "show", "id", str(found.id)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        assert found.type == shown["type"]
        assert found.memory_bytes == shown["bytes_memlock"]
        assert found.max_entries == shown["max_entries"]
        assert found.frozen == bool(shown["frozen"])


def test_statistics_are_counted_while_wanted(loaded: bpf.Object) -> None:
    program = loaded.programs["xdp_pass"]
    with bpf.run_statistics():
        before = program.info
        program.test_run(PACKET, repeat=100)
        after = program.info
    assert after.run_count - before.run_count == 100
    assert after.run_time_ns > before.run_time_ns


def test_everything_loaded_is_listed(loaded: bpf.Object) -> None:
    ids = {program.id: program for program in bpf.programs()}
    assert {program.id for program in loaded.programs.values()} <= set(ids)
    assert ids[loaded.programs["xdp_pass"].id].name == "xdp_pass"
    assert {found.id for found in loaded.maps.values()} <= {found.id for found in bpf.maps()}
    with bpf.Program.from_id(loaded.programs["add"].id) as same:
        assert (same.name, same.type) == ("add", "syscall")
    with pytest.raises(bpf.BpfError, match="cannot open a program"):
        bpf.Program.from_id(0x7FFFFFFF)


def test_trial_runs_in_another_process_are_the_same_program(loaded: bpf.Object) -> None:
    """A descriptor is not inherited by a child that did not ask for it."""
    fd = loaded.programs["xdp_pass"].fd
    assert not os.get_inheritable(fd)
