"""Policies on trial: tables that say who may reach whom, held against what policies mean and against real packets.

    rows = hookline.trials.run(["tests/policy"], mode="both")
    [row for row in rows if row.mismatch]

A table is a `PolicyTest`: resources, probes with what is expected of each, and steps that change the resources in between.
*Offline* asks `policy.evaluate`. *Live* makes a lab, brings its nodes to the resources with `control.Node`, and sends every probe
as real packets. Neither knows of the other.
"""

from hookline.trials._audit import set_audit
from hookline.trials._blame import Blame
from hookline.trials._errors import TrialError
from hookline.trials._impact import Changed, Impact, impact
from hookline.trials._rows import Row, Verdict
from hookline.trials._run import Mode, run
from hookline.trials._tables import Asked, Step, read_tables

__all__ = [
    "Asked",
    "Blame",
    "Changed",
    "Impact",
    "Mode",
    "Row",
    "Step",
    "TrialError",
    "Verdict",
    "impact",
    "read_tables",
    "run",
    "set_audit",
]
