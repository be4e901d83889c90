"""Steps of tables with real packets: a lab that serves all of them, its nodes brought from one step's resources to the next's.

Nodes and machines outside are there from the beginning; pods come, go and move as the steps have them. Steps whose nodes or
machines cannot be in one network (two of one name or address) get a lab each. Members that a step has no use for stay where they
are, unknown to the nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self, cast

from hookline import api, lab
from hookline.errors import HooklineError
from hookline.lab import Heard, LabError, Member, Prober, Question
from hookline.model import Pod, Resource
from hookline.model.names import Address, NodeName, Protocol
from hookline.trials._rows import Row
from hookline.trials._tables import Step

MOST_ASKED = 50
"""Of how many probes of a step that came out wrong the nodes are asked."""
PATIENCE_S = 1.5
"""Of the second try of a probe that should have got through: long enough for a lost opening packet to be sent again."""

Progress = Callable[[str, int, int], None]


def run(
    steps: Sequence[Step],
    rows: Sequence[Sequence[Row]],
    *,
    lab_name: str | None,
    datapath: bool,
    progress: Progress,
) -> None:
    """Fills in what becomes of each step's probes.

    Args:
        steps: All steps of the run, and ``rows`` the rows of each.
        lab_name: What the lab is called while it is there.
        datapath: Whether nodes are brought to the steps' resources at all.
        progress: Told what is being done, and how many probes of how many are done.

    Raises:
        HooklineError: The lab cannot be made, or a node refuses a step's resources.
        KeyboardInterrupt: This process was asked to end; the lab is gone.
    """
    total, done, at = sum(map(len, rows)), 0, 0
    name = lab_name or f"trial-{os.getpid()}"
    with lab.ending_in_order() as check:
        for group in groups(steps):
            progress("making the lab", done, total)
            with Stage(name, group, datapath=datapath) as stage:
                for step in group:
                    check()
                    progress(str(step), done, total)
                    stage.set(step)
                    stage.ask(step, rows[at])
                    done += len(rows[at])
                    at += 1
                stage.settle()
    progress("done", done, total)


def groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """The steps in their order, in groups that one lab can serve: nodes and machines outside cannot change."""
    group: list[Step] = []
    fixed: dict[str, Member] = {}
    owners: dict[Address, str] = {}
    pods: set[Address] = set()
    for step in steps:
        mine = {member.endpoint: member for member in (*step.plan.nodes, *step.plan.externals)}
        theirs = {address for member in step.plan.pods for address in member.addresses}
        taken = {a: member.endpoint for member in mine.values() for a in member.addresses}
        fits = (
            all(fixed.get(name, member).addresses == member.addresses for name, member in mine.items())
            and all(owners.get(address, name) == name for address, name in taken.items())
            and not (pods | theirs) & (owners | taken).keys()
        )
        if group and not fits:
            yield group
            group, fixed, owners, pods = [], {}, {}, set()
        group.append(step)
        fixed |= mine
        owners |= taken
        pods |= theirs
    if group:
        yield group


class Stage:
    """A lab that is brought from step to step."""

    def __init__(self, name: str, steps: Sequence[Step], *, datapath: bool) -> None:
        self._name, self._steps, self._datapath = name, steps, datapath
        self._opened = ExitStack()
        self._nodes: dict[str, api.Node] = {}
        self._applied: tuple[Resource, ...] | None = None
        self._given_up: list[tuple[Row, Heard]] = []

    def __enter__(self) -> Self:
        try:
            self._lab = lab.up(_union(self._steps), self._name, serve=False)
            self._opened.callback(self._remove_lab)
            self._prober = self._opened.enter_context(Prober(self._lab))
            for member in self._lab.nodes if self._datapath else ():
                node = self._opened.enter_context(api.Node(NodeName(self._name, member.name)))
                self._nodes[member.name] = node
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def set(self, step: Step) -> None:
        """Brings the lab's pods and its nodes to a step."""
        self._set_pods(step)
        if step.resources != self._applied:
            for node in self._nodes.values():
                node.apply(step.resources, owner=api.OWNER)
            self._applied = step.resources

    def ask(self, step: Step, rows: Sequence[Row]) -> None:
        """Sends a step's probes, all at once; those that should have got through and did not a second time."""
        questions = [
            Question(one.asking, one.asked, one.listening, _protocol(one.protocol), one.family, one.via)
            for one in step.asked
        ]
        for row, heard in zip(rows, self._prober.ask(questions), strict=True):
            self._note(row, heard)
        again = [at for at, row in enumerate(rows) if row.expect == "allow" != row.live]
        if again:
            second = self._prober.ask([questions[at] for at in again], quiet_s=PATIENCE_S)
            for at, heard in zip(again, second, strict=True):
                self._note(rows[at], heard)
        wrong = [at for at, row in enumerate(rows) if row.live != row.expect]
        if wrong and self._nodes:
            self._ask_nodes([rows[at] for at in wrong[:MOST_ASKED]], [questions[at] for at in wrong])

    def _ask_nodes(self, rows: Sequence[Row], questions: Sequence[Question]) -> None:
        """Sends probes that came out wrong once more, and notes what the nodes' firewalls say of them."""
        with ExitStack() as opened:
            readers = {}
            for name, node in self._nodes.items():
                with suppress(HooklineError):  # no policy is for it, or somebody reads its verdicts
                    readers[name] = opened.enter_context(node.verdicts())
            for reader in readers.values():
                reader.read()
            heard = self._prober.ask(questions[: len(rows)])
            said: dict[tuple[int, int], list[str]] = {}
            for name, reader in readers.items():
                for event in reader.read():
                    if event.verdict == "deny":
                        ports = event.source_port, event.destination_port
                        said.setdefault(ports, []).append(
                            f"{name} dropped it, {event.direction}: {event.reason}"
                        )
                for known in self._nodes[name].tracked():
                    rule = f"{known.policy} {known.direction}[{known.rule}]" if known.policy else "no rule"
                    ports = known.source_port, known.destination_port
                    said.setdefault(ports, []).append(f"{name} let it through, {known.direction}: {rule}")
        for row, question, one in zip(rows, questions, heard, strict=False):
            found = said.get((one.port, question.port), [])
            row.seen = "; ".join((row.seen, *dict.fromkeys(found)))

    def settle(self) -> None:
        """Takes in what arrived of probes after they were given up."""
        self._prober.settle()
        for row, heard in self._given_up:
            if heard.late and row.live == "deny":
                row.live, row.seen = "unanswered", "it arrived after it was given up"

    def _note(self, row: Row, heard: Heard) -> None:
        row.live, row.seen = heard.outcome, heard.why
        if heard.outcome == "deny":
            self._given_up.append((row, heard))

    def _set_pods(self, step: Step) -> None:
        there = {member.endpoint: member for member in self._lab.pods}
        owners = {address: member.endpoint for member in self._lab.pods for address in member.addresses}
        wanted = {member.endpoint: member for member in step.plan.pods}
        come = [one for name, one in wanted.items() if name not in there or _moved(there[name], one)]
        gone = {one.endpoint for one in come if one.endpoint in there}
        gone |= {
            owner
            for one in wanted.values()
            for address in one.addresses
            if (owner := owners.get(address)) not in (None, one.endpoint)
        }
        for endpoint in gone:
            self._prober.forget(endpoint)
            self._lab.remove_pod(endpoint)
        documents = {
            f"{one.namespace}/{one.name}": one for one in step.plan.resources if isinstance(one, Pod)
        }
        for one in come:
            self._lab.add_pod(documents[one.endpoint])

    def _remove_lab(self) -> None:
        with suppress(LabError):
            lab.down(self._name)


def _union(steps: Sequence[Step]) -> list[Resource]:
    """Everybody who is in the lab from the beginning: each member as its first step has it, unless others have its addresses."""
    found: dict[str, Resource] = {}
    owners: dict[Address, str] = {}
    for step in steps:
        members = {member.endpoint: member for member in step.plan.members}
        for one in step.plan.resources:
            name = {"Node": f"node/{one.name}", "ExternalHost": f"external/{one.name}"}.get(
                one.kind, f"{one.namespace}/{one.name}"
            )
            member = members.get(name) if one.kind != "Namespace" else None
            addresses = member.addresses if member is not None else ()
            if one.reference in found or any(address in owners for address in addresses):
                continue
            found[one.reference] = one
            owners |= dict.fromkeys(addresses, one.reference)
    return list(found.values())


def _moved(before: Member, after: Member) -> bool:
    return (before.node, before.addresses) != (after.node, after.addresses)


def _protocol(name: str) -> Protocol:
    return cast(Protocol, name.lower())
