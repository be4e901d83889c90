"""Services at connect time: what a request and a connection cost through one, beside the same without, nftables and HAProxy.

Requests: one octet there and back over TCP, from a pod of a node to another pod of that node. Each way has a connection of
its own that stays open, and all of them take turns, in an order drawn anew for each turn, so that whatever disturbs the
machine meets them alike, and none always follows the same other one. One client and one server process do the work of all. A
way that keeps its state in a node's kernel has that node for itself: connection tracking, once there, would cost the others'
packets too.

Connections: connect() alone, without a request; they end by a reset, so that no port is kept waiting.

Both are measured with everything on one CPU, where a ratio is the processor's, and once more without pinning, where what is
measured is mostly wake-ups between CPUs. What limits them: Python's own calls, some 2 to 4 µs of each request and of each
connection, are in both sides of a ratio, and bring it nearer to 1 than a client in C would find it. The 99th percentile of
a shared machine is its other tenants' as much as ours; its ratio wanders by some per cent from run to run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import random
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hookline import control
from hookline.bench._groups import LeftOutError
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings, choose_cpu
from hookline.lab import Lab, LabError, down, up
from hookline.model import Resource
from hookline.sources import files

ECHO = Path(__file__).with_name("_echo.py")
SERVICES = 10_000
PORT = 8080
ADDRESS = "192.0.2.1"
ROUNDS, REQUESTS = 15, 10_000
CHUNKS, CONNECTS = 6, 300
WARM = 50
BACKLOG = 4096
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
WAYS = ("direct", "service", "nftables", "haproxy")

# The number of the node that each way is measured on.
NODE_OF = {"direct": "1", "service": "1", "nftables": "2", "haproxy": "3"}


def request_rows(settings: Settings) -> Iterator[Row]:
    """How long a request takes: median and 99th percentile, pinned and not."""
    missing = [
        name for name, command in (("nftables", "nft"), ("haproxy", "haproxy")) if not shutil.which(command)
    ]
    ways = [way for way in WAYS if way not in missing]
    with _lab("123") as lab:
        _apply(lab, "1", 1)
        for suffix, cpu, where in _placements(settings):
            with (
                _on(cpu),
                _echoing(lab, sorted({NODE_OF[way] for way in ways})),
                _ways(lab, ways) as connections,
            ):
                found = _request_rounds(settings, f"request{suffix}", connections)
                where = f"{_priority()}, {where}"
            yield from _request_results(found, ways, suffix, where)
    if missing:
        raise LeftOutError(f"not installed (apt-get install {' '.join(missing)})")


def _request_results(
    found: dict[str, list[tuple[float, float]]], ways: Sequence[str], suffix: str, where: str
) -> Iterator[Row]:
    for way in ways[1:]:
        for index, (percentile, text) in enumerate((("p50", "median"), ("p99", "99th percentile"))):
            ours = way == "service"
            yield row(
                f"request-{way}-{percentile}{suffix}",
                "us",
                [one[index] for one in found[way]],
                reference="the same pod, asked directly",
                reference_values=[one[index] for one in found["direct"]],
                method=f"{text} of {REQUESTS:,} requests of one octet, in turn with the others; {where}",
                goal="≤ 1.02 × direct" if ours else "",
                most_ratio=1.02 if ours else None,
            )


def connect_rows(settings: Settings) -> Iterator[Row]:
    """How many connections a second: with 10,000 services, with one, and without any program."""
    with _lab("123") as lab:
        many = _apply(lab, "1", SERVICES)
        one = _apply(lab, "2", 1)
        none = [str(lab.member("server-3").address(4))]
        draw = random.Random(1)
        number = CONNECTS + WARM
        sides = [
            _Side("1", lambda: [many[SERVICES // 2]] * number),
            _Side("1", lambda: draw.choices(many, k=number)),
            _Side("2", lambda: one * number),
            _Side("3", lambda: none * number),
        ]
        for suffix, cpu, where in _placements(settings):
            with _on(cpu):
                same, drawn, single, direct = _connect_rounds(settings, f"connect{suffix}", lab, sides)
                where = f"{_priority()}, {where}"
            method = (
                f"a round is {CHUNKS} times {CONNECTS} calls of connect() that end by a reset, IPv4; {where}"
            )
            yield row(
                f"connect-{SERVICES}{suffix}",
                "/s",
                same,
                reference="with one service",
                reference_values=single,
                method=f"to one of {SERVICES:,} services; {method}",
                goal="≥ 0.95 × with one service",
                least_ratio=0.95,
            )
            yield row(
                f"connect-{SERVICES}-drawn{suffix}",
                "/s",
                drawn,
                reference="with one service",
                reference_values=single,
                method=f"each to another of {SERVICES:,} services, whose rows no cache holds; {method}",
            )
            yield row(
                f"connect-1{suffix}",
                "/s",
                single,
                reference="the pod directly, on a node without programs",
                reference_values=direct,
                method=method,
            )


class _Side(NamedTuple):
    """What connections are made to, and the number of the node that they are made on."""

    node: str
    addresses: Callable[[], list[str]]


def _placements(settings: Settings) -> Iterator[tuple[str, int | None, str]]:
    """For each pass: the suffix of its rows' ids, its CPU, and the words for a method."""
    cpu = choose_cpu() if settings.cpu is None else settings.cpu
    yield "", cpu, f"everything on CPU {cpu}"
    yield "-unpinned", None, "not pinned to a CPU"


@contextmanager
def _on(cpu: int | None) -> Iterator[None]:
    """This process, and what it starts, on a CPU, or on all that there are although a run is pinned; before all others.

    As a real-time process: else the slowest requests would be those in which other programs of the machine had their turn.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1) if cpu is None else {cpu})
    try:
        with contextlib.suppress(OSError):  # a machine may forbid it: the rows' method says which it was
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
        os.sched_setaffinity(0, before)


def _priority() -> str:
    return "real-time processes" if os.sched_getscheduler(0) == os.SCHED_FIFO else "ordinary processes"


# -- requests


def _request_rounds(
    settings: Settings, name: str, connections: dict[str, socket.socket]
) -> dict[str, list[tuple[float, float]]]:
    """Median and 99th percentile in µs, by way, of each round."""
    rounds = settings.rounds or ROUNDS
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in connections}
    settings.tell(name, 0, rounds)
    _request_round(connections, WARM)
    for number in range(rounds):
        settings.tell(name, number + 1, rounds)
        for way, times in _request_round(connections, REQUESTS).items():
            times.sort()
            found[way].append((_percentile(times, 50) / 1e3, _percentile(times, 99) / 1e3))
    return found


def _request_round(connections: dict[str, socket.socket], requests: int) -> dict[str, list[int]]:
    times: dict[str, list[int]] = {way: [] for way in connections}
    turns = [(one.send, one.recv, times[way].append) for way, one in connections.items()]
    clock, shuffle = time.perf_counter_ns, random.Random(requests).shuffle
    gc.disable()
    try:
        for _ in range(requests):
            shuffle(turns)
            for send, receive, note in turns:
                start = clock()
                send(b"x")
                receive(64)
                note(clock() - start)
    finally:
        gc.enable()
    return times


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that so many per cent do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@contextmanager
def _echoing(lab: Lab, nodes: Sequence[str]) -> Iterator[None]:
    """A server in the pod of each node, one process for all."""
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(_listener(lab, node)) for node in nodes]
        numbers = [one.fileno() for one in listeners]
        process = subprocess.Popen(
            [sys.executable, str(ECHO), *map(str, numbers)], pass_fds=numbers, stdin=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


def _listener(lab: Lab, node: str) -> socket.socket:
    server = f"server-{node}"
    (listener,) = lab.sockets(server, 4)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((str(lab.member(server).address(4)), PORT))
    listener.listen(BACKLOG)
    return listener


@contextmanager
def _ways(lab: Lab, ways: Sequence[str]) -> Iterator[dict[str, socket.socket]]:
    """An open connection by each way."""
    with contextlib.ExitStack() as running:
        targets = {
            "direct": (str(lab.member("server-1").address(4)), PORT),
            "service": (ADDRESS, PORT),
            "nftables": (ADDRESS, PORT),
            "haproxy": (str(lab.member("node/node-3").address(4)), PORT),
        }
        if "nftables" in ways:
            running.enter_context(_translated(lab))
        if "haproxy" in ways:
            running.enter_context(_proxied(lab))
        yield {way: running.enter_context(_connection(lab, NODE_OF[way], targets[way])) for way in ways}


def _connection(lab: Lab, node: str, target: tuple[str, int]) -> socket.socket:
    """A connection of the node's client, once somebody answers there."""
    deadline = time.monotonic() + 10
    while True:
        (one,) = lab.sockets(f"client-{node}", 4)
        one.settimeout(5)
        try:
            one.connect(target)
            one.send(b"x")
            if one.recv(64) == b"x":
                break
        except OSError:
            if time.monotonic() > deadline:
                one.close()
                raise
        one.close()
        time.sleep(0.05)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.settimeout(None)
    return one


@contextmanager
def _translated(lab: Lab) -> Iterator[None]:
    """The same address on node-2, translated by nftables."""
    backend = f"{lab.member('server-2').address(4)}:{PORT}"
    rules = f"""
        table ip bench {{
            chain services {{
                type nat hook prerouting priority -100
                ip daddr {ADDRESS} tcp dport {PORT} dnat to {backend}
            }}
        }}
    """
    with tempfile.NamedTemporaryFile("w", suffix=".nft") as file:
        file.write(rules)
        file.flush()
        done = lab.run("node/node-2", ["nft", "-f", file.name])
    if done.returncode:
        raise LabError("nftables refuses the rule", why=done.stderr.strip())
    try:
        yield
    finally:
        lab.run("node/node-2", ["nft", "delete", "table", "ip", "bench"])


@contextmanager
def _proxied(lab: Lab) -> Iterator[None]:
    """HAProxy in the node itself, on node-3."""
    own, backend = lab.member("node/node-3").address(4), lab.member("server-3").address(4)
    settings = (
        "global\n  nbthread 1\n"
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
        f"listen service\n  bind {own}:{PORT}\n  server pod {backend}:{PORT}\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(settings)
        file.flush()
        process = lab.start(
            "node/node-3",
            ["haproxy", "-db", "-f", file.name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


# -- connections


def _connect_rounds(settings: Settings, name: str, lab: Lab, sides: Sequence[_Side]) -> list[list[float]]:
    """Connections a second, by side, of each round."""
    rounds = settings.rounds or ROUNDS
    rates: list[list[float]] = [[] for _ in sides]
    order = list(range(len(sides)))
    draw = random.Random(2)
    with contextlib.ExitStack() as opened:
        listeners = {
            node: opened.enter_context(_listener(lab, node)) for node in sorted({side.node for side in sides})
        }
        for number in range(-1, rounds):
            settings.tell(name, number + 1, rounds)
            took = [0.0] * len(sides)
            for _ in range(CHUNKS if number >= 0 else 1):
                draw.shuffle(order)
                for which in order:
                    side = sides[which]
                    took[which] += lab.call(
                        f"client-{side.node}", functools.partial(_connect_all, side.addresses())
                    )
                    _drain(listeners[side.node])
            if number >= 0:
                for which in order:
                    rates[which].append(CHUNKS * CONNECTS / took[which])
    return rates


def _connect_all(addresses: Sequence[str]) -> float:
    """Seconds that connecting to all but the first few takes: those bring what a fork has not of its own yet."""
    gc.disable()
    # Objects of the fork's own: the first touch of any other copies its page.
    targets = [(f"{address} ".strip(), PORT) for address in addresses]
    start = 0.0
    for number, target in enumerate(targets):
        if number == WARM:
            start = time.perf_counter()
        one = socket.socket()
        one.connect(target)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        one.close()
    return time.perf_counter() - start


def _drain(listener: socket.socket) -> None:
    """Takes off what waits to be accepted; it was reset."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()


# -- the lab


@contextmanager
def _lab(nodes: Sequence[str]) -> Iterator[Lab]:
    """Nodes with a client and a server each, and nothing else."""
    name = f"bench-{secrets.token_hex(3)}"
    documents = []
    for node in nodes:
        documents.append(f"apiVersion: v1\nkind: Node\nmetadata: {{name: node-{node}}}\n")
        documents.extend(
            f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {role}-{node}}}\nspec: {{nodeName: node-{node}}}\n"
            for role in ("client", "server")
        )
    try:
        yield up(files.loads("---\n".join(documents)), name)
    finally:
        with contextlib.suppress(LabError):
            down(name)


def _apply(lab: Lab, node: str, number: int) -> list[str]:
    """So many services of the node's server on that node, by addresses of their own; the addresses."""
    backend = lab.member(f"server-{node}").address(4)
    first = int.from_bytes(socket.inet_aton(ADDRESS))
    addresses = [socket.inet_ntoa((first + one).to_bytes(4)) for one in range(number)]
    # Both nodes' tables are of one size, whatever is in them.
    config = (
        f"apiVersion: hookline.dev/v1alpha1\nkind: NodeConfig\nmetadata: {{name: node-{node}}}\n"
        "spec: {maps: {services: 32768, maglevPages: 16384}}\n"
    )
    documents = [config]
    documents.extend(
        "apiVersion: hookline.dev/v1alpha1\nkind: VirtualService\n"
        f"metadata: {{name: service-{one}}}\n"
        f"spec: {{addresses: [{address}], ports: [{{port: {PORT}}}], backends: [{{address: {backend}}}]}}\n"
        for one, address in enumerate(addresses)
    )
    resources: list[Resource] = files.loads("---\n".join(documents))
    with control.Node(f"lab/{lab.name}/node-{node}") as one:
        one.apply(resources)
    return addresses
