"""What can go wrong with a lab."""

from __future__ import annotations

from typing import ClassVar

from hookline.errors import HooklineError


class LabError(HooklineError):
    """A lab that cannot be made, found, changed or removed."""


class LabNotPermitted(LabError):  # noqa: N818
    """This user may not make labs. Exit status 3."""

    exit_status: ClassVar[int] = 3


class ProbeFailed(LabError):  # noqa: N818
    """A probe got no answer. ``reason`` is ``refused``, ``timeout``, ``unreachable``, ``closed``."""

    def __init__(self, what: str, *, why: str, reason: str, remedy: str = "") -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.reason = reason

    def as_dict(self) -> dict[str, str]:
        """The error as the ``--json`` form, with its reason as one word."""
        return {**super().as_dict(), "reason": self.reason}
