"""What keeps a table from being tried."""

from hookline.errors import HooklineError


class TrialError(HooklineError):
    """A table that asks for what cannot be tried: an unknown end of a probe, a pod that cannot be in a lab."""
