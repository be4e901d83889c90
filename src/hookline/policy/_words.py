"""Parts of policies in words, for answers."""

from __future__ import annotations

from hookline.model import (
    HostPolicyPeer,
    LabelExpression,
    LabelSelector,
    NetworkPolicyPeer,
    NetworkPolicyPort,
)

OPERATORS = {"In": "in", "NotIn": "notin"}


def selector_text(selector: LabelSelector) -> str:
    """A selector as kubectl takes it, in braces: ``{app=a,tier in (x,y),!old}``; ``{}`` takes everything."""
    parts = [f"{key}={value}" for key, value in sorted(selector.match_labels.items())]
    parts += [_condition(expression) for expression in selector.match_expressions]
    return "{" + ",".join(parts) + "}"


def _condition(expression: LabelExpression) -> str:
    match expression.operator:
        case "Exists":
            return expression.key
        case "DoesNotExist":
            return f"!{expression.key}"
    return f"{expression.key} {OPERATORS[expression.operator]} ({','.join(expression.values)})"


def peer_text(peer: NetworkPolicyPeer | HostPolicyPeer) -> str:
    """A peer: ``namespaceSelector {team=a} podSelector {}``, ``ipBlock 10.0.0.0/8 except 10.1.0.0/16``."""
    if peer.ip_block is not None:
        excepts = ", ".join(map(str, peer.ip_block.except_))
        return f"ipBlock {peer.ip_block.cidr}" + (f" except {excepts}" if excepts else "")
    parts = []
    if isinstance(peer, HostPolicyPeer) and peer.node_selector is not None:
        parts.append(f"nodeSelector {selector_text(peer.node_selector)}")
    if peer.namespace_selector is not None:
        parts.append(f"namespaceSelector {selector_text(peer.namespace_selector)}")
    if peer.pod_selector is not None:
        parts.append(f"podSelector {selector_text(peer.pod_selector)}")
    return " ".join(parts)


def port_text(port: NetworkPolicyPort) -> str:
    """A port: ``80/TCP``, ``80-90/UDP``, ``http/TCP``, ``any/SCTP``."""
    number = "any" if port.port is None else str(port.port)
    if port.end_port is not None:
        number += f"-{port.end_port}"
    return f"{number}/{port.protocol}"
