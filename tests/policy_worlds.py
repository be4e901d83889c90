"""Worlds of policies, namespaces and pods: made by hand, and at random, small enough that everything in them meets."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from hypothesis import strategies as st

from hookline.model import Resource, parse

Address = IPv4Address | IPv6Address
Document = dict[str, Any]

NODE = "node-1"
NODES = (NODE, "node-2")
NAMESPACES = ("red", "blue")
LABELS = {"app": ("web", "db"), "tier": ("1", "2")}
PORT_NAMES = ("http", "dns")
PROTOCOLS = ("TCP", "UDP", "SCTP")
PODS = 5
# Pods' own, and around them what belongs to nobody.
POD_ADDRESSES = tuple((f"10.0.0.{number}", f"fd00::{number:x}") for number in (1, 2, 3, 6, 8))
NODE_ADDRESSES = {NODE: ("10.0.1.1", "fd00::1:1"), "node-2": ("10.0.1.2", "fd00::1:2")}
STRANGERS = ("10.0.0.4", "10.0.0.11", "192.0.2.1", "fd00::4", "2001:db8::1", "::7")
PORTS = (80, 81, 95, 96, 443)


def _mostly(common: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 3).flatmap(lambda draw: rare if draw == 3 else common)


def _given(fields: Document) -> Document:
    return {key: value for key, value in fields.items() if value is not None}


labels = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in LABELS.items()})


@st.composite
def conditions(draw: st.DrawFn) -> Document:
    key = draw(st.sampled_from(sorted(LABELS)))
    operator = draw(st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")))
    condition: Document = {"key": key, "operator": operator}
    if operator in ("In", "NotIn"):
        condition["values"] = draw(st.lists(st.sampled_from((*LABELS[key], "other")), min_size=1, max_size=2))
    return condition


simple_selectors = labels.map(lambda labels: {"matchLabels": labels} if labels else {})
selectors = _mostly(
    simple_selectors,
    st.builds(
        lambda labels, conditions: {"matchLabels": labels, "matchExpressions": conditions},
        st.just({}) | labels,
        st.lists(conditions(), min_size=1, max_size=2),
    ),
)
choosing = _mostly(st.just({}), selectors)
"""Whom a policy is for: most often everybody, so that something is isolated."""
namespace_selectors = selectors | st.sampled_from(NAMESPACES).map(
    lambda name: {"matchLabels": {"kubernetes.io/metadata.name": name}}
)


@st.composite
def blocks(draw: st.DrawFn) -> Document:
    """A block around an address, most often of a pod, with holes around others."""
    text = draw(st.sampled_from([*(a for pair in POD_ADDRESSES for a in pair), *STRANGERS, "10.0.1.1"]))
    address = ip_address(text)
    longest = address.max_prefixlen
    bits = draw(
        st.sampled_from((0, 8, longest - 16, longest - 4, longest - 3, longest - 2, longest - 1, longest))
    )
    network = ip_network((address, bits), strict=False)
    holes = []
    for _ in range(draw(st.sampled_from((0, 1, 1, 2))) if bits < longest else 0):
        length = draw(st.integers(max(bits + 1, longest - 5), longest))
        offset = draw(st.integers(0, 15))
        inside = type(address)(int(address) ^ offset)
        hole = ip_network((inside, length), strict=False)
        if hole.network_address in network and hole.prefixlen > bits:
            holes.append(str(hole))
    return {"cidr": str(network), "except": holes}


ports = st.builds(
    lambda protocol, port, last: _given(
        {
            "protocol": protocol,
            "port": port,
            "endPort": last if isinstance(port, int) and last is not None and last >= port else None,
        }
    ),
    st.sampled_from((None, None, *PROTOCOLS)),
    st.sampled_from((None, *PORTS, *PORT_NAMES * 4)),
    st.sampled_from((None, None, *PORTS)),
)
pod_peers = st.one_of(
    selectors.map(lambda pods: {"podSelector": pods}),
    namespace_selectors.map(lambda namespaces: {"namespaceSelector": namespaces}),
    st.tuples(namespace_selectors, selectors).map(
        lambda both: {"namespaceSelector": both[0], "podSelector": both[1]}
    ),
    blocks().map(lambda block: {"ipBlock": block}),
    blocks().map(lambda block: {"ipBlock": block}),
)
host_peers = st.one_of(
    selectors.map(lambda nodes: {"nodeSelector": nodes}),
    pod_peers.filter(lambda peer: "podSelector" not in peer or "namespaceSelector" in peer),
)


def _rules(peers: st.SearchStrategy[Document], direction: str, ports: st.SearchStrategy[Document]) -> Any:
    name = "from" if direction == "ingress" else "to"
    return st.lists(
        st.builds(
            lambda peers, ports: _given({name: peers, "ports": ports}),
            _mostly(st.lists(peers, min_size=1, max_size=2), st.none() | st.just([])),
            _mostly(st.none() | st.just([]), st.lists(ports, min_size=1, max_size=2)),
        ),
        min_size=1,
        max_size=3,
    )


POLICY_TYPES = st.sampled_from(
    (None, ["Ingress"], ["Egress"], ["Ingress", "Egress"], ["Ingress", "Egress"], ["Ingress", "Egress"])
)
AUDITS = st.sampled_from((None, None, None, {"hookline.dev/audit": "true"}))
numbered_ports = ports.filter(lambda port: not isinstance(port.get("port"), str))

network_policies = st.builds(
    lambda name, namespace, audit, selector, types, ingress, egress: {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _given({"name": f"p{name}", "namespace": namespace, "annotations": audit}),
        "spec": _given({"podSelector": selector, "policyTypes": types, "ingress": ingress, "egress": egress}),
    },
    st.integers(0, 3),
    st.sampled_from(NAMESPACES),
    AUDITS,
    choosing,
    POLICY_TYPES,
    _mostly(_rules(pod_peers, "ingress", ports), st.none() | st.just([])),
    _mostly(_rules(pod_peers, "egress", ports), st.none() | st.just([])),
)
host_policies = st.builds(
    lambda name, audit, selector, types, ingress, egress, verdict: {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "HostPolicy",
        "metadata": _given({"name": f"h{name}", "annotations": audit}),
        "spec": _given(
            {
                "nodeSelector": selector,
                "policyTypes": types,
                "ingress": ingress,
                "egress": egress,
                "defaultVerdict": verdict,
            }
        ),
    },
    st.integers(0, 1),
    AUDITS,
    choosing,
    POLICY_TYPES,
    _mostly(_rules(host_peers, "ingress", numbered_ports), st.none() | st.just([])),
    _mostly(_rules(host_peers, "egress", ports), st.none() | st.just([])),
    st.sampled_from((None, "deny", "allow")),
)


@st.composite
def pods(draw: st.DrawFn, number: int) -> Document:
    node = draw(st.sampled_from((NODE, NODE, NODE, *NODES)))
    in_host = draw(st.sampled_from((False,) * 7 + (True,)))
    kind = draw(st.sampled_from(("both",) * 6 + ("ipv4", "ipv6", "none", "taken")))
    mine = NODE_ADDRESSES[node] if in_host else POD_ADDRESSES[number if kind != "taken" else number - 1]
    addresses = {"ipv4": mine[:1], "ipv6": mine[1:], "none": ()}.get(kind, mine)
    named = draw(
        st.lists(
            st.builds(
                lambda name, port, protocol: {"name": name, "containerPort": port, "protocol": protocol},
                st.sampled_from(PORT_NAMES),
                st.sampled_from(PORTS[:2]),
                st.sampled_from(("TCP", "TCP", "UDP")),
            ),
            min_size=1,
            max_size=2,
        )
    )
    metadata: Document = {
        "name": f"pod-{number}",
        "namespace": draw(st.sampled_from(NAMESPACES)),
        "labels": draw(labels),
    }
    if draw(st.sampled_from((False, False, False, True))):
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "nodeName": node,
            "hostNetwork": in_host,
            "containers": [{"name": f"c{at}", "ports": [port]} for at, port in enumerate(named)],
        },
        "status": {
            "phase": draw(st.sampled_from(("Running",) * 6 + ("Pending", "Succeeded", "Failed"))),
            "podIPs": [{"ip": address} for address in addresses],
        },
    }


namespaces = st.builds(
    lambda name, labels: {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    },
    st.sampled_from(NAMESPACES),
    labels,
)
nodes = st.builds(
    lambda name, labels: {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in NODE_ADDRESSES[name]]
        },
    },
    st.sampled_from(NODES),
    labels,
)
some_pods = st.integers(0, PODS - 1).flatmap(pods)
documents = st.one_of(namespaces, nodes, some_pods, network_policies, host_policies)


@st.composite
def worlds(draw: st.DrawFn) -> list[Resource]:
    """Objects of a world, each name once."""
    found = [draw(pods(number)) for number in range(PODS)]
    found += draw(st.lists(namespaces | nodes, max_size=4))
    found += draw(st.lists(network_policies, min_size=2, max_size=5))
    found += draw(st.lists(host_policies, max_size=2))
    return list({resource.reference: resource for resource in map(parse, found)}.values())


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[Resource, bool]]:
    """Objects that come, in place of those of their name if there are any, or go (false)."""
    found = draw(st.lists(st.tuples(documents, st.booleans() | st.just(True)), min_size=1, max_size=3))
    return [(parse(document), stays) for document, stays in found]


# By hand.


def pod(name: str, number: int, *, node: str = "n", **fields: Any) -> Resource:
    """A pod with an address of each family that end in a number, and its name as the label ``app``."""
    namespace, _, name = name.rpartition("/")
    status = {"podIPs": [{"ip": f"10.0.0.{number}"}, {"ip": f"fd00::{number:x}"}], **fields.pop("status", {})}
    metadata = {"name": name, "namespace": namespace or "default", **fields.pop("metadata", {})}
    labels = {"labels": {"app": name}}
    return parse(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": labels | metadata,
            "spec": {"nodeName": node, **fields},
            "status": status,
        }
    )


def node(name: str, number: int, **labels: str) -> Resource:
    """A node with an address of each family that end in a number."""
    addresses = [
        {"type": "InternalIP", "address": text} for text in (f"10.1.0.{number}", f"fd01::{number:x}")
    ]
    return parse(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
            "status": {"addresses": addresses},
        }
    )


def netpol(name: str, audit: bool = False, **spec: Any) -> Resource:
    """A NetworkPolicy of the namespace ``default``."""
    annotations = {"hookline.dev/audit": "true"} if audit else {}
    return parse(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "annotations": annotations},
            "spec": spec,
        }
    )


def hostpol(name: str, **spec: Any) -> Resource:
    """A HostPolicy."""
    return parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "HostPolicy",
            "metadata": {"name": name},
            "spec": spec,
        }
    )
