"""``hookline agent`` as a process: files become the kernel's state, drift is mended, kills lose nothing, others go through it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from hookline import api, bpf, lab, net
from hookline.control.state import locked
from hookline.lab import Lab, LabError
from tests.lab.agents import PATIENCE_S, AgentProcess, service, until
from tests.lab.conftest import document, lab_with, pod
from tests.lab.test_apply import check_tables
from tests.requirements import missing_program, need

FIRST, FIRST_6, SECOND = "192.0.2.10", "2001:db8::10", "192.0.2.20"
ORDERS = service("orders", f'{FIRST}, "{FIRST_6}"')
EMPTY = Path(api.__file__).parent / "bench" / "empty.bpf.o"
KILLS = 12
CURL = ("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--max-time", "30")


@pytest.fixture(scope="module")
def agent_lab(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes, four pods labelled app=orders, a client."""
    labelled = {"labels": {"app": "orders"}}
    with lab_with(
        unique_name(),
        *(pod(f"p{number}", f"node-{number % 2 + 1}", metadata=labelled) for number in range(4)),
        nodes=2,
    ) as up:
        yield up


@pytest.fixture
def stopped(agent_lab: Lab, tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent that was not started yet, its folder with one service in it."""
    folder = tmp_path / "config"
    folder.mkdir()
    agent = AgentProcess(agent_lab, folder, tmp_path / "agent.log")
    agent.write(ORDERS)
    yield agent
    agent.clear()


@pytest.fixture
def agent(stopped: AgentProcess) -> AgentProcess:
    """One that runs."""
    return stopped.start()


def free_port() -> int:
    """A TCP port of loopback that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# -- files


def test_files_become_the_kernels_state(agent: AgentProcess) -> None:
    assert agent.answer(FIRST).startswith("default/p")
    assert agent.answer(FIRST_6).startswith("default/p")
    agent.write(service("second", SECOND), "second.yaml")
    until("the second service", lambda: agent.answers(SECOND))
    agent.write(service("second", "192.0.2.21"), "second.yaml")
    until("its new address", lambda: agent.answers("192.0.2.21"))
    until("not its old one", lambda: not agent.answers(SECOND))
    (agent.folder / "second.yaml").unlink()
    until("nothing of it is left", lambda: not agent.answers("192.0.2.21"))
    assert agent.answers(FIRST)


def test_a_file_that_is_written_in_place_and_one_that_is_linked(agent: AgentProcess, tmp_path: Path) -> None:
    path = agent.folder / "services.yaml"
    path.write_text(service("orders", "192.0.2.30"))
    until("written in place", lambda: agent.answers("192.0.2.30"))
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(service("linked", "192.0.2.31"))
    (agent.folder / "linked.yaml").symlink_to(elsewhere)
    until("a link", lambda: agent.answers("192.0.2.31"))


def test_half_a_file_is_not_read_however_long_it_takes(agent: AgentProcess) -> None:
    path = agent.folder / "services.yaml"
    path.write_text(f"{ORDERS}---\n{service('second', SECOND)}")
    until("two services", lambda: agent.answers(FIRST) and agent.answers(SECOND))
    with path.open("w") as half:
        half.write(ORDERS)
        half.flush()
        until("it waits", lambda: agent.health()["files"][0].get("waiting"))
        time.sleep(3)  # several looks
        assert agent.answers(SECOND)
        half.write(f"---\n{service('third', '192.0.2.30')}")
    until("it is whole", lambda: agent.answers("192.0.2.30") and not agent.answers(SECOND))
    assert agent.health()["status"] == "ok"


def test_a_folder_that_is_unmounted_removes_nothing(stopped: AgentProcess) -> None:
    (stopped.folder / "services.yaml").unlink()
    subprocess.run(["mount", "-t", "tmpfs", "hookline-test", str(stopped.folder)], check=True)
    mounted = True
    try:
        stopped.write(ORDERS)
        agent = stopped.start()
        assert agent.answers(FIRST)
        subprocess.run(["umount", str(stopped.folder)], check=True)
        mounted = False
        until("it is said", lambda: agent.metric('hookline_agent_problems{kind="folder"}') == 1)
        assert agent.said("folder is lost, what its files said stays", folder=str(agent.folder))
        assert agent.health()["status"] == "degraded"
        time.sleep(2)  # several looks
        assert agent.answers(FIRST)
        agent.end()
        agent.start()
        assert agent.answers(FIRST), "nor does one that starts without it"
        assert agent.metric('hookline_agent_problems{kind="folder"}') == 1
        subprocess.run(["mount", "-t", "tmpfs", "hookline-test", str(stopped.folder)], check=True)
        mounted = True
        agent.write(service("second", SECOND), "second.yaml")
        until("it is there again", lambda: agent.answers(SECOND) and not agent.answers(FIRST))
        until("and well", lambda: agent.health()["status"] == "ok")
    finally:
        stopped.kill()
        if mounted:
            subprocess.run(["umount", str(stopped.folder)], check=True)


def test_a_file_that_cannot_be_looked_at_keeps_its_objects(agent: AgentProcess) -> None:
    path = agent.folder / "services.yaml"
    loop = agent.folder / ".loop"
    loop.symlink_to(path)
    loop.rename(path)
    until("it is said", lambda: agent.health()["status"] == "degraded")
    time.sleep(2)  # several looks
    assert agent.answers(FIRST)
    agent.write(ORDERS)
    until("it is well", lambda: agent.health()["status"] == "ok")


def test_a_folder_as_kubernetes_mounts_a_config_map(agent: AgentProcess) -> None:
    """Files are links through a link ``..data``, which alone is changed."""
    for number in (1, 2):
        (agent.folder / f"..{number}").mkdir()
        (agent.folder / f"..{number}" / "mapped.yaml").write_text(service("mapped", f"192.0.2.4{number}"))
    (agent.folder / "..data").symlink_to("..1")
    (agent.folder / "mapped.yaml").symlink_to("..data/mapped.yaml")
    until("the first", lambda: agent.answers("192.0.2.41"))
    (agent.folder / "..new").symlink_to("..2")
    (agent.folder / "..new").rename(agent.folder / "..data")
    until("the second", lambda: agent.answers("192.0.2.42"))


def test_a_broken_file_changes_nothing_and_is_said(agent: AgentProcess) -> None:
    before = agent.numbers()
    agent.write("kind: [", "services.yaml")
    until("it is said", lambda: agent.health()["status"] == "degraded")
    (said,) = agent.health()["files"]
    assert said["file"].endswith("services.yaml")
    assert said["problem"]["error"].startswith(str(agent.folder / "services.yaml"))
    assert agent.said("file refused, what it last said stays", file="services.yaml")
    assert agent.metric('hookline_agent_problems{kind="file"}') == 1
    assert agent.answers(FIRST)
    assert agent.numbers() == before
    agent.write(service("good", SECOND), "good.yaml")
    until("others go on", lambda: agent.answers(SECOND))
    agent.write(ORDERS)
    until("it is good again", lambda: agent.health()["status"] == "ok")


def test_a_broken_file_at_the_start_keeps_what_it_set_before(agent: AgentProcess) -> None:
    agent.end()
    agent.write("kind: [")
    agent.write(service("second", SECOND), "second.yaml")
    agent.start()
    assert agent.answers(FIRST)
    assert agent.answers(SECOND)
    assert agent.health()["status"] == "degraded"


def test_a_refused_file_is_tried_again(agent: AgentProcess) -> None:
    """Two services want one address: the second file gets it when the first lets go."""
    agent.write(service("rival", FIRST), "rival.yaml")
    until("refused", lambda: agent.health()["status"] == "degraded")
    assert agent.said("file refused, what it last said stays", file="rival.yaml", error=FIRST)
    agent.write(service("orders", SECOND))
    until("both are in force", lambda: agent.health()["status"] == "ok")
    assert agent.answers(FIRST)
    assert agent.answers(SECOND)


def test_an_object_moves_from_one_file_to_another(agent: AgentProcess) -> None:
    before = agent.numbers()
    agent.write(ORDERS, "a-new-name.yaml")
    until("it is there twice", lambda: agent.health()["status"] == "degraded")
    (agent.folder / "services.yaml").unlink()
    until("and once again", lambda: agent.health()["status"] == "ok")
    assert agent.numbers() == before, "the kernel saw nothing of it"


def test_files_that_went_while_no_agent_was_there(agent: AgentProcess) -> None:
    agent.write(service("second", SECOND), "second.yaml")
    until("two services", lambda: agent.answers(SECOND))
    agent.end()
    (agent.folder / "second.yaml").unlink()
    agent.start()
    assert not agent.answers(SECOND)
    assert agent.answers(FIRST)


def test_sighup_reads_everything_again(agent: AgentProcess) -> None:
    assert agent.process is not None
    agent.process.send_signal(signal.SIGHUP)
    until("it is said", lambda: agent.said("reading all files again"))
    assert agent.answers(FIRST)
    assert agent.process.poll() is None


def test_a_path_that_is_not_there_is_refused(stopped: AgentProcess) -> None:
    command = stopped.command("-f", str(stopped.folder / "absent"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "absent cannot be watched" in done.stderr


# -- drift


def detached(agent: AgentProcess) -> str:
    """Detaches a program by hand, its pin left."""
    with bpf.Link.from_pin(agent.pin("links/balance:eth0")) as link:
        link.detach()
    return "link"


def unpinned(agent: AgentProcess) -> str:
    agent.pin("links/reply:eth0").unlink()
    return "link"


def replaced(agent: AgentProcess) -> str:
    """Puts another program into the link."""
    with bpf.Object.open(EMPTY) as other:
        other.load()
        program = next(one for one in other.programs.values() if one.type == "xdp")
        with bpf.Link.from_pin(agent.pin("links/balance:eth0")) as link:
            link.update(program)
    return "link"


def map_unpinned(agent: AgentProcess) -> str:
    agent.pin("maps/services").unlink()
    return "pin"


def service_removed(agent: AgentProcess) -> str:
    with agent.table("services") as table:
        for key, value in table.items():
            if value["table_size"]:
                del table[key]
    return "service"


def service_changed(agent: AgentProcess) -> str:
    with agent.table("services") as table:
        for key, value in table.items():
            if value["table_size"]:
                value["table_page"] += 7
                table[key] = value
    return "service"


def service_added(agent: AgentProcess) -> str:
    with agent.table("services") as table:
        key, value = next(iter(table.items()))
        other = key.copy()
        other["port"] = 12345
        table[other] = value
    return "service"


def backend_removed(agent: AgentProcess) -> str:
    with agent.table("backends") as table:
        _, values = table.read()
        for row in range(len(values)):
            if values[row]["flags"]:
                value = values[row].copy()
                value["flags"] = 0
                table[row] = value
    return "backend"


def backend_changed(agent: AgentProcess) -> str:
    with agent.table("backends") as table:
        value = table[1].copy()
        value["port"] = 9
        table[1] = value
    return "backend"


def slots_changed(agent: AgentProcess) -> str:
    with agent.table("services") as services, agent.table("maglev") as pages:
        for _, value in services.items():
            if value["table_size"]:
                pages.view()[int(value["table_page"])] = 0
    return "table"


DRIFTS = (
    detached,
    unpinned,
    replaced,
    map_unpinned,
    service_removed,
    service_changed,
    service_added,
    backend_removed,
    backend_changed,
    slots_changed,
)


@pytest.mark.parametrize("damage", DRIFTS, ids=lambda one: one.__name__)
def test_what_others_change_is_mended(agent: AgentProcess, damage: Callable[[AgentProcess], str]) -> None:
    kind = damage(agent)
    counted = f'hookline_agent_repairs_total{{kind="{kind}"}}'
    until("it is counted", lambda: agent.metric(counted) > 0)
    until("it is said", lambda: agent.said("repaired", kind=kind))
    until("traffic goes on", lambda: agent.answers(FIRST) and agent.answers(FIRST_6))
    check_tables(agent)  # type: ignore[arg-type]  # it has a name, which is all that is asked of it
    number = agent.metric(counted)
    checks = agent.metric('hookline_agent_checks_total{result="clean"}')
    until("more looks", lambda: agent.metric('hookline_agent_checks_total{result="clean"}') > checks + 1)
    assert agent.metric(counted) == number, "what is mended is mended once"


def test_a_lost_neighbour_is_kept_again(agent: AgentProcess) -> None:
    def managed() -> set[str]:
        with net.inside(agent.name.netns):
            return {str(one.address) for one in net.neighbours() if one.managed}

    before = managed()
    assert before
    with net.inside(agent.name.netns):
        for one in net.neighbours():
            if one.managed:
                net.forget(one.address, one.interface)
    until("all are back", lambda: managed() == before)
    until("it is said", lambda: agent.said("repaired", kind="neighbour"))


def test_an_interface_that_is_made_anew_is_attached_again(stopped: AgentProcess) -> None:
    pair = ("hlagent0", "hlagent1")
    config = (
        "apiVersion: hookline.dev/v1alpha1\nkind: NodeConfig\nmetadata: {name: node-1}\n"
        f"spec: {{interfaces: [{{name: eth0, role: uplink}}, {{name: {pair[0]}, role: uplink}}]}}\n"
    )

    def make() -> None:
        with net.inside(stopped.name.netns):
            subprocess.run(
                ["ip", "link", "add", pair[0], "type", "veth", "peer", "name", pair[1]], check=True
            )
            subprocess.run(["ip", "link", "set", pair[0], "up"], check=True)

    def remove() -> None:
        with net.inside(stopped.name.netns):
            subprocess.run(["ip", "link", "del", pair[0]], check=True)

    def hooked() -> bool:
        with net.inside(stopped.name.netns):
            text = subprocess.check_output(["ip", "-d", "-j", "link", "show"], text=True)
        return any(one["ifname"] == pair[0] and "xdp" in one for one in json.loads(text))

    make()
    try:
        stopped.write(config, "node.yaml")
        agent = stopped.start()
        assert hooked()
        remove()
        until("it is missed", lambda: agent.health()["problems"])
        assert agent.answers(FIRST), "the other uplink goes on"
        make()
        until("it is attached again", hooked)
        until("nothing is missing", lambda: not agent.health()["problems"])
        assert agent.answers(FIRST)
    finally:
        stopped.clear()
        with contextlib.suppress(subprocess.CalledProcessError):
            remove()


def test_forwarding_that_is_switched_off_is_reported(agent: AgentProcess) -> None:
    def switch(value: str) -> None:
        with net.inside(agent.name.netns):
            Path("/proc/sys/net/ipv4/ip_forward").write_text(value)

    switch("0")
    try:
        problems = until("it is said", lambda: agent.health()["problems"])
        assert problems == ["IPv4 forwarding is switched off on this node"]
        assert agent.metric('hookline_agent_problems{kind="node"}') == 1
    finally:
        switch("1")
    until("it is gone", lambda: agent.health()["status"] == "ok")


def test_a_change_of_the_routes_moves_the_backends(agent: AgentProcess) -> None:
    """A backend whose route goes gets no connections any more, without a word to the agent."""

    def unreachable() -> set[str]:
        found = agent.get("/v1/services").json()
        return {
            one["target"]["address"]
            for status in found
            for one in status["backends"]
            if one["placement"]["how"] == "unreachable"
        }

    target = next(m for m in agent.lab.pods if m.node == "node-2")
    address = str(target.address(4))
    with net.inside(agent.name.netns):
        route = subprocess.check_output(["ip", "-4", "route", "show", address], text=True).strip()
        assert route
        subprocess.run(["ip", "route", "replace", "unreachable", address], check=True)
        subprocess.run(["ip", "route", "del", *route.split()], check=False)
    try:
        until("it is not reached", lambda: unreachable() == {address})
        assert agent.answers(FIRST)
    finally:
        with net.inside(agent.name.netns):
            subprocess.run(["ip", "route", "del", "unreachable", address], check=False)
            subprocess.run(["ip", "route", "replace", *route.split()], check=True)
    until("it is reached again", lambda: unreachable() == set())


# -- the process


@contextlib.contextmanager
def connected(agent: AgentProcess, number: int = 8) -> Iterator[Callable[[], None]]:
    """Connections to the service, half of each family; the function has each ask and be answered."""
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        with net.inside(agent.lab.member("external/client").netns):
            for turn in range(number):
                one = socket.create_connection(((FIRST, FIRST_6)[turn % 2], 80), timeout=PATIENCE_S)
                sockets.append(stack.enter_context(one))

        def ask() -> None:
            for one in sockets:
                one.sendall(b"who\n")
                assert one.recv(100).startswith(b"default/p")

        ask()
        yield ask


def test_a_kill_and_a_new_start_lose_nothing(agent: AgentProcess) -> None:
    before = agent.numbers()
    with connected(agent) as ask:
        agent.kill()
        ask()
        assert agent.answers(FIRST), "new connections too"
        agent.start()
        ask()
        assert agent.numbers() == before, "nothing was loaded, attached or written again"
        assert not agent.said("repaired")
        agent.write(service("second", SECOND), "second.yaml")
        until("and it works", lambda: agent.answers(SECOND))
        ask()


def test_it_ends_cleanly_and_leaves_the_kernel(agent: AgentProcess) -> None:
    with connected(agent) as ask:
        assert agent.end() == 0
        ask()
        assert not agent.name.agent_socket.exists()
        assert agent.answers(FIRST)
    assert agent.said("ending; the kernel goes on as it is")


def test_a_second_agent_is_refused(agent: AgentProcess) -> None:
    assert agent.process is not None
    done = subprocess.run(agent.command(), capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "has an agent already" in done.stderr
    assert str(agent.process.pid) in done.stderr
    assert agent.health()["pid"] == agent.process.pid


def test_killed_in_the_middle_of_an_apply(stopped: AgentProcess) -> None:
    """Whenever it dies, the next one makes the node what the files say."""
    chance = random.Random(4)
    addresses = [str(member.address(4)) for member in stopped.lab.pods]

    def version(number: int) -> str:
        texts = [ORDERS]
        for turn in range(40):
            if turn % 7 == number % 3:
                continue
            chosen = chance.sample(addresses, 1 + (turn + number) % len(addresses))
            backends = ", ".join(f"{{address: {a}, weight: {chance.randint(1, 9)}}}" for a in chosen)
            texts.append(service(f"s{turn}", f"198.51.100.{turn + 1}", backends))
        return "\n---\n".join(texts)

    agent = stopped.start()
    with connected(agent) as ask:
        for number in range(KILLS):
            agent.write(version(number))
            time.sleep(chance.uniform(0.0, 0.25))
            agent.kill()
            ask()
            agent.start()
            until("all that the file has", lambda: agent.health()["status"] == "ok")
            check_tables(agent)  # type: ignore[arg-type]
            wanted = len([1 for turn in range(40) if turn % 7 != number % 3]) + 1
            found = [
                one for one in agent.get("/v1/resources").json() if one["object"]["kind"] == "VirtualService"
            ]
            assert len(found) == wanted
            ask()


def test_it_ends_when_its_lab_does(unique_name: Callable[[], str], tmp_path: Path) -> None:
    made = api.lab_up([document("Node", "node-1"), pod("p0")], unique_name())
    folder = tmp_path / "config"
    folder.mkdir()
    agent = AgentProcess(made, folder, tmp_path / "log")
    try:
        agent.start()
        assert agent.process is not None
        lab.down(made.name)
        assert agent.process.wait(PATIENCE_S) == 1
    finally:
        agent.kill()
        with contextlib.suppress(LabError):
            lab.down(made.name)


def test_it_tells_systemd(stopped: AgentProcess, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE_S)
        stopped.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"}
        stopped.start()
        assert b"READY=1" in manager.recv(1000).split(b"\n")
        assert [manager.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        stopped.end()
        while (last := manager.recv(1000)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


# -- others


def test_commands_say_the_same_with_and_without(
    agent: AgentProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    other = agent.folder.parent / "other.yaml"
    other.write_text(service("other", SECOND))
    commands: list[list[str]] = [
        ["get", "vs"],
        ["get", "all", "--json"],
        ["get", "vs", "orders", "-o", "yaml"],
        ["get", "backends"],
        ["describe", "vs", "orders", "--json"],
        ["get", "vs", "absent"],
        ["describe", "vs", "absent", "--json"],
        ["delete", "vs", "absent"],
        ["apply", "-f", str(other), "--dry-run"],
        ["apply", "-f", str(other)],
        ["apply", "-f", str(other)],
        ["delete", "vs", "other", "--dry-run", "--json"],
        ["delete", "vs", "other"],
        ["apply", "-f", str(agent.folder.parent / "absent.yaml")],
        ["get", "nonsense"],
    ]

    def say() -> list[tuple[Any, ...]]:
        found = []
        for command in commands:
            capsys.readouterr()
            status = agent.run(*command)
            # The node counts all packets, those of the kernel's own neighbour discovery too.
            said = [re.sub(r'"(packets|bytes)": \d+', r'"\1": N', text) for text in capsys.readouterr()]
            found.append((status, *said))
        return found

    counted = agent.metric('hookline_agent_changes_total{result="applied",source="api"}')
    assert counted == 0
    with_agent = say()
    assert agent.metric('hookline_agent_changes_total{result="applied",source="api"}') == 3, (
        "it carried them out"
    )
    agent.end()
    for command, through, alone in zip(commands, with_agent, say(), strict=True):
        assert through == alone, command


def test_a_watched_files_objects_are_the_agents(
    agent: AgentProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = agent.folder / "services.yaml"
    other = tmp_path / "mine.yaml"
    other.write_text(service("orders", SECOND))
    for command in (
        ["delete", "vs", "orders"],
        ["apply", "-f", str(other)],
        ["apply", "-f", str(path)],
        ["apply", "-f", str(agent.folder), "--prune"],
        ["apply", "-f", str(other), "--dry-run"],
    ):
        capsys.readouterr()
        assert agent.run(*command) == 1, command
        said = capsys.readouterr().err
        assert "belongs to the agent" in said
        assert str(path) in said or str(agent.folder) in said
    assert agent.answers(FIRST)
    agent.end()
    assert agent.run("apply", "-f", str(other)) == 0, "without an agent nobody is in the way"
    assert agent.answers(SECOND)
    agent.start()
    assert agent.answers(FIRST)
    assert not agent.answers(SECOND), "the file says otherwise"


def test_a_socket_that_a_killed_agent_left_is_passed_over(
    agent: AgentProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.kill()
    assert agent.name.agent_socket.exists()
    assert agent.run("get", "vs") == 0
    assert "orders" in capsys.readouterr().out


def test_the_socket_is_roots_alone(agent: AgentProcess) -> None:
    found = agent.name.agent_socket.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_uid == os.geteuid()


def test_an_agent_with_another_state_folder_is_refused(
    agent: AgentProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOOKLINE_STATE", str(tmp_path / "elsewhere"))
    assert agent.run("get", "vs") == 1
    assert "keeps its state in" in capsys.readouterr().err
    monkeypatch.undo()


def test_a_change_by_a_process_that_knows_no_agent_is_taken_up(agent: AgentProcess) -> None:
    """The library works on the node directly: the lock orders both, and the agent reads the state again."""
    other = agent.folder.parent / "direct.yaml"
    other.write_text(service("direct", SECOND))
    with api.Node(agent.name) as node:
        node.apply(other)
    assert agent.answers(SECOND)
    agent.write(service("third", "192.0.2.33"), "third.yaml")
    until("the file's", lambda: agent.answers("192.0.2.33"))
    assert agent.answers(SECOND)
    assert {one["object"]["metadata"]["name"] for one in agent.get("/v1/resources").json()} >= {
        "direct",
        "third",
    }


def test_metrics_by_tcp_show_metrics_only(stopped: AgentProcess) -> None:
    port = free_port()
    stopped.options = ["--metrics", f"127.0.0.1:{port}"]
    agent = stopped.start()
    for _ in range(5):
        agent.answer(FIRST)

    def counters() -> str:
        found = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S).text
        return found if "hookline_service_connections_total{" in found else ""

    text = until("a look at the kernel", counters)
    assert httpx.get(f"http://127.0.0.1:{port}/v1/resources", timeout=PATIENCE_S).status_code == 404
    counted = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("hookline_service_connections_total{") and 'family="IPv4"' in line
    ]
    assert counted == [5.0]


def test_systemd_finds_no_fault_with_the_unit(stopped: AgentProcess, tmp_path: Path) -> None:
    done = subprocess.run(
        [*stopped.command("--print-unit")[:4], "--print-unit"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[Service]" in done.stdout
    assert sys.executable.rpartition("/")[0] in done.stdout or "hookline agent" in done.stdout


def test_an_agent_that_hangs(agent: AgentProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Reads pass by it; a change is refused at once, and is not made when the agent goes on."""
    assert agent.process is not None
    other = _other(agent)
    agent.process.send_signal(signal.SIGSTOP)
    try:
        reads: list[list[str | Path]] = [
            ["get", "vs", "--json"],
            ["get", "backends"],
            ["describe", "vs", "orders"],
            ["apply", "-f", other, "--dry-run"],
        ]
        for words in reads:
            capsys.readouterr()
            began = time.monotonic()
            assert agent.run(*words) == 0, words
            assert time.monotonic() - began < 20
            out, err = capsys.readouterr()
            assert "orders" in out or "other" in out
            assert f"note: the agent of node {agent.name} does not answer" in err
        changes: list[list[str | Path]] = [["apply", "-f", other], ["delete", "vs", "orders"], ["rollback"]]
        for words in changes:
            began = time.monotonic()
            assert agent.run(*words, "--json") == 1, words
            assert time.monotonic() - began < 20
            error = json.loads(capsys.readouterr().err)
            assert "does not answer; nothing was asked of it" in error["error"]
            assert error["why"]
            assert "restart it" in error["remedy"]
    finally:
        agent.process.send_signal(signal.SIGCONT)
    assert agent.health()["status"] == "ok"
    with api.Node(agent.name) as node:
        assert {r.reference for r in node.resources() if r.kind == "VirtualService"} == {
            "VirtualService/default/orders"
        }
    assert agent.run("apply", "-f", other) == 0


@pytest.mark.parametrize("through", ["agent", "directly"])
@pytest.mark.parametrize("kind", ["services", "backends"])
def test_watch(agent: AgentProcess, through: str, kind: str) -> None:
    """The first lines are all there is, then what changes; Ctrl-C and a reader that goes end it."""
    if through == "directly":
        agent.end()
    what = "vs" if kind == "services" else kind
    command = [sys.executable, "-m", "hookline", "get", what, "--watch", "--json", "--interval", "0.2"]
    with subprocess.Popen(
        [*command, "--node", str(agent.name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        name = kind.removesuffix("s")
        first = [json.loads(watching.stdout.readline()) for _ in range(1 if kind == "services" else 8)]
        assert {one["event"] for one in first} == {"added"}
        agent.answer(FIRST)
        changed = json.loads(watching.stdout.readline())
        assert changed["event"] == "changed"
        assert changed[name]["connections"] == 1
        with api.Node(agent.name) as node:
            node.apply(_other(agent))
        added = json.loads(watching.stdout.readline())
        while added["event"] != "added":  # packets that came late
            added = json.loads(watching.stdout.readline())
        assert "VirtualService/default/other" in json.dumps(added)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 130
        assert watching.stderr.read() == ""
    text = [word for word in command if word != "--json"]
    with subprocess.Popen(
        [*text, "--node", str(agent.name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        head, line = watching.stdout.readline(), watching.stdout.readline()
        assert head.split()[0] == "SERVICE"
        assert head.split()[-1] == ("DROPS" if kind == "services" else "REPLIES")
        assert line.startswith("+  VirtualService/default/")
        # The mark, and a backend's port is two words.
        assert len(line.split()) == len(head.split()) + (1 if kind == "services" else 2)
        watching.stdout.close()

        def ended() -> bool:
            agent.answer(FIRST)
            return watching.poll() is not None

        until("it ends with its reader", ended)
        assert watching.returncode == 141
        assert watching.stderr.read() == ""


def _other(agent: AgentProcess) -> Path:
    path = agent.folder.parent / "watched.yaml"
    path.write_text(service("other", SECOND))
    return path


PROMETHEUS = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: hookline
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def test_prometheus_scrapes_it_each_second_whatever_is_done(stopped: AgentProcess, tmp_path: Path) -> None:
    """A real Prometheus; meanwhile files change and links are mended, and another process holds up every change.

    Debian's package prometheus; promtool, of the same package, finds no fault with names, types and help texts.
    """
    need("lab", missing_program("prometheus"))
    port, own_port = free_port(), free_port()
    stopped.options = ["--metrics", f"127.0.0.1:{port}"]
    agent = stopped.start()
    agent.answer(FIRST)
    text = agent.get("/metrics").text
    assert text.count("\n") > 100
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "prometheus.yml").write_text(PROMETHEUS.format(port=port))
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{own_port}",
        "--log.level=error",
    ]

    def ask(query: str) -> list[Any]:
        with contextlib.suppress(httpx.TransportError):
            found = httpx.get(f"http://127.0.0.1:{own_port}/api/v1/query", params={"query": query})
            if found.status_code == 200:
                return [float(one["value"][1]) for one in found.json()["data"]["result"]]
        return []

    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until("the first scrape", lambda: ask("up") == [1])
        until("what the kernel counts", lambda: sum(ask("hookline_service_connections_total")) >= 1)
        for number in range(3):
            agent.write(service("second", f"192.0.2.{50 + number}"), "second.yaml")
            until("the link", lambda: any((agent.name.pins / "links").glob("balance:*")))
            next((agent.name.pins / "links").glob("balance:*")).unlink()
            until("the change", partial(agent.answers, f"192.0.2.{50 + number}"))
        # Somebody else has the node: no change, no repair and no look is possible before this ends.
        with locked(agent.name.state_dir):
            agent.write(service("second", "192.0.2.60"), "second.yaml")
            until("the look is old", lambda: ask("hookline_agent_look_age_seconds > 4"))
            assert not agent.answers("192.0.2.60")
        until("the change", lambda: agent.answers("192.0.2.60"))
        until("a fresh look", lambda: ask("hookline_agent_look_age_seconds < 2"))
        assert ask("min_over_time(up[10m])") == [1], "a scrape failed"
        assert ask("count_over_time(up[10m])")[0] >= 4
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
    # What waits when the agent ends is answered, and is no fault in its log.
    with locked(agent.name.state_dir):
        agent.write(service("second", "192.0.2.61"), "second.yaml")
        time.sleep(0.5)
        waiting = [
            subprocess.Popen([*CURL, f"http://127.0.0.1:{port}/metrics"], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        asking = [
            subprocess.Popen(
                [*CURL, "--unix-socket", str(agent.name.agent_socket), "http://agent/v1/services"],
                stdout=subprocess.PIPE,
            )
            for _ in range(3)
        ]
        time.sleep(0.5)
        assert agent.process is not None
        agent.process.send_signal(signal.SIGTERM)
        for one in (*waiting, *asking):
            status, _ = one.communicate(timeout=PATIENCE_S)
            assert (one.returncode, status) in {(0, b"200"), (0, b"503")}, one.args
    assert agent.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in agent.log.read_text()
