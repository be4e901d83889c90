"""The programs on real interfaces with real traffic, attached, replaced, adopted and taken away."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf, net
from hookline.bpf import features
from hookline.datapath import pinning
from hookline.datapath.firewall import firewall as module
from hookline.datapath.firewall.firewall import FOLDER, MAPS, PROGRAMS, Firewall, attachments, remove
from tests.kernel.firewall.scene import (
    FAR,
    FAR_IDENTITY,
    NODE,
    PEER,
    PEER_IDENTITY,
    POD,
    SMALL,
    Gate,
    Scene,
    allow,
)
from tests.kernel.loadbalancer.packets import Ends, udp
from tests.requirements import need

VERSIONS = pytest.mark.parametrize("version", [4, 6])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
SILENCE_S = 0.2
"""How long nothing is waited for. What comes nevertheless comes at once: all of it is on this machine."""

Open = Callable[..., Firewall]


@pytest.fixture
def pins(unique_name: Callable[[], str], inside_node: None) -> Iterator[Path]:
    """A folder of the test's own in bpffs."""
    path = Path(f"/sys/fs/bpf/hookline-test-{unique_name()}")
    yield path
    remove(path)
    assert not path.exists()


@pytest.fixture
def open_firewall(compiled: Path, pins: Path) -> Iterator[Open]:
    with ExitStack() as opened:

        def make(**sizes: int) -> Firewall:
            return opened.enter_context(Firewall.open(pins, dataclasses.replace(SMALL, **sizes)))

        yield make


@pytest.fixture(params=["tcx", "clsact"])
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways onto the hook, the first where the kernel has it."""
    if request.param == "clsact":
        attach = bpf.Program.attach_tc

        def by_clsact(self: bpf.Program, *args: Any, before: Any = None, **options: Any) -> Any:
            return attach(self, *args, hook="clsact", **options)

        monkeypatch.setattr(bpf.Program, "attach_tc", by_clsact)
    else:
        found = features.tcx()
        need("kernel", "" if found.answer is features.Answer.YES else f"tcx: {found.why}")
    return str(request.param)


def bound(place: Path, address: str, kind: int, port: int = 0) -> socket.socket:
    """A socket in a namespace."""
    with net.inside(place):
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.settimeout(2)
    made.bind((address, port))
    if kind == socket.SOCK_STREAM and port:
        made.listen()
    return made


def reaches(sender: socket.socket, receiver: socket.socket, payload: bytes = b"x") -> bool:
    """Whether a datagram does."""
    sender.sendto(payload, receiver.getsockname()[:2])
    receiver.settimeout(SILENCE_S)
    try:
        return receiver.recv(65536) == payload
    except TimeoutError:
        return False


def connected(
    source: Path, address: str, listener: socket.socket
) -> tuple[socket.socket, socket.socket] | None:
    """Both ends of a connection, or None where none comes about."""
    client = bound(source, address, socket.SOCK_STREAM)
    client.settimeout(SILENCE_S)
    try:
        client.connect(listener.getsockname()[:2])
    except TimeoutError:
        client.close()
        return None
    client.settimeout(2)
    return client, listener.accept()[0]


@VERSIONS
def test_real_traffic_obeys(open_firewall: Open, scene: Scene, hook: str, version: int) -> None:
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.rules(ingress=[allow(FAR_IDENTITY, 17, 5000)], egress=[allow(PEER_IDENTITY, 6, 5001)])
    made = firewall.activate({"pod0": "pod", "pod1": "pod"})
    assert {item.hook.split()[0] for item in made} == {hook}
    assert sorted((item.program, item.interface) for item in made) == [
        (program, interface) for program in ("from_pod", "to_pod") for interface in ("pod0", "pod1")
    ]
    with ExitStack() as opened:
        server = opened.enter_context(bound(scene.pod, POD[version], socket.SOCK_DGRAM, 5000))
        other = opened.enter_context(bound(scene.pod, POD[version], socket.SOCK_DGRAM, 5002))
        far = opened.enter_context(bound(scene.far, FAR[version], socket.SOCK_DGRAM))
        peer = opened.enter_context(bound(scene.peer, PEER[version], socket.SOCK_DGRAM))
        # More than one frame holds: both ends' fragments pass.
        for payload in (b"x", os.urandom(9000)):
            assert reaches(far, server, payload)
            assert reaches(server, far, payload)
        assert not reaches(far, other)
        assert not reaches(peer, server)
        assert not reaches(other, far)
        assert reaches(peer, far)

        listener = opened.enter_context(bound(scene.peer, PEER[version], socket.SOCK_STREAM, 5001))
        pair = connected(scene.pod, POD[version], listener)
        assert pair
        client, served = (opened.enter_context(end) for end in pair)
        served.sendall(b"hello")
        assert client.recv(10) == b"hello"
        beyond = opened.enter_context(bound(scene.far, FAR[version], socket.SOCK_STREAM, 5001))
        assert connected(scene.pod, POD[version], beyond) is None

        # The policy goes: the connection is cut in both directions.
        gate.rules(ingress=[], egress=[])
        for sender, receiver in ((client, served), (served, client)):
            sender.sendall(b"more")
            receiver.settimeout(SILENCE_S)
            with pytest.raises(TimeoutError):
                receiver.recv(10)
        assert {one.cut for one in firewall.tracked() if one.interface == gate.pod and one.protocol == 6} == {
            True
        }
        # It comes back, and what was sent meanwhile arrives: TCP sends it again.
        gate.rules(ingress=[], egress=[allow(PEER_IDENTITY, 6, 5001)])
        served.settimeout(5)
        assert served.recv(10) == b"more"


@VERSIONS
def test_a_closed_port_is_told_through_the_firewall(open_firewall: Open, scene: Scene, version: int) -> None:
    """The ICMP error about an allowed datagram passes the pod's egress policy, which allows nothing."""
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.rules(ingress=[allow(FAR_IDENTITY, 17)], egress=[])
    firewall.activate({"pod0": "pod"})
    with bound(scene.far, FAR[version], socket.SOCK_DGRAM) as far:
        far.connect((POD[version], 9))
        far.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            far.recv(10)
    assert firewall.totals().reasons["egress", "related"][0] == 1


@VERSIONS
def test_the_node_reaches_its_pods(open_firewall: Open, scene: Scene, version: int) -> None:
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.rules(ingress=[], egress=[])
    firewall.activate({"pod0": "pod"})
    with (
        bound(scene.pod, POD[version], socket.SOCK_DGRAM, 5000) as pod,
        bound(scene.node, NODE[version], socket.SOCK_DGRAM, 5000) as node,
    ):
        assert reaches(node, pod)
        assert reaches(pod, node)


@VERSIONS
def test_the_node_itself(open_firewall: Open, scene: Scene, version: int) -> None:
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.rules(host=True, ingress=[allow(FAR_IDENTITY, 17, 5000)], egress=[])
    firewall.activate({"uplink": "uplink"})
    with (
        bound(scene.pod, POD[version], socket.SOCK_DGRAM, 5000) as pod,
        bound(scene.node, NODE[version], socket.SOCK_DGRAM, 5000) as node,
        bound(scene.node, NODE[version], socket.SOCK_DGRAM, 5001) as closed,
        bound(scene.far, FAR[version], socket.SOCK_DGRAM, 5000) as far,
    ):
        assert reaches(far, node)
        assert reaches(node, far)
        assert not reaches(far, closed)
        assert not reaches(closed, far)
        assert reaches(far, pod)
        assert reaches(pod, far)


def test_a_pod_cannot_take_another_s_address(open_firewall: Open, scene: Scene) -> None:
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.clear()
    firewall.activate({"pod0": "pod", "pod1": "pod"})
    with net.inside(scene.pod):
        subprocess.run(["ip", "address", "add", PEER[4] + "/32", "dev", "p0"], check=True)
    try:
        with (
            bound(scene.pod, PEER[4], socket.SOCK_DGRAM) as liar,
            bound(scene.far, FAR[4], socket.SOCK_DGRAM, 5000) as far,
        ):
            assert not reaches(liar, far)
    finally:
        with net.inside(scene.pod):
            subprocess.run(["ip", "address", "del", PEER[4] + "/32", "dev", "p0"], check=True)
    assert firewall.totals().reasons["egress", "spoofed_source"][0] == 1


@VERSIONS
def test_tags_behind_tags_do_not_hide_a_packet(open_firewall: Open, scene: Scene, version: int) -> None:
    """The kernel takes tags of network 0 off one after the other, and delivers what is in there."""
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.rules(host=True, ingress=[], egress=[])
    with bound(scene.node, NODE[version], socket.SOCK_DGRAM, 5000) as node:
        node.settimeout(SILENCE_S)
        with net.inside(scene.node):
            shown = subprocess.run(
                ["ip", "-j", "link", "show", "dev", "uplink"], check=True, capture_output=True
            )
        target = json.loads(shown.stdout)[0]["address"]
        plain = udp(Ends(FAR[version], NODE[version], 5000, 5000, mac_destination=target))
        with net.inside(scene.far):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with wire:
            with net.inside(scene.far):
                wire.bind(("up", 0))

            def send(*tags: bytes) -> None:
                wire.send(plain[:12] + b"".join(tags) + plain[12:])

            nothing, some = b"\x81\0\0\0", b"\x81\0\0\5"
            send(nothing, nothing)
            assert node.recv(100) == b"hello", "without the firewall"
            firewall.activate({"uplink": "uplink"})
            before = firewall.totals().reasons
            send(nothing, nothing)
            send(b"\x88\xa8\0\0", nothing)
            # For a VLAN's device, which is not there.
            send(some, nothing)
            send(nothing)
            with pytest.raises(TimeoutError):
                node.recv(100)
        after = firewall.totals().reasons
        grown = {
            why: after["ingress", why][0] - before.get(("ingress", why), (0, 0))[0]
            for why in ("vlan", "no_rule")
        }
        assert grown == {"vlan": 2, "no_rule": 1}


# Attaching


def test_activation_attaches_what_is_missing_and_takes_away_the_rest(
    open_firewall: Open, pins: Path, hook: str
) -> None:
    firewall = open_firewall()
    gate = Gate(firewall)
    gate.clear()
    assert not Firewall.exists(pins)

    def changes(**roles: Any) -> set[tuple[str, str, str]]:
        return {(item.program, item.interface, item.change) for item in firewall.activate(roles)}

    assert changes(pod0="pod") == {("from_pod", "pod0", "attached"), ("to_pod", "pod0", "attached")}
    assert changes(pod0="pod", uplink="uplink") == {
        ("from_pod", "pod0", "kept"),
        ("to_pod", "pod0", "kept"),
        ("from_wire", "uplink", "attached"),
        ("to_wire", "uplink", "attached"),
    }
    assert {(item.program, item.interface) for item in attachments(pins)} == {
        ("from_pod", "pod0"),
        ("to_pod", "pod0"),
        ("from_wire", "uplink"),
        ("to_wire", "uplink"),
    }
    assert changes(uplink="uplink") == {
        ("from_wire", "uplink", "kept"),
        ("to_wire", "uplink", "kept"),
        ("from_pod", "pod0", "detached"),
        ("to_pod", "pod0", "detached"),
    }
    assert Firewall.exists(pins)
    assert {item.change for item in remove(pins)} == {"detached"}
    assert not Firewall.exists(pins)
    assert attachments(pins) == []


def test_an_interface_that_is_not_there_leaves_nothing(open_firewall: Open, pins: Path) -> None:
    firewall = open_firewall()
    Gate(firewall).clear()
    with pytest.raises(bpf.BpfError):
        firewall.activate({"pod0": "pod", "nothing0": "pod"})
    assert not Firewall.exists(pins)
    firewall.activate({"pod0": "pod"})
    with pytest.raises(bpf.BpfError):
        firewall.activate({"pod0": "pod", "pod1": "pod", "nothing0": "pod"})
    assert {item.interface for item in attachments(pins)} == {"pod0"}


def test_what_is_pinned_is_adopted_with_all_it_knows(open_firewall: Open, pins: Path, scene: Scene) -> None:
    first = open_firewall()
    assert first.fresh
    assert Firewall.pinned(pins) is None
    gate = Gate(first)
    generation = gate.rules(ingress=[allow(FAR_IDENTITY, 17, 5000)])
    rows = first.rows()
    first.activate({"pod0": "pod"})
    assert not first.fresh
    with (
        bound(scene.pod, POD[4], socket.SOCK_DGRAM, 5000) as pod,
        bound(scene.far, FAR[4], socket.SOCK_DGRAM, 5000) as far,
    ):
        assert reaches(far, pod)
    second = open_firewall()
    assert not second.fresh
    assert (second.generation, second.rows()) == (generation, rows)
    assert [(one.local_port, one.direction) for one in second.tracked()] == [(5000, "ingress")]
    assert second.commit(rows) == generation
    assert {item.change for item in second.activate({"pod0": "pod"})} == {"kept"}
    with second.verdicts() as ring:
        assert ring.lost == 0
    whatever = Firewall.pinned(pins)
    assert whatever
    with whatever:
        assert whatever.rows() == rows


def test_another_version_takes_over_without_a_gap(
    open_firewall: Open, pins: Path, scene: Scene, hook: str
) -> None:
    """Other sizes are another version: connections and the generation's number are kept."""
    first = open_firewall()
    gate = Gate(first)
    generation = gate.rules(ingress=[allow(FAR_IDENTITY, 17, 5000)])
    rows = first.rows()
    first.activate({"pod0": "pod"})
    with (
        bound(scene.pod, POD[4], socket.SOCK_DGRAM, 5000) as pod,
        bound(scene.far, FAR[4], socket.SOCK_DGRAM, 5000) as far,
    ):
        assert reaches(far, pod)
        second = open_firewall(rules=512, tracked=2048)
        assert second.fresh
        assert set(second.replaced) == {
            "rules",
            "endpoints",
            "identities",
            "own_addresses",
            "active",
            "tracked",
        }
        assert second.generation == generation
        assert second.commit(rows) == generation + 1
        assert second.capacity()["rules"] == 512
        # Until it is attached the old one goes on by its own rows.
        assert reaches(far, pod)
        assert {item.change for item in second.activate({"pod0": "pod"})} == {"updated"}
        assert reaches(far, pod)
        assert [one.local_port for one in second.tracked()] == [5000]
    assert open_firewall(rules=512, tracked=2048).generation == generation + 1


def test_a_mixture_of_two_versions_is_never_adopted(
    open_firewall: Open, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_firewall()
    Gate(first).clear()
    first.activate({"pod0": "pod"})
    pin = pinning.pin_in_place
    for allowed in (3, len(MAPS) + len(PROGRAMS) - 1):
        left = iter(range(allowed))

        def interrupted(thing: Any, path: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            pin(thing, path)

        with monkeypatch.context() as patched:
            patched.setattr(pinning, "pin_in_place", interrupted)
            second = open_firewall(rules=300 + allowed)
            Gate(second).clear()
            with pytest.raises(KeyboardInterrupt):
                second.activate({"pod0": "pod"})
        assert open_firewall(rules=300 + allowed).fresh
        assert open_firewall().fresh


def test_an_interface_made_anew_is_attached_anew(open_firewall: Open, pins: Path, scene: Scene) -> None:
    subprocess.run(["ip", "link", "add", "again.0", "type", "veth", "peer", "name", "again1"], check=True)
    try:
        firewall = open_firewall()
        Gate(firewall).clear()
        assert {item.change for item in firewall.activate({"again.0": "pod"})} == {"attached"}
        subprocess.run(["ip", "link", "del", "again.0"], check=True)
        assert attachments(pins) == []
        subprocess.run(["ip", "link", "add", "again.0", "type", "veth", "peer", "name", "again1"], check=True)
        assert {item.change for item in firewall.activate({"again.0": "pod"})} == {"attached"}
        assert {item.change for item in firewall.activate({"again.0": "pod"})} == {"kept"}
    finally:
        subprocess.run(["ip", "link", "del", "again.0"], check=True)


def test_the_first_activation_alone_adopts_connections(open_firewall: Open, pins: Path) -> None:
    firewall = open_firewall()
    Gate(firewall).clear()
    active = firewall.maps["active"].view()
    firewall.activate({"pod0": "pod"}, adopt_s=1000)
    until = int(active["adopt_until_ns"][0])
    assert until > module._now_ns()
    firewall.activate({"pod0": "pod", "pod1": "pod"}, adopt_s=5000)
    assert int(active["adopt_until_ns"][0]) == until
    assert (pins / FOLDER / "links").is_dir()
