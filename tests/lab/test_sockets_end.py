"""Sockets of backends that are gone are ended, and no others."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import api, bpf, lab, net
from hookline.control import Node
from hookline.control.node import STRAYS_AFTER_S
from hookline.datapath.loadbalancer.sockets import Records, destroy_sockets, live_sockets
from hookline.lab import Lab
from hookline.model import Resource, parse
from tests.lab.conftest import document, pod
from tests.lab.test_balancing import PORTS, service
from tests.lab.test_sockets import FAMILIES, PORT, PROTOCOLS, SERVICE, Protocol, ask, disconnect

ENDED = {errno.ECONNABORTED, errno.EPIPE, errno.EDESTADDRREQ}
"""What a program meets first: a TCP socket that reads or writes, a UDP socket that has no peer any more."""
WAYS = pytest.mark.parametrize("netlink", [False, True], ids=["iterator", "netlink"])


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with two backends and a pod that only asks."""
    name = unique_name()
    resources: list[Resource] = [
        document("Node", "node-1"),
        *(pod(f"orders-{n}") for n in (1, 2)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture
def node(place: Lab) -> Iterator[Node]:
    with api.Node(f"lab/{place.name}") as node:
        yield node
        node.delete([one.reference for one in node.resources() if one.kind == "VirtualService"])


def backend_address(place: Lab, number: int, version: int) -> str:
    member = place.member(f"default/orders-{number}")
    return next(str(address) for address in member.addresses if address.version == version)


def orders(place: Lab, *numbers: int, **spec: object) -> Resource:
    """The service with these backends."""
    every = [{"address": backend_address(place, n, v)} for n in numbers for v in (4, 6)]
    return service("orders", tuple(SERVICE.values()), PORTS, backends=every, **spec)


@contextlib.contextmanager
def connected(
    place: Lab, target: str, number: int, protocol: Protocol, count: int = 1
) -> Iterator[list[socket.socket]]:
    made = place.sockets("default/client", 6 if ":" in target else 4, protocol, count)
    try:
        for one in made:
            one.settimeout(5)
            one.connect((target, number))
        yield made
    finally:
        for one in made:
            one.close()


def fate(one: socket.socket) -> int:
    """0 where the socket still works, else the error that it has."""
    try:
        ask(one)
    except OSError as error:
        return error.errno or -1
    return 0


@FAMILIES
@PROTOCOLS
def test_the_sockets_of_a_removed_backend_are_ended(
    place: Lab, node: Node, version: int, protocol: Protocol
) -> None:
    node.apply(orders(place, 1, 2))
    target, number = SERVICE[version], PORT[protocol]
    direct = backend_address(place, 1, version), 8080 if protocol == "tcp" else 5353
    with (
        connected(place, target, number, protocol, 24) as ours,
        connected(place, *direct, protocol) as theirs,
    ):
        who = [ask(one) for one in ours]
        assert set(who) == {"default/orders-1", "default/orders-2"}
        assert sum(node.sockets().values()) == 24
        assert ask(theirs[0]) == "default/orders-1"
        assert node.plan(orders(place, 2)).sockets_ended == who.count("default/orders-1")
        done = node.apply(orders(place, 2))
        assert done.plan.sockets_ended == who.count("default/orders-1")
        assert done.plan.warnings == []
        for one, name in zip(ours, who, strict=True):
            assert fate(one) in ({0} if name == "default/orders-2" else ENDED)
        assert fate(theirs[0]) == 0, "a connection that was none of the service's was ended"
        assert sum(node.sockets().values()) == who.count("default/orders-2")


@FAMILIES
@PROTOCOLS
def test_a_socket_that_left_the_service_for_the_backend_itself_is_no_longer_its(
    place: Lab, node: Node, version: int, protocol: Protocol
) -> None:
    """The same socket, first given the backend, then connected by the program to that very address."""
    node.apply(orders(place, 1))
    direct = backend_address(place, 1, version), 8080 if protocol == "tcp" else 5353
    with connected(place, SERVICE[version], PORT[protocol], protocol) as (one,):
        assert ask(one) == "default/orders-1"
        assert sum(node.sockets().values()) == 1
        if protocol == "tcp":
            disconnect(one)
        one.connect(direct)
        assert ask(one) == "default/orders-1"
        assert node.sockets() == {}
        done = node.apply(orders(place, 2))
        assert done.plan.sockets_ended == 0
        assert done.plan.warnings == []
        assert fate(one) == 0


@FAMILIES
@WAYS
def test_both_ways_match_row_generation_and_address(
    place: Lab, node: Node, version: int, netlink: bool
) -> None:
    node.apply(orders(place, 1))
    with contextlib.ExitStack() as open_sockets:
        tcp = open_sockets.enter_context(connected(place, SERVICE[version], 80, "tcp", 3))
        udp = open_sockets.enter_context(connected(place, SERVICE[version], 53, "udp", 2))
        mapped = []
        if version == 4:
            mapped = open_sockets.enter_context(connected(place, f"::ffff:{SERVICE[4]}", 80, "tcp"))
            mapped += open_sockets.enter_context(connected(place, f"::ffff:{SERVICE[4]}", 53, "udp"))
        free = place.sockets("default/client", 4 if version == 4 else 6, "udp")[0]
        open_sockets.callback(free.close)
        free.settimeout(5)
        free.sendto(b"who", (SERVICE[version], 53))
        assert free.recv(100)
        sockets = open_sockets.enter_context(bpf.Map.from_pin(node.name.pins / "maps" / "sockets"))
        found = live_sockets(sockets)
        assert len(found) == 5 + len(mapped)
        rows = {
            (int(one["backend"]), int(one["generation"])): int(one["remote_port"].byteswap()) for one in found
        }
        address = place.member("default/orders-1").addresses[0 if version == 4 else 1]
        right = {row: (address, number) for row, number in rows.items()}
        other = {(row, generation + 1): value for (row, generation), value in right.items()}
        elsewhere = {row: (address, number + 1) for row, (_, number) in right.items()}
        for wrong in (other, elsewhere):
            assert not destroy_sockets(sockets, wrong, netlink=netlink)
        assert [fate(one) for one in (*tcp, *udp, *mapped)] == [0] * (5 + len(mapped))
        ended = destroy_sockets(sockets, right, netlink=netlink)
        assert (ended.tcp, ended.udp, ended.left) == (3 + len(mapped) // 2, 2 + len(mapped) // 2, {})
        assert all(fate(one) for one in (*tcp, *udp, *mapped))
        # Neither a datagram socket that is not connected nor the servers.
        free.sendto(b"who", (SERVICE[version], 53))
        assert free.recv(100)
        with connected(place, SERVICE[version], 80, "tcp") as again:
            assert fate(again[0]) == 0


@FAMILIES
def test_a_waiting_reader_is_woken(place: Lab, node: Node, version: int) -> None:
    node.apply(orders(place, 1))
    with connected(place, SERVICE[version], 80, "tcp") as (one,):
        one.settimeout(30)
        seen: list[BaseException | bytes] = []

        def wait() -> None:
            try:
                seen.append(one.recv(10))
            except OSError as error:
                seen.append(error)

        reader = threading.Thread(target=wait)
        reader.start()
        node.apply(orders(place, 2))
        reader.join(20)
        assert not reader.is_alive()
        (found,) = seen
        assert isinstance(found, OSError)
        assert found.errno == errno.ECONNABORTED


def test_a_backend_with_a_deadline_keeps_its_sockets_until_then(place: Lab, node: Node) -> None:
    node.apply(orders(place, 1, 2, drainSeconds=2))
    with connected(place, SERVICE[4], 80, "tcp", 16) as ours:
        who = [ask(one) for one in ours]
        done = node.apply(orders(place, 2, drainSeconds=2))
        assert done.plan.sockets_ended == 0
        assert [fate(one) for one in ours] == [0] * 16
        deadline = node.expire()
        assert deadline is not None
        threading.Event().wait(deadline + 0.2)
        assert node.expire() is None
        for one, name in zip(ours, who, strict=True):
            assert bool(fate(one)) == (name == "default/orders-1")


def test_a_drain_under_a_thousand_connections_breaks_none(place: Lab, node: Node) -> None:
    """They all work until the deadline, and then those of the other backend do; new ones never go to the one that leaves."""
    node.apply(orders(place, 1, 2, drainSeconds=20))
    with contextlib.ExitStack() as opened:
        ours = [
            one
            for version in (4, 6)
            for one in opened.enter_context(connected(place, SERVICE[version], 80, "tcp", 500))
        ]
        who = [ask(one) for one in ours]
        assert sum(node.sockets().values()) == 1000
        done = node.apply(orders(place, 2, drainSeconds=20))
        assert done.plan.sockets_ended == 0
        broken = sum(bool(fate(one)) for one in ours)
        fresh = []
        for version in (4, 6):
            with connected(place, SERVICE[version], 80, "tcp", 20) as more:
                fresh += [ask(one) for one in more]
        deadline = node.expire()
        assert deadline is not None, (
            "the machine was too slow: the drain was over before its end was looked for"
        )
        assert broken == 0
        assert set(fresh) == {"default/orders-2"}
        threading.Event().wait(deadline + 0.2)
        assert node.expire() is None
        assert [bool(fate(one)) for one in ours] == [name == "default/orders-1" for name in who]


def test_the_last_service_ends_its_sockets_too(place: Lab, node: Node) -> None:
    node.apply(orders(place, 1))
    with connected(place, SERVICE[4], 80, "tcp", 2) as ours:
        assert [fate(one) for one in ours] == [0, 0]
        assert node.plan(delete=["VirtualService/default/orders"]).sockets_ended == 2
        done = node.delete(["VirtualService/default/orders"])
        assert done.plan.sockets_ended == 2
        assert all(fate(one) for one in ours)
    assert not node.name.pins.exists()
    node.apply(orders(place, 1))
    assert net.cgroups.path(node.name.cgroup).is_dir()


def _kubernetes(place: Lab, *numbers: int, name: str = "http", **spec: object) -> list[Resource]:
    """A Service with a slice for each family; its backends are this node's unless they are said to be another's."""
    elsewhere = spec.pop("elsewhere", ())
    assert isinstance(elsewhere, tuple)
    ports = [
        {"name": name, "port": 80, "protocol": "TCP"},
        {"name": f"{name}-u", "port": 53, "protocol": "UDP"},
    ]
    documents: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "shop", "namespace": "default"},
            "spec": {"clusterIP": SERVICE[4], "clusterIPs": list(SERVICE.values()), "ports": ports, **spec},
        }
    ]
    documents += [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"shop-{version}",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": "shop"},
            },
            "addressType": f"IPv{version}",
            "ports": [
                {"name": name, "port": 8080, "protocol": "TCP"},
                {"name": f"{name}-u", "port": 5353, "protocol": "UDP"},
            ],
            "endpoints": [
                {
                    "addresses": [backend_address(place, n, version)],
                    "nodeName": "node-2" if n in elsewhere else "node-1",
                }
                for n in numbers
            ],
        }
        for version in (4, 6)
    ]
    return [parse(one) for one in documents]


@pytest.fixture
def shop(node: Node) -> Iterator[Node]:
    yield node
    node.delete(
        [
            one.reference
            for one in node.resources()
            if one.kind in ("Service", "EndpointSlice", "ServicePolicy")
        ]
    )


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("drain", [0, 30])
def test_another_name_or_reach_of_a_port_ends_nothing(
    place: Lab, shop: Node, version: int, protocol: Protocol, drain: float
) -> None:
    """Only sockets of backends that leave are ended, and those that drain later."""
    policy = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "ServicePolicy",
            "metadata": {"name": "shop", "namespace": "default"},
            "spec": {"targetRef": {"kind": "Service", "name": "shop"}, "drainSeconds": drain},
        }
    )
    shop.apply([policy, *_kubernetes(place, 1, 2, elsewhere=(2,))])
    with connected(place, SERVICE[version], PORT[protocol], protocol, 16) as ours:
        who = [ask(one) for one in ours]
        assert set(who) == {"default/orders-1", "default/orders-2"}
        renamed = _kubernetes(place, 1, 2, name="web", elsewhere=(2,))
        assert shop.plan(renamed).sockets_ended == 0
        assert shop.apply(renamed).plan.sockets_ended == 0
        assert [ask(one) for one in ours] == who
    with connected(place, SERVICE[version], PORT[protocol], protocol, 16) as ours:
        # Those of the node stay when the others no longer count.
        who = [ask(one) for one in ours]
        local = _kubernetes(place, 1, 2, name="web", elsewhere=(2,), internalTrafficPolicy="Local")
        leave = 0 if drain else who.count("default/orders-2")
        assert shop.apply(local).plan.sockets_ended == leave
        for one, name in zip(ours, who, strict=True):
            assert fate(one) in ({0} if drain or name == "default/orders-1" else ENDED)
        with connected(place, SERVICE[version], PORT[protocol], protocol, 8) as new:
            assert {ask(one) for one in new} == {"default/orders-1"}


@FAMILIES
def test_the_last_service_ends_sockets_that_outlived_a_change_of_their_row(
    place: Lab, shop: Node, version: int
) -> None:
    shop.apply(_kubernetes(place, 1))
    with connected(place, SERVICE[version], 80, "tcp", 3) as ours:
        shop.apply(_kubernetes(place, 1, name="web"))
        assert [fate(one) for one in ours] == [0, 0, 0]
        gone = ["Service/default/shop"]
        assert shop.plan(delete=gone).sockets_ended == 3
        assert shop.delete(gone).plan.sockets_ended == 3
        assert all(fate(one) for one in ours)


def killed_change(node: Node, folder: Path, resource: Resource, where: str) -> None:
    """Another process applies this and is killed: ``tables``: before the state is written; ``sockets``: after."""
    path = folder / "orders.json"
    path.write_text(json.dumps(resource.to_document()))
    source = f"""
import os
from hookline import control
from hookline.control import node, tables

def killed(*arguments, **named):
    os._exit(9)

if {where!r} == "sockets":
    node.Node._end_sockets = killed
else:
    write = tables.Tables.carry_out
    def carry_out(self, change):
        write(self, change)
        killed()
    tables.Tables.carry_out = carry_out
control.Node({str(node.name)!r}).apply({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", source], check=False, timeout=120)
    assert done.returncode == 9


@FAMILIES
@PROTOCOLS
def test_a_process_that_is_killed_before_it_ended_sockets(
    place: Lab, node: Node, tmp_path: Path, version: int, protocol: Protocol
) -> None:
    node.apply(orders(place, 1, 2))
    with connected(place, SERVICE[version], PORT[protocol], protocol, 16) as ours:
        who = [ask(one) for one in ours]
        killed_change(node, tmp_path, orders(place, 2), "sockets")
        assert [fate(one) for one in ours] == [0] * 16
        node.repair()
        assert [bool(fate(one)) for one in ours] == [name == "default/orders-1" for name in who]


@FAMILIES
@PROTOCOLS
def test_sockets_of_a_backend_that_got_another_row(
    place: Lab, node: Node, tmp_path: Path, version: int, protocol: Protocol
) -> None:
    """They stay as long as it does, are counted, and end with it."""
    node.apply(orders(place, 1, 2))
    with connected(place, SERVICE[version], PORT[protocol], protocol, 16) as ours:
        who = [ask(one) for one in ours]
        killed_change(node, tmp_path, orders(place, 2), "tables")
        node.repair()  # the state was not written: the backend is wanted, and gets a row again
        node.apply(orders(place, 1, 2))
        assert [fate(one) for one in ours] == [0] * 16
        first = who.count("default/orders-1")
        assert node.plan(orders(place, 2)).sockets_ended == first
        assert node.apply(orders(place, 2)).plan.sockets_ended == first
        assert [bool(fate(one)) for one in ours] == [name == "default/orders-1" for name in who]


@FAMILIES
def test_a_connection_that_is_made_by_the_old_tables_is_found_later(
    place: Lab, node: Node, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    node.apply(orders(place, 1))
    with connected(place, SERVICE[version], 80, "tcp") as (one,), monkeypatch.context() as early:
        # The walk of the change itself does not meet it, as if it were not connected yet.
        read = Records.read
        early.setattr(Records, "read", lambda records: read(records)[:0])
        assert node.apply(orders(place, 2)).plan.sockets_ended == 0
        early.undo()
        assert fate(one) == 0
        threading.Event().wait(STRAYS_AFTER_S)
        assert [repair.kind for repair in node.repair().repairs] == ["socket"]
        assert fate(one) in ENDED
        assert node.repair().repairs == []


def test_a_full_look_ends_nobody_whose_backend_is_there(place: Lab, node: Node) -> None:
    node.apply(orders(place, 1, 2))
    with connected(place, SERVICE[4], 80, "tcp", 8) as ours, api.Node(node.name) as other:
        assert [fate(one) for one in ours] == [0] * 8
        other.repair()
        other.repair(full=True)
        assert [fate(one) for one in ours] == [0] * 8


def _two_ports(place: Lab, *numbers: int, both: bool) -> list[Resource]:
    """The shop's two TCP ports, 80 and 81, that lead to the same port of the backends; or the first alone."""
    resources = _kubernetes(place, *numbers)
    documents = [one.to_document() for one in resources]
    if both:
        documents[0]["spec"]["ports"].append({"name": "more", "port": 81, "protocol": "TCP"})
        for one in documents[1:]:
            one["ports"].append({"name": "more", "port": 8080, "protocol": "TCP"})
    return [parse(one) for one in documents]


@FAMILIES
def test_a_port_that_is_removed_leaves_its_connections_to_the_backend(
    place: Lab, shop: Node, version: int
) -> None:
    """They are neither ended at once nor by a later look, and end with the backend."""
    shop.apply(_two_ports(place, 1, 2, both=True))
    with connected(place, SERVICE[version], 81, "tcp", 12) as ours:
        who = [ask(one) for one in ours]
        assert set(who) == {"default/orders-1", "default/orders-2"}
        fewer = _two_ports(place, 1, 2, both=False)
        assert shop.plan(fewer).sockets_ended == 0
        assert shop.apply(fewer).plan.sockets_ended == 0
        threading.Event().wait(STRAYS_AFTER_S)
        assert shop.repair().repairs == []
        shop.repair(full=True)
        with api.Node(shop.name) as other:
            other.repair(full=True)
        assert [fate(one) for one in ours] == [0] * 12
        assert shop.apply(_two_ports(place, 2, both=False)).plan.sockets_ended == who.count(
            "default/orders-1"
        )
        assert [bool(fate(one)) for one in ours] == [name == "default/orders-1" for name in who]


def test_another_service_with_the_backend_does_not_keep_a_removed_ports_connections(
    place: Lab, node: Node, shop: Node
) -> None:
    shop.apply([orders_elsewhere(place), *_two_ports(place, 1, both=True)])
    with connected(place, SERVICE[4], 81, "tcp", 2) as ours:
        shop.apply(_two_ports(place, 1, both=False))
        assert [fate(one) for one in ours] == [0, 0]
        shop.apply(_two_ports(place, 2, both=False))
        assert all(fate(one) for one in ours)


def orders_elsewhere(place: Lab) -> Resource:
    return service("orders", ("10.96.77.1",), PORTS, backends=[{"address": backend_address(place, 1, 4)}])


@FAMILIES
def test_a_walk_that_fails_once_is_told_and_made_again(
    place: Lab, node: Node, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    node.apply(orders(place, 1))
    with connected(place, SERVICE[version], 80, "tcp") as (one,):
        with monkeypatch.context() as broken:
            broken.setattr(Records, "read", failing)
            (warning,) = node.apply(orders(place, 2)).plan.warnings
            assert "not ended" in warning
            threading.Event().wait(STRAYS_AFTER_S)
            # Also a look that nobody asked for says so, and does not give up.
            (problem,) = node.repair().problems
            assert "not ended" in problem
        assert fate(one) == 0
        threading.Event().wait(STRAYS_AFTER_S)
        found = node.repair()
        assert [repair.kind for repair in found.repairs] == ["socket"]
        assert found.problems == []
        assert fate(one) in ENDED


def failing(records: Records) -> Any:
    raise bpf.BpfError("the walk fails")


def test_a_drains_end_that_ends_no_sockets_is_told(
    place: Lab, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.apply(orders(place, 1, 2, drainSeconds=1))
    with connected(place, SERVICE[4], 80, "tcp", 12) as ours:
        who = [ask(one) for one in ours]
        node.apply(orders(place, 2, drainSeconds=1))
        deadline = node.expire()
        assert deadline is not None
        threading.Event().wait(deadline + 0.2)
        with monkeypatch.context() as blind:
            # As for one that may not look into processes (no CAP_SYS_PTRACE).
            blind.setattr(net, "find", lambda namespace: None)
            assert node.expire() is None
            problems = node.repair().problems
            assert len(problems) == 1
            assert "not ended" in problems[0]
        assert [fate(one) for one in ours] == [0] * 12
        threading.Event().wait(STRAYS_AFTER_S)
        node.repair()
        assert [bool(fate(one)) for one in ours] == [name == "default/orders-1" for name in who]


def test_a_record_that_was_torn_is_nobodys(place: Lab, node: Node) -> None:
    """Its protocol is none that has backends: neither the counts nor a look for strays take it for a connection."""
    node.apply(orders(place, 1))
    with (
        connected(place, SERVICE[4], 80, "tcp", 2) as ours,
        bpf.Map.from_pin(node.name.pins / "maps" / "sockets") as sockets,
    ):
        torn = sockets[ours[0]].copy()
        torn["protocol"] = 99
        sockets[ours[0]] = torn
        assert sum(node.sockets().values()) == 1
        with Records(sockets) as records:
            assert len(records.read()) == 1
