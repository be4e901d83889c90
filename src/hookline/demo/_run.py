"""The demo's run: the lab, the processes, the changes under load, and the counting up."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hookline import api, bpf, lab, net
from hookline.control import PoolStatus
from hookline.errors import HooklineError
from hookline.model import parse
from hookline.model.names import NodeName
from hookline.sources import files

FOLDER = Path(__file__).parent
EMPTY = FOLDER.parent / "bench" / "empty.bpf.o"
CLIENT = "external/client"
LEAVES = "default/orders-4"
JOINS = "orders-5"

# When things happen, as shares of the whole time.
REMOVE_AT, KILL_AT, ADOPT_AT, ADD_AT = 0.25, 0.45, 0.55, 0.65


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of the run, for showing."""

    seconds: float
    opened: int
    open_now: int
    broken: int
    answers: int
    packets_per_second: float
    event: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend's part.

    Attributes:
        ideal: Connections that its share of the tables made likely, as long as it was there.
        datagrams: Received by its server.
    """

    name: str
    placement: str
    stayed: bool
    connections: int
    ideal: float
    datagrams: int


@dataclass(slots=True)
class Result:
    """What came out; every count is of the whole run.

    Attributes:
        opened: Connections that the clients opened.
        broken_surviving: Connections that broke although their backend stayed.
        broken_removed: Those that were with the backend that was removed.
        failed_to_open: Connections that the clients could not open.
        kernel_packets: Packets that the balancer decided on.
        kernel_connections: New TCP connections by the kernel's counters; `server_accepts` by the servers'.
        kernel_datagrams: Datagrams to the service by the kernel's counters; `server_datagrams` by the servers'.
        ns_per_packet: The balancer's mean run time by the kernel's statistics; `empty_ns_per_packet` that of a program
            which does nothing, on the client's interface, in the same seconds.
        problems: Why the demo failed; empty where it did not.
    """

    seconds: float = 0.0
    opened: int = 0
    broken_surviving: int = 0
    broken_removed: int = 0
    broken_how: dict[str, int] = field(default_factory=dict)
    failed_to_open: int = 0
    requests: int = 0
    datagrams_sent: int = 0
    datagrams_answered: int = 0
    datagrams_unanswered: int = 0
    kernel_packets: int = 0
    kernel_connections: int = 0
    server_accepts: int = 0
    kernel_datagrams: int = 0
    server_datagrams: int = 0
    packets_per_second: float = 0.0
    ns_per_packet: float = 0.0
    empty_ns_per_packet: float = 0.0
    verdicts: dict[str, int] = field(default_factory=dict)
    drop_reasons: dict[str, int] = field(default_factory=dict)
    backends: list[Backend] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The result as the ``--json`` form."""
        return {"ok": self.ok, **asdict(self)}


class _Clients:
    """The clients' process, and the last thing that it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.latest: dict[str, Any] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.latest = json.loads(line)

    def finish(self, patience_seconds: float) -> dict[str, Any]:
        """Has the clients end what is under way, and returns their last counts."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(patience_seconds)
        self._reader.join(patience_seconds)
        if not self.latest.get("final"):
            raise HooklineError(
                "the demo's clients ended early", why=f"exit status {self.process.returncode}"
            )
        return self.latest


def run(
    *,
    seconds: float = 10.0,
    detach_at: float | None = None,
    progress: Callable[[Progress], None] = lambda moment: None,
) -> Result:
    """Runs the demo in a lab of its own, which is gone afterwards.

    Args:
        seconds: How long the clients run.
        detach_at: Detaches the balancer's XDP program after so many seconds: the demo must fail then.
        progress: Told about each moment.

    Raises:
        HooklineError: The lab or the node could not be set up.
    """
    name = f"demo-{secrets.token_hex(3)}"
    started = time.monotonic()
    _end_like_ctrl_c()

    def say(event: str) -> None:
        progress(Progress(time.monotonic() - started, 0, 0, 0, 0, 0.0, event))

    with ExitStack() as stack:
        say(f"making lab {name}: 2 nodes, 5 pods, a client")
        stack.callback(_down, name)
        api.lab_up(files.load([FOLDER / "demo.yaml"]), name)
        demo = _Demo(lab.Lab.open(name), stack, seconds, detach_at, progress)
        return demo.run()


def _end_like_ctrl_c() -> None:
    """Has a signal that asks to end (also a terminal that closes) unwind, so that the lab goes too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)


def _down(name: str) -> None:
    try:
        api.lab_down(name)
    except lab.LabError:
        return  # it was never made


class _Demo:
    def __init__(
        self,
        place: lab.Lab,
        stack: ExitStack,
        seconds: float,
        detach_at: float | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self._lab = place
        self._stack = stack
        self._seconds = seconds
        self._detach_at = detach_at
        self._progress = progress
        self._name: NodeName = place.first_node
        self._ideal: defaultdict[str, float] = defaultdict(float)
        self._placements: dict[str, str] = {}
        self._before: list[PoolStatus] = []
        self._packets = 0
        self._moment = 0.0

    def run(self) -> Result:
        operator = self._start_operator()
        balance = self._stack.enter_context(bpf.Program.from_pin(self._name.pins / "programs" / "balance"))
        empty = self._stack.enter_context(_empty_program(self._lab.member(CLIENT).netns))
        self._stack.enter_context(bpf.run_statistics())
        clients = self._start_clients()
        start = self._started = self._moment = time.monotonic()
        self._packets = self._decided()
        first_packets = self._packets
        self._begin_epoch()
        events: list[tuple[float, str, Callable[[], None]]] = [
            (REMOVE_AT * self._seconds, f"removing {LEAVES}", lambda: self._remove(operator)),
            (
                KILL_AT * self._seconds,
                f"kill -9 of Hookline's process {operator.pid}",
                lambda: _kill(operator),
            ),
            (ADOPT_AT * self._seconds, "another process adopts the node: hookline apply", self._adopt),
            (ADD_AT * self._seconds, f"adding default/{JOINS}", self._add),
        ]
        if self._detach_at is not None:
            # Whatever came later would repair it: a process that adopts the node attaches what is missing.
            events = [event for event in events if event[0] < self._detach_at]
            events.append((self._detach_at, "detaching the XDP program, as asked for", self._detach))
        for at, text, deed in sorted(events, key=lambda event: event[0]):
            self._watch(clients, min(start + at, start + self._seconds))
            if at < self._seconds:
                self._show(clients, text)
                deed()
        self._watch(clients, start + self._seconds)
        took = time.monotonic() - start
        packets = self._decided() - first_packets
        counts = clients.finish(30.0)
        return self._result(counts, took, packets, _mean_ns(balance), _mean_ns(empty))

    # -- what happens

    def _start_operator(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "hookline.demo.operator", str(self._name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        _expect(process, "ready")
        return process

    def _start_clients(self) -> _Clients:
        process = self._lab.start(
            CLIENT,
            [sys.executable, "-m", "hookline.demo.clients"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        assert process.stdin is not None
        families = set(self._lab.families)
        addresses = [a for a in ("192.0.2.10", "2001:db8::10") if (6 if ":" in a else 4) in families]
        process.stdin.write(json.dumps({"addresses": addresses, "tcp_port": 80, "udp_port": 53}) + "\n")
        process.stdin.flush()
        return _Clients(process)

    def _remove(self, operator: subprocess.Popen[str]) -> None:
        self._end_epoch()
        assert operator.stdin is not None
        operator.stdin.write(f"remove {LEAVES}\n")
        operator.stdin.flush()
        _expect(operator, "done")
        self._begin_epoch()
        # What was under way to it ends; the pod itself goes, and with it the connections that it has.
        time.sleep(0.2)
        self._lab.remove_pod(LEAVES)

    def _adopt(self) -> None:
        command = [sys.executable, "-m", "hookline", "apply", "-f", str(FOLDER / "orders.yaml")]
        command += ["--node", str(self._name), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HooklineError("hookline apply failed after the kill", why=done.stderr.strip())

    def _add(self) -> None:
        self._end_epoch()
        pattern = next(r for r in self._lab.resources() if r.reference == "Pod/default/orders-1")
        document = pattern.to_document()
        document["metadata"] = {**document["metadata"], "name": JOINS}
        document["spec"] = {**document["spec"], "nodeName": "node-2"}
        document.pop("status", None)
        api.add_pod(self._lab, parse(document))
        self._begin_epoch()

    def _detach(self) -> None:
        link = bpf.Link.from_pin(self._name.pins / "links" / "balance:eth0")
        with link:
            link.detach()

    # -- what is seen

    def _pools(self) -> list[PoolStatus]:
        with api.Node(str(self._name)) as node:
            return node.services()

    def _decided(self) -> int:
        with api.Node(str(self._name)) as node:
            totals = node.totals()
        return sum(packets for packets, _ in totals.verdicts.values()) if totals else 0

    def _begin_epoch(self) -> None:
        self._before = self._pools()
        for status in self._before:
            for backend in status.backends:
                self._placements[backend.target.name] = backend.placement.how

    def _end_epoch(self) -> None:
        now = {_key(status): status.connections for status in self._pools()}
        for status in self._before:
            if status.pool.protocol != "TCP" or not status.table_size:
                continue
            opened = now.get(_key(status), status.connections) - status.connections
            for backend in status.backends:
                self._ideal[backend.target.name] += opened * backend.slots / status.table_size

    def _watch(self, clients: _Clients, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self._show(clients)
            if clients.process.poll() is not None:
                raise HooklineError(
                    "the demo's clients ended early", why=f"exit status {clients.process.returncode}"
                )

    def _show(self, clients: _Clients, event: str = "") -> None:
        counts = clients.latest
        now, packets = time.monotonic(), self._decided()
        rate = (packets - self._packets) / max(now - self._moment, 1e-9)
        if not event:
            self._packets, self._moment = packets, now
        self._progress(
            Progress(
                now - self._started,
                counts.get("opened", 0),
                counts.get("open_now", 0),
                sum(n for name, n in counts.get("broken", {}).items() if name != LEAVES),
                sum(counts.get("answers", {}).values()) + sum(counts.get("datagrams_answered", {}).values()),
                rate,
                event,
            )
        )

    # -- what came out

    def _result(
        self, counts: dict[str, Any], took: float, packets: int, ns: float, empty_ns: float
    ) -> Result:
        self._end_epoch()
        pools = self._pools()
        with api.Node(str(self._name)) as node:
            totals = node.totals()
            attached = {item.program for item in node.attachments()}
        servers = self._lab.server_counts()
        broken = Counter(counts["broken"])
        names = sorted({*self._placements, LEAVES})
        result = Result(
            seconds=took,
            opened=counts["opened"],
            broken_surviving=broken.total() - broken[LEAVES],
            broken_removed=broken[LEAVES],
            broken_how=counts["how"],
            failed_to_open=sum(counts["failed"].values()),
            requests=sum(counts["answers"].values()),
            datagrams_sent=counts["datagrams_sent"],
            datagrams_answered=sum(counts["datagrams_answered"].values()),
            datagrams_unanswered=counts["datagrams_unanswered"],
            kernel_packets=packets,
            kernel_connections=sum(s.connections for s in pools if s.pool.protocol == "TCP"),
            server_accepts=sum(servers.of(name).tcp_accepted for name in names),
            kernel_datagrams=sum(s.packets for s in pools if s.pool.protocol == "UDP"),
            server_datagrams=sum(servers.of(name).udp_received for name in names),
            packets_per_second=packets / took,
            ns_per_packet=ns,
            empty_ns_per_packet=empty_ns,
            verdicts={name: n for name, (n, _) in totals.verdicts.items()} if totals else {},
            drop_reasons={name: n for name, (n, _) in totals.reasons.items()} if totals else {},
            backends=[
                Backend(
                    name,
                    self._placements.get(name, ""),
                    name != LEAVES,
                    servers.of(name).tcp_accepted,
                    round(self._ideal[name], 1),
                    servers.of(name).udp_received,
                )
                for name in names
            ],
        )
        result.problems = list(_problems(result, pools, servers))
        if "balance" not in attached:
            result.problems.append("the balancer is not attached any more")
        return result


def _problems(result: Result, pools: list[PoolStatus], servers: lab.ServerCounts) -> Iterator[str]:
    if not result.opened or not result.datagrams_sent:
        yield "no traffic went through"
    if result.broken_surviving:
        yield f"{result.broken_surviving} connections broke although their backend stayed: {result.broken_how}"
    if result.failed_to_open:
        yield f"{result.failed_to_open} connections could not be opened"
    if result.kernel_connections != result.server_accepts:
        yield f"the kernel counted {result.kernel_connections} connections, the servers accepted {result.server_accepts}"
    if result.opened != result.server_accepts:
        yield f"the clients opened {result.opened} connections, the servers accepted {result.server_accepts}"
    if result.kernel_datagrams != result.server_datagrams:
        yield f"the kernel forwarded {result.kernel_datagrams} datagrams, the servers received {result.server_datagrams}"
    for backend in result.backends:
        if backend.stayed and backend.ideal > 20 and not backend.connections:
            yield f"{backend.name} got no connection, although {backend.ideal:.0f} were to be expected"
    by_name: Counter[str] = Counter()
    for status in pools:
        if status.pool.protocol == "TCP":
            for row in status.backends:
                by_name[row.target.name] += row.connections
    for name, counted in by_name.items():
        accepted = servers.of(name).tcp_accepted
        if counted != accepted:
            yield f"{name}: the kernel counted {counted} connections, its server accepted {accepted}"


def _key(status: PoolStatus) -> tuple[str, str, int]:
    return status.pool.service, status.pool.port, status.pool.version


@contextmanager
def _empty_program(netns: Path) -> Iterator[bpf.Program]:
    """A program that does nothing, on the client's interface."""
    with bpf.Object.open(EMPTY) as obj:
        obj.only("empty_xdp")
        obj.load()
        program = obj.programs["empty_xdp"]
        with net.inside(netns):
            link = program.attach_xdp("eth0", mode="native")
        with link:
            yield program


def _mean_ns(program: bpf.Program) -> float:
    info = program.info
    return info.run_time_ns / info.run_count if info.run_count else 0.0


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != word:
        assert process.stderr is not None
        raise HooklineError(
            "the demo's operating process failed",
            why=process.stderr.read().strip().splitlines()[-1]
            if process.poll() is not None
            else f"it said {said!r}",
        )


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a process of the demo's own, and lets go of its pipes."""
    if process.poll() is None:
        process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
    process.wait()
