"""Tries tables: offline, live, or both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

from hookline import policy
from hookline.model.names import Endpoint
from hookline.trials._rows import Row
from hookline.trials._tables import Asked, Step, read_tables

Mode: TypeAlias = Literal["offline", "live", "both"]
Progress: TypeAlias = Callable[[str, int, int], None]


def run(
    paths: Iterable[str | os.PathLike[str]],
    *,
    mode: Mode = "both",
    datapath: bool = True,
    lab_name: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Row]:
    """Tries every probe of the tables in these files and folders.

    Args:
        paths: Files and folders.
        mode: Whom to ask: the evaluator, real packets, or both.
        datapath: False: the live probes run with the programs left out, which lets everything through.
        lab_name: What the lab is called while it is there.
        progress: Told what is being done, and how many probes of how many are done.

    Returns:
        A row for each probe and address family, in the order of the tables.

    Raises:
        model.InvalidResource: A document is wrong; nothing was tried.
        TrialError: A table asks for what cannot be tried; nothing was tried.
        HooklineError: The lab cannot be made, or a node refuses a step's resources.
    """
    steps = read_tables(paths)
    rows = [[_row(step, asked) for asked in step.asked] for step in steps]
    decide(steps, rows, asked=mode != "live")
    if mode != "offline":
        from hookline.trials import _live  # nodes and programs are not for those who only think

        _live.run(steps, rows, lab_name=lab_name, datapath=datapath, progress=progress)
    return [row for mine in rows for row in mine]


def decide(steps: Sequence[Step], rows: Sequence[Sequence[Row]], *, asked: bool) -> None:
    """Fills in what the evaluator says, and what decides.

    Args:
        steps: The steps, and ``rows`` the rows of each.
        asked: Whether the verdict itself is wanted, and not only what decides.
    """
    for step, mine in zip(steps, rows, strict=True):
        evaluator = policy.Evaluator(policy.World.of(step.resources))
        for row, one in zip(mine, step.asked, strict=True):
            source = Endpoint.parse(one.source).member
            probe = policy.Probe(source, one.destination, one.protocol, one.listening, one.family)
            decision = evaluator.decide(probe)
            row.decided_by = decision.decided_by
            if asked:
                row.offline = "allow" if decision.allowed else "deny"


def _row(step: Step, asked: Asked) -> Row:
    return Row(
        step.test,
        step.number,
        asked.source,
        asked.target,
        asked.port,
        asked.protocol,
        asked.family,
        asked.expect,
    )
