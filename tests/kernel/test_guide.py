"""docs/bpf.md: its C compiles, and its Python runs from top to bottom with real packets."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

PAGE = Path(__file__).parents[2] / "docs" / "bpf.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_is_true(loopback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("c")
    Path("count.bpf.c").write_text(program)
    frame = bytes(Ether() / IP(src="127.0.0.1", dst="127.0.0.1") / UDP(dport=9000) / b"hello")

    def send(port: int, count: int) -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            server.bind(("127.0.0.1", port))
            server.settimeout(5)
            for _ in range(count):
                client.sendto(b"hello", server.getsockname())
                server.recv(10)

    names: dict[str, Any] = {"send": send, "frame": frame}
    parts = blocks("python")
    assert len(parts) == 7
    for number, text in enumerate(parts):
        exec(compile(text, f"{PAGE.name}, block {number}", "exec"), names)
    assert set(names) >= {"events", "listing", "names"}
