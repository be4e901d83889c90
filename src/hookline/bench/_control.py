"""How long the control plane takes: tables, a thousand services, one change among them, the command line's start."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterator

import numpy as np

from hookline import bpf
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.bench._starts import python
from hookline.control import Node
from hookline.datapath.loadbalancer import maglev
from hookline.datapath.loadbalancer.balancer import LoadBalancer, Tunables
from hookline.lab import Lab
from hookline.sources import files

SLOTS, BACKENDS = 65_537, 1_000
SERVICES, BACKENDS_EACH = 1_000, 10
STARTS = 15
APPLIES, SINGLES = 3, 15
MANY, MANY_BACKENDS = 10_000, 5


def maglev_rows(settings: Settings) -> Iterator[Row]:
    """A table of 65,537 slots for 1,000 backends: in the kernel, beside the same in Python."""
    identities = [b"10.0.%d.%d/8080" % divmod(number, 250) for number in range(BACKENDS)]
    weights = [100] * BACKENDS
    rows = np.arange(1, BACKENDS + 1, dtype=np.uint32)
    pins = bpf.pin.BPFFS / f"hookline-bench-{secrets.token_hex(3)}"

    def timed_kernel() -> float:
        start = time.perf_counter()
        balancer.build_table(0, SLOTS, rows, maglev.turns(identities, weights, SLOTS))
        return (time.perf_counter() - start) * 1e3

    def timed_python() -> float:
        start = time.perf_counter()
        maglev.build(identities, weights, SLOTS)
        return (time.perf_counter() - start) * 1e3

    with LoadBalancer.open(pins, Tunables()) as balancer:
        kernel, python = settings.in_turn("maglev-build", 11, timed_kernel, timed_python)
    yield row(
        "maglev-build",
        "ms",
        kernel,
        reference="the same table in Python",
        reference_values=python,
        method=f"{SLOTS:,} slots and {BACKENDS:,} backends of one weight, the permutations included; {settings.where}",
        goal="≤ 10 ms for 65,537 slots and 1,000 backends",
        most=10.0,
    )


def apply_rows(settings: Settings, lab: Lab) -> Iterator[Row]:
    """A thousand services applied from their file, and one changed backend among them."""
    documents = [_document(number) for number in range(SERVICES)]
    text = "---\n".join(documents)
    name = str(lab.first_node)
    reads, applies, singles = [], [], []
    attempts = settings.rounds or APPLIES
    for attempt in range(attempts):
        settings.tell("apply-1000x10", attempt + 1, attempts)
        with Node(name) as node:
            start = time.perf_counter()
            resources = files.loads(text)
            read = time.perf_counter()
            node.apply(resources)
            applies.append(time.perf_counter() - start)
            reads.append(read - start)
            for turn in range(SINGLES):
                changed = documents[SERVICES // 2].replace(".3}", f".{100 + turn}}}")
                start = time.perf_counter()
                node.apply(files.loads(changed))
                singles.append(time.perf_counter() - start)
            node.delete([resource.reference for resource in resources])
    yield row(
        "apply-1000x10",
        "s",
        applies,
        reference="reading and checking the same file alone",
        reference_values=reads,
        method=f"in this process, the state file's writing included; no round before the first; {settings.where}",
        goal="≤ 2 s for 1,000 services of 10 backends",
        most=2.0,
    )
    yield row(
        "apply-one-of-1000",
        "ms",
        [value * 1e3 for value in singles],
        reference="applying all of them",
        reference_values=[value * 1e3 for value in applies],
        method=f"another address for one of its backends, {SINGLES} times for each time that all are applied; {settings.where}",
        goal="≤ 20 ms in the process",
        most=20.0,
    )


def many_rows(settings: Settings, lab: Lab) -> Iterator[Row]:
    """One changed backend among ten thousand services."""
    documents = [_document(number, MANY_BACKENDS) for number in range(MANY)]
    sizes = "{services: 32768, backends: 65536, maglevPages: 16384}"
    node_config = (
        "apiVersion: hookline.dev/v1alpha1\nkind: NodeConfig\n"
        f"metadata: {{name: {lab.first_node.node}}}\nspec: {{maps: {sizes}}}\n"
    )
    singles = []
    with Node(str(lab.first_node)) as node:
        resources = files.loads("---\n".join((node_config, *documents)))
        settings.tell("apply-one-of-10000", 0, SINGLES)
        start = time.perf_counter()
        node.apply(resources)
        whole = time.perf_counter() - start
        for turn in range(SINGLES):
            settings.tell("apply-one-of-10000", turn + 1, SINGLES)
            changed = documents[MANY // 2].replace(".3}", f".{100 + turn}}}")
            start = time.perf_counter()
            node.apply(files.loads(changed))
            singles.append(time.perf_counter() - start)
        node.delete([resource.reference for resource in resources])
    yield row(
        "apply-one-of-10000",
        "ms",
        [value * 1e3 for value in singles],
        reference="applying all of them",
        reference_values=[whole * 1e3],
        method=f"{MANY:,} services of {MANY_BACKENDS} backends; another address for one of these, {SINGLES} times, sockets "
        f"of the former one looked for each time; {settings.where}",
        goal="≤ 50 ms in the process",
        most=50.0,
    )


def start_rows(settings: Settings) -> Iterator[Row]:
    """``hookline --help`` beside a Python that starts and ends."""

    entry = "import sys; sys.argv = ['hookline', '--help']; from hookline.cli import main; main()"
    with python() as fresh:
        ours, empty = settings.in_turn(
            "cli-help", STARTS, lambda: fresh.timed(entry), lambda: fresh.timed("pass")
        )
    yield row(
        "cli-help",
        "ms",
        ours,
        reference=f"an empty Python start, {statistics.median(empty):.0f} ms",
        reference_values=empty,
        method=f"whole processes, from their start to their end, modules compiled; {settings.where}",
        goal="≤ 6 × an empty Python start",
        most_ratio=6.0,
    )


def _document(number: int, each: int = BACKENDS_EACH) -> str:
    block, offset = divmod(number, 250)
    backends = "".join(
        f"    - {{address: 10.{100 + block}.{offset}.{backend + 1}}}\n" for backend in range(each)
    )
    return (
        "apiVersion: hookline.dev/v1alpha1\n"
        "kind: VirtualService\n"
        f"metadata: {{name: service-{number}}}\n"
        "spec:\n"
        f"  addresses: [192.168.{block}.{offset + 1}]\n"
        "  ports: [{port: 80, targetPort: 8080}]\n"
        "  backends:\n" + backends
    )
