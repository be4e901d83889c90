"""A question about one connection, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

Address = IPv4Address | IPv6Address
Direction = Literal["ingress", "egress"]

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58}


@dataclass(frozen=True, slots=True)
class Probe:
    """A connection that somebody would open, as the packet looks after any service translation.

    Attributes:
        source: ``namespace/pod``, ``external/name``, ``node/name`` or an address.
        destination: The same.
        protocol: ``TCP``, ``UDP``, ``SCTP``, ``ICMP``, or an IP protocol's number.
        port: The destination's port; 0 for protocols without ports.
        version: 4 or 6; None: the first family that both ends have, or that the given address is of.
    """

    source: str
    destination: str
    protocol: str | int = "TCP"
    port: int = 0
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one end says: the source's in direction egress, the destination's in direction ingress.

    Attributes:
        allowed: Whether this end lets the connection be.
        isolated: Whether any policy selects this end in this direction.
        why: One line: what decided.
        policy: `Resource.reference` of the policy whose rule allows it; where it is denied the first that isolates.
        rule: The rule's place in the policy's list for this direction, from 0; None where no rule decided.
        peer: The peer of the rule that matched, in words: ``podSelector {app=a}``.
        port: The ports of the rule that matched, in words: ``80-90/TCP``.
        policies: References of all policies that isolate this end in this direction, sorted.
    """

    allowed: bool
    isolated: bool
    why: str
    policy: str = ""
    rule: int | None = None
    peer: str = ""
    port: str = ""
    policies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on a `Probe`; the connection is allowed where both ends allow it.

    Attributes:
        source: The address that the connection comes from.
        destination: The address that it goes to.
    """

    allowed: bool
    egress: Side
    ingress: Side
    source: Address
    destination: Address

    @property
    def decided_by(self) -> str:
        """One line: the end that denies, or for an allowed connection what each isolated end allows it by."""
        if not self.egress.allowed:
            return f"egress: {self.egress.why}"
        if not self.ingress.allowed:
            return f"ingress: {self.ingress.why}"
        sides = (("egress", self.egress), ("ingress", self.ingress))
        isolated = [f"{name}: {side.why}" for name, side in sides if side.isolated]
        return "; ".join(isolated) or "no policy isolates either end"
