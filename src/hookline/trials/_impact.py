"""What a change of documents would mean to the connections that a node knows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hookline import control, policy
from hookline.control.verdicts import Connection

_WITH_PORTS = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class Changed:
    """A connection that would get another verdict.

    Attributes:
        source: Who opened it: a pod, node or machine outside by its name, else an address; ``target`` the other.
        port: The target's; 0 for protocols without ports.
        before: ``allow`` or ``deny``; ``after`` likewise.
        decided_by: What would decide, in words.
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


@dataclass(frozen=True, slots=True)
class Impact:
    """What would change.

    Attributes:
        connections: How many connections are known, those between the same ends on the same port once.
        changes: Those with another verdict.
    """

    connections: int
    changes: tuple[Changed, ...]


def impact(node: control.Node, what: Iterable[str | os.PathLike[str]]) -> Impact:
    """Which connections that a node's firewall knows would be judged otherwise, if these files were applied.

    Raises:
        model.InvalidResource: A document is wrong.
    """
    new = control.load(what)
    world = node.world()
    found: dict[policy.Probe, Connection] = {}
    for one in node.tracked():
        if one.cut or one.state == "closed":
            continue
        protocol = _WITH_PORTS.get(one.protocol, one.protocol)
        port = one.destination_port if one.protocol in _WITH_PORTS else 0
        ends = str(one.source_address), str(one.destination_address)
        found[policy.Probe(*ends, protocol, port, one.source_address.version)] = one
    changes = []
    for changed in policy.impact(world, world.changed((), new), found):
        one = found[changed.probe]
        changes.append(
            Changed(
                one.source,
                one.destination,
                changed.probe.port,
                str(changed.probe.protocol),
                _verdict(changed.before),
                _verdict(changed.after),
                changed.after.decided_by,
            )
        )
    return Impact(len(found), tuple(changes))


def _verdict(decision: policy.Decision) -> str:
    return "allow" if decision.allowed else "deny"
