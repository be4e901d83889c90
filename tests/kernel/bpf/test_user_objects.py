"""Objects that a command loads and leaves: several commands at once, killed ones, other namespaces, output that fails."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import bpf
from hookline.control import Conflict, user_objects
from tests.kernel.bpf.conftest import Wire, inside

HOOKLINE = [sys.executable, "-m", "hookline"]
PLACES = ["xdp_pass=xdp:near", "tc_mark=clsact:near:egress", "on_exception=raw_tracepoint:xdp_exception"]


@pytest.fixture
def own(unique_name: Callable[[], str]) -> Iterator[str]:
    """A name for an object, which is unloaded in the end."""
    name = unique_name()
    yield name
    for one in list(user_objects.listed()):
        if one.name.startswith(name):
            user_objects.unload(one.name)


def attached(places: list[str]) -> list[str]:
    return [word for place in places for word in ("--attach", place)]


def hookline(*words: object, before: tuple[str, ...] = (), status: int = 0) -> str:
    """Runs a command in a process of its own; what it prints, or its errors where it fails."""
    done = subprocess.run(
        [*before, *HOOKLINE, "programs", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


class Begun:
    """A process of its own that waits to be told, and then does something.

    It is forked, for all that has to be imported is there then: what is done at once is done at once.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        reading, self._writing = os.pipe()
        self.process = os.fork()
        if not self.process:
            status = 1
            try:
                os.close(self._writing)
                os.read(reading, 1)
                work()
                status = 0
            except Conflict as error:
                status = 2 if "is loaded already" in str(error) else 1
            finally:
                os._exit(status)
        os.close(reading)

    def go(self) -> None:
        os.close(self._writing)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> int:
        """The exit status: 0, or 2 where the object was loaded already; negative where it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def pins_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def on_near() -> list[str]:
    return sorted(one.hook for one in bpf.placements() if one.target == "near" and not one.namespace)


# Several at once


def test_of_loads_at_once_one_wins(kinds: Path, wire: Wire, own: str) -> None:
    def load() -> user_objects.UserObject:
        return user_objects.load(kinds, PLACES[1:], name=own)

    whole = pins_of(load().folder)
    user_objects.unload(own)
    for _ in range(6):
        processes = [Begun(load) for _ in range(3)]
        for process in processes:
            process.go()
        assert sorted(process.end() for process in processes) == [0, 2, 2]
        assert pins_of(user_objects.FOLDER / own) == whole
        assert on_near() == ["clsact"]
        user_objects.unload(own)
    assert on_near() == []


def test_loads_and_unloads_of_several_names_do_not_disturb_each_other(kinds: Path, own: str) -> None:
    """The folder that all are in goes with the last of them, and comes again, all the time."""
    failures: list[BaseException] = []

    def repeat(name: str) -> None:
        try:
            for _ in range(25):
                user_objects.load(kinds, programs=["add"], name=name)
                user_objects.unload(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(f"{own}-{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Killed


def kill_somewhen(work: Callable[[], object], half: Path, after: float) -> None:
    """Begin something, and kill it a while after the half object is there that it makes, or takes apart."""
    process = Begun(work)
    process.go()
    deadline = time.monotonic() + 30
    while not half.exists() and time.monotonic() < deadline:
        pass
    time.sleep(after)
    process.kill()
    process.end()


def test_loads_killed_at_random_moments_leave_nothing_that_matters(kinds: Path, wire: Wire, own: str) -> None:
    def load() -> user_objects.UserObject:
        return user_objects.load(kinds, PLACES, name=own)

    half, folder = user_objects.FOLDER / f"~{own}", user_objects.FOLDER / own
    whole = pins_of(load().folder)
    user_objects.unload(own)
    halves, chance = 0, random.Random(own)
    for number in range(20):
        kill_somewhen(load, half, 0 if number < 3 else chance.uniform(0, 0.2))
        assert not (half.exists() and folder.exists())
        if half.exists():
            halves += 1
            assert (own, False) in [(one.name, one.complete) for one in user_objects.listed()]
            if number % 2:
                user_objects.unload(own)
                assert on_near() == []
        if folder.exists():
            with pytest.raises(Conflict, match="is loaded already"):
                load()
        else:
            load()
        assert pins_of(folder) == whole
        assert not half.exists()
        assert on_near() == ["clsact", "xdp"]
        user_objects.unload(own)
        assert on_near() == []
        assert not folder.exists()
    assert halves


def test_unloads_killed_at_random_moments_are_ended_by_the_next(kinds: Path, wire: Wire, own: str) -> None:
    half, folder = user_objects.FOLDER / f"~{own}", user_objects.FOLDER / own
    halves, chance = 0, random.Random(own)
    for number in range(12):
        user_objects.load(kinds, PLACES, name=own)
        kill_somewhen(lambda: user_objects.unload(own), half, 0 if number < 3 else chance.uniform(0, 0.1))
        assert not (half.exists() and folder.exists())
        halves += half.exists()
        if half.exists() and number % 2:
            user_objects.load(kinds, PLACES, name=own)
            assert on_near() == ["clsact", "xdp"]
        if half.exists() or folder.exists():
            user_objects.unload(own)
        assert on_near() == []
        assert not half.exists()
    assert halves


def test_what_a_killed_load_left_is_named(kinds: Path, own: str) -> None:
    half = user_objects.FOLDER / f"~{own}"
    kill_somewhen(lambda: user_objects.load(kinds, PLACES[2:], name=own), half, 0)
    if not half.exists():
        pytest.fail("it was killed too late")
    listed = subprocess.run(
        [*HOOKLINE, "programs", "list", "--mine"], capture_output=True, text=True, check=True
    )
    assert f"hookline programs unload {own}" in listed.stderr
    assert own in hookline("unload", f"{own}-absent", status=1)
    assert hookline("unload", own) == f"{own} is unloaded\n"


# Filters in network namespaces


@pytest.fixture
def second(wire: Wire, unique_name: Callable[[], str]) -> Iterator[Path]:
    """Another namespace, whose interface is called ``near`` too."""
    name = unique_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(
            ["ip", "-n", name, "link", "add", "near", "type", "veth", "peer", "name", "far"], check=True
        )
        yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_filter_is_removed_in_its_own_namespace(kinds: Path, wire: Wire, second: Path, own: str) -> None:
    words = (kinds, "--attach", "tc_mark=clsact:near:egress")
    with inside(second):
        hookline("load", *words, "--name", f"{own}-a")
        assert on_near() == ["clsact"]
    hookline("load", *words, "--name", f"{own}-b")
    with inside(second):
        hookline("unload", f"{own}-b")
        assert on_near() == ["clsact"]
    assert on_near() == []
    hookline("unload", f"{own}-a")
    with inside(second):
        assert on_near() == []
        assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "near")


def test_a_filter_is_removed_from_an_interface_of_another_name(kinds: Path, wire: Wire, own: str) -> None:
    hookline("load", kinds, "--name", own, "--attach", "tc_mark=clsact:near:egress")
    wire.run("ip", "link", "set", "near", "down")
    wire.run("ip", "link", "set", "near", "name", "nearer")
    hookline("unload", own)
    assert "clsact" not in wire.run("tc", "qdisc", "show", "dev", "nearer")


def test_a_filter_whose_namespace_went_is_no_obstacle(
    kinds: Path, unique_name: Callable[[], str], own: str
) -> None:
    name = unique_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with inside(Path("/run/netns") / name):
            hookline("load", kinds, "--name", own, "--attach", "tc_mark=clsact:lo:egress")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
    hookline("unload", own)
    assert not (user_objects.FOLDER / own).exists()


def test_a_filter_in_a_namespace_that_cannot_be_found_stays_known(
    kinds: Path, unique_name: Callable[[], str], own: str
) -> None:
    """The namespace has lost its name and has no process; only a descriptor holds it."""
    name = unique_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    path = Path("/run/netns") / name
    with open(path) as held:
        try:
            with inside(path):
                hookline("load", kinds, "--name", own, "--attach", "tc_mark=clsact:lo:egress")
        finally:
            subprocess.run(["ip", "netns", "del", name], check=True)
        hidden = Path(f"/proc/{os.getpid()}/fd/{held.fileno()}")
        for _ in range(2):
            said = hookline("unload", own, status=1)
            assert "the filter on lo's egress cannot be removed" in said
            assert f"net:[{os.fstat(held.fileno()).st_ino}]" in said
            assert f"nsenter --net=FILE hookline programs unload {own}" in said
        (left,) = pins_of(user_objects.FOLDER / f"~{own}")
        assert left.startswith("links/clsact:lo:egress:tc_mark:")
        with inside(hidden):
            assert [one.hook for one in bpf.placements() if (one.target, one.namespace) == ("lo", "")] == [
                "clsact"
            ]
            hookline("unload", own)
            assert [one for one in bpf.placements() if (one.target, one.namespace) == ("lo", "")] == []
    assert not (user_objects.FOLDER / f"~{own}").exists()


# Mounts of a command's own


def test_nothing_is_kept_where_it_would_go_with_the_command(kinds: Path, wire: Wire, own: str) -> None:
    words = ("load", kinds, "--name", own, "--attach", "xdp_pass=xdp:near")
    said = hookline(*words, before=("ip", "netns", "exec", wire.namespace.name), status=1)
    assert "would not stay" in said
    assert "nsenter --net=/run/netns/NAME" in said
    # Where the BPF file system is everybody's, mounts of its own do not matter.
    assert "is loaded" in hookline(*words, before=("unshare", "--mount"))
    assert on_near() == ["xdp"]
    hookline("unload", own, before=("unshare", "--mount"))
    own_mount = ("unshare", "--mount", "sh", "-c", 'mount -t bpf bpf /sys/fs/bpf && "$@"', "sh")
    assert "would not stay" in hookline(*words, before=own_mount, status=1)
    assert on_near() == []


# Output, names and folders


def test_what_cannot_be_told_is_undone(kinds: Path, wire: Wire, own: str) -> None:
    command = [*HOOKLINE, "programs", "load", str(kinds), "--name", own, "--attach", "xdp_pass=xdp:near"]
    for more in ([], ["--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*command, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 1
        assert f"{own} was unloaded again" in done.stderr
        assert "No space left on device" in done.stderr
        assert not (user_objects.FOLDER / own).exists()
        assert on_near() == []
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    assert not (user_objects.FOLDER / own).exists()


def test_names_that_look_like_options_are_refused(kinds: Path, tmp_path: Path, own: str) -> None:
    assert "cannot be an object's name" in hookline("load", kinds, "--name", f"-{own}", status=2)
    file = tmp_path / f"-{own}.bpf.o"
    file.write_bytes(kinds.read_bytes())
    assert hookline("load", file, "--program", "add").startswith(f"_{own} is loaded")
    hookline("unload", f"_{own}")


def test_folders_that_a_load_makes_go_with_the_last_object(kinds: Path, pins: Path) -> None:
    pins.mkdir()
    words = ("load", kinds, "--program", "add", "--pin")
    for name in ("a", "b"):
        hookline(*words, pins / "made" / "deep" / name)
    hookline("unload", pins / "made" / "deep" / "a")
    assert (pins / "made" / "deep" / "b" / "programs" / "add").exists()
    hookline("unload", pins / "made" / "deep" / "b")
    assert list(pins.iterdir()) == []
    hookline("load", kinds, "--pin", pins / "made" / "x", "--attach", "xdp_pass=xdp:absent", status=1)
    assert list(pins.iterdir()) == []


def test_an_empty_folder_is_free_and_a_full_one_is_not(kinds: Path, pins: Path) -> None:
    pins.mkdir()
    words = ("load", kinds, "--program", "add", "--pin", pins)
    hookline(*words)
    assert "is loaded already" in hookline(*words, status=1)
    hookline("unload", pins)
    (pins / "other").mkdir(parents=True)
    assert "something else is there" in hookline(*words, status=1)
    assert "holds no object" in hookline("unload", pins, status=1)
    assert (pins / "other").is_dir()
    assert "half loaded" in hookline("load", kinds, "--pin", pins / "~x", status=1)
