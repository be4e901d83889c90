"""Labs come and go without a trace, whatever happens to those who make and remove them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hookline import lab, net
from hookline.lab import Lab, LabError
from hookline.lab._record import Record
from hookline.model.names import lab_pins, lab_run_dir, lab_state_dir
from tests.lab.conftest import document, pod, pods, processes, root_links, traces

MAKER = """
import os, signal, sys
import hookline.lab._lab as module
from hookline.lab import _topology, down, up
from hookline.net import _namespaces
from tests.lab.conftest import pods

name, moment, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
place, attribute = moment.rsplit(".", 1)
owner = {"lab": module, "topology": _topology, "record": module.Record, "client": module.Client, "net": module.net}[place]
original, calls = getattr(owner, attribute), [0]

def killed(*arguments, **options):
    calls[0] += 1
    if calls[0] == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

if len(sys.argv) > 4:  # killed while it removes the lab
    up(pods(8), name)
    setattr(owner, attribute, killed)
    down(name)
else:
    setattr(owner, attribute, killed)
    up(pods(8), name)
"""

HOLDER = """
import sys, time
from hookline.lab._record import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""

MOMENTS = [
    ("record.write", 1),  # before anything is there
    ("lab.start", 1),  # lab.json only
    ("record.with_server", 1),  # the server runs, its number is not written down
    ("record.write", 2),
    ("topology._make_namespace", 1),
    ("topology._make_namespace", 6),
    ("topology._connect_to_fabric", 1),
    ("topology.connect_pods", 2),
    ("topology._fabric_changes", 1),
    ("client.add", 1),
    ("lab.write_json", 1),
    ("record.up", 1),
]
REMOVAL_MOMENTS = [
    ("lab._end_processes", 1),
    ("net.delete", 1),
    ("net.delete", 5),
]


def killed_maker(name: str, moment: str, number: int, *more: str) -> None:
    """Run a process that makes (or makes and removes) a lab and is killed at a moment."""
    done = subprocess.run(
        [sys.executable, "-c", MAKER, name, moment, str(number), *more],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_nothing_is_left(lab_name: str) -> None:
    links = root_links()
    made = lab.up(pods(3), lab_name)
    assert [member.endpoint for member in made.pods] == ["default/p0", "default/p1", "default/p2"]
    assert len(net.list_names(f"hl.{lab_name}.")) == 6
    assert len(processes(lab_name)) == 1
    assert root_links() == links
    lab.down(lab_name)
    assert traces(lab_name) == []
    assert root_links() == links


def test_a_hundred_pods_come_and_go(lab_name: str) -> None:
    begun = time.monotonic()
    made = lab.up(pods(100), lab_name)
    up = time.monotonic()
    assert made.probe("p0", "p99:8080").answered_by == "default/p99"
    asked = time.monotonic()
    lab.down(lab_name)
    down = time.monotonic()
    assert traces(lab_name) == []
    assert up - begun < 15
    assert down - asked < 10


@pytest.mark.parametrize(("moment", "number"), MOMENTS)
def test_kill_9_of_the_maker_then_down(lab_name: str, moment: str, number: int) -> None:
    killed_maker(lab_name, moment, number)
    if moment != "record.write" or number > 1:
        assert next(one for one in lab.list_labs() if one.name == lab_name).status == "incomplete"
        with pytest.raises(LabError, match="not complete"):
            Lab.open(lab_name)
    lab.down(lab_name)
    wait_until_gone(lab_name)


@pytest.mark.parametrize(("moment", "number"), [MOMENTS[2], MOMENTS[5], MOMENTS[9]])
def test_kill_9_of_the_maker_then_up(lab_name: str, moment: str, number: int) -> None:
    killed_maker(lab_name, moment, number)
    said: list[str] = []
    made = lab.up(pods(2), lab_name, say=said.append)
    assert any("removing what is left" in line for line in said)
    assert made.probe("p0", "p1:8080").answered_by == "default/p1"
    lab.down(lab_name)
    wait_until_gone(lab_name)


@pytest.mark.parametrize(("moment", "number"), REMOVAL_MOMENTS)
def test_kill_9_of_the_remover(lab_name: str, moment: str, number: int) -> None:
    killed_maker(lab_name, moment, number, "remove")
    lab.down(lab_name)
    wait_until_gone(lab_name)


def wait_until_gone(name: str) -> None:
    """A server whose maker was killed ends by itself: give it the time."""
    deadline = time.monotonic() + 5
    while (left := traces(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_a_failed_up_leaves_nothing(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise net.NetworkError("cannot", why="a test says so")

    monkeypatch.setattr("hookline.lab._topology._fabric_changes", fails)
    with pytest.raises(net.NetworkError):
        lab.up(pods(2), lab_name)
    assert traces(lab_name) == []


def test_resources_that_cannot_be_a_lab_make_nothing(lab_name: str) -> None:
    with pytest.raises(LabError, match="node-9"):
        lab.up([pod("a", "node-9")], lab_name)
    assert traces(lab_name) == []


def test_a_lab_that_is_up_is_not_made_again(lab_name: str) -> None:
    lab.up(pods(1), lab_name)
    with pytest.raises(LabError, match="up already") as raised:
        lab.up(pods(1), lab_name)
    assert f"--name {lab_name}" in raised.value.remedy
    assert Lab.open(lab_name).probe("node/node-1", "p0:8080").answered_by == "default/p0"


def test_no_lab(lab_name: str) -> None:
    for call in (lab.down, Lab.open):
        with pytest.raises(LabError, match="there is no lab") as raised:
            call(lab_name)
        assert "hookline lab list" in raised.value.remedy


def test_down_twice(lab_name: str) -> None:
    made = lab.up(pods(1), lab_name)
    lab.down(lab_name)
    with pytest.raises(LabError, match="there is no lab"):
        lab.down(lab_name)
    with pytest.raises(LabError, match="there is no lab"):
        made.remove_pod("p0")


def test_two_labs_with_the_same_addresses(lab_name: str, other_lab_name: str) -> None:
    same = {"podIP": "10.244.1.77"}
    first = lab.up([pod("a", status=same), pod("one")], lab_name)
    second = lab.up([pod("b", status=same), pod("two")], other_lab_name)
    assert first.probe("one", "10.244.1.77:8080").answered_by == "default/a"
    assert second.probe("two", "10.244.1.77:8080").answered_by == "default/b"
    assert {one.name for one in lab.list_labs()} >= {lab_name, other_lab_name}
    lab.down(lab_name)
    assert second.probe("two", "10.244.1.77:8080").answered_by == "default/b"


def test_remains_from_before_the_last_boot_are_removed(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up(pods(1), lab_name)
    record = Record.read(lab_name)
    assert record is not None
    assert record.server is not None
    path = lab_run_dir(lab_name) / "lab.json"
    path.write_text(path.read_text().replace(record.boot, "another"))
    os.kill(record.server.pid, signal.SIGKILL)
    os.waitpid(record.server.pid, 0)
    said: list[str] = []
    lab.up(pods(1), lab_name, say=said.append)
    assert said == [f"removing what is left of lab {lab_name}, from before the last boot"]


def test_namespaces_without_a_folder_are_found(lab_name: str) -> None:
    net.create(f"hl.{lab_name}.pod.default.a")
    (summary,) = [one for one in lab.list_labs() if one.name == lab_name]
    assert (summary.status, summary.server) == ("incomplete", False)
    lab.down(lab_name)
    assert traces(lab_name) == []


def test_pins_state_and_processes_of_a_lab_go_with_it(lab_name: str) -> None:
    made = lab.up(pods(1), lab_name)
    pins = lab_pins(lab_name) / "node-1"
    (pins / "links").mkdir(parents=True)
    state = lab_state_dir(lab_name) / "node-1"
    state.mkdir(parents=True)
    (state / "state.db").write_text("")
    with made.start("p0", ["sleep", "1000"]) as process:
        lab.down(lab_name)
        assert process.wait(timeout=5) == -signal.SIGTERM
    assert traces(lab_name) == []


def test_a_lab_that_another_process_changes(lab_name: str) -> None:
    lab.up(pods(1), lab_name)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            lab_name,
        ],
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LabError, match="being made, changed or removed"):
            lab.down(lab_name)
        holder.kill()
    lab.down(lab_name)


def test_ipv4_alone_where_ipv6_is_switched_off(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "ipv6_available", lambda: False)
    said: list[str] = []
    external = document("ExternalHost", "x", spec={"addresses": ["203.0.113.9", "2001:db8:203::9"]})
    made = lab.up([*pods(2), external], lab_name, say=said.append)
    assert said == ["IPv6 is switched off on this machine: the lab has IPv4 only"]
    assert all(address.version == 4 for member in made.members for address in member.addresses)
    assert made.probe("external/x", "p1:8080").address.version == 4
    with pytest.raises(LabError):
        made.probe("p0", "p1:8080", family=6)
    assert Lab.open(lab_name).families == (4,)


def test_kinds_that_are_not_of_a_lab_are_passed_over(lab_name: str) -> None:
    service = document("Service", "s", spec={"ports": [{"port": 80}], "selector": {"app": "x"}})
    sctp = document(
        "Pod", "s", spec={"containers": [{"name": "c", "ports": [{"containerPort": 7, "protocol": "SCTP"}]}]}
    )
    said: list[str] = []
    made = lab.up([service, sctp], lab_name, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "passed over, as not of a lab",
        "ports of SCTP have no server",
    ]
    assert [resource.reference for resource in made.resources()] == [
        "Namespace/default",
        "Node/node-1",
        "Pod/default/s",
    ]


def test_the_first_node(lab_name: str) -> None:
    made = lab.up([document("Node", "balancer"), document("Node", "node-1")], lab_name)
    assert str(lab.resolve_node(f"lab/{lab_name}")) == f"lab/{lab_name}/balancer"
    assert made.first_node.netns == made.nodes[0].netns
    assert str(lab.resolve_node("host")) == "host"
    assert str(lab.resolve_node(f"lab/{lab_name}/node-1")) == f"lab/{lab_name}/node-1"
    lab.down(lab_name)
    assert str(lab.resolve_node(f"lab/{lab_name}")) == f"lab/{lab_name}/node-1"
