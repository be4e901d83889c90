"""The firewall: what it leaves of a node's rate of small packets and of bulk TCP, and what a packet costs.

    pod ── p0 ══ pod0 ── node ── uplink ══ up ── far

Small packets come from a pod's end of its veth by XDP's live frames, which cost next to nothing, are forwarded by the node's
stack, and are counted and dropped where they arrive; sending, forwarding and arriving are one CPU's work. Rules are for as many
networks, of which the packets' own is the last. No rules at all, the firewall and nftables take turns in every round. nftables
has its rules in the forward chain, without connection tracking but where it is named; the firewall always tracks.

The share without rules depends on what forwarding itself costs: here there is no driver below and no bridge beside, so the
stack is as cheap as it gets, and the shares as low.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from hookline import bpf, net
from hookline.bench._groups import LeftOutError
from hookline.bench._packets import ACK, SYN, tcp
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.datapath.firewall.firewall import Firewall, Rows, RuleKey, Tunables, packed, remove
from hookline.errors import HooklineError
from hookline.policy import PolicyRow

EMPTY = Path(__file__).with_name("empty.bpf.o")
FORWARD = Path(__file__).with_name("forward.bpf.o")
NUMBERS = (1, 100, 1_000, 10_000)
LINEAR = (1, 100, 1_000)
ROUNDS, BURSTS, PACKETS, WARM = 15, 4, 15_000, 5_000
BURST = f"the fastest of {BURSTS} bursts of {PACKETS:,}: whatever else runs only slows one down"
FLOWS, MANY_FLOWS = 1_000, 60_000
POD, FAR, PORT = IPv4Address("10.1.0.2"), IPv4Address("10.2.0.9"), 9
REPEAT, RUNS = 200_000, 20_000
TABLE_FLOWS = 64_000
BULK_S = 0.3
GOAL_SHARE, GOAL_BULK, GOAL_HOT_NS = 0.90, 0.95, 60

_NODE = """
link add pod0 address 02:00:00:00:00:01 type veth peer name p0 netns POD
link add uplink type veth peer name up address 02:00:00:00:00:09 netns FAR
link set dev pod0 up
link set dev uplink up
address add 10.1.0.1/24 dev pod0
address add 10.2.0.1/24 dev uplink
neighbour replace 10.2.0.9 lladdr 02:00:00:00:00:09 nud permanent dev uplink
"""
_END = """
link set dev LINK up
address add OWN/24 dev LINK
route add default via GATEWAY
"""


@dataclass(frozen=True)
class _Place:
    """Three namespaces."""

    node: Path
    pod: Path
    far: Path


def _frame() -> bytes:
    """A small datagram from the pod to the far end, 64 octets."""
    header = struct.pack("!BBHHHBBH", 0x45, 0, 50, 1, 0, 64, 17, 0) + POD.packed + FAR.packed
    total = sum(struct.unpack("!10H", header))
    check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", check) + header[12:]
    layer2 = bytes.fromhex("020000000001020000000009") + b"\x08\x00"
    return layer2 + header + struct.pack("!4H", 1, PORT, 30, 0) + bytes(22)


@contextmanager
def _place() -> Iterator[_Place]:
    names = [f"hl-bench-{secrets.token_hex(3)}-{part}" for part in ("node", "pod", "far")]
    try:
        place = _Place(*(net.create(name) for name in names))
        with net.inside(place.node):
            net.write_sysctls(
                {"ipv4/ip_forward": 1, "ipv4/conf/all/rp_filter": 0, "ipv4/conf/default/rp_filter": 0}
            )
        _ip(place.node, _NODE.replace("POD", names[1]).replace("FAR", names[2]))
        for path, link, own, gateway in (
            (place.pod, "p0", POD, "10.1.0.1"),
            (place.far, "up", FAR, "10.2.0.1"),
        ):
            _ip(path, _END.replace("LINK", link).replace("OWN", str(own)).replace("GATEWAY", gateway))
        with net.inside(place.node):
            # So that what is redirected to p0 arrives: a veth takes frames where it polls.
            net.set_offloads("pod0", gro=True)
        yield place
    finally:
        for name in names:
            net.delete(name)


def _ip(namespace: Path, commands: str) -> None:
    command = ["ip", "-netns", namespace.name, "-batch", "-"]
    done = subprocess.run(command, input=commands, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HooklineError("cannot make the topology", why=done.stderr.strip(), remedy="hookline doctor")


# What stands in the packets' way


Way = Callable[[_Place], "Iterator[None]"]


def _nothing(place: _Place) -> Iterator[None]:
    yield


def _firewall(number: int, place: _Place) -> Iterator[None]:
    """So many rules, each for another network; the last one's is the far end's."""
    pins = Path(f"/sys/fs/bpf/hookline-bench-{secrets.token_hex(4)}")
    with net.inside(place.node):
        try:
            with Firewall.open(pins, Tunables()) as firewall:
                firewall.commit(_rows(number, net_index("pod0"), net_index("pod0")))
                firewall.activate({"pod0": "pod"})
                yield
        finally:
            remove(pins)


def net_index(interface: str) -> int:
    """An interface's index in this namespace."""
    return socket.if_nametoindex(interface)


def _rows(number: int, pod: int, own: int) -> Rows:
    identities = {
        (packed(IPv4Address((20 << 24) + (one << 8))), 120): (16 + one, 0) for one in range(number - 1)
    }
    identities[packed(FAR), 128] = (16 + number, 0)
    identities[packed(POD), 128] = (15 + (1 << 20), own)
    rules: dict[RuleKey, tuple[int, bool]] = {(1, 16 + number, 6, 0, 0): (1, True)}
    for place, (identity, _) in enumerate(identities.values()):
        rules[1, identity, 17, PORT, 16] = (1 + place, True)
    return Rows({pod: PolicyRow(ingress=2, egress=1)}, identities, rules)


def _nftables(rules: str, place: _Place) -> Iterator[None]:
    """A forward chain with these rules."""
    text = f"table ip bench {{\n{rules}\n}}\n"
    with net.inside(place.node):
        _nft(text)
    try:
        yield
    finally:
        with net.inside(place.node):
            _nft("delete table ip bench\n")


def _nft(text: str) -> None:
    done = subprocess.run(["nft", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HooklineError(
            "nftables refuses its rules", why=done.stderr.strip(), remedy="hookline bench --list"
        )


def _networks(number: int) -> list[str]:
    return [f"{IPv4Address((20 << 24) + (one << 8))}/24" for one in range(number - 1)] + [str(FAR)]


def _chain(*rules: str) -> str:
    lines = "\n".join(rules)
    return f"chain forward {{\ntype filter hook forward priority 0; policy drop;\n{lines}\n}}"


def _linear(number: int) -> str:
    return _chain(*(f"ip daddr {one} udp dport {PORT} accept" for one in _networks(number)))


def _as_set(number: int) -> str:
    elements = ", ".join(_networks(number))
    named = f"set far {{ type ipv4_addr; flags interval; elements = {{ {elements} }} }}"
    return f"{named}\n{_chain(f'ip daddr @far udp dport {PORT} accept')}"


def _tracking() -> str:
    return _chain(
        "ct state established,related accept", f"ip daddr {FAR} udp dport {PORT} ct state new accept"
    )


# Small packets


@contextmanager
def _sender(place: _Place, flows: int) -> Iterator[Callable[[int], float]]:
    """Sends that many packets of so many flows through the node, and returns how many a second arrived."""
    with bpf.Object.open(FORWARD) as obj, ExitStack() as opened:
        with net.inside(place.pod):
            obj.constants["leaves_by"] = net_index("p0")
        obj.constants["flows"] = flows
        frame = _frame()
        obj.constants["headers"] = list(frame[:34])
        obj.load()
        with net.inside(place.far):
            opened.enter_context(obj.programs["swallow"].attach_tc("up", "ingress"))

        def arrived() -> int:
            return int(obj.maps["counts"][1].sum())

        def send(number: int) -> float:
            before = arrived()
            with net.inside(place.pod):
                start = time.perf_counter()
                obj.programs["send_flows"].test_run(frame, repeat=number, live_frames=True)
                took = time.perf_counter() - start
            # The last batch's packets are on their way through the queues of veths.
            deadline = time.monotonic() + 2
            while arrived() - before < number and time.monotonic() < deadline:
                time.sleep(0.001)
            if arrived() - before < number * 0.99:
                raise HooklineError(
                    f"{number - arrived() + before:,} of {number:,} packets did not arrive",
                    why="what is in their way refused them, or a queue was full",
                    remedy="measure on a machine with less to do",
                )
            return (arrived() - before) / took

        yield send


def _rate(place: _Place, way: Way, flows: int) -> float:
    with contextmanager(way)(place), _sender(place, flows) as send:
        send(max(WARM, flows))
        return max(send(PACKETS) for _ in range(BURSTS))


def forward_rows(settings: Settings) -> Iterator[Row]:
    """The shares of the rate of small packets."""
    ways: dict[str, Way] = {"none": _nothing}
    ways |= {f"firewall-forward-{number}": partial(_firewall, number) for number in NUMBERS}
    with_nft = bool(shutil.which("nft"))
    if with_nft:
        ways |= {f"nftables-forward-{number}": partial(_nftables, _linear(number)) for number in LINEAR}
        ways["nftables-forward-set-1000"] = partial(_nftables, _as_set(1000))
        ways["nftables-forward-tracking"] = partial(_nftables, _tracking())
    method = f"{FLOWS:,} flows of datagrams of 64 octets, forwarded by the stack on one CPU; {BURST}; {settings.where}"
    with _place() as place:
        found = settings.in_turn(
            "firewall-forward", ROUNDS, *(partial(_rate, place, way, FLOWS) for way in ways.values())
        )
        for name, values in list(zip(ways, found, strict=True))[1:]:
            is_ours = name.startswith("firewall")
            yield row(
                name,
                "/s",
                values,
                reference="no rules at all",
                reference_values=found[0],
                method=method,
                goal=f"≥ {GOAL_SHARE:.2f} × without rules" if is_ours else "",
                least_ratio=GOAL_SHARE if is_ours else None,
            )
        ours, none = settings.in_turn(
            "firewall-forward-many-flows",
            ROUNDS,
            partial(_rate, place, partial(_firewall, 1_000), MANY_FLOWS),
            partial(_rate, place, _nothing, MANY_FLOWS),
        )
        yield row(
            "firewall-forward-many-flows",
            "/s",
            ours,
            reference="no rules at all",
            reference_values=none,
            method=f"1,000 rules, {MANY_FLOWS:,} flows in turn, whose rows no cache holds; {BURST}; {settings.where}",
        )
    if not with_nft:
        raise LeftOutError("not installed (apt-get install nftables)")


# Bulk


def _bulk(place: _Place, way: Way) -> float:
    """Octets a second over one connection from the pod to the far end."""
    with contextmanager(way)(place):
        with net.inside(place.far):
            listener = socket.create_server((str(FAR), 0))
        with net.inside(place.pod):
            client = socket.create_connection(listener.getsockname())
        with listener, client:
            served = listener.accept()[0]
            received = 0

            def receive() -> None:
                nonlocal received
                buffer = bytearray(1 << 20)
                while count := served.recv_into(buffer):
                    received += count

            reader = threading.Thread(target=receive)
            reader.start()
            payload = bytes(1 << 18)
            start = time.perf_counter()
            try:
                while time.perf_counter() - start < BULK_S:
                    client.sendall(payload)
            finally:
                client.shutdown(socket.SHUT_WR)
                reader.join()
                served.close()
            return received / (time.perf_counter() - start)


def bulk_rows(settings: Settings) -> Iterator[Row]:
    """Bulk TCP from a pod through its node."""
    with _place() as place:
        ours, none = settings.in_turn(
            "firewall-bulk",
            ROUNDS,
            partial(_bulk, place, partial(_firewall, 1_000)),
            partial(_bulk, place, _nothing),
        )
    yield row(
        "firewall-bulk",
        "octets/s",
        ours,
        reference="no rules at all",
        reference_values=none,
        goal=f"≥ {GOAL_BULK:.2f} × without rules",
        least_ratio=GOAL_BULK,
        method=f"one connection through the node for {BULK_S} s, 1,000 rules; {settings.where}",
    )


# One packet


def packet_rows(settings: Settings) -> Iterator[Row]:
    """Nanoseconds of one established packet, beside a program that does nothing."""
    with (
        Firewall.open(Path("/sys/fs/bpf/hookline-bench"), Tunables()) as firewall,
        bpf.Object.open(EMPTY) as obj,
    ):
        obj.load()
        program, nothing = firewall.programs["from_pod"], obj.programs["empty_sched_cls"]
        loopback = net_index("lo")
        firewall.commit(_rows(1_000, loopback, loopback))

        def opened(port: int) -> bytes:
            ends = (POD, port), (FAR, PORT)
            program.test_run(tcp(*ends, flags=SYN), ingress="lo")
            firewall.programs["to_pod"].test_run(tcp(*reversed(ends), flags=SYN | ACK), ingress="lo")
            packet = tcp(*ends, flags=ACK, payload=b"x" * 6)
            if program.test_run(packet, ingress="lo").verdict != 0xFFFFFFFF:
                raise HooklineError("the firewall refuses the packet that is to be measured")
            return packet

        hot = opened(1024)

        def repeated(which: bpf.Program) -> float:
            return which.test_run(hot, ingress="lo", repeat=REPEAT).duration_ns

        ours, empty = settings.in_turn(
            "firewall-hot", 15, partial(repeated, program), partial(repeated, nothing)
        )
        floor = statistics.median(empty)
        yield row(
            "firewall-hot",
            "ns",
            [value - floor for value in ours],
            reference=f"an empty TC program, {REPEAT:,} runs",
            reference_values=empty,
            goal=f"≤ {GOAL_HOT_NS} ns above it",
            most=GOAL_HOT_NS,
            method=f"an established TCP packet of one flow by BPF_PROG_TEST_RUN, above the empty program's; {settings.where}",
        )
        packets = [opened(1024 + number) for number in range(TABLE_FLOWS)]
        step = max(1, TABLE_FLOWS // RUNS)

        def one_by_one(which: bpf.Program) -> float:
            return statistics.median(
                which.test_run(packet, ingress="lo").duration_ns for packet in packets[::step]
            )

        ours, empty = settings.in_turn(
            "firewall-cold", 5, partial(one_by_one, program), partial(one_by_one, nothing)
        )
        floor = statistics.median(empty)
        yield row(
            "firewall-cold",
            "ns",
            [value - floor for value in ours],
            reference="an empty TC program, one run each",
            reference_values=empty,
            method=f"the same, {TABLE_FLOWS:,} flows in turn, one run each, caches cold; {settings.where}",
        )
