"""``hookline agent`` and backends' lives: a real process checks, drains, is killed, and the next one goes on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import api, lab
from hookline.lab import Lab
from hookline.model import VirtualService
from tests.lab.agents import AgentProcess, until
from tests.lab.conftest import document, pod
from tests.lab.test_lives import ADDRESS, OUTSIDE, WORKERS, Server, asked

FILE = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: orders}}
spec:
  addresses: [{addresses}]
  ports: [{{name: tcp, port: 80, targetPort: 9090}}, {{name: udp, port: 53, targetPort: 9090, protocol: UDP}}]
  backends: [{backends}]
  drainSeconds: {drain}
  healthCheck: {{type: tcp, intervalSeconds: 0.2, timeoutSeconds: 0.1, rise: 1, fall: 2}}
"""


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    name = unique_name()
    try:
        yield api.lab_up(
            [
                *(document("Node", f"node-{n}") for n in (1, 2)),
                *(pod(worker, f"node-{n}") for n, worker in enumerate(WORKERS, 1)),
                document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
            ],
            name,
        )
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture
def agent(place: Lab, tmp_path: Path) -> Iterator[AgentProcess]:
    folder = tmp_path / "config"
    folder.mkdir()
    made = AgentProcess(place, folder, tmp_path / "agent.log")
    yield made
    made.clear()


def orders(place: Lab, *names: str, drain: float = 0) -> str:
    return FILE.format(
        addresses=", ".join(f'"{address}"' for address in ADDRESS.values()),
        backends=", ".join(
            f'{{address: "{address}"}}' for name in names for address in place.member(name).addresses
        ),
        drain=drain,
    )


def backends(place: Lab) -> dict[str, set[str]]:
    """States by pod, of all its pools, as the kernel has them."""
    found: dict[str, set[str]] = {}
    with api.Node(f"lab/{place.name}") as node:
        for target in (one.target for status in node.services() for one in status.backends):
            found.setdefault(target.name.partition("/")[2], set()).add(target.state)
    return found


def shown(place: Lab) -> dict[str, set[str]]:
    """The same as the command shows it, which asks the agent."""
    words = [sys.executable, "-m", "hookline", "get", "backends", "--node", f"lab/{place.name}", "--json"]
    found: dict[str, set[str]] = {}
    for one in json.loads(subprocess.check_output(words))["backends"]:
        found.setdefault(one["name"].partition("/")[2], set()).add(one["state"])
    return found


def test_the_agent_checks_and_the_next_one_goes_on(place: Lab, agent: AgentProcess) -> None:
    servers = {name: Server(place, name) for name in WORKERS}
    try:
        agent.write(orders(place, *WORKERS))
        agent.start()
        until("the file is applied", lambda: backends(place).keys() == set(WORKERS))
        until("both take connections", lambda: set(asked(place, OUTSIDE, 4, "tcp")) == set(WORKERS))
        servers["w1"].kill()
        until("w1 is down", lambda: backends(place).get("w1") == {"down"})
        for family in (4, 6):
            assert set(asked(place, OUTSIDE, family, "tcp")) == {"w2"}
            assert set(asked(place, OUTSIDE, family, "udp")) == {"w2"}
        assert shown(place) == {"w1": {"down"}, "w2": {"active"}}
        assert agent.metric('hookline_health_backends{state="down"}') == 4
        agent.kill()
        assert backends(place)["w1"] == {"down"}
        assert set(asked(place, OUTSIDE, 4, "tcp")) == {"w2"}
        servers["w1"] = Server(place, "w1")
        agent.start()
        until("w1 is back", lambda: backends(place)["w1"] == {"active"})
        assert set(asked(place, OUTSIDE, 6, "tcp", 40)) == set(WORKERS)
        # a drain that the agent ends
        agent.write(orders(place, *WORKERS, drain=8))
        until("it is applied", lambda: _drain_seconds(place) == 8)
        agent.write(orders(place, "w2", drain=8))
        until("w1 drains", lambda: backends(place).get("w1") == {"draining"})
        assert set(asked(place, OUTSIDE, 4, "tcp")) == {"w2"}
        until("w1 is gone", lambda: "w1" not in backends(place))
    finally:
        for server in servers.values():
            if server.process.returncode is None:
                server.kill()


def test_a_step_of_the_wall_clock_changes_nothing(place: Lab, agent: AgentProcess, tmp_path: Path) -> None:
    """The agent alone sees the step, by libfaketime: back a day, forward a year."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    assert library is not None, "libfaketime is not installed; tools/packages names it"
    clock = tmp_path / "clock"
    clock.write_text("+0")
    agent.environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    servers = {name: Server(place, name) for name in WORKERS}
    try:
        # w1 leaves, with a minute to drain: no step may end that, nor prolong a check's interval or its patience.
        agent.write(orders(place, *WORKERS, drain=60))
        agent.start()
        until("both are there", lambda: backends(place) == {name: {"active"} for name in WORKERS})
        agent.write(orders(place, "w2", drain=60))
        until("w1 drains", lambda: backends(place).get("w1") == {"draining"})
        for step in ("-1d", "+365d"):
            clock.write_text(step)
            assert backends(place) == {"w1": {"draining"}, "w2": {"active"}}
            servers["w2"].kill()
            until("w2 is down", lambda: backends(place)["w2"] == {"down"})
            servers["w2"] = Server(place, "w2")
            until("w2 is back", lambda: backends(place)["w2"] == {"active"})
            assert backends(place) == {"w1": {"draining"}, "w2": {"active"}}, f"after {step}"
        days = {event["time"][:10] for event in agent.events()}
        assert len(days) == 3, f"the agent did not see the clock step: {days}"
    finally:
        for server in servers.values():
            if server.process.returncode is None:
                server.kill()


def _drain_seconds(place: Lab) -> float:
    with api.Node(f"lab/{place.name}") as node:
        (found,) = node.resources(VirtualService)
        assert isinstance(found, VirtualService)
        return found.spec.drain_seconds
