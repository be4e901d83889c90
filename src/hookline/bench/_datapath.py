"""Nanoseconds per packet of the balancer's paths, beside a program that does nothing.

Measured by BPF_PROG_TEST_RUN inside a lab's node, so that routes and neighbours are real. A path that rewrites its packet is run
once per packet: repeated, it would meet its own output. One run has a floor of its own (timer, cold caches), which the empty
program's figure from the same rounds shows; paths that leave the packet alone are repeated in the kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from hookline import api, bpf, net
from hookline.bench._packets import ACK, SYN, tcp
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.lab import Lab
from hookline.model import Resource, parse
from hookline.model.names import NodeName

EMPTY = Path(__file__).with_name("empty.bpf.o")
ROUNDS = 15
RUNS = 400
REPEAT = 100_000
SERVICES = {
    "local": ("192.0.2.1", "2001:db8::1", "nat", "default/pod"),
    "nat": ("192.0.2.2", "2001:db8::2", "nat", "external/server"),
    "dsr": ("192.0.2.3", "2001:db8::3", "dsr", "external/server"),
}
PORT = 8080


def rows(settings: Settings, lab: Lab) -> Iterator[Row]:
    """The rows, measured on the lab's first node."""
    node_name = lab.first_node
    client = lab.member("external/client")
    with (
        api.Node(str(node_name)) as node,
        _programs(node_name) as (balance, empty),
        net.inside(node_name.netns),
    ):
        node.apply([_service(lab, kind) for kind in SERVICES])
        yield _repeated(settings, "xdp-pass", balance, empty, _foreign(lab))
        for version in (4, 6):
            origin = next(address for address in client.addresses if address.version == version)
            for kind, service in SERVICES.items():
                target = ip_address(service[0 if version == 4 else 1])
                name = f"xdp-{kind}-ipv{version}"
                yield _path(settings, name, balance, empty, (origin, 40_000), (target, PORT))


def _path(
    settings: Settings,
    name: str,
    balance: bpf.Program,
    empty: bpf.Program,
    source: tuple[net.Address, int],
    destination: tuple[net.Address, int],
) -> Row:
    """An established connection's packets."""
    balance.test_run(tcp(source, destination, flags=SYN), ingress="eth0")
    packet = tcp(source, destination, flags=ACK, payload=b"x" * 6)

    def one_by_one(program: bpf.Program) -> float:
        return statistics.median(program.test_run(packet, ingress="eth0").duration_ns for _ in range(RUNS))

    ours, nothing = settings.in_turn(name, ROUNDS, lambda: one_by_one(balance), lambda: one_by_one(empty))
    return row(
        name,
        "ns",
        ours,
        reference="an empty program, one run each",
        reference_values=nothing,
        method=f"an established connection's packet by BPF_PROG_TEST_RUN, a round is {RUNS} runs' median; {settings.where}",
    )


def _repeated(settings: Settings, name: str, balance: bpf.Program, empty: bpf.Program, packet: bytes) -> Row:
    def repeated(program: bpf.Program) -> float:
        return program.test_run(packet, ingress="eth0", repeat=REPEAT).duration_ns

    ours, nothing = settings.in_turn(name, ROUNDS, lambda: repeated(balance), lambda: repeated(empty))
    return row(
        name,
        "ns",
        ours,
        reference=f"an empty program, {REPEAT:,} runs",
        reference_values=nothing,
        method=f"by BPF_PROG_TEST_RUN, a round {REPEAT:,} runs in the kernel; {settings.where}",
    )


def _foreign(lab: Lab) -> bytes:
    """A packet that no service has: the node's own traffic."""
    client, node = lab.member("external/client"), lab.member("node/node-1")
    return tcp((client.addresses[0], 40_000), (node.addresses[0], 22))


def _service(lab: Lab, kind: str) -> Resource:
    ipv4, ipv6, forwarding, backend = SERVICES[kind]
    addresses = lab.member(backend).addresses
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": kind},
            "spec": {
                "addresses": [ipv4, ipv6],
                "ports": [{"port": PORT}],
                "forwarding": forwarding,
                "backends": [{"address": str(address)} for address in addresses],
            },
        }
    )


@contextmanager
def _programs(name: NodeName) -> Iterator[tuple[bpf.Program, bpf.Program]]:
    """The node's balancer, once it is there, and the empty program."""
    with api.Node(str(name)) as node, bpf.Object.open(EMPTY) as obj:
        obj.load()
        node.apply([_first()])
        with bpf.Program.from_pin(name.pins / "programs" / "balance") as balance:
            yield balance, obj.programs["empty_xdp"]


def _first() -> Resource:
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": "first"},
            "spec": {"addresses": ["192.0.2.250"], "ports": [{"port": 1}], "backends": []},
        }
    )
