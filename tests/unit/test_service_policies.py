"""What Kubernetes' Services say of who is served by which endpoint, row by row; and changes that touch only what they must."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline import model
from hookline.control._errors import Conflict
from hookline.control.catalogue import Catalogue
from hookline.control.compiling import state_of
from hookline.control.inventory import Here
from hookline.control.pools import Pool
from hookline.model import Resource, parse

Document = dict[str, Any]
HERE = Here(frozenset({"node-1"}))
SERVICE = "Service/default/web"


def _node(name: str, *addresses: str, zone: str = "") -> Document:
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


NODES = [
    _node("node-1", "172.16.0.1", "fd00:16::1", zone="a"),
    _node("node-2", "172.16.0.2", "fd00:16::2", zone="a"),
    _node("node-3", "172.16.0.3", "fd00:16::3", zone="b"),
]


def _service(status: Document | None = None, **spec: Any) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080}],
        }
        | spec,
        "status": status or {},
    }


def _endpoint(address: str, node: str = "node-1", ready: bool | None = True, **more: Any) -> Document:
    others = {key: more.pop(key) for key in ("serving", "terminating") if key in more}
    conditions = {"ready": ready} | others
    return {"addresses": [address], "nodeName": node, "conditions": conditions, **more}


def _slice(*endpoints: Document, name: str = "web-1", service: str = "web") -> Document:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv6" if ":" in endpoints[0]["addresses"][0] else "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": list(endpoints),
    }


def _pod(name: str, address: str, node: str = "node-1", ready: str = "True", **labels: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels or {"app": "web"}},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": address, "conditions": [{"type": "Ready", "status": ready}]},
    }


def _catalogue(*documents: Document, here: Here = HERE) -> Catalogue:
    return Catalogue.of([parse(document) for document in documents], here)


def _rows(catalogue: Catalogue, reference: str = SERVICE) -> dict[str, list[str]]:
    """Who takes new connections, by frontend; frontends of sockets of this node begin with ``inside``."""
    found: dict[str, list[str]] = {}
    for pool in catalogue.pools[reference]:
        for frontend in pool.frontends:
            name = ("inside " if frontend.scope == "inside" else "") + str(frontend)
            assert name not in found, "a frontend is in one pool"
            found[name] = [str(target.address) for target in pool.active]
    return found


# Conditions


@pytest.mark.parametrize(
    ("ready", "serving", "terminating", "state"),
    [
        (True, True, False, "active"),
        (True, True, True, "active"),
        (True, False, False, "active"),
        (True, False, True, "active"),
        (False, True, True, "draining"),
        (False, True, False, "down"),
        (False, False, True, "down"),
        (False, False, False, "down"),
    ],
)
def test_state_by_conditions(ready: bool, serving: bool, terminating: bool, state: str) -> None:
    assert state_of(ready=ready, serving=serving, terminating=terminating) == state
    catalogue = _catalogue(
        _service(),
        _slice(
            _endpoint("10.0.0.1", ready=ready, serving=serving, terminating=terminating),
            _endpoint("10.0.0.2"),
        ),
    )
    assert catalogue.pools[SERVICE][0].targets[0].state == state


def test_unknown_conditions() -> None:
    """Not known: ready is yes, serving is yes, terminating is no (discovery.k8s.io/v1)."""
    catalogue = _catalogue(
        _service(),
        _slice(
            {"addresses": ["10.0.0.1"]},
            _endpoint("10.0.0.2", ready=None, terminating=True),
            _endpoint("10.0.0.3", ready=False, terminating=True),
            _endpoint("10.0.0.4", ready=False),
        ),
    )
    states = [target.state for target in catalogue.pools[SERVICE][0].targets]
    assert states == ["active", "active", "draining", "down"]


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_where_nothing_is_ready_what_is_going_away_serves(policy: str) -> None:
    going = _endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
    dead = _endpoint("10.0.0.2", ready=False, serving=False, terminating=True)
    rows = _rows(_catalogue(_service(internalTrafficPolicy=policy), _slice(going, dead)))
    assert rows["10.96.0.10:80/tcp"] == ["10.0.0.1"]
    rows = _rows(
        _catalogue(_service(internalTrafficPolicy=policy), _slice(going, dead, _endpoint("10.0.0.3")))
    )
    assert rows["10.96.0.10:80/tcp"] == ["10.0.0.3"]


def test_local_goes_by_what_is_local() -> None:
    """A ready endpoint elsewhere does not keep a local one that is going away from being used."""
    going = _endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
    rows = _rows(
        _catalogue(_service(internalTrafficPolicy="Local"), _slice(going, _endpoint("10.0.1.1", "node-2")))
    )
    assert rows["10.96.0.10:80/tcp"] == ["10.0.0.1"]


# Traffic policies

ENDPOINTS = [
    _slice(_endpoint("10.0.1.1", "node-1"), _endpoint("10.0.2.1", "node-2")),
    _slice(_endpoint("fd00:1::1", "node-1"), _endpoint("fd00:2::1", "node-2"), name="web-6"),
]
ALL4, ALL6 = ["10.0.1.1", "10.0.2.1"], ["fd00:1::1", "fd00:2::1"]
LOCAL4, LOCAL6 = ["10.0.1.1"], ["fd00:1::1"]


@pytest.mark.parametrize("internal", ["Cluster", "Local"])
@pytest.mark.parametrize("external", ["Cluster", "Local"])
def test_policies(internal: str, external: str) -> None:
    service = _service(
        {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"}]}},
        type="LoadBalancer",
        externalIPs=["192.0.2.1", "2001:db8::1"],
        internalTrafficPolicy=internal,
        externalTrafficPolicy=external,
        healthCheckNodePort=32000,
    )
    rows = _rows(_catalogue(service, *NODES, *ENDPOINTS))
    inside4, inside6 = (LOCAL4, LOCAL6) if internal == "Local" else (ALL4, ALL6)
    outside4, outside6 = (LOCAL4, LOCAL6) if external == "Local" else (ALL4, ALL6)
    wanted = {
        "10.96.0.10:80/tcp": inside4,
        "[fd00:96::10]:80/tcp": inside6,
        "192.0.2.1:80/tcp": outside4,
        "198.51.100.1:80/tcp": outside4,
        "[2001:db8::1]:80/tcp": outside6,
        "172.16.0.1:30080/tcp": outside4,
        "[fd00:16::1]:30080/tcp": outside6,
        "inside 172.16.0.2:30080/tcp": ALL4,
        "inside 172.16.0.3:30080/tcp": ALL4,
        "inside [fd00:16::2]:30080/tcp": ALL6,
        "inside [fd00:16::3]:30080/tcp": ALL6,
    }
    if external == "Local":
        wanted |= {
            "inside 192.0.2.1:80/tcp": ALL4,
            "inside 198.51.100.1:80/tcp": ALL4,
            "inside [2001:db8::1]:80/tcp": ALL6,
            "inside 172.16.0.1:30080/tcp": ALL4,
            "inside [fd00:16::1]:30080/tcp": ALL6,
        }
    assert rows == wanted


def test_local_without_local_endpoints() -> None:
    """The rows are there and refuse; nobody is sent to another node."""
    rows = _rows(
        _catalogue(_service(internalTrafficPolicy="Local"), *NODES, _slice(_endpoint("10.0.2.1", "node-2")))
    )
    assert rows["10.96.0.10:80/tcp"] == []


def test_loopback_is_for_the_host() -> None:
    here = Here(frozenset({"host", "node-1"}), has_loopback=True)
    rows = _rows(_catalogue(_service(type="NodePort"), *NODES, *ENDPOINTS, here=here))
    assert rows["inside 127.0.0.1:30080/tcp"] == ALL4
    assert rows["inside [::1]:30080/tcp"] == ALL6
    assert not any("127.0.0.1" in row for row in _rows(_catalogue(_service(type="NodePort"), *NODES)))


def test_node_ports_follow_the_services_families() -> None:
    rows = _rows(_catalogue(_service(type="NodePort", ipFamilies=["IPv4"]), *NODES, *ENDPOINTS))
    assert not any("fd00:16" in row for row in rows)
    assert not any("30080" in row for row in _rows(_catalogue(_service(), *NODES)))  # of type ClusterIP


def test_addresses_of_a_node_without_an_object() -> None:
    here = Here(frozenset({"host"}), (ip_address("192.0.2.77"),))
    rows = _rows(_catalogue(_service(type="NodePort"), *NODES, *ENDPOINTS, here=here))
    assert rows["192.0.2.77:30080/tcp"] == ALL4
    assert rows["inside 172.16.0.1:30080/tcp"] == ALL4


def test_what_has_no_rows() -> None:
    for service in (
        _service(clusterIP="None", clusterIPs=["None"], type="NodePort"),
        _service(type="ExternalName", clusterIP="", clusterIPs=[]),
        _service(clusterIP="", clusterIPs=[]),
    ):
        assert _catalogue(service, *NODES, *ENDPOINTS).pools[SERVICE] == ()


# Zones and nodes


def _spread(*endpoints: Document, zone: str = "a", **spec: Any) -> list[str]:
    nodes = [_node("node-1", "172.16.0.1", zone=zone), *NODES[1:]]
    return _rows(_catalogue(_service(**spec), *nodes, _slice(*endpoints)))["10.96.0.10:80/tcp"]


def test_zone_hints() -> None:
    mine: Document = {"hints": {"forZones": [{"name": "a"}]}}
    other: Document = {"hints": {"forZones": [{"name": "b"}]}}
    one, two = _endpoint("10.0.0.1", "node-3", **mine), _endpoint("10.0.0.2", "node-3", **other)
    assert _spread(one, two) == ["10.0.0.1"]
    # None for this zone, one without a hint, or a node in no zone: hints count for nothing.
    assert _spread(two, _endpoint("10.0.0.3", "node-1", **other)) == ["10.0.0.2", "10.0.0.3"]
    assert _spread(one, two, _endpoint("10.0.0.3", "node-3")) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert _spread(one, two, zone="") == ["10.0.0.1", "10.0.0.2"]
    # One that is not ready takes no part.
    assert _spread(one, two, _endpoint("10.0.0.3", "node-3", ready=False)) == ["10.0.0.1"]
    not_ready = _endpoint("10.0.0.1", "node-3", ready=False, **mine)
    assert _spread(not_ready, two) == ["10.0.0.2"]


def test_node_hints_come_before_zones() -> None:
    def hints(node: str, zone: str) -> Document:
        return {"hints": {"forNodes": [{"name": node}], "forZones": [{"name": zone}]}}

    here = _endpoint("10.0.0.1", "node-1", **hints("node-1", "a"))
    near = _endpoint("10.0.0.2", "node-2", **hints("node-2", "a"))
    far = _endpoint("10.0.0.3", "node-3", **hints("node-3", "b"))
    assert _spread(here, near, far) == ["10.0.0.1"]
    assert _spread(near, far) == ["10.0.0.2"]
    assert _spread(far) == ["10.0.0.3"]


@pytest.mark.parametrize(
    ("distribution", "wanted"),
    [
        (None, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        ("PreferClose", ["10.0.0.1", "10.0.0.2"]),
        ("PreferSameZone", ["10.0.0.1", "10.0.0.2"]),
        ("PreferSameNode", ["10.0.0.1"]),
    ],
)
def test_traffic_distribution_of_slices_without_hints(distribution: str | None, wanted: list[str]) -> None:
    """As the EndpointSlice controller would hint, by the endpoints' zones or else by their nodes'."""
    endpoints = (
        _endpoint("10.0.0.1", "node-1"),
        _endpoint("10.0.0.2", "node-x", zone="a"),
        _endpoint("10.0.0.3", "node-3"),
    )
    assert _spread(*endpoints, trafficDistribution=distribution) == wanted
    assert _spread(endpoints[2], trafficDistribution=distribution) == ["10.0.0.3"]


def test_endpoints_of_other_zones_keep_their_connections() -> None:
    """They are in the pool, without a share of new ones: their rows, and so their connections, stay."""
    catalogue = _catalogue(
        _service(trafficDistribution="PreferSameZone"),
        *NODES,
        _slice(_endpoint("10.0.0.1"), _endpoint("10.0.0.3", "node-3")),
    )
    (pool, _) = catalogue.pools[SERVICE]
    assert [(str(target.address), target.weight) for target in pool.targets] == [
        ("10.0.0.1", 100),
        ("10.0.0.3", 0),
    ]


# Pods without slices


def test_selected_pods() -> None:
    documents = (
        _pod("a", "10.0.1.1"),
        _pod("b", "10.0.2.1", "node-2"),
        _pod("c", "10.0.1.3", ready="False"),
        _pod("d", "10.0.1.4", app="other"),
    )
    spec: Document = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}
    assert _rows(_catalogue(_service(**spec), *NODES, *documents))["10.96.0.10:80/tcp"] == [
        "10.0.1.1",
        "10.0.2.1",
    ]
    local = _rows(_catalogue(_service(**spec, internalTrafficPolicy="Local"), *NODES, *documents))
    assert local["10.96.0.10:80/tcp"] == ["10.0.1.1"]
    published = _catalogue(_service(**spec, publishNotReadyAddresses=True), *NODES, *documents)
    assert _rows(published)["10.96.0.10:80/tcp"] == ["10.0.1.1", "10.0.2.1", "10.0.1.3"]
    close = _catalogue(_service(**spec, trafficDistribution="PreferSameNode"), *NODES, *documents)
    assert _rows(close)["10.96.0.10:80/tcp"] == ["10.0.1.1"]


# ServicePolicy


def _policy(name: str = "web", **spec: Any) -> Document:
    return {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "ServicePolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"targetRef": {"kind": "Service", "name": "web"}} | spec,
    }


def test_a_policy_is_for_all_ports() -> None:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    catalogue = _catalogue(
        _service(ports=ports, sessionAffinity="ClientIP"),
        _policy(
            algorithm="modulo",
            drainSeconds=5,
            slowStartSeconds=2,
            allDown="failOpen",
            healthCheck={"type": "tcp"},
            sessionAffinity={"timeoutSeconds": 60},
        ),
        *ENDPOINTS,
    )
    pools = catalogue.pools[SERVICE]
    assert len(pools) == 4
    for pool in pools:
        assert (pool.algorithm, pool.drain_seconds, pool.slow_start_seconds) == ("modulo", 5, 2)
        assert (pool.all_down, pool.affinity_seconds) == ("failOpen", 60)
        assert pool.health_check == model.HealthCheck(type="tcp")


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, 5),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, 0),
    ],
)
def test_session_affinity(spec: Document, seconds: int) -> None:
    assert {pool.affinity_seconds for pool in _catalogue(_service(**spec), *ENDPOINTS).pools[SERVICE]} == {
        seconds
    }
    off = _catalogue(_service(**spec), _policy(sessionAffinity={"type": "None"}), *ENDPOINTS)
    assert {pool.affinity_seconds for pool in off.pools[SERVICE]} == {0}


def test_two_policies_are_refused() -> None:
    with pytest.raises(Conflict, match="Service/default/web has two policies") as error:
        _catalogue(_service(), _policy("one"), _policy("two"))
    assert "ServicePolicy/default/one and ServicePolicy/default/two" in str(error.value)


def test_what_is_not_heeded_is_said() -> None:
    open_to_all, policy = _service(loadBalancerSourceRanges=["192.0.2.0/24"]), _policy()
    resources = [parse(open_to_all), parse(policy)]
    assert list(_catalogue(open_to_all, policy).unheeded(resources)) == [
        "Service/default/web: loadBalancerSourceRanges is not enforced: everybody is let in"
    ]
    assert list(_catalogue(policy).unheeded(resources[1:])) == [
        "ServicePolicy/default/web: there is no Service/default/web yet"
    ]


# LocalRedirectPolicy


def _redirect(frontend: Document, ports: list[Document] | None = None, **spec: Any) -> Document:
    return {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": "cache", "namespace": "default"},
        "spec": {
            "redirectFrontend": frontend,
            "redirectBackend": {
                "localEndpointSelector": {"matchLabels": {"app": "web"}},
                "toPorts": ports or [{"port": 9053, "protocol": "UDP"}],
            },
        }
        | spec,
    }


ADDRESS = {"addressMatcher": {"ip": "169.254.20.10", "toPorts": [{"port": "53", "protocol": "UDP"}]}}
REDIRECT = "LocalRedirectPolicy/default/cache"


def test_a_redirect_goes_to_this_nodes_pods() -> None:
    pods = (_pod("a", "10.0.1.1"), _pod("b", "10.0.2.1", "node-2"), _pod("c", "fd00:1::1"))
    catalogue = _catalogue(_redirect(ADDRESS), *pods)
    assert _rows(catalogue, REDIRECT) == {"inside 169.254.20.10:53/udp": ["10.0.1.1"]}
    (pool,) = catalogue.pools[REDIRECT]
    assert pool.targets[0].port == 9053


@pytest.mark.parametrize(
    "pods",
    [
        (),
        (_pod("b", "10.0.2.1", "node-2"),),
        (_pod("a", "10.0.1.1", ready="False"),),
        (_pod("a", "10.0.1.1", app="x"),),
    ],
)
def test_a_redirect_without_a_pod_here_is_none(pods: tuple[Document, ...]) -> None:
    assert _catalogue(_redirect(ADDRESS), *pods).pools[REDIRECT] == ()


def test_a_redirect_of_a_service() -> None:
    """It takes the cluster addresses, for this node's own sockets; the service itself stays as it is."""
    matcher = {"serviceMatcher": {"serviceName": "web", "namespace": "default"}}
    documents = (_service(externalIPs=["192.0.2.1"]), *ENDPOINTS, _pod("a", "10.0.1.9"))
    catalogue = _catalogue(_redirect(matcher, [{"port": 9080}]), *documents)
    assert _rows(catalogue, REDIRECT) == {"inside 10.96.0.10:80/tcp": ["10.0.1.9"]}
    assert _rows(catalogue)["10.96.0.10:80/tcp"] == ALL4
    matcher["serviceMatcher"]["serviceName"] = "other"
    assert _catalogue(_redirect(matcher, [{"port": 9080}]), *documents).pools[REDIRECT] == ()


def test_a_redirect_follows_service_and_pods() -> None:
    matcher = {"serviceMatcher": {"serviceName": "web", "namespace": "default"}}
    first = _catalogue(_redirect(matcher, [{"port": 9080}]))
    assert first.pools[REDIRECT] == ()
    second = first.changed((), [parse(_service())])
    assert second.pools[REDIRECT] == ()
    pod = parse(_pod("a", "10.0.1.9"))
    third = second.changed((), [pod])
    assert list(_rows(third, REDIRECT)) == ["inside 10.96.0.10:80/tcp"]
    assert third.changed([pod], ()).pools[REDIRECT] == ()


def test_a_redirect_takes_the_place_of_a_services_inside_row() -> None:
    """A service whose addresses have rows of their own for this node's sockets gives way, and has them back afterwards."""
    matcher = {"addressMatcher": {"ip": "192.0.2.1", "toPorts": [{"port": "80", "protocol": "TCP"}]}}
    policy = parse(_redirect(matcher, [{"port": 9080}]))
    documents = (_service(externalIPs=["192.0.2.1"], externalTrafficPolicy="Local"), *ENDPOINTS)
    pod, waiting = parse(_pod("a", "10.0.1.9")), parse(_pod("a", "10.0.1.9", ready="False"))
    inside = "inside 192.0.2.1:80/tcp"
    alone = _catalogue(*documents)
    assert _rows(alone)[inside] == ALL4
    both = alone.changed((), [policy, pod])
    assert _rows(both, REDIRECT) == {inside: ["10.0.1.9"]}
    assert _rows(both) == {name: backends for name, backends in _rows(alone).items() if name != inside}
    assert both.owners == _catalogue(policy.to_document(), pod.to_document(), *documents).owners
    # Without a pod that is ready, or without the policy, all is as before.
    for after in (both.changed([pod], [waiting]), both.changed([pod], ()), both.changed([policy], ())):
        assert _rows(after) == _rows(alone)
        assert after.yielded == {}
    assert _rows(both.changed([pod], [waiting]).changed([waiting], [pod])) == _rows(both)
    # The service goes first: nothing remembers it.
    assert both.changed([parse(documents[0])], ()).yielded == {}
    # Two redirects are in each other's way still.
    other = parse(policy.to_document() | {"metadata": {"name": "other", "namespace": "default"}})
    with pytest.raises(Conflict):
        both.changed((), [other])


# Changes


def test_two_services_that_want_the_same() -> None:
    other = _service() | {"metadata": {"name": "other", "namespace": "default"}}
    with pytest.raises(Conflict, match=r"10\.96\.0\.10:80/tcp is wanted twice") as error:
        _catalogue(_service(), other)
    assert "Service/default/web and Service/default/other both have it" in str(error.value)
    # An address may change hands in one change, and what goes leaves it free.
    one, two = parse(_service()), parse(other)
    catalogue = Catalogue.of([one], HERE)
    assert list(catalogue.changed([one], [two]).pools) == ["Service/default/other"]
    with pytest.raises(Conflict):
        catalogue.changed((), [two])
    assert list(catalogue.pools) == [SERVICE], "a refused change leaves everything as it was"


def test_untouched_pools_are_the_same_objects() -> None:
    other = _service(clusterIP="10.96.0.11", clusterIPs=["10.96.0.11"]) | {
        "metadata": {"name": "other", "namespace": "default"}
    }
    catalogue = _catalogue(_service(), other, *ENDPOINTS)
    new = parse(_slice(_endpoint("10.0.1.2"), name="web-1"))
    old = next(one for one in catalogue.inventory.slices[SERVICE] if one.name == "web-1")
    after = catalogue.changed([old], [new])
    assert after.pools["Service/default/other"] is catalogue.pools["Service/default/other"]
    assert _rows(after)["10.96.0.10:80/tcp"] == ["10.0.1.2"]
    assert _rows(catalogue)["10.96.0.10:80/tcp"] == ALL4
    # A change that says the same in other words is none.
    assert after.changed([new], [parse(new.to_document())]).pools[SERVICE] is after.pools[SERVICE]


def test_a_service_goes_in_the_same_change_as_a_node_changes() -> None:
    other = _service(
        clusterIP="10.96.0.11", clusterIPs=["10.96.0.11"], ports=[{"name": "http", "port": 80}]
    ) | {"metadata": {"name": "other", "namespace": "default"}}
    node, going, staying = parse(NODES[0]), parse(_service()), parse(other)
    catalogue = Catalogue.of([node, going, staying], HERE)
    changed = parse(_node("node-1", "172.16.0.1", "fd00:16::1", zone="b"))
    after = catalogue.changed([node, going], [changed])
    assert list(after.pools) == ["Service/default/other"]
    assert set(after.owners.values()) == {"Service/default/other"}
    redirect = parse(_redirect(ADDRESS))
    pod = parse(_pod("a", "10.0.1.1"))
    catalogue = Catalogue.of([node, redirect, pod], HERE)
    assert list(catalogue.changed([node, redirect], [changed]).pools) == []


places: st.SearchStrategy[Document] = st.sampled_from(
    [{}, {"hints": {"forZones": [{"name": "a"}]}}, {"zone": "b"}]
)
names = st.sampled_from(["node-1", "node-2", "node-3", "node-x"])
flags = st.sampled_from([True, False, None])


@st.composite
def _worlds(draw: st.DrawFn) -> list[Document]:
    """Services, slices, pods, nodes and policies, thrown together."""
    documents: list[Document] = [
        _node(
            node["metadata"]["name"],
            *(one["address"] for one in node["status"]["addresses"][: draw(st.integers(0, 2))]),
            zone=draw(st.sampled_from(["a", "b", ""])),
        )
        for node in NODES
        if draw(st.booleans())
    ]
    for index in range(draw(st.integers(1, 3))):
        service = _service(
            {"loadBalancer": {"ingress": [{"ip": f"198.51.100.{index}"}]}},
            clusterIP=f"10.96.0.{index + 1}",
            clusterIPs=[f"10.96.0.{index + 1}", f"fd00:96::{index + 1}"],
            type=draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"])),
            ports=[{"name": "http", "port": 80, "nodePort": 30080 + index}],
            internalTrafficPolicy=draw(st.sampled_from(["Cluster", "Local"])),
            externalTrafficPolicy=draw(st.sampled_from(["Cluster", "Local"])),
            trafficDistribution=draw(
                st.sampled_from([None, "PreferClose", "PreferSameZone", "PreferSameNode"])
            ),
            selector={"app": "web"},
        )
        documents.append(service | {"metadata": {"name": f"web{index}", "namespace": "default"}})
        for number in range(draw(st.integers(0, 2))):
            endpoints = [
                _endpoint(
                    f"10.{index}.{number}.{which}",
                    draw(names),
                    draw(flags),
                    serving=draw(flags),
                    terminating=draw(flags),
                    **draw(places),
                )
                for which in range(1, draw(st.integers(2, 4)))
            ]
            documents.append(_slice(*endpoints, name=f"s{index}{number}", service=f"web{index}"))
    documents += [
        _pod(f"p{which}", f"10.9.0.{which + 1}", draw(names), draw(st.sampled_from(["True", "False"])))
        for which in range(draw(st.integers(0, 3)))
    ]
    if draw(st.booleans()):
        documents.append(_policy() | {"metadata": {"name": "one", "namespace": "default"}})
    if draw(st.booleans()):
        documents.append(_redirect(ADDRESS))
    if draw(st.booleans()):
        # Where a service may have a row of its own for this node's sockets.
        place = {"ip": draw(st.sampled_from(["198.51.100.0", "198.51.100.1"]))}
        taken = {"addressMatcher": place | {"toPorts": [{"port": "80", "protocol": "TCP"}]}}
        documents.append(
            _redirect(taken, [{"port": 9080}]) | {"metadata": {"name": "taken", "namespace": "default"}}
        )
    documents += [
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "VirtualService",
            "metadata": {"name": f"virtual{which}", "namespace": "default"},
            "spec": {
                "addresses": [f"192.0.2.{which}"],
                "ports": [{"port": 80, "targetPort": 8080}],
                "backends": [
                    {"address": f"10.8.0.{draw(st.integers(1, 2))}", "port": 8080},
                    {"selector": {"app": "web"}},
                ],
            },
        }
        for which in range(draw(st.integers(0, 2)))
    ]
    documents += [
        {
            "apiVersion": "hookline.dev/v1alpha1",
            "kind": "ExternalHost",
            "metadata": {"name": f"host{which}"},
            "spec": {"addresses": [f"10.8.0.{which}"]},
        }
        for which in (1, 2)
        if draw(st.booleans())
    ]
    if draw(st.booleans()):
        documents.append(
            {
                "apiVersion": "hookline.dev/v1alpha1",
                "kind": "DNSCapture",
                "metadata": {"name": "dns", "namespace": "default"},
                "spec": {
                    "podSelector": {"matchLabels": {"app": "web"}},
                    "resolver": {"address": "192.0.2.53", "port": 53},
                },
            }
        )
    return documents


def _check(catalogue: Catalogue) -> None:
    inventory = catalogue.inventory
    here = {
        address
        for group in inventory.slices.values()
        for piece in group
        for endpoint in piece.endpoints
        if endpoint.node_name == "node-1"
        for address in endpoint.ips
    } | {
        address
        for pods in inventory.pods.values()
        for pod in pods
        if pod.spec.node_name == "node-1"
        for address in pod.addresses
    }
    frontends = [
        frontend for group in catalogue.pools.values() for pool in group for frontend in pool.frontends
    ]
    assert len(frontends) == len(set(frontends)) == len(catalogue.owners), "a frontend has one pool"
    keys = [pool.key for group in catalogue.pools.values() for pool in group]
    assert len(keys) == len(set(keys))
    for reference, group in catalogue.pools.items():
        for pool in group:
            assert pool.service == reference
            assert pool.frontends, "a pool without a frontend is nobody's"
            assert {one.address.version for one in pool.frontends} == {pool.version}
            assert {one.address.version for one in pool.targets} <= {pool.version}
            if pool.reach == "local" or reference.startswith("LocalRedirectPolicy"):
                assert {target.address for target in pool.targets} <= here, "no remote backend is local"
            assert bool(pool.table_size) == bool(pool.active)
            _check_states(pool)


def _check_states(pool: Pool) -> None:
    # Who is going away is used only where nobody else is, and then all of them are.
    if pool.active and any(target.state == "draining" for target in pool.targets):
        assert any(target.state == "active" and target.weight for target in pool.targets)
    if not pool.active:
        assert all(target.state == "down" or not target.weight for target in pool.targets)


@settings(deadline=None)
@given(_worlds())
def test_every_world_makes_sense(documents: list[Document]) -> None:
    _check(_catalogue(*documents))


@settings(deadline=None, max_examples=60)
@given(st.lists(_worlds(), min_size=2, max_size=4), st.integers(1, 30))
def test_changes_come_to_the_same_as_starting_anew(worlds: list[list[Document]], batch: int) -> None:
    """From one world to another, some objects at a time: at every step the pools are those of all objects together."""

    def keyed(documents: list[Document]) -> dict[str, Resource]:
        return {resource.reference: resource for resource in map(parse, documents)}

    world = keyed(worlds[0])
    catalogue = Catalogue.of(world.values(), HERE)
    for new in map(keyed, worlds[1:]):
        references = [*(reference for reference in world if reference not in new), *new]
        for first in range(0, len(references), batch):
            touched = references[first : first + batch]
            gone = [world.pop(reference) for reference in touched if reference in world]
            come = [new[reference] for reference in touched if reference in new]
            world.update((resource.reference, resource) for resource in come)
            catalogue = catalogue.changed(gone, come)
            anew = Catalogue.of(world.values(), HERE)
            assert _unordered(catalogue) == _unordered(anew)
            assert catalogue.pools.keys() == anew.pools.keys()
            assert catalogue.owners == anew.owners
            assert catalogue.yielded == anew.yielded
    _check(catalogue)


def _unordered(catalogue: Catalogue) -> dict[str, list[Any]]:
    """Pools with their targets in a fixed order: documents that are changed go to the end of theirs."""
    return {
        reference: [(pool.key, pool.table_size, set(pool.frontends), set(pool.targets)) for pool in group]
        for reference, group in catalogue.pools.items()
        if group
    }
