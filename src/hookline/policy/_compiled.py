"""What the compiler makes: the rows that the kernel's programs look up, by the names of documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hookline.policy._decision import Direction

IdentityKey = tuple[bytes, int]
"""An address, 16 bytes (IPv4 as ::ffff:a.b.c.d), and how many of its bits count."""

RuleKey = tuple[int, int, int | None, int, int]
"""Rule set, identity (0 is any), protocol (None is any), port, and how many of the port's 16 bits count."""

ANY, WORLD, OWN_NODE = 0, 1, 2
FIRST_CLASS = 16
"""Identities from here on are classes of addresses; those below are said in docs/policy.md."""


@dataclass(frozen=True, slots=True)
class RuleSource:
    """Where a rule is written.

    Attributes:
        policy: The policy's `Resource.reference`.
        index: The rule's place in the policy's list of that direction, from 0.
    """

    policy: str
    direction: Direction
    index: int

    def __str__(self) -> str:
        return f"{self.policy} {self.direction}[{self.index}]"


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """The rule sets of a local pod or of the node.

    Attributes:
        ingress: Its rule set for what comes to it; 0: not isolated.
        egress: For what it sends.
        audit_ingress: The rule set with the audited policies too; 0: no audited policy selects it.
        audit_egress: The same for what it sends.
        default_allow_ingress: Of the node: what no rule allows is allowed nevertheless (``defaultVerdict: allow``).
        default_allow_egress: The same for what it sends.
    """

    ingress: int = 0
    egress: int = 0
    audit_ingress: int = 0
    audit_egress: int = 0
    default_allow_ingress: bool = False
    default_allow_egress: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """The rows for one node. A lookup of an address takes the longest prefix, of a rule the longest key.

    Attributes:
        identities: Identity and, for a local pod's address, its ``namespace/pod``, by prefix. What has no row is WORLD.
        rules: Number of the rule and whether it allows, by key.
        endpoints: Rule sets by ``namespace/pod`` of every local pod that policies can concern; the node's own by ``""``,
            which is there only while a HostPolicy selects the node.
        sources: Where each rule number that is in use is written.
    """

    identities: Mapping[IdentityKey, tuple[int, str | None]]
    rules: Mapping[RuleKey, tuple[int, bool]]
    endpoints: Mapping[str, PolicyRow]
    sources: Mapping[int, RuleSource]
