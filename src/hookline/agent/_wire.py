"""The agent's data as JSON: what it sends is what `hookline.control` has, member by member.

pydantic reads the dataclasses' own annotations, so a member that is added there travels without a word here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from hookline.control import Applied, Covered, Generation, Plan, PoolStatus
from hookline.control.verdicts import RuleCount
from hookline.datapath.firewall.firewall import Totals as FirewallTotals
from hookline.datapath.loadbalancer.balancer import Attachment, Totals
from hookline.datapath.pinning import Direction
from hookline.model import Origin, Resource, parse

_BYTES = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

APPLIED = TypeAdapter(Applied)
PLAN = TypeAdapter(Plan)
STATUSES: TypeAdapter[list[PoolStatus]] = TypeAdapter(list[PoolStatus], config=_BYTES)
GENERATIONS: TypeAdapter[list[Generation]] = TypeAdapter(list[Generation])
TOTALS: TypeAdapter[Totals | None] = TypeAdapter(Totals | None)
ATTACHMENTS: TypeAdapter[list[Attachment]] = TypeAdapter(list[Attachment])
RULE_COUNTS: TypeAdapter[list[RuleCount]] = TypeAdapter(list[RuleCount])


def dump_statuses(statuses: list[PoolStatus]) -> bytes:
    """Pools as JSON. Of a health check only what was said: what is for other types of check would be refused at the other end."""
    return STATUSES.dump_json(statuses, exclude_unset=True)


@dataclass(slots=True)
class Item:
    """An object on its way: the document, and the file (or other source) and line that it is from."""

    object: dict[str, Any]
    source: str = ""
    line: int = 1

    def resource(self) -> Resource:
        """The object itself.

        Raises:
            model.InvalidResource: It is none.
        """
        return parse(self.object, Origin(self.source, self.line) if self.source else None)


@dataclass(slots=True)
class Change:
    """What a client asks the agent to do."""

    items: list[Item]
    prune: Covered | None = None
    delete: tuple[str, ...] = ()


@dataclass(slots=True)
class Update:
    """What changed since the last line of a watch: pools that are new or different, keys of those that are gone.

    ``whole`` marks the first line, which has all pools.
    """

    pools: list[PoolStatus]
    gone: list[int]
    whole: bool = False


@dataclass(slots=True)
class PolicyTotals:
    """The firewall's counters without those of rules: JSON has no keys that are pairs."""

    reasons: list[tuple[Direction, str, int, int]]
    drops: list[str]
    suppressed: int
    lost: int

    @classmethod
    def of(cls, totals: FirewallTotals | None) -> PolicyTotals | None:
        """Ready to be sent."""
        if totals is None:
            return None
        reasons = [(*key, *pair) for key, pair in totals.reasons.items()]
        return cls(reasons, sorted(totals.drops), totals.suppressed, totals.lost)

    def totals(self) -> FirewallTotals:
        """What was sent."""
        return FirewallTotals(
            {(direction, reason): (packets, octets) for direction, reason, packets, octets in self.reasons},
            frozenset(self.drops),
            suppressed=self.suppressed,
            lost=self.lost,
        )


POLICY_TOTALS: TypeAdapter[PolicyTotals | None] = TypeAdapter(PolicyTotals | None)
CHANGE = TypeAdapter(Change)
ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
UPDATE: TypeAdapter[Update] = TypeAdapter(Update)


def items(resources: Iterable[tuple[Resource, str]]) -> list[Item]:
    """Objects with their sources, ready to be sent."""
    return [
        Item(resource.to_document(), source, resource.origin.line if resource.origin else 1)
        for resource, source in resources
    ]


def update_json(pools: list[PoolStatus], gone: list[int], *, whole: bool) -> bytes:
    """One line of a watch, without its end."""
    text = dump_statuses(pools).decode()
    return f'{{"pools":{text},"gone":{gone},"whole":{"true" if whole else "false"}}}'.encode()


def read_update(line: str | bytes) -> Update:
    """What `update_json` wrote."""
    import json

    document = json.loads(line)
    return Update(STATUSES.validate_json(json.dumps(document["pools"])), document["gone"], document["whole"])
