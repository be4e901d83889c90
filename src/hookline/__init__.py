"""Hookline: an eBPF data plane for a Linux node, operated from Python.

    import hookline

    with hookline.Node("host") as node:
        node.apply("services.yaml")
        for pool in node.services():
            print(pool.pool.service, pool.connections, pool.packets)

`Node` is the way in for most. `hookline.lab` makes clusters to try things in, `hookline.bpf` is for those who write kernel
programs of their own. Every error is a `HooklineError`. What is named here is imported on first use: it needs NumPy and
pydantic, which ``hookline --help`` does not.
"""

from typing import TYPE_CHECKING, Any

from hookline.errors import HooklineError

if TYPE_CHECKING:
    from hookline.api import Node, lab_down, lab_up, refresh_lab

__all__ = ["HooklineError", "Node", "__version__", "lab_down", "lab_up", "refresh_lab"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hookline import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
