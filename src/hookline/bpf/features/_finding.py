"""What a probe answers, and the words for each kind of refusal."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum

from hookline.bpf._errors import BpfError, FeatureMissing, NotPermitted, in_user_namespace, lacking

__all__ = ["Answer", "Finding", "no", "refused", "unknown", "yes"]


class Answer(Enum):
    """What a probe found."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "could not tell"


@dataclass(frozen=True)
class Finding:
    """A probe's answer and why. It is true where the answer is yes.

    Attributes:
        feature: What was asked for.
        answer: Yes, no, or could not tell.
        why: What the kernel said.
        minimum_kernel: The first mainline release that has it, such as ``"6.6"``; ``""`` where it is not known.
        config: The options of the kernel's configuration that it takes, such as ``("CONFIG_NETKIT",)``.
        capability: Where the answer is "could not tell" for want of rights: what it takes, joined by spaces.
        policy: The kernel has it and refuses it all the same (EPERM with every capability held).
    """

    feature: str
    answer: Answer
    why: str
    minimum_kernel: str = ""
    config: tuple[str, ...] = ()
    capability: str = ""
    policy: bool = False

    def __bool__(self) -> bool:
        return self.answer is Answer.YES

    def error(self) -> BpfError:
        """The error for something that needs this feature and cannot have it.

        Returns:
            `NotPermitted` where a capability or the kernel's policy is in the way, else `FeatureMissing`.
        """
        if self.capability or self.policy:
            return NotPermitted(
                f"cannot use {self.feature}", capability=self.capability or "CAP_BPF", why=self.why
            )
        return FeatureMissing(self.feature, minimum_kernel=self.minimum_kernel, why=self.why)


def yes(feature: str, why: str) -> Finding:
    return Finding(feature, Answer.YES, why)


def no(feature: str, why: str) -> Finding:
    return Finding(feature, Answer.NO, why)


def unknown(feature: str, why: str) -> Finding:
    return Finding(feature, Answer.UNKNOWN, why)


def refused(feature: str, *capabilities: str) -> Finding:
    """What EPERM means: rights that are missing hide the answer, and with all of them it is policy, a no."""
    missing = lacking(*capabilities)
    if missing:
        why = f"this process lacks {' and '.join(missing)}"
        return Finding(feature, Answer.UNKNOWN, why, capability=" ".join(capabilities))
    if in_user_namespace():
        why = "the process is root in a user namespace only, and eBPF needs it in the first one"
        return Finding(feature, Answer.UNKNOWN, why, capability=" ".join(capabilities))
    why = f"the kernel's policy refuses it (EPERM although {' and '.join(capabilities)} are held)"
    return Finding(feature, Answer.NO, why, policy=True)


def version(release: str) -> tuple[int, int]:
    """``"6.12.74+deb13"`` → ``(6, 12)``."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_older_than(minimum: str) -> bool:
    """Whether this kernel's release is below ``"6.6"``."""
    return bool(minimum) and version(os.uname().release) < version(minimum)
