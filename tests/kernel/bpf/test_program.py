"""Trial runs and what the kernel says of programs."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


OTHERS = """
#include "types.h"
struct bpf_sk_lookup {
	__u64 cookie;
	__u32 family, protocol, remote_ip4, remote_ip6[4];
	__be16 remote_port;
	__u16 zero;
	__u32 local_ip4, local_ip6[4], local_port, ingress_ifindex;
};
SEC("sk_lookup") int look(struct bpf_sk_lookup *ctx)
{
	return ctx->local_port == 80;
}
SEC("flow_dissector") int dissect(struct __sk_buff *skb)
{
	return 0;
}
SEC("cgroup_skb/ingress") int long_enough(struct __sk_buff *skb)
{
	return skb->len > 60;
}
SEC("lwt_in") int length(struct __sk_buff *skb)
{
	return skb->len;
}
SEC("raw_tp/sched_switch") int where(__u64 *ctx)
{
	return bpf_get_smp_processor_id() + 100;
}
SEC("sk_msg") int none(void *ctx)
{
	return 1;
}
char _license[] SEC("license") = "GPL";
"""


def test_other_kinds_run_on_trial(compiled: Callable[..., Path]) -> None:
    ethernet = bytes(12) + b"\x08\x00"
    with bpf.Object.open(compiled(OTHERS)) as obj:
        programs = obj.load().programs
        for port, verdict in ((80, 1), (81, 0)):
            lookup = struct.pack("=QIII16xHHI16xII", 0, 2, 6, 0, 0, 0, 0, port, 0).ljust(72, b"\0")
            run = programs["look"].test_run(context=lookup, repeat=10)
            assert (run.verdict, run.data) == (verdict, b"")
            assert run.context == lookup
        assert (
            len(programs["dissect"].test_run(ethernet + b"\x45" + bytes(60)).data) == 56
        )  # struct bpf_flow_keys
        for size in (60, 61):
            assert programs["long_enough"].test_run(ethernet + b"\x45" + bytes(size - 1)).verdict == (
                size > 60
            )
        assert programs["length"].test_run(ethernet + b"\x45" + bytes(80), repeat=5).verdict == 81
        for cpu in range(os.cpu_count() or 1):
            assert programs["where"].test_run(cpu=cpu).verdict == 100 + cpu
        for name, arguments, said in (
            ("look", {"data": ethernet}, "sk_lookup programs have no packet: give it a context"),
            ("look", {}, "needs its whole context"),
            ("length", {"cpu": 0}, "only raw tracepoint programs run on a CPU of choice"),
            ("length", {"data": ethernet, "live_frames": True}, "live frames are XDP's"),
            ("length", {}, "at least 14 bytes, 0 were given"),
            ("where", {"cpu": 100_000}, "no such CPU"),
            ("none", {"data": ethernet}, "no trial runs for sk_msg programs"),
        ):
            with pytest.raises(bpf.BpfError, match=said):
                programs[name].test_run(**arguments)


NETFILTER = """
#include "types.h"
SEC("netfilter") int accept(void *ctx)
{
	return 1;
}
char _license[] SEC("license") = "GPL";
"""


def test_netfilter_programs_run_on_trial(compiled: Callable[..., Path]) -> None:
    if not bpf.features.program_type("netfilter"):
        pytest.skip("this kernel has no netfilter programs (Linux 6.4)")
    with bpf.Object.open(compiled(NETFILTER)) as obj:
        accept = obj.load().programs["accept"]
        assert accept.test_run(b"\x45" + bytes(19)).verdict == 1
        with pytest.raises(bpf.BpfError, match="at least 20 bytes, 19 were given"):
            accept.test_run(b"\x45" + bytes(18))


def test_bad_trial_runs(loaded: bpf.Object) -> None:
    with pytest.raises(bpf.BpfError, match="at least 14 bytes, 5 were given"):
        loaded.programs["xdp_pass"].test_run(b"short")
    with pytest.raises(bpf.BpfError, match="takes no such interface"):
        loaded.programs["add"].test_run(ingress="lo")
    with pytest.raises(bpf.BpfError, match="cannot run program"):
        loaded.programs["xdp_pass"].test_run(PACKET, context=bytes(3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": None}, "its packet is not bytes"),
        ({"data": 64}, "its packet is not bytes"),
        ({"data": PACKET, "context": "text"}, "its context is not bytes"),
        ({"data": PACKET, "repeat": -1}, "-1 is out of range: the kernel takes 32 bits here"),
        ({"data": PACKET, "repeat": 1 << 32}, "4294967296 is out of range"),
        ({"data": PACKET, "repeat": 1.5}, "1.5 is no whole number"),
        ({"data": PACKET, "ingress": -1}, "no interface -1"),
        ({"data": PACKET, "ingress": 1 << 40}, "no interface 1099511627776"),
        ({"data": PACKET, "ingress": "a\0b"}, "no interface"),
    ],
)
def test_trial_runs_refuse_by_name(loaded: bpf.Object, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(bpf.BpfError, match=said):
        loaded.programs["xdp_pass"].test_run(**arguments)


def test_trial_runs_take_any_bytes(loaded: bpf.Object) -> None:
    program = loaded.programs["xdp_pass"]
    packets: tuple[Any, ...] = (bytearray(PACKET), memoryview(PACKET), np.frombuffer(PACKET, "u1"))
    for packet in packets:
        assert program.test_run(packet).data == PACKET


def test_big_packets_and_repeats(loaded: bpf.Object) -> None:
    big = bytes(3000)
    assert len(loaded.programs["xdp_grow"].test_run(big).data) == 3004
    assert len(loaded.programs["xdp_grow"].test_run(PACKET, repeat=10).data) == 64 + 4 * 10
    tc = loaded.programs["tc_mark"].test_run(big, repeat=1000)
    assert tc.data == big
    assert loaded.maps["cpu_array"][0].sum() == 1000


@pytest.mark.feature("other", "live frames in trial runs")
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


@pytest.mark.feature("other", "programs as bpftool shows them")
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


@pytest.mark.feature("other", "run-time statistics")
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
