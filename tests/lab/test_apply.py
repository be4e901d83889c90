"""``hookline apply`` and its kin on a lab's nodes: what they do, and what they refuse without changing anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from hookline import api, bpf, cli, lab, net
from hookline.control import Node
from hookline.control.state import locked
from hookline.control.tables import Tables, frontend_key
from hookline.datapath.loadbalancer import balancer, maglev
from hookline.datapath.loadbalancer.balancer import LoadBalancer
from hookline.lab import Lab
from hookline.model.names import lab_run_dir
from tests.lab.conftest import lab_with, pod, traces

OBJECT = Path(balancer.__file__).with_name("loadbalancer.bpf.o")
EMPTY = Path(api.__file__).parent / "bench" / "empty.bpf.o"
SERVICE = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: {name}}}
spec:
  addresses: [{address}]
  ports: [{{name: http, port: 80, targetPort: 8080}}]
  backends: [{backends}]
"""
SELECTED = "{selector: {app: orders}}"
KILLS = 12


def service(name: str, address: str, backends: str = SELECTED) -> str:
    return SERVICE.format(name=name, address=address, backends=backends)


def documents(*texts: str) -> str:
    return "\n---\n".join(texts)


def config(node: str, spec: str) -> str:
    return f"apiVersion: hookline.dev/v1alpha1\nkind: NodeConfig\nmetadata: {{name: {node}}}\nspec: {spec}\n"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Place:
    """One node of the lab, and the command line for it."""

    lab: Lab
    node: str
    folder: Path
    capture: pytest.CaptureFixture[str]
    base: Path = Path()

    @property
    def name(self) -> str:
        return f"lab/{self.lab.name}/{self.node}"

    def run(self, *arguments: str | Path) -> Ended:
        """The command line on this node, in this process."""
        self.capture.readouterr()
        status = cli.run([*map(str, arguments), "--node", self.name])
        return Ended(status, *self.capture.readouterr())

    def command(self, *arguments: str | Path) -> list[str]:
        """The same for a process of its own."""
        return [sys.executable, "-m", "hookline", *map(str, arguments), "--node", self.name]

    def file(self, text: str, name: str = "file.yaml") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def apply(self, text: str, *options: str, name: str = "file.yaml") -> Ended:
        return self.run("apply", "-f", self.file(text, name), *options)

    def state(self) -> dict[str, Any]:
        """All that a refused change must leave alone: what is wanted, what is pinned, attached and in the maps."""
        with api.Node(self.name) as node:
            wanted = {r.reference: (r.to_document(), node.source_of(r.reference)) for r in node.resources()}
            pins = node.name.pins
        found: dict[str, Any] = {"wanted": wanted, "links": self.links(), "maps": {}}
        found["pins"] = sorted(str(path.relative_to(pins)) for path in pins.rglob("*"))
        for name in ("services", "backends", "maglev", "settings"):
            if (pins / "maps" / name).exists():
                with bpf.Map.from_pin(pins / "maps" / name) as table:
                    keys, values = table.read()
                    rows = (
                        sorted(zip(map(bytes, keys), map(bytes, values), strict=True))
                        if len(keys) < 999
                        else []
                    )
                    found["maps"][name] = (table.id, rows or hashlib.sha256(values.tobytes()).hexdigest())
        announced = lab_run_dir(self.lab.name) / "announced.json"
        found["announced"] = json.loads(announced.read_text()) if announced.exists() else {}
        return found

    def links(self) -> dict[str, tuple[int, int, int]]:
        """Every pinned link: its id, its program's and its interface's."""
        found = {}
        for path in (api.Node(self.name).name.pins / "links").glob("*"):
            with bpf.Link.from_pin(path) as link:
                found[path.name] = (link.info.id, link.info.program_id, link.info.interface_index)
        return found

    def answer(self, address: str = "192.0.2.10", port: int = 80) -> str:
        """Who answers the client there."""
        return self.lab.probe("external/client", address, port).answered_by


@pytest.fixture(scope="module")
def one_lab(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes, four pods labelled app=orders, a client."""
    labelled = {"labels": {"app": "orders"}}
    with lab_with(
        unique_name(),
        *(pod(f"p{number}", f"node-{number % 2 + 1}", metadata=labelled) for number in range(4)),
        nodes=2,
    ) as up:
        yield up


@pytest.fixture(scope="module")
def balancing(one_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node-1 balances one service, from this file."""
    path = tmp_path_factory.mktemp("base") / "orders.yaml"
    path.write_text(service("orders", "192.0.2.10"))
    with api.Node(f"lab/{one_lab.name}") as node:
        node.apply(path)
    return path


@pytest.fixture
def node(
    one_lab: Lab, balancing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Place]:
    """node-1, balancing one service."""
    place = Place(one_lab, "node-1", tmp_path, capsys, balancing)
    yield place
    with api.Node(place.name) as opened:
        _delete_all_but(opened, "lab", str(balancing))
        opened.apply(balancing)


@pytest.fixture
def bare(one_lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    """node-2, with nothing loaded."""
    place = Place(one_lab, "node-2", tmp_path, capsys)
    yield place
    with api.Node(place.name) as opened:
        _delete_all_but(opened, "lab")
    assert place.state()["pins"] == [], "with the last service everything goes"


def _delete_all_but(node: Node, *sources: str) -> None:
    node.delete([r.reference for r in node.resources() if node.source_of(r.reference) not in sources])


@contextlib.contextmanager
def unchanged(place: Place) -> Iterator[None]:
    """Fails if the block changes anything of the node."""
    before = place.state()
    yield
    after = place.state()
    assert after == before


def interfaces(links: Iterable[str]) -> set[str]:
    """The interfaces of pinned links; "" for a tracepoint."""
    return {name.partition(":")[2] for name in links}


def error(ended: Ended) -> tuple[str, str, str]:
    """The three lines of an error: what, why, remedy."""
    assert ended.out == ""
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert lines[0].startswith("error: "), ended.err
    found = {"error": "", "why": "", "do": ""}
    label = ""
    for line in lines:
        word = line.partition(":")[0]
        label = word if word in found else label
        found[label] += line.removeprefix(f"{label}:").strip() + "\n"
    return found["error"].strip(), found["why"].strip(), found["do"].strip()


# -- what it does


def test_services_are_balanced_once_the_command_has_ended(node: Place) -> None:
    done = node.apply(service("second", '192.0.2.20, "2001:db8::20"'))
    assert done == Ended(0, "VirtualService/default/second created\n", "")
    assert node.answer("192.0.2.20").startswith("default/p")
    assert node.answer("2001:db8::20").startswith("default/p")


def test_the_first_service_attaches_the_programs_and_the_last_takes_them_along(bare: Place) -> None:
    done = bare.apply(service("only", "192.0.2.30"))
    assert done.status == 0
    assert done.out.splitlines() == [
        "VirtualService/default/only created",
        "resolve attached on eth0 (tcx)",
        "reply attached on eth0 (tcx)",
        "balance attached on eth0 (xdp native)",
        "count_exceptions attached (raw_tracepoint)",
        *(f"{name} attached (cgroup)" for name in balancer.SOCKET_PROGRAMS),
    ]
    assert bare.answer("192.0.2.30").startswith("default/p")
    done = bare.run("delete", "vs", "only")
    assert done.status == 0
    assert "balance detached from eth0 (xdp native)" in done.out
    assert bare.state()["pins"] == []
    with pytest.raises(lab.ProbeFailed):
        bare.answer("192.0.2.30")


def test_a_second_apply_changes_nothing_and_keeps_the_links(node: Place) -> None:
    with unchanged(node):
        done = node.run("apply", "-f", node.base)
        assert done == Ended(0, "VirtualService/default/orders unchanged\nnothing changed\n", "")
        again = node.run("apply", "-f", node.base, "--json").document
    assert again["changes"] is False
    assert {one["change"] for one in again["attachments"]} <= {"kept"}


def test_a_change_keeps_links_and_tables_of_others(node: Place) -> None:
    assert node.apply(service("second", "192.0.2.20")).status == 0
    links = node.links()
    assert node.apply(service("second", "192.0.2.20", "{address: 203.0.113.10}")).status == 0
    assert node.links() == links
    assert node.answer().startswith("default/p")


def test_standard_input_and_folders(node: Place) -> None:
    text = service("piped", "192.0.2.40")
    done = subprocess.run(
        node.command("apply", "-f", "-", "--json"), input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["resources"] == [
        {"action": "create", "reference": "VirtualService/default/piped"}
    ]
    for number in range(2):
        node.file(service(f"s{number}", f"192.0.2.{50 + number}"), f"folder/{number}.yaml")
    done_folder = node.run("apply", "-f", node.folder / "folder")
    assert done_folder.out.count("created") == 2
    assert node.run("delete", "-f", node.folder / "folder").out.count("removed") == 2


def test_prune(node: Place) -> None:
    one, two, other = (service(name, f"192.0.2.{n}") for n, name in ((61, "one"), (62, "two"), (63, "other")))
    assert node.apply(other, name="other.yaml").status == 0
    assert node.apply(documents(one, two)).status == 0
    assert node.apply(one).out == "VirtualService/default/one unchanged\nnothing changed\n"
    with unchanged(node):
        plan = node.apply(one, "--prune", "--dry-run", "--json").document
    assert {"action": "remove", "reference": "VirtualService/default/two"} in plan["resources"]
    assert node.apply(one, "--prune").out.splitlines() == [
        "VirtualService/default/one unchanged",
        "VirtualService/default/two removed",
    ]
    left = {item["name"] for item in node.run("get", "vs", "--json").document["items"]}
    assert left == {"orders", "one", "other"}, "what other files set stays"
    pods = node.run("get", "pods", "--json").document["items"]
    assert len(pods) == 4, "and what the lab owns"


def test_prune_of_a_folder_speaks_for_files_that_are_gone(node: Place) -> None:
    for number in range(3):
        node.file(service(f"f{number}", f"192.0.2.{70 + number}"), f"config/{number}.yaml")
    assert node.run("apply", "-f", node.folder / "config").status == 0
    (node.folder / "config" / "2.yaml").unlink()
    done = node.run("apply", "-f", node.folder / "config", "--prune")
    assert "VirtualService/default/f2 removed" in done.out
    assert "orders" not in done.out


def test_a_dry_run_shows_the_plan_and_changes_nothing(node: Place) -> None:
    with unchanged(node):
        done = node.apply(service("second", "192.0.2.20"), "--dry-run")
        assert done.status == 0
        assert f"plan for node {node.name}; nothing was changed" in done.out
        assert "+ VirtualService/default/second" in done.out
        assert "4 backends" in done.out
        removal = node.run("delete", "vs", "orders", "--dry-run")
        assert "- VirtualService/default/orders" in removal.out
        assert "programs are detached" in removal.out


def test_a_dry_run_on_a_node_without_anything_loads_nothing(bare: Place) -> None:
    with unchanged(bare):
        plan = bare.apply(service("only", "192.0.2.30"), "--dry-run", "--json").document
    assert plan["loads_programs"] is True
    assert plan["uplinks"] == [{"interface": "eth0", "xdp_mode": "auto"}]
    assert bare.state()["pins"] == []


def test_a_dry_run_counts_the_connections_that_are_concerned(node: Place) -> None:
    addresses = [str(member.address(4)) for member in node.lab.pods]
    listed = ", ".join(f"{{address: {address}}}" for address in addresses)
    assert node.apply(service("listed", "192.0.2.20", listed)).status == 0
    with net.inside(node.lab.member("external/client").netns):
        sockets = [socket.create_connection(("192.0.2.20", 80), timeout=3) for _ in range(12)]
    try:
        backends = node.run("get", "backends", "listed", "--json").document["backends"]
        connections = {backend["address"]: backend["connections"] for backend in backends}
        assert sum(connections.values()) == 12
        fewer = ", ".join(f"{{address: {address}}}" for address in addresses[1:])
        with unchanged(node):
            plan = node.apply(service("listed", "192.0.2.20", fewer), "--dry-run", "--json").document
    finally:
        for one in sockets:
            one.close()
    (pool,) = plan["services"]
    assert pool["open_connections_stay"] == connections[addresses[0]]
    assert pool["backends_removed"] == 1
    assert 0.25 <= pool["new_connections_moved"] <= 0.27


def test_what_get_and_describe_say(node: Place) -> None:
    (before,) = node.run("get", "vs", "orders", "--json").document["items"]
    for _ in range(8):
        node.answer()
    (item,) = node.run("get", "vs", "orders", "--json").document["items"]
    counted = item["status"]["connections"]
    assert counted == before["status"]["connections"] + 8
    assert item["status"]["backends"] == item["status"]["backends_reachable"] == 4
    table = node.run("get", "virtualservices").out.splitlines()
    assert table[0].split()[:4] == ["NAMESPACE", "NAME", "ADDRESSES", "PORTS"]
    assert table[1].split()[:7] == ["default", "orders", "192.0.2.10", "80/tcp", "nat", "maglev", "4"]
    backends = node.run("get", "backends", "--json").document["backends"]
    assert {backend["name"] for backend in backends} == {f"default/p{number}" for number in range(4)}
    assert sum(backend["connections"] for backend in backends) == counted
    assert sum(backend["share"] for backend in backends) == pytest.approx(1)
    assert {backend["placement"] for backend in backends} == {"local", "nat"}
    described = node.run("describe", "VirtualService/default/orders", "--json").document
    assert described["item"]["status"]["pools"][0]["table_size"] == 1021
    assert {(one["program"], one["hook"]) for one in described["attachments"]} == {
        ("balance", "xdp native"),
        ("resolve", "tcx"),
        ("reply", "tcx"),
        ("count_exceptions", "raw_tracepoint"),
        *((name, "cgroup") for name in balancer.SOCKET_PROGRAMS),
    }
    assert described["totals"]["verdicts"]["pass"]["packets"] > 0
    text = node.run("describe", "vs", "orders").out
    for word in ("port http, IPv4", "table of 1021 slots", "default/p3", "IDEAL", "25.0%", "xdp native"):
        assert word in text
    everything = node.run("get", "all").out
    assert "VirtualService\n" in everything
    assert "Pod\n" in everything
    assert node.run("describe", "pod", "p0").out.startswith("Pod/default/p0\n")


def test_yaml_can_be_applied_again(node: Place) -> None:
    text = node.run("get", "vs", "-o", "yaml").out
    done = node.apply(text)
    assert done.out == "VirtualService/default/orders unchanged\nnothing changed\n"


def test_nothing_there_is_no_error(bare: Place) -> None:
    assert bare.run("get", "vs") == Ended(0, "", f"node {bare.name} has no VirtualService\n")
    assert bare.run("get", "backends", "--json").document == {"node": bare.name, "backends": []}


# -- what it refuses


FULL_SERVICES = documents(
    config("node-1", "{maps: {services: 16}}"),
    *(service(f"s{n}", f"198.51.100.{n + 1}") for n in range(9)),
)
FULL_BACKENDS = documents(
    config("node-1", "{maps: {backends: 16}}"),
    service("many", "198.51.100.1", ", ".join(f"{{address: 203.0.113.{n}}}" for n in range(100, 120))),
)
FULL_TABLES = documents(
    config("node-1", "{maps: {maglevPages: 16}}"),
    *(service(f"s{n}", f"198.51.100.{n + 1}") for n in range(17)),
)

REFUSED = {
    "broken yaml": ("kind: [", "", "not valid YAML", ""),
    "not a resource": ("just text", "", "file.yaml:1", ""),
    "an empty file": ("", "", "holds no resource", "apiVersion"),
    "an unknown kind": (
        service("x", "192.0.2.20").replace("VirtualService", "VirtualServce"),
        "kind",
        "VirtualServce",
        "did you mean VirtualService?",
    ),
    "an unknown field": (
        f"{service('x', '192.0.2.20')}  algoritm: maglev",
        "spec.algoritm",
        "",
        "did you mean algorithm?",
    ),
    "a bad address": (service("x", "192.0.2.999"), "spec.addresses[0]", "192.0.2.999", ""),
    "a port out of range": (
        service("x", "192.0.2.20").replace("80,", "70000,"),
        "spec.ports[0].port",
        "70000",
        "",
    ),
    "an address wanted by two services": (
        service("x", "192.0.2.10"),
        "192.0.2.10:80/tcp is wanted twice",
        "VirtualService/default/orders and VirtualService/default/x both have it",
        "another address or port",
    ),
    "the same object twice": (
        documents(service("x", "192.0.2.20"), service("x", "192.0.2.21")),
        "VirtualService/default/x",
        "already at",
        "keep one",
    ),
    "an address of somebody else in the lab": (
        service("x", "203.0.113.10"),
        "203.0.113.10",
        "the address of external/client",
        "an address of its own",
    ),
    "an interface that does not exist": (
        config("node-1", "{interfaces: [{name: eth7, role: uplink}]}"),
        "there is no interface eth7",
        "here are lo, eth0",
        "name one of these",
    ),
    "a full map of services": (FULL_SERVICES, "rows of services do not fit", "16", "spec.maps.services"),
    "a full map of backends": (FULL_BACKENDS, "backends", "15", "spec.maps.backends"),
    "a full map of tables": (FULL_TABLES, "tables of", "16 pages", "spec.maps.maglevPages"),
    "an object of the lab": (
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}",
        "Namespace/default belongs to the lab",
        "",
        "change the lab",
    ),
}


@pytest.mark.parametrize(("text", "what", "why", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(node: Place, text: str, what: str, why: str, remedy: str) -> None:
    with unchanged(node):
        # Something that could be done stands beside it: all or nothing.
        done = node.apply(documents(text, service("fine", "192.0.2.99")) if text else text)
        shown = error(done)
    assert done.status == 1
    if what:
        assert what in shown[0]
        assert why in shown[1]
    else:
        assert why in " ".join(shown)
    assert remedy in shown[2] or remedy in shown[1]
    assert node.answer().startswith("default/p")


def test_a_refusal_as_json(node: Place) -> None:
    with unchanged(node):
        done = node.apply(service("x", "192.0.2.10"), "--json")
    assert done.status == 1
    assert done.out == ""
    assert json.loads(done.err).keys() == {"error", "why", "remedy"}


def test_after_a_full_map_the_node_goes_on(node: Place) -> None:
    assert node.apply(FULL_TABLES).status == 1
    assert node.apply(service("second", "192.0.2.20")).status == 0
    assert node.answer("192.0.2.20").startswith("default/p")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("delete", "vs", "nope"), 1, "VirtualService/default/nope does not exist"),
        (("delete", "vs", "orders", "nope"), 1, "VirtualService/default/nope does not exist"),
        (("delete", "pod", "p0"), 1, "Pod/default/p0 belongs to the lab"),
        (("delete", "vs"), 2, "which VirtualService?"),
        (("delete",), 2, "say what to delete"),
        (("delete", "vs", "orders", "-f", "x.yaml"), 2, "say what to delete"),
        (("delete", "-f", "/nowhere.yaml"), 1, "/nowhere.yaml"),
        (("apply", "-f", "/nowhere.yaml"), 1, "/nowhere.yaml"),
        (("get", "virtualservice", "nope"), 1, "VirtualService/default/nope does not exist"),
        (("get", "vsx"), 2, "is not a kind that Hookline knows"),
        (("get", "all", "orders"), 2, "one object has one"),
        (("get", "backends", "-o", "yaml"), 2, "backends cannot be printed as yaml"),
        (("describe", "vs"), 2, "which VirtualService?"),
        (("describe", "VirtualService/orders"), 2, "is not one object"),
        (("describe", "node", "node-1", "-n", "default"), 2, "are in no namespace"),
    ],
)
def test_what_is_not_there_or_not_meant(
    node: Place, arguments: Sequence[str], status: int, said: str
) -> None:
    with unchanged(node):
        done = node.run(*arguments)
    assert done.status == status
    assert said in "\n".join(error(done))


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("lab/{lab}/node-9", 1, "has no node/node-9"),
        ("lab/no-such-lab", 1, "there is no lab no-such-lab"),
        ("nodes/x", 2, "'nodes/x' is not a node's name"),
    ],
)
def test_unknown_nodes(node: Place, name: str, status: int, said: str) -> None:
    path = node.file(service("x", "192.0.2.20"))
    node.capture.readouterr()
    ended = cli.run(["apply", "-f", str(path), "--node", name.format(lab=node.lab.name)])
    done = Ended(ended, *node.capture.readouterr())
    assert done.status == status
    assert said in "\n".join(error(done))


def test_somebody_elses_xdp_program_stays(bare: Place) -> None:
    with net.inside(bare.lab.member("node/node-2").netns), bpf.Object.open(EMPTY) as foreign:
        foreign.only("empty_xdp")
        foreign.load()
        with foreign.programs["empty_xdp"].attach_xdp("eth0") as link:
            with unchanged(bare):
                done = bare.apply(service("x", "192.0.2.30"))
                what, _, remedy = error(done)
            assert link.info.interface_index
    assert done.status == 1
    assert "eth0" in what
    assert remedy
    assert bare.apply(service("x", "192.0.2.30")).status == 0


def test_somebody_elses_xdp_program_on_a_further_uplink(node: Place) -> None:
    """The change is refused after one interface was fine: that one is as it was."""
    with net.inside(node.lab.member("node/node-1").netns), _veth("up0"), bpf.Object.open(EMPTY) as foreign:
        foreign.only("empty_xdp")
        foreign.load()
        with foreign.programs["empty_xdp"].attach_xdp("up0"), unchanged(node):
            done = node.apply(
                config("node-1", "{interfaces: [{name: eth0, role: uplink}, {name: up0, role: uplink}]}")
            )
            assert "up0" in error(done)[0]
    assert node.answer().startswith("default/p")


@contextlib.contextmanager
def _veth(name: str) -> Iterator[None]:
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False, stderr=subprocess.DEVNULL)


def test_an_interface_that_comes_back_is_attached_again(node: Place) -> None:
    text = config("node-1", "{interfaces: [{name: eth0, role: uplink}, {name: up0, role: uplink}]}")
    with net.inside(node.lab.member("node/node-1").netns):
        with _veth("up0"):
            assert node.apply(text).status == 0
            first = node.links()
            assert interfaces(first) == {"", "eth0", "up0"}
        with unchanged(node):
            done = node.apply(text)
        assert "there is no interface up0" in error(done)[0]
        assert node.run("get", "vs").status == 0, "reading goes on"
        with _veth("up0"):
            again = node.apply(text)
            assert again.status == 0
            assert "balance attached on up0" in again.out
            assert "eth0" not in again.out
            second = node.links()
            assert second["balance:eth0"] == first["balance:eth0"]
            assert second["balance:up0"][2] not in (0, first["balance:up0"][2])
            assert node.run("delete", "nodeconfig", "node-1").status == 0
            assert interfaces(node.links()) == {"", "eth0"}
    assert node.answer().startswith("default/p")


OBJECTS = {
    "truncated": lambda data: data[: len(data) // 3],
    "empty": lambda data: b"",
    "not an object": lambda data: b"#!/bin/sh\n" * 100,
    "somebody else's": lambda data: EMPTY.read_bytes(),
}


@pytest.mark.parametrize("damage", OBJECTS.values(), ids=OBJECTS)
def test_a_damaged_object_is_refused_and_what_runs_goes_on(
    node: Place, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = damage(OBJECT.read_bytes())
    with unchanged(node):
        with monkeypatch.context() as patch:
            patch.setattr(balancer, "object_bytes", lambda: data)
            done = node.apply(service("second", "192.0.2.20"))
        what, why, _ = error(done)
    assert done.status == 1
    assert "unexpected" not in what + why
    assert node.answer().startswith("default/p")


def test_without_capabilities(node: Place) -> None:
    path = node.file(service("x", "192.0.2.20"))
    path.chmod(0o644)
    command = node.command("apply", "-f", path)
    wrappers = (
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
        ["setpriv", "--bounding-set", "-all"],
    )
    for wrapper in wrappers:
        # A checkout below /root is nobody's to read: then only root without capabilities can run it.
        starts = [*wrapper, sys.executable, "-m", "hookline", "--version"]
        if subprocess.run(starts, capture_output=True, check=False).returncode and "--reuid" in wrapper:
            continue
        with unchanged(node):
            done = subprocess.run([*wrapper, *command], capture_output=True, text=True, check=False)
        what, why, remedy = error(Ended(done.returncode, done.stdout, done.stderr))
        assert done.returncode == 3
        assert what == f"cannot work on node {node.name}"
        assert "CAP_NET_ADMIN and CAP_BPF" in why
        assert remedy
        if "--reuid" in wrapper:
            assert remedy == f"sudo {shlex.join(command)}"


def test_a_state_folder_that_cannot_be(node: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = node.file("a file", "blocked")
    with unchanged(node):
        with monkeypatch.context() as patch:
            patch.setenv("HOOKLINE_STATE", str(blocked / "below"))
            done = node.apply(service("x", "192.0.2.20"))
        what, _, remedy = error(done)
    assert done.status == 1
    assert str(blocked) in what
    assert "HOOKLINE_STATE" in remedy


def test_a_state_folder_that_is_mounted_read_only(node: Place) -> None:
    folder = api.Node(node.name).name.state_dir
    path = node.file(service("x", "192.0.2.20"))
    here = shlex.quote(str(folder))
    script = f'mount --bind {here} {here} && mount -o remount,ro,bind {here} && exec "$@"'
    with unchanged(node):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *node.command("apply", "-f", path)],
            capture_output=True,
            text=True,
            check=False,
        )
    what, why, remedy = error(Ended(done.returncode, done.stdout, done.stderr))
    assert done.returncode == 1
    assert str(folder) in what
    assert why == "Read-only file system"
    assert remedy


def test_a_damaged_state_file(node: Place) -> None:
    path = api.Node(node.name).name.state_dir / "state.db"
    before = {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}
    try:
        for name in before:
            if name != "lock":
                (path.parent / name).unlink()
        path.write_bytes(b"not a database at all" * 1000)
        done = node.apply(service("x", "192.0.2.20"))
        what, why, remedy = error(done)
        assert str(path) in what
        assert "damaged" in why
        assert "hookline state repair" in remedy
        assert done.status == 1
        assert node.answer().startswith("default/p")
    finally:
        for name, data in before.items():
            (path.parent / name).write_bytes(data)


# -- processes that meet, and processes that are killed


def test_two_applies_at_once_both_happen(node: Place) -> None:
    files = [
        node.file(documents(*(service(f"{n}-{i}", f"198.51.{n}.{i + 1}") for i in range(20))), f"{n}.yaml")
        for n in range(3)
    ]
    processes = [
        subprocess.Popen(
            node.command("apply", "-f", path, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for path in files
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        assert len(json.loads(out)["resources"]) == 20
    assert len(node.run("get", "vs", "--json").document["items"]) == 61
    check_tables(node)


def test_one_writer_at_a_time(node: Place) -> None:
    path = node.file(service("x", "192.0.2.20"))
    with locked(api.Node(node.name).name.state_dir):
        waiting = subprocess.Popen(
            node.command("apply", "-f", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
        assert node.run("get", "vs").out.count("\n") == 2, "reading does not wait"
    _, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, err) == (0, b"")


def test_interrupted_while_it_waits(node: Place) -> None:
    path = node.file(service("x", "192.0.2.20"))
    with unchanged(node), locked(api.Node(node.name).name.state_dir):
        waiting = subprocess.Popen(
            node.command("apply", "-f", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=10)
    assert (waiting.returncode, out, err) == (130, b"", b"")


CHILD = """
import sys
import hookline.api, hookline.sources.files
from hookline import cli
print("ready", flush=True)
sys.exit(cli.run(sys.argv[1:]))
"""


def test_killed_in_the_middle_and_applied_again(bare: Place) -> None:
    """Also the first apply, which loads and attaches: whatever a kill leaves, the next apply makes whole."""
    chance = random.Random(20)
    pods = [str(member.address(4)) for member in bare.lab.pods]
    files = []
    for version in range(3):
        texts = []
        for number in range(40):
            if number % 7 == version:
                continue
            chosen = chance.sample(pods, 1 + (number + version) % len(pods))
            backends = ", ".join(f"{{address: {a}, weight: {chance.randint(1, 9)}}}" for a in chosen)
            texts.append(service(f"s{number}", f"198.51.100.{number + 1}", backends))
        files.append(bare.file(documents(*texts), f"version-{version}.yaml"))
    finished = 0
    for round_number in range(KILLS):
        path = bare.folder / "current.yaml"
        path.write_text(files[round_number % 3].read_text())
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, "apply", "-f", str(path), "--prune", "--node", bare.name],
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 0.9))
            process.kill()
        finished += process.returncode == 0
        if round_number % 4 == 3:
            done = bare.run("apply", "-f", path, "--prune")
            assert done.status == 0, done.err
            check_tables(bare)
            assert len(bare.run("get", "vs", "--json").document["items"]) == path.read_text().count("kind:")
            assert bare.answer("198.51.100.40").startswith("default/p")
            with unchanged(bare):
                assert "nothing changed" in bare.run("apply", "-f", path, "--prune").out
    assert finished < KILLS, "some were killed in time"


def check_tables(place: Place) -> None:
    """Holds the kernel's tables against ones computed afresh from what is wanted: nothing missing, nothing left over."""
    with Node(place.name) as node:
        statuses = node.services()
        pins = node.name.pins
    opened = LoadBalancer.pinned(pins)
    assert opened is not None
    with opened:
        tables = Tables(opened)
        addresses = opened.maps["backends"].read()[1]
        expected_keys = set()
        expected_backends = 0
        for status in statuses:
            pool = status.pool
            wanted = maglev.build(
                [t.identity for t in pool.targets], [t.weight for t in pool.targets], pool.table_size
            )
            for frontend in pool.frontends:
                expected_keys |= {frontend_key(frontend), frontend_key(frontend)[:16] + bytes(4)}
                rows = tables.table(frontend)
                held = addresses[rows]
                for position, target in enumerate(pool.targets):
                    mine = held[wanted == position]
                    assert {bytes(one) for one in mine["address"]} == {_mapped(str(target.address))}
                    assert set(mine["port"].byteswap().tolist()) == {target.port}
                    assert (mine["pool"] == pool.key).all()
            expected_backends += len(pool.targets)
        assert set(tables.services) == expected_keys
        assert tables.backends_in_use() == expected_backends


def _mapped(text: str) -> bytes:
    address = ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


# -- labs and nodes together


def test_a_labs_file_may_hold_services(
    lab_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(
        documents(
            "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: orders}}, "
            "spec: {containers: [{ports: [{containerPort: 8080}]}]}}",
            "{apiVersion: hookline.dev/v1alpha1, kind: ExternalHost, metadata: {name: client}, "
            "spec: {address: 203.0.113.10}}",
            config("node-1", "{maps: {services: 32}}"),
            config("node-9", "{}"),
            service("orders", "192.0.2.10"),
        )
    )
    assert cli.run(["lab", "up", "-f", str(path), "--name", lab_name]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"lab {lab_name} is up: 1 node, 1 pod, 1 external host\n"
    assert "NodeConfig/node-9 is passed over" in shown.err
    assert Lab.open(lab_name).probe("external/client", "192.0.2.10:80").answered_by == "default/a"
    assert cli.run(["apply", "-f", str(path), "--node", f"lab/{lab_name}"]) == 1
    assert "belongs to the lab" in capsys.readouterr().err
    assert cli.run(["lab", "down", "--name", lab_name]) == 0
    assert traces(lab_name) == []


def test_a_lab_whose_services_cannot_be_is_not_made(
    lab_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(documents(service("a", "192.0.2.10"), service("b", "192.0.2.10")))
    assert cli.run(["lab", "up", "-f", str(path), "--name", lab_name]) == 1
    assert "is wanted twice" in capsys.readouterr().err
    assert traces(lab_name) == []


def test_services_follow_the_labs_pods(node: Place) -> None:
    opened = Lab.open(node.lab.name)
    opened.add_pod(pod("late", "node-2", metadata={"labels": {"app": "orders"}}))
    try:
        api.refresh_lab(opened.name)
        names = {one["name"] for one in node.run("get", "backends", "--json").document["backends"]}
        assert names == {"default/late", *(f"default/p{number}" for number in range(4))}
        assert "default/late" in {node.answer() for _ in range(60)}
    finally:
        opened.remove_pod("late")
        api.refresh_lab(opened.name)
    names = {one["name"] for one in node.run("get", "backends", "--json").document["backends"]}
    assert names == {f"default/p{number}" for number in range(4)}


def test_dsr_backends_have_the_address_from_python_too(node: Place) -> None:
    text = service("direct", "192.0.2.80").replace("  backends:", "  forwarding: dsr\n  backends:")
    text = text.replace("port: 80, targetPort: 8080", "port: 8080")
    path = node.file(text)
    with api.Node(f"lab/{node.lab.name}") as opened:
        assert str(opened.name) == node.name
        opened.apply(path)
        placed = {
            b.target.name: b.placement.how
            for s in opened.services()
            for b in s.backends
            if s.pool.forwarding == "dsr"
        }
    # p1 and p3 are on node-2: reached through it, which dsr cannot address by layer 2.
    assert placed["default/p0"] == "local"
    assert {node.answer("192.0.2.80", 8080) for _ in range(40)} == set(placed)
