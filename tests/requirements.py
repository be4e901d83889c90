"""What tests need of the machine, and what happens where it is missing: a skip that names the missing thing,
or a failure where ``HOOKLINE_REQUIRE`` says that this machine should have it.

    HOOKLINE_REQUIRE=kernel,lab,vm make test

The groups are the folders of tests: ``kernel`` (root and bpf), ``lab`` (network namespaces), ``vm`` (QEMU).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

GROUPS = ("kernel", "lab", "vm")
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


def required() -> set[str]:
    """The groups that may not skip here."""
    names = {name.strip() for name in os.environ.get("HOOKLINE_REQUIRE", "").split(",")} - {""}
    unknown = names - set(GROUPS)
    if unknown:
        raise pytest.UsageError(
            f"HOOKLINE_REQUIRE={','.join(sorted(unknown))}: groups are {', '.join(GROUPS)}"
        )
    return names


def need(group: str, missing: str) -> None:
    """Ends the running test when ``missing`` is not empty: skipped, or failed where the group is required.

    Args:
        group: ``kernel``, ``lab`` or ``vm``.
        missing: What is not there, named so that a reader can bring it; empty if nothing is missing.
    """
    if group not in GROUPS:
        raise ValueError(f"no such group of tests: {group}")
    if not missing:
        return
    if group in required():
        pytest.fail(f"HOOKLINE_REQUIRE={group}, but missing: {missing}", pytrace=False)
    pytest.skip(f"missing: {missing}")


def missing_program(name: str) -> str:
    """For :func:`need`: empty, or that the program is not installed."""
    return "" if shutil.which(name) else f"the program {name}"


def missing_for(group: str) -> str:
    """For :func:`need`: what every test of the group needs and this machine lacks, or empty."""
    lacking = []
    if os.geteuid() != 0:
        lacking.append("root")
    effective = _effective_capabilities()
    lacking += [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if not is_mounted("/sys/fs/bpf", "bpf"):
        lacking.append("a bpf filesystem at /sys/fs/bpf (make setup mounts it)")
    if group == "lab" and not Path("/proc/self/ns/net").exists():
        lacking.append("network namespaces")
    return ", ".join(lacking)


def is_mounted(path: str, kind: str) -> bool:
    """Whether a filesystem of the kind is mounted exactly there."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return any(line.split()[1:3] == [path, kind] for line in mounts)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
