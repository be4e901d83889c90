"""The examples of programs of one's own: compiled and run as their page says, in a namespace of their own, with real traffic."""

from __future__ import annotations

import ast
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hookline.datapath.compiler import compile_program

EXAMPLES = Path(__file__).parents[2] / "examples" / "programs"


def receiver(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.bind((address, 0))
    server.settimeout(0.3)
    return server


def arrive(source: str, server: socket.socket, count: int) -> int:
    """How many of some datagrams from an address reach a server."""
    with socket.socket(server.family, socket.SOCK_DGRAM) as client:
        client.bind((source, 0))
        for _ in range(count):
            client.sendto(b"x", server.getsockname()[:2])
        arrived = 0
        try:
            while arrived < count:
                server.recv(10)
                arrived += 1
        except TimeoutError:
            pass
        return arrived


@pytest.mark.parametrize(("script", "part"), [("flows.py", None), ("guard.py", "DataPlane")])
def test_an_example_is_short(script: str, part: str | None) -> None:
    """Under 15 statements; imports and docstrings are not counted."""
    tree = ast.parse((EXAMPLES / script).read_text())
    roots = [node for node in tree.body if part is None or getattr(node, "name", None) == part]
    lines = {
        node.lineno
        for root in roots
        for node in ast.walk(root)
        if isinstance(node, ast.stmt)
        and not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    }
    assert 5 < len(lines) < 15, sorted(lines)


@pytest.fixture(scope="module")
def guard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guard", EXAMPLES / "guard.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("there", "other"), [("127.0.0.2", "127.0.0.3"), ("fd00::1", "fd00::2")], ids=["IPv4", "IPv6"]
)
def test_a_data_plane_obeys_its_policy(
    loopback: Path, tmp_path: Path, guard: ModuleType, there: str, other: str
) -> None:
    path = str(compile_program(EXAMPLES / "guard.bpf.c", tmp_path / "guard.bpf.o"))
    whole, one = ("127.0.0.0/8", "127.0.0.2/32") if there == "127.0.0.2" else ("fd00::/16", "fd00::1/128")
    here = "127.0.0.1" if there == "127.0.0.2" else "::1"
    with receiver(here) as server, guard.DataPlane() as plane:
        plane.load_program("xdp:lo", path)
        assert arrive(there, server, 5) == 5
        plane.update_policy({one: True})
        assert (arrive(there, server, 5), arrive(other, server, 5)) == (0, 5)
        plane.update_policy({whole: True, one: False})
        assert (arrive(there, server, 5), arrive(other, server, 5)) == (5, 0)
        packets = {key["length"]: rule["packets"] for key, rule in plane.policy.items()}
        assert sorted(packets.values()) == [5, 5]
        plane.update_policy({})
        assert len(plane.policy) == 0
        assert arrive(other, server, 5) == 5
        plane.load_program("tc:lo:egress", path)
        plane.update_policy({f"{here}/{32 if '.' in here else 128}": True})
        assert arrive(other, server, 5) == 0
        assert [int(rule["packets"]) for rule in plane.policy.values()] == [5]
    with receiver(here) as server:
        assert arrive(there, server, 5) == 5


@pytest.mark.parametrize(("here", "there"), [("127.0.0.1", "127.0.0.2"), ("::1", "fd00::1")])
def test_flows_are_counted_each_second(loopback: Path, tmp_path: Path, here: str, there: str) -> None:
    compile_program(EXAMPLES / "flows.bpf.c", tmp_path / "flows.bpf.o")
    output = tmp_path / "output"
    command = [sys.executable, str(EXAMPLES / "flows.py"), "lo"]
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file)
    try:
        with receiver(there) as server, receiver(here) as client:
            ends = f"{here} {client.getsockname()[1]} {there} {server.getsockname()[1]}"
            back = f"{there} {server.getsockname()[1]} {here} {client.getsockname()[1]}"

            def send(count: int) -> None:
                for _ in range(count):
                    client.sendto(b"hello", server.getsockname()[:2])

            def shown() -> str:
                send(1)  # counted once the programs are there
                return output.read_text()

            def counts() -> list[list[int]]:
                """What each second's lines say of the datagrams: sent, and received at the other end."""
                text = output.read_text()
                ways = ((ends, r"sent (\d+) received 0"), (back, r"sent 0 received (\d+)"))
                found = [re.findall(f"^{re.escape(who)} {way}$", text, re.MULTILINE) for who, way in ways]
                return [[int(number) for number in pair] for pair in zip(*found, strict=False)]

            # The two programs are attached one after the other, so one may have counted more.
            eventually(lambda: ends in shown())
            eventually(lambda: len(lines := counts()) > 1 and lines[-1] == lines[-2])
            before = counts()[-1]
            send(7)
            eventually(lambda: counts()[-1] == [number + 7 for number in before])
            time.sleep(1.2)
            assert counts()[-1] == [number + 7 for number in before]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=10)


def test_flows_says_what_is_wrong(loopback: Path, tmp_path: Path) -> None:
    compile_program(EXAMPLES / "flows.bpf.c", tmp_path / "flows.bpf.o")
    for words, said in (
        (["absent0"], "no interface 'absent0'"),
        (["lo", "absent.o"], "cannot read 'absent.o'"),
    ):
        command = [sys.executable, str(EXAMPLES / "flows.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
