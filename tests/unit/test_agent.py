"""Parts of the agent that need no kernel: the log, errors on the wire, files, systemd's socket, time."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import agent as package
from hookline.agent import _client, _logs, _unit
from hookline.agent._errors import AgentError, AgentHangs, from_wire, http_status, to_wire
from hookline.agent._files import Files, Watcher
from hookline.agent._lock import sole_agent
from hookline.agent._notify import notify, watchdog_seconds
from hookline.agent._worker import Worker
from hookline.control import Conflict, Node, NotThere
from hookline.errors import HooklineError
from hookline.model import names
from hookline.model.names import NodeName

SOURCE = Path(package.__file__).parent
ROOT = SOURCE.parents[2]


class Missing(HooklineError):  # noqa: N818
    exit_status = 3


@pytest.mark.parametrize(
    "error", [Conflict("a", why="b", remedy="c"), NotThere("x", why="y"), AgentError("z")]
)
def test_errors_keep_what_they_say_over_the_wire(error: HooklineError) -> None:
    back = from_wire(json.loads(json.dumps(to_wire(error))))
    assert type(back) is type(error)
    assert back.as_dict() == error.as_dict()
    assert back.exit_status == error.exit_status


def test_an_unknown_error_keeps_its_exit_status() -> None:
    back = from_wire(to_wire(Missing("no tcx", why="old kernel", remedy="a newer one")))
    assert (back.what, back.why, back.remedy, back.exit_status) == ("no tcx", "old kernel", "a newer one", 3)
    assert from_wire(to_wire(ValueError("x"))).what == "an unexpected ValueError: x"
    assert [http_status(e) for e in (Conflict(""), NotThere(""), Missing(""), ValueError())] == [
        409,
        404,
        422,
        500,
    ]


def record(**values: object) -> logging.LogRecord:
    made = logging.LogRecord("hookline.agent", logging.WARNING, "x.py", 1, "it %s", ("happened",), None)
    made.created = 1_800_000_000.1234
    made.__dict__.update(_logs.fields(**values))
    return made


def test_log_lines_for_people_and_machines() -> None:
    text = _logs.Formatter("text", {}).format(record(file="/a b", took_ms=3.25, why='say "x"'))
    assert text == '2027-01-15T08:00:00.123Z WARNING it happened file="/a b" took_ms=3.25 why="say \\"x\\""'
    document = json.loads(_logs.Formatter("json", {"node": "host"}).format(record(file="/a b", took_ms=3.25)))
    assert document == {
        "time": "2027-01-15T08:00:00.123Z",
        "level": "warning",
        "logger": "hookline.agent",
        "event": "it happened",
        "node": "host",
        "file": "/a b",
        "took_ms": 3.25,
    }
    assert "\n" not in _logs.Formatter("text", {}).format(record(what="one\ntwo"))


def test_no_part_goes_by_the_wall_clock() -> None:
    """Stepping the clock must disturb nothing: only the log may ask for the time of day, and gets it from its records."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in {
                    "time.time",
                    "time.time_ns",
                    "datetime.now",
                    "datetime.utcnow",
                    "date.today",
                }, f"{path.name}:{node.lineno}"


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False
    for address in (str(tmp_path / "notify"), f"\0hookline-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address)
            monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
            assert notify("READY=1", "STATUS=fine") is True
            assert manager.recv(100) == b"READY=1\nSTATUS=fine"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert notify("READY=1") is False
    for value, pid, expected in (("30000000", "", 30.0), ("", "", None), ("0", "", None), ("5", "1", None)):
        monkeypatch.setenv("WATCHDOG_USEC", value)
        monkeypatch.setenv("WATCHDOG_PID", pid)
        assert watchdog_seconds() == expected


def test_a_second_agent_is_refused_by_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "RUN", tmp_path)
    with sole_agent(NodeName()):
        with pytest.raises(AgentError, match="has an agent already") as raised, sole_agent(NodeName()):
            pass
        assert f"process {os.getpid()} " in raised.value.why
    with sole_agent(NodeName()):
        pass


# -- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "config"
    made.mkdir()
    return made


def test_which_files_count(folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "single.txt"
    files = Files([str(folder), str(single)])
    for name, counts in (
        ("a.yaml", True),
        ("b.json", True),
        (".a.yaml.swp", False),
        ("a.yaml~", False),
        (".#a.yaml", False),
        ("4913", False),
        ("inner/a.yaml", False),
    ):
        assert files.counts(str(folder / name)) is counts, name
    assert files.counts(str(single))
    assert not files.counts(str(tmp_path / "other.yaml"))
    assert str(folder / "gone.yaml") in files


def test_what_the_watcher_notices(folder: Path, tmp_path: Path) -> None:
    watcher = Watcher(Files([str(folder)]))
    try:
        path = folder / "a.yaml"
        with path.open("w") as half:
            half.write("kind")
            half.flush()
            assert watcher.read() == set(), "half a file is not read"
        assert watcher.read() == {str(path)}
        fresh = folder / "a.yaml.new"
        fresh.write_text("kind: x")
        assert watcher.read() == set(), "an editor's own file"
        fresh.rename(path)
        assert watcher.read() == {str(path)}
        path.unlink()
        assert watcher.read() == {str(path)}
        outside = tmp_path / "b.yaml"
        outside.write_text("x")
        os.link(outside, folder / "b.yaml")
        assert watcher.read() == {str(folder / "b.yaml")}, "a hard link is whole at once"
        (folder / "..data").symlink_to(".")
        assert watcher.read() is None, "a link may change everything"
        shutil.rmtree(folder)
        assert watcher.read() is None
        folder.mkdir()
        assert watcher.rewatch()
        path.write_text("kind: x")
        assert watcher.read() == {str(path)}
    finally:
        watcher.close()


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cannot be watched"):
        Watcher(Files([str(tmp_path / "absent" / "a.yaml")]))


# -- the unit


def test_the_unit_is_shipped_and_starts_this_command() -> None:
    shipped = (ROOT / "packaging" / "hookline-agent.service").read_text()
    assert shipped == _unit.UNIT.read_text()
    text = _unit.unit_text(["--file", "/etc/a b"])
    (start,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert start.endswith(" agent --file '/etc/a b'")
    assert Path(start.removeprefix("ExecStart=").split()[0]).is_absolute()


def test_the_unit_waits_for_the_mounts_of_what_it_watches() -> None:
    for options, expected in (
        ([], "/etc/hookline"),
        (["--file", "/srv/a", "--metrics", "[::1]:9", "--file", "/srv/50% b"], '/srv/a "/srv/50%% b"'),
        (["--metrics", "[::1]:9"], ""),
    ):
        found = [line for line in _unit.unit_text(options).splitlines() if line.startswith("RequiresMounts")]
        assert found == [f"RequiresMountsFor={expected}"]


def test_a_command_without_an_agent_loads_no_client() -> None:
    code = (
        "import sys\nfrom hookline.cli import objects, agent\nimport hookline.agent\nimport hookline.api\n"
        "print([m for m in ('httpx', 'starlette', 'uvicorn', 'prometheus_client', 'inotify_simple') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- its thread, and who asks


def test_the_thread_takes_what_is_being_taken_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing looks into the queue while the thread empties it."""
    release = threading.Event()

    class Queue(queue.PriorityQueue[Any]):
        def empty(self) -> bool:
            found = super().empty()
            release.set()
            while not super().empty():
                time.sleep(0.001)
            return found

    async def close() -> None:
        worker = Worker(lambda: Node(NodeName()))
        busy = worker.submit(lambda _: release.wait())
        while not busy.running():
            await asyncio.sleep(0.001)
        waiting = worker.submit(lambda _: None)
        asyncio.get_running_loop().call_later(0.1, release.set)
        await worker.close()
        assert busy.result() is True
        assert waiting.done()

    monkeypatch.setattr(queue, "PriorityQueue", Queue)
    asyncio.run(close())


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An agent's socket that has one in its queue, and no room for more."""
    monkeypatch.setattr(names, "RUN", tmp_path)
    path = NodeName().agent_socket
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        yield listener


def test_a_queue_that_is_full_for_a_moment_is_waited_for(full: socket.socket) -> None:
    taken: list[socket.socket] = []
    timer = threading.Timer(0.3, lambda: taken.append(full.accept()[0]))
    timer.start()
    assert _client._is_served(NodeName(), time.monotonic() + 30)
    timer.join()
    taken[0].close()


def test_a_queue_that_stays_full_is_an_agent_that_hangs(full: socket.socket) -> None:
    deadline = time.monotonic() + 0.2
    with pytest.raises(AgentHangs):
        _client._is_served(NodeName(), deadline)
    assert time.monotonic() >= deadline
