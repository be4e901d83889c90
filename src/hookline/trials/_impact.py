"""What a change of documents would mean to the connections that a node has open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hookline import policy
from hookline.datapath.firewall.firewall import Tracked
from hookline.model import Resource

_WITH_PORTS = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class Changed:
    """A connection that gets another verdict.

    Attributes:
        source: The address that opened it; ``target`` the other.
        port: The target's; 0 for protocols without ports.
        before: ``allow`` or ``deny``; ``after`` likewise.
        decided_by: What decides afterwards, in words.
    """

    source: str
    target: str
    port: int
    protocol: str
    before: str
    after: str
    decided_by: str

    def as_dict(self) -> dict[str, Any]:
        """The change as plain values."""
        return {
            "from": self.source,
            "to": self.target,
            "port": self.port,
            "protocol": self.protocol,
            "before": self.before,
            "after": self.after,
            "decidedBy": self.decided_by,
        }


def probes(connections: Iterable[Tracked]) -> list[policy.Probe]:
    """The connections that are open, as questions, each once: one between two pods of a node is recorded at both."""
    found: dict[policy.Probe, None] = {}
    for one in connections:
        if one.cut or one.state == "closed":
            continue
        outgoing = one.direction == "egress"
        source, target = (one.local, one.remote) if outgoing else (one.remote, one.local)
        protocol = _WITH_PORTS.get(one.protocol, one.protocol)
        port = (one.remote_port if outgoing else one.local_port) if one.protocol in _WITH_PORTS else 0
        found[policy.Probe(str(source), str(target), protocol, port, source.version)] = None
    return list(found)


def impact(
    before: policy.World, new: Sequence[Resource], connections: Sequence[policy.Probe]
) -> list[Changed]:
    """Which of these connections the world would judge otherwise with these objects added or replaced."""
    after = before.changed([], new)
    return [
        Changed(
            one.probe.source,
            one.probe.destination,
            one.probe.port,
            str(one.probe.protocol),
            _verdict(one.before),
            _verdict(one.after),
            one.after.decided_by,
        )
        for one in policy.impact(before, after, connections)
    ]


def _verdict(decision: policy.Decision) -> str:
    return "allow" if decision.allowed else "deny"
