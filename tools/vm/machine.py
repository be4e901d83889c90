"""A virtual machine that runs one command.

Its root is this machine's, read-only over 9p, with a layer in memory on top: the same Python, the same checkout, and
nothing that the command writes remains. A folder of the host is shared for what goes in and comes out: the command, its
output as it comes, its exit status. The processor is QEMU's software emulation unless told otherwise.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from tools.vm.kernels import Kernel, VmError

__all__ = ["EMULATION", "RESULTS", "Machine", "Outcome", "Stream"]

RESULTS = "/run/hookline-vm/results"
"""Inside: what a command leaves there is handed back."""

BOOT_S = 120.0
SILENT_S = 20.0
BOOTS = 3
POLL_S = 0.1
EMULATION = "tcg,thread=single"
"""Both processors by one thread, in turn. With a thread for each, Linux 6.12 died of a breakpoint of its own in __schedule(): it
patches code while it runs, and the other processor still had the old. Two machines beside each other lose nothing by it on
two CPUs."""

# QEMU 7.2 computes some of AVX2 wrongly: NumPy's argsort, for one, came out unsorted.
_PROCESSOR = "max,-avx,-avx2,-f16c,-fma"
_HERE = Path(__file__).parent
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
_PASSED_ON = re.compile("HOOKLINE_(?!TEST_RUN$|STATE$)|NO_COLOR$|COLUMNS$")
_TROUBLE = re.compile(r"\b(BUG|WARNING|Oops|general protection fault|lockup)\b")


class Stream(Protocol):
    """Where output goes."""

    def write(self, text: str, /) -> int:
        """Takes some of it."""

    def flush(self) -> None:
        """Shows what was taken."""


_Streams = tuple[Stream, Stream]


class _NotUpError(VmError):
    """The command was never started."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: Its exit status.
        boot_s: Seconds until it was started.
        command_s: Seconds that it took.
        complaints: Lines of the kernel's log that speak of trouble.
    """

    status: int
    boot_s: float
    command_s: float
    complaints: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """How to start one."""

    kernel: Kernel
    cpus: int = 2
    memory_mib: int = 2048
    accelerator: str = EMULATION

    def run(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        timeout_s: float,
        stdout: Stream | None = None,
        stderr: Stream | None = None,
        results: Path | None = None,
    ) -> Outcome:
        """Runs a command in a machine of its own.

        Args:
            command: The words of the command.
            folder: Where it runs: a path of the host.
            timeout_s: When to give up, counted from the command's start.
            stdout: Where its output goes as it comes; this process's by default.
            stderr: The same for what it says of errors.
            results: A folder for the files that the command left in `RESULTS`.

        Raises:
            VmError: The machine does not start, or ends without an exit status, or the time is over.
        """
        streams = (stdout or sys.stdout, stderr or sys.stderr)
        for attempt in range(BOOTS):
            try:
                return self._run_once(command, folder, timeout_s, streams, results)
            except _NotUpError as error:
                if attempt + 1 == BOOTS:
                    raise
                print(f"vm: once more, for {error}", file=streams[1], flush=True)
        raise AssertionError

    def _run_once(
        self, command: Sequence[str], folder: Path, timeout_s: float, streams: _Streams, results: Path | None
    ) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="hookline-vm-") as work:
            job = Path(work) / "job"
            (job / "results").mkdir(parents=True)
            self._write_job(job, command, folder)
            initrd = Path(work) / "initrd"
            self._write_initrd(Path(work) / "tree", initrd, folder.resolve())
            with self._started(job, initrd, Path(work) / "console") as process:
                outcome = _follow(process, job, Path(work) / "console", timeout_s, streams)
            if results is not None:
                shutil.copytree(job / "results", results, dirs_exist_ok=True)
            return outcome

    def _write_job(self, job: Path, command: Sequence[str], folder: Path) -> None:
        settings = {name: value for name, value in os.environ.items() if _PASSED_ON.match(name)}
        (job / "command").write_text(
            f"cd {shlex.quote(str(folder))} || exit 125\n"
            + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
            + shlex.join(command)
            + "\n"
        )
        (job / "name").write_text(f"vm-{self.kernel.name}\n")
        (job / "second.sh").write_bytes((_HERE / "second.sh").read_bytes())
        for name in ("stdout", "stderr"):
            (job / name).touch()

    def _write_initrd(self, tree: Path, target: Path, folder: Path) -> None:
        (tree / "bin").mkdir(parents=True)
        (tree / "modules").mkdir()
        busybox = Path("/bin/busybox")
        if not busybox.exists():
            raise VmError("/bin/busybox is not there: tools/setup test-vm brings it")
        (tree / "bin" / "busybox").write_bytes(busybox.read_bytes())
        (tree / "bin" / "sh").symlink_to("busybox")
        (tree / "init").write_bytes((_HERE / "start.sh").read_bytes())
        for path in (tree / "bin" / "busybox", tree / "init"):
            path.chmod(0o755)
        (tree / "modules.path").write_text(f"{self.kernel.modules.resolve()}\n")
        (tree / "folder.path").write_text(f"{folder}\n")
        for number, data in enumerate(self.kernel.module_files(_MODULES)):
            (tree / "modules" / f"{number:02}.ko").write_bytes(data)
        names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
        with target.open("wb") as archive:
            command = ["cpio", "--create", "--quiet", "--format=newc", "--owner=0:0"]
            subprocess.run(command, cwd=tree, input=names.encode(), stdout=archive, check=True)

    @contextmanager
    def _started(self, job: Path, initrd: Path, console: Path) -> Iterator[subprocess.Popen[bytes]]:
        shared = "security_model=none,multidevs=remap"
        command = [
            # Should this process be killed, the machine goes with it.
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
            *("-M", "q35", "-accel", self.accelerator, "-cpu", _PROCESSOR, "-smp", str(self.cpus)),
            *("-m", str(self.memory_mib), "-nodefaults", "-no-reboot", "-display", "none"),
            *("-serial", f"file:{console}"),
            *("-kernel", str(self.kernel.image), "-initrd", str(initrd)),
            *("-virtfs", f"local,path=/,mount_tag=host,readonly=on,{shared}"),
            *("-virtfs", f"local,path={job},mount_tag=job,{shared}"),
            "-append",
            f"console=ttyS0 panic=-1 loglevel=7 mitigations=off nokaslr no_timer_check {_clock()}",
        ]
        log = console.with_name("qemu")
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            except FileNotFoundError as error:
                raise VmError(
                    f"{error.filename} is not installed: tools/setup test-vm brings what is needed"
                ) from error
        try:
            yield process
            # It turns itself off once the status is there.
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()


def _clock() -> str:
    """Settings that tell the machine the frequency of its time-stamp counter, which is this machine's.

    Left to itself Linux measures it against an emulated timer: on a busy machine it found 60 and 446 MHz for 2.8 GHz.
    Time then runs too fast by the same factor, up to a machine that does nothing but write of stalls. Half of
    ``bogomips`` is the frequency in MHz: where the counter is constant, Linux derives the one from the other.
    """
    found = dict.fromkeys(("bogomips", "flags"), "")
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in found:
            found[name.strip()] = value
    known = "constant_tsc" in found["flags"].split() and found["bogomips"]
    return f"tsc=reliable tsc_early_khz={float(known) * 500:.0f}" if known else "tsc=reliable"


def _follow(
    process: subprocess.Popen[bytes], job: Path, console: Path, timeout_s: float, streams: _Streams
) -> Outcome:
    """Copies the output as it comes, until there is a status."""
    begun = time.monotonic()
    started = 0.0
    with (job / "stdout").open() as stdout, (job / "stderr").open() as stderr:
        while True:
            # In this order: what was written before the machine ended, or the status came, is read after it.
            ended = process.poll() is not None
            finished = (job / "status").exists()
            _copy(stdout, streams[0])
            _copy(stderr, streams[1])
            now = time.monotonic()
            if not started and (job / "started").exists():
                started = now
            if finished:
                status = int((job / "status").read_text())
                complaints = [line for line in _lines(job / "dmesg") if _TROUBLE.search(line)]
                return Outcome(status, started - begun, now - started, tuple(complaints))
            if ended:
                raise VmError(_last_words("the machine ended without an exit status", console))
            if not started and now - begun > SILENT_S and not _lines(console):
                raise _NotUpError(
                    _last_words(f"the machine had not said a word after {SILENT_S:.0f} s", console)
                )
            if not started and now - begun > BOOT_S:
                raise _NotUpError(_last_words(f"the machine was not up after {BOOT_S:.0f} s", console))
            if started and now - started > timeout_s:
                raise VmError(_last_words(f"the command took more than {timeout_s:.0f} s", console))
            time.sleep(POLL_S)


def _copy(source: TextIO, target: Stream) -> None:
    if text := source.read():
        target.write(text)
        target.flush()


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _last_words(what: str, console: Path) -> str:
    said = [*_lines(console.with_name("qemu"))[-5:], *_lines(console)[-25:]]
    return "\n  ".join([what, *said])
