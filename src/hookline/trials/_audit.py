"""Has a policy only report what it would deny, or enforce it again."""

from __future__ import annotations

from collections.abc import Sequence

from hookline.api import AnyNode
from hookline.control import Applied
from hookline.model import HostPolicy, NetworkPolicy, Origin, Resource, parse
from hookline.model.names import DEFAULT_NAMESPACE
from hookline.policy import AUDIT_ANNOTATION, is_audited
from hookline.trials._errors import TrialError


def set_audit(node: AnyNode, name: str, *, on: bool) -> tuple[Resource, Applied | None]:
    """Marks a policy of a node as audited, or takes the mark away; what set the object stays what set it.

    Args:
        node: The node.
        name: ``NAME`` or ``NAMESPACE/NAME`` of a NetworkPolicy, the name of a HostPolicy, or the reference of either.
        on: Whether it is only to report.

    Returns:
        The policy as it is then, and the change; None where it was so already.

    Raises:
        TrialError: The node has no such policy, or two of the name.
        control.Conflict: It belongs to an owner.
    """
    found = _find(node, name)
    if is_audited(found) == on:
        return found, None
    document = found.to_document()
    annotations = document["metadata"].setdefault("annotations", {})
    if on:
        annotations[AUDIT_ANNOTATION] = "true"
    else:
        del annotations[AUDIT_ANNOTATION]
    source = node.source_of(found.reference)
    changed = parse(document, None if source == "python" else Origin(source))
    return changed, node.apply([changed])


def _find(node: AnyNode, name: str) -> Resource:
    policies = [one for one in node.resources() if isinstance(one, NetworkPolicy | HostPolicy)]
    wanted = {
        name,
        f"{NetworkPolicy.kind}/{name}" if "/" in name else f"{NetworkPolicy.kind}/{DEFAULT_NAMESPACE}/{name}",
        f"{HostPolicy.kind}/{name}",
    }
    found = [one for one in policies if one.reference in wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise TrialError(
            f"which policy {name}?",
            why=f"node {node.name} has {_listed(found)}",
            remedy=f"say {found[0].reference}",
        )
    raise TrialError(
        f"node {node.name} has no policy {name}",
        why=f"its policies are {_listed(policies)}" if policies else "it has none at all",
        remedy="say NAMESPACE/NAME, or HostPolicy/NAME",
    )


def _listed(policies: Sequence[Resource]) -> str:
    shown = ", ".join(one.reference for one in policies[:12])
    return shown + (f" and {len(policies) - 12} more" if len(policies) > 12 else "")
