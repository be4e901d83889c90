"""The kinds: what they accept, what they refuse and in which words, and that nothing is lost on the way."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline import model
from hookline.model import InvalidResource, Origin, parse

Document = dict[str, Any]

ORDERS: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "VirtualService",
    "metadata": {"name": "orders"},
    "spec": {
        "addresses": ["192.0.2.10", "2001:db8::10"],
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        "forwarding": "nat",
        "algorithm": "maglev",
        "backends": [{"address": "10.244.1.10", "weight": 100}, {"selector": {"app": "orders"}}],
    },
}
SERVICE: Document = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {
        "name": "web",
        "namespace": "shop",
        "creationTimestamp": None,
        "managedFields": [{"manager": "x"}],
    },
    "spec": {
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00::1"],
        "externalIPs": ["192.0.2.1"],
        "ports": [{"port": 80, "targetPort": "http", "nodePort": 30080, "appProtocol": "http"}],
        "selector": {"app": "web"},
        "ipFamilyPolicy": "PreferDualStack",
        "healthCheckNodePort": None,
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1", "ipMode": "VIP"}, {"hostname": "lb"}]}},
}
SLICE: Document = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "endpoints": [
        {"addresses": ["10.0.0.1"], "conditions": {"ready": None, "serving": None}, "nodeName": "n"},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": False, "serving": True, "terminating": True}},
        {"addresses": ["10.0.0.3"], "hints": {"forZones": [{"name": "a"}]}},
        {"addresses": ["10.0.0.4"], "conditions": {"ready": False}},
    ],
    "ports": [{"name": None, "port": 8080, "protocol": "TCP"}],
}
POD: Document = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web-a", "namespace": "shop", "labels": {"app": "web", "tier": "front"}},
    "spec": {
        "nodeName": "node-1",
        "containers": [
            {
                "name": "c",
                "image": "x",
                "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 53}],
            },
            {"name": "d", "ports": [{"name": "http", "containerPort": 9090, "protocol": "UDP"}]},
        ],
    },
    "status": {
        "podIP": "10.0.0.1",
        "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::7"}],
        "qosClass": "BestEffort",
    },
}
NODE: Document = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node-1"},
    "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"], "taints": []},
    "status": {
        "addresses": [
            {"type": "InternalIP", "address": "172.16.0.1"},
            {"type": "Hostname", "address": "node-1"},
        ]
    },
}
NAMESPACE: Document = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "shop"},
    "spec": {"finalizers": []},
}
HOST: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "ExternalHost",
    "metadata": {"name": "exchange"},
    "spec": {"addresses": ["203.0.113.5", "2001:db8::5"], "ports": [{"name": "fix", "port": 9876}]},
}
CONFIG: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "NodeConfig",
    "metadata": {"name": "node-1"},
    "spec": {
        "interfaces": [{"name": "eth0", "role": "uplink", "xdpMode": "native"}],
        "maps": {"connections": 65536, "maglevPages": 1024},
        "features": {"connectTime": "off"},
        "nat": {"portMin": 20000, "portMax": 30000},
    },
}
POLICY: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "ServicePolicy",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {
        "targetRef": {"kind": "Service", "name": "web"},
        "algorithm": "modulo",
        "healthCheck": {
            "type": "https",
            "port": 8443,
            "path": "/healthz",
            "host": "web.example",
            "expectedStatuses": [204, "200-201"],
            "intervalSeconds": 0.5,
            "timeoutSeconds": 0.25,
            "jitterPercent": 0,
            "rise": 1,
            "fall": 2,
            "tls": {"caFile": "/etc/ca.pem", "serverName": "web.example"},
        },
        "slowStartSeconds": 30,
        "drainSeconds": 1.5,
        "allDown": "failOpen",
        "sessionAffinity": {"type": "ClientIP", "timeoutSeconds": 60},
    },
}
REDIRECT: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "LocalRedirectPolicy",
    "metadata": {"name": "dns", "namespace": "kube-system"},
    "spec": {
        "redirectFrontend": {
            "addressMatcher": {
                "ip": "169.254.20.10",
                "toPorts": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            }
        },
        "redirectBackend": {
            "localEndpointSelector": {
                "matchLabels": {"app": "dns"},
                "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["old"]}],
            },
            "toPorts": [
                {"name": "dns", "port": 5353, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 5353},
            ],
        },
        "skipRedirectFromBackend": True,
        "description": "the node's own cache",
    },
}
CAPTURE: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "DNSCapture",
    "metadata": {"name": "names", "namespace": "shop"},
    "spec": {
        "podSelector": {"matchLabels": {"app": "web"}},
        "resolver": {"addresses": ["169.254.20.10", "fd00::53"], "port": 5353},
    },
}
NETPOL: Document = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "database", "namespace": "shop"},
    "spec": {
        "podSelector": {"matchLabels": {"example.com/app": "database"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [
                    {
                        "namespaceSelector": {},
                        "podSelector": {
                            "matchExpressions": [{"key": "app", "operator": "In", "values": ["web", ""]}]
                        },
                    },
                    {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}},
                ],
                "ports": [
                    {"protocol": "SCTP", "port": "postgres"},
                    {"port": 9100, "endPort": 9199},
                ],
            }
        ],
        "egress": [{"to": [{"ipBlock": {"cidr": "2001:0db8::/32"}}], "ports": [{"protocol": "UDP"}]}, {}],
    },
}
HOSTPOL: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "HostPolicy",
    "metadata": {"name": "edge"},
    "spec": {
        "nodeSelector": {"matchLabels": {"role": "edge"}},
        "ingress": [{"from": [{"nodeSelector": {}}, {"namespaceSelector": {}}], "ports": [{"port": 22}]}],
        "egress": [{"to": [{"ipBlock": {"cidr": "::/0"}}]}],
        "defaultVerdict": "allow",
    },
}
TABLE: Document = {
    "apiVersion": "hookline.dev/v1alpha1",
    "kind": "PolicyTest",
    "metadata": {"name": "table"},
    "spec": {
        "description": "what it is about",
        "source": "who says so",
        "resources": ["pods.yaml", NETPOL],
        "probes": [
            {"from": "a", "to": "shop/b", "port": 80, "expect": "allow"},
            {
                "from": ["external/x", "192.0.2.1"],
                "to": ["node/n", "2001:db8::1"],
                "port": [80, 81],
                "protocol": ["TCP", "SCTP"],
                "expect": "deny",
                "family": 4,
            },
        ],
        "steps": [{"remove": ["Pod/default/a"], "resources": [NAMESPACE], "description": "then"}],
    },
}
ALL = [
    *(ORDERS, SERVICE, SLICE, POD, NODE, NAMESPACE, HOST, CONFIG, POLICY, REDIRECT, CAPTURE),
    *(NETPOL, HOSTPOL, TABLE),
]


def changed(document: Document, path: str, value: Any) -> Document:
    """A copy with one field set: ``spec.ports.0.port``."""
    result = copy.deepcopy(document)
    *above, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = result
    for step in above:
        place = place[step]
    place[last] = value
    return result


def without(document: Document, path: str) -> Document:
    result = copy.deepcopy(document)
    *above, last = path.split(".")
    place: Any = result
    for step in above:
        place = place[step]
    del place[last]
    return result


def complaint(document: object) -> str:
    """The one problem of a document, without place and object."""
    with pytest.raises(InvalidResource) as caught:
        parse(document)
    assert len(caught.value.problems) == 1, str(caught.value)
    problem = caught.value.problems[0]
    return f"{problem.field}: {problem.why}" + (f" ({problem.remedy})" if problem.remedy else "")


# --- what is accepted


@pytest.mark.parametrize("document", ALL, ids=lambda document: document["kind"])
def test_round_trip(document: Document) -> None:
    resource = parse(document)
    written = resource.to_document()
    assert written == document
    assert parse(written) == resource
    assert hash(parse(written)) == hash(resource)
    assert list(written)[:2] == ["apiVersion", "kind"]


def test_virtual_service() -> None:
    service = parse(ORDERS)
    assert isinstance(service, model.VirtualService)
    assert service.reference == "VirtualService/default/orders"
    assert str(service) == service.reference
    assert service.addresses == (ip_address("192.0.2.10"), ip_address("2001:db8::10"))
    assert service.spec.ports[0].target == 8080
    assert service.spec.backends[0].address == ip_address("10.244.1.10")
    assert service.spec.backends[1].selector == {"app": "orders"}
    assert service.spec.backends[1].weight == 100


def test_virtual_service_defaults() -> None:
    spec = {"addresses": ["192.0.2.1"], "ports": [{"port": 53}], "backends": []}
    service = parse({**ORDERS, "spec": spec})
    assert isinstance(service, model.VirtualService)
    port = service.spec.ports[0]
    assert (port.name, port.target, port.protocol) == ("", 53, "TCP")
    assert (service.spec.forwarding, service.spec.algorithm, service.spec.table_size) == (
        "nat",
        "maglev",
        None,
    )
    assert service.to_document()["spec"] == spec


def test_addresses_are_canonical() -> None:
    service = parse(changed(ORDERS, "spec.addresses", ["2001:DB8:0::10", "192.0.2.10"]))
    assert service.to_document()["spec"]["addresses"] == ["2001:db8::10", "192.0.2.10"]


def test_service() -> None:
    service = parse(SERVICE)
    assert isinstance(service, model.Service)
    assert service.reference == "Service/shop/web"
    assert [str(address) for address in service.addresses] == [
        "10.96.0.1",
        "fd00::1",
        "192.0.2.1",
        "198.51.100.1",
    ]
    assert service.spec.ports[0].target == "http"
    assert not service.is_headless
    headless = parse(changed(changed(SERVICE, "spec.clusterIP", "None"), "spec.clusterIPs", ["None"]))
    assert isinstance(headless, model.Service)
    assert headless.is_headless


def test_endpoint_slice() -> None:
    endpoints = parse(SLICE)
    assert isinstance(endpoints, model.EndpointSlice)
    assert endpoints.service_reference == "Service/shop/web"
    assert [one.is_ready for one in endpoints.endpoints] == [True, False, True, False]
    assert [one.is_serving for one in endpoints.endpoints] == [True] * 4  # unknown counts as yes
    assert [one.is_terminating for one in endpoints.endpoints] == [False, True, False, False]
    assert endpoints.endpoints[0].ips == (ip_address("10.0.0.1"),)
    assert endpoints.ports[0].name is None
    assert parse(without(SLICE, "metadata.labels")).service_reference is None  # type: ignore[attr-defined]


def test_endpoint_slice_of_names() -> None:
    document = changed(changed(SLICE, "addressType", "FQDN"), "endpoints", [{"addresses": ["a.example"]}])
    endpoints = parse(document)
    assert isinstance(endpoints, model.EndpointSlice)
    assert endpoints.endpoints[0].ips == ()


def test_pod() -> None:
    pod = parse(POD)
    assert isinstance(pod, model.Pod)
    assert [str(address) for address in pod.addresses] == ["10.0.0.1", "fd00::7"]
    assert [port.container_port for port in pod.ports] == [8080, 53, 9090]
    assert pod.port_number("http", "TCP") == 8080
    assert pod.port_number("http", "UDP") == 9090
    assert pod.port_number("https", "TCP") is None
    assert pod.port_number(1, "TCP") == 1
    assert pod.matches({"app": "web"})
    assert not pod.matches({"app": "web", "tier": "back"})
    assert not pod.matches({})


def test_cluster_scoped() -> None:
    for document in (NODE, NAMESPACE, HOST, CONFIG):
        resource = parse(document)
        assert resource.namespace == ""
        assert resource.reference == f"{document['kind']}/{document['metadata']['name']}"
        assert not resource.is_namespaced()
    assert parse(NODE).addresses == (ip_address("172.16.0.1"),)  # type: ignore[attr-defined]


def test_external_host() -> None:
    host = parse({**HOST, "spec": {"address": "203.0.113.5"}})
    assert isinstance(host, model.ExternalHost)
    assert host.addresses == (ip_address("203.0.113.5"),)


def test_node_config() -> None:
    config = parse(without(CONFIG, "spec"))
    assert isinstance(config, model.NodeConfig)
    assert config.spec.interfaces == ()
    assert (config.spec.nat.port_min, config.spec.nat.port_max) == (10240, 29999)
    assert config.spec.maps.connections is None


def test_null_is_left_out() -> None:
    """Kubernetes writes ``endpoints: null`` and reads it as nothing; here too, wherever "
    "null has no meaning."""
    endpoints = parse(changed(changed(SLICE, "endpoints", None), "ports", None))
    assert isinstance(endpoints, model.EndpointSlice)
    assert endpoints.endpoints == ()
    service = parse(changed(ORDERS, "spec.forwarding", None))
    assert "forwarding" not in service.to_document()["spec"]
    assert complaint(changed(ORDERS, "spec.backends", None)) == "spec.backends: this field is required"


def test_equality_is_of_what_they_say() -> None:
    first, second = parse(ORDERS, Origin("a.yaml", 1)), parse(ORDERS, Origin("b.yaml", 9))
    assert first == second
    assert len({first, second}) == 1
    assert str(first.origin) == "a.yaml:1"
    assert first != parse(changed(ORDERS, "spec.algorithm", "modulo"))
    assert first != parse(SERVICE)


def test_objects_are_frozen() -> None:
    service = parse(ORDERS)
    with pytest.raises(pydantic.ValidationError):
        service.spec.forwarding = "dsr"  # type: ignore[attr-defined]


def test_made_in_python() -> None:
    service = model.VirtualService(
        metadata=model.OwnMetadata(name="orders"),
        spec=model.VirtualServiceSpec(
            addresses=(ip_address("192.0.2.10"),),
            ports=(model.VirtualServicePort(port=80, target_port=8080),),
            backends=(model.Backend(address=ip_address("10.0.0.1")),),
        ),
    )
    assert service.origin is None
    assert parse(service.to_document()) == service
    assert service.to_document()["spec"]["ports"] == [{"port": 80, "targetPort": 8080}]


def test_find_kind() -> None:
    for word in ("VirtualService", "virtualservice", "virtualservices", "vs"):
        assert model.find_kind(word) is model.VirtualService
    with pytest.raises(InvalidResource) as caught:
        model.find_kind("servise")
    assert str(caught.value) == (
        'kind: "servise" is not a kind that Hookline knows (did you mean Service? Supported: DNSCapture, '
        "EndpointSlice, ExternalHost, HostPolicy, LocalRedirectPolicy, Namespace, NetworkPolicy, Node, NodeConfig, Pod, "
        "PolicyTest, Service, ServicePolicy, VirtualService)"
    )


@pytest.mark.parametrize("kind", ["ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"])
def test_policies_of_the_whole_cluster_are_no_misspelling(kind: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        model.parse(
            {"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": kind, "metadata": {"name": "a"}}
        )
    assert f'kind: "{kind}" is not supported' in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_words_for_kinds_are_unique() -> None:
    words = [
        word
        for kind in model.supported_kinds()
        for word in (kind.kind.lower(), kind.plural, *kind.short_names)
    ]
    assert len(words) == len(set(words))


def test_traffic_settings() -> None:
    policy = parse(POLICY)
    assert isinstance(policy, model.ServicePolicy)
    assert policy.service_reference == "Service/shop/web"
    check = policy.spec.health_check
    assert check is not None
    assert [status for status in (199, 200, 201, 202, 204, 404) if check.accepts(status)] == [200, 201, 204]
    assert policy.spec.session_affinity is not None
    assert policy.spec.session_affinity.seconds == 60
    # The same fields stand in a VirtualService itself.
    settings = {name: value for name, value in POLICY["spec"].items() if name != "targetRef"}
    service = parse({**ORDERS, "spec": {**ORDERS["spec"], **settings}})
    assert isinstance(service, model.VirtualService)
    assert service.spec.health_check == check
    assert service.spec.drain_seconds == 1.5


def test_traffic_defaults() -> None:
    check = model.HealthCheck(type="tcp")
    assert (check.interval_seconds, check.timeout_seconds, check.rise, check.fall) == (2.0, 1.0, 2, 3)
    assert model.HealthCheck(type="tcp", interval_seconds=0.1).timeout_seconds == 0.1
    assert model.SessionAffinity().seconds == 10800
    assert model.SessionAffinity(type="None").seconds == 0
    settings = model.TrafficSettings()
    assert settings == model.TrafficSettings(
        algorithm="maglev", slow_start_seconds=0, drain_seconds=0, all_down="reset"
    )
    assert model.octets_of("0x00ff") == b"\x00\xff"
    assert model.octets_of("ping") == b"ping"


def test_service_policies_of_kubernetes() -> None:
    service = parse(changed(SERVICE, "spec.sessionAffinity", "ClientIP"))
    assert isinstance(service, model.Service)
    assert service.affinity_seconds == 10800
    config = {"clientIP": {"timeoutSeconds": 7}}
    service = parse(changed(service.to_document(), "spec.sessionAffinityConfig", config))
    assert isinstance(service, model.Service)
    assert service.affinity_seconds == 7
    assert [str(address) for address in service.cluster_addresses] == ["10.96.0.1", "fd00::1"]
    assert [str(address) for address in service.outside_addresses] == ["192.0.2.1", "198.51.100.1"]
    assert not service.has_node_ports
    proxied = parse(changed(SERVICE, "status.loadBalancer.ingress.0.ipMode", "Proxy"))
    assert isinstance(proxied, model.Service)
    assert [str(address) for address in proxied.outside_addresses] == ["192.0.2.1"]


def test_zones() -> None:
    node = parse(changed(NODE, "metadata.labels", {"topology.kubernetes.io/zone": "a"}))
    assert isinstance(node, model.Node)
    assert node.zone == "a"
    slice_ = parse(SLICE)
    assert isinstance(slice_, model.EndpointSlice)
    hints = slice_.endpoints[2].hints
    assert hints is not None
    assert [zone.name for zone in hints.for_zones] == ["a"]


def test_label_selectors() -> None:
    selector = model.LabelSelector.model_validate(
        {
            "matchLabels": {"a": "1"},
            "matchExpressions": [
                {"key": "b", "operator": "In", "values": ["1", "2"]},
                {"key": "c", "operator": "NotIn", "values": ["1"]},
                {"key": "d", "operator": "Exists"},
                {"key": "e", "operator": "DoesNotExist"},
            ],
        }
    )
    good = {"a": "1", "b": "2", "d": ""}
    assert selector.accepts(good)
    for label in ({"a": "2"}, {"b": "3"}, {"c": "1"}, {"e": ""}):
        assert not selector.accepts(good | label)
    assert not selector.accepts({"a": "1", "b": "2"})
    assert model.LabelSelector().accepts({})


# --- what is refused, and in which words


@pytest.mark.parametrize(
    ("document", "path", "value", "expected"),
    [
        (
            POLICY,
            "spec.drainSeconds",
            "5s",
            'spec.drainSeconds: "5s" is not a number of seconds from 0 to 86400 (write 5)',
        ),
        (POLICY, "spec.drainSeconds", -1, "spec.drainSeconds: -1 is not a number of seconds from 0 to 86400"),
        (
            POLICY,
            "spec.drainSeconds",
            True,
            "spec.drainSeconds: true is not a number of seconds from 0 to 86400",
        ),
        (
            POLICY,
            "spec.drainSeconds",
            float("nan"),
            "spec.drainSeconds: nan is not a number of seconds from 0 to 86400",
        ),
        (
            POLICY,
            "spec.allDown",
            "open",
            'spec.allDown: "open" is not one of failOpen, reset (did you mean failOpen?)',
        ),
        (
            POLICY,
            "spec.sessionAffinity.timeoutSeconds",
            0,
            "spec.sessionAffinity.timeoutSeconds: 0 is not a whole number from 1 to 86400",
        ),
        (
            POLICY,
            "spec.sessionAffinity.timeoutSeconds",
            86401,
            "spec.sessionAffinity.timeoutSeconds: 86401 is not a whole number from 1 to 86400",
        ),
        (POLICY, "spec.targetRef.kind", "Pod", 'spec.targetRef.kind: "Pod" is not one of Service'),
        (
            POLICY,
            "spec.healthCheck.type",
            "icmp",
            'spec.healthCheck.type: "icmp" is not one of tcp, http, https, udp, grpc, command',
        ),
        (
            POLICY,
            "spec.healthCheck",
            {"type": "tcp", "path": "/"},
            "spec.healthCheck.path: path is for checks of type http or https; this one is tcp (remove it)",
        ),
        (
            POLICY,
            "spec.healthCheck",
            {"type": "command"},
            (
                "spec.healthCheck: a check of type command needs the program and its arguments (add command: "
                "[/path/of/program])"
            ),
        ),
        (
            POLICY,
            "spec.healthCheck",
            {"type": "udp", "expect": "x"},
            "spec.healthCheck.expect: an answer is expected and nothing is sent (add send)",
        ),
        (
            POLICY,
            "spec.healthCheck",
            {"type": "udp", "send": "0xabc"},
            'spec.healthCheck.send: "0xabc" begins with 0x, and what follows is not pairs of hexadecimal digits',
        ),
        (
            POLICY,
            "spec.healthCheck.timeoutSeconds",
            0.75,
            "spec.healthCheck.timeoutSeconds: timeoutSeconds 0.75 is longer than intervalSeconds 0.5",
        ),
        (
            POLICY,
            "spec.healthCheck.path",
            "healthz",
            'spec.healthCheck.path: "healthz" is not a path: printable ASCII without spaces that begins with /',
        ),
        (
            POLICY,
            "spec.healthCheck.path",
            "/a\r\nX: y",
            "spec.healthCheck.path: '/a\\r\\nX: y' is not a path: printable ASCII without spaces that begins with /",
        ),
        (
            POLICY,
            "spec.healthCheck.expectedStatuses",
            [99],
            (
                "spec.healthCheck.expectedStatuses[0]: 99 is neither a status from 100 to 599 nor a range such as "
                '"200-299"'
            ),
        ),
        (POLICY, "spec.healthCheck.fall", 0, "spec.healthCheck.fall: 0 is not a whole number from 1 to 100"),
        (
            POLICY,
            "spec.healthCheck.intervalSecond",
            1,
            "spec.healthCheck.intervalSecond: there is no such field (did you mean intervalSeconds?)",
        ),
        (
            POLICY,
            "spec.healthCheck.tls.insecureSkipVerify",
            True,
            (
                "spec.healthCheck.tls.insecureSkipVerify: caFile says whom to trust and insecureSkipVerify that it "
                "does not matter (remove one of them)"
            ),
        ),
        (
            REDIRECT,
            "spec.redirectFrontend",
            {},
            (
                "spec.redirectFrontend: a frontend has exactly one of addressMatcher and serviceMatcher; this one has"
                " neither"
            ),
        ),
        (
            REDIRECT,
            "spec.redirectBackend.toPorts.0.name",
            "x",
            'spec.redirectFrontend.addressMatcher.toPorts[0].name: no port of redirectBackend is called "dns"',
        ),
        (
            REDIRECT,
            "spec.redirectBackend.toPorts.0.protocol",
            "TCP",
            "spec.redirectBackend.toPorts[1].port: 5353/TCP is already ports[0]",
        ),
        (
            REDIRECT,
            "spec.redirectFrontend.addressMatcher.ip",
            "127.0.0.1",
            (
                'spec.redirectFrontend.addressMatcher.ip: "127.0.0.1" is a loopback address, which is another '
                "machine's in every pod"
            ),
        ),
        (
            REDIRECT,
            "spec.redirectFrontend",
            {"serviceMatcher": {"serviceName": "dns", "namespace": "shop"}},
            (
                'spec.redirectFrontend.serviceMatcher.namespace: "shop" is not the policy\'s own namespace, kube-'
                "system: no one may take another namespace's traffic"
            ),
        ),
        (
            REDIRECT,
            "spec.redirectBackend.localEndpointSelector.matchExpressions.0.values",
            [],
            (
                "spec.redirectBackend.localEndpointSelector.matchExpressions[0].values: NotIn needs at least one "
                "value"
            ),
        ),
        (
            CAPTURE,
            "spec.resolver",
            {},
            "spec.resolver: a resolver has exactly one of address, addresses and selector; this one has none",
        ),
        (
            CAPTURE,
            "spec.resolver.addresses",
            ["10.0.0.1", "10.0.0.2"],
            "spec.resolver.addresses: one address of each family is enough",
        ),
        (
            CAPTURE,
            "spec.resolver.addresses.0",
            "fe80::1",
            'spec.resolver.addresses[0]: "fe80::1" is link-local: without an interface it means nothing',
        ),
        (
            SERVICE,
            "spec.trafficDistribution",
            "Far",
            'spec.trafficDistribution: "Far" is not one of PreferClose, PreferSameZone, PreferSameNode',
        ),
        (
            SERVICE,
            "spec.ports.0.nodePort",
            70000,
            "spec.ports[0].nodePort: 70000 is not a whole number from 0 to 65535",
        ),
    ],
)
def test_traffic_refuses(document: Document, path: str, value: Any, expected: str) -> None:
    assert complaint(changed(document, path, value)) == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec.addresses", [], "spec.addresses: at least one entry is needed"),
        (
            "spec.addresses",
            "192.0.2.1",
            (
                'spec.addresses: "192.0.2.1" is not a list '
                "(write each entry on a line of its own that begins with a hyphen)"
            ),
        ),
        (
            "spec.addresses.0",
            "10.0.0.0/24",
            (
                'spec.addresses[0]: "10.0.0.0/24" is a network; one plain host address is needed (write '
                "10.0.0.0)"
            ),
        ),
        ("spec.addresses.0", "10.0.0.256", 'spec.addresses[0]: "10.0.0.256" is not an IPv4 or IPv6 address'),
        ("spec.addresses.0", "010.0.0.1", 'spec.addresses[0]: "010.0.0.1" is not an IPv4 or IPv6 address'),
        (
            "spec.addresses.0",
            "orders.example",
            'spec.addresses[0]: "orders.example" is not an IPv4 or IPv6 address',
        ),
        ("spec.addresses.0", "", 'spec.addresses[0]: "" is not an IPv4 or IPv6 address'),
        (
            "spec.addresses.0",
            3221225994,
            "spec.addresses[0]: 3221225994 is not an IPv4 or IPv6 address, which is text such as 192.0.2.10",
        ),
        (
            "spec.addresses.0",
            "192.0.2.1:80",
            (
                'spec.addresses[0]: "192.0.2.1:80" has a port; one plain host address is needed '
                "(give the port in its own field)"
            ),
        ),
        (
            "spec.addresses.0",
            "[2001:db8::1]:80",
            (
                'spec.addresses[0]: "[2001:db8::1]:80" has a port; one plain host address is needed '
                "(give the port in its own field)"
            ),
        ),
        (
            "spec.addresses.0",
            "0.0.0.0",
            'spec.addresses[0]: "0.0.0.0" is the unspecified address, which means "any" or "none"',
        ),
        (
            "spec.addresses.0",
            "127.0.0.1",
            'spec.addresses[0]: "127.0.0.1" is a loopback address, which no packet from the network carries',
        ),
        (
            "spec.addresses.0",
            "ff02::1",
            'spec.addresses[0]: "ff02::1" is a multicast address; a unicast one is needed',
        ),
        (
            "spec.addresses.0",
            "169.254.0.1",
            (
                'spec.addresses[0]: "169.254.0.1" is link-local: it means something on one link only and '
                "is not routed"
            ),
        ),
        (
            "spec.addresses.0",
            "255.255.255.255",
            'spec.addresses[0]: "255.255.255.255" is the broadcast address; a unicast one is needed',
        ),
        (
            "spec.addresses.0",
            "fe80::1%eth0",
            'spec.addresses[0]: "fe80::1%eth0" has a zone, which means something on one machine only',
        ),
        (
            "spec.addresses.0",
            "::ffff:192.0.2.1",
            'spec.addresses[0]: "::ffff:192.0.2.1" is an IPv4 address in IPv6 clothes (write 192.0.2.1)',
        ),
        ("spec.addresses.1", "192.0.2.10", "spec.addresses[1]: 192.0.2.10 is already addresses[0]"),
        ("spec.ports", [], "spec.ports: at least one entry is needed"),
        ("spec.ports.0.port", 70000, "spec.ports[0].port: 70000 is not a whole number from 1 to 65535"),
        ("spec.ports.0.port", 0, "spec.ports[0].port: 0 is not a whole number from 1 to 65535"),
        (
            "spec.ports.0.port",
            "80",
            'spec.ports[0].port: "80" is not a whole number from 1 to 65535 (remove the quotes)',
        ),
        ("spec.ports.0.port", True, "spec.ports[0].port: true is not a whole number from 1 to 65535"),
        ("spec.ports.0.port", 80.0, "spec.ports[0].port: 80.0 is not a whole number from 1 to 65535"),
        ("spec.ports.0.port", [80], "spec.ports[0].port: a list is not a whole number from 1 to 65535"),
        (
            "spec.ports.0.targetPort",
            "8080",
            'spec.ports[0].targetPort: "8080" in quotes is a name, not a number (remove the quotes)',
        ),
        (
            "spec.ports.0.targetPort",
            65536,
            "spec.ports[0].targetPort: 65536 is neither a whole number from 1 to 65535 nor a port's name",
        ),
        (
            "spec.ports.0.targetPort",
            "HTTP",
            (
                'spec.ports[0].targetPort: "HTTP" is not a port\'s name: at most 15 of a-z, 0-9 and '
                "single hyphens, "
                "with at least one letter"
            ),
        ),
        (
            "spec.ports.0.targetPort",
            "http",
            (
                'spec.backends[0]: the targetPort "http" is a name that pods give a port; 10.244.1.10 is '
                "no pod "
                "(give this backend a port, or make targetPort a number)"
            ),
        ),
        (
            "spec.ports.0.protocol",
            "tcp",
            'spec.ports[0].protocol: "tcp" is not one of TCP, UDP (did you mean TCP?)',
        ),
        ("spec.ports.0.protocol", "SCTP", 'spec.ports[0].protocol: "SCTP" is not one of TCP, UDP'),
        ("spec.ports.0", 80, "spec.ports[0]: 80 is not a mapping of fields to values"),
        (
            "spec.ports",
            [{"name": "a", "port": 1}, {"name": "a", "port": 2}],
            'spec.ports[1].name: "a" is already the name of ports[0]',
        ),
        (
            "spec.ports",
            [{"name": "a", "port": 1}, {"port": 2}],
            "spec.ports[1].name: a name is required when there are several ports",
        ),
        (
            "spec.ports",
            [{"name": "a", "port": 1}, {"name": "b", "port": 1}],
            "spec.ports[1].port: 1/TCP is already ports[0]",
        ),
        ("spec.forwarding", "ipip", 'spec.forwarding: "ipip" is not there yet (use nat or dsr)'),
        ("spec.forwarding", "drs", 'spec.forwarding: "drs" is not one of nat, dsr (did you mean dsr?)'),
        (
            "spec.forwarding",
            "dsr",
            (
                "spec.ports[0].targetPort: 8080 is not the service's port 80: dsr changes only the "
                "layer-2 next hop and "
                "cannot rewrite the port (remove targetPort, or use forwarding: nat)"
            ),
        ),
        ("spec.algorithm", "random", 'spec.algorithm: "random" is not one of maglev, modulo'),
        ("spec.algorithm", ["maglev"], "spec.algorithm: a list is not one of maglev, modulo"),
        (
            "spec.tableSize",
            1024,
            (
                "spec.tableSize: 1024 is not prime, and only a prime table gives every backend its share "
                "(the next prime is 1031)"
            ),
        ),
        ("spec.tableSize", 65539, "spec.tableSize: 65539 is not a prime from 1021 to 65537"),
        (
            "spec.backends.0",
            {},
            "spec.backends[0]: a backend has exactly one of address and selector; this one has neither",
        ),
        (
            "spec.backends.0.selector",
            {"a": "b"},
            "spec.backends[0]: a backend has exactly one of address and selector; this one has both",
        ),
        (
            "spec.backends.1.selector",
            {},
            "spec.backends[1].selector: an empty selector matches nothing (name at least one label)",
        ),
        (
            "spec.backends.1.selector",
            {"a.b/c": 1},
            'spec.backends[1].selector["a.b/c"]: 1 is not text (put it in quotes)',
        ),
        (
            "spec.backends.0.weight",
            65536,
            "spec.backends[0].weight: 65536 is not a whole number from 0 to 65535",
        ),
        ("spec.backends.0.weight", -1, "spec.backends[0].weight: -1 is not a whole number from 0 to 65535"),
        (
            "spec.backends.0.wieght",
            5,
            "spec.backends[0].wieght: there is no such field (did you mean weight?)",
        ),
        (
            "spec.backends.0.address",
            "192.0.2.10",
            "spec.backends[0].address: 192.0.2.10 is the service's own address",
        ),
        (
            "spec.backends",
            [{"address": "10.0.0.1"}, {"address": "10.0.0.1"}],
            "spec.backends[1].address: 10.0.0.1 is already backends[0]",
        ),
        (
            "spec.addresses",
            ["2001:db8::10"],
            "spec.backends[0].address: 10.244.1.10 is IPv4, and the service has no IPv4 address",
        ),
        (
            "spec.target_port",
            5,
            (
                "spec.target_port: there is no such field "
                "(the fields here are algorithm, healthCheck, slowStartSeconds, drainSeconds, allDown, "
                "sessionAffinity, addresses, ports, forwarding, tableSize, backends)"
            ),
        ),
        ("spec", None, "spec: this field is required"),
        (
            "metadata.name",
            "Orders!",
            (
                'metadata.name: "Orders!" is not a name: at most 253 of a-z, 0-9, hyphens and dots, '
                "beginning and ending with a letter or digit"
            ),
        ),
        (
            "metadata.namespace",
            "a.b",
            (
                'metadata.namespace: "a.b" is not a namespace\'s name: at most 63 of a-z, 0-9 and hyphens, '
                "beginning and ending with a letter or digit"
            ),
        ),
        ("metadata.lables", {}, "metadata.lables: there is no such field (did you mean labels?)"),
        ("metadata.labels", {"app": True}, "metadata.labels.app: true is not text (put it in quotes)"),
        ("metadata", "orders", 'metadata: "orders" is not a mapping of fields to values'),
        ("status", {}, "status: there is no such field (the fields here are metadata, spec)"),
    ],
)
def test_virtual_service_refuses(path: str, value: Any, expected: str) -> None:
    assert complaint(changed(ORDERS, path, value)) == expected


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, ": null is not a resource (a resource is a mapping with apiVersion, kind and metadata)"),
        (
            [],
            ": an empty list is not a resource (a resource is a mapping with apiVersion, kind and metadata)",
        ),
        ("text", ': "text" is not a resource (a resource is a mapping with apiVersion, kind and metadata)'),
        (without(ORDERS, "kind"), ": kind is missing (add kind, such as VirtualService)"),
        (
            without(ORDERS, "apiVersion"),
            ": apiVersion is missing (add apiVersion, such as v1 or hookline.dev/v1alpha1)",
        ),
        (
            {**without(ORDERS, "apiVersion"), "apiversion": "v1"},
            ": apiVersion is missing (write apiVersion instead of apiversion)",
        ),
        (changed(ORDERS, "kind", 5), "kind: 5 is not text such as VirtualService"),
        (
            changed(ORDERS, "kind", "VirtualServce"),
            (
                'kind: "VirtualServce" is not a kind that Hookline knows (did you mean VirtualService? '
                "Supported: DNSCapture, EndpointSlice, ExternalHost, HostPolicy, LocalRedirectPolicy, Namespace, "
                "NetworkPolicy, Node, NodeConfig, Pod, PolicyTest, Service, ServicePolicy, VirtualService)"
            ),
        ),
        (
            changed(ORDERS, "apiVersion", "v1"),
            'apiVersion: "v1" has no kind VirtualService that Hookline knows (write hookline.dev/v1alpha1)',
        ),
        (without(ORDERS, "metadata"), "metadata: this field is required"),
        (without(ORDERS, "metadata.name"), "metadata.name: this field is required"),
        (without(ORDERS, "spec.backends"), "spec.backends: this field is required"),
        (
            changed(NODE, "metadata.namespace", "default"),
            'metadata.namespace: "default" is not allowed: a Node belongs to no namespace (remove it)',
        ),
        (
            changed(SERVICE, "spec.clusterIP", "10.96.0.300"),
            'spec.clusterIP: "10.96.0.300" is not an IPv4 or IPv6 address',
        ),
        (
            changed(SERVICE, "spec.ports.0.port", -1),
            "spec.ports[0].port: -1 is not a whole number from 1 to 65535",
        ),
        (
            changed(SERVICE, "spec.type", "LoadBalncer"),
            (
                'spec.type: "LoadBalncer" is not one of ClusterIP, NodePort, LoadBalancer, ExternalName '
                "(did you mean LoadBalancer?)"
            ),
        ),
        (
            changed(SLICE, "endpoints.1.addresses.0", "fd00::1"),
            'endpoints[1].addresses[0]: "fd00::1" is not IPv4, the slice\'s addressType',
        ),
        (
            changed(SLICE, "endpoints.1.addresses.0", "x"),
            'endpoints[1].addresses[0]: "x" is not an IPv4 or IPv6 address',
        ),
        (
            changed(SLICE, "endpoints.1.conditions.ready", "yes"),
            'endpoints[1].conditions.ready: "yes" is not true or false',
        ),
        (
            changed(POD, "spec.containers.0.ports.0.containerPort", 99999),
            "spec.containers[0].ports[0].containerPort: 99999 is not a whole number from 1 to 65535",
        ),
        (
            changed(POD, "status.podIP", "10.0.0.0/32"),
            'status.podIP: "10.0.0.0/32" is a network; one plain host address is needed (write 10.0.0.0)',
        ),
        (
            changed(NODE, "status.addresses.0.address", "x"),
            'status.addresses[0].address: "x" is not an IPv4 or IPv6 address',
        ),
        ({**HOST, "spec": {}}, "spec: a host has exactly one of address and addresses; this one has neither"),
        (
            changed(HOST, "spec.address", "203.0.113.6"),
            "spec: a host has exactly one of address and addresses; this one has both",
        ),
        (
            changed(CONFIG, "spec.interfaces.0.name", "an-interface-too-long"),
            (
                'spec.interfaces[0].name: "an-interface-too-long" is not an interface\'s name: '
                "1 to 15 bytes, no space, slash or colon"
            ),
        ),
        (
            changed(CONFIG, "spec.interfaces.0.role", "downlink"),
            'spec.interfaces[0].role: "downlink" is not one of uplink, pod',
        ),
        (
            changed(CONFIG, "spec.interfaces", [{"name": "a", "role": "pod"}, {"name": "a", "role": "pod"}]),
            'spec.interfaces[1].name: "a" is already interfaces[0]',
        ),
        (
            changed(CONFIG, "spec.maps.connections", 3),
            "spec.maps.connections: 3 is not a whole number from 1024 to 16777216",
        ),
        (
            changed(CONFIG, "spec.features.turbo", True),
            "spec.features.turbo: there is no such field (the fields here are connectTime)",
        ),
        (changed(CONFIG, "spec.nat.portMin", 30000), "spec.nat: portMin 30000 is not below portMax 30000"),
        (
            changed(CONFIG, "spec.nat.portMin", 80),
            "spec.nat.portMin: 80 is not a whole number from 1024 to 65535",
        ),
    ],
)
def test_refused(document: object, expected: str) -> None:
    assert complaint(document) == expected


def test_error_names_place_object_and_field() -> None:
    with pytest.raises(InvalidResource) as caught:
        parse(changed(ORDERS, "spec.ports.0.port", 70000), Origin("orders.yaml", 4), locate=lambda _: 12)
    error = caught.value
    assert error.what == "orders.yaml:12: VirtualService/default/orders: spec.ports[0].port"
    assert error.why == "70000 is not a whole number from 1 to 65535"
    assert str(error) == f"{error.what}: {error.why}"
    assert error.exit_status == 1


def test_all_problems_are_reported() -> None:
    document = changed(changed(ORDERS, "spec.ports.0.port", 0), "spec.backends.0.weigth", 1)
    with pytest.raises(InvalidResource) as caught:
        parse(document, Origin("orders.yaml", 4))
    assert len(caught.value.problems) == 2
    assert str(caught.value) == (
        "2 problems:\n"
        "orders.yaml:4: VirtualService/default/orders: spec.ports[0].port: "
        "0 is not a whole number from 1 to 65535\n"
        "orders.yaml:4: VirtualService/default/orders: spec.backends[0].weigth: "
        "there is no such field (did you mean weight?)"
    )


def test_dsr_refuses_a_backend_port() -> None:
    document = changed(without(ORDERS, "spec.ports"), "spec.ports", [{"port": 80}])
    document = changed(changed(document, "spec.forwarding", "dsr"), "spec.backends.0.port", 81)
    assert complaint(document).startswith(
        "spec.backends[0].port: 81 is not the service's port: dsr changes only"
    )


def test_a_thousand_problems_make_a_short_message() -> None:
    with pytest.raises(InvalidResource) as caught:
        parse(changed(ORDERS, "spec.backends", [{"weight": "x" * 1000}] * 1000))
    assert len(caught.value.problems) == 1000
    assert str(caught.value).endswith("and 980 more")
    assert len(str(caught.value)) < 5000


# --- garbage


def problems_of(document: object) -> tuple[model.Problem, ...]:
    try:
        parse(document, Origin("x.yaml", 1))
    except InvalidResource as error:
        str(error)  # can be printed
        return error.problems
    return ()


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["10.0.0.1", "TCP", "dsr", "fd00::/64", "\ud800", "default"])
)
fields = st.sampled_from(
    [
        "metadata",
        "spec",
        "status",
        "name",
        "namespace",
        "labels",
        "addresses",
        "ports",
        "port",
        "targetPort",
        "backends",
        "selector",
        "address",
        "clusterIP",
        "endpoints",
        "addressType",
        "conditions",
        "interfaces",
        "nat",
        "portMin",
        "maps",
        "podIP",
        "podIPs",
        "containers",
        "tableSize",
        "forwarding",
    ]
) | st.text(max_size=8)
garbage = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.integers(), inner, max_size=6),
    max_leaves=25,
)
heads = st.sampled_from([(document["apiVersion"], document["kind"]) for document in ALL])


@settings(max_examples=200, deadline=None)
@given(heads, st.dictionaries(fields, garbage, max_size=5))
def test_garbage_is_refused_in_words(head: tuple[str, str], body: Document) -> None:
    problems = problems_of({"apiVersion": head[0], "kind": head[1], **body})
    assert all(problem.why and problem.place for problem in problems)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_a_field_gone_wrong_is_refused_in_words(document: Document, data: st.DataObject) -> None:
    document = copy.deepcopy(document)
    place: Any = document
    while True:
        step = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[step], dict | list) and place[step] and data.draw(st.booleans())):
            break
        place = place[step]
    place[step] = data.draw(garbage)
    if not problems_of(document):
        resource = parse(document)
        assert parse(resource.to_document()).reference == resource.reference


@given(garbage)
def test_any_value_is_refused_in_words(value: object) -> None:
    with pytest.raises(InvalidResource):
        parse(value)
