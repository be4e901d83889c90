"""Services at connect time through changes: of tables, of programs, of the control plane, of what the node has."""

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
from typing import Any

import pytest

from hookline import api, bpf, lab, net
from hookline.bpf import _syscall
from hookline.control import Node
from hookline.datapath.loadbalancer.balancer import SOCKET_PROGRAMS, LoadBalancer
from hookline.lab import Lab
from hookline.model import Resource, parse
from tests.lab.agents import until
from tests.lab.conftest import document, pod
from tests.lab.test_balancing import PORTS, service
from tests.lab.test_sockets import FAMILIES, PORT, PROTOCOLS, SERVICE, Protocol, ask, seen
from tests.lab.test_sockets_end import connected


@pytest.fixture
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with two backends and a pod that only asks."""
    name = unique_name()
    resources: list[Resource] = [
        document("Node", "node-1"),
        *(pod(f"orders-{n}", metadata={"labels": {"app": "orders"}}) for n in (1, 2)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
        ORDERS,
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


ORDERS = service("orders", tuple(SERVICE.values()), PORTS, backends=[{"selector": {"app": "orders"}}])


def config(**spec: Any) -> Resource:
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "NodeConfig",
            "metadata": {"name": "node-1"},
            "spec": spec,
        }
    )


def links(node: Node) -> dict[str, tuple[int, int]]:
    """Link and program of each program of sockets."""
    found = {}
    for name in SOCKET_PROGRAMS:
        path = node.name.pins / "links" / name
        if path.exists():
            with bpf.Link.from_pin(path) as link:
                found[name] = (link.id, link.info.program_id)
    return found


@FAMILIES
def test_connections_outlive_tables_programs_and_the_control_plane(place: Lab, version: int) -> None:
    targets: list[tuple[Protocol, int]] = [("tcp", 80), ("udp", 53)]
    with contextlib.ExitStack() as opened:
        ours: list[socket.socket] = []
        for protocol, number in targets:
            ours += opened.enter_context(connected(place, SERVICE[version], number, protocol, 8))
        (free,) = place.sockets("default/client", 4 if version == 4 else 6, "udp")
        opened.callback(free.close)
        free.settimeout(5)
        free.sendto(b"who", (SERVICE[version], 53))
        steady = free.recvfrom(100)[0]
        names = [ask(one) for one in ours]

        def check() -> None:
            assert [ask(one) for one in ours] == names
            assert {seen(one.getpeername()) for one in ours} <= {(SERVICE[version], n) for _, n in targets}
            free.sendto(b"who", (SERVICE[version], 53))
            answer, source = free.recvfrom(100)
            assert (answer, seen(source)) == (steady, (SERVICE[version], 53))

        with api.Node(f"lab/{place.name}") as node:
            for n in range(5):
                more = service(
                    f"more-{n}", (f"192.0.2.{100 + n}",), PORTS, backends=[{"selector": {"app": "orders"}}]
                )
                node.apply(more)
                check()
            before = links(node)
            assert set(before) == set(SOCKET_PROGRAMS)
            # Other tunables are other programs, which take over in the same links.
            node.apply(config(nat={"portMin": 20000, "portMax": 30000}))
            after = links(node)
            assert {name: link for name, (link, _) in after.items()} == {
                name: link for name, (link, _) in before.items()
            }
            assert all(after[name][1] != before[name][1] for name in SOCKET_PROGRAMS)
            check()
        script = (
            f"from hookline import api\nnode = api.Node('lab/{place.name}')\nnode.services()\n"
            f"node.plan()\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check()
        with connected(place, SERVICE[version], 80, "tcp") as (one,):
            assert ask(one)


def test_connections_are_made_while_programs_are_replaced(place: Lab, tmp_path: Path) -> None:
    begun, enough = tmp_path / "begun", tmp_path / "enough"

    def keep_connecting() -> tuple[int, int]:
        begun.touch()
        done = failed = 0
        deadline = time.monotonic() + 120
        while not enough.exists() and time.monotonic() < deadline:
            try:
                with socket.create_connection((SERVICE[4], 80), timeout=10) as one:
                    failed += not ask(one)
            except OSError:
                failed += 1
            done += 1
        return done, failed

    found: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: found.append(place.call("default/client", keep_connecting)))
    thread.start()
    try:
        # A fork in the midst of a change would keep the node's lock, which is this process's.
        until("the fork", begun.exists)
        with api.Node(f"lab/{place.name}") as node:
            for n in range(4):
                node.apply(config(nat={"portMin": 20000 + n, "portMax": 30000}))
    finally:
        enough.touch()
        thread.join(30)
    ((done, failed),) = found
    assert done > 20
    assert failed == 0


@PROTOCOLS
def test_switched_off_and_on_again(place: Lab, protocol: Protocol) -> None:
    with api.Node(f"lab/{place.name}") as node:
        node.apply(config(features={"connectTime": "off"}))
        assert links(node) == {}
        assert not (node.name.pins / "programs" / "connect4").exists()
        with pytest.raises(lab.ProbeFailed):
            place.probe("default/client", SERVICE[4], PORT[protocol], protocol, timeout=1)
        assert place.probe("node/node-1", "default/orders-1", 8080).answered_by == "default/orders-1"
        node.delete(["NodeConfig/node-1"])
        assert set(links(node)) == set(SOCKET_PROGRAMS)
    with connected(place, SERVICE[4], PORT[protocol], protocol) as (one,):
        assert ask(one)


def test_another_cgroup(place: Lab) -> None:
    """Only one pod of the node: what is beside it is not served, and another's sockets are left alone."""
    with api.Node(f"lab/{place.name}") as node:
        group = place.cgroup("default/orders-1")
        done = node.apply(config(cgroup=group))
        assert done.plan.warnings == []
        with bpf.Link.from_pin(node.name.pins / "links" / "connect4") as link:
            assert link.info.cgroup_id == net.cgroups.path(group).stat().st_ino
        assert place.probe("default/orders-1", SERVICE[4], 80).answered_by.startswith("default/orders")
        assert not bpf.query(f"cgroup:{net.cgroups.path(node.name.cgroup)}:connect4").programs


def test_a_cgroup_that_is_not_there_is_said_and_the_rest_works(place: Lab) -> None:
    with api.Node(f"lab/{place.name}") as node:
        done = node.apply(config(cgroup=f"hookline/{place.name}/absent"))
        (warning,) = done.plan.warnings
        assert "there is no cgroup" in warning
        assert links(node) == {}
        assert {one.program for one in node.attachments()} >= {"balance", "resolve", "reply"}


def test_a_cgroup_that_is_somebody_else_s_is_said(place: Lab) -> None:
    """A program that was attached without leave to share keeps others off."""
    with api.Node(f"lab/{place.name}") as node:
        folder = net.cgroups.path(place.cgroup("default/orders-2"))
        with LoadBalancer.pinned(node.name.pins) or pytest.fail("not loaded") as balancer:
            number = str(balancer._programs["connect4"].id)
        words = [os.fspath(folder), "connect4", "id", number]
        subprocess.run(["bpftool", "cgroup", "attach", *words], check=True)
        try:
            done = node.apply(config(cgroup=place.cgroup("default/orders-2")))
            (warning,) = done.plan.warnings
            assert "does not share" in warning
            assert links(node) == {}
            assert {one.program for one in node.attachments()} >= {"balance", "resolve", "reply"}
        finally:
            subprocess.run(["bpftool", "cgroup", "detach", *words], check=True)


@pytest.mark.parametrize("name", ["connect4", "recvmsg6"])
def test_a_detached_program_is_put_back(place: Lab, name: str) -> None:
    with api.Node(f"lab/{place.name}") as node:
        node.plan()
        node.apply(ORDERS)
        with bpf.Link.from_pin(node.name.pins / "links" / name) as link:
            fd = os.dup(link.fd)
        try:
            _syscall.call(_syscall.Command.LINK_DETACH, _syscall.attributes("I", fd))
        finally:
            os.close(fd)
        assert any(one.kind == "link" for one in node.repair().repairs)
        assert set(links(node)) == set(SOCKET_PROGRAMS)
        assert node.repair().repairs == []
    assert place.probe("default/client", SERVICE[4], 80).answered_by.startswith("default/orders")


def test_nothing_is_left_when_the_last_service_goes(place: Lab) -> None:
    group = f"cgroup:{net.cgroups.path(f'hookline/{place.name}/node-1')}"
    with api.Node(f"lab/{place.name}") as node:
        assert bpf.query(f"{group}:connect4").programs
        node.delete(["VirtualService/default/orders"])
        for name in SOCKET_PROGRAMS:
            assert not bpf.query(f"{group}:{name}").programs
        assert not node.name.pins.exists()
