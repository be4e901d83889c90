"""How long policies take from documents to the kernel: a thousand for a thousand pods, one label, the first one of all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hookline import lab
from hookline.bench._rows import Row, row
from hookline.bench._settings import Settings
from hookline.control import Node
from hookline.errors import HooklineError
from hookline.lab import LabError
from hookline.model import Resource
from hookline.sources import files

PODS, LOCAL, POLICIES = 1_000, 100, 1_000
APPS, TIERS = 100, 7
APPLIES, LABELS = 3, 15


def apply_rows(settings: Settings) -> Iterator[Row]:
    """A thousand policies and pods, a tenth of these on the node; one label among them; and the first policy."""
    name = f"hookline-bench-{secrets.token_hex(3)}"
    node_document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}
    local = [_pod(number, "node-1") for number in range(LOCAL)]
    settings.tell("policies-1000x1000", 0, APPLIES)
    try:
        made = lab.up(_loaded([node_document, *local]), name, serve=False)
        others = [_pod(number, f"node-{2 + number % 9}", _address(number)) for number in range(LOCAL, PODS)]
        first, *policies = [_policy(number) for number in range(POLICIES)]
        documents = [one.to_document() for one in made.resources()]
        firsts, applies, reads, labels = [], [], [], []
        attempts = settings.rounds or APPLIES
        for attempt in range(attempts):
            settings.tell("policies-1000x1000", attempt + 1, attempts)
            with Node(made.first_node) as node:
                node.apply(_loaded(documents))
                start = time.perf_counter()
                node.apply(_loaded([first]))
                firsts.append(time.perf_counter() - start)
                start = time.perf_counter()
                resources = _loaded([*others, *policies])
                reads.append(time.perf_counter() - start)
                start = time.perf_counter()
                applied = node.apply(resources)
                applies.append(time.perf_counter() - start)
                if applied.plan.usage["firewall_endpoints"].used != LOCAL:
                    raise HooklineError("the firewall does not have the node's pods")
                for turn in range(LABELS):
                    pod = json.loads(json.dumps(documents[1 + turn]))
                    pod["metadata"]["labels"] = {"app": f"a{turn + 50}", "tier": "t3"}
                    (changed,) = _loaded([pod])
                    start = time.perf_counter()
                    node.apply(changed)
                    labels.append(time.perf_counter() - start)
                node.delete([one.reference for one in node.resources()])
    finally:
        with suppress(LabError):
            lab.down(name)
    where = settings.where
    yield row(
        "policies-1000x1000",
        "s",
        applies,
        reference="reading and checking the same documents alone",
        reference_values=reads,
        method=f"{PODS:,} pods, {LOCAL} of them on the node, and {POLICIES:,} policies of two directions, in this process; the "
        f"firewall is on the pods' interfaces already; no round before the first; {where}",
        goal="≤ 3 s for 1,000 pods and 1,000 policies",
        most=3.0,
    )
    yield row(
        "policies-one-label",
        "ms",
        [value * 1e3 for value in labels],
        reference="applying all of them",
        reference_values=[value * 1e3 for value in applies],
        method=f"two labels of a pod of the node, {LABELS} times for each time that all are applied; connections that are no "
        f"longer allowed are looked for each time; {where}",
        goal="≤ 50 ms in the process",
        most=50.0,
    )
    yield row(
        "policies-first",
        "s",
        firsts,
        reference="1,000 policies where the firewall is there already",
        reference_values=applies,
        method=f"the first policy of a node with {LOCAL} pods: the programs are loaded and attached to each one's interface, for "
        f"which the kernel waits for two grace periods of RCU each; {where}",
    )


def _loaded(documents: list[dict[str, Any]]) -> list[Resource]:
    return files.loads(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))


def _pod(number: int, node: str, address: str = "") -> dict[str, Any]:
    labels = {"app": f"a{number % APPS}", "tier": f"t{number % TIERS}"}
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"p{number}", "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "main", "ports": [{"containerPort": 8080}]}]},
    }
    if address:
        pod["status"] = {
            "podIP": address,
            "podIPs": [{"ip": address}, {"ip": f"fd00:10:{number:x}::1"}],
        }
    return pod


def _address(number: int) -> str:
    return f"10.{100 + number // 200}.0.{number % 200 + 1}"


def _policy(number: int) -> dict[str, Any]:
    source = {"app": f"a{number * 7 % APPS}", "tier": f"t{number % TIERS}"}
    ingress = {"from": [{"podSelector": {"matchLabels": source}}], "ports": [{"port": 8000 + number % 50}]}
    target = {"app": f"a{number * 3 % APPS}"}
    egress = {"to": [{"podSelector": {"matchLabels": target}}], "ports": [{"port": 80}, {"port": 443}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"np{number}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"a{number % APPS}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [ingress],
            "egress": [egress],
        },
    }
