"""A small cluster of network namespaces on this machine, for demos, tests, benchmarks and policy trials.

    lab = hookline.lab.up(sources.files.load(["cluster.yaml"]), "demo")
    lab.probe("external/client", "default/orders-1:8080").answered_by   # 'default/orders-1'
    hookline.lab.down("demo")

Names are loaded on first use: the lab's server, a module of this package, starts with little.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline.lab._announce import Announcement
    from hookline.lab._client import Counts, ServerCounts
    from hookline.lab._ending import ending_in_order
    from hookline.lab._errors import LabError, LabNotPermitted, ProbeFailed
    from hookline.lab._lab import Lab, LabSummary, down, first_node, list_labs, resolve_node, up
    from hookline.lab._plan import LAB_KINDS, Family, Member, Plan, ServedPort, plan
    from hookline.lab._probe import Probe
    from hookline.lab._prober import Heard, Prober, Question

__all__ = [
    "LAB_KINDS",
    "Announcement",
    "Counts",
    "Family",
    "Heard",
    "Lab",
    "LabError",
    "LabNotPermitted",
    "LabSummary",
    "Member",
    "Plan",
    "Probe",
    "ProbeFailed",
    "Prober",
    "Question",
    "ServedPort",
    "ServerCounts",
    "down",
    "ending_in_order",
    "first_node",
    "list_labs",
    "plan",
    "resolve_node",
    "up",
]

_HOMES = {
    "Announcement": "_announce",
    "Counts": "_client",
    "Family": "_plan",
    "Heard": "_prober",
    "LAB_KINDS": "_plan",
    "LabError": "_errors",
    "LabNotPermitted": "_errors",
    "Member": "_plan",
    "Plan": "_plan",
    "Probe": "_probe",
    "ProbeFailed": "_errors",
    "Prober": "_prober",
    "Question": "_prober",
    "ServedPort": "_plan",
    "ServerCounts": "_client",
    "ending_in_order": "_ending",
    "plan": "_plan",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, '_lab')}"), name)
