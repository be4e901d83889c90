"""What can go wrong between what is wanted and what is."""

from __future__ import annotations

from collections.abc import Iterable

from hookline.errors import HooklineError


class ControlError(HooklineError):
    """A change cannot be planned, applied or adopted; nothing was changed unless the text says so."""


class Conflict(ControlError):  # noqa: N818
    """Two objects want the same thing, or somebody else has it."""


class DoesNotFit(ControlError):  # noqa: N818
    """A map of the size that it has cannot hold what is wanted."""


class TableRefused(ControlError):  # noqa: N818
    """A table that was just built is not what its backends' weights ask for; the one before it is in use."""


class NotThere(ControlError):  # noqa: N818
    """An object, a kind or a node that was named does not exist."""

    @classmethod
    def of(cls, reference: str, known: Iterable[str], node: object) -> NotThere:
        """The error for an object, which names those of its kind that there are."""
        kind = reference.partition("/")[0]
        there = [name for name in known if name.startswith(f"{kind}/")]
        return cls(
            f"{reference} does not exist on node {node}",
            why=f"there {'is' if len(there) == 1 else 'are'} {', '.join(there[:5])}{' …' * (len(there) > 5)}"
            if there
            else f"it has no {kind}",
            remedy=f"hookline get all --node {node}",
        )


class StateError(ControlError):
    """The node's wanted state cannot be read or written."""


class StateDamaged(StateError):  # noqa: N818
    """The file of the node's wanted state does not hold what was written to it."""
