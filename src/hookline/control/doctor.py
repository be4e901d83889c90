"""What this kernel and this user can do, what is missing and how to mend it: the logic of ``hookline doctor``.

Everything is found out without changing anything, and works for any user: what may not be looked at is said to be so.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hookline import bpf, net
from hookline.bpf import features
from hookline.datapath import hooks
from hookline.datapath.hooks import Choice
from hookline.errors import HooklineError
from hookline.model import names

__all__ = ["Check", "Foreign", "FunctionReport", "Report", "examine"]

Status = Literal["ok", "note", "missing", "unknown"]

KERNEL_FLOOR = (6, 1)
_FAST_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
_SHOWN = (
    "CAP_BPF",
    "CAP_NET_ADMIN",
    "CAP_PERFMON",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "CAP_NET_RAW",
    "CAP_SYS_RESOURCE",
    "CAP_SYSLOG",
)


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What, such as ``"bpffs"``.
        status: ``"ok"``; ``"note"``: worth knowing, nothing is missing; ``"missing"``: needed and not there;
            ``"unknown"``: could not tell.
        value: What was found.
        remedy: What to do about it; empty where nothing is.
    """

    name: str
    status: Status
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class FunctionReport:
    """A function of the data path: the hook it uses here, and whether this process may use it.

    Attributes:
        name: The function.
        hook: Its hook, empty where the kernel has none of them.
        certain: Whether the kernel's answer is known.
        why: Why this hook.
        passed_over: Better ones, with the reason that each cannot be used.
        capabilities: What it takes.
        lacking: Those that this process does not hold.
    """

    name: str
    hook: str
    certain: bool
    why: str
    passed_over: tuple[dict[str, str], ...]
    capabilities: tuple[str, ...]
    lacking: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether there is a hook, and this process may use it."""
        return bool(self.hook) and not self.lacking


@dataclass(frozen=True)
class Foreign:
    """A program on a hook of the network that is not Hookline's.

    Attributes:
        program_id: The kernel's number for it.
        name: Its name.
        place: Where it is, such as ``"xdp:eth0:native"``.
        link_id: The link that holds it there, None where there is none.
        pins: Where it or its link is pinned.
        processes: Who holds it or its link open: ``"cilium-agent (712)"``.
    """

    program_id: int
    name: str
    place: str
    link_id: int | None
    pins: tuple[str, ...]
    processes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        fixed: What was mounted, because it was asked for.
        unfixed: What could not be mounted, and why.
        checks: The machine.
        functions: The data path's functions.
        foreign: Others' programs on the network's hooks; None where this user may not see them.
    """

    checks: tuple[Check, ...]
    functions: tuple[FunctionReport, ...]
    foreign: tuple[Foreign, ...] | None
    fixed: tuple[str, ...] = field(default=())
    unfixed: tuple[str, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        """Whether everything needed is there."""
        return all(check.status != "missing" for check in self.checks) and all(
            function.usable for function in self.functions
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``hookline doctor --json`` prints them."""
        functions = [asdict(one) | {"usable": one.usable} for one in self.functions]
        return {
            "healthy": self.healthy,
            "fixed": list(self.fixed),
            "unfixed": list(self.unfixed),
            "checks": [asdict(check) for check in self.checks],
            "functions": functions,
            "foreign": None if self.foreign is None else [asdict(one) for one in self.foreign],
        }


def examine(*, fix: bool = False) -> Report:
    """Look at this machine.

    Args:
        fix: Mount bpffs and tracefs first where they are not.
    """
    fixed, unfixed = _fix() if fix else ((), ())
    features.forget()
    checks = [look() for look in _LOOKS]
    return Report(tuple(checks), tuple(_functions()), _foreign(), fixed, unfixed)


def _fix() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mount what is not; what was, and what could not be."""
    done, failed = [], []
    for kind, place, mount in (
        ("bpffs", bpf.pin.BPFFS, bpf.ensure_bpffs),
        ("tracefs", bpf.pin.TRACEFS, bpf.ensure_tracefs),
    ):
        try:
            if mount():
                done.append(f"{kind} mounted at {place}")
        except (HooklineError, OSError) as error:
            why = error.why if isinstance(error, HooklineError) else error.strerror
            failed.append(f"{kind} cannot be mounted at {place}: {why}")
    return tuple(done), tuple(failed)


# The kernel


def _kernel() -> Check:
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    source = features.config_source()
    value = f"Linux {release}, configuration " + (f"in {source}" if source else "not shown")
    if found and (int(found[1]), int(found[2])) < KERNEL_FLOOR:
        return Check("kernel", "missing", value, "run Linux 6.1 or newer")
    return Check("kernel", "ok", value)


def _btf() -> Check:
    found = features.btf()
    remedy = "run a kernel with CONFIG_DEBUG_INFO_BTF=y"
    return Check("BTF", "ok", found.why) if found else Check("BTF", "missing", found.why, remedy)


def _jit() -> Check:
    text = _sysctl("net/core/bpf_jit_enable")
    if text is None:
        always = features.config("CONFIG_BPF_JIT_ALWAYS_ON") == "y"
        return Check("JIT", "ok", "always on") if always else Check("JIT", "unknown", "may not be read")
    hardened = _sysctl("net/core/bpf_jit_harden") or "0"
    value = {"0": "off", "1": "on", "2": "on, with debugging output"}.get(text, text)
    value += {"1": ", hardened for unprivileged programs", "2": ", hardened for all"}.get(hardened, "")
    if text == "0":
        return Check(
            "JIT", "note", value, "sysctl -w net.core.bpf_jit_enable=1: programs run several times faster"
        )
    return Check("JIT", "ok", value)


def _unprivileged() -> Check:
    text = _sysctl("kernel/unprivileged_bpf_disabled")
    name = "unprivileged bpf"
    if text is None:
        return Check(name, "unknown", "may not be read")
    value = {"0": "allowed", "1": "off until the next start", "2": "off"}.get(text, text)
    if text == "0":
        return Check(
            name,
            "note",
            value,
            "sysctl -w kernel.unprivileged_bpf_disabled=2: most machines need it for nobody",
        )
    return Check(name, "ok", value)


def _lockdown() -> Check:
    state = features.lockdown()
    if state is None:
        return Check("lockdown", "unknown", "may not be read (/sys/kernel/security/lockdown)")
    if state == "confidentiality":
        remedy = "tracing reads nothing of the kernel: start with lockdown=integrity"
        return Check("lockdown", "missing", state, remedy)
    return Check("lockdown", "ok", state)


def _modules() -> Check:
    active = features.security_modules()
    if active is None:
        return Check("security modules", "unknown", "may not be read (/sys/kernel/security/lsm)")
    return Check("security modules", "ok", ",".join(active))


def _libbpf() -> Check:
    try:
        return Check("libbpf", "ok", features.libbpf_version())
    except HooklineError as error:
        return Check("libbpf", "missing", error.what, error.remedy)


def _clock() -> Check:
    folder = Path("/sys/devices/system/clocksource/clocksource0")
    try:
        current = (folder / "current_clocksource").read_text().strip()
    except OSError:
        return Check("clock", "unknown", "may not be read")
    if current in _FAST_CLOCKS:
        return Check("clock", "ok", current)
    return Check(
        "clock",
        "note",
        current,
        "reading it takes about a microsecond: tsc is faster, where the machine has it",
    )


# Mounts


def _mounts() -> list[tuple[str, str]]:
    """Kinds and places of what is mounted in this mount namespace."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        found.append((words[words.index("-") + 1], words[4]))
    return found


def _mounted(name: str, kind: str, place: Path) -> Check:
    if (kind, str(place)) in _mounts():
        return Check(name, "ok", str(place))
    command = "hookline doctor --fix" if os.geteuid() == 0 else "sudo hookline doctor --fix"
    return Check(name, "missing", "not mounted", f"{command}, or mount -t {kind} {kind} {place}")


def _cgroup() -> Check:
    places = [place for kind, place in _mounts() if kind == "cgroup2"]
    if places:
        return Check("cgroup2", "ok", ", ".join(places))
    return Check("cgroup2", "missing", "not mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")


# The process


def _capabilities() -> Check:
    lacking = bpf.lacking(*_SHOWN)
    held = [name for name in _SHOWN if name not in lacking]
    value = ", ".join(held) or "none"
    if "CAP_SYS_ADMIN" in lacking:
        remedy = "run it as root: listing others' programs and namespaces takes CAP_SYS_ADMIN"
        return Check("capabilities", "note", value, remedy)
    if "CAP_SYS_PTRACE" in lacking:
        remedy = "add CAP_SYS_PTRACE: else pods' network namespaces are not found, nor their sockets ended"
        return Check("capabilities", "missing", value, remedy)
    return Check("capabilities", "ok", value)


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return Check("locked memory", "ok", f"{value}; maps are not counted from Linux 5.11 on")


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} of at most {hard}"
    if soft < 1024:
        return Check("open files", "note", value, "ulimit -n 4096: each program, map and link takes one")
    return Check("open files", "ok", value)


def _cpus() -> Check:
    folder = Path("/sys/devices/system/cpu")
    try:
        online = _range_size((folder / "online").read_text())
    except OSError:
        return Check("CPUs", "unknown", "may not be read")
    possible = bpf.possible_cpus()
    if possible > 4 * online:
        remedy = f"per-CPU maps take room for {possible} CPUs: start with possible_cpus={online}"
        return Check("CPUs", "note", f"{online} online, {possible} possible", remedy)
    return Check("CPUs", "ok", f"{online} online, {possible} possible")


def _memory() -> Check:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = f"{int(found[1]) >> 10} MiB free" if found else "free memory unknown"
    try:
        used = sum(_map_bytes(one.id) for one in bpf.maps())
    except HooklineError:
        return Check("map memory", "ok", f"{free}; what maps take may not be read")
    return Check("map memory", "ok", f"{used / (1 << 20):.1f} MiB in maps, {free}")


def _map_bytes(map_id: int) -> int:
    # A map may go while it is looked at.
    with contextlib.suppress(bpf.BpfError, OSError), bpf.Map.from_id(map_id) as one:
        return one.memory_bytes
    return 0


_LOOKS: tuple[Callable[[], Check], ...] = (
    _kernel,
    _btf,
    _jit,
    _unprivileged,
    _lockdown,
    _modules,
    _libbpf,
    _clock,
    lambda: _mounted("bpffs", "bpf", bpf.pin.BPFFS),
    lambda: _mounted("tracefs", "tracefs", bpf.pin.TRACEFS),
    _cgroup,
    _capabilities,
    _memlock,
    _files,
    _cpus,
    _memory,
)


# Functions and others


def _functions() -> Iterator[FunctionReport]:
    interface = _uplink()
    for function in hooks.FUNCTIONS:
        choice = hooks.choose(function, interface=interface)
        yield FunctionReport(
            function.name,
            choice.hook,
            choice.certain,
            choice.why,
            tuple(_passed(choice)),
            function.capabilities,
            tuple(bpf.lacking(*function.capabilities)),
        )


def _passed(choice: Choice) -> Iterator[dict[str, str]]:
    for hook, found in choice.passed_over:
        yield {
            "hook": hook,
            "missing": found.feature,
            "why": found.why,
            "minimum_kernel": found.minimum_kernel,
        }


def _uplink() -> str:
    """The default route's interface, as the load balancer takes it without a NodeConfig; empty where there is none."""
    try:
        return net.default_interface()
    except HooklineError:
        return ""


_NETWORK_HOOKS = {"xdp", "tcx", "clsact", "netkit", "cgroup", "netfilter", "netns", "sockmap"}


def _foreign() -> tuple[Foreign, ...] | None:
    """Programs on the network's hooks that neither they nor their links are pinned below Hookline's folder."""
    try:
        placements = [one for one in bpf.placements() if one.hook in _NETWORK_HOOKS]
        pinned, holders = bpf.pinned(), bpf.holders()
        known = {info.id: info.name for info in bpf.programs()}
    except HooklineError:
        return None
    found = []
    for placement in placements:
        keys: list[tuple[Literal["program", "link"], int]] = [("program", placement.program_id)]
        if placement.link_id is not None:
            keys.append(("link", placement.link_id))
        pins = [path for key in keys for path in pinned.get(key, ())]
        if any(path.is_relative_to(names.BPFFS) for path in pins):
            continue
        held = {f"{holder.command} ({holder.process})" for key in keys for holder in holders.get(key, ())}
        found.append(
            Foreign(
                placement.program_id,
                known.get(placement.program_id, "?"),
                str(placement),
                placement.link_id,
                tuple(map(str, pins)),
                tuple(sorted(held)),
            )
        )
    return tuple(found)


def _sysctl(name: str) -> str | None:
    with contextlib.suppress(OSError):
        return (Path("/proc/sys") / name).read_text().strip()
    return None


def _range_size(text: str) -> int:
    """How many numbers ``0-3,8`` are."""
    parts = [part.split("-") for part in text.strip().split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in parts)
