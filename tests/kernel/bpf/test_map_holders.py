"""Maps of things: sockets, devices, CPUs, cgroups, events, stacks; and what belongs to a socket, process or file."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import bpf
from tests.kernel.bpf.conftest import Wire, descriptors

SO_COOKIE, SO_ATTACH_REUSEPORT_EBPF, AF_XDP = 57, 52, 44
REDIRECT, PASS, DROP = 4, 2, 1
PACKET = b"\xff" * 12 + b"\x88\xb5" + bytes(50)


@pytest.fixture
def maps(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("maps")) as obj:
        yield obj.load()


def number(value: Any) -> tuple[int, list[int]]:
    return int(value["number"]), value["words"].tolist()


def entry(value: int) -> dict[str, object]:
    return {"number": value, "words": [value, value + 1]}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            yield near, far


def cookie(one: socket.socket) -> int:
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


@pytest.mark.feature("map", "sockmap")
def test_sockmap(maps: bpf.Object, pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair
    sockets, by_hash = maps.maps["sockets"], maps.maps["sockets_by_hash"]
    look = maps.programs["look_at_socket"]
    assert look.test_run(PACKET).verdict == 2
    sockets[1] = near
    assert sockets[1] == cookie(near)
    assert sockets.used == 1
    answered = look.test_run(PACKET, context=bytes(192))
    assert answered.verdict == 0
    assert struct.unpack_from("=I", answered.context, 8)[0] == near.getsockname()[1]
    # The program put it there too.
    assert by_hash[3] == cookie(near)
    del sockets[1]
    assert 1 not in sockets
    with pytest.raises(KeyError):
        sockets[4] = near
    with pytest.raises(bpf.BpfError, match="a socket is wanted"):
        sockets[1] = None


@pytest.mark.feature("map", "sockhash")
def test_sockhash(maps: bpf.Object, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    table = maps.maps["sockets_by_hash"]
    table.write([10, 20], [near, far])
    keys, values = table.read()
    assert dict(zip(keys.tolist(), values.tolist(), strict=True)) == {10: cookie(near), 20: cookie(far)}
    assert table.fullness == 0.5
    # A closed socket leaves.
    far.close()
    near.close()
    deadline = time.monotonic() + 10
    while len(table) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(table) == 0


def test_sockets_in_narrow_values_are_listed_not_read(
    maps: bpf.Object, pair: tuple[socket.socket, socket.socket]
) -> None:
    narrow = maps.maps["narrow_sockets"]
    narrow[5] = pair[0]
    assert narrow.keys().tolist() == [5]
    assert narrow.used == 1
    with pytest.raises(bpf.BpfError, match=r"cookie of 8.*__u64"):
        _ = narrow[5]
    del narrow[5]
    assert narrow.keys().tolist() == []


@pytest.mark.feature("map", "sk_storage")
def test_storage_of_a_socket(maps: bpf.Object, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    storage = maps.maps["of_socket"]
    maps.maps["sockets"][1] = near
    storage[near] = {"number": 5, "words": [1, 2]}
    assert maps.programs["look_at_socket"].test_run(PACKET).verdict == 0
    assert number(storage[near]) == (6, [1, 2])
    assert far not in storage
    del storage[near.fileno()]
    assert near not in storage
    with pytest.raises(KeyError):
        del storage[near]
    with pytest.raises(bpf.BpfError, match=r"keys of map 'of_socket' cannot be listed"):
        storage.keys()
    assert (storage.used, storage.fullness) == (None, None)


@pytest.mark.feature("map", "task_storage")
def test_storage_of_a_process(maps: bpf.Object) -> None:
    storage = maps.maps["of_task"]
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert pidfd not in storage
        assert maps.programs["look_at_task"].test_run().verdict == 0
        assert number(storage[pidfd]) == (1, [0, 0])
        storage[pidfd] = entry(41)
        assert maps.programs["look_at_task"].test_run().verdict == 0
        assert storage[pidfd]["number"] == 42
        del storage[pidfd]
        assert storage.get(pidfd, "none") == "none"
    finally:
        os.close(pidfd)


@pytest.mark.feature("map", "cgroup_storage")
def test_storage_of_a_programs_cgroup(maps: bpf.Object, unique_name: Callable[[], str]) -> None:
    values_of_a_cgroup(maps, "of_cgroup", unique_name())


@pytest.mark.feature("map", "percpu_cgroup_storage")
def test_storage_of_a_programs_cgroup_per_cpu(maps: bpf.Object, unique_name: Callable[[], str]) -> None:
    values_of_a_cgroup(maps, "of_cgroup_by_cpu", unique_name())


SEND = """
import socket, sys
sys.stdin.readline()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for _ in range(3):
        sender.sendto(b"hello", ("127.0.0.1", 9))
"""


def values_of_a_cgroup(maps: bpf.Object, name: str, folder: str) -> None:
    """A value for each cgroup that the program is attached to; its key is the folder's inode."""
    storage = maps.maps[name]
    path = cgroup2() / folder
    path.mkdir()
    try:
        key = path.stat().st_ino
        assert key not in storage
        with maps.programs[f"count_{name}"].attach_cgroup(path):
            sender = subprocess.Popen([sys.executable, "-c", SEND], stdin=subprocess.PIPE, text=True)
            (path / "cgroup.procs").write_text(str(sender.pid))
            sender.communicate("go\n", timeout=60)
            assert storage[key]["number"].sum() == 3
            storage[key] = entry(40)
            assert storage[key]["number"].max() == 40
            assert storage.keys().tolist() == [key]
            assert (storage.used, storage.fullness) == (1, None)
    finally:
        path.rmdir()
    eventually(0, lambda: len(storage))  # it goes with the cgroup, not with the link


def cgroup2() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    pytest.skip("no cgroup2 is mounted")


@pytest.mark.feature("map", "cgrp_storage")
def test_storage_of_a_cgroup() -> None:
    try:
        storage = bpf.Map.create("cgrp_storage", key="i4", value=np.dtype([("number", "u8")]))
    except bpf.FeatureMissing as missing:
        pytest.skip(str(missing))
    root, before = cgroup2(), descriptors()
    with storage:
        assert root not in storage
        storage[root] = (5,)
        assert storage[str(root)]["number"] == 5
        with open_folder(root) as folder:
            assert storage[folder]["number"] == 5
        del storage[root]
        assert root not in storage
        assert descriptors() == before
        with pytest.raises(bpf.BpfError, match="cannot open /nowhere"):
            _ = storage["/nowhere"]


class open_folder:  # noqa: N801
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@pytest.mark.feature("map", "inode_storage")
def test_storage_of_a_file(tmp_path: Path) -> None:
    try:
        storage = bpf.Map.create("inode_storage", key="i4", value="u8")
    except bpf.FeatureMissing as missing:
        pytest.skip(str(missing))
    with storage, (tmp_path / "one").open("w") as file:
        assert file not in storage
        storage[file] = 8
        assert storage[tmp_path / "one"] == 8
        (tmp_path / "two").touch()
        assert tmp_path / "two" not in storage


@pytest.mark.feature("map", "cgroup_array")
def test_cgroup_array(maps: bpf.Object) -> None:
    cgroups = maps.maps["cgroups"]
    root = cgroup2()
    check = maps.programs["in_cgroup"]
    empty = check.test_run().verdict
    assert empty != 1
    cgroups[2] = root  # this process is somewhere below it
    assert check.test_run().verdict == 1
    del cgroups[2]
    assert check.test_run().verdict == empty
    with pytest.raises(bpf.BpfError, match="only programs read the entries of a cgroup_array"):
        _ = cgroups[2]
    assert cgroups.used is None


@pytest.mark.feature("map", "stack_trace")
def test_stack_traces(maps: bpf.Object) -> None:
    stacks = maps.maps["stacks"]
    number_ = maps.programs["take_stack"].test_run().verdict
    assert 0 <= number_ < stacks.max_entries
    addresses = stacks[number_]
    assert (addresses.shape, addresses.dtype) == ((16,), np.dtype("u8"))
    depth = np.count_nonzero(addresses)
    assert depth > 1
    assert (addresses[:depth] > 1 << 63).all()  # the kernel's
    keys, values = stacks.read()
    assert keys.tolist() == [number_]
    assert values.tolist() == [addresses.tolist()]
    assert stacks.used == 1
    del stacks[number_]
    assert number_ not in stacks


@pytest.mark.feature("map", "perf_event_array")
def test_perf_event_array(maps: bpf.Object) -> None:
    events, emit = maps.maps["perf_events"], maps.programs["emit"]
    home = os.sched_getaffinity(0)
    cpu = min(home)
    os.sched_setaffinity(0, {cpu})
    fd = perf_event(cpu)
    try:
        assert emit.test_run(PACKET).verdict == DROP
        events[cpu] = fd
        with mmap.mmap(fd, 2 * mmap.PAGESIZE) as ring:
            assert emit.test_run(PACKET).verdict == PASS
            written = struct.unpack_from("=Q", ring, 1024)[0]
            assert struct.pack("=Q", 0x1122334455667788) in ring[mmap.PAGESIZE : mmap.PAGESIZE + written]
        del events[cpu]
        assert emit.test_run(PACKET).verdict == DROP
    finally:
        os.close(fd)
        os.sched_setaffinity(0, home)
    with pytest.raises(bpf.BpfError, match="only programs read"):
        _ = events[0]


def perf_event(cpu: int) -> int:
    """A descriptor of a software event that programs write to (PERF_COUNT_SW_BPF_OUTPUT)."""
    raw, wakeup = 1 << 10, 1
    attr = struct.pack("=IIQQQQQII", 1, 112, 10, 1, raw, 0, 0, wakeup, 0).ljust(112, b"\0")
    number_ = {"x86_64": 298, "aarch64": 241}[platform.machine()]
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(number_, attr, -1, cpu, -1, 8))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def counter(obj: bpf.Object, name: str) -> int:
    return int(obj.maps[".bss"].view()[name][0])


def eventually(wanted: int, read: Callable[[], int]) -> None:
    deadline = time.monotonic() + 10
    while read() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read() == wanted


@pytest.mark.feature("map", "devmap")
def test_devmap(maps: bpf.Object, wire: Wire) -> None:
    devices_in_maps(maps, wire, "devices")
    narrow = maps.maps["narrow_devices"]
    narrow[2] = wire.near
    assert narrow[2] == socket.if_nametoindex(wire.near)
    assert maps.programs["to_narrow_devices"].test_run(PACKET).verdict == REDIRECT
    with pytest.raises(bpf.BpfError, match=r"no room for a program.*bpf_devmap_val"):
        narrow[2] = (wire.near, maps.programs["at_egress"])


@pytest.mark.feature("map", "devmap_hash")
def test_devmap_hash(maps: bpf.Object, wire: Wire) -> None:
    devices_in_maps(maps, wire, "devices_by_hash")


def devices_in_maps(maps: bpf.Object, wire: Wire, name: str) -> None:
    devices, redirect = maps.maps[name], maps.programs[f"to_{name}"]
    index = socket.if_nametoindex(wire.far)
    assert redirect.test_run(PACKET).verdict == PASS
    devices[2] = wire.far
    assert devices[2].tolist() == (index, 0)
    assert redirect.test_run(PACKET).verdict == REDIRECT
    devices[2] = (index, maps.programs["at_egress"])
    assert devices[2].tolist() == (index, maps.programs["at_egress"].id)
    # Frames really leave by it, past its own program.
    before = received(wire)
    with maps.programs["jump"].attach_xdp(wire.near, "native"):  # veth takes redirected frames only so
        redirect.test_run(PACKET, ingress=wire.far, live_frames=True, repeat=5)
        eventually(5, lambda: counter(maps, "egress_runs"))
        eventually(before + 5, lambda: received(wire))
    keys, values = devices.read()
    assert (keys.tolist(), values["ifindex"].tolist()) == ([2], [index])
    assert devices.used == 1
    del devices[2]
    assert redirect.test_run(PACKET).verdict == PASS
    with pytest.raises(bpf.BpfError, match="no interface 'absent'"):
        devices[2] = "absent"


def received(wire: Wire) -> int:
    found = re.search(r"RX:.*?\n\s*\d+\s+(\d+)", wire.run("ip", "-s", "link", "show", wire.near))
    assert found
    return int(found[1])


@pytest.mark.feature("map", "cpumap")
def test_cpumap(maps: bpf.Object, wire: Wire) -> None:
    cpus, redirect = maps.maps["cpus"], maps.programs["to_cpus"]
    last = max(cpu for cpu in os.sched_getaffinity(0) if cpu < cpus.max_entries)
    maps.maps[".bss"].view()["chosen"][0] = last
    assert redirect.test_run(PACKET).verdict == PASS
    cpus[last] = 64
    assert cpus[last].tolist() == (64, 0)
    assert redirect.test_run(PACKET).verdict == REDIRECT
    cpus[last] = (128, maps.programs["at_cpu"])
    assert cpus[last].tolist() == (128, maps.programs["at_cpu"].id)
    assert cpus.used == 1
    # Frames really go to that CPU, into its own program.
    redirect.test_run(PACKET, ingress=wire.far, live_frames=True, repeat=5)
    eventually(5, lambda: counter(maps, "cpu_runs"))
    assert counter(maps, "cpu_ran_on") == last
    with pytest.raises(bpf.BpfError):
        cpus[last] = (128, maps.programs["landed"])  # not a program for CPU maps
    del cpus[last]
    assert cpus.read()[0].tolist() == []
    assert redirect.test_run(PACKET).verdict == PASS


@pytest.mark.feature("map", "xskmap")
def test_xskmap(maps: bpf.Object) -> None:
    xsks, redirect = maps.maps["xsks"], maps.programs["to_xsks"]
    try:
        receiver = socket.socket(AF_XDP, socket.SOCK_RAW)
    except OSError:
        pytest.skip("this kernel has no AF_XDP sockets (CONFIG_XDP_SOCKETS)")
    with receiver:
        assert redirect.test_run(PACKET).verdict == PASS
        xsks[2] = receiver
        assert redirect.test_run(PACKET).verdict == REDIRECT
        del xsks[2]
        assert redirect.test_run(PACKET).verdict == PASS
        with pytest.raises(bpf.BpfError, match="only programs read"):
            _ = xsks[2]


@pytest.mark.feature("map", "reuseport_sockarray")
def test_reuseport(maps: bpf.Object, wire: Wire) -> None:
    group = maps.maps["group"]
    chosen = maps.maps[".bss"].view()["chosen"]
    receivers = []
    try:
        for place in range(2):
            receivers.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            receivers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            receivers[-1].bind(("127.0.0.1", 40000))
            group[place] = receivers[-1]
        assert [group[place] for place in range(2)] == [cookie(one) for one in receivers]
        assert group.used == 2
        fd = struct.pack("=i", maps.programs["choose"].fd)
        receivers[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, fd)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for place in (1, 0, 1, 1):
                chosen[0] = place
                sender.sendto(b"hello", ("127.0.0.1", 40000))
                readable, _, _ = select.select(receivers, [], [], 10)
                assert readable == [receivers[place]]
                assert receivers[place].recv(16) == b"hello"
        del group[1]
        assert 1 not in group
    finally:
        for one in receivers:
            one.close()
