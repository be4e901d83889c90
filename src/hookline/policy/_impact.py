"""Which connections a change of documents would allow or deny."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hookline.policy._decision import Decision, Probe
from hookline.policy._evaluate import Evaluator
from hookline.policy._world import World


@dataclass(frozen=True, slots=True)
class Impact:
    """A connection whose verdict changes."""

    probe: Probe
    before: Decision
    after: Decision


def impact(before: World, after: World, probes: Iterable[Probe], *, audited: bool = False) -> list[Impact]:
    """The connections among these whose verdict differs between two worlds, in their order, each once.

    Probes of recorded connections name both ends by address, so nobody can be unknown.

    Args:
        audited: Audited policies count as if they were enforced.

    Raises:
        PolicyError: An end that is given by name is not in one of the worlds.
    """
    old, new = Evaluator(before, audited=audited), Evaluator(after, audited=audited)
    found = []
    for probe in dict.fromkeys(probes):
        was, becomes = old.decide(probe), new.decide(probe)
        if was.allowed != becomes.allowed:
            found.append(Impact(probe, was, becomes))
    return found
