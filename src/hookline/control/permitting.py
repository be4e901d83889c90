"""Policies' part of `explain`: for every address that a connection may end at, what each end says, and whether the kernel agrees.

What is said comes from the documents (`hookline.policy`); the firewall's rows are then followed by hand, and where they say
otherwise, that is said too. An end is judged by the node that it is on: of another node its own documents and rows are asked, and
where it cannot be asked, what is known here is said and stops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from hookline.control.explain import Explanation, Obstacle, Permission
from hookline.control.judging import Judge
from hookline.datapath.firewall.firewall import Rows
from hookline.policy import PROTOCOLS, Decision, Direction, Evaluator, PolicyError, Probe, Side, World

DIRECTIONS: tuple[Direction, ...] = ("egress", "ingress")
Known = tuple[World, Rows | None]
"""A node's documents, and its firewall's rows where it has one."""


class _Views:
    """What each node knows, asked once."""

    def __init__(self, own: Known, ask: Callable[[str], Known | None]) -> None:
        self.own = _View(own)
        self._ask = ask
        self._asked: dict[str, _View | None] = {}

    def of(self, node: str) -> _View | None:
        """A node's; None where it cannot be asked."""
        if node == self.own.world.node:
            return self.own
        if node not in self._asked:
            known = self._ask(node) if node else None
            self._asked[node] = _View(known) if known is not None else None
        return self._asked[node]


class _View:
    """One node's documents and rows, ready to be asked."""

    def __init__(self, known: Known) -> None:
        self.world, rows = known
        self.evaluator = Evaluator(self.world)
        self.strict = Evaluator(self.world, audited=True)
        self.judge = Judge(rows) if rows is not None else None

    @property
    def has_policies(self) -> bool:
        return bool(self.world.policies or self.world.host_policies)


@dataclass(frozen=True, slots=True)
class _Said:
    """What is said of one direction."""

    side: Side
    node: str
    enforced: bool
    would_deny: tuple[str, ...]


def permissions(
    answer: Explanation, own: Known, ask: Callable[[str], Known | None], source_address: str | None
) -> Iterator[Permission]:
    """Fills in the obstacles that policies are, and gives what they say of each way. Nothing where no policy is known.

    Args:
        answer: What else is known of the connection.
        own: What this node knows.
        ask: Gives what another node knows, by its name; None where that one cannot be asked.
        source_address: The source's address in the family of the connection, where it has one.
    """
    if answer.outcome in ("refused", "dropped"):
        return
    views = _Views(own, ask)
    protocol = answer.protocol.upper()
    for backend, address, port, is_translated in _ways(answer):
        sources = [answer.source, *([source_address] if source_address else [])]
        if is_translated:
            sources.insert(0, f"node/{views.own.world.node}")
        found = _decide(views.own.evaluator, sources, address, port, protocol)
        if found is None:
            continue
        source, first = found
        here = views.own.evaluator
        nodes: dict[Direction, str] = {
            "egress": here.node_of(first.source),
            "ingress": here.node_of(first.destination),
        }
        judges = [views.own, *filter(None, map(views.of, nodes.values()))]
        if not any(view.has_policies for view in judges):
            continue
        probe = Probe(str(first.source), str(first.destination), protocol, port)
        said = {direction: _say(views, nodes[direction], found, probe, direction) for direction in DIRECTIONS}
        egress, ingress = said["egress"], said["ingress"]
        decision = Decision(
            all(one.side.allowed or not one.enforced for one in said.values()),
            egress.side if egress.enforced else _open(egress.side),
            ingress.side if ingress.enforced else _open(ingress.side),
            first.source,
            first.destination,
        )
        yield Permission(
            backend,
            source,
            address,
            port,
            decision.allowed,
            egress.side,
            ingress.side,
            decision.decided_by,
            {direction: one.node for direction, one in said.items()},
            {direction: one.enforced for direction, one in said.items()},
            {direction: one.would_deny for direction, one in said.items()},
        )
        if not decision.allowed:
            answer.obstacles.append(
                Obstacle(
                    "policy", decision.decided_by, "change the policy, or labels that it goes by", backend
                )
            )
        answer.obstacles += _disagreements(views, said, decision, port, protocol, backend)


def _open(side: Side) -> Side:
    """An end that is not counted, as nobody was asked what it says."""
    return side if side.allowed else Side(True, False, "")


def _say(
    views: _Views, node: str, known_here: tuple[str, Decision], probe: Probe, direction: Direction
) -> _Said:
    """What the node that judges a direction says, or else what is known here."""
    view, (source, decision) = views.of(node), known_here
    if view is not None and view is not views.own:
        names = (source, probe.source)
        theirs = _decide(view.evaluator, names, probe.destination, probe.port, str(probe.protocol))
        if theirs is None:
            view = None
        else:
            source, decision = theirs
    side = _side(decision, direction)
    version = ip_address(probe.destination).version
    strict = _side(
        (view or views.own).strict.decide(
            Probe(source, probe.destination, probe.protocol, probe.port, version)
        ),
        direction,
    )
    denies = side.allowed and not strict.allowed
    audited = tuple(policy for policy in strict.policies if policy not in side.policies)
    return _Said(side, node, view is not None, audited if denies else ())


def _side(decision: Decision, direction: Direction) -> Side:
    return decision.egress if direction == "egress" else decision.ingress


def _ways(answer: Explanation) -> list[tuple[str, str, int, bool]]:
    """Name, address and port of where the connection may end, and whether its source is this node then."""
    if answer.outcome == "direct":
        return [("", answer.address, answer.port, False)]
    chosen = [answer.chosen] if answer.chosen is not None else answer.backends
    return [(one.name, one.address, one.port, one.how == "nat") for one in chosen]


def _decide(
    evaluator: Evaluator, sources: Iterable[str], address: str, port: int, protocol: str
) -> tuple[str, Decision] | None:
    """By the first of the source's names that the documents know."""
    version = ip_address(address).version
    for source in sources:
        try:
            return source, evaluator.decide(Probe(source, address, protocol, port, version))
        except PolicyError:
            continue
    return None


def _disagreements(
    views: _Views,
    said: dict[Direction, _Said],
    decision: Decision,
    port: int,
    protocol: str,
    backend: str,
) -> Iterator[Obstacle]:
    """What the kernels' rows say otherwise of the ends that are pods."""
    for direction, one in said.items():
        view = views.of(one.node) or views.own
        if view.judge is None:
            continue
        ends = (decision.source, decision.destination)
        local, remote = ends if direction == "egress" else ends[::-1]
        allowed = view.judge.allows(local, remote, PROTOCOLS[protocol], port, direction)
        if allowed is not None and allowed != one.side.allowed:
            where = "the kernel's rows" if view is views.own else f"the rows of node {one.node}'s kernel"
            yield Obstacle(
                "policy_rows",
                f"{where} {'allow' if allowed else 'deny'} its {direction}, and the policies do not",
                "hookline apply -f FILE mends them, the agent by itself",
                backend,
            )
