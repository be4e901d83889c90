"""Agents as processes of their own, for tests: started, asked, killed, and gone in the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from hookline import bpf, cli
from hookline.api import Node
from hookline.lab import Lab
from hookline.model.names import NodeName

PATIENCE_S = 60.0  # how long a busy machine may take for anything

SERVICE = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: {name}}}
spec:
  addresses: [{address}]
  ports: [{{name: http, port: 80, targetPort: 8080}}]
  backends: [{backends}]
"""


def service(name: str, address: str, backends: str = "{selector: {app: orders}}") -> str:
    """A service of the lab's orders pods."""
    return SERVICE.format(name=name, address=address, backends=backends)


def until(what: str, true: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Waits for something to become true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return found


@dataclass
class AgentProcess:
    """One agent of a lab's node.

    Attributes:
        folder: What it watches.
        options: More of its command line.
        program: What runs it, in place of the command itself.
    """

    lab: Lab
    folder: Path
    log: Path
    options: Sequence[str] = ()
    node: str = "node-1"
    environment: dict[str, str] = field(default_factory=dict)
    program: Sequence[str] = (sys.executable, "-m", "hookline")
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> NodeName:
        """The node."""
        return NodeName(self.lab.name, self.node)

    def command(self, *options: str) -> list[str]:
        """The command line of an agent here."""
        return [*self.program, "agent", "--node", str(self.name), *options]

    def start(self) -> AgentProcess:
        """Starts it, and waits until it answers."""
        options = ["-f", str(self.folder), "--check-every", "0.5", "--log-format", "json", *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*options), stderr=log, env={**os.environ, **self.environment}
            )
        until("the agent answers", self._answers)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket(socket.AF_UNIX) as attempt:
            try:
                attempt.connect(str(self.name.agent_socket))
            except OSError:
                return False
        return bool(self.health()["pid"] == self.process.pid)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One request to its socket."""
        transport = httpx.HTTPTransport(uds=str(self.name.agent_socket))
        with httpx.Client(transport=transport, base_url="http://agent", timeout=PATIENCE_S) as client:
            return client.get(path, **options)

    def health(self) -> Any:
        """What it says of itself."""
        return self.get("/v1/health").json()

    def metric(self, line: str) -> float:
        """The value of one sample, 0 where there is none yet."""
        for text in self.get("/metrics").text.splitlines():
            if text.startswith(line + " "):
                return float(text.rpartition(" ")[2])
        return 0.0

    def write(self, text: str, name: str = "services.yaml") -> Path:
        """Puts a file into its folder as a careful writer does: under another name, then renamed."""
        path = self.folder / name
        fresh = self.folder / f".{name}.tmp"
        fresh.write_text(text)
        fresh.rename(path)
        return path

    def kill(self) -> None:
        """Ends it without a word."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self) -> int:
        """Asks it to end, and returns its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def events(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def said(self, event: str, **values: str) -> list[dict[str, Any]]:
        """Events of this name whose members contain these texts."""
        return [
            one
            for one in self.events()
            if one["event"] == event and all(text in str(one.get(name)) for name, text in values.items())
        ]

    # -- what it works on

    def run(self, *arguments: str | Path) -> int:
        """The command line on its node, in this process."""
        return cli.run([*map(str, arguments), "--node", str(self.name)])

    def answer(self, address: str, family: int | None = None) -> str:
        """Who answers the client there."""
        return self.lab.probe("external/client", address, 80).answered_by

    def answers(self, address: str) -> bool:
        """Whether anybody does."""
        from hookline.lab import ProbeFailed

        try:
            return bool(self.answer(address))
        except ProbeFailed:
            return False

    def pin(self, name: str) -> Path:
        """One of the node's pins."""
        return self.name.pins / name

    def table(self, name: str) -> bpf.Map:
        """One of the node's maps."""
        return bpf.Map.from_pin(self.pin(f"maps/{name}"))

    def numbers(self) -> dict[str, Any]:
        """The kernel's numbers of all that is loaded, and the rows: what nobody may have touched if nothing changed."""
        found: dict[str, Any] = {}
        for path in sorted(self.pin("links").iterdir()):
            with bpf.Link.from_pin(path) as link:
                found[path.name] = (link.info.id, link.info.program_id)
        for name in ("services", "backends", "maglev", "connections"):
            with self.table(name) as table:
                found[name] = table.id
                if name in ("services", "backends"):
                    keys, values = table.read()
                    found[f"{name} rows"] = (
                        sorted(
                            zip(map(bytes, keys), map(bytes, values), strict=True) if len(keys) < 999 else []
                        )
                        or values.tobytes()
                    )
        return found

    def clear(self) -> None:
        """Ends it, and removes all objects but the lab's."""
        self.kill()
        with Node(self.name) as node:
            node.delete([r.reference for r in node.resources() if node.source_of(r.reference) != "lab"])
