"""Whether one connection is allowed, sentence by sentence as the specification has it."""

from __future__ import annotations

from hookline.policy._decision import Decision, Probe
from hookline.policy._world import World


class Evaluator:
    """Answers questions about one world; it remembers which policies select whom.

    Args:
        audited: Audited policies count as if they were enforced.
    """

    def __init__(self, world: World, *, audited: bool = False) -> None:
        self.world = world
        self.audited = audited

    def decide(self, probe: Probe) -> Decision:
        """The verdict, and what decided.

        Raises:
            PolicyError: An end is not in the world, or the two have no family in common.
        """
        raise NotImplementedError


def evaluate(world: World, probe: Probe, *, audited: bool = False) -> Decision:
    """The verdict on one connection; for many questions about one world an `Evaluator` is quicker.

    Raises:
        PolicyError: An end is not in the world, or the two have no family in common.
    """
    return Evaluator(world, audited=audited).decide(probe)
