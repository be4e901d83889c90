"""The agent with exactly the rights of its systemd unit: what it must do works, and what it may not is said."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import api, lab, net
from hookline.agent import _unit
from hookline.lab import Lab, LabError
from tests.lab.agents import AgentProcess, service, until
from tests.lab.conftest import document, pod
from tests.lab.test_sockets import PORT, PROTOCOLS, SERVICE, Protocol, ask
from tests.lab.test_sockets_end import ENDED, fate
from tests.requirements import missing_program, need

PTRACE = "CAP_SYS_PTRACE"


@pytest.fixture(autouse=True)
def _programs() -> None:
    need("lab", missing_program("setpriv"))


def unit_capabilities() -> list[str]:
    """What the unit leaves to the agent."""
    lines = [one for one in _unit.UNIT.read_text().splitlines() if one.startswith("CapabilityBoundingSet=")]
    return [name for line in lines for name in line.partition("=")[2].split()]


def as_the_unit(without: str = "") -> list[str]:
    """What runs a command with the unit's rights, as systemd gives them to root's processes."""
    assert "NoNewPrivileges=yes" in _unit.UNIT.read_text().splitlines()
    kept = ",".join(f"+{one.removeprefix('CAP_').lower()}" for one in unit_capabilities() if one != without)
    return [
        "setpriv",
        "--no-new-privs",
        "--ambient-caps=-all",
        "--inh-caps=-all",
        f"--bounding-set=-all,{kept}",
        sys.executable,
    ]


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with two backends, and a pod that asks and whose network namespace has no name, as on a machine."""
    name = unique_name()
    resources = [
        document("Node", "node-1"),
        *(pod(f"orders-{number}", metadata={"labels": {"app": "orders"}}) for number in (1, 2)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)


@contextlib.contextmanager
def nameless(place: Lab) -> Iterator[None]:
    """The client's namespace is found by its process alone meanwhile."""
    path = place.member("default/client").netns
    assert path is not None
    process = place.start("default/client", ["sleep", "600"])
    try:
        subprocess.run(["umount", str(path)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "--bind", f"/proc/{process.pid}/ns/net", str(path)], check=True)
    finally:
        process.kill()
        process.wait()


def orders(place: Lab, *numbers: int) -> str:
    addresses = [str(one) for number in numbers for one in place.member(f"default/orders-{number}").addresses]
    backends = ", ".join(f'{{address: "{one}"}}' for one in addresses)
    ports = (
        f"[{{name: tcp, port: {PORT['tcp']}, targetPort: 8080}}, "
        f"{{name: udp, port: {PORT['udp']}, targetPort: 5353, protocol: UDP}}]"
    )
    text = service("orders", ", ".join(f'"{one}"' for one in SERVICE.values()), backends)
    return text.replace("[{name: http, port: 80, targetPort: 8080}]", ports)


@pytest.fixture
def stopped(place: Lab, tmp_path: Path) -> Iterator[AgentProcess]:
    folder = tmp_path / "config"
    folder.mkdir()
    agent = AgentProcess(place, folder, tmp_path / "agent.log")
    agent.write(orders(place, 1, 2))
    yield agent
    agent.clear()


@PROTOCOLS
@pytest.mark.parametrize("version", [4, 6])
def test_sockets_are_ended(stopped: AgentProcess, version: int, protocol: Protocol) -> None:
    stopped.program = (*as_the_unit(), "-m", "hookline")
    agent = stopped.start()
    with contextlib.ExitStack() as stack:
        sockets = agent.lab.sockets("default/client", 6 if version == 6 else 4, protocol, 16)
        who = []
        for one in sockets:
            stack.enter_context(one)
            one.settimeout(10)
            one.connect((SERVICE[version], PORT[protocol]))
            who.append(ask(one))
        assert set(who) == {"default/orders-1", "default/orders-2"}
        with nameless(agent.lab):
            agent.write(orders(agent.lab, 2))
            until("it is applied", lambda: len(agent.said("files applied")) >= 2)
        for one, name in zip(sockets, who, strict=True):
            assert fate(one) in ({0} if name == "default/orders-2" else ENDED)
    assert not agent.said("note", note="not ended")
    assert agent.health()["status"] == "ok"


def test_without_the_right_to_see_processes_the_reason_is_said(stopped: AgentProcess) -> None:
    stopped.program = (*as_the_unit(PTRACE), "-m", "hookline")
    agent = stopped.start()
    with contextlib.ExitStack() as stack:
        for one in agent.lab.sockets("default/client", 4, "tcp", 16):
            stack.enter_context(one).settimeout(10)
            one.connect((SERVICE[4], PORT["tcp"]))
        with nameless(agent.lab):
            agent.write(orders(agent.lab, 2))
            said = until("the reason", lambda: agent.said("note", note="are not ended"))
    assert PTRACE in said[0]["note"]
    assert "any more" not in said[0]["note"]


@pytest.mark.parametrize("without", ["", PTRACE])
def test_pods_of_a_host_are_found(place: Lab, without: str) -> None:
    """On the host, where no namespace has a pod's name."""
    addresses = [str(one) for one in place.member("default/client").addresses]
    code = (
        "import sys, json, ipaddress\nfrom hookline.control.pods import cookies\nfrom hookline.model.names import NodeName\n"
        "warnings = []\npods = {'default/client': tuple(map(ipaddress.ip_address, sys.argv[2:]))}\n"
        "print(json.dumps([cookies(NodeName(), sys.argv[1], pods, warnings), warnings]))"
    )
    command = [*as_the_unit(without), "-c", code, f"hookline/{place.name}/node-1", *addresses]
    with nameless(place):
        found, warnings = json.loads(subprocess.check_output(command, text=True))
    with net.inside(place.member("default/client").netns):
        own = net.own_cookie()
    if without:
        assert found == {}
        assert PTRACE in warnings[0]
    else:
        assert found == {"default/client": own}
        assert warnings == []


@pytest.mark.parametrize("without", ["", PTRACE])
def test_doctor_says_whether_pods_can_be_found(without: str) -> None:
    done = subprocess.run(
        [*as_the_unit(without), "-m", "hookline", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    (check,) = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "capabilities"]
    assert (PTRACE in check["value"]) is not bool(without)
    assert check["status"] == ("missing" if without else "ok")


def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    need("lab", missing_program("systemd-analyze"))
    unit = tmp_path / "hookline-agent.service"
    unit.write_text(_unit.unit_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "hookline-agent.service" not in done.stderr, done.stderr
