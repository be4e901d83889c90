"""Measuring rows: on one CPU, and in a lab of their own where they need one."""

from __future__ import annotations

import contextlib
import secrets
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from hookline.bench._groups import GROUPS, Group, LeftOutError
from hookline.bench._rows import Row
from hookline.bench._settings import Settings, pinned
from hookline.errors import HooklineError

if TYPE_CHECKING:
    from hookline.lab import Lab

CLUSTER = """
apiVersion: v1
kind: Node
metadata: {name: node-1}
---
apiVersion: v1
kind: Pod
metadata: {name: pod}
spec: {nodeName: node-1}
---
apiVersion: hookline.dev/v1alpha1
kind: ExternalHost
metadata: {name: server}
spec: {addresses: [203.0.113.2, "2001:db8:203::2"]}
---
apiVersion: hookline.dev/v1alpha1
kind: ExternalHost
metadata: {name: client}
spec: {addresses: [203.0.113.3, "2001:db8:203::3"]}
"""


@dataclass(slots=True)
class Measured:
    """What a run found: rows, and why others were left out, by their ids."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def run(
    ids: Sequence[str] = (),
    settings: Settings | None = None,
    *,
    found: Callable[[Row], None] = lambda row: None,
) -> Measured:
    """Measures the rows of these ids, all of them by default.

    A lab is made only for rows that need one, and is gone afterwards, also when a signal ends the run.

    Args:
        ids: Which rows.
        settings: Rounds, CPU, and whom to tell.
        found: Told of each row as soon as it is there.

    Raises:
        UnknownRow: An id is not known.
        HooklineError: The lab cannot be made, or what was measured is wrong.
        NotPermitted: A row loads programs, and this process may not.
    """
    settings = settings or Settings()
    groups = groups_of(ids)
    if any(group.privileged for group in groups):
        _check_privileges()
    result = Measured()
    from hookline.lab import ending_in_order

    with ending_in_order() as check:

        def tell(row: str, number: int, of: int) -> None:
            check()
            told(row, number, of)

        told = settings.tell
        settings = replace(settings, tell=tell)
        for group in groups:
            if not group.lab:
                _measure(group, (), ids, settings, result, found)
        if any(group.lab for group in groups):
            with _lab() as lab:
                for group in groups:
                    if group.lab:
                        _measure(group, (lab,), ids, settings, result, found)
    return result


class UnknownRow(HooklineError):  # noqa: N818
    """An id that no row has. Exit status 2: it came from a command line."""

    exit_status: ClassVar[int] = 2


def groups_of(ids: Sequence[str]) -> list[Group]:
    """The groups of the rows of these ids; all where there are none.

    Raises:
        UnknownRow: No row has one of them.
    """
    known = [name for group in GROUPS for name in group.rows]
    for name in ids:
        if name not in known:
            there = textwrap.fill(f"there are {', '.join(known)}", 88)
            raise UnknownRow(f"there is no row {name!r}", why=there, remedy="hookline bench --list")
    return [group for group in GROUPS if not ids or not set(ids).isdisjoint(group.rows)]


def _check_privileges() -> None:
    from hookline import bpf

    for capability in ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"):
        if bpf.lacking(capability):
            raise bpf.NotPermitted("cannot measure what loads programs", capability=capability)


def _measure(
    group: Group,
    needed: tuple[Lab, ...],
    ids: Sequence[str],
    settings: Settings,
    result: Measured,
    found: Callable[[Row], None],
) -> None:
    function: Any = getattr(import_module(f"hookline.bench.{group.module}"), group.function)
    try:
        with pinned(settings.cpu):
            for row in function(settings, *needed):
                if not ids or row.id in ids:
                    result.rows.append(row)
                    found(row)
    except LeftOutError as error:
        there = {row.id for row in result.rows}
        result.left_out |= {
            name: str(error) for name in group.rows if (not ids or name in ids) and name not in there
        }


@contextmanager
def _lab() -> Iterator[Lab]:
    from hookline import api
    from hookline.lab import Lab, LabError
    from hookline.sources import files

    name = f"bench-{secrets.token_hex(3)}"
    try:
        api.lab_up(files.loads(CLUSTER), name)
        yield Lab.open(name)
    finally:
        with contextlib.suppress(LabError):  # it was never made, and what prevented it is on its way up
            api.lab_down(name)
