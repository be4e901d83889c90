"""NetworkPolicy, HostPolicy and PolicyTest: what is refused and in which words, and what null, missing and empty mean."""

from __future__ import annotations

from typing import Any

import pytest

from hookline.model import (
    HostPolicy,
    InvalidResource,
    LabelExpression,
    LabelSelector,
    NetworkPolicy,
    PolicyTest,
    Refused,
    network_of,
    parse,
)
from hookline.sources import files

LONGEST_KEY = "x" * 253 + "/" + "Y" * 63
LONGEST_VALUE = "A" + "_" * 61 + "z"


def policy(spec: Any, **metadata: Any) -> NetworkPolicy:
    document = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", **metadata},
    }
    found = parse({**document, "spec": spec} if spec is not ... else document)
    assert isinstance(found, NetworkPolicy)
    return found


def host_policy(spec: Any) -> HostPolicy:
    found = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "HostPolicy",
            "metadata": {"name": "h"},
            "spec": spec,
        }
    )
    assert isinstance(found, HostPolicy)
    return found


def table(spec: Any) -> PolicyTest:
    found = parse(
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "PolicyTest",
            "metadata": {"name": "t"},
            "spec": spec,
        }
    )
    assert isinstance(found, PolicyTest)
    return found


def complaints(error: InvalidResource) -> list[str]:
    return [
        f"{problem.field}: {problem.why}" + (f" ({problem.remedy})" if problem.remedy else "")
        for problem in error.problems
    ]


# --- null, missing and empty


@pytest.mark.parametrize("spec", [..., None, {}, {"podSelector": None}, {"podSelector": {}}])
def test_a_policy_that_says_nothing_isolates_its_namespace_for_ingress(spec: Any) -> None:
    found = policy(spec).spec
    assert found.pod_selector == LabelSelector()
    assert found.effective_types == ("Ingress",)
    assert (found.ingress, found.egress) == ((), ())


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ({"egress": None}, ("Ingress",)),
        ({"egress": []}, ("Ingress",)),
        ({"egress": [{}]}, ("Ingress", "Egress")),
        ({"ingress": [], "egress": [{}], "policyTypes": None}, ("Ingress", "Egress")),
        ({"egress": [{}], "policyTypes": []}, ("Ingress", "Egress")),
        ({"egress": [{}], "policyTypes": ["Ingress"]}, ("Ingress",)),
        ({"ingress": [{}], "policyTypes": ["Egress"]}, ("Egress",)),
        ({"policyTypes": ["Egress", "Egress"]}, ("Egress", "Egress")),
    ],
)
def test_policy_types(spec: Any, types: tuple[str, ...]) -> None:
    assert policy(spec).spec.effective_types == types
    assert host_policy(spec).spec.effective_types == types


def test_lists_that_are_null_missing_or_empty_are_the_same() -> None:
    rules = policy({"ingress": [{}, {"from": None, "ports": None}, {"from": [], "ports": []}]}).spec.ingress
    assert [(rule.from_, rule.ports) for rule in rules] == [((), ())] * 3


def test_selectors_that_are_null_are_missing_and_empty_ones_are_there() -> None:
    (rule,) = policy(
        {
            "ingress": [
                {
                    "from": [
                        {"podSelector": {}, "namespaceSelector": None, "ipBlock": None},
                        {"namespaceSelector": {"matchLabels": None, "matchExpressions": None}},
                    ]
                }
            ]
        }
    ).spec.ingress
    first, second = rule.from_
    assert (first.pod_selector, first.namespace_selector) == (LabelSelector(), None)
    assert (second.pod_selector, second.namespace_selector) == (None, LabelSelector())
    assert rule.peers == rule.from_


def test_a_label_that_is_null_is_empty_and_stays() -> None:
    found = policy({"podSelector": {"matchLabels": {"app": None}}}, labels={"a": None})
    assert found.spec.pod_selector.match_labels == {"app": ""}
    assert not found.spec.pod_selector.accepts({})
    assert found.labels == {"a": ""}


def test_ports() -> None:
    (rule,) = policy(
        {
            "egress": [
                {
                    "ports": [
                        {},
                        {"protocol": None, "port": None, "endPort": None},
                        {"port": "http", "protocol": "SCTP"},
                        {"port": 1, "endPort": 65535},
                        {"port": 80, "endPort": 80},
                    ]
                }
            ]
        }
    ).spec.egress
    assert [(port.protocol, port.port, port.end_port) for port in rule.ports] == [
        ("TCP", None, None),
        ("TCP", None, None),
        ("SCTP", "http", None),
        ("TCP", 1, 65535),
        ("TCP", 80, 80),
    ]


def test_blocks_are_kept_as_written() -> None:
    text = "2001:0DB8:0:0::/32"
    (rule,) = policy(
        {"ingress": [{"from": [{"ipBlock": {"cidr": text, "except": ["2001:db8::/33"]}}]}]}
    ).spec.ingress
    block = rule.from_[0].ip_block
    assert block is not None
    assert block.cidr == text
    assert str(block.network) == "2001:db8::/32"
    assert [str(hole) for hole in block.holes] == ["2001:db8::/33"]


def test_labels_at_their_limits() -> None:
    found = policy(
        {
            "podSelector": {
                "matchLabels": {LONGEST_KEY: LONGEST_VALUE},
                "matchExpressions": [{"key": "a", "operator": "In", "values": ["", LONGEST_VALUE]}],
            }
        },
        labels={LONGEST_KEY: LONGEST_VALUE, "A.b_c-d": "", "0/0": "0"},
    )
    assert found.spec.pod_selector.accepts({LONGEST_KEY: LONGEST_VALUE, "a": LONGEST_VALUE})
    assert files.loads(files.dump([found])) == [found]


# --- what is refused


def in_peer(peer: Any) -> Any:
    return {"ingress": [{"from": [peer]}]}


def in_ports(port: Any) -> Any:
    return {"ingress": [{"ports": [port]}]}


def in_block(**block: Any) -> Any:
    return in_peer({"ipBlock": block})


def in_selector(selector: Any) -> Any:
    return {"podSelector": selector}


KEY = "at most 63 letters, digits, hyphens, underscores and dots, beginning and ending with a letter or digit"
PEER, PORT, BLOCK = "spec.ingress[0].from[0]", "spec.ingress[0].ports[0]", "spec.ingress[0].from[0].ipBlock"
NOT_A_NETWORK = "is not a network such as 192.0.2.0/24 or 2001:db8::/64"
FIRST = "spec.podSelector.matchExpressions[0]"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"podselector": {}}, ["spec.podselector: there is no such field (did you mean podSelector?)"]),
        ([], ["spec: an empty list is not a mapping of fields to values"]),
        ({"podSelector": "app=a"}, ['spec.podSelector: "app=a" is not a mapping of fields to values']),
        (
            {"policyTypes": ["ingress"]},
            ['spec.policyTypes[0]: "ingress" is not one of Ingress, Egress (did you mean Ingress?)'],
        ),
        (
            {"policyTypes": ["Ingress", "Egress", "Ingress"]},
            ["spec.policyTypes: there are more than two policyTypes (Ingress, Egress or both)"],
        ),
        ({"ingress": [None]}, ["spec.ingress[0]: null is not a mapping of fields to values"]),
        (
            {"ingress": {}},
            [
                (
                    "spec.ingress: an empty mapping is not a list (write each entry on a line of its own that begins "
                    "with a hyphen)"
                )
            ],
        ),
        (
            {"ingress": [{"to": []}]},
            ["spec.ingress[0].to: there is no such field (the fields here are from, ports)"],
        ),
        (
            {"egress": [{"from": []}]},
            ["spec.egress[0].from: there is no such field (the fields here are to, ports)"],
        ),
        # peers
        (
            in_peer(None),
            [f"{PEER}: null is no peer ({{podSelector: {{}}}} is every pod of the policy's namespace)"],
        ),
        (
            in_peer({"podSelector": None}),
            [
                (
                    f"{PEER}: a peer has podSelector, namespaceSelector or ipBlock; this one has none (leave the whole "
                    "list out to mean everybody)"
                )
            ],
        ),
        (
            in_peer({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}),
            [
                (
                    f"{PEER}: ipBlock stands alone: pods are not chosen by their addresses (make two entries of it, "
                    "which means either)"
                )
            ],
        ),
        (
            in_peer({"nodeSelector": {}}),
            [
                f"{PEER}.nodeSelector: there is no such field (did you mean podSelector?)",
            ],
        ),
        # ports
        (
            in_ports({"protocol": "tcp"}),
            [f'{PORT}.protocol: "tcp" is not one of TCP, UDP, SCTP (did you mean TCP?)'],
        ),
        (in_ports({"protocol": "ICMP"}), [f'{PORT}.protocol: "ICMP" is not one of TCP, UDP, SCTP']),
        (in_ports({"protocol": ""}), [f'{PORT}.protocol: "" is not one of TCP, UDP, SCTP']),
        *(
            (
                in_ports({"port": wrong}),
                [f"{PORT}.port: {wrong} is neither a whole number from 1 to 65535 nor a port's name"],
            )
            for wrong in (0, -1, 65536, 80.5)
        ),
        (
            in_ports({"port": "80"}),
            [f'{PORT}.port: "80" in quotes is a name, not a number (remove the quotes)'],
        ),
        *(
            (
                in_ports({"port": wrong}),
                [
                    (
                        f'{PORT}.port: "{wrong}" is not a port\'s name: at most 15 of a-z, 0-9 and single hyphens, with '
                        "at least one letter"
                    )
                ],
            )
            for wrong in ("HTTP", "-http", "http-", "ht--tp", "sixteen-letters-", "1-2", "", "a_b")
        ),
        (in_ports({"endPort": 80}), [f"{PORT}.endPort: endPort needs port, the range's first"]),
        (
            in_ports({"port": "http", "endPort": 80}),
            [
                (
                    f'{PORT}.endPort: port is the name "http"; only a range of numbers has an endPort (remove endPort, '
                    "or write port as a number)"
                )
            ],
        ),
        (in_ports({"port": 80, "endPort": 79}), [f"{PORT}.endPort: 79 is below port, 80"]),
        (
            in_ports({"port": 80, "endPort": 65536}),
            [f"{PORT}.endPort: 65536 is not a whole number from 1 to 65535"],
        ),
        (
            in_ports({"port": 80, "endPort": "90"}),
            [f'{PORT}.endPort: "90" is not a whole number from 1 to 65535 (remove the quotes)'],
        ),
        # blocks
        (in_block(), [f"{BLOCK}.cidr: this field is required"]),
        (in_block(cidr=None), [f"{BLOCK}.cidr: this field is required"]),
        (in_block(cidr=""), [f'{BLOCK}.cidr: "" {NOT_A_NETWORK}']),
        (
            in_block(cidr="10.0.0.0"),
            [f'{BLOCK}.cidr: "10.0.0.0" is an address; a network is needed (write 10.0.0.0/32)'],
        ),
        (
            in_block(cidr="fd00::1"),
            [f'{BLOCK}.cidr: "fd00::1" is an address; a network is needed (write fd00::1/128)'],
        ),
        *(
            (in_block(cidr=wrong), [f'{BLOCK}.cidr: "{wrong}" {NOT_A_NETWORK}'])
            for wrong in (
                "example.com/24",
                "10.0.0/8",
                "010.0.0.0/8",
                "10.0.0.256/32",
                "fe80::%eth0/64",
                "/8",
            )
        ),
        *(
            (
                in_block(cidr=wrong),
                [
                    f'{BLOCK}.cidr: "{wrong}" is not a network: after the slash stands a number from 0 to {most}'
                ],
            )
            for wrong, most in (
                ("10.0.0.0/33", 32),
                ("10.0.0.0/08", 32),
                ("10.0.0.0/-1", 32),
                ("10.0.0.0/", 32),
                ("10.0.0.0/255.0.0.0", 32),
                ("10.0.0.0/8/8", 32),
                ("fd00::/129", 128),
            )
        ),
        (
            in_block(cidr="10.0.0.1/24"),
            [
                (
                    f'{BLOCK}.cidr: "10.0.0.1/24" has bits beyond its prefix, so it may mean two things (write 10.0.0.0/24 '
                    "for the network, 10.0.0.1/32 for the one address)"
                )
            ],
        ),
        (
            in_block(cidr="::ffff:10.0.0.0/104"),
            [f'{BLOCK}.cidr: "::ffff:10.0.0.0/104" is a network of IPv4 addresses in IPv6 clothes'],
        ),
        (in_block(cidr=10), [f"{BLOCK}.cidr: 10 is not text (put it in quotes)"]),
        (
            in_block(
                cidr="10.0.0.0/24", **{"except": ["10.0.0.0/24", "10.0.0.0/23", "10.0.1.0/25", "fd00::/64"]}
            ),
            [
                f"{BLOCK}.except[{index}]: {hole} is not a smaller network within 10.0.0.0/24, the cidr"
                for index, hole in enumerate(("10.0.0.0/24", "10.0.0.0/23", "10.0.1.0/25", "fd00::/64"))
            ],
        ),
        (
            in_block(cidr="10.0.0.0/24", **{"except": ["10.0.0.1"]}),
            [f'{BLOCK}.except[0]: "10.0.0.1" is an address; a network is needed (write 10.0.0.1/32)'],
        ),
        # selectors
        (
            in_selector({"app": "a"}),
            [
                "spec.podSelector.app: there is no such field (the fields here are matchLabels, matchExpressions)"
            ],
        ),
        (
            in_selector({"matchLabels": {"app": 1}}),
            ["spec.podSelector.matchLabels.app: 1 is not text (put it in quotes)"],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            [f"{FIRST}.values: In needs at least one value"],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": []}]}),
            [f"{FIRST}.values: NotIn needs at least one value"],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}),
            [f"{FIRST}.values: Exists takes no values (remove them)"],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}),
            [f'{FIRST}.operator: "Gt" is not one of In, NotIn, Exists, DoesNotExist'],
        ),
        (
            in_selector({"matchExpressions": [{"operator": "Exists"}]}),
            [f"{FIRST}.key: this field is required"],
        ),
        (in_selector({"matchExpressions": [{"key": "a"}]}), [f"{FIRST}.operator: this field is required"]),
        (
            in_selector({"matchExpressions": [{"key": "", "operator": "Exists"}]}),
            [f'{FIRST}.key: "" is not a label\'s key: {KEY}'],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a/b/c", "operator": "Exists"}]}),
            [
                (
                    f'{FIRST}.key: "a/b/c" is not a label\'s key: before the slash stands a DNS name of at most 253 of '
                    "a-z, 0-9, hyphens and dots"
                )
            ],
        ),
        (
            in_selector({"matchExpressions": [{"key": "a/" + "x" * 64, "operator": "Exists"}]}),
            [f'{FIRST}.key: "a/{"x" * 57}…" is not a label\'s key: after the slash stand {KEY}'],
        ),
        (
            in_selector({"matchLabels": {"a": "x" * 64}}),
            [f'spec.podSelector.matchLabels.a: "{"x" * 59}…" is not a label\'s value: empty, or {KEY}'],
        ),
        (
            in_selector({"matchLabels": {"a": "-"}}),
            [f'spec.podSelector.matchLabels.a: "-" is not a label\'s value: empty, or {KEY}'],
        ),
        (
            in_selector({"matchLabels": {"a\n": "b"}}),
            [f"spec.podSelector.matchLabels['a\\n']: 'a\\n' is not a label's key: {KEY}"],
        ),
    ],
)
def test_network_policy_refuses(spec: Any, expected: list[str]) -> None:
    with pytest.raises(InvalidResource) as caught:
        policy(spec)
    assert complaints(caught.value) == expected


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"labels": {"a b": "c"}}, 'metadata.labels["a b"]'),
        ({"labels": {"a": "b c"}}, "metadata.labels.a"),
        ({"labels": {"X.com/a": ""}}, 'metadata.labels["X.com/a"]'),
        ({"labels": {"x" * 254 + "/a": ""}}, f'metadata.labels["{"x" * 59}…"]'),
        ({"label": {}}, "metadata.label"),
        ({"name": "Upper"}, "metadata.name"),
        ({"name": "a" * 254}, "metadata.name"),
        ({"namespace": "a.b"}, "metadata.namespace"),
        ({"namespace": "a" * 64}, "metadata.namespace"),
    ],
)
def test_metadata_is_refused(metadata: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        policy({}, **metadata)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_a_status_is_refused() -> None:
    document = policy({}).to_document()
    with pytest.raises(InvalidResource, match="there is no such field"):
        parse({**document, "status": {}})


def test_what_is_wrong_is_all_said_at_once_with_its_line() -> None:
    text = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p}
spec:
  podSelector: {matchLabels: {"a b": c}}
  ingress:
    - from:
        - ipBlock: {cidr: 10.0.0.0/99}
      ports:
        - port: 0
        - {port: 80, endprt: 90}
"""
    with pytest.raises(InvalidResource) as caught:
        files.loads(text, "p.yaml")
    assert sorted(problem.place for problem in caught.value.problems) == [
        "p.yaml:10",
        "p.yaml:11",
        "p.yaml:5",
        "p.yaml:8",
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            in_peer({"podSelector": {}}),
            [
                (
                    f"{PEER}.podSelector: a HostPolicy is in no namespace, so podSelector needs namespaceSelector "
                    "(namespaceSelector: {} takes every namespace)"
                )
            ],
        ),
        (
            in_peer({"nodeSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}),
            [
                (
                    f"{PEER}: a peer is pods, nodes or addresses; this one has nodeSelector and ipBlock (make an entry of "
                    "each, which means either)"
                )
            ],
        ),
        (in_peer(None), [f"{PEER}: null is no peer ({{nodeSelector: {{}}}} is every node)"]),
        (
            in_peer({}),
            [
                (
                    f"{PEER}: a peer has podSelector, namespaceSelector, nodeSelector or ipBlock; this one has none (leave "
                    "the whole list out to mean everybody)"
                )
            ],
        ),
        (
            in_ports({"port": "http"}),
            [f'{PORT}.port: "http" is a name, and a node\'s ports have none (write the number)'],
        ),
        ({"podSelector": {}}, ["spec.podSelector: there is no such field (did you mean nodeSelector?)"]),
        ({"defaultVerdict": "drop"}, ['spec.defaultVerdict: "drop" is not one of deny, allow']),
    ],
)
def test_host_policy_refuses(spec: Any, expected: list[str]) -> None:
    with pytest.raises(InvalidResource) as caught:
        host_policy(spec)
    assert complaints(caught.value) == expected


def test_a_host_policy_is_in_no_namespace() -> None:
    document = host_policy({}).to_document()
    document["metadata"]["namespace"] = "shop"
    with pytest.raises(InvalidResource, match="belongs to no namespace"):
        parse(document)


# --- tables

ASKED = {"from": "a", "to": "b", "port": 80, "expect": "allow"}


def test_a_line_of_a_table_is_every_combination() -> None:
    found = table(
        {
            "probes": [
                {**ASKED, "from": ["a", "shop/b"], "port": [80, 81], "protocol": ["TCP", "UDP"], "family": 6},
                ASKED,
            ]
        }
    ).spec.probes
    assert len(found) == 9
    assert [(one.source, one.protocol, one.port, one.family) for one in found[:5]] == [
        ("a", "TCP", 80, 6),
        ("a", "TCP", 81, 6),
        ("a", "UDP", 80, 6),
        ("a", "UDP", 81, 6),
        ("shop/b", "TCP", 80, 6),
    ]
    assert (found[8].target, found[8].expect, found[8].family) == ("b", "allow", None)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ["spec.probes: the table asks nothing (add a probe)"]),
        (
            {"probes": [{**ASKED, "port": list(range(1, 60_000)), "protocol": ["TCP", "UDP"]}]},
            ["spec.probes: the table has 119998 probes; at most 100000 are tried (split it)"],
        ),
        ({"probes": [], "steps": [{}]}, ["spec.probes: the table asks nothing (add a probe)"]),
        (
            {"probes": [{**ASKED, "expect": "accept"}]},
            ['spec.probes[0].expect: "accept" is not one of allow, deny'],
        ),
        ({"probes": [{**ASKED, "from": []}]}, ["spec.probes[0].from: at least one entry is needed"]),
        ({"probes": [{**ASKED, "family": 5}]}, ["spec.probes[0].family: 5 is not one of 4, 6"]),
        (
            {"probes": [{**ASKED, "protocol": "ICMP"}]},
            ['spec.probes[0].protocol[0]: "ICMP" is not one of TCP, UDP, SCTP'],
        ),
        (
            {"probes": [{**ASKED, "port": [80, 0]}]},
            ["spec.probes[0].port[1]: 0 is not a whole number from 1 to 65535"],
        ),
        (
            {"probes": [{**ASKED, "to": "shop/b:80"}]},
            ['spec.probes[0].to[0]: "shop/b:80" has a port (write shop/b, and the port in port)'],
        ),
        (
            {"probes": [{**ASKED, "to": "a/b/c"}]},
            [
                (
                    "spec.probes[0].to[0]: 'a/b/c' is not an endpoint: it is neither a name nor an address (say "
                    "NAMESPACE/POD, POD, external/NAME, ADDRESS or [ADDRESS] (IPv6), and :PORT[/tcp|udp|sctp])"
                )
            ],
        ),
        (
            {"probes": [{**ASKED, "to": 7}]},
            ["spec.probes[0].to[0]: 7 is not an end: a pod, external/NAME, node/NAME or an address"],
        ),
        ({"probes": [ASKED], "resources": [""]}, ["spec.resources[0]: a file's name is empty"]),
        (
            {"probes": [ASKED], "resources": ["a.yaml", "a.yaml"]},
            ["spec.resources[1]: a.yaml is already resources[0]"],
        ),
        (
            {"probes": [ASKED], "resources": [{"apiVersion": "v1", "kind": "Pod"}]},
            ["spec.resources[0].metadata: this field is required"],
        ),
        (
            {
                "probes": [ASKED],
                "steps": [
                    {
                        "resources": [
                            {
                                "apiVersion": "networking.k8s.io/v1",
                                "kind": "NetworkPolicy",
                                "metadata": {"name": "p"},
                                "spec": in_ports({"port": 0}),
                            }
                        ]
                    }
                ],
            },
            [
                (
                    "spec.steps[0].resources[0].spec.ingress[0].ports[0].port: 0 is neither a whole number from 1 to 65535 "
                    "nor a port's name"
                )
            ],
        ),
        (
            {
                "probes": [ASKED],
                "resources": [
                    {
                        "apiVersion": "hookline.dev/v1alpha1",
                        "kind": "PolicyTest",
                        "metadata": {"name": "inner"},
                        "spec": {"probes": [ASKED]},
                    }
                ],
            },
            ["spec.resources[0].kind: a PolicyTest is no resource of another"],
        ),
    ],
)
def test_table_refuses(spec: Any, expected: list[str]) -> None:
    with pytest.raises(InvalidResource) as caught:
        table(spec)
    assert complaints(caught.value) == expected


# --- hostile input


def test_two_policies_of_one_name_are_refused_in_one_namespace_and_accepted_in_two() -> None:
    text = files.dump([policy({}), policy({"policyTypes": ["Egress"]})])
    with pytest.raises(InvalidResource, match="the same object is already at"):
        files.loads(text)
    files.loads(files.dump([policy({}), policy({}, namespace="shop")]))


def test_a_hundred_thousand_rules_are_read() -> None:
    rules = [
        {
            "from": [{"ipBlock": {"cidr": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"}}],
            "ports": [{"port": number % 65535 + 1}],
        }
        for number in range(100_000)
    ]
    found = policy({"ingress": rules}).spec
    assert len(found.ingress) == 100_000


def test_one_wrong_rule_among_ten_thousand_is_named() -> None:
    rules: list[Any] = [{"ports": [{"port": 80}]} for _ in range(10_000)]
    rules[9_999] = {"ports": [{"port": 0}]}
    with pytest.raises(InvalidResource) as caught:
        policy({"ingress": rules})
    assert [problem.field for problem in caught.value.problems] == ["spec.ingress[9999].ports[0].port"]


def test_selectors_take_labels_as_kubernetes_says() -> None:
    not_in = LabelExpression(key="a", operator="NotIn", values=("x",))
    within = LabelExpression(key="a", operator="In", values=("", "x"))
    assert not_in.accepts({})
    assert not_in.accepts({"a": ""})
    assert not not_in.accepts({"a": "x"})
    assert not within.accepts({})
    assert within.accepts({"a": ""})


def test_networks() -> None:
    assert str(network_of("0.0.0.0/0")) == "0.0.0.0/0"
    assert str(network_of("::/0")) == "::/0"
    assert network_of("FD00:0:0::/8") == network_of("fd00::/8")
    with pytest.raises(Refused):
        network_of("fd00::1/8")
