"""Policies' part of `explain`: for every address that a connection may end at, what each end says, and whether the kernel agrees.

What is said comes from the documents (`hookline.policy`); the firewall's rows are then followed by hand, and where they say
otherwise, that is said too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from hookline.control.explain import Explanation, Obstacle, Permission
from hookline.control.judging import Judge
from hookline.datapath.firewall.firewall import Rows
from hookline.policy import PROTOCOLS, Decision, Direction, Evaluator, PolicyError, Probe, Side, World


def permissions(
    answer: Explanation, world: World, rows: Rows | None, source_address: str | None
) -> Iterator[Permission]:
    """Fills in the obstacles that policies are, and gives what they say of each way. Nothing where no policy is known.

    Args:
        answer: What else is known of the connection.
        world: The documents.
        rows: The firewall's, None where it is not on the node.
        source_address: The source's address in the family of the connection, where it has one.
    """
    if not (world.policies or world.host_policies) or answer.outcome in ("refused", "dropped"):
        return
    evaluator = Evaluator(world)
    judge = Judge(rows) if rows is not None else None
    for backend, address, port, is_translated in _ways(answer):
        protocol = answer.protocol.upper()
        sources = [answer.source, *([source_address] if source_address else [])]
        if is_translated:
            sources.insert(0, f"node/{world.node}")
        found = _decide(evaluator, sources, address, port, protocol)
        if found is None:
            continue
        source, decision = found
        yield Permission(
            backend,
            source,
            address,
            port,
            decision.allowed,
            decision.egress,
            decision.ingress,
            decision.decided_by,
        )
        if not decision.allowed:
            answer.obstacles.append(
                Obstacle(
                    "policy", decision.decided_by, "change the policy, or labels that it goes by", backend
                )
            )
        if judge is not None:
            answer.obstacles += _disagreements(judge, decision, port, protocol, backend)


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
    judge: Judge, decision: Decision, port: int, protocol: str, backend: str
) -> Iterator[Obstacle]:
    """What the kernel's rows say otherwise of the ends that are pods of this node."""
    sides: tuple[tuple[Direction, Side], ...] = (("egress", decision.egress), ("ingress", decision.ingress))
    for direction, side in sides:
        ends = (decision.source, decision.destination)
        local, remote = ends if direction == "egress" else ends[::-1]
        allowed = judge.allows(local, remote, PROTOCOLS[protocol], port, direction)
        if allowed is not None and allowed != side.allowed:
            yield Obstacle(
                "policy_rows",
                f"the kernel's rows {'allow' if allowed else 'deny'} its {direction}, and the policies do not",
                "hookline apply -f FILE mends them, the agent by itself",
                backend,
            )
