"""Debian's kernels, fetched once: an uncompressed kernel, its modules, and what the machine needs to start.

What is fetched is kept in $XDG_CACHE_HOME/hookline-vm, or /var/cache/hookline-vm for root, or ~/.cache/hookline-vm: a
folder for each kernel; remove one to fetch that kernel's newest version. Of this machine's own apt, only the mirror's
address is read.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SUITES", "Kernel", "VmError", "cache", "get"]

SUITES = {"6.1": "bookworm", "6.12": "bookworm-backports"}
"""Which of Debian's suites has the kernel."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_ENVIRONMENT = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
# Offsets in Documentation/arch/x86/boot.rst.
_SETUP_SECTORS, _PAYLOAD_OFFSET = 0x1F1, 0x248
_XZ, _ZSTD = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"


class VmError(Exception):
    """Something around the command failed, not the command."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be started.

    Attributes:
        name: Its key in `SUITES`.
        release: What ``uname -r`` says in it.
        image: An uncompressed kernel, which starts in a third of the time.
        modules: The folder that becomes ``/lib/modules``.
    """

    name: str
    release: str
    image: Path
    modules: Path

    def module_files(self, names: Sequence[str]) -> Iterator[bytes]:
        """These modules and those they need, uncompressed, in the order of loading; what is built in is left out."""
        seen = set()
        for name in names:
            command = ["modprobe", "--show-depends", "--dirname", str(self.modules.parents[1])]
            for line in _run([*command, "--set-version", self.release, name]).splitlines():
                kind, _, path = line.strip().partition(" ")
                if kind == "insmod" and path not in seen:
                    seen.add(path)
                    data = Path(path).read_bytes()
                    yield lzma.decompress(data) if path.endswith(".xz") else data


def cache() -> Path:
    """Where kernels are kept."""
    fallback = Path("/var/cache") if os.geteuid() == 0 else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or fallback) / "hookline-vm"


def get(name: str) -> Kernel:
    """The kernel, fetched if it is not there.

    Raises:
        VmError: It cannot be fetched.
    """
    folder = cache() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as work:
                made = Path(work) / "made"
                _make(name, Path(work), made)
                made.rename(folder)
    modules = folder / "lib" / "modules"
    return Kernel(name, os.listdir(modules)[0], folder / "vmlinux", modules)


def _make(name: str, work: Path, made: Path) -> None:
    package = _download(SUITES[name], work)
    print(f"vm: unpacking {package.name}", flush=True)
    tree = work / "tree"
    _run(["dpkg-deb", "--extract", str(package), str(tree)])
    modules = next(
        path for path in (tree / "lib" / "modules", tree / "usr" / "lib" / "modules") if path.exists()
    )
    (made / "lib").mkdir(parents=True)
    modules.rename(made / "lib" / "modules")
    _run(["depmod", "--basedir", str(made), os.listdir(made / "lib" / "modules")[0]])
    (made / "vmlinux").write_bytes(_uncompressed(next((tree / "boot").glob("vmlinuz-*"))))


def _uncompressed(path: Path) -> bytes:
    """The kernel inside a bzImage."""
    image = path.read_bytes()
    start, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
    start += ((image[_SETUP_SECTORS] or 4) + 1) * 512
    payload = image[start : start + length - 4]  # its last 4 octets are the uncompressed size
    if payload.startswith(_XZ):
        return lzma.decompress(payload)
    if payload.startswith(_ZSTD):
        return subprocess.run(["zstd", "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    raise VmError(f"{path.name} is compressed in a way that is not known here: {payload[:6].hex()}")


@contextmanager
def _apt(suite: str, work: Path) -> Iterator[list[str]]:
    """Options that give apt sources, lists and a status of their own."""
    state = work / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    trust = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
    (state / "sources.list").write_text(f"deb {trust}{_mirror()} {suite} main\n")
    settings = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    yield [option for name, value in settings.items() for option in ("-o", f"{name}={value}")]
    shutil.rmtree(state)


def _mirror() -> str:
    """This machine's Debian mirror."""
    listed = _run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"]
    )
    for line in listed.splitlines():
        if line.startswith("Debian|Debian|"):
            return line.rpartition("|")[2]
    raise VmError("apt knows no Debian mirror here: apt-get update, then again")


def _download(suite: str, work: Path) -> Path:
    with _apt(suite, work) as options:
        print(f"vm: fetching {suite}'s kernel (once; kept in {cache()})", flush=True)
        _run(["apt-get", *options, "update", "--error-on=any"])
        depends = _run(["apt-cache", *options, "depends", "--important", "linux-image-amd64"])
        found = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line]
        if not found:
            raise VmError(f"{suite} has no linux-image-amd64 for this machine's apt")
        _run(["apt-get", *options, "download", found[0]], folder=work)
    return next(work.glob("linux-image-*.deb"))


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=_ENVIRONMENT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise VmError(f"{command[0]} is not installed: tools/setup test-vm brings it") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-4:]
        raise VmError(f"{_shown(command)} failed: {'; '.join(said)}")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    """A command without apt's settings."""
    words = list(command)
    while "-o" in words:
        del words[words.index("-o") : words.index("-o") + 2]
    return " ".join(words)
