"""Backends' lives, seen by real connections: from outside through XDP, and from a pod's sockets at connect time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest

from hookline import api, lab, net
from hookline.agent.health import HealthSupervisor
from hookline.control.health import ACTIVE, DOWN, UNCHECKED, Health, HealthKey
from hookline.lab import Lab
from hookline.model import Resource
from tests.lab.conftest import document, pod
from tests.lab.test_balancing import service

Family = Literal[4, 6]
Protocol = Literal["tcp", "udp"]
ADDRESS: dict[Family, str] = {4: "192.0.2.10", 6: "2001:db8::10"}
PORT: dict[Protocol, int] = {"tcp": 80, "udp": 53}
OUTSIDE, INSIDE = "external/client", "default/client"
WORKERS = ("w1", "w2")
PATIENCE_S = 20.0
FAMILIES = pytest.mark.parametrize("family", [4, 6])
QUICK = {
    "type": "tcp",
    "intervalSeconds": 0.2,
    "timeoutSeconds": 0.1,
    "jitterPercent": 0,
    "rise": 1,
    "fall": 2,
}

# Says its name to every line and datagram, on both families; a process of its own, so that it can be killed.
SERVER = """
import asyncio, socket, sys
name = (sys.argv[1] + "\\n").encode()
class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.transport = transport
    def datagram_received(self, data, peer): self.transport.sendto(name, peer)
async def lines(reader, writer):
    try:
        while await reader.readline():
            writer.write(name)
    except ConnectionError:
        pass
    writer.close()
async def main():
    loop = asyncio.get_running_loop()
    for host in ("0.0.0.0", "::"):
        own = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        if ":" in host:
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        own.bind((host, 9090))
        own.setblocking(False)
        await loop.create_datagram_endpoint(Datagrams, sock=own)
        await asyncio.start_server(lines, host, 9090, backlog=4096)
    print("up", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Server:
    """A backend's process."""

    def __init__(self, place: Lab, name: str) -> None:
        with net.inside(place.member(name).netns):
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, name], stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def kill(self) -> float:
        """Kills it hard, and says when."""
        os.kill(self.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return killed


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A worker on each of two nodes, a pod that asks beside the first, and a client outside."""
    name = unique_name()
    resources = [
        *(document("Node", f"node-{n}") for n in (1, 2)),
        *(pod(worker, f"node-{n}", metadata={"labels": {"app": "w"}}) for n, worker in enumerate(WORKERS, 1)),
        document("Pod", "client", spec={"nodeName": "node-1"}),
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.fixture
def servers(place: Lab) -> Iterator[dict[str, Server]]:
    found = {name: Server(place, name) for name in WORKERS}
    try:
        yield found
    finally:
        for server in found.values():
            if server.process.returncode is None:
                server.kill()


def orders(place: Lab, *names: str, weights: Mapping[str, int] | None = None, **spec: Any) -> Resource:
    """A service of these workers, all families and protocols."""
    backends = [
        {"address": str(address), "weight": (weights or {}).get(name, 100)}
        for name in names
        for address in place.member(name).addresses
    ]
    ports = [
        {"name": "tcp", "port": 80, "targetPort": 9090},
        {"name": "udp", "port": 53, "targetPort": 9090, "protocol": "UDP"},
    ]
    return service("orders", tuple(ADDRESS.values()), ports, backends=backends, **spec)


class Agent:
    """What the agent does with health: one thread for the node, the supervisor beside it."""

    def __init__(self, place: Lab) -> None:
        self.worker = ThreadPoolExecutor(1)
        self.node = self.worker.submit(api.Node, f"lab/{place.name}").result()
        self.node.watched = True
        self.supervisor = HealthSupervisor(self._report, namespace=place.first_node.netns)
        self.observed: list[tuple[float, dict[HealthKey, Health]]] = []
        self.worker.submit(
            lambda: self.supervisor.start(dict(self.node.documents), dict(self.node.health))
        ).result()

    def _report(self, changes: Mapping[HealthKey, Health]) -> Future[object]:
        def observe() -> object:
            self.node.observe(changes)
            self.observed.append((time.monotonic(), dict(changes)))
            return None

        return self.worker.submit(observe)

    def apply(self, *what: Resource) -> None:
        def change() -> None:
            self.node.apply(what)
            self.supervisor.update(self.node.documents, self.node.health)

        self.worker.submit(change).result()

    def call(self, what: Callable[[api.Node], Any]) -> Any:
        return self.worker.submit(what, self.node).result()

    def wait(self, name: str, health: Health, place: Lab, since: float = 0.0) -> float:
        """When all of a worker's backends were seen to be so; 4 keys: two families, two protocols."""
        wanted = set(place.member(name).addresses)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found: dict[HealthKey, float] = {}
            for at, changes in list(self.observed):
                for key, said in changes.items():
                    if key.address in wanted and at >= since:
                        if said == health:
                            found[key] = at
                        else:
                            found.pop(key, None)
            if len(found) == 4:
                return max(found.values())
            assert time.monotonic() < deadline, (name, health, self.observed, self.supervisor.standings())
            time.sleep(0.02)

    def stop(self) -> None:
        self.supervisor.stop()
        self.worker.submit(self.node.close).result()
        self.worker.shutdown()


@pytest.fixture
def agent(place: Lab, clean: None) -> Iterator[Agent]:
    made = Agent(place)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def clean(place: Lab) -> Iterator[None]:
    """No service is left to the next test."""
    yield
    with api.Node(f"lab/{place.name}") as node:
        mine = [
            one.reference
            for one in node.resources()
            if one.kind in ("VirtualService", "Service", "EndpointSlice")
        ]
        if mine:
            node.delete(mine)


def asked(place: Lab, source: str, family: Family, protocol: Protocol, times: int = 20) -> Counter[str]:
    """Who answers so many new connections; what is refused is counted as such."""

    def ask() -> list[str]:
        found = []
        for _ in range(times):
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, kind) as one:
                one.settimeout(3)
                try:
                    one.connect((ADDRESS[family], PORT[protocol]))
                    one.sendall(b"who\n")
                    found.append(one.recv(100).decode().strip())
                except ConnectionRefusedError:
                    found.append("refused")
        return found

    return Counter(place.call(source, ask))


def states(place: Lab, version: Family = 4, protocol: str = "TCP") -> dict[str, tuple[str, int]]:
    """State and slots of each backend in the kernel's table, by its pod."""
    with api.Node(f"lab/{place.name}") as node:
        (status,) = (
            one for one in node.services() if (one.pool.version, one.pool.protocol) == (version, protocol)
        )
        return {one.target.name.partition("/")[2]: (one.target.state, one.slots) for one in status.backends}


EVERYWHERE = [
    (source, family, protocol)
    for source in (OUTSIDE, INSIDE)
    for family in (4, 6)
    for protocol in ("tcp", "udp")
]


def everywhere(place: Lab, wanted: set[str]) -> None:
    """New connections of all kinds reach exactly these."""
    for source, family, protocol in EVERYWHERE:
        assert set(asked(place, source, family, protocol)) == wanted, (source, family, protocol)  # type: ignore[arg-type]


# -- a backend that is killed


def test_a_backend_that_is_killed_hard_is_left_in_time(
    place: Lab, servers: dict[str, Server], agent: Agent
) -> None:
    agent.apply(orders(place, *WORKERS, healthCheck=QUICK))
    agent.wait("w1", ACTIVE, place)
    agent.wait("w2", ACTIVE, place)
    everywhere(place, set(WORKERS))
    # A client of datagrams that never changes its port: XDP moves it on.
    with net.inside(place.member(OUTSIDE).netns), contextlib.ExitStack() as held:
        flows: dict[str, socket.socket] = {}
        while set(flows) != set(WORKERS):
            one = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            one.settimeout(3)
            one.connect((ADDRESS[4], 53))
            one.send(b"who")
            flows[one.recv(100).decode().strip()] = one
        killed = servers["w1"].kill()
        left = agent.wait("w1", DOWN, place, killed)
        # fall × interval + 100 ms, and what a machine may add that is shared with other tests.
        assert left - killed < 2 * 0.2 + 0.1 + 1.5
        failures = agent.supervisor.counters().results["tcp", "failed", "refused"]
        assert failures >= 2 * 4
        everywhere(place, {"w2"})
        flows["w1"].send(b"who")
        assert flows["w1"].recv(100) == b"w2\n"
    servers["w1"] = Server(place, "w1")
    agent.wait("w1", ACTIVE, place, left)
    everywhere(place, set(WORKERS))


def test_a_new_backend_gets_nothing_before_its_first_check_has_passed(
    place: Lab, servers: dict[str, Server], agent: Agent
) -> None:
    servers["w1"].kill()
    agent.apply(orders(place, "w2", healthCheck=QUICK))
    agent.wait("w2", ACTIVE, place)
    agent.apply(orders(place, *WORKERS, healthCheck=QUICK))
    assert asked(place, OUTSIDE, 4, "tcp", 40) == {"w2": 40}
    agent.wait("w1", DOWN, place)
    begun = time.monotonic()
    servers["w1"] = Server(place, "w1")
    agent.wait("w1", ACTIVE, place, begun)
    everywhere(place, set(WORKERS))


@pytest.mark.parametrize("choice", ["reset", "failOpen"])
def test_all_down(place: Lab, servers: dict[str, Server], agent: Agent, choice: str) -> None:
    """The check fails, the servers answer: so what the tables do can be seen."""
    never = {**QUICK, "port": 1}
    agent.apply(orders(place, *WORKERS, healthCheck=never, allDown=choice))
    for name in WORKERS:
        agent.wait(name, DOWN, place)
    everywhere(place, {"refused"} if choice == "reset" else set(WORKERS))
    agent.apply(orders(place, *WORKERS, weights={"w2": 0}, healthCheck=never, allDown=choice))
    everywhere(place, {"refused"} if choice == "reset" else {"w1"})


def test_a_backend_that_flaps_each_100_ms_leaves_tables_and_connections_in_peace(
    place: Lab, servers: dict[str, Server], agent: Agent
) -> None:
    """Its check's own port comes and goes; the server answers all the while."""
    check = {**QUICK, "port": 9091, "intervalSeconds": 0.05, "timeoutSeconds": 0.05, "fall": 1}
    with contextlib.ExitStack() as held:

        def listen(name: str) -> contextlib.ExitStack:
            with net.inside(place.member(name).netns), contextlib.ExitStack() as made:
                for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                    made.enter_context(socket.create_server((host, 9091), family=family, backlog=4096))
                return made.pop_all()

        held.enter_context(listen("w2"))
        up = listen("w1")
        agent.apply(orders(place, *WORKERS, healthCheck=check))
        for name in WORKERS:
            agent.wait(name, ACTIVE, place)
        connections = [held.enter_context(one) for one in opened(place, OUTSIDE, 40)]
        before = answers(connections)
        assert set(before) == set(WORKERS)
        begun = time.monotonic()
        for _ in range(25):
            up.close()
            time.sleep(0.1)
            up = listen("w1")
            time.sleep(0.1)
        held.enter_context(up)
        w1 = set(place.member("w1").addresses)
        changes = [key for at, said in agent.observed if at > begun for key in said if key.address in w1]
        per_key = Counter(changes)
        assert len(per_key) == 4
        assert max(per_key.values()) <= 12, "50 changes of the server"
        assert answers(connections) == before
        agent.wait("w1", ACTIVE, place, begun)
        everywhere(place, set(WORKERS))


def test_what_was_found_is_kept_without_an_agent(place: Lab, servers: dict[str, Server], clean: None) -> None:
    wanted = orders(place, *WORKERS, healthCheck=QUICK)
    killed = Agent(place)
    killed.apply(wanted)
    for name in WORKERS:
        killed.wait(name, ACTIVE, place)
    begun = servers["w1"].kill()
    killed.wait("w1", DOWN, place, begun)
    killed.supervisor.stop()  # as if killed: nothing is handed over
    with api.Node(f"lab/{place.name}") as node:
        assert all(health == DOWN for health in node.health.values())
        assert len(node.health) == 4
        node.apply([wanted])
        # another change of the same service, by a process that checks nothing
        node.apply([orders(place, *WORKERS, healthCheck=QUICK, sessionAffinity={"type": "None"})])
    assert states(place)["w1"] == ("down", 0)
    everywhere(place, {"w2"})
    killed.stop()
    servers["w1"] = Server(place, "w1")
    again = Agent(place)
    try:
        again.wait("w1", ACTIVE, place)
        everywhere(place, set(WORKERS))
    finally:
        again.stop()
    with api.Node(f"lab/{place.name}") as node:
        assert node.health == {}


def test_an_agent_that_is_killed_in_the_middle_keeps_the_states(
    place: Lab, servers: dict[str, Server], clean: None
) -> None:
    """``kill -9`` of the process that observes, at any moment: what it left is read by the next."""
    wanted = orders(place, *WORKERS, healthCheck=QUICK)
    with api.Node(f"lab/{place.name}") as node:
        node.apply([wanted])
        keys = [
            HealthKey.of(pool, target)
            for pool in node.documents[wanted.reference]
            for target in pool.targets
            if target.name == "default/w1"
        ]
        for pause in (0.0, 0.05, 0.15, 0.3):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException), api.Node(f"lab/{place.name}") as own:
                    for _ in range(10_000):
                        for health in (DOWN, Health("starting", 45), ACTIVE):
                            own.observe(dict.fromkeys(keys, health))
                os._exit(0)
            time.sleep(0.3 + pause)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with api.Node(f"lab/{place.name}") as after:
                after.observe(dict.fromkeys(keys, DOWN))
            assert states(place)["w1"] == ("down", 0)
            everywhere(place, {"w2"})
        node.observe(dict.fromkeys(keys, ACTIVE))
    everywhere(place, set(WORKERS))


def test_observe_passes_over_who_is_not_there(place: Lab, clean: None) -> None:
    with api.Node(f"lab/{place.name}") as node:
        node.apply([orders(place, "w1")])
        (pool, *_) = node.documents["VirtualService/default/orders"]
        key = HealthKey.of(pool, pool.targets[0])
        node.observe({key._replace(number=1): DOWN, key._replace(service="Service/default/x"): DOWN})
        assert node.health == {}
        node.observe({key: UNCHECKED})
        assert states(place)["w1"] == ("starting", 0)
        node.apply([orders(place, "w2")])
        node.apply([orders(place, "w1", "w2")])
        assert node.health == {}, "who comes back is somebody new"


# -- draining


def opened(place: Lab, source: str, number: int) -> list[socket.socket]:
    """So many connections, half of them of each family."""
    made = []
    for family in (4, 6):
        made += [(one, ADDRESS[family]) for one in place.sockets(source, family, "tcp", number // 2)]
    for one, address in made:
        one.settimeout(10)
        one.connect((address, 80))
    return [one for one, _ in made]


def answers(connections: list[socket.socket]) -> list[str]:
    """What each connection's backend says now; ``ended`` where it is no more."""
    for one in connections:
        with contextlib.suppress(OSError):
            one.sendall(b"who\n")
    found = []
    for one in connections:
        try:
            found.append(one.recv(100).decode().strip() or "ended")
        except OSError:
            found.append("ended")
    return found


@pytest.mark.parametrize("way", ["removal", "weight", "conditions"])
def test_a_drain_under_a_thousand_connections_breaks_none(
    place: Lab, servers: dict[str, Server], clean: None, way: str
) -> None:
    """500 from outside through XDP, 500 of a pod's sockets; both families; then the deadline."""
    seconds = 12.0
    with api.Node(f"lab/{place.name}") as node:
        if way == "conditions":
            node.apply([*endpoints(place, {"w1": {}, "w2": {}}), policy(drainSeconds=seconds)])
        else:
            node.apply([orders(place, *WORKERS, drainSeconds=seconds)])
        with contextlib.ExitStack() as held:
            outside, inside = opened(place, OUTSIDE, 500), opened(place, INSIDE, 500)
            for one in (*outside, *inside):
                held.enter_context(one)
            before = answers([*outside, *inside])
            assert set(before) == set(WORKERS)
            begun = time.monotonic()
            if way == "removal":
                node.apply([orders(place, "w2", drainSeconds=seconds)])
            elif way == "weight":
                node.apply([orders(place, *WORKERS, weights={"w1": 0}, drainSeconds=seconds)])
            else:
                going = {"ready": False, "serving": True, "terminating": True}
                node.apply(endpoints(place, {"w1": going, "w2": {}}))
            left = node.expire()
            assert left is not None
            assert 0 < left <= seconds
            assert states(place)["w1"] == ("draining", 0)
            assert answers([*outside, *inside]) == before, "a drain broke a connection"
            everywhere(place, {"w2"})
            # another process, such as a CLI's, keeps the deadline
            with api.Node(f"lab/{place.name}") as other:
                again = other.expire()
                assert again is not None
                assert again <= left
            while time.monotonic() - begun < seconds - 1 and way == "removal":
                assert answers(inside) == before[500:]
                time.sleep(1)
            while (left := node.expire()) is not None:
                time.sleep(min(left, 0.5))
            assert time.monotonic() - begun >= seconds - 0.5
            found = states(place)
            assert found.get("w1", ("down", 0)) == ("down", 0)
            assert ("w1" in found) == (way != "removal")
            now = answers(inside)
            assert [name for name in now if name == "w1"] == [], "sockets of who is gone are ended"
            assert [name for name, was in zip(now, before[500:], strict=True) if was == "w2"] == [
                "w2"
            ] * before[500:].count("w2")
            kept = [name for name, was in zip(answers(outside), before[:500], strict=True) if was == "w2"]
            assert set(kept) == {"w2"}
        everywhere(place, {"w2"})


def test_who_comes_back_in_the_middle_of_a_drain(place: Lab, servers: dict[str, Server], clean: None) -> None:
    with api.Node(f"lab/{place.name}") as node:
        node.apply([orders(place, *WORKERS, drainSeconds=60)])
        with contextlib.ExitStack() as held:
            connections = [held.enter_context(one) for one in opened(place, INSIDE, 40)]
            before = answers(connections)
            node.apply([orders(place, "w2", drainSeconds=60)])
            assert states(place)["w1"] == ("draining", 0)
            node.apply([orders(place, *WORKERS, drainSeconds=60)])
            assert states(place)["w1"][0] == "active"
            assert node.expire() is None
            assert answers(connections) == before
            everywhere(place, set(WORKERS))
        # without drainSeconds it is gone at once
        node.apply([orders(place, *WORKERS)])
        node.apply([orders(place, "w2")])
        assert "w1" not in states(place)
        assert node.expire() is None


def test_a_drain_ends_with_its_service(place: Lab, servers: dict[str, Server], clean: None) -> None:
    with api.Node(f"lab/{place.name}") as node:
        node.apply([orders(place, *WORKERS, drainSeconds=60)])
        node.apply([orders(place, "w2", drainSeconds=60)])
        assert node.expire() is not None
        node.delete(["VirtualService/default/orders"])
        assert node.expire() is None


# -- slow start


def test_slow_starts_share_of_connections_grows(place: Lab, servers: dict[str, Server], agent: Agent) -> None:
    slow: dict[str, Any] = {"healthCheck": QUICK, "slowStartSeconds": 8}
    agent.apply(orders(place, "w2", healthCheck=QUICK))
    agent.wait("w2", ACTIVE, place)
    agent.apply(orders(place, *WORKERS, **slow))
    seen: list[tuple[float, float]] = []
    begun = time.monotonic()
    shares: list[int] = []
    while time.monotonic() - begun < 30:
        for family in (4, 6):
            found = asked(place, OUTSIDE, family, "tcp", 100)
            seen.append((time.monotonic() - begun, found["w1"] / 100))
        found = asked(place, INSIDE, 4, "udp", 100)
        seen.append((time.monotonic() - begun, found["w1"] / 100))
        shares.append(states(place)["w1"][1])
        if states(place)["w1"][0] == "active":
            break
    agent.wait("w1", ACTIVE, place)
    assert shares == sorted(shares), "the table's slots"
    early = [share for at, share in seen if at < 2.5]
    assert early
    assert max(early) < 0.45
    assert sum(early) / len(early) < 0.3
    late = asked(place, OUTSIDE, 4, "tcp", 200)["w1"] / 200
    assert 0.35 < late < 0.65


# -- EndpointSlices


def endpoints(place: Lab, conditions: Mapping[str, Mapping[str, bool]]) -> list[Resource]:
    """A Service with a slice for each family and port, of these endpoints."""
    ports = [
        {"name": "tcp", "port": 80, "targetPort": 9090},
        {"name": "udp", "port": 53, "targetPort": 9090, "protocol": "UDP"},
    ]
    found = [
        document(
            "Service",
            "orders",
            spec={
                "clusterIPs": list(ADDRESS.values()),
                "clusterIP": ADDRESS[4],
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": ports,
            },
        )
    ]
    for family in (4, 6):
        found.append(
            _slice(
                family,
                [
                    {
                        "addresses": [str(place.member(name).address(family))],
                        "conditions": dict(given),
                        "targetRef": {"kind": "Pod", "name": name, "namespace": "default"},
                    }
                    for name, given in conditions.items()
                ],
            )
        )
    return found


def _slice(family: int, given: list[dict[str, Any]]) -> Resource:
    from hookline.model import parse

    return parse(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"orders-{family}", "labels": {"kubernetes.io/service-name": "orders"}},
            "addressType": f"IPv{family}",
            "ports": [
                {"name": "tcp", "port": 9090, "protocol": "TCP"},
                {"name": "udp", "port": 9090, "protocol": "UDP"},
            ],
            "endpoints": given,
        }
    )


def policy(**spec: Any) -> Resource:
    from hookline.model import parse

    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "ServicePolicy",
            "metadata": {"name": "orders"},
            "spec": {"targetRef": {"kind": "Service", "name": "orders"}, **spec},
        }
    )


Y, N, X = True, False, None
CONDITIONS = [
    # ready, serving, terminating; beside a ready endpoint; where no other is ready. X: absent.
    # KEP-1669, and how kube-proxy reads what is absent: ready and serving as yes, terminating as no.
    (Y, Y, Y, "active", True),
    (Y, Y, N, "active", True),
    (Y, Y, X, "active", True),
    (Y, N, Y, "active", True),
    (Y, N, N, "active", True),
    (Y, N, X, "active", True),
    (Y, X, Y, "active", True),
    (Y, X, N, "active", True),
    (Y, X, X, "active", True),
    (N, Y, Y, "draining", True),
    (N, Y, N, "down", False),
    (N, Y, X, "down", False),
    (N, N, Y, "down", False),
    (N, N, N, "down", False),
    (N, N, X, "down", False),
    (N, X, Y, "draining", True),
    (N, X, N, "down", False),
    (N, X, X, "down", False),
    (X, Y, Y, "active", True),
    (X, Y, N, "active", True),
    (X, Y, X, "active", True),
    (X, N, Y, "active", True),
    (X, N, N, "active", True),
    (X, N, X, "active", True),
    (X, X, Y, "active", True),
    (X, X, N, "active", True),
    (X, X, X, "active", True),
]


def test_the_table_of_an_endpoints_conditions(place: Lab, servers: dict[str, Server], clean: None) -> None:
    """Row by row: the kernel's own tables, and connections of a pod and from outside."""
    assert len({row[:3] for row in CONDITIONS}) == 27
    with api.Node(f"lab/{place.name}") as node:
        for number, (ready, serving, terminating, beside, alone) in enumerate(CONDITIONS):
            named = {"ready": ready, "serving": serving, "terminating": terminating}
            given = {name: value for name, value in named.items() if value is not None}
            family: Family = 6 if number % 2 else 4
            protocol: Protocol = "udp" if number % 4 > 1 else "tcp"
            node.apply(endpoints(place, {"w1": given, "w2": {"ready": True}}))
            found = states(place, family, protocol.upper())
            assert found["w1"][0] == beside, named
            assert (found["w1"][1] > 0) == (beside == "active"), named
            wanted = {"w1", "w2"} if beside == "active" else {"w2"}
            for source in (OUTSIDE, INSIDE):
                assert set(asked(place, source, family, protocol)) == wanted, (source, named)
            # The other endpoint is gone for good: not ready, not serving, terminating.
            node.apply(
                endpoints(place, {"w1": given, "w2": {"ready": False, "serving": False, "terminating": True}})
            )
            assert (states(place, family, protocol.upper())["w1"][1] > 0) == alone, named
            for source in (OUTSIDE, INSIDE):
                assert set(asked(place, source, family, protocol, 6)) == ({"w1"} if alone else {"refused"}), (
                    source,
                    named,
                )


def test_state_is_in_the_file(place: Lab, servers: dict[str, Server], clean: None, tmp_path: Path) -> None:
    """Drains of another boot are void; health is not."""
    import sqlite3

    with api.Node(f"lab/{place.name}") as node:
        node.apply([orders(place, *WORKERS, drainSeconds=600, healthCheck=QUICK)])
        pool = node.documents["VirtualService/default/orders"][0]
        node.observe({HealthKey.of(pool, target): DOWN for target in pool.targets})
        node.apply([orders(place, "w2", drainSeconds=600, healthCheck=QUICK)])
        assert node.expire() is not None
        assert len(node.health) == 1
        path = place.first_node.state_dir / "state.db"
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        assert file.execute("SELECT count(*) FROM leaving").fetchone() == (4,)
        file.execute("UPDATE leaving SET boot = 'another'")
    with api.Node(f"lab/{place.name}") as node:
        assert node.expire() is None
        assert len(node.health) == 1
