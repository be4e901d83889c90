"""A probe of a table, with what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from hookline.lab import Family

Verdict: TypeAlias = Literal["allow", "deny"]


@dataclass(slots=True)
class Row:
    """One probe in one address family.

    Attributes:
        test: The table's ``metadata.name``.
        step: 0 before the first of its steps, then 1, 2, …
        source: The end that asks, as the table has it; ``target`` likewise.
        protocol: ``TCP``, ``UDP`` or ``SCTP``.
        offline: What the evaluator says; None where that was not asked.
        live: What became of the packets: ``allow``, ``deny``, or what is neither (``unanswered``, ``refused``, ``unreachable``);
            None where none were sent.
        decided_by: The policy and rule that decide, in words.
        seen: What was seen of the packets, in words.
    """

    test: str
    step: int
    source: str
    target: str
    port: int
    protocol: str
    family: Family
    expect: Verdict
    offline: Verdict | None = None
    live: str | None = None
    decided_by: str | None = None
    seen: str = ""

    @property
    def mismatch(self) -> bool:
        """Whether a mode that ran says something else than the table."""
        return any(found not in (None, self.expect) for found in (self.offline, self.live))

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "test": self.test,
            "step": self.step,
            "from": self.source,
            "to": self.target,
            "port": self.port,
            "protocol": self.protocol,
            "family": self.family,
            "expect": self.expect,
            "offline": self.offline,
            "live": self.live,
            "decidedBy": self.decided_by,
        }
