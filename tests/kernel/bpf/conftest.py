"""Objects compiled for these tests, a pair of interfaces in a namespace of its own, and a folder for pins."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf
from tests.kernel.bpf.hooks import Hooked, open_hooks
from tests.requirements import missing_for, missing_program, need

PROGRAMS = Path(__file__).with_name("programs")
OBJECTS = Path(__file__).resolve().parents[3] / "build" / "test-objects"
_CLONE_NEWNET = 0x40000000


@pytest.fixture(autouse=True)
def _machine() -> None:
    need("kernel", missing_for("kernel"))


@pytest.fixture(scope="session")
def clang() -> str:
    names = ("clang", *(f"clang-{version}" for version in range(21, 13, -1)))
    found = next((name for name in ("clang-19", *names) if shutil.which(name)), None)
    need("kernel", "" if found else "clang 14 or newer (apt-get install clang-19)")
    need("kernel", "" if Path("/usr/include/bpf/bpf_helpers.h").exists() else "libbpf-dev")
    assert found
    return found


@pytest.fixture(scope="session")
def compiled(clang: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a program of ``programs/``, or C text, with extra flags; once for each.

    Objects are kept in ``build/``: a virtual machine, which takes long to compile, tests the very ones that were tested here.
    """
    folder = tmp_path_factory.mktemp("objects")
    done: dict[tuple[str, ...], Path] = {}

    def compile_one(source: str, *flags: str) -> Path:
        key = (source, *flags)
        if key not in done:
            path = PROGRAMS / f"{source}.bpf.c"
            if "\n" in source:
                path = folder / f"text{len(done)}.bpf.c"
                path.write_text(source)
            flags = flags or ("-g",)
            common = ["-O2", "-mcpu=v3", "-target", "bpf", "-Wall", "-Werror", "-I", str(PROGRAMS)]
            words = [clang, *common, *flags]
            kept = _kept_object(words, path)
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                fresh = kept.with_suffix(f".{os.getpid()}")
                subprocess.run([*words, "-c", str(path), "-o", str(fresh)], check=True)
                fresh.replace(kept)
            target = folder / f"{len(done)}" / f"{path.name.removesuffix('.c')}.o"
            target.parent.mkdir()
            target.write_bytes(kept.read_bytes())
            done[key] = target
        return done[key]

    return compile_one


def _kept_object(words: list[str], source: Path) -> Path:
    """Where an object of these bytes, headers, flags and compiler is kept."""
    compiler = os.stat(shutil.which(words[0]) or words[0])
    digest = hashlib.sha256(f"{words} {source.name} {compiler.st_size} {compiler.st_mtime_ns}".encode())
    for path in (source, *sorted(PROGRAMS.glob("*.h"))):
        digest.update(path.read_bytes())
    return OBJECTS / f"{digest.hexdigest()[:32]}.o"


@pytest.fixture(scope="session")
def kinds(compiled: Callable[..., Path]) -> Path:
    """The object with every kind of map and program."""
    return compiled("kinds")


@pytest.fixture
def loaded(kinds: Path) -> Iterator[bpf.Object]:
    with bpf.Object.open(kinds) as obj:
        yield obj.load()


@pytest.fixture(scope="session")
def hooks_file(compiled: Callable[..., Path]) -> Path:
    """The object with a program for every kind of hook."""
    return compiled("hooks")


@pytest.fixture
def hooked(hooks_file: Path) -> Iterator[Callable[..., Hooked]]:
    """Loads programs of ``hooks.bpf.c`` by their names, without ``on_``."""
    with ExitStack() as opened:

        def load(*names: str, target: tuple[str, bpf.Program | None] | None = None) -> Hooked:
            made = open_hooks(hooks_file, *names, target=target)
            opened.enter_context(made.object)
            return made

        yield load


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory, clang: str) -> Path:
    """A program, not stripped, that calls ``work`` as often as it is told and prints the function's place."""
    folder = tmp_path_factory.mktemp("program")
    source = folder / "program.c"
    source.write_text(
        "#include <stdlib.h>\n"
        '__attribute__((noinline)) static int work(int x) { __asm__ volatile(""); return x + 1; }\n'
        '__attribute__((noinline)) int work_more(int x) { __asm__ volatile(""); return x + 2; }\n'
        "int main(int n, char **words) {\n"
        "  int sum = 0;\n"
        "  for (int i = 0; i < atoi(words[1]); i++) sum += work(i) + work_more(i);\n"
        "  return sum == 12345;\n"
        "}\n"
    )
    need("kernel", missing_program("cc"))
    subprocess.run(["cc", "-O1", "-pie", "-fPIE", "-o", folder / "program", source], check=True)
    return folder / "program"


@pytest.fixture
def pins(unique_name: Callable[[], str]) -> Iterator[Path]:
    """A folder for pins, removed with all that is in it."""
    folder = bpf.pin.BPFFS / f"hookline-test-{unique_name()}"
    yield folder
    if folder.exists():
        for entry in sorted(folder.rglob("*"), reverse=True):
            entry.rmdir() if entry.is_dir() else entry.unlink()
        folder.rmdir()


@contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """Run the block's thread in a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(namespace) as target:
        assert libc.setns(target.fileno(), _CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0


@contextmanager
def elsewhere() -> Iterator[None]:
    """Run the block's thread in a new, empty network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home:
        assert libc.unshare(_CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0


@dataclass(frozen=True)
class Wire:
    """A veth pair inside a namespace: what is sent into ``far`` arrives at ``near``."""

    namespace: Path
    near: str
    far: str

    def send(self, count: int = 1) -> None:
        """Send frames of an experimental EtherType; to be called inside the namespace."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((self.far, 0))
            for _ in range(count):
                sender.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + bytes(50))

    def run(self, *words: str) -> str:
        """Run a command in the namespace."""
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def wire(unique_name: Callable[[], str]) -> Iterator[Wire]:
    """A veth pair; the test runs inside its namespace."""
    name = unique_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with inside(Path("/run/netns") / name):
            # Neighbour discovery would be counted with the test's own packets.
            quiet = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
            if quiet.exists():
                quiet.write_text("1")
        for words in (
            "link add near type veth peer name far",
            "link set near up",
            "link set far up",
            "link set lo up",
        ):
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        namespace = Path("/run/netns") / name
        with inside(namespace):
            yield Wire(namespace, "near", "far")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a thread of its own; its result, or its exception raised here."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
