"""Turns what is wanted into what is: plan, apply, adoption, pinned state.

`Node` is the way in. `pools` says what the documents mean, `placement` where backends are, `tables` what the kernel's maps must
hold, `state` keeps what is wanted, and the programs themselves are `hookline.datapath.loadbalancer`'s. `user_objects` loads
objects of users' own.
"""

from hookline.control._errors import (
    Conflict,
    ControlError,
    DoesNotFit,
    NotThere,
    StateDamaged,
    StateError,
    TableRefused,
)
from hookline.control.drift import Repair, Repaired
from hookline.control.loading import Covered, load
from hookline.control.moves import Moves
from hookline.control.node import Applied, Node
from hookline.control.placement import Placement
from hookline.control.plan import Plan, PolicyChange, PoolSummary, ResourceChange, Usage
from hookline.control.pools import Frontend, Pool, Target
from hookline.control.recovery import Recovery, Unclaimed
from hookline.control.state import Generation
from hookline.control.statuses import BackendStatus, Counted, PoolStatus
from hookline.control.verdicts import Connection, RuleCount, VerdictEvent, Verdicts

__all__ = [
    "Applied",
    "BackendStatus",
    "Conflict",
    "Connection",
    "ControlError",
    "Counted",
    "Covered",
    "DoesNotFit",
    "Frontend",
    "Generation",
    "Moves",
    "Node",
    "NotThere",
    "Placement",
    "Plan",
    "PolicyChange",
    "Pool",
    "PoolStatus",
    "PoolSummary",
    "Recovery",
    "Repair",
    "Repaired",
    "ResourceChange",
    "RuleCount",
    "StateDamaged",
    "StateError",
    "TableRefused",
    "Target",
    "Unclaimed",
    "Usage",
    "VerdictEvent",
    "Verdicts",
    "load",
]
