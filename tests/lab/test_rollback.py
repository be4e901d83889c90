"""Generations of what is wanted, and the way back to them: by what the client is answered, in both families and protocols."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import api, cli, lab
from hookline.control import ControlError, NotThere
from hookline.control.state import KEPT_GENERATIONS, State, Stored
from hookline.lab import Lab, LabError
from tests.lab.conftest import document, lab_with, pod

SERVICE = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: {name}}}
spec:
  addresses: ["192.0.2.{number}", "2001:db8:2::{number}"]
  ports:
    - {{name: http, port: 80, targetPort: 8080}}
    - {{name: dns, port: 53, targetPort: 5353, protocol: UDP}}
  backends: [{{selector: {{app: {app}}}}}]
"""
DYING = """
import os, signal, sys
from hookline import api
from hookline.control import node as module

class Dying(module.Node):
    pass

def dies(self, draft):
    carried = original(self, draft)
    os.kill(os.getpid(), signal.SIGKILL)
    return carried

original = module.Node._carry_out_kernel
module.Node._carry_out_kernel = dies
with api.Node(sys.argv[1]) as node:
    node.apply(sys.argv[2])
"""


def service(name: str, app: str, number: int = 10) -> str:
    return SERVICE.format(name=name, app=app, number=number)


@pytest.fixture(scope="module")
def made(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with pods a and b, labelled so, and a client."""
    with lab_with(
        unique_name(),
        *(pod(one, metadata={"labels": {"app": one}}) for one in ("a", "b")),
    ) as up:
        yield up


@pytest.fixture
def node(made: Lab) -> Iterator[api.Node]:
    """The lab's node, with no service before and after."""
    with api.Node(f"lab/{made.name}") as opened:
        yield opened
        left = [one.reference for one in opened.resources() if opened.source_of(one.reference) != "lab"]
        opened.delete(left)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of documents."""

    def write(*texts: str, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.write_text("\n---\n".join(texts))
        return path

    return write


def answers(made: Lab, number: int = 10) -> set[str]:
    """Who answers the client at a service, in both families and over TCP and UDP."""
    return {
        made.probe("external/client", f"{host}:{port}").answered_by
        for host in (f"192.0.2.{number}", f"[2001:db8:2::{number}]")
        for port in ("80", "53/udp")
    }


def command(capsys: pytest.CaptureFixture[str], node: api.Node, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.run([*words, "--node", str(node.name)])
    return (status, *capsys.readouterr())


def numbers(node: api.Node) -> list[int]:
    return [one.number for one in node.generations()]


def test_each_change_is_a_generation(node: api.Node, write: Callable[..., Path]) -> None:
    before = len(node.generations())
    begun = time.time()
    path = write(service("s", "a"))
    first = node.apply(path).plan.generation
    assert first is not None
    assert node.apply(path).plan.generation is None, "nothing changed"
    second = node.apply(write(service("s", "b"), service("t", "a", 11))).plan.generation
    third = node.delete(["VirtualService/default/s"]).plan.generation
    found = node.generations()[: len(node.generations()) - before]
    assert [one.number for one in found] == [third, second, first] == [first + 2, first + 1, first]
    assert [(one.cause, one.created, one.changed, one.removed) for one in found] == [
        ("delete VirtualService/default/s", (), (), ("VirtualService/default/s",)),
        (f"apply {path}", ("VirtualService/default/t",), ("VirtualService/default/s",), ()),
        (f"apply {path}", ("VirtualService/default/s",), (), ()),
    ]
    assert all(begun - 1 <= one.time <= time.time() + 1 for one in found)


def test_back_to_the_one_before_and_forth_again(
    made: Lab, node: api.Node, write: Callable[..., Path]
) -> None:
    node.apply(write(service("s", "a")))
    node.apply(write(service("s", "b")))
    assert answers(made) == {"default/b"}
    done = node.rollback()
    assert answers(made) == {"default/a"}
    assert node.generations()[0].cause == f"rollback to {(done.plan.generation or 0) - 2}"
    node.rollback()
    assert answers(made) == {"default/b"}


def test_back_over_several_changes(made: Lab, node: api.Node, write: Callable[..., Path]) -> None:
    target = node.apply(write(service("s", "a"), service("t", "b", 11))).plan.generation
    node.apply(write(service("s", "b"), name="other.yaml"))
    node.delete(["VirtualService/default/t"])
    node.apply(write(service("u", "a", 12), name="third.yaml"))
    with pytest.raises(lab.ProbeFailed):
        answers(made, 11)
    plan = node.plan_rollback(target)
    assert {(one.action, one.reference) for one in plan.resources} == {
        ("change", "VirtualService/default/s"),
        ("create", "VirtualService/default/t"),
        ("remove", "VirtualService/default/u"),
    }
    assert answers(made) == {"default/b"}, "a plan changes nothing"
    node.rollback(target)
    assert (answers(made), answers(made, 11)) == ({"default/a"}, {"default/b"})
    assert node.source_of("VirtualService/default/s").endswith("file.yaml"), (
        "it comes from where it came from"
    )
    with pytest.raises(lab.ProbeFailed):
        answers(made, 12)


def test_back_to_nothing(made: Lab, node: api.Node, write: Callable[..., Path]) -> None:
    first = node.apply(write(service("s", "a"))).plan.generation
    assert first is not None
    done = node.rollback(first - 1)
    assert done.plan.detaches
    assert node.attachments() == []
    node.rollback()
    assert answers(made) == {"default/a"}


def test_what_is_refused(node: api.Node, write: Callable[..., Path]) -> None:
    last = node.apply(write(service("s", "a"))).plan.generation
    assert last is not None
    for wrong, why in (
        (last, "it is at"),
        (last + 5, "can be gone back to"),
        (0 if last > 20 else -1, "can be"),
    ):
        with pytest.raises(NotThere) as raised:
            node.rollback(wrong)
        assert why in raised.value.why
    assert numbers(node)[0] == last


def test_a_rollback_that_the_kernel_cannot_take_changes_nothing(
    made: Lab, node: api.Node, write: Callable[..., Path]
) -> None:
    node.apply(write(service("s", "a")))
    first = node.generations()[0].number
    node.delete(["VirtualService/default/s"])
    node.apply(write(service("t", "b")))  # at the same address
    node.apply(write(service("u", "b", 13), name="u.yaml"))
    with (
        State(node.name.state_dir) as state,
        state.change(),
        state.generation("a test", ["VirtualService/default/t"]),
    ):
        pass  # a generation that changes nothing is gone over
    at = numbers(node)
    taken = made.member("b").addresses[0]
    node.apply(write(service("v", "a", 14), name="v.yaml"))
    broken = service("v", "a", 14).replace("192.0.2.14", str(taken))
    with pytest.raises(LabError, match="can have the address"):
        node.apply(write(broken, name="v.yaml"))
    assert numbers(node) == [at[0] + 1, *at][:KEPT_GENERATIONS], "a refused change is no generation"
    node.rollback(first)
    assert answers(made) == {"default/a"}


def test_a_lab_s_objects_are_in_no_generation(made: Lab, node: api.Node, write: Callable[..., Path]) -> None:
    node.apply(write(service("s", "a")))
    at = numbers(node)
    made.add_pod(pod("late", metadata={"labels": {"app": "a"}}))
    try:
        api.refresh_lab(made.name)
        assert numbers(node) == at
        node.apply(write(service("s", "b")))
        node.rollback()
        assert any(one.reference == "Pod/default/late" for one in node.resources())
        assert answers(made) <= {"default/a", "default/late"}
    finally:
        made.remove_pod("late")
        api.refresh_lab(made.name)


def test_what_an_owner_took_over_stays(node: api.Node, write: Callable[..., Path]) -> None:
    extra = document("Namespace", "extra")
    node.apply(write(service("s", "a")))
    node.apply(extra)
    lab_objects = [one for one in node.resources() if node.source_of(one.reference) == "lab"]
    with State(node.name.state_dir) as state, state.change():  # as when its owner had taken it over
        state.put([Stored(extra, "lab")])
    try:
        plan = node.rollback(numbers(node)[1] - 1).plan
        assert plan.warnings[0] == "Namespace/extra belongs to the lab now and stays as it is"
        assert {one.reference for one in node.resources()} >= {"Namespace/extra"}
    finally:
        node.apply(lab_objects, owner="lab")


def test_twenty_are_kept(made: Lab, node: api.Node, write: Callable[..., Path]) -> None:
    for number in range(KEPT_GENERATIONS + 5):
        node.apply(write(service("s", "a", 20 + number)))
    found = numbers(node)
    assert len(found) == KEPT_GENERATIONS == 20
    assert found == list(range(found[0], found[0] - 20, -1))
    oldest = found[-1] - 1
    with pytest.raises(NotThere):
        node.rollback(oldest - 1)
    assert answers(made, 44) == {"default/a"}
    node.rollback(oldest)
    assert answers(made, 24) == {"default/a"}
    with pytest.raises(lab.ProbeFailed):
        answers(made, 44)
    with State(node.name.state_dir) as state:
        (rows,) = state._connection.execute(
            "SELECT COUNT(DISTINCT generation) FROM generation_changes"
        ).fetchone()
    assert rows == 20, "what older ones held is gone"


def test_a_change_that_was_killed_is_no_generation(
    made: Lab, node: api.Node, write: Callable[..., Path]
) -> None:
    node.apply(write(service("s", "a")))
    at = numbers(node)
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(node.name), write(service("s", "b"))],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert numbers(node) == at
    with api.Node(node.name) as fresh:
        fresh.apply(write(service("t", "a", 11), name="t.yaml"))
        assert (answers(made), answers(made, 11)) == ({"default/a"}, {"default/a"})
        fresh.rollback()
        assert answers(made) == {"default/a"}
        with pytest.raises(lab.ProbeFailed):
            answers(made, 11)


def test_a_state_of_the_layout_before_is_taken_over(tmp_path: Path) -> None:
    with State(tmp_path) as state:
        state._connection.executescript(
            "DROP TABLE generations; DROP TABLE generation_changes; PRAGMA user_version = 1;"
        )
    with State(tmp_path) as state:
        assert state.generations() == []


def test_the_command_line(
    made: Lab, node: api.Node, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    node.apply(write(service("s", "a")))
    node.apply(write(service("s", "b")))
    status, out, _ = command(capsys, node, "get", "generations")
    assert status == 0
    assert "CAUSE" in out
    assert "apply" in out
    _, out, _ = command(capsys, node, "get", "generations", "--json")
    listed: dict[str, Any] = json.loads(out)
    assert listed["generations"][0]["changed"] == ["VirtualService/default/s"]
    status, out, _ = command(capsys, node, "rollback", "--dry-run")
    assert (status, answers(made)) == (0, {"default/b"})
    assert "~ VirtualService/default/s" in out
    status, out, _ = command(capsys, node, "rollback")
    assert (status, out, answers(made)) == (0, "VirtualService/default/s changed\n", {"default/a"})
    at = listed["generations"][0]["generation"]
    status, out, _ = command(capsys, node, "rollback", "--to", str(at), "--json")
    assert json.loads(out)["generation"] == at + 2
    assert answers(made) == {"default/b"}
    status, _, err = command(capsys, node, "rollback", "--to", "999999")
    assert (status, "error: cannot go back to generation 999999" in err) == (1, True)
    status, _, err = command(capsys, node, "get", "generations", "x")
    assert status == 2


def test_nothing_to_go_back_to(
    unique_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOOKLINE_STATE", str(tmp_path))
    with api.Node("host") as node, pytest.raises(ControlError, match="no generation"):
        node.rollback()
