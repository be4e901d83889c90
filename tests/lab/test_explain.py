"""``hookline explain``: what it names is what then really happens, and each fault of the environment, really made, is named.

Answers are those of real sockets: the client's, and pods' in their cgroups; IPv4 and IPv6, TCP and UDP.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hookline import api, cli, control, lab, net
from hookline.control import ControlError, NotThere
from hookline.control.explain import Explanation, processes_outside, shares
from hookline.lab import Lab, LabError
from hookline.model.names import fabric_netns
from tests.lab.conftest import document, pod

SERVICES = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: web}
spec:
  addresses: ["192.0.2.10", "2001:db8:2::10"]
  ports: &ports
    - {name: http, port: 80, targetPort: 8080}
    - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
  backends: [{selector: {app: web}}]
---
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: far}
spec: {addresses: ["192.0.2.11", "2001:db8:2::11"], ports: *ports, backends: [{selector: {name: c}}]}
---
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: near}
spec: {addresses: ["192.0.2.12", "2001:db8:2::12"], ports: *ports, backends: [{selector: {name: a}}]}
---
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: sticky}
spec:
  addresses: ["192.0.2.13", "2001:db8:2::13"]
  ports: *ports
  backends: [{selector: {app: web}}]
  sessionAffinity: {type: ClientIP, timeoutSeconds: 600}
---
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: nobody}
spec: {addresses: ["192.0.2.14", "2001:db8:2::14"], ports: *ports, backends: [{selector: {app: nobody}}]}
---
apiVersion: hookline.dev/v1alpha1
kind: LocalRedirectPolicy
metadata: {name: cache}
spec:
  redirectFrontend:
    addressMatcher: {ip: 169.254.20.10, toPorts: [{port: "53", protocol: UDP}]}
  redirectBackend:
    localEndpointSelector: {matchLabels: {name: b}}
    toPorts: [{port: "5353", protocol: UDP}]
"""
CAPTURE = """
apiVersion: hookline.dev/v1alpha1
kind: DNSCapture
metadata: {name: all}
spec: {podSelector: {matchLabels: {name: a}}, resolver: {address: 203.0.113.20, port: 53}}
"""
KINDS = [("tcp", 4), ("tcp", 6), ("udp", 4), ("udp", 6)]
ADDRESS = {4: "192.0.2.{}", 6: "[2001:db8:2::{}]"}
PORT = {"tcp": "80", "udp": "53/udp"}


@pytest.fixture(scope="module")
def made(unique_name: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Pods a and b on node-1, c on node-2, all app=web; a client; the services applied to node-1."""
    name = unique_name()
    text = SERVICES.replace("&ports", "").replace(
        "*ports",
        "[{name: http, port: 80, targetPort: 8080}, {name: dns, port: 53, targetPort: 5353, protocol: UDP}]",
    )
    path = tmp_path_factory.mktemp("explain") / "services.yaml"
    path.write_text(text)
    try:
        made = api.lab_up(
            [
                document("Node", "node-1"),
                document("Node", "node-2"),
                *(
                    pod(one, node, metadata={"labels": {"app": "web", "name": one}})
                    for one, node in (("a", "node-1"), ("b", "node-1"), ("c", "node-2"))
                ),
                pod("idle", "node-1"),
                document("ExternalHost", "client", spec={"addresses": ["203.0.113.10", "2001:db8:203::10"]}),
            ],
            name,
        )
        with api.Node(f"lab/{name}") as node:
            node.apply(path)
        yield made
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)


@pytest.fixture
def node(made: Lab) -> Iterator[api.Node]:
    """The node that balances."""
    with api.Node(f"lab/{made.name}") as opened:
        yield opened


def to(number: int, protocol: str, family: int) -> str:
    return f"{ADDRESS[family].format(number)}:{PORT[protocol]}"


def asked(made: Lab, member: str, number: int, protocol: str, family: int, port: int = 0) -> str:
    """Who answers a real socket of a member."""
    (one,) = made.sockets(member, family, protocol)  # type: ignore[arg-type]
    with one:
        one.settimeout(3)
        if port:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("", port))
        one.connect((ADDRESS[family].format(number).strip("[]"), int(PORT[protocol].split("/")[0])))
        one.sendall(b"?\n")
        return one.recv(100).decode().strip()


def kinds_of(answer: Explanation) -> set[str]:
    return {one.kind for one in answer.obstacles}


# -- what it names is what answers


@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_the_slot_of_a_client_s_port(made: Lab, node: api.Node, protocol: str, family: int) -> None:
    names = set()
    for port in range(41000, 41012):
        answer = node.explain(f"external/client:{port}", f"default/web:{PORT[protocol]}", family=family)
        assert (answer.way, answer.outcome, answer.obstacles) == ("xdp", "backend", [])
        assert answer.table is not None
        assert answer.table["slot"] is not None
        assert answer.chosen is not None
        assert asked(made, "external/client", 10, protocol, family, port) == answer.chosen.name
        names.add(answer.chosen.name)
    assert len(names) > 1


@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_shares_where_the_port_is_not_known(made: Lab, node: api.Node, protocol: str, family: int) -> None:
    answer = node.explain("external/client", to(10, protocol, family))
    assert answer.chosen is None
    found = shares(answer.backends)
    assert set(found) == {"default/a", "default/b", "default/c"}
    assert sum(found.values()) == pytest.approx(1)
    assert all(share == pytest.approx(1 / 3, abs=0.01) for share in found.values())
    assert {one.name: one.how for one in answer.backends} == {
        "default/a": "local",
        "default/b": "local",
        "default/c": "nat",
    }
    counted = Counter(asked(made, "external/client", 10, protocol, family) for _ in range(40))
    assert set(counted) == set(found)


@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_sockets_of_a_pod(made: Lab, node: api.Node, protocol: str, family: int) -> None:
    answer = node.explain("idle", to(10, protocol, family))
    assert (answer.way, answer.outcome, answer.obstacles) == ("sockets", "backend", [])
    assert {one.how for one in answer.backends} == {"connected"}
    assert {asked(made, "idle", 10, protocol, family) for _ in range(40)} == set(shares(answer.backends))
    answer = node.explain("node/node-1", to(11, protocol, family))
    assert answer.chosen is not None
    assert asked(made, "node/node-1", 11, protocol, family) == answer.chosen.name == "default/c"


@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_a_client_that_is_the_backend_itself(made: Lab, node: api.Node, protocol: str, family: int) -> None:
    answer = node.explain("a", to(12, protocol, family))
    assert (answer.outcome, answer.obstacles) == ("backend", [])
    assert answer.chosen is not None
    assert asked(made, "a", 12, protocol, family) == answer.chosen.name == "default/a"
    assert node.explain("a", to(10, protocol, family)).obstacles == []


@pytest.mark.parametrize("member", ["external/client", "idle", "a", "b"])
@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_session_affinity(made: Lab, node: api.Node, member: str, protocol: str, family: int) -> None:
    answer = node.explain(member, to(13, protocol, family))
    assert answer.chosen is not None
    before = answer.chosen.name
    assert {asked(made, member, 13, protocol, family) for _ in range(5)} == {before}
    again = node.explain(member, to(13, protocol, family))
    assert again.chosen is not None
    assert again.chosen.name == before
    assert any("has a backend" in line for line in again.why)


def test_local_redirect(made: Lab, node: api.Node) -> None:
    answer = node.explain("idle", "169.254.20.10:53/udp")
    assert answer.table is not None
    assert answer.table["scope"] == "inside"
    assert answer.chosen is not None
    (one,) = made.sockets("idle", 4, "udp")
    with one:
        one.settimeout(3)
        one.connect(("169.254.20.10", 53))
        one.send(b"?")
        assert one.recv(100).decode().strip() == answer.chosen.name == "default/b"
    own = node.explain("b", "169.254.20.10:53/udp")
    assert own.outcome == "direct"
    assert any("which is its backend" in line for line in own.why)


def test_dns_capture(made: Lab, node: api.Node, tmp_path: Path) -> None:
    path = tmp_path / "capture.yaml"
    path.write_text(CAPTURE.replace("203.0.113.20", "192.0.2.12"))
    node.apply(path)
    try:
        answer = node.explain("a", "203.0.113.99:53/udp")
        assert any("captured (DNSCapture): they go to 192.0.2.12:53" in line for line in answer.why)
        (one,) = made.sockets("a", 4, "udp")
        with one:
            one.settimeout(3)
            one.connect(("203.0.113.99", 53))
            one.send(b"?")
            assert answer.chosen is not None
            assert one.recv(100).decode().strip() == answer.chosen.name == "default/a"
        refused = node.explain("a", "[2001:db8::99]:53/udp")
        assert refused.outcome == "refused"
        (six,) = made.sockets("a", 6, "udp")
        with six, pytest.raises(ConnectionRefusedError):
            six.connect(("2001:db8::99", 53))
        assert "captured" not in " ".join(node.explain("idle", "203.0.113.99:53/udp").why)
    finally:
        node.delete(["DNSCapture/default/all"])


@pytest.mark.parametrize(("protocol", "family"), KINDS)
def test_a_service_without_backends(made: Lab, node: api.Node, protocol: str, family: int) -> None:
    for member in ("external/client", "idle"):
        assert node.explain(member, to(14, protocol, family)).outcome == "refused"
        with pytest.raises(ConnectionRefusedError):
            asked(made, member, 14, protocol, family)


@pytest.mark.parametrize("family", [4, 6])
def test_a_port_that_no_service_has(made: Lab, node: api.Node, family: int) -> None:
    answer = node.explain("external/client", f"{ADDRESS[family].format(10)}:81")
    assert answer.outcome == "dropped"
    with pytest.raises(lab.ProbeFailed) as raised:
        made.probe("external/client", f"{ADDRESS[family].format(10)}:81", timeout=0.5)
    assert raised.value.reason == "timeout"
    for member in ("external/client", "idle"):
        for target in (f"{ADDRESS[family].format(10)}:81", "default/web:81", "web:80/udp"):
            answer = node.explain(member, target, family=family)
            (stop,) = (one for one in answer.obstacles if one.kind == "no_port")
            assert "VirtualService/default/web has 53/udp, 80/tcp" in stop.what
    with pytest.raises(lab.ProbeFailed):
        made.probe("idle", f"{ADDRESS[family].format(10)}:81", timeout=0.5)
    assert node.explain("idle", "169.254.20.10:54/udp").obstacles == [], "a redirect has its ports alone"
    direct = node.explain("external/client", "default/a:8080", family=family)
    assert (direct.outcome, direct.table) == ("direct", None)


@pytest.mark.parametrize(("family", "protocol"), [(4, "TCP"), (4, "UDP"), (6, "TCP"), (6, "UDP")])
def test_loopback_is_a_namespace_s_own(
    made: Lab, node: api.Node, monkeypatch: pytest.MonkeyPatch, family: int, protocol: str
) -> None:
    """The host's node ports are there for its own sockets alone, as `service_for_socket` has it."""
    here = control.Node._here
    monkeypatch.setattr(
        control.Node, "_here", lambda self, nodes: replace(here(self, nodes), has_loopback=True)
    )
    ports = [{"port": 8088, "nodePort": 30088, "protocol": protocol}]
    of_host = document(
        "Service", "loop", spec={"type": "NodePort", "ports": ports, "ipFamilies": [f"IPv{family}"]}
    )
    address = "127.0.0.1" if family == 4 else "[::1]"
    with api.Node(node.name) as opened:
        opened.apply(of_host)
        try:
            assert any(
                str(frontend).startswith(address)
                for status in opened.services()
                for frontend in status.pool.frontends
            ), "the row is there"
            for source in ("default/a", "node/node-1"):
                said = opened.explain(source, f"{address}:30088/{protocol.lower()}")
                assert said.outcome == "direct"
                assert any("loopback is its own" in one for one in said.why)
        finally:
            opened.delete([of_host.reference])


def test_a_backend_without_weight(made: Lab, node: api.Node, tmp_path: Path) -> None:
    path = tmp_path / "weighed.yaml"
    a, b = (made.member(one).address(4) for one in "ab")
    path.write_text(
        "apiVersion: hookline.dev/v1alpha1\nkind: VirtualService\nmetadata: {name: weighed}\nspec:\n"
        "  addresses: [192.0.2.20]\n  ports: [{name: http, port: 80, targetPort: 8080}]\n"
        f"  backends: [{{address: {a}, weight: 0}}, {{address: {b}}}]\n"
    )
    node.apply(path)
    try:
        answer = node.explain("external/client", "weighed:80")
        assert [one.name for one in answer.others] == ["default/a"]
        assert answer.chosen is not None
        assert made.probe("external/client", "192.0.2.20:80").answered_by == answer.chosen.name == "default/b"
    finally:
        node.delete(["VirtualService/default/weighed"])


def test_names_that_there_are_not(node: api.Node) -> None:
    for source, target, error in (
        ("external/client", "nothing:80", NotThere),
        ("nobody", "web:80", NotThere),
        ("external/client", "web", ControlError),
        ("2001:db8:203::10", "192.0.2.10:80", NotThere),
        ("203.0.113.10", "[2001:db8:2::10]:80", NotThere),
        ("2001:db8:203::10", "cache:53/udp", NotThere),
    ):
        with pytest.raises(error):
            node.explain(source, target)


# -- what would stop it


def sysctl(place: Path, name: str, value: int) -> None:
    with net.inside(place):
        net.write_sysctls({name: value})


@contextlib.contextmanager
def without(place: Path, name: str, value: int, usual: int) -> Iterator[None]:
    sysctl(place, name, value)
    try:
        yield
    finally:
        sysctl(place, name, usual)


def ip(place: Path, *words: str) -> None:
    subprocess.run(["ip", "-n", place.name, *words], check=True, capture_output=True)


def fails(made: Lab, member: str, number: int, family: int) -> None:
    with pytest.raises(lab.ProbeFailed):
        made.probe(member, f"{ADDRESS[family].format(number)}:80", timeout=1)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [11, 12])
def test_forwarding_switched_off(made: Lab, node: api.Node, family: int, number: int) -> None:
    place = made.nodes[0].netns
    name = "ipv4/ip_forward" if family == 4 else "ipv6/conf/all/forwarding"
    target = to(number, "tcp", family)
    assert node.explain("external/client", target).obstacles == []
    with without(place, name, 0, 1):
        assert kinds_of(node.explain("external/client", target)) == {"forwarding"}
        fails(made, "external/client", number, family)
        assert "forwarding" in kinds_of(node.explain("idle", target))
        fails(made, "idle", number, family)
    assert made.probe("external/client", target).answered_by


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("member", "number"), [("external/client", 11), ("external/client", 12), ("idle", 11)]
)
def test_no_route(made: Lab, node: api.Node, family: int, member: str, number: int) -> None:
    place = made.nodes[0].netns
    address = str(made.member("c" if number == 11 else "a").address(family))
    metric = ["metric", "1"] if family == 6 else []
    ip(
        place,
        f"-{family}",
        "route",
        "add",
        "unreachable",
        address,
        *(metric or ["metric", "0", "table", "99"]),
    )
    if family == 4:
        ip(place, "rule", "add", "to", address, "table", "99", "pref", "1")
    try:
        with api.Node(node.name) as fresh:
            answer = fresh.explain(member, to(number, "tcp", family))
        assert "no_route" in kinds_of(answer), answer
        fails(made, member, number, family)
    finally:
        if family == 4:
            ip(place, "rule", "del", "pref", "1")
            ip(place, "route", "del", "unreachable", address, "table", "99")
        else:
            ip(place, "-6", "route", "del", "unreachable", address, "metric", "1")
    assert made.probe(member, to(number, "tcp", family)).answered_by


def test_reverse_path_filter(made: Lab, node: api.Node) -> None:
    place = made.nodes[0].netns
    with net.inside(place):
        veth = net.route_to(made.member("idle").addresses[0]).interface
    ip(place, "rule", "add", "to", "203.0.113.10", "table", "98", "pref", "2")
    ip(place, "route", "add", "203.0.113.10", "dev", veth, "table", "98")
    try:
        assert "rp_filter" not in kinds_of(node.explain("external/client", to(12, "tcp", 4)))
        with without(place, "ipv4/conf/eth0/rp_filter", 1, 0):
            answer = node.explain("external/client", to(12, "tcp", 4))
            assert "rp_filter" in kinds_of(answer)
            assert veth in next(one.what for one in answer.obstacles if one.kind == "rp_filter")
            fails(made, "external/client", 12, 4)
            assert "rp_filter" not in kinds_of(node.explain("external/client", to(12, "tcp", 6)))
            assert made.probe("external/client", to(12, "tcp", 6)).answered_by == "default/a"
    finally:
        ip(place, "rule", "del", "pref", "2")
        ip(place, "route", "del", "203.0.113.10", "table", "98")
    assert made.probe("external/client", to(12, "tcp", 4)).answered_by == "default/a"


@pytest.mark.parametrize("family", [4, 6])
def test_a_neighbour_that_does_not_answer(made: Lab, node: api.Node, family: int) -> None:
    place, far = made.nodes[0].netns, made.nodes[1]
    hop = far.address(family)
    assert hop is not None
    port = fabric_port(made, far.netns)
    ip(fabric_netns(made.name), "link", "set", port, "down")
    try:
        with net.inside(place):
            net.forget(hop, "eth0")
            net.keep_resolved(hop, "eth0")
        deadline = time.monotonic() + 20
        while "neighbour" not in kinds_of(node.explain("external/client", to(11, "tcp", family))):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        fails(made, "external/client", 11, family)
        assert "neighbour" in kinds_of(node.explain("idle", to(11, "tcp", family)))
        fails(made, "idle", 11, family)
    finally:
        ip(fabric_netns(made.name), "link", "set", port, "up")
        with net.inside(place):
            net.forget(hop, "eth0")
            net.keep_resolved(hop, "eth0")
    deadline = time.monotonic() + 20
    while True:
        try:
            made.probe("external/client", to(11, "tcp", family), timeout=1)
            break
        except lab.ProbeFailed:
            assert time.monotonic() < deadline


def fabric_port(made: Lab, place: Path) -> str:
    """The fabric's end of a member's uplink."""
    with net.inside(place):
        numbers = net.link_numbers("eth0")
    with net.inside(fabric_netns(made.name)):
        return next(
            one.name
            for one in net.interfaces()
            if one.index == numbers["iflink"] and net.link_numbers(one.name)["iflink"] == numbers["ifindex"]
        )


@pytest.mark.parametrize("family", [4, 6])
def test_a_peer_that_takes_no_redirected_frames(made: Lab, node: api.Node, family: int) -> None:
    port = fabric_port(made, made.nodes[0].netns)
    with net.inside(fabric_netns(made.name)):
        net.set_offloads(port, gro=False)
    try:
        answer = node.explain("external/client", to(11, "tcp", family))
        assert kinds_of(answer) == {"peer"}
        assert port in answer.obstacles[0].what
        fails(made, "external/client", 11, family)
        assert node.explain("external/client", to(12, "tcp", family)).obstacles == [], (
            "that one is left to the stack"
        )
        assert made.probe("external/client", to(12, "tcp", family)).answered_by == "default/a"
    finally:
        with net.inside(fabric_netns(made.name)):
            net.set_offloads(port, gro=True)
    assert made.probe("external/client", to(11, "tcp", family)).answered_by == "default/c"


@pytest.mark.parametrize("family", [4, 6])
def test_an_mtu_that_is_smaller(made: Lab, node: api.Node, family: int) -> None:
    place = made.nodes[0].netns
    with net.inside(place):
        veth = net.route_to(made.member("a").addresses[0]).interface
    ip(place, "link", "set", veth, "mtu", "1300")
    try:
        answer = node.explain("external/client", to(12, "udp", family))
        assert kinds_of(answer) == {"mtu"}
        assert "1300" in answer.obstacles[0].what
        assert asked(made, "external/client", 12, "udp", family) == "default/a", "small ones do"
        (one,) = made.sockets("external/client", family, "udp")  # type: ignore[arg-type]
        with one:
            one.settimeout(1)
            one.connect((ADDRESS[family].format(12).strip("[]"), 53))
            one.send(bytes(1400))
            with pytest.raises(OSError, match=r"timed out|too long"):
                one.recv(2000)
    finally:
        ip(place, "link", "set", veth, "mtu", "1500")
    assert node.explain("external/client", to(12, "udp", family)).obstacles == []


def test_programs_that_are_not_attached(made: Lab, node: api.Node) -> None:
    links = node.name.pins / "links"
    try:
        for program, member in (("balance:eth0", "external/client"), ("connect4", "idle")):
            (path,) = [one for one in links.glob("*") if one.name.startswith(program)]
            path.unlink()  # the last that holds the link: it is detached
            with api.Node(node.name) as fresh:
                answer = fresh.explain(member, to(11, "tcp", 4))
                assert "not_attached" in kinds_of(answer), program
        fails(made, "external/client", 11, 4)
        (one,) = made.sockets("idle", 4, "udp")
        with one:
            one.settimeout(0.5)
            one.connect(("169.254.20.10", 53))
            assert one.getpeername() == ("169.254.20.10", 53)
            with contextlib.suppress(OSError):
                one.send(b"?")
            with pytest.raises(OSError, match=r"timed out|refused|unreachable|No route"):
                one.recv(100)
    finally:
        node.repair(full=True)
    assert node.explain("idle", to(11, "tcp", 4)).obstacles == []
    assert made.probe("external/client", to(11, "tcp", 4)).answered_by == "default/c"


def test_a_process_outside_the_node_s_cgroup(made: Lab, node: api.Node) -> None:
    member = made.member("idle")
    script = (
        "import socket, sys\none = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\none.settimeout(1)\n"
        "try:\n one.connect(('169.254.20.10', 53)); one.send(b'?'); print(one.recv(100).decode().strip(), flush=True)\n"
        "except OSError as error:\n print('no answer', flush=True)\nsys.stdin.read()"
    )
    with net.inside(member.netns):
        stray = subprocess.Popen(
            [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    with stray:
        assert stray.stdout is not None
        assert stray.stdout.readline() == "no answer\n"
        answer = node.explain("idle", "169.254.20.10:53/udp")
        assert kinds_of(answer) == {"cgroup"}
        assert str(stray.pid) in answer.obstacles[0].what
        stray.kill()
    with made.start(
        "idle", [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as placed:
        assert placed.stdout is not None
        assert placed.stdout.readline() == "default/b\n"
        assert node.explain("idle", "169.254.20.10:53/udp").obstacles == []
        assert processes_outside(member.netns.stat().st_ino, "") == []
        placed.kill()


# -- the command


def test_the_command_line(made: Lab, node: api.Node, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(["explain", *words, "--node", str(node.name)])
        return (status, *capsys.readouterr())

    status, out, _ = command("--from", "external/client", "--to", "default/web:80")
    assert status == 0
    assert "VirtualService/default/web port http, scope any, maglev, 1021 slots" in out
    assert "default/c" in out
    status, out, _ = command(
        "--from", "external/client:41000", "--to", "web:53/udp", "--family", "6", "--json"
    )
    found: dict[str, Any] = json.loads(out)
    assert (status, found["way"], found["outcome"], found["obstacles"]) == (0, "xdp", "backend", [])
    assert found["chosen"]["name"] == asked(made, "external/client", 10, "udp", 6, 41000)
    status, out, _ = command("--from", "idle", "--to", "nobody:80")
    assert (status, "it is refused" in out) == (1, True)
    status, _, err = command("--from", "idle", "--to", "nothing:80")
    assert (status, "there is no service default/nothing" in err) == (1, True)
    assert f"hookline get all --node {node.name}" in err
    status, out, _ = command("--from", "a", "--to", "near:80")
    assert (status, "nothing was found that would stop it" in out) == (0, True)
    status, out, _ = command("--from", "idle", "--to", "web:81")
    assert (status, "no port 81/tcp" in out) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--from", "idle", "--to", "web"),
        ("--from", "idle", "--to", "web:0"),
        ("--from", "idle", "--to", "web:70000"),
        ("--from", "!", "--to", "web:80"),
        ("--from", "2001:db8::1", "--to", "192.0.2.1:80"),
        ("--from", "192.0.2.1", "--to", "[2001:db8::1]:80"),
        ("--from", "idle", "--to", "192.0.2.1:80", "--family", "6"),
    ],
)
def test_what_the_command_line_alone_shows_to_be_none(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["explain", *words, "--json"]) == 2
    error = json.loads(capsys.readouterr().err)
    assert all(error[name] for name in ("error", "why", "remedy")), error


def test_every_error_has_a_cause_and_a_remedy(
    made: Lab, node: api.Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    here = str(node.name)
    inside = ["lab", "probe", "external/client", "--name", made.name]
    found = {}
    for words in (
        ["get", "bogus", "--node", here],
        ["delete", "bogus", "x", "--node", here],
        ["get", "all", "x", "--node", here],
        ["get", "namespaces", "x", "-n", "y", "--node", here],
        ["get", "generations", "x", "--node", here],
        ["agent", "--node", "lab/nope"],
        ["apply", "-f", str(broken), "--node", here],
        [*inside, "192.0.2.14:80"],
        [*inside, "192.0.2.14:53/udp"],
        [*inside, "198.18.0.1:80"],
    ):
        capsys.readouterr()
        assert cli.run([*words, "--json"]) in (1, 2), words
        error = json.loads(capsys.readouterr().err)
        assert all(error[name] for name in ("error", "why", "remedy")), (words, error)
        found[words[-1]] = error
    for target in ("192.0.2.14:80", "192.0.2.14:53/udp"):
        assert "or the service has no backend that takes it" in found[target]["why"]


def test_who_asks_for_services_is_told_of_virtual_ones(
    node: api.Node, capsys: pytest.CaptureFixture[str]
) -> None:
    here = str(node.name)
    assert cli.run(["get", "services", "--node", here]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["NAME"] or not out
    assert f"it has 5 VirtualServices: hookline get virtualservices --node {here}" in err
    assert cli.run(["get", "services", "--node", here, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["items"], err) == ([], "")


def test_a_node_that_balances_nothing(made: Lab) -> None:
    with api.Node(f"lab/{made.name}/node-2") as other:
        answer = other.explain("c", "192.0.2.10:80")
    assert answer.outcome == "direct"
    assert "nothing is balanced" in answer.why[0]
