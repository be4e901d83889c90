"""Cgroups, and what runs inside a lab's members: in the right network namespace and the right cgroup.

Which cgroup a socket belongs to is asked of the kernel: `SO_COOKIE`'s socket, dumped by sock_diag with ``INET_DIAG_CGROUP_ID``
through ``ss --cgroup``, so that nothing of ours is in the answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import lab, net
from hookline.lab import Lab, LabError
from hookline.model.names import NodeName, lab_cgroup
from hookline.net import NetworkError, cgroups
from tests.lab.conftest import document, pod, pods, traces

PYTHON = [sys.executable, "-S", "-c"]
WHERE = "print(open('/proc/self/cgroup').read().split('0::/')[1].strip())"


@pytest.fixture
def group(unique_name: Callable[[], str]) -> Iterator[str]:
    """A cgroup's name below that of all labs, removed after the test."""
    name = f"hookline/{unique_name()}"
    yield name
    for number in cgroups.processes(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    cgroups.remove(name)


@pytest.fixture(scope="module")
def small(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes, two pods, a machine outside."""
    name = unique_name()
    external = document("ExternalHost", "out", spec={"addresses": ["203.0.113.9", "2001:db8:203::9"]})
    try:
        yield lab.up([*pods(2), pod("a.b"), external], name)
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)


def folder_id(group: str) -> int:
    """The cgroup's number, which is its folder's inode."""
    return cgroups.path(group).stat().st_ino


def socket_cgroup(handle: socket.socket, netns: Path) -> str:
    """The cgroup of a bound or connected socket, as ``ss`` reads it from the kernel in a namespace."""
    with net.inside(netns):
        lines = subprocess.run(
            ["ss", "-Hnautp", "--cgroup", "-e"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    cookie = f" sk:{int.from_bytes(handle.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder):x} "
    (line,) = [line for line in lines if cookie in f"{line} "]
    return next(word for word in line.split() if word.startswith("cgroup:")).removeprefix("cgroup:/")


# -- hookline.net.cgroups


def test_make_place_remove(group: str) -> None:
    child = f"{group}/below"
    assert cgroups.make(child) == cgroups.path(child)
    assert cgroups.make(child).is_dir()  # again: nothing to do
    before = cgroups.of()
    with subprocess.Popen(["sleep", "100"]) as process:
        cgroups.place(child, process.pid)
        assert cgroups.of(process.pid) == child
        assert cgroups.of() == before
        assert cgroups.processes(group) == [process.pid]
        with pytest.raises(NetworkError, match="processes are in it"):
            cgroups.remove(group)
        assert cgroups.of(process.pid) == child
        process.kill()
    assert cgroups.remove(group)
    assert not cgroups.path(group).exists()
    assert not cgroups.remove(group)


def test_the_root_is_never_removed() -> None:
    with pytest.raises(ValueError, match="root"):
        cgroups.remove("")
    assert cgroups.path("") == cgroups.mount()


def test_a_cgroup_that_is_not_there(group: str) -> None:
    with pytest.raises(NetworkError, match="there is no such cgroup"):
        cgroups.place(group)
    assert cgroups.processes(group) == []


def test_this_process_leaves_what_it_removes(group: str) -> None:
    cgroups.make(group)
    script = (
        "import sys; from hookline.net import cgroups; cgroups.place(sys.argv[1]); assert cgroups.of() == sys.argv[1]; "
        "cgroups.remove(sys.argv[1]); print(repr(cgroups.of()))"
    )
    done = subprocess.run([sys.executable, "-c", script, group], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("''\n", "")
    assert not cgroups.path(group).exists()


# -- a lab's


def test_each_member_has_its_cgroup(small: Lab) -> None:
    name = small.name
    assert NodeName(name, "node-1").cgroup == f"hookline/{name}/node-1"
    assert small.cgroup("node/node-1") == f"hookline/{name}/node-1/host"
    assert small.cgroup("p0") == f"hookline/{name}/node-1/pods/default_p0"
    assert small.cgroup("p1") == f"hookline/{name}/node-2/pods/default_p1"
    assert small.cgroup("a.b") == f"hookline/{name}/node-1/pods/default_a.b"
    assert small.cgroup("external/out") == ""
    for member in small.members:
        if member.cgroup:
            assert cgroups.path(member.cgroup).is_dir()
    assert NodeName().cgroup == ""


@pytest.mark.parametrize("member", ["p0", "p1", "a.b", "node/node-1", "node/node-2", "external/out"])
def test_commands_run_in_their_members_cgroup(small: Lab, member: str) -> None:
    wanted = small.cgroup(member) or cgroups.of()
    assert small.run(member, [*PYTHON, WHERE]).stdout.strip() == wanted
    words = [sys.executable, "-m", "hookline", "lab", "exec", member, "--name", small.name]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [*words, *more, "--", *PYTHON, WHERE], capture_output=True, text=True, check=True
        )
        assert wanted in done.stdout
    assert cgroups.of() != small.cgroup("p0")


def test_a_command_keeps_what_popen_gives_it(small: Lab) -> None:
    reading, writing = os.pipe()
    script = (
        "import os, sys; os.write(int(sys.argv[1]), os.environ['WORD'].encode()); sys.exit(os.getpid() % 200)"
    )
    with small.start(
        "p0",
        [*PYTHON, script, str(writing)],
        pass_fds=[writing],
        env={"WORD": "it's $HOME", "PATH": os.environ["PATH"]},
        cwd="/",
    ) as process:
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert pipe.read() == b"it's $HOME"
        assert process.wait() == process.pid % 200  # it is the process itself, not a child of a shell
    with pytest.raises(LabError, match="cannot run /no/such") as raised:
        small.run("p0", ["/no/such"])
    assert "No such file" in raised.value.why
    with pytest.raises(LabError, match="not executable"):
        small.run("p0", ["/etc/passwd"])


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_sockets_belong_to_their_member(small: Lab, family: lab.Family, protocol: lab.Protocol) -> None:
    member = small.member("p0")
    before = cgroups.of()
    (handle,) = small.sockets("p0", family, protocol)
    with handle:
        port = 8080 if protocol == "tcp" else 5353
        handle.connect((str(small.member("p1").address(family)), port))
        assert handle.getsockname()[0] == str(member.address(family))
        assert socket_cgroup(handle, member.netns) == member.cgroup
        handle.sendall(b"x\n")
        assert handle.recv(100) == b"default/p1\n"
    assert cgroups.of() == before


def test_a_thousand_sockets_at_once(small: Lab) -> None:
    opened = small.sockets("node/node-1", 4, "udp", 1000)
    assert len({handle.fileno() for handle in opened}) == 1000
    opened[-1].bind(("", 0))
    assert socket_cgroup(opened[-1], small.member("node/node-1").netns) == small.cgroup("node/node-1")
    for handle in opened:
        handle.close()


def test_probes_at_once_do_not_disturb_each_other(small: Lab) -> None:
    answers: list[str] = []

    def ask(source: str, target: str, family: lab.Family) -> None:
        for _ in range(10):
            answers.append(small.probe(source, target, family=family).answered_by)

    threads = [
        threading.Thread(target=ask, args=(source, target, family))
        for source, target in (("p0", "p1:8080"), ("p1", "p0:5353/udp"), ("node/node-1", "p1:8080"))
        for family in (4, 6)
    ]
    before = cgroups.of()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["default/p0"] * 20 + ["default/p1"] * 40
    assert cgroups.of() == before
    assert cgroups.processes(lab_cgroup(small.name)) == []


def test_a_function_runs_inside(small: Lab) -> None:
    def look() -> tuple[str, int, int]:
        return cgroups.of(), net.own_number(), os.getpid()

    group, namespace, pid = small.call("p1", look)
    assert group == small.cgroup("p1")
    assert namespace == small.member("p1").netns.stat().st_ino
    assert pid != os.getpid()

    def fails() -> None:
        raise ConnectionRefusedError(111, "as a test wants it")

    with pytest.raises(ConnectionRefusedError, match="as a test wants it"):
        small.call("p1", fails)

    with pytest.raises(LabError, match="no answer"):
        small.call("p1", lambda: small.probe("p1", "p0:9", timeout=1))

    with pytest.raises(LabError, match="without a result"):
        small.call("p1", lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_pods_cgroups_come_and_go(lab_name: str) -> None:
    made = lab.up(pods(1), lab_name)
    made.add_pod(pod("late"))
    group = made.cgroup("late")
    assert cgroups.path(group).is_dir()
    with made.start("late", ["sleep", "100"]) as process:
        wait_for(lambda: cgroups.of(process.pid) == group)  # the shell before it moves itself first
        made.remove_pod("late")
        assert process.wait(timeout=5) == -signal.SIGTERM
    assert not cgroups.path(group).exists()
    assert cgroups.path(made.cgroup("p0")).is_dir()


def test_what_left_the_namespace_goes_with_the_lab(lab_name: str) -> None:
    made = lab.up(pods(1), lab_name)
    before = os.stat("/proc/self/ns/net").st_ino
    script = (
        "import ctypes, os, time; ctypes.CDLL(None).setns(os.open(f'/proc/{os.getppid()}/ns/net', 0), 0); "
        "print('out', flush=True); time.sleep(100)"
    )
    with made.start("p0", [*PYTHON, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "out\n"
        lab.down(lab_name)
        assert process.wait(timeout=5) == -signal.SIGTERM
    assert os.stat("/proc/self/ns/net").st_ino == before
    assert traces(lab_name) == []


def test_down_from_inside(lab_name: str) -> None:
    made = lab.up(pods(1), lab_name)
    script = "import sys; from hookline import lab; lab.down(sys.argv[1])"
    done = made.run("p0", [sys.executable, "-c", script, lab_name], timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert traces(lab_name) == []


def test_a_cgroup_alone_is_found(lab_name: str) -> None:
    cgroups.make(f"{lab_cgroup(lab_name)}/node-1/pods/default_a")
    lab.down(lab_name)
    assert traces(lab_name) == []


def test_without_cgroups_to_write(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "writable", lambda: False)
    said: list[str] = []
    made = lab.up(pods(2), lab_name, say=said.append)
    assert any("cgroup v2" in line for line in said)
    assert made.cgroup("p0") == ""
    assert made.probe("p0", "p1:8080").answered_by == "default/p1"
    assert made.run("p0", [*PYTHON, WHERE]).stdout.strip() == cgroups.of()
    assert Lab.open(lab_name).cgroup("p0") == ""


def test_a_probe_leaves_no_process(small: Lab) -> None:
    before = children()
    small.probe("p0", "p1:8080")
    assert children() == before


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
