"""What ``make demo`` says where it cannot run, and that it starts at once where nothing is left to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.requirements import missing_program, need

ROOT = Path(__file__).resolve().parents[2]
NOTHING_TO_DO_S = 2.0


def setup(
    *wrapper: str, target: str = "demo", checkout: str | Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs ``tools/setup`` without a terminal and without a locale."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return subprocess.run(
        [*wrapper, "tools/setup", target],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def prepared() -> None:
    done = setup()
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("prepared")
def test_nothing_left_to_do_is_quick_and_silent() -> None:
    started = time.monotonic()
    done = setup()
    assert time.monotonic() - started < NOTHING_TO_DO_S
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("prepared")
def test_two_at_once_both_succeed() -> None:
    command = [str(ROOT / "tools/setup"), "demo"]
    both = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]


def test_without_root_says_the_command_to_run(unique_name: Callable[[], str]) -> None:
    need("kernel", missing_program("setpriv"))
    with tempfile.TemporaryDirectory(prefix=unique_name()) as folder:
        Path(folder).chmod(0o755)  # a checkout that everyone can read, wherever this one is
        shutil.copytree(ROOT / "tools", Path(folder) / "tools", ignore=shutil.ignore_patterns("node_modules"))
        done = setup("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", checkout=folder)
    assert done.returncode == 1
    assert ("sudo make demo" if shutil.which("sudo") else "su -c 'make demo'") in done.stderr


def test_without_capabilities_says_the_flags_of_the_container() -> None:
    need("kernel", missing_program("setpriv"))
    done = setup("setpriv", "--bounding-set=-sys_admin,-net_admin")
    assert done.returncode == 3
    assert "CAP_NET_ADMIN CAP_SYS_ADMIN" in done.stderr
    assert "docker run --privileged -v /sys/fs/bpf:/sys/fs/bpf" in done.stderr


def test_root_of_a_user_namespace_only_is_told_so() -> None:
    wrapper = ["unshare", "--user", "--map-root-user"]
    possible = subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0
    need("kernel", "" if possible else "user namespaces")
    done = setup(*wrapper)
    assert done.returncode == 3
    assert "user namespace" in done.stderr


def test_missing_filesystems_are_mounted_and_it_says_so() -> None:
    need("kernel", missing_program("unshare"))
    inside = 'umount -l /sys/fs/bpf /sys/kernel/tracing; exec "$@"'
    done = setup("unshare", "--mount", "--propagation=private", "bash", "-c", inside, "bash")
    assert done.returncode == 0, done.stderr
    assert "mounted bpf at /sys/fs/bpf" in done.stdout
    assert "mounted tracefs at /sys/kernel/tracing" in done.stdout


def test_unknown_target_is_wrong_usage() -> None:
    assert setup(target="supper").returncode == 2
