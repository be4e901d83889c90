"""One table for each kind: which columns a person sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from hookline.cli._output import Cell, print_table

Document = Mapping[str, Any]
Column = tuple[str, Callable[[Document], Cell]]


def print_items(kind: str, items: Sequence[Document]) -> None:
    """Prints the objects of one kind."""
    columns = [("NAME", _name), *COLUMNS.get(kind, [])]
    if any(item["namespace"] for item in items):
        columns.insert(0, ("NAMESPACE", lambda item: item["namespace"]))
    print_table([name for name, _ in columns], [[value(item) for _, value in columns] for item in items])


def print_backends(backends: Iterable[Document]) -> None:
    """Prints backends of several services."""
    print_table(
        ("SERVICE", "PORT", *BACKEND_HEAD),
        [(one["service"], f"{one['service_port']} {one['family']}", *backend_cells(one)) for one in backends],
    )


def print_generations(generations: Iterable[Document]) -> None:
    """Prints generations with what each changed."""
    print_table(
        ("GENERATION", "TIME", "CAUSE", "CREATED", "CHANGED", "REMOVED"),
        [
            (
                one["generation"],
                datetime.fromtimestamp(one["time"]).astimezone().isoformat(" ", "seconds"),
                one["cause"],
                *(_few(one[kind]) for kind in ("created", "changed", "removed")),
            )
            for one in generations
        ],
    )


def _few(references: Sequence[str]) -> str:
    shown = ", ".join(references[:_SHOWN])
    return f"{shown} and {len(references) - _SHOWN} more" if len(references) > _SHOWN else shown


_SHOWN = 3
# A column's name and how wide it usually is, in characters.
SERVICE_CHANGES = (
    ("SERVICE", 40),
    ("BACKENDS", 9),
    ("CONNECTIONS", 12),
    ("PACKETS", 12),
    ("BYTES", 14),
    ("DROPS", 10),
)


def print_changes(kind: str, rows: Sequence[tuple[str, Document]], *, head: bool) -> None:
    """Prints what changed, a line each, as one goes: columns are as wide as what they usually hold.

    Args:
        kind: ``backend`` or ``service``.
        rows: ``+``, ``~`` or ``-``, and the document.
        head: Whether the columns' names stand before them.
    """
    if kind == "backend":
        columns = [("SERVICE", 32), ("PORT", 12), *zip(BACKEND_HEAD, _BACKEND_WIDTHS, strict=True)]
        lines: list[tuple[Cell, ...]] = [
            (mark, one["service"], f"{one['service_port']} {one['family']}", *backend_cells(one))
            for mark, one in rows
        ]
    else:
        columns = list(SERVICE_CHANGES)
        lines = [
            (
                mark,
                one["reference"],
                f"{one['backends_reachable']}/{one['backends']}",
                *(one[name] for name in ("connections", "packets", "bytes", "drops")),
            )
            for mark, one in rows
        ]
    names, widths = zip(("", 1), *columns, strict=True)
    for line in [*([names] if head else []), *lines]:
        texts = (f"{100 * cell:.1f}%" if isinstance(cell, float) else str(cell) for cell in line)
        print(
            "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip(),
            flush=True,
        )


BACKEND_HEAD, _BACKEND_WIDTHS = zip(
    ("BACKEND", 20),
    ("ADDRESS", 24),
    ("PLACED", 11),
    ("STATE", 8),
    ("WEIGHT", 6),
    ("SHARE", 6),
    ("IDEAL", 6),
    ("CONNECTIONS", 11),
    ("PACKETS", 10),
    ("BYTES", 12),
    ("REPLIES", 10),
    strict=True,
)


def backend_cells(backend: Document) -> tuple[Cell, ...]:
    """The cells below `BACKEND_HEAD`."""
    address = f"[{backend['address']}]" if ":" in backend["address"] else backend["address"]
    return (
        backend["name"],
        f"{address}:{backend['port']}",
        backend["placement"],
        backend["state"],
        backend["weight"],
        float(backend["share"]),
        float(backend["ideal_share"]),
        backend["connections"],
        backend["packets"],
        backend["bytes"],
        backend["reply_packets"],
    )


def _name(item: Document) -> Cell:
    return str(item["name"])


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _spec(item: Document) -> Document:
    found: Document = item["object"].get("spec", {})
    return found


def _status(item: Document) -> Document:
    found: Document = item["object"].get("status", {})
    return found


def _ports(ports: Iterable[Document], number: str) -> str:
    return _words(dict.fromkeys(f"{port[number]}/{port.get('protocol', 'TCP').lower()}" for port in ports))


def _labels(item: Document) -> str:
    return _words(f"{key}={value}" for key, value in item["object"]["metadata"].get("labels", {}).items())


def _backend_count(item: Document) -> Cell:
    status = item["status"]
    if status["backends_reachable"] == status["backends"]:
        return str(status["backends"])
    return f"{status['backends_reachable']}/{status['backends']}"


def _pod_addresses(item: Document) -> str:
    status = _status(item)
    return _words(dict.fromkeys([status.get("podIP", ""), *(one["ip"] for one in status.get("podIPs", []))]))


def _pod_ports(item: Document) -> str:
    return _ports(
        (port for container in _spec(item).get("containers", []) for port in container.get("ports", [])),
        "containerPort",
    )


def _host_addresses(item: Document) -> str:
    spec = _spec(item)
    return _words(spec.get("addresses") or [spec.get("address", "")])


def _interfaces(item: Document) -> str:
    return _words(f"{one['name']} ({one['role']})" for one in _spec(item).get("interfaces", []))


def _slice_service(item: Document) -> str:
    labels: Mapping[str, str] = item["object"]["metadata"].get("labels", {})
    return labels.get("kubernetes.io/service-name", "")


def _policy_target(item: Document) -> str:
    target: Document = _spec(item).get("targetRef", {})
    return f"{target.get('kind', 'Service')}/{target.get('name', '')}"


def _check(item: Document) -> str:
    check: Document = _spec(item).get("healthCheck") or {}
    return str(check.get("type", "-"))


def _redirect_from(item: Document) -> str:
    frontend: Document = _spec(item)["redirectFrontend"]
    matcher: Document = frontend.get("addressMatcher") or frontend.get("serviceMatcher") or {}
    return matcher.get("ip") or f"Service/{matcher.get('serviceName', '')}"


def _selector(selector: Document) -> str:
    equal = (f"{key}={value}" for key, value in selector.get("matchLabels", {}).items())
    others = (
        _words([one["key"], one["operator"], *one.get("values", [])])
        for one in selector.get("matchExpressions", [])
    )
    return ", ".join((*equal, *others)) or "all"


def _resolver(item: Document) -> str:
    resolver: Document = _spec(item)["resolver"]
    named = resolver.get("addresses") or [resolver["address"]] if "selector" not in resolver else []
    labels = (f"{key}={value}" for key, value in resolver.get("selector", {}).items())
    return f"{_words(named) or ','.join(labels)} port {resolver.get('port', 53)}"


def _policy_types(item: Document) -> str:
    spec = _spec(item)
    return _words(spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]))


def _audited(item: Document) -> str:
    annotations: Mapping[str, str] = item["object"]["metadata"].get("annotations", {})
    return "audit" if annotations.get("hookline.dev/audit") == "true" else "enforce"


def _policy_columns(who: str, selector: str) -> list[Column]:
    return [
        (who, lambda item: _selector(_spec(item).get(selector, {}))),
        ("TYPES", _policy_types),
        ("INGRESS", lambda item: len(_spec(item).get("ingress", []))),
        ("EGRESS", lambda item: len(_spec(item).get("egress", []))),
        ("MODE", _audited),
        ("PACKETS", lambda item: sum(one["packets"] for one in item["rules"])),
    ]


def _probes(stage: Document) -> int:
    def many(value: object) -> int:
        return len(value) if isinstance(value, list) else 1

    return sum(
        many(line["from"]) * many(line["to"]) * many(line["port"]) * many(line.get("protocol", "TCP"))
        for line in stage.get("probes", [])
    )


SERVICE: list[Column] = [
    ("ADDRESSES", lambda item: _words(item["addresses"])),
    ("PORTS", lambda item: _ports(_spec(item).get("ports", []), "port")),
    ("FORWARDING", lambda item: item["status"]["forwarding"] or "-"),
    ("ALGORITHM", lambda item: item["status"]["algorithm"] or "-"),
    ("BACKENDS", _backend_count),
    ("CONNECTIONS", lambda item: item["status"]["connections"]),
    ("PACKETS", lambda item: item["status"]["packets"]),
    ("DROPS", lambda item: item["status"]["drops"]),
]
COLUMNS: dict[str, list[Column]] = {
    "VirtualService": SERVICE,
    "Service": SERVICE,
    "Pod": [
        ("NODE", lambda item: _spec(item).get("nodeName", "")),
        ("ADDRESSES", _pod_addresses),
        ("PORTS", _pod_ports),
        ("LABELS", _labels),
    ],
    "Node": [
        ("ADDRESSES", lambda item: _words(one["address"] for one in _status(item).get("addresses", [])))
    ],
    "Namespace": [("LABELS", _labels)],
    "ExternalHost": [
        ("ADDRESSES", _host_addresses),
        ("PORTS", lambda item: _ports(_spec(item).get("ports", []), "port")),
    ],
    "EndpointSlice": [
        ("SERVICE", _slice_service),
        ("ENDPOINTS", lambda item: len(item["object"].get("endpoints", []))),
    ],
    "NodeConfig": [("INTERFACES", _interfaces)],
    "NetworkPolicy": _policy_columns("PODS", "podSelector"),
    "HostPolicy": [
        *_policy_columns("NODES", "nodeSelector"),
        ("DEFAULT", lambda item: _spec(item).get("defaultVerdict", "deny")),
    ],
    "PolicyTest": [
        ("STEPS", lambda item: len(_spec(item).get("steps", []))),
        ("PROBES", lambda item: sum(map(_probes, [_spec(item), *_spec(item).get("steps", [])]))),
        ("ABOUT", lambda item: _spec(item).get("description", "")),
    ],
    "ServicePolicy": [
        ("FOR", _policy_target),
        ("ALGORITHM", lambda item: _spec(item).get("algorithm", "maglev")),
        ("CHECK", _check),
        ("DRAIN", lambda item: f"{_spec(item).get('drainSeconds', 0)} s"),
        ("AFFINITY", lambda item: (_spec(item).get("sessionAffinity") or {}).get("type", "-")),
    ],
    "LocalRedirectPolicy": [
        ("FROM", _redirect_from),
        ("TO", lambda item: _selector(_spec(item)["redirectBackend"]["localEndpointSelector"])),
        ("PORTS", lambda item: _ports(_spec(item)["redirectBackend"]["toPorts"], "port")),
    ],
    "DNSCapture": [
        ("PODS", lambda item: _selector(_spec(item)["podSelector"])),
        ("RESOLVER", _resolver),
    ],
}
