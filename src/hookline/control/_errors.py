"""What can go wrong between what is wanted and what is."""

from __future__ import annotations

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


class StateError(ControlError):
    """The node's wanted state cannot be read or written."""
