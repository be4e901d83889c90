"""What someone without capabilities is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hookline import bpf
from tests.requirements import need

_CHILD = """
import ctypes, os, sys
from hookline import bpf
# Modules that the work below loads lazily, while the files can still be read.
import hookline.bpf._maps._map_create, hookline.bpf._maps._arena, hookline.bpf._objects._elf, elftools.elf.elffile, pyroute2
data = open(sys.argv[1], "rb").read()
program = None
if sys.argv[2].startswith("attach"):
    obj = bpf.Object.open(data, name="kinds").load()
import numpy.ctypeslib  # loaded on first use, when its folder may not be readable any more
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    match sys.argv[2]:
        case "load":
            bpf.Object.open(data, name="kinds").load()
        case "attach_link":
            obj.programs["tc_mark"].attach_tc("lo", "egress").close()
            print("attached")
        case "attach_clsact":
            obj.programs["tc_mark"].attach_tc("lo", "ingress", hook="clsact")
        case "list":
            list(bpf.links())
        case "make":
            bpf.Map.create("lru_hash", key="u4", value="u4", max_entries=8)
        case "make_plain":
            with bpf.Map.create("array", value=[("number", "u4")], max_entries=8) as made:
                made[3] = (5,)
                print("made", made[3]["number"])
        case "statistics":
            with bpf.run_statistics():
                pass
        case "mount":
            os.mkdir("/tmp/" + sys.argv[3])
            from pathlib import Path
            try:
                bpf.ensure_bpffs(Path("/tmp/" + sys.argv[3]))
            finally:
                os.rmdir("/tmp/" + sys.argv[3])
        case "probe":
            print("answer", bpf.features.tcx().answer.value)
            sys.exit(0)
except bpf.NotPermitted as error:
    print(error.capability, "|", error)
    sys.exit(error.exit_status)
"""


def unprivileged(kinds: Path, action: str, name: str = "", **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD, kinds, action, name],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(
    ("action", "capability"),
    [
        ("load", "CAP_BPF"),
        ("attach_clsact", "CAP_NET_ADMIN"),
        ("make", "CAP_BPF"),
        ("list", "CAP_SYS_ADMIN"),
        ("statistics", "CAP_SYS_ADMIN"),
        ("mount", "CAP_SYS_ADMIN"),
    ],
)
def test_the_missing_capability_is_named(
    kinds: Path, unique_name: object, action: str, capability: str
) -> None:
    status, text = unprivileged(kinds, action, unique_name())  # type: ignore[operator]
    assert status == 3, text
    assert f"lacks {capability}" in text or f"and {capability}" in text
    assert "as root" in text or "--cap-add" in text


def test_a_container_is_told_its_flags(kinds: Path) -> None:
    status, text = unprivileged(kinds, "load", container="docker")
    assert status == 3
    assert "--cap-add BPF" in text
    assert "--cap-add NET_ADMIN" in text
    assert "--privileged" in text


def test_a_probe_without_privilege_could_not_tell(kinds: Path) -> None:
    assert unprivileged(kinds, "probe") == (0, "answer could not tell\n")


def test_a_loaded_program_is_permission_to_link_it(kinds: Path) -> None:
    """The kernel asks for capabilities at the load; whoever holds the descriptor may attach it by a link."""
    need("kernel", "" if bpf.features.tcx() else "tcx (Linux 6.6)")
    assert unprivileged(kinds, "attach_link") == (0, "attached\n")


def test_plain_maps_where_everyone_may_make_them(kinds: Path) -> None:
    if Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip() != "0":
        assert unprivileged(kinds, "make_plain")[0] == 3
    else:
        assert unprivileged(kinds, "make_plain") == (0, "made 5\n")


def test_held_but_refused_is_said() -> None:
    error = bpf.NotPermitted("cannot load", capability="CAP_BPF")
    assert "policy" in str(error)
