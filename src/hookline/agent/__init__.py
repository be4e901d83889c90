"""The long-running process of one node: files are watched and applied, drift is repaired, clients are answered.

`run` is the process. `connect` finds a node's agent; the `RemoteNode` that it returns has the same calls as
`hookline.control.Node`. What is named here is imported when it is asked for: the client needs no server, and a command
without an agent neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline.agent._client import RemoteNode, connect
    from hookline.agent._errors import AgentError, AgentHangs
    from hookline.agent._run import Agent, Settings, run
    from hookline.agent._unit import unit_text
    from hookline.agent._watch import watch_node
    from hookline.agent._wire import Update

__all__ = [
    "Agent",
    "AgentError",
    "AgentHangs",
    "RemoteNode",
    "Settings",
    "Update",
    "connect",
    "run",
    "unit_text",
    "watch_node",
]

_PLACES = {
    "Agent": "_run",
    "AgentError": "_errors",
    "AgentHangs": "_errors",
    "RemoteNode": "_client",
    "Settings": "_run",
    "Update": "_wire",
    "connect": "_client",
    "run": "_run",
    "unit_text": "_unit",
    "watch_node": "_watch",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
