"""Arenas: memory with pointers that mean the same to programs and to every process."""

from __future__ import annotations

import mmap
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hookline import bpf


@pytest.fixture
def arena(compiled: Callable[..., Path]) -> Iterator[bpf.Object]:
    with bpf.Object.open(compiled("arena")) as obj:
        try:
            obj.load()
        except bpf.BpfError:
            if tuple(map(int, platform.release().split(".")[:2])) >= (6, 9):
                raise
            pytest.skip("this kernel has no arenas (Linux 6.9)")
        yield obj


@pytest.mark.feature("map", "arena")
def test_an_arena_is_memory_with_pointers(arena: bpf.Object) -> None:
    shared, globals_ = arena.maps["shared"], arena.maps[".bss"].view()
    assert arena.programs["build"].test_run(context=bytes(8)).verdict == 0
    memory = shared.view()
    assert memory.shape == (16 * mmap.PAGESIZE,)
    nodes = shared.view([("next", "u8"), ("number", "u8")])
    base = memory.ctypes.data
    place, seen = int(globals_["head"][0]), []
    while place:
        node = nodes[(place - base) // 16]
        seen.append(int(node["number"]))
        place = int(node["next"])
    assert seen == list(range(99, -1, -1))
    nodes["number"][:100] *= 2
    arena.programs["add_up"].test_run(context=bytes(8))
    assert globals_["sum"][0] == 2 * sum(range(100))
    # What Python touches first is allocated by that, and not given to the program any more.
    memory[5 * mmap.PAGESIZE] = 1
    arena.programs["take_all"].test_run(context=bytes(8))
    assert globals_["allocated"][0] == 14
    assert shared.view().ctypes.data == base
    assert shared.used is None


ARENA_READER = """
import sys
from hookline import bpf
with bpf.Map.from_pin(sys.argv[1]) as shared:
    view = shared.view("u8")
    print(view.ctypes.data, view[int(sys.argv[2])])
    view[0] = 77
"""


@pytest.mark.feature("map", "arena")
def test_an_arena_is_at_the_same_place_everywhere(arena: bpf.Object, pins: Path) -> None:
    shared = arena.maps["shared"]
    shared.pin(pins / "shared")
    view = shared.view("u8")
    view[1000] = 123456789
    command = [sys.executable, "-c", ARENA_READER, str(pins / "shared"), "1000"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert answer == [str(view.ctypes.data), "123456789"]
    assert view[0] == 77
    arena.close()
    view[1] = 1  # mapped as long as the array lives
    place = view.ctypes.data
    del view
    assert f"{place:x}-" not in Path("/proc/self/maps").read_text()


@pytest.mark.feature("map", "arena")
def test_an_arena_without_an_object() -> None:
    try:
        shared = bpf.Map.create("arena", max_entries=4, name="shared")
    except bpf.FeatureMissing as missing:
        pytest.skip(str(missing))
    with shared:
        assert shared.view(("u4", (3,))).shape == (4 * mmap.PAGESIZE // 12, 3)
        for wrong in ("V0", "O"):
            with pytest.raises(bpf.BpfError, match="the memory of arena"):
                shared.view(wrong)
        view = shared.view("u4")
        view[:] = np.arange(len(view))
        with bpf.Map.from_id(shared.id) as again:
            assert again.definition.extra == view.ctypes.data
            assert again.view("u4")[4095] == 4095


def test_a_killed_process_keeps_no_arena(tmp_path: Path) -> None:
    """kill -9 with an arena mapped: nothing to clean up, the kernel takes all back."""
    script = (
        "import sys, time\nfrom hookline import bpf\n"
        "try:\n    m = bpf.Map.create('arena', max_entries=4)\n"
        "except bpf.FeatureMissing:\n    print('none', flush=True)\n    sys.exit()\n"
        "v = m.view()\nv[0] = 1\nprint(m.id, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        answer = process.stdout.readline().strip()
        if answer == "none":
            pytest.skip("this kernel has no arenas (Linux 6.9)")
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and int(answer) in {found.id for found in bpf.maps()}:
        time.sleep(0.01)
    assert int(answer) not in {found.id for found in bpf.maps()}
