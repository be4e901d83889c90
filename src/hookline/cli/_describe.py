"""``hookline describe``: one object, all of it, for a person to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookline.cli._output import print_table
from hookline.cli._tables import BACKEND_HEAD, backend_cells
from hookline.model import (
    EgressRule,
    HostEgressRule,
    HostIngressRule,
    HostPolicy,
    HostPolicySpec,
    IngressRule,
    NetworkPolicy,
)
from hookline.policy import is_audited, peer_text, port_text, selector_text

if TYPE_CHECKING:
    from hookline.model import Resource

Rule = IngressRule | EgressRule | HostIngressRule | HostEgressRule
Document = Mapping[str, Any]


def print_item(document: Document, resource: Resource) -> None:
    """Prints what `hookline describe --json` has: the object, its state in the kernel, the node's counters and hooks."""
    item = document["item"]
    print(item["reference"])
    fields = [("node", document["node"]), ("source", item["source"])]
    labels = item["object"]["metadata"].get("labels", {})
    if labels:
        fields.append(("labels", " ".join(f"{key}={value}" for key, value in labels.items())))
    status = item.get("status")
    if status is None:
        if isinstance(resource, NetworkPolicy | HostPolicy):
            _print_policy(resource, fields, item["rules"])
            _print_firewall(document)
            return
        _print_fields(fields)
        _print_object(resource)
        return
    fields.append(("addresses", " ".join(item["addresses"])))
    if status["pools"]:
        fields += [(name, status[name]) for name in ("forwarding", "algorithm")]
    fields += [(name, str(status[name])) for name in ("connections", "packets", "bytes", "drops")]
    _print_fields(fields)
    for pool in status["pools"]:
        _print_pool(pool)
    if not status["pools"]:
        print("\nit is not balanced: it has no address, or no port of TCP or UDP")
    _print_node(document)


def _print_fields(fields: Iterable[tuple[str, str]]) -> None:
    for name, value in fields:
        print(f"  {name:<12} {value}")


def _print_object(resource: Resource) -> None:
    from hookline.sources import files

    print()
    for line in files.dump([resource]).splitlines():
        print(f"  {line}")


def _print_policy(
    policy: NetworkPolicy | HostPolicy, fields: list[tuple[str, str]], counts: Sequence[Document]
) -> None:
    """A policy in words: whom it isolates, what it allows them, and what its rules let through, where the node has them."""
    counted = {(one["direction"], one["rule"]): (one["packets"], one["bytes"]) for one in counts}
    spec = policy.spec
    if isinstance(spec, HostPolicySpec):
        fields.append(("nodes", selector_text(spec.node_selector)))
        fields.append(("default", spec.default_verdict))
    else:
        fields.append(("pods", f"{selector_text(spec.pod_selector)} of namespace {policy.namespace}"))
    fields.append(("isolates for", " and ".join(one.lower() for one in dict.fromkeys(spec.effective_types))))
    if is_audited(policy):
        fields.append(("mode", "audit: what it would deny is reported, and nothing is denied"))
    _print_fields(fields)
    sides: tuple[tuple[str, str, str, Sequence[Rule]], ...] = (
        ("Ingress", "ingress", "FROM", spec.ingress),
        ("Egress", "egress", "TO", spec.egress),
    )
    for kind, name, head, rules in sides:
        if kind not in spec.effective_types:
            if rules:
                print(f"\n{name}: its rules mean nothing, since policyTypes has no {kind}")
            continue
        print(f"\n{name}" + ("" if rules else ": nothing is allowed"))
        rows = [
            (
                str(number),
                "; ".join(map(peer_text, rule.peers)) or "anybody",
                " ".join(map(port_text, rule.ports)) or "any",
                *counted.get((name, number), ("-", "-")),
            )
            for number, rule in enumerate(rules)
        ]
        if rows:
            print_table(("RULE", head, "PORTS", "PACKETS", "BYTES"), rows, indent=2)


def _print_firewall(document: Document) -> None:
    """What the node's firewall did with packets, by reason."""
    totals = document["totals"]
    firewall = totals["firewall"] if totals is not None else None
    if firewall is None:
        return
    print(f"\nfirewall of node {document['node']}, all policies")
    names = ("direction", "verdict", "reason", "packets", "bytes")
    rows = [tuple(one[name] for name in names) for one in firewall["reasons"]]
    print_table([name.upper() for name in names], rows, indent=2)
    if firewall["lost"] or firewall["suppressed"]:
        print(
            f"  verdicts: {firewall['lost']} found no room, {firewall['suppressed']} were left out, as there were too many"
        )


def _print_pool(pool: Document) -> None:
    print(
        f"\nport {pool['port']}, {pool['family']}: {' '.join(pool['frontends'])}, table of {pool['table_size']} slots"
    )
    if pool["backends"]:
        head = (*BACKEND_HEAD[:5], "SLOTS", *BACKEND_HEAD[5:])
        rows = []
        for backend in pool["backends"]:
            cells = backend_cells(backend)
            rows.append((*cells[:5], backend["slots"], *cells[5:]))
        print_table(head, rows, indent=2)
    else:
        print("  no backends: packets are dropped and counted")
    if pool["drops"]:
        print(f"  {pool['drops']} packets dropped")
    for backend in pool["backends"]:
        if backend["note"]:
            print(f"  note: {backend['name']} ({backend['address']}): {backend['note']}")


def _print_node(document: Document) -> None:
    totals = document["totals"]
    print(f"\nnode {document['node']}")
    if totals is None or totals["verdicts"] is None:
        print("  nothing is loaded" if totals is None else "  nothing is balanced")
        _print_firewall(document)
        return
    rows: list[tuple[str, str, int, int]] = []
    for name, counts in totals["verdicts"].items():
        rows.append(("verdict", name, counts["packets"], counts["bytes"]))
    for name, counts in totals["drop_reasons"].items():
        rows.append(("dropped", name, counts["packets"], counts["bytes"]))
    rows.append(("replies", "", totals["replies"]["packets"], totals["replies"]["bytes"]))
    rows.append(
        ("handed to the stack", "", totals["handed_to_stack"]["packets"], totals["handed_to_stack"]["bytes"])
    )
    rows.append(("refusals answered", "", totals["answered"]["packets"], totals["answered"]["bytes"]))
    print_table(("COUNTED", "", "PACKETS", "BYTES"), rows, indent=2)
    counted = {name: number for name, number in totals["sockets"].items() if number}
    if counted:
        print("  sockets: " + ", ".join(f"{name} {number}" for name, number in counted.items()))
    if totals["exceptions"]:
        print(
            "  exceptions: " + ", ".join(f"{name} {number}" for name, number in totals["exceptions"].items())
        )
    print()
    print_table(
        ("PROGRAM", "HOOK", "INTERFACE"),
        [(one["program"], one["hook"], one["interface"]) for one in document["attachments"]],
        indent=2,
    )
    _print_firewall(document)
