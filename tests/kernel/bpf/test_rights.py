"""What each set of capabilities allows, what is said of the rest, and what an ordinary user may do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline.bpf import _rights
from tests.kernel.bpf.rights import MAPS, findings

SYSCTL = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
# tools/vm's machines have it; nobody else uses them.
IN_VM = Path("/run/hookline-vm").is_dir()
SETS = {
    "none": (),
    "bpf": ("CAP_BPF",),
    "net_admin": ("CAP_NET_ADMIN",),
    "bpf+net_admin": ("CAP_BPF", "CAP_NET_ADMIN"),
    "bpf+perfmon": ("CAP_BPF", "CAP_PERFMON"),
    "bpf+net_admin+perfmon": ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"),
    "sys_admin": ("CAP_SYS_ADMIN",),
}


@pytest.fixture(scope="module")
def object_file(compiled: Callable[..., Path]) -> Path:
    return compiled("every_type")


def tried(object_file: Path, *before: str, user: str = "") -> Any:
    """What a process may do that is started by other words."""
    words = [
        *before,
        sys.executable,
        "-m",
        "tests.kernel.bpf.rights",
        str(object_file),
        *([user] if user else []),
    ]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return json.loads(ended.stdout)


def with_only(object_file: Path, capabilities: tuple[str, ...]) -> Any:
    kept = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)])
    return tried(object_file, "setpriv", "--bounding-set", kept, "--inh-caps", "-all")


def missing(needed: tuple[str, ...], held: tuple[str, ...]) -> list[str]:
    """Those of what is needed that are not held; at a load CAP_SYS_ADMIN stands for all three."""
    return [] if "CAP_SYS_ADMIN" in held else [name for name in needed if name not in held]


def check(refusal: dict[str, str] | None, needed: tuple[str, ...], held: tuple[str, ...], what: str) -> None:
    """That what is needed decides, and that the refusal names exactly what is missing."""
    lacking = missing(needed, held)
    assert (refusal is None) == (not lacking), (what, refusal)
    if refusal is not None:
        assert refusal["kind"] == "NotPermitted", (what, refusal)
        assert refusal["status"] == "3"
        assert refusal["capability"].split() == list(needed), (what, refusal)
        assert f"lacks {' and '.join(lacking)} " in refusal["text"], (what, refusal)
        assert "as root" in refusal["text"] or "--cap-add" in refusal["text"]


@pytest.mark.parametrize("held", SETS.values(), ids=SETS)
def test_each_set_of_capabilities(object_file: Path, held: tuple[str, ...]) -> None:
    disabled = SYSCTL.read_text().strip() != "0"
    report = with_only(object_file, held)
    assert len(report["programs"]) > 20
    for name, refusal in report["programs"].items():
        kind = report["types"][name]
        needed = _rights.for_programs([kind])
        if kind in ("socket_filter", "cgroup_skb") and not disabled:
            continue
        check(refusal, needed, held, name)
    for kind, refusal in report["maps"].items():
        needed = _rights.for_maps([kind])
        # Before Linux 6.9 CAP_SYS_ADMIN does not stand for CAP_NET_ADMIN where maps are made.
        if refusal is not None and "CAP_SYS_ADMIN" in held and "CAP_NET_ADMIN" in needed:
            assert "lacks CAP_NET_ADMIN " in refusal["text"]
        elif disabled or "CAP_BPF" in held:
            check(refusal, needed, held, kind)
    assert set(report["maps"]) == set(MAPS)


@pytest.mark.parametrize("held", SETS.values(), ids=SETS)
def test_probes_never_take_missing_rights_for_a_no(object_file: Path, held: tuple[str, ...]) -> None:
    """Whoever may not ask gets no answer, or the one that root gets."""
    root = findings()
    report = with_only(object_file, held)["findings"]
    wrong = [
        (feature, answer, root[feature])
        for feature, (answer, why) in report.items()
        if answer not in ("could not tell", root[feature][0])
    ]
    assert wrong == []
    for feature, (answer, why) in report.items():
        if answer == "could not tell":
            assert "lacks CAP_" in why, (feature, why)
    told = sum(answer != "could not tell" for answer, _ in report.values())
    assert told > (80 if len(held) == 3 else 5)


def test_an_ordinary_user(object_file: Path) -> None:
    """Where the kernel keeps eBPF from ordinary users, everything is refused by name."""
    if SYSCTL.read_text().strip() == "0":
        pytest.skip("this kernel lets ordinary users load programs")
    report = tried(object_file, user="nobody")
    for name, refusal in report["programs"].items():
        check(refusal, _rights.for_programs([report["types"][name]]), (), name)
    for kind, refusal in report["maps"].items():
        check(refusal, _rights.for_maps([kind]), (), kind)


@pytest.fixture
def opened_to_all() -> Iterator[None]:
    """The kernel lets ordinary users load programs meanwhile; only in a machine of our own."""
    before = SYSCTL.read_text().strip()
    if before == "1":
        pytest.skip("unprivileged_bpf_disabled is 1 until the next start")
    if before != "0" and not IN_VM:
        pytest.skip(
            "ordinary users may load nothing here, and that is left as it is (tried in the virtual machines)"
        )
    SYSCTL.write_text("0")
    yield
    SYSCTL.write_text(before)


@pytest.mark.usefixtures("opened_to_all")
def test_what_ordinary_users_may_do_where_they_are_let(object_file: Path) -> None:
    report = tried(object_file, user="nobody")
    allowed = {name for name, refusal in report["programs"].items() if refusal is None}
    assert {report["types"][name] for name in allowed} == {"socket_filter", "cgroup_skb"}
    for name, refusal in report["programs"].items():
        if name not in allowed:
            assert refusal["kind"] == "NotPermitted", (name, refusal)
            assert "lacks CAP_BPF" in refusal["text"]
    made = {kind for kind, refusal in report["maps"].items() if refusal is None}
    assert {"hash", "array"} <= made
    assert not made & {"lru_hash", "sockmap", "devmap", "xskmap"}
    for kind in set(report["maps"]) - made:
        assert report["maps"][kind]["kind"] == "NotPermitted", (kind, report["maps"][kind])
