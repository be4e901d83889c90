"""What cannot be evaluated or compiled."""

from hookline.errors import HooklineError


class PolicyError(HooklineError):
    """A question about policies that has no answer: an unknown pod, no address in common."""


class TooManyRows(PolicyError):  # noqa: N818  (named for what it is, as the other errors are)
    """The policies need more rows than the caller's limit.

    Attributes:
        needed: How many; at least so many where `is_exact` is false.
        limit: How many may be.
    """

    def __init__(self, needed: int, limit: int, *, is_exact: bool = True) -> None:
        self.needed = needed
        self.limit = limit
        self.is_exact = is_exact
        super().__init__(
            "the policies do not fit",
            why=f"they need {'' if is_exact else 'up to '}{needed} rows of rules, and there is room for {limit}",
            remedy="join policies that say the same, select pods by fewer different labels, or give the map more room",
        )
