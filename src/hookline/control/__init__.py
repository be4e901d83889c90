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
from hookline.control.moves import Moves
from hookline.control.node import Applied, BackendStatus, Counted, Covered, Node, PoolStatus, load
from hookline.control.placement import Placement
from hookline.control.plan import Plan, PoolSummary, ResourceChange, Usage
from hookline.control.pools import Frontend, Pool, Target
from hookline.control.recovery import Recovery, Unclaimed
from hookline.control.state import Generation

__all__ = [
    "Applied",
    "BackendStatus",
    "Conflict",
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
    "Pool",
    "PoolStatus",
    "PoolSummary",
    "Recovery",
    "Repair",
    "Repaired",
    "ResourceChange",
    "StateDamaged",
    "StateError",
    "TableRefused",
    "Target",
    "Unclaimed",
    "Usage",
    "load",
]
