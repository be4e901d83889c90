"""Which connections a change of documents would allow or deny."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hookline.policy._decision import Decision, Probe
from hookline.policy._world import World


@dataclass(frozen=True, slots=True)
class Impact:
    """A connection whose verdict changes."""

    probe: Probe
    before: Decision
    after: Decision


def impact(before: World, after: World, probes: Iterable[Probe], *, audited: bool = False) -> list[Impact]:
    """The connections among these whose verdict differs between two worlds, in their order, each once.

    Args:
        audited: Audited policies count as if they were enforced.

    Raises:
        PolicyError: An end is in neither world.
    """
    raise NotImplementedError
