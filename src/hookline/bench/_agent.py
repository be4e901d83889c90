"""The agent with 10,000 services of 5 backends: from a file's change to the kernel, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

from hookline import bpf
from hookline.api import Node
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.control.tables import service_key
from hookline.errors import HooklineError
from hookline.lab import Lab
from hookline.model.names import NodeName

SERVICES, BACKENDS_EACH, PER_FILE = 10_000, 5, 100
CHANGES = 21
PATIENCE_S = 600.0
ADDRESS = "192.0.2.1"
CONFIG = """\
apiVersion: hookline.dev/v1alpha1
kind: NodeConfig
metadata: {{name: {node}}}
spec:
  interfaces: [{{name: eth0, role: uplink}}]
  maps: {{services: 32768, maglevPages: 16384}}
"""


def rows(settings: Settings, lab: Lab) -> Iterator[Row]:
    """One small file among a hundred changes, beside the same where it is the only one; what the process then holds."""
    node = lab.first_node
    rounds = settings.rounds or CHANGES
    try:
        with tempfile.TemporaryDirectory(prefix="hookline-bench-") as place:
            folder = Path(place)
            (folder / "node.yaml").write_text(CONFIG.format(node=node.node))
            with _agent(node, folder) as pid:
                alone = _changes(settings, node, folder, rounds)
                empty = _resident_mib(pid)
            for first in range(0, SERVICES, PER_FILE):
                texts = map(_document, range(first, first + PER_FILE))
                (folder / f"services-{first:05}.yaml").write_text("---\n".join(texts))
            with _agent(node, folder) as pid:
                among = _changes(settings, node, folder, rounds)
                memory = _resident_mib(pid)
    finally:
        with Node(node) as opened:
            opened.delete([r.reference for r in opened.resources() if opened.source_of(r.reference) != "lab"])
    many = f"{SERVICES:,} services of {BACKENDS_EACH} backends"
    yield row(
        "agent-change",
        "ms",
        among,
        reference="the same where it is the only service",
        reference_values=alone,
        method=f"one backend of one service in a file of its own, from the file's rename until its row in the kernel's map "
        f"changes, beside {many}; {settings.where}",
        goal="≤ 50 ms",
        most=50.0,
    )
    yield row(
        "agent-memory",
        "MiB",
        [memory],
        reference="an agent with one service",
        reference_values=[empty],
        method=f"resident memory with {many}, the tables' 64 MiB that it shares with the kernel included",
        goal="≤ 300 MiB",
        most=300.0,
    )


@contextmanager
def _agent(node: NodeName, folder: Path) -> Iterator[int]:
    """An agent that is ready; ended at the end."""
    (folder / "small.yaml").write_text(_document(SERVICES, ADDRESS))
    command = [sys.executable, "-m", "hookline", "agent", "--node", str(node), "-f", str(folder)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--log-level", "warning"], stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not _answers(node):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    why = log.read()[-500:].decode(errors="replace").strip()
                    raise HooklineError("the agent did not start", why=why)
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


def _answers(node: NodeName) -> bool:
    from hookline.agent import connect

    if not node.agent_socket.exists():
        return False
    agent = connect(node)
    if agent is not None:
        agent.close()
    return agent is not None


def _changes(settings: Settings, node: NodeName, folder: Path, rounds: int) -> list[float]:
    """Milliseconds from the file's change to the kernel's, each time."""
    key = service_key(IPv4Address(ADDRESS), 80, "TCP")
    found = []
    with bpf.Map.from_pin(node.pins / "maps" / "services") as services:

        def state() -> bytes:
            value = services.get(key)
            return b"" if value is None else bytes(value.tobytes())

        for number in range(rounds + 1):
            settings.tell("agent-change", number, rounds)
            fresh = folder / ".small.yaml"
            fresh.write_text(_document(SERVICES, ADDRESS, changed=number + 100))
            before, start = state(), time.perf_counter()
            fresh.rename(folder / "small.yaml")
            while state() == before:
                if time.perf_counter() - start > PATIENCE_S:
                    raise HooklineError("the agent did not take up a changed file")
                time.sleep(0.0002)
            if number:
                found.append((time.perf_counter() - start) * 1e3)
            time.sleep(
                0.3
            )  # what comes after the kernel, such as the state's file, is no part of the next round
    return found


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _document(number: int, address: str = "", *, changed: int = 1) -> str:
    block, offset = divmod(number, 250)
    addresses = [f"10.{100 + block}.{offset}.{backend + 2}" for backend in range(BACKENDS_EACH - 1)]
    backends = "".join(
        f"    - {{address: {one}}}\n" for one in (f"10.{100 + block}.{offset}.{changed}", *addresses)
    )
    return (
        "apiVersion: hookline.dev/v1alpha1\n"
        "kind: VirtualService\n"
        f"metadata: {{name: service-{number}}}\n"
        "spec:\n"
        f"  addresses: [{address or f'192.168.{block}.{offset + 1}'}]\n"
        "  ports: [{port: 80, targetPort: 8080}]\n"
        "  backends:\n" + backends
    )
