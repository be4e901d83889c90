"""A state file that is damaged or gone: it is said, what serves goes on serving, and the sources bring the rest back.

Files are damaged for real: bytes flipped, truncated, zeroed, removed, the process killed in the middle of an apply. That
connections go on is asked with the lab's client, in both families and over TCP and UDP.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import api, bpf, cli, lab
from hookline.control import StateDamaged, StateError
from hookline.control.state import DAMAGED_FILE, STATE_FILE, State
from hookline.lab import Lab
from hookline.lab._lab import _read_resources
from tests.lab.agents import AgentProcess
from tests.lab.conftest import document, lab_with, pod
from tests.lab.test_rollback import DYING, answers, service

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def made(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with pods a and b, and a client."""
    with lab_with(
        unique_name(),
        *(pod(one, metadata={"labels": {"app": one}}) for one in ("a", "b")),
    ) as up:
        yield up


@pytest.fixture
def files(made: Lab, tmp_path: Path) -> Iterator[list[Path]]:
    """Three services, each of a file of its own, applied; s to a at .10, t to b at .11, u to a at .12."""
    written = []
    for name, app, number in (("s", "a", 10), ("t", "b", 11), ("u", "a", 12)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(service(name, app, number))
        written.append(path)
    with opened(made) as node:
        node.apply(written)
    yield written
    with opened(made) as node:
        node.recover(drop_unclaimed=True)
        node.delete([one.reference for one in node.resources() if node.source_of(one.reference) != "lab"])
        assert node.attachments() == []


def opened(made: Lab) -> api.Node:
    return api.Node(f"lab/{made.name}")


def folder(made: Lab) -> Path:
    return opened(made).name.state_dir


def settled(made: Lab) -> Path:
    """The state's file with everything in it, nothing in the log."""
    path = folder(made) / STATE_FILE
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return path


def assert_all_serve(made: Lab) -> None:
    assert (answers(made), answers(made, 11), answers(made, 12)) == (
        {"default/a"},
        {"default/b"},
        {"default/a"},
    )


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncate_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate_to_a_part_of_a_page(path: Path) -> None:
    os.truncate(path, 4096 + 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def garbage_behind_the_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:100] + random.Random(2).randbytes(len(data) - 100))


def another_letter(path: Path) -> None:
    """One digit of one address: SQLite sees nothing in it."""
    data = path.read_bytes()
    assert b'"192.0.2.11"' in data
    path.write_bytes(data.replace(b'"192.0.2.11"', b'"192.0.2.19"'))


SAID = [
    zero,
    truncate_to_half,
    truncate_to_a_part_of_a_page,
    garbage,
    garbage_behind_the_header,
    another_letter,
]


@pytest.mark.parametrize("damage", SAID)
def test_damage_is_said_and_mended(made: Lab, files: list[Path], damage: Callable[[Path], None]) -> None:
    damage(settled(made))
    with opened(made) as node:
        with pytest.raises(StateDamaged) as raised:
            node.apply(files)
        assert "damaged" in raised.value.why
        assert raised.value.remedy.startswith("hookline state repair")
        with pytest.raises(StateError):
            node.resources()
        found = node.check_state()
        assert found.damage
        assert not found.healthy
    assert_all_serve(made)
    links = links_of(made)
    with opened(made) as node:
        found = node.recover()
        assert found.kept_at == folder(made) / DAMAGED_FILE
        assert found.kept_at.exists()
        assert_all_serve(made)
        for path in files:
            node.apply(path)
            assert_all_serve(made)
        found = node.check_state()
        assert (found.healthy, found.unclaimed) == (True, ())
        assert node.delete(["VirtualService/default/u"]).plan.warnings == []
    assert links_of(made) == links, "no program was touched"
    with pytest.raises(lab.ProbeFailed):
        answers(made, 12)
    assert answers(made) == {"default/a"}


@pytest.mark.parametrize("damage", [empty, remove])
def test_a_file_that_is_gone(made: Lab, files: list[Path], damage: Callable[[Path], None]) -> None:
    damage(settled(made))
    with opened(made) as node:
        assert [str(one).split(" ")[0] for one in node.check_state().unclaimed] == [
            f"{host}:{port}/{protocol},"[: -1 if last else None]
            for number in (10, 11, 12)
            for host, port, protocol, last in (
                (f"192.0.2.{number}", 53, "UDP", True),
                (f"192.0.2.{number}", 80, "TCP", True),
            )
        ] + [
            f"[2001:db8:2::{number}]:{port}/{protocol}"
            for number in (10, 11, 12)
            for port, protocol in ((53, "UDP"), (80, "TCP"))
        ]
        applied = node.apply(files[1])  # nobody repaired anything
        assert len([line for line in applied.plan.warnings if "no object wants it" in line]) == 8
    assert_all_serve(made)
    with opened(made) as node:
        found = node.recover()
        assert (found.damage, found.lost) == (
            "",
            "there was no state file, or an empty one, and the kernel has services",
        )
        assert len(found.unclaimed) == 8
        assert_all_serve(made)
        node.apply(files[0])
        assert len(node.check_state().unclaimed) == 4
        found = node.recover(drop_unclaimed=True)
        assert found.unclaimed == ()
        assert node.check_state().healthy
    assert (answers(made), answers(made, 11)) == ({"default/a"}, {"default/b"})
    with pytest.raises(lab.ProbeFailed):
        answers(made, 12)


def test_deleting_what_was_claimed_leaves_the_rest(made: Lab, files: list[Path]) -> None:
    remove(settled(made))
    with opened(made) as node:
        node.recover()
        node.apply(files[0])
        node.delete(["VirtualService/default/s"])
        with pytest.raises(lab.ProbeFailed):
            answers(made)
        assert (answers(made, 11), answers(made, 12)) == ({"default/b"}, {"default/a"})
        assert node.attachments()


def test_a_service_that_claims_an_address_of_another_name(
    made: Lab, files: list[Path], tmp_path: Path
) -> None:
    remove(settled(made))
    other = tmp_path / "other.yaml"
    other.write_text(service("renamed", "b", 10))
    with opened(made) as node:
        node.apply(made.resources(), owner="lab")
        node.apply(other)
        assert (answers(made), answers(made, 12)) == ({"default/b"}, {"default/a"})
        node.apply(files[1:])
        assert node.check_state().healthy


def test_what_can_be_trusted_is_taken_over(made: Lab, files: list[Path]) -> None:
    another_letter(settled(made))
    with opened(made) as node:
        found = node.recover()
        assert found.unreadable == ("VirtualService/default/t",)
        assert {"VirtualService/default/s", "VirtualService/default/u", "Pod/default/a"} <= set(
            found.restored
        )
        assert {one for service in found.unclaimed for one in service.frontends} == {
            "192.0.2.11:80/TCP",
            "192.0.2.11:53/UDP",
            "[2001:db8:2::11]:80/TCP",
            "[2001:db8:2::11]:53/UDP",
        }
        assert node.source_of("VirtualService/default/s") == str(files[0])
        assert node.source_of("Pod/default/a") == "lab"
        assert_all_serve(made)
        assert node.check_state().lost
        node.apply(files[1])
        assert node.check_state().healthy


def test_maps_keep_their_sizes_where_the_configuration_was_lost(
    made: Lab, files: list[Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "apiVersion: hookline.dev/v1alpha1\nkind: NodeConfig\nmetadata: {name: node-1}\n"
        "spec: {maps: {services: 500, backends: 600, connections: 5000, maglevPages: 700}}\n"
    )
    with opened(made) as node:
        node.apply(config)
    remove(settled(made))
    with opened(made) as node:
        node.recover()
        node.apply(files[0])
        assert_all_serve(made)
        node.apply([*files, config])
        assert node.check_state().healthy
        assert_all_serve(made)
        with bpf.Map.from_pin(node.name.pins / "maps" / "services") as services:
            assert services.max_entries == 500
        node.delete(["NodeConfig/node-1"])


def test_random_bytes_flipped(made: Lab, files: list[Path]) -> None:
    """Wherever it is: either it is found, or it was in nothing that is read; and whatever is wanted then was written so."""
    chance = random.Random(4)
    path = settled(made)
    whole = path.read_bytes()
    with opened(made) as node:
        wanted = {one.reference: one.to_document() for one in node.resources()}
    found = 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 8])):
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            with State(path.parent) as state:
                state.check()
                stored = state.resources()
            assert {name: item.resource.to_document() for name, item in stored.items()} == wanted
        except StateError:
            found += 1
    assert found > 10
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(whole)


BEGINNING = """
import os, signal, sys
from hookline import api
from hookline.control.state import State
State.mark_lost = lambda self, why: os.kill(os.getpid(), signal.SIGKILL)
with api.Node(sys.argv[1]) as node:
    node.apply(sys.argv[2])
"""


def test_killed_between_the_new_file_and_its_mark(made: Lab, files: list[Path]) -> None:
    """The next process still knows that the state is gone, and leaves alone what nobody claims."""
    remove(settled(made))
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING, f"lab/{made.name}/node-1", files[0]],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with opened(made) as node:
        assert node.apply(files[0]).plan.warnings
        assert node.check_state().lost
        assert_all_serve(made)
        node.apply(made.resources(), owner="lab")
        node.apply(files)
        assert node.check_state().healthy


def test_killed_in_the_middle_of_an_apply_and_then_damaged(
    made: Lab, files: list[Path], tmp_path: Path
) -> None:
    """The kernel is ahead of the file, and then the file is gone, too."""
    path = tmp_path / "v.yaml"
    path.write_text(service("v", "b", 13))
    done = subprocess.run(
        [sys.executable, "-c", DYING, f"lab/{made.name}/node-1", path],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with opened(made) as node:
        assert node.check_state().lost == "", (
            "a kernel that is ahead is no loss: the next change brings both together"
        )
    zero(settled(made))
    with opened(made) as node:
        found = node.recover()
        assert any("192.0.2.13:80/TCP" in one.frontends for one in found.unclaimed)
        assert_all_serve(made)
        node.apply([*files, path])
        assert node.check_state().healthy
        assert answers(made, 13) == {"default/b"}


def test_history_that_is_damaged_is_said(made: Lab, files: list[Path]) -> None:
    with opened(made) as node:
        node.apply(document("Namespace", "extra"))
    path = settled(made)
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE generation_changes SET document_after = replace(document_after, 'extra', 'extrA') "
        "WHERE reference = 'Namespace/extra'"
    )
    connection.commit()
    connection.close()
    with opened(made) as node:
        assert "Namespace/extra is not what was written" in node.check_state().damage
        node.recover()
        assert node.check_state().healthy
        assert node.generations() == []
        assert_all_serve(made)


def test_what_is_in_order_is_left_alone(made: Lab, files: list[Path]) -> None:
    with opened(made) as node:
        before = node.generations()
        assert node.recover().as_dict() == {
            "healthy": True,
            "damage": "",
            "lost": "",
            "kept_at": None,
            "restored": [],
            "unreadable": [],
            "unclaimed": [],
        }
        assert node.generations() == before


@pytest.mark.parametrize("page", [1 << 20, (1 << 32) - 1])
def test_a_row_that_points_beyond_the_tables(made: Lab, files: list[Path], page: int) -> None:
    """Written by somebody else while no process of ours ran: the next one reads all it can, and builds the table anew."""
    with bpf.Map.from_pin(opened(made).name.pins / "maps" / "services") as services:
        for key, value in services.items():
            if value["table_size"]:
                value["table_page"] = page
                services[key] = value
    with opened(made) as node:
        assert {one.slots for status in node.services() for one in status.backends} == {0}
    with opened(made) as node:
        repaired = node.repair()
        assert {one.kind for one in repaired.repairs} == {"table"}, repaired
        assert len(repaired.repairs) == len(set(repaired.repairs)) >= 6
        assert all(one.slots for status in node.services() for one in status.backends)
        assert not node.repair().repairs
    assert_all_serve(made)


def test_the_command_line(made: Lab, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([*words, "--node", f"lab/{made.name}"])
        return (status, *capsys.readouterr())

    status, out, _ = command("state", "check")
    assert (status, "is whole" in out) == (0, True)
    garbage(settled(made))
    status, _, err = command("apply", "-f", str(files[0]))
    assert status == 1
    assert "hookline state repair" in err
    status, out, _ = command("state", "check", "--json")
    found: dict[str, Any] = json.loads(out)
    assert (status, found["healthy"], len(found["unclaimed"])) == (1, False, 12)
    status, out, _ = command("state", "repair")
    assert status == 0
    assert "served and wanted by no object: 192.0.2.10:53/UDP (1 backend)" in out
    assert_all_serve(made)
    for path in files:
        assert command("apply", "-f", str(path))[0] == 0
    assert command("state", "check")[0] == 0
    assert_all_serve(made)


def test_the_agent_repairs_it_when_it_starts(made: Lab, files: list[Path], tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "s.yaml").write_text(files[0].read_text())
    garbage(settled(made))
    agent = AgentProcess(made, watched, tmp_path / "log")
    try:
        agent.start()
        assert_all_serve(made)
        (said,) = agent.said("the wanted state was lost, or a part of it; what the kernel serves goes on")
        assert "damaged" in said["why"]
        assert said["kept_at"].endswith(DAMAGED_FILE)
        assert len(said["unclaimed"]) == 12
        assert cli.run(["state", "repair", "--node", f"lab/{made.name}"]) == 1, "not from under the agent"
        assert agent.run("apply", "-f", files[1]) == 0
        assert agent.run("apply", "-f", files[2]) == 0
        assert_all_serve(made)
        with opened(made) as node:
            assert node.check_state().healthy
    finally:
        agent.kill()


def test_the_lab_knows_its_resources(made: Lab) -> None:
    assert {one.reference for one in _read_resources(made.name)} == {
        one.reference for one in made.resources()
    }


def links_of(made: Lab) -> dict[str, int]:
    found = {}
    for path in (opened(made).name.pins / "links").glob("*"):
        with bpf.Link.from_pin(path) as link:
            found[path.name] = link.info.id
    return found
