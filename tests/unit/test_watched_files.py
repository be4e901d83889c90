"""Which files the agent reads, when, and what it takes for gone: real folders, files and messages."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline.agent import _files
from hookline.agent._files import Files, Watcher
from hookline.errors import HooklineError
from hookline.sources import files as loader

SETTLED_S = 0.2
DOCUMENT = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: {}}}
spec: {{addresses: [192.0.2.1], ports: [{{name: http, port: 80}}], backends: [{{address: 192.0.2.9}}]}}
"""


class Plan:
    def __init__(self) -> None:
        self.resources: list[Any] = []
        self.changes: list[Any] = []
        self.warnings: list[str] = []


class Applied:
    plan = Plan()


class Recorder:
    """Takes the place of a node, and notes what it is told: what is wanted is all that these tests ask about."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        self.refuses: Callable[[list[Any]], bool] = lambda resources: False

    def watched_folders(self) -> dict[str, str]:
        used = {os.path.dirname(source) for source in self.sources.values()}
        return {folder: where for folder, where in self.folders.items() if folder in used}

    def note_watched_folders(self, folders: dict[str, str]) -> None:
        self.folders |= folders

    def apply(self, resources: list[Any], *, prune: Any) -> Applied:
        if self.refuses(resources):
            raise HooklineError("refused by a test")
        self.sources = {name: source for name, source in self.sources.items() if source not in prune}
        self.sources |= {one.metadata.name: one.origin.path for one in resources}
        return Applied()

    @property
    def names(self) -> set[str]:
        return set(self.sources)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "config"
    made.mkdir()
    (made / "a.yaml").write_text(text("one", "two"))
    (made / "b.yaml").write_text(text("three"))
    return made


@pytest.fixture
def files(folder: Path) -> Files:
    return Files([str(folder)], SETTLED_S)


@pytest.fixture
def node(files: Files) -> Recorder:
    made = Recorder()
    files.bring(made)  # type: ignore[arg-type]
    assert made.names == {"one", "two", "three"}
    return made


@pytest.fixture
def watcher(files: Files) -> Iterator[Watcher]:
    made = Watcher(files)
    yield made
    made.close()


def text(*names: str) -> str:
    return "---\n".join(DOCUMENT.format(name) for name in names)


def look(files: Files, node: Recorder) -> None:
    """What the agent does from time to time."""
    if changed := files.changed():
        files.bring(node, changed)  # type: ignore[arg-type]


def looks(files: Files, node: Recorder, seconds: float = 4 * SETTLED_S) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        look(files, node)
        time.sleep(0.02)


def told(files: Files, node: Recorder, watcher: Watcher) -> None:
    """What the agent does when there are messages."""
    found = watcher.read()
    if found:
        files.bring(node, found)  # type: ignore[arg-type]


def test_a_file_that_is_open_for_writing_is_not_read(files: Files, node: Recorder, folder: Path) -> None:
    with (folder / "a.yaml").open("w") as half:
        half.write(text("one"))
        half.flush()
        looks(files, node)
        assert node.names == {"one", "two", "three"}, "half of it was read"
        assert files.known[str(folder / "a.yaml")].waiting
        assert not files.problems()
        half.write("---\n" + text("four"))
    looks(files, node)
    assert node.names == {"one", "four", "three"}
    assert not files.known[str(folder / "a.yaml")].waiting


def test_a_look_reads_what_is_the_same_twice_where_nothing_tells_of_writers(
    files: Files, node: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without leases."""
    monkeypatch.setattr(_files, "_is_written", lambda path: False)
    with (folder / "a.yaml").open("w") as half:
        half.write(text("one"))
        half.flush()
        look(files, node)
        assert files.unsettled, "it is looked at once more, soon"
        for name in ("four", "five"):
            time.sleep(1.5 * SETTLED_S)
            half.write("---\n" + text(name))
            half.flush()
            look(files, node)
            assert node.names == {"one", "two", "three"}
    looks(files, node)
    assert node.names == {"one", "four", "five", "three"}


def test_what_changes_while_it_is_read_is_read_again(
    files: Files, node: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "a.yaml"
    read = loader.read

    def slowly(name: str, **options: Any) -> Any:
        found = read(name, **options)
        path.write_text(text("one", "two", "four"))
        return found

    path.write_text(text("one"))
    with monkeypatch.context() as patch:
        patch.setattr(loader, "read", slowly)
        files.bring(node, {str(path)})  # type: ignore[arg-type]
    assert node.names == {"one", "two", "three"}
    looks(files, node)
    assert node.names == {"one", "two", "four", "three"}


@pytest.mark.parametrize("away", [lambda path: path.unlink(), lambda path: path.rename(f"{path}~")])
def test_a_file_that_is_made_anew_is_read_when_it_was_closed(
    files: Files,
    node: Recorder,
    folder: Path,
    watcher: Watcher,
    away: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an editor saves: the old one is taken away, a new one is written under the name."""
    monkeypatch.setattr(_files, "_is_written", lambda path: False)
    path = folder / "a.yaml"
    away(path)
    with path.open("w") as fresh:
        fresh.write(text("one"))
        fresh.flush()
        told(files, node, watcher)
        assert node.names == {"one", "two", "three"}
        fresh.write("---\n" + text("two", "four"))
    told(files, node, watcher)
    assert node.names == {"one", "two", "four", "three"}
    path.unlink()
    told(files, node, watcher)
    assert node.names == {"three"}, "gone is gone"


def test_a_file_that_is_made_anew_and_of_whose_end_no_message_tells(
    files: Files, node: Recorder, folder: Path, watcher: Watcher
) -> None:
    path = folder / "a.yaml"
    path.unlink()
    with path.open("w") as fresh:
        told(files, node, watcher)
        fresh.write(text("four"))
    watcher.read()  # and forgotten
    looks(files, node)
    assert node.names == {"four", "three"}


def loop(path: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def too_long(path: Path) -> None:
    path.symlink_to("x" * 300)


@pytest.mark.parametrize("instead", [loop, pipe, unix_socket, too_long])
def test_what_cannot_be_looked_at_is_not_gone(
    files: Files, node: Recorder, folder: Path, instead: Callable[[Path], None]
) -> None:
    path = folder / "a.yaml"
    path.unlink()
    instead(path)
    looks(files, node)
    assert node.names == {"one", "two", "three"}
    assert set(files.problems()) == {str(path)}
    again = Files([str(folder)], SETTLED_S)
    again.bring(node)  # type: ignore[arg-type]
    assert node.names == {"one", "two", "three"}, "a new agent takes it for gone"
    path.unlink()
    path.write_text(text("one"))
    looks(files, node)
    assert node.names == {"one", "three"}
    assert not files.problems()
    path.unlink()
    looks(files, node)
    assert node.names == {"three"}


@pytest.mark.parametrize("how", ["removed", "renamed", "a file in its place"])
def test_a_folder_that_is_gone_takes_nothing_with_it(
    files: Files, node: Recorder, folder: Path, watcher: Watcher, how: str
) -> None:
    if how == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(folder.parent / "elsewhere")
    if how.startswith("a file"):
        folder.write_text("")
    told(files, node, watcher)
    looks(files, node)
    assert node.names == {"one", "two", "three"}
    assert set(files.lost) == {str(folder)}
    again = Files([f"{folder}/"], SETTLED_S)
    again.bring(node)  # type: ignore[arg-type]
    assert node.names == {"one", "two", "three"}
    if how.startswith("a file"):
        folder.unlink()
    folder.mkdir()
    (folder / "b.yaml").write_text(text("three", "four"))
    watcher.rewatch()
    looks(files, node)
    assert not files.lost
    assert node.names == {"three", "four"}


def test_a_folder_that_is_another_one_now_is_watched(folder: Path) -> None:
    """Its parent was renamed, of which no message tells."""
    (folder / "inner").mkdir()
    seen = Watcher(Files([str(folder / "inner")]))
    try:
        folder.rename(folder.parent / "elsewhere")
        (folder / "inner").mkdir(parents=True)
        assert seen.rewatch()
        (folder / "inner" / "a.yaml").write_text("")
        assert seen.read() == {str(folder / "inner" / "a.yaml")}
    finally:
        seen.close()


def test_a_single_file_whose_folder_is_gone_stays(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "a.yaml"
    path.parent.mkdir()
    path.write_text(text("one"))
    files, node = Files([str(path)], SETTLED_S), Recorder()
    files.bring(node)  # type: ignore[arg-type]
    shutil.rmtree(path.parent)
    looks(files, node)
    assert node.names == {"one"}
    path.parent.mkdir()
    looks(files, node)
    assert node.names == set(), "its folder is there, and it is not"


def test_a_file_that_goes_while_it_is_looked_at_is_gone(
    files: Files,
    node: Recorder,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = folder / "a.yaml"
    is_written = _files._is_written

    def too_late(name: str) -> bool:
        path.unlink()
        return is_written(name)

    monkeypatch.setattr(_files, "_is_written", too_late)
    files.bring(node, {str(path)})  # type: ignore[arg-type]
    assert node.names == {"three"}
    assert not files.problems()
    assert "file refused" not in caplog.text


@pytest.mark.parametrize("local", [True, False])
def test_a_refused_lease_is_a_writer_on_local_file_systems_only(
    files: Files, node: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """As on NFS, which refuses leases for want of a delegation: the folder's own file system is taken for another kind."""
    if not local:
        monkeypatch.setattr(_files, "_LOCAL", {})
    with (folder / "a.yaml").open("w") as half:
        half.write(text("one", "four"))
        half.flush()
        looks(files, node)
        assert node.names == ({"one", "two", "three"} if local else {"one", "four", "three"})


def test_a_file_that_nobody_closes_is_said_and_then_read(folder: Path) -> None:
    files, node = Files([str(folder)], SETTLED_S, written_s=4 * SETTLED_S), Recorder()
    files.bring(node)  # type: ignore[arg-type]
    path = folder / "a.yaml"
    with path.open("w") as never:
        for number in range(1000):
            never.write(f"# {number}\n")
            never.flush()
            look(files, node)
            files.bring(node, {str(path)})  # type: ignore[arg-type]
            if files.problems():
                break
            time.sleep(0.02)
        assert "open for writing" in files.problems()[str(path)].what
        assert node.names == {"one", "two", "three"}, "it changes from look to look"
        never.write(text("four"))
        never.flush()
        looks(files, node)
        assert node.names == {"four", "three"}
        assert not files.problems()
        assert not files.known[str(path)].waiting


def test_a_writer_that_is_done_is_noticed_without_a_look(files: Files, node: Recorder, folder: Path) -> None:
    path = folder / "a.yaml"
    with path.open("w") as half:
        half.write(text("four"))
        half.flush()
        files.bring(node, {str(path)})  # type: ignore[arg-type]
        first = files.next_try_s()
        assert first is not None
        assert first <= 0.01
        time.sleep(first)
        assert files.due() == {str(path)}
        files.bring(node, files.due())  # type: ignore[arg-type]
        assert files.known[str(path)].delay_s == 0.02
    time.sleep(files.next_try_s() or 0)
    files.bring(node, files.due())  # type: ignore[arg-type]
    assert node.names == {"four", "three"}
    assert files.next_try_s() is None


@pytest.mark.parametrize("left", ["one is refused", "none is left"])
def test_what_went_while_no_agent_was_there_is_removed_in_the_end(
    files: Files, node: Recorder, folder: Path, left: str
) -> None:
    """Though another file is refused, and removing fails at first."""
    (folder / "a.yaml").unlink()
    if left == "none is left":
        (folder / "b.yaml").unlink()
    else:
        (folder / "c.yaml").write_text(text("poison"))
    again = Files([str(folder)], SETTLED_S)
    node.refuses = lambda resources: not resources or any(r.metadata.name == "poison" for r in resources)
    again.bring(node)  # type: ignore[arg-type]
    assert node.names == {"one", "two", "three"}
    assert again.is_due
    assert again.stale is not None, "it is said"
    node.refuses = lambda resources: any(r.metadata.name == "poison" for r in resources)
    again.bring(node, set())  # type: ignore[arg-type]
    assert node.names == (set() if left == "none is left" else {"three"})
    assert again.stale is None
    assert not again.is_due


def test_a_start_over_a_folder_that_is_not_mounted_removes_nothing(
    files: Files, node: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_file_system", lambda folder: "another")
        for name in ("a.yaml", "b.yaml"):
            (folder / name).rename(folder / f"{name}.elsewhere")
        again = Files([str(folder)], SETTLED_S)
        again.bring(node)  # type: ignore[arg-type]
        looks(again, node)
        assert node.names == {"one", "two", "three"}
        assert set(again.lost) == {str(folder)}
        (folder / "d.yaml").write_text(text("four"))
        looks(again, node)
        again.bring(node, set())  # type: ignore[arg-type]
        assert node.names == {"four"}, "files are there: this is the folder now"
        assert not again.lost
    last = Files([str(folder)], SETTLED_S)
    (folder / "d.yaml").unlink()
    last.bring(node)  # type: ignore[arg-type]
    assert node.names == {"four"}, "it is gone with the other file system"


def test_a_start_whose_look_into_the_folder_fails_removes_nothing(
    files: Files, node: Recorder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the looks it is that fails."""
    listdir = os.listdir
    for number in range(4):
        looked: list[str] = []

        def failing(path: str, number: int = number, looked: list[str] = looked) -> list[str]:
            looked.append(path)
            if len(looked) == number + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return listdir(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", failing)
            again = Files([str(folder)], SETTLED_S)
            again.bring(node)  # type: ignore[arg-type]
        assert node.names == {"one", "two", "three"}, number
        looks(again, node)
        assert node.names == {"one", "two", "three"}
        assert not again.lost
