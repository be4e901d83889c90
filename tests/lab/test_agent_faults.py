"""Errors that nobody expected, in a real agent: they are said and counted, and it goes on."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from hookline import net
from hookline.lab import Lab
from tests.lab.agents import PATIENCE_S, AgentProcess, service, until
from tests.lab.conftest import lab_with, pod

FIRST, SECOND = "192.0.2.10", "192.0.2.20"
FAULTY = """
import sys
from hookline import cli, errors
from hookline.{module} import {owner}

real, left = {owner}.{method}, {times}

def faulty(self, *arguments, **options):
    global left
    if left and ({when}):
        left -= 1
        raise {error}("put here by a test")
    return real(self, *arguments, **options)

{owner}.{method} = faulty
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def fault_lab(unique_name: Callable[[], str]) -> Iterator[Lab]:
    with lab_with(
        unique_name(),
        pod("p0", metadata={"labels": {"app": "orders"}}),
    ) as up:
        yield up


@pytest.fixture
def stopped(fault_lab: Lab, tmp_path: Path) -> Iterator[AgentProcess]:
    folder = tmp_path / "config"
    folder.mkdir()
    agent = AgentProcess(fault_lab, folder, tmp_path / "agent.log")
    agent.write(service("orders", FIRST))
    yield agent
    agent.clear()


def with_fault(
    agent: AgentProcess,
    owner: str,
    method: str,
    times: int = 3,
    when: str = "True",
    error: str = "ZeroDivisionError",
) -> None:
    module, _, name = owner.rpartition(".")
    code = FAULTY.format(module=module, owner=name, method=method, times=times, when=when, error=error)
    agent.program = (sys.executable, "-c", code)


@pytest.mark.parametrize(
    ("part", "owner", "method"),
    [
        ("files", "agent._files.Files", "bring"),
        ("files", "agent._files.Files", "changed"),
        ("files", "agent._files.Watcher", "read"),
        ("files", "agent._files.Watcher", "rewatch"),
        ("kernel", "control.Node", "repair"),
        ("kernel", "net.Monitor", "read"),
        ("drains", "control.Node", "expire"),
        ("start", "control.Node", "recover"),
        ("start", "control.Node", "attachments"),
        ("start", "agent._run.Agent", "_begin_checks"),
    ],
)
def test_no_fault_ends_the_agent(stopped: AgentProcess, part: str, owner: str, method: str) -> None:
    # Watching begins with the first call of it, which is not in a loop yet.
    when = "not options.get('strict')" if method == "rewatch" else "True"
    with_fault(stopped, owner, method, when=when)
    agent = stopped.start()
    assert agent.process is not None
    sample = f'hookline_agent_faults_total{{part="{part}"}}'
    for turn in range(3):
        if method == "read":  # they are read when there is something to read
            agent.write(service("orders", FIRST), f"turn{turn}.yaml.tmp")
            neighbour(agent)
        until("it is counted", partial(lambda least: agent.metric(sample) >= least, turn + 1))
    agent.write(service("second", SECOND), "second.yaml")
    until("it goes on", lambda: agent.answers(FIRST) and agent.answers(SECOND))
    assert agent.metric(sample) == 3
    said = agent.said("unexpected error, the agent goes on", part=part)
    assert len(said) == 3
    assert all("put here by a test" in one["traceback"] for one in said)
    delays = [one["again_in_s"] for one in said if "again_in_s" in one]
    assert delays == sorted(set(delays)), "each time it waits longer"
    assert agent.process.poll() is None
    assert agent.end() == 0


def test_a_full_check_that_fails_is_made_again(stopped: AgentProcess) -> None:
    """A cheap one that finds nothing must not take its problem for gone."""
    with_fault(stopped, "control.Node", "repair", when="options.get('full')", error="errors.HooklineError")
    agent = stopped.start()
    assert agent.process is not None
    agent.process.send_signal(signal.SIGHUP)
    until("each is counted", lambda: agent.metric('hookline_agent_checks_total{result="failed"}') == 3)
    until("it is well", lambda: agent.health()["status"] == "ok")
    assert [one["event"] for one in agent.events() if "put here" in str(one.get("problem"))] == [
        "problem",
        "problem is gone",
    ]


def neighbour(agent: AgentProcess) -> None:
    """Has the kernel tell of a change to the network of the node."""
    with net.inside(agent.name.netns):
        for word in ("add", "del"):
            subprocess.run(
                ["ip", "link", word, "hlfault0", *(["type", "bridge"] if word == "add" else [])], check=True
            )


def test_a_file_that_nobody_can_apply_keeps_no_other_waiting(stopped: AgentProcess) -> None:
    when = "any(one.name == 'poison' for one in arguments[0])"
    with_fault(stopped, "control.Node", "apply", 1_000_000, when)
    agent = stopped.start()
    agent.write(service("poison", "192.0.2.66"), "poison.yaml")
    until("it is said", lambda: agent.health()["status"] == "degraded")
    agent.write(service("second", SECOND), "second.yaml")
    until("the others", lambda: agent.answers(FIRST) and agent.answers(SECOND))
    (said,) = [one["problem"] for one in agent.health()["files"] if one["problem"]]
    assert "unexpected ZeroDivisionError" in said["error"]
    assert agent.metric('hookline_agent_faults_total{part="files"}') >= 1
    assert any(
        "put here by a test" in one["traceback"] for one in agent.said("unexpected error, the agent goes on")
    )
    agent.write(service("harmless", "192.0.2.66"), "poison.yaml")
    until("it is good again", lambda: agent.health()["status"] == "ok")
    assert agent.answers("192.0.2.66")


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"items": 1}',
    b'{"items": [1]}',
    b'{"items": [{"object": []}]}',
    b'{"items": [{"object": {}, "line": "x"}]}',
    b'{"items": [], "delete": [1]}',
    b'{"items": [], "prune": {"files": 1}}',
    b"[" * 100_000,
    b'{"items": [{"object": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}]}",
]
DOCUMENTS = [
    b'{"items": [{"object": {}}]}',
    b'{"items": [{"object": {"kind": "VirtualService"}}]}',
    b'{"items": [{"object": {"apiVersion": 1, "kind": [], "metadata": null, "spec": 7}, "line": 99999999999999999999999}]}',
    b'{"items": [{"object": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "\\ud800"}}}]}',
    b'{"items": [], "delete": ["", "x", "/", "a/b/c/d", "VirtualService/default/absent", "\\u0000", "\\ud800"]}',
    b'{"items": [], "prune": {"files": ["\\u0000"], "folders": ["\\ud800"]}}',
]
QUERIES = [
    ("POST", "/v1/rollback?to=abc"),
    ("POST", "/v1/rollback?to=-1"),
    ("POST", "/v1/rollback?to=%C2%B2"),
    ("POST", "/v1/rollback?to=" + "9" * 400),
    ("GET", "/v1/watch?interval=abc"),
    ("GET", "/v1/watch?interval=nan"),
    ("GET", "/v1/watch?interval=inf"),
    ("GET", "/v1/watch?interval=-1"),
    ("GET", "/v1/watch?interval="),
]


@pytest.fixture(scope="module")
def asked(fault_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent that is asked nonsense."""
    folder = tmp_path_factory.mktemp("config")
    agent = AgentProcess(fault_lab, folder, folder.parent / "asked.log")
    try:
        yield agent.start()
    finally:
        agent.clear()


def send(agent: AgentProcess, method: str, path: str, body: bytes = b"") -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(agent.name.agent_socket))
    with httpx.Client(transport=transport, base_url="http://agent", timeout=PATIENCE_S) as client:
        return client.request(method, path, content=body)


@pytest.mark.parametrize("path", ["/v1/apply", "/v1/plan", "/v1/delete"])
def test_a_body_that_is_no_change_is_said_to_be_none(asked: AgentProcess, path: str) -> None:
    for body in BODIES:
        answer = send(asked, "POST", path, body)
        assert answer.status_code in (
            {400, 422} if body.startswith(b'{"items": [{"object": {"a"') else {400}
        ), body[:80]
        assert all(answer.json()[name] for name in ("error", "why", "remedy")), body[:80]
    for body in DOCUMENTS:
        answer = send(asked, "POST", path, body)
        assert answer.status_code in {200, 400, 404, 409, 422}, (body[:120], answer.text)
    assert asked.health()["status"] == "ok"


@pytest.mark.parametrize(("method", "path"), QUERIES)
def test_a_query_that_makes_no_sense_is_said_to_make_none(
    asked: AgentProcess, method: str, path: str
) -> None:
    answer = send(asked, method, path)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert answer.json()["remedy"]


def test_nonsense_is_never_a_fault_of_the_agent(asked: AgentProcess) -> None:
    """Every path with every method, and lines that are no HTTP."""
    paths = [
        "health",
        "resources",
        "services",
        "totals",
        "policy-totals",
        "rule-counts",
        "attachments",
        "apply",
        "plan",
        "delete",
        "rollback",
        "generations",
        "check",
    ]
    for path in (*(f"/v1/{one}" for one in paths), "/metrics", "/v1/absent", "/", "/v1/../v1/health", "/%00"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "NONSENSE"):
            assert send(asked, method, path, b"nonsense").status_code < 500, (method, path)
    # Who hangs up in the middle is not answered.
    half = b"POST /v1/apply HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf"
    for raw in (
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/apply HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/apply HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        half,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(PATIENCE_S)
            one.connect(str(asked.name.agent_socket))
            said = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                one.sendall(raw)
                one.shutdown(socket.SHUT_WR)
                said = one.recv(100)
            if raw == half and not said:
                continue
            status = said.removeprefix(b"HTTP/1.1 ")[:3]
            assert said.startswith(b"HTTP/1.1 "), raw[:80]
            assert b"400" <= status < b"500", (raw[:80], said)
    assert asked.health()["status"] == "ok"
    assert not asked.said("request failed")
