"""What can go wrong with an agent, and errors as they travel over its socket."""

from __future__ import annotations

from typing import Any

from hookline.control import Conflict, ControlError, DoesNotFit, NotThere, StateError
from hookline.errors import HooklineError


class AgentError(HooklineError):
    """An agent that cannot be started or asked."""


class AgentHangs(AgentError):  # noqa: N818
    """An agent that is there and does not answer: nothing was asked of it, and nothing will be done later."""


class BadRequest(AgentError):  # noqa: N818
    """A request that does not say what the interface asks for."""


class RemoteFailure(AgentError):  # noqa: N818
    """What the agent says of an error whose class this process does not know. Its exit status travels with it."""

    def __init__(self, what: str, *, why: str = "", remedy: str = "", exit_status: int = 1) -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.__dict__["exit_status"] = exit_status


KNOWN: dict[str, type[HooklineError]] = {
    kind.__name__: kind for kind in (Conflict, ControlError, DoesNotFit, NotThere, StateError, AgentError)
}


def unexpected(error: BaseException) -> HooklineError:
    """What is said of an error that nobody expected."""
    return HooklineError(
        f"an unexpected {type(error).__name__}: {error}",
        why="this is a fault of Hookline itself",
        remedy="the agent's log shows where; please report it",
    )


def to_wire(error: BaseException) -> dict[str, Any]:
    """An error as JSON: ``{error, why, remedy, type, exit_status}``."""
    if not isinstance(error, HooklineError):
        error = unexpected(error)
    return {**error.as_dict(), "type": type(error).__name__, "exit_status": error.exit_status}


def http_status(error: BaseException) -> int:
    """The HTTP status that goes with an error."""
    match error:
        case Conflict():
            return 409
        case NotThere():
            return 404
        case HooklineError():
            return 422
    return 500


def from_wire(document: dict[str, Any]) -> HooklineError:
    """The error that `to_wire` wrote, of its own class where that has nothing beside what, why and remedy."""
    known = KNOWN.get(document.get("type", ""))
    what, why, remedy = (str(document.get(name, "")) for name in ("error", "why", "remedy"))
    if known is not None:
        return known(what, why=why, remedy=remedy)
    return RemoteFailure(what, why=why, remedy=remedy, exit_status=int(document.get("exit_status", 1)))
