"""What commands say of services: one document for ``--json``, from which the tables are printed too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline.api import AnyNode
    from hookline.control import BackendStatus, PoolStatus
    from hookline.control.verdicts import RuleCount
    from hookline.model import Resource

Document = dict[str, Any]

POLICIES = ("NetworkPolicy", "HostPolicy")


def statuses_by_service(node: AnyNode) -> dict[str, list[PoolStatus]]:
    """The kernel's pools by the reference of their service."""
    found: dict[str, list[PoolStatus]] = {}
    for status in node.services():
        found.setdefault(status.pool.service, []).append(status)
    return found


def counts_by_policy(node: AnyNode, resources: Iterable[Resource]) -> dict[str, list[RuleCount]]:
    """What policies' rules let through on the node, by the policies' reference; nothing is asked where there are no policies."""
    found: dict[str, list[RuleCount]] = {}
    if any(resource.kind in POLICIES for resource in resources):
        for one in node.rule_counts():
            found.setdefault(one.policy, []).append(one)
    return found


def item(
    resource: Resource,
    source: str,
    statuses: Mapping[str, Sequence[PoolStatus]],
    counts: Mapping[str, Sequence[RuleCount]],
) -> Document:
    """One object: its names, what set it, itself, a service's state in the kernel, and what a policy's rules let through."""
    document: Document = {
        "reference": resource.reference,
        "kind": resource.kind,
        "namespace": resource.namespace,
        "name": resource.name,
        "source": source,
        "object": resource.to_document(),
    }
    if hasattr(resource, "addresses") and resource.kind in ("VirtualService", "Service"):
        document["addresses"] = [str(address) for address in resource.addresses]
        document["status"] = _service(statuses.get(resource.reference, ()))
    if resource.kind in POLICIES:
        document["rules"] = [
            {"direction": one.direction, "rule": one.rule, "packets": one.packets, "bytes": one.bytes}
            for one in sorted(
                counts.get(resource.reference, ()), key=lambda one: (one.direction != "ingress", one.rule)
            )
        ]
    return document


def is_of(service: str, name: str | None, namespace: str | None) -> bool:
    """Whether a service, by its reference, is one that was asked for: by reference or name, in a namespace or any."""
    if name is None:
        return namespace is None or service.split("/")[1] == namespace
    return service == name or service.split("/")[1:] == [namespace or "default", name]


def watched_service(reference: str, statuses: Sequence[PoolStatus]) -> Document:
    """A service's state in the kernel, without the object."""
    return {"reference": reference, **_service(statuses)}


def _service(statuses: Sequence[PoolStatus]) -> Document:
    names = {backend.target.name for status in statuses for backend in status.backends}
    reachable = {
        backend.target.name
        for status in statuses
        for backend in status.backends
        if backend.placement.how != "unreachable"
    }
    return {
        "forwarding": statuses[0].pool.forwarding if statuses else None,
        "algorithm": statuses[0].pool.algorithm if statuses else None,
        "backends": len(names),
        "backends_reachable": len(reachable),
        "connections": sum(status.connections for status in statuses),
        "packets": sum(status.packets for status in statuses),
        "bytes": sum(status.bytes for status in statuses),
        "drops": sum(status.drops for status in statuses),
        "pools": [pool(status) for status in statuses],
    }


def pool(status: PoolStatus) -> Document:
    """One port of a service in one family."""
    wanted = status.pool
    weights = sum(_active_weight(backend) for backend in status.backends)
    return {
        "service": wanted.service,
        "port": wanted.port,
        "protocol": wanted.protocol,
        "family": f"IPv{wanted.version}",
        "frontends": [str(frontend) for frontend in wanted.frontends],
        "forwarding": wanted.forwarding,
        "algorithm": wanted.algorithm,
        "table_size": status.table_size,
        "connections": status.connections,
        "packets": status.packets,
        "bytes": status.bytes,
        "drops": status.drops,
        "backends": [_backend(backend, status.table_size, weights) for backend in status.backends],
    }


def _backend(backend: BackendStatus, table_size: int, weights: int) -> Document:
    target, placement = backend.target, backend.placement
    return {
        "name": target.name,
        "address": str(target.address),
        "port": target.port,
        "placement": placement.how,
        "note": placement.note,
        "state": target.state,
        "weight": target.weight,
        "slots": backend.slots,
        "share": backend.slots / table_size if table_size else 0.0,
        "ideal_share": _active_weight(backend) / weights if weights else 0.0,
        "connections": backend.connections,
        "packets": backend.packets,
        "bytes": backend.bytes,
        "reply_packets": backend.reply_packets,
        "reply_bytes": backend.reply_bytes,
    }


def _active_weight(backend: BackendStatus) -> int:
    return 0 if backend.placement.how == "unreachable" else backend.target.effective_weight


def backends(statuses: Iterable[PoolStatus]) -> list[Document]:
    """Every backend of every pool, with the pool that it is in."""
    return [
        {
            "service": described["service"],
            "service_port": described["port"],
            "protocol": described["protocol"],
            "family": described["family"],
            **backend,
        }
        for described in map(pool, statuses)
        for backend in described["backends"]
    ]


BALANCER = (
    "verdicts",
    "drop_reasons",
    "replies",
    "handed_to_stack",
    "answered",
    "exceptions",
    "sockets",
)


def totals(node: AnyNode) -> Document | None:
    """The node's counters; None where nothing is loaded."""
    counted, judged = node.totals(), node.policy_totals()
    if counted is None and judged is None:
        return None

    def pair(counts: tuple[int, int]) -> Document:
        return {"packets": counts[0], "bytes": counts[1]}

    firewall = None
    if judged is not None:
        firewall = {
            "reasons": [
                {
                    "direction": direction,
                    "verdict": "drop" if reason in judged.drops else "pass",
                    "reason": reason,
                    **pair(counts),
                }
                for (direction, reason), counts in sorted(judged.reasons.items())
            ],
            "lost": judged.lost,
            "suppressed": judged.suppressed,
        }
    if counted is None:
        return dict.fromkeys(BALANCER) | {"firewall": firewall}
    return {
        "verdicts": {name: pair(counts) for name, counts in counted.verdicts.items()},
        "drop_reasons": {name: pair(counts) for name, counts in counted.reasons.items()},
        "replies": pair(counted.replies),
        "handed_to_stack": pair(counted.handed_to_stack),
        "answered": pair(counted.answered),
        "exceptions": dict(counted.exceptions),
        "sockets": dict(counted.sockets),
        "firewall": firewall,
    }


def attachments(node: AnyNode) -> list[Document]:
    """Where the node's programs are."""
    return [
        {"program": attachment.program, "hook": attachment.hook, "interface": attachment.interface}
        for attachment in node.attachments()
    ]
