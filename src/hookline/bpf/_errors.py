"""What can go wrong with eBPF, as types that name the missing thing and its remedy.

BpfError                a bpf(2), netlink or libbpf call failed; ``.errno``
├── ObjectError         an object file that cannot be used
├── VerifierError       the verifier refused a program; ``.log`` has its whole log
├── MapFull             a map has no room for another entry
├── LinkChanged         a link or hook is not in the state that the caller expected
├── TargetError         a text that names no place to attach to; exit status 2
├── FeatureMissing      this kernel lacks something; exit status 3
└── NotPermitted        this user lacks a capability; exit status 3
"""

from __future__ import annotations

import errno as errnos
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hookline.errors import HooklineError

if TYPE_CHECKING:
    from hookline.bpf._objects._source import SourceMap, SourcePlace

__all__ = [
    "BpfError",
    "FeatureMissing",
    "LinkChanged",
    "MapFull",
    "NotPermitted",
    "ObjectError",
    "TargetError",
    "VerifierError",
    "failure",
    "in_user_namespace",
    "lacking",
]

_LOG_FULL = 28
END_CHARACTERS = 1 << 16
ENOTSUPP = 524
"""The kernel's own "operation not supported", which the C library has no name for."""

_CAPABILITY_BITS = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_IMPLIED_BY_SYS_ADMIN = {"CAP_PERFMON", "CAP_BPF", "CAP_SYS_ADMIN"}


class BpfError(HooklineError):
    """A bpf(2), netlink or libbpf call failed; `errno` is the kernel's answer, or 0 where there was none."""

    def __init__(self, what: str, *, errno: int = 0, why: str = "", remedy: str = "") -> None:
        super().__init__(what, why=why or (_errno_text(errno) if errno else ""), remedy=remedy)
        self.errno = errno


class ObjectError(BpfError):
    """An object file that cannot be used as it is."""


class MapFull(BpfError):  # noqa: N818
    """A map has no room for another entry."""


class LinkChanged(BpfError):  # noqa: N818
    """A link or hook is not in the state that the caller expected; nothing was changed."""


class TargetError(BpfError):
    """A text that says where to attach, and cannot be one: exit status 2, since it came from a command line."""

    exit_status: ClassVar[int] = 2


class FeatureMissing(BpfError):  # noqa: N818
    """This kernel lacks something.

    Args:
        feature: What is missing, by the kernel's name for it.
        minimum_kernel: The first mainline release that has it, such as ``"6.6"``.
    """

    exit_status: ClassVar[int] = 3

    def __init__(
        self, feature: str, *, minimum_kernel: str = "", errno: int = 0, why: str = "", remedy: str = ""
    ) -> None:
        if not why:
            why = f"this kernel is {os.uname().release}"
            if minimum_kernel:
                why = f"it needs Linux {minimum_kernel} or newer; {why}"
        if not remedy:
            newer = f"run Linux {minimum_kernel} or newer, configured with it"
            remedy = newer if minimum_kernel else "run a kernel that has it"
        super().__init__(f"the kernel has no {feature}", errno=errno, why=why, remedy=remedy)
        self.feature = feature
        self.minimum_kernel = minimum_kernel


class NotPermitted(BpfError):  # noqa: N818
    """The kernel refused for want of a capability, or by its own policy.

    Args:
        what: What was refused.
        capability: The capability that it takes, such as ``"CAP_BPF"``; several joined by a space.
    """

    exit_status: ClassVar[int] = 3

    def __init__(
        self, what: str, *, capability: str, errno: int = 1, why: str = "", remedy: str = ""
    ) -> None:
        missing = lacking(*capability.split())
        cause, usual = _refusal(missing)
        super().__init__(what, errno=errno, why=why or cause, remedy=remedy or usual)
        self.capability = capability


class VerifierError(BpfError):
    """The kernel's verifier refused a program.

    ``str()`` is what the verifier means in plain words, its own last meaningful lines, the source line and the usual mend.

    Attributes:
        program: The program's name.
        log: The verifier's whole log.
        excerpt: Its last meaningful lines, on one line.
        omitted: How many other lines the log has.
        instruction: The number of the instruction that was refused, None where the refusal is of the whole program.
        source: The line of C that the refusal is about, None where the object has no line information.
        advice: What the verifier means, in plain words; ``""`` for a message that is not known here.
        mend: What usually helps.
    """

    def __init__(
        self,
        program: str,
        log: str,
        *,
        errno: int = 0,
        lines: SourceMap | None = None,
    ) -> None:
        from hookline.bpf._objects._advice import advise

        self.program = program
        self.log = log
        self.excerpt, self.omitted = summary(log)
        if errno == _LOG_FULL and not _STATISTICS.search(log.rstrip().rpartition("\n")[2]):
            # Before Linux 6.4 a log without room ends without a reason; only a program that is far too large fills it.
            self.excerpt, log = "the log is full", "BPF program is too large"
        (self.advice, self.mend), parts = advise(log[-END_CHARACTERS:])
        self.instruction = _instruction(self.log[-END_CHARACTERS:])
        shown = int(parts["alloc"]) if "alloc" in parts else self.instruction
        self.source = _source(self.log[-END_CHARACTERS:], program, shown, lines)
        super().__init__(
            f"the verifier refused program {program!r}" + (f" at {self.source}" if self.source else ""),
            errno=errno,
            why=f"{self.advice} [{self.excerpt}]" if self.advice else self.excerpt,
            remedy=self.mend
            + (f"; {_count(self.omitted)} of its log omitted: .log has all" if self.omitted else ""),
        )


def failure(errno: int, what: str, *, capability: str = "CAP_BPF", remedy: str = "") -> BpfError:
    """The error for a kernel's answer: `NotPermitted` for EPERM, else `BpfError`."""
    if errno == 1:
        return NotPermitted(what, capability=capability)
    return BpfError(what, errno=errno, remedy=remedy or _USUAL_REMEDIES.get(errno, ""))


_DOCTOR = "check what is asked for against what this kernel has: hookline doctor"
_USUAL_REMEDIES = {
    errnos.EINVAL: _DOCTOR,
    errnos.EOPNOTSUPP: _DOCTOR,
    ENOTSUPP: _DOCTOR,
    errnos.ENOENT: "look again: it has gone, or never was",
    errnos.ENODEV: "look at the interfaces: ip link",
    errnos.ENXIO: "look at the interfaces: ip link",
    errnos.EBUSY: "wait until its owner lets go, or end that",
    errnos.EACCES: "look at its flags: it may be for reading or for writing only",
    errnos.ENOMEM: "free memory, or ask for less",
    errnos.E2BIG: "ask for less",
}
"""What to do about the kernel's answers where the caller knows nothing better."""


# Lines that the verifier writes after the reason, or that carry no reason.
_STATISTICS = re.compile(r"^(processed \d+ insns|verification time|stack depth|mark_precise|max_states)")
_SOURCE = re.compile(r"^; ")
_INSTRUCTION = re.compile(r"^\d+: \(")
_STATE = re.compile(r"^(\d+: R\d|cur state|old state|R\d+_?w?=|from \d+ to \d+|last_idx|regs=|parent |\s*$)")
_NO_REASON = (_STATISTICS, _SOURCE, _INSTRUCTION, _STATE)


def summary(log: str) -> tuple[str, int]:
    """The last meaningful lines of a verifier's log on one line, and how many other lines there were.

    These are the reason, and before it the instruction and the source line it was given for, where known.
    """
    # A log may have a million lines of steps; the reason stands at its end.
    end = log[-END_CHARACTERS:]
    before = log.count("\n") - end.count("\n")
    lines = [line.rstrip() for line in end.replace("\0", "").splitlines() if line.strip()]
    reasons = [index for index, line in enumerate(lines) if not any(p.match(line) for p in _NO_REASON)]
    if not reasons:
        return "it gave no reason", before + len(lines)
    last = first = reasons[-1]
    while first - 1 in reasons and last - first < 2:
        first -= 1
    shown = [" / ".join(lines[first : last + 1])]
    used = last + 1 - first
    for pattern in (_INSTRUCTION, _SOURCE):
        for line in reversed(lines[max(0, first - 40) : first]):
            if pattern.match(line):
                shown.append(f"at `{_bare(line)}`")
                used += 1
                break
    return " ".join(shown), before + len(lines) - used


def _bare(line: str) -> str:
    """An instruction without the verifier's state behind it, a source line without its place."""
    return re.sub(r"\s+;.*$|\s+\d+: R\d.*$|\s+@ \S+:\d+$", "", line.removeprefix("; ").strip())


def _instruction(log: str) -> int | None:
    """The instruction that the last reason is about."""
    named = re.search(r"^(?:infinite loop detected at|back-edge from) insn (\d+)", log, re.MULTILINE)
    if named:
        return int(named[1])
    if re.search(r"^combined stack size of|^unreachable insn|^jump out of range", log, re.MULTILINE):
        return None
    found = re.findall(r"^(\d+): (?:\([0-9a-f]{2}\)|<invalid)", log, re.MULTILINE)
    return int(found[-1]) if found else None


def _source(log: str, program: str, instruction: int | None, lines: SourceMap | None) -> SourcePlace | None:
    """The line of C by the object, else by the log (Linux 6.9 writes ``; text @ file.c:12``)."""
    found = lines.find(program, instruction or 0) if lines else None
    if found is not None or instruction is None:
        return found
    from hookline.bpf._objects._source import SourcePlace

    told = re.findall(r"; (.*?) @ (\S+):(\d+)$", log, re.MULTILINE)
    return SourcePlace(told[-1][1], int(told[-1][2]), told[-1][0].strip()) if told else None


def _count(lines: int) -> str:
    return f"{lines} line{'s' if lines != 1 else ''}"


def _errno_text(errno: int) -> str:
    if errno == ENOTSUPP:
        return "the kernel does not support this operation (ENOTSUPP)"
    return os.strerror(errno)


def lacking(*capabilities: str) -> list[str]:
    """Those of these capabilities, ``"CAP_BPF"`` and so on, that this thread does not hold."""
    return [name for name in capabilities if not _holds(name)]


def _holds(capability: str) -> bool:
    """Whether this thread holds a capability, in its own user namespace."""
    try:
        status = Path("/proc/thread-self/status").read_text()
    except OSError:
        return False
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    held = int(found[1], 16) if found else 0
    if capability in _IMPLIED_BY_SYS_ADMIN and held >> _CAPABILITY_BITS["CAP_SYS_ADMIN"] & 1:
        return True
    return bool(held >> _CAPABILITY_BITS[capability] & 1)


def _refusal(missing: list[str]) -> tuple[str, str]:
    """Why a call was not permitted, and the remedy."""
    if missing:
        why = f"this process lacks {' and '.join(missing)}"
        if _in_container():
            flags = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in missing)
            return why, f"start the container with {flags}, or with --privileged"
        return why, "run it as root, for example with sudo"
    if in_user_namespace():
        return (
            "the process is root in a user namespace only, and eBPF needs it in the first one",
            "run it in the host's user namespace: rootful containers, --userns=host",
        )
    return (
        "the kernel's policy refuses it although the capability is held",
        "see /sys/kernel/security/lockdown, the kernel's configuration and any seccomp profile",
    )


def _in_container() -> bool:
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv") or os.environ.get("container"):  # noqa: SIM112
        return True
    try:
        return any(
            name in Path("/proc/1/cgroup").read_text() for name in ("docker", "kubepods", "containerd", "lxc")
        )
    except OSError:
        return False


def in_user_namespace() -> bool:
    """Whether this process's root is only a user namespace's, to which the kernel gives no eBPF."""
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False
