"""One program of ``programs/hooks.bpf.c`` at a time, with its count of hits; and which kernel lacks which hook."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hookline import bpf
from hookline.bpf import features

GETPPID = {"x86_64": 110, "aarch64": 173}.get(platform.machine(), 173)

# What the kernels that this is developed on lack, by their releases; nothing else may be skipped there.
_LACKING = {
    r"6\.1\.\d.*amd64": {
        *("tcx", "netkit", "netfilter", "kprobe.multi", "uprobe.multi", "sockmap links"),
        "cgroup/connect_unix",
    },
    r"6\.12\.\d.*amd64": set[str](),
    r"6\.18\.\d+-fc": {"netkit", "kprobe", "kprobe.multi", "fentry", "fexit", "fmod_ret", "freplace", "lsm"},
}


def lacking(release: str) -> set[str] | None:
    """The hooks that a kernel is known to lack, by its release; None for a kernel that nothing is known of."""
    return next((hooks for known, hooks in _LACKING.items() if re.match(known, release)), None)


def supported(hook: str) -> None:
    """End the test where this kernel lacks a hook, as the probes say; it fails on a kernel that should have it."""
    found = features.attach(hook)
    if found:
        return
    release = os.uname().release
    known = lacking(release)
    if known is not None and hook not in known:
        pytest.fail(f"Linux {release} has {hook}, and the probe says: {found.why}", pytrace=False)
    pytest.skip(f"this kernel has no {hook}: {found.why}")


@dataclass
class Hooked:
    """An object with one program loaded, and what it counts."""

    object: bpf.Object
    names: tuple[str, ...]

    @property
    def program(self) -> bpf.Program:
        """The program, or the first of several."""
        return self.object.programs[f"on_{self.names[0]}"]

    def __getitem__(self, name: str) -> bpf.Program:
        return self.object.programs[f"on_{name}"]

    def hits(self, name: str = "") -> int:
        """How often it ran so far."""
        hook = self.object.btf.enums()["hook"][f"HOOK_{name or self.names[0]}"]
        return int(self.object.maps["hits"][int(hook)])

    @contextmanager
    def more(self, count: int, name: str = "") -> Iterator[None]:
        """Check that the block makes it run so many times more."""
        before = self.hits(name)
        yield
        deadline = time.monotonic() + 2
        while self.hits(name) - before < count and time.monotonic() < deadline:
            time.sleep(0.005)
        if not count:
            time.sleep(0.02)
        assert self.hits(name) - before == count


Open = Callable[..., Hooked]


def fires(hooked: Hooked, link: object, event: Callable[[], object], count: int = 5) -> None:
    """Check that what is attached counts each event, and none any more once it is detached."""
    with hooked.more(count):
        for _ in range(count):
            event()
    link.close()  # type: ignore[attr-defined]
    with hooked.more(0):
        event()


def each(*attaches: Callable[[], object]) -> Iterator[Any]:
    """What each way of attaching gives, one after the other."""
    for attach in attaches:
        yield attach()


def getppid() -> None:
    os.getppid()


def open_hooks(path: Path, *names: str, target: tuple[str, bpf.Program | None] | None = None) -> Hooked:
    """Load these programs of the object; skip where a probe says that the kernel has no such hook."""
    obj = bpf.Object.open(path)
    try:
        obj.only(*(f"on_{name}" for name in names))
        obj.constants["only_process"] = os.getpid()
        obj.constants["system_call"] = GETPPID
        for name in names:
            if target is not None:
                obj.set_attach_target(f"on_{name}", target[0], target[1])
        obj.load()
    except BaseException:
        obj.close()
        raise
    return Hooked(obj, names)
