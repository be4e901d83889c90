"""What this kernel can do: yes, no, or could not tell, with the reason. Answers are asked for once."""

from __future__ import annotations

import errno as errnos
import functools
import os
from dataclasses import dataclass
from enum import Enum

from hookline.bpf import _syscall
from hookline.bpf._syscall import AttachType, Command

__all__ = ["Answer", "Finding", "btf", "tcx"]

# No interface has this index, so a probe changes nothing.
_NOWHERE = 0x7FFFFFFF


class Answer(Enum):
    """What a probe found."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "could not tell"


@dataclass(frozen=True)
class Finding:
    """A probe's answer and why.

    Attributes:
        feature: What was asked for.
        answer: Yes, no, or could not tell.
        why: What the kernel said.
    """

    feature: str
    answer: Answer
    why: str

    def __bool__(self) -> bool:
        return self.answer is Answer.YES


@functools.cache
def tcx() -> Finding:
    """Whether traffic control programs attach by links (Linux 6.6)."""
    # Asking an interface that does not exist: a kernel with tcx misses the interface, one without, the hook.
    attr = _syscall.attributes("IIIIQI4xQ", _NOWHERE, AttachType.TCX_INGRESS, 0, 0, 0, 0, 0)
    result = _syscall.call(Command.PROG_QUERY, attr)
    if result in (0, -errnos.ENODEV):
        return Finding("tcx", Answer.YES, "the kernel looks for the interface")
    if result == -errnos.EINVAL:
        return Finding("tcx", Answer.NO, "the kernel does not know the hook (Linux 6.6 or newer does)")
    return Finding("tcx", Answer.UNKNOWN, os.strerror(-result))


@functools.cache
def btf() -> Finding:
    """Whether the kernel carries its own types, which CO-RE needs (CONFIG_DEBUG_INFO_BTF)."""
    path = "/sys/kernel/btf/vmlinux"
    if os.access(path, os.R_OK):
        return Finding("btf", Answer.YES, f"{path} is there")
    return Finding("btf", Answer.NO, f"{path} cannot be read")
