"""From documents to the rows of one node, again and again, for the price of what changed."""

from __future__ import annotations

from collections.abc import Callable

from hookline.policy._compiled import Compiled, RuleSource
from hookline.policy._numbers import RuleNumbers
from hookline.policy._world import World


class Compiler:
    """Keeps what it knows between calls. Numbers of rule sets and identities follow from the documents alone.

    Args:
        number: Gives rules their numbers; the same rule must get the same number each time.
    """

    def __init__(self, number: Callable[[RuleSource], int] | None = None) -> None:
        self._number = number if number is not None else RuleNumbers()

    def compile(self, world: World, *, limit: int | None = None) -> Compiled:
        """The rows for the world's node.

        Args:
            limit: How many rows of rules there is room for; None: any number.

        Raises:
            TooManyRows: There are more; the compiler then starts afresh with the next world.
        """
        raise NotImplementedError
