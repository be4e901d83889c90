"""From documents to pools: which backends stand behind which addresses and ports, and where they are.

Policies of services are in test_service_policies.py.
"""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from hookline import model, net
from hookline.control._errors import Conflict
from hookline.control.compiling import compile_service
from hookline.control.inventory import Inventory
from hookline.control.placement import (
    BACKEND_ACTIVE,
    BACKEND_DSR,
    BACKEND_LOCAL,
    Placements,
    packed,
    refuse_nat_ports,
)
from hookline.control.pools import Frontend, Pool
from hookline.datapath.loadbalancer.balancer import Tunables
from hookline.model import Resource, Service, VirtualService, parse
from tests.pool_sets import make_pool

Document = dict[str, Any]


def _resource(document: Document) -> Resource:
    return parse(document, model.Origin("test.yaml"))


def _virtual_service(name: str = "orders", namespace: str = "default", **spec: object) -> Document:
    return {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "VirtualService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "addresses": ["192.0.2.10"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
            "backends": [{"address": "10.244.1.10"}],
        }
        | spec,
    }


def _pod(name: str, *ips: str, namespace: str = "default", **more: Any) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": "orders"}}
        | more.get("metadata", {}),
        "spec": {
            "containers": [
                {
                    "name": "main",
                    "ports": more.get("ports", [{"name": "http", "containerPort": 8080}]),
                }
            ]
        },
        "status": {"podIPs": [{"ip": ip} for ip in ips], "phase": more.get("phase", "Running")},
    }


def _service(**spec: object) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "orders", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.0.10",
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            "selector": {"app": "orders"},
        }
        | spec,
    }


def _slice(
    name: str, *endpoints: Document, ports: list[Document] | None = None, kind: str = "IPv4"
) -> Document:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "orders"},
        },
        "addressType": kind,
        "endpoints": list(endpoints),
        "ports": [{"name": "http", "port": 8080}] if ports is None else ports,
    }


def _compiled(service: Document, *others: Document) -> tuple[Pool, ...]:
    resource = _resource(service)
    assert isinstance(resource, VirtualService | Service)
    return compile_service(resource, Inventory.of(map(_resource, others)))


def _targets(pool: Pool) -> list[tuple[str, int, int, str]]:
    return [(str(target.address), target.port, target.weight, target.name) for target in pool.targets]


# VirtualService


def test_a_pool_for_each_port_and_family() -> None:
    pools = _compiled(
        _virtual_service(
            addresses=["192.0.2.10", "2001:db8::10", "192.0.2.11"],
            ports=[
                {"name": "http", "port": 80, "targetPort": 8080},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
            backends=[{"address": "10.244.1.10"}, {"address": "2001:db8:1::10", "weight": 50}],
        )
    )
    assert [(pool.port, pool.version, pool.protocol) for pool in pools] == [
        ("http", 4, "TCP"),
        ("http", 6, "TCP"),
        ("dns", 4, "UDP"),
        ("dns", 6, "UDP"),
    ]
    assert [str(frontend) for frontend in pools[0].frontends] == ["192.0.2.10:80/tcp", "192.0.2.11:80/tcp"]
    assert [str(frontend) for frontend in pools[3].frontends] == ["[2001:db8::10]:53/udp"]
    assert _targets(pools[0]) == [("10.244.1.10", 8080, 100, "10.244.1.10")]
    assert _targets(pools[3]) == [("2001:db8:1::10", 53, 50, "2001:db8:1::10")]
    assert len({pool.key for pool in pools}) == 4
    assert all(pool.key % 2 for pool in pools)


def test_a_family_without_backends_is_still_a_pool() -> None:
    """Its packets are refused as no_backend, not dropped as no_service."""
    four, six = _compiled(_virtual_service(addresses=["192.0.2.10", "2001:db8::10"]))
    assert (four.table_size, six.table_size) == (1021, 0)
    assert six.targets == ()


def test_selectors_take_the_pods_of_the_namespace() -> None:
    (pool,) = _compiled(
        _virtual_service(backends=[{"selector": {"app": "orders"}, "weight": 7}]),
        _pod("a", "10.244.0.1", "2001:db8:1::1"),
        _pod("b", "10.244.0.2"),
        _pod("elsewhere", "10.244.0.3", namespace="other"),
        _pod("unlabelled", "10.244.0.4", metadata={"labels": {"app": "else"}}),
        _pod("done", "10.244.0.5", phase="Succeeded"),
        _pod("failed", "10.244.0.6", phase="Failed"),
        _pod("going", "10.244.0.7", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
        _pod("addressless"),
    )
    assert _targets(pool) == [
        ("10.244.0.1", 8080, 7, "default/a"),
        ("10.244.0.2", 8080, 7, "default/b"),
        ("10.244.0.7", 8080, 7, "default/going"),
    ]
    assert [target.state for target in pool.targets] == ["active", "active", "draining"]


def test_named_target_ports_are_each_pods_own() -> None:
    (pool,) = _compiled(
        _virtual_service(
            ports=[{"port": 80, "targetPort": "http"}], backends=[{"selector": {"app": "orders"}}]
        ),
        _pod("a", "10.244.0.1"),
        _pod("b", "10.244.0.2", ports=[{"name": "http", "containerPort": 9090}]),
        _pod("c", "10.244.0.3", ports=[{"name": "other", "containerPort": 9090}]),
        _pod("d", "10.244.0.4", ports=[{"name": "http", "containerPort": 53, "protocol": "UDP"}]),
    )
    assert [target[:2] for target in _targets(pool)] == [("10.244.0.1", 8080), ("10.244.0.2", 9090)]
    assert pool.port == "80"


def test_a_backends_own_port_comes_first() -> None:
    (pool,) = _compiled(
        _virtual_service(
            backends=[{"address": "10.244.1.10", "port": 9}, {"selector": {"app": "orders"}, "port": 10}]
        ),
        _pod("a", "10.244.0.1"),
    )
    assert [target[:2] for target in _targets(pool)] == [("10.244.1.10", 9), ("10.244.0.1", 10)]


def test_a_backend_named_twice_counts_once() -> None:
    """The first mention's weight holds; the same address on another port is another backend."""
    (pool,) = _compiled(
        _virtual_service(
            backends=[
                {"address": "10.244.0.1", "weight": 5},
                {"address": "10.244.0.1", "port": 9},
                {"selector": {"app": "orders"}},
            ]
        ),
        _pod("a", "10.244.0.1"),
    )
    assert [target[:3] for target in _targets(pool)] == [("10.244.0.1", 8080, 5), ("10.244.0.1", 9, 100)]


def test_weight_0_takes_no_new_connections() -> None:
    (pool,) = _compiled(
        _virtual_service(backends=[{"address": "10.244.0.1", "weight": 0}, {"address": "10.244.0.2"}])
    )
    assert len(pool.targets) == 2
    assert [str(target.address) for target in pool.active] == ["10.244.0.2"]


# Sizes


def _backends(count: int) -> list[Document]:
    return [{"address": str(IPv4Address("10.0.0.0") + number)} for number in range(1, count + 1)]


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 1021), (11, 1103), (700, 65_537)])
def test_table_sizes(count: int, size: int) -> None:
    (pool,) = _compiled(_virtual_service(backends=_backends(count)))
    assert pool.table_size == size


def test_a_wanted_size() -> None:
    (pool,) = _compiled(_virtual_service(tableSize=2039))
    assert pool.table_size == 2039


def test_a_wanted_size_that_is_too_small() -> None:
    with pytest.raises(Conflict, match="1022 IPv4 backends on port http") as error:
        _compiled(_virtual_service(tableSize=1021, backends=_backends(1022)))
    assert "leave tableSize out" in str(error.value)


def test_modulo_has_the_size_that_its_weights_need() -> None:
    (pool,) = _compiled(
        _virtual_service(
            algorithm="modulo",
            backends=[{"address": "10.0.0.1", "weight": 100}, {"address": "10.0.0.2", "weight": 50}],
        )
    )
    assert (pool.algorithm, pool.table_size) == ("modulo", 3)


def test_weights_that_modulo_cannot_express() -> None:
    with pytest.raises(Conflict, match="VirtualService/default/orders: algorithm modulo"):
        _compiled(
            _virtual_service(
                algorithm="modulo",
                backends=[
                    {"address": f"10.0.0.{number}", "weight": 65_521 - number} for number in range(1, 4)
                ],
            )
        )


# Service


def test_a_service_with_slices() -> None:
    """Its slices count, not its selector; several of them are one pool, and a pod in two of them is one backend."""
    four, six = _compiled(
        _service(clusterIPs=["10.96.0.10", "fd00::10"], externalIPs=["198.51.100.1"]),
        _slice(
            "one",
            {"addresses": ["10.244.0.1"], "targetRef": {"kind": "Pod", "name": "a", "namespace": "default"}},
            {"addresses": ["10.244.0.2"], "conditions": {"ready": False}},
        ),
        _slice("two", {"addresses": ["10.244.0.1"]}, {"addresses": ["10.244.0.3"]}),
        _slice("six", {"addresses": ["fd00:1::1"]}, kind="IPv6"),
        _pod("b", "10.244.0.9"),
    )
    assert _targets(four) == [
        ("10.244.0.1", 8080, 100, "default/a"),
        ("10.244.0.2", 8080, 100, "10.244.0.2"),
        ("10.244.0.3", 8080, 100, "10.244.0.3"),
    ]
    assert [target.state for target in four.targets] == ["active", "down", "active"]
    assert [str(frontend) for frontend in four.frontends] == ["10.96.0.10:80/tcp", "198.51.100.1:80/tcp"]
    assert [target[0] for target in _targets(six)] == ["fd00:1::1"]
    assert (four.forwarding, four.algorithm) == ("nat", "maglev")


def test_a_services_ports_are_the_slices_of_the_same_name() -> None:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    slice_ports = [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]
    http, dns = _compiled(
        _service(ports=ports), _slice("one", {"addresses": ["10.244.0.1"]}, ports=slice_ports)
    )
    assert [target[1] for target in _targets(http)] == [8080]
    assert [target[1] for target in _targets(dns)] == [5353]
    wrong = _slice(
        "one", {"addresses": ["10.244.0.1"]}, ports=[{"name": "http", "port": 1, "protocol": "UDP"}]
    )
    assert [pool.targets for pool in _compiled(_service(ports=ports), wrong)] == [(), ()]


def test_a_service_without_slices_selects_pods() -> None:
    (pool,) = _compiled(_service(), _pod("a", "10.244.0.1"), _pod("b", "10.244.0.2"))
    assert _targets(pool) == [("10.244.0.1", 8080, 100, "default/a"), ("10.244.0.2", 8080, 100, "default/b")]


def test_services_that_are_not_balanced() -> None:
    assert _compiled(_service(clusterIP="None"), _pod("a", "10.244.0.1")) == ()
    assert _compiled(_service(clusterIP=""), _pod("a", "10.244.0.1")) == ()
    assert _compiled(_service(ports=[{"port": 5000, "protocol": "SCTP"}])) == ()


# Keys and conflicts


def test_a_pools_key_is_its_own_and_stays() -> None:
    first = make_pool("a", "http")
    assert first.key == make_pool("a", "http", targets={"10.244.0.1": 5}).key
    others = [make_pool("b", "http"), make_pool("a", "https"), make_pool("a", protocol="UDP")]
    six = make_pool("a", addresses=["2001:db8::1"], targets={})
    assert len({first.key, six.key, *(pool.key for pool in others)}) == 5


def test_frontends_as_text() -> None:
    assert str(Frontend(ip_address("192.0.2.1"), 80, "TCP")) == "192.0.2.1:80/tcp"
    assert str(Frontend(ip_address("2001:db8::1"), 53, "UDP")) == "[2001:db8::1]:53/udp"


# Placement

ROUTES = {
    "10.0.0.1": net.Route("lo", None, ip_address("10.0.0.1"), "local"),
    "10.244.0.2": net.Route("hl12345678", None, ip_address("10.0.0.1"), "unicast"),
    "10.244.0.3": net.Route("eth0", None, ip_address("10.0.0.1"), "unicast"),
    "10.244.0.4": net.Route("eth0", ip_address("10.0.0.254"), ip_address("10.0.0.1"), "unicast"),
    "10.244.0.5": net.Route("", None, None, "unreachable"),
    "10.244.0.6": net.Route("eth0", None, None, "unicast"),
}


@pytest.mark.parametrize(
    ("address", "forwarding", "how", "flags"),
    [
        ("10.0.0.1", "nat", "local", BACKEND_ACTIVE | BACKEND_LOCAL),
        ("10.0.0.1", "dsr", "local", BACKEND_ACTIVE | BACKEND_LOCAL),
        ("10.244.0.2", "nat", "local", BACKEND_ACTIVE | BACKEND_LOCAL),
        ("10.244.0.2", "dsr", "local", BACKEND_ACTIVE | BACKEND_LOCAL),
        ("10.244.0.3", "nat", "nat", BACKEND_ACTIVE),
        ("10.244.0.3", "dsr", "dsr", BACKEND_ACTIVE | BACKEND_DSR),
        ("10.244.0.4", "nat", "nat", BACKEND_ACTIVE),
        ("10.244.0.4", "dsr", "nat", BACKEND_ACTIVE),
        ("10.244.0.5", "nat", "unreachable", 0),
        ("10.244.0.6", "nat", "unreachable", 0),
        ("10.244.0.6", "dsr", "dsr", BACKEND_ACTIVE | BACKEND_DSR),
    ],
)
def test_placement(address: str, forwarding: Any, how: str, flags: int) -> None:
    places = Placements(frozenset({"eth0"}), lambda wanted: {one: ROUTES[str(one)] for one in wanted})
    placement = places.place(ip_address(address), forwarding)
    assert (placement.how, placement.flags) == (how, flags)
    assert placement.source == (packed(ip_address("10.0.0.1")) if how == "nat" else bytes(16))
    hop = {"10.244.0.3": "10.244.0.3", "10.244.0.4": "10.0.0.254", "10.244.0.6": "10.244.0.6"}.get(address)
    assert placement.next_hop == ((hop, "eth0") if hop and how != "unreachable" else None)
    assert bool(placement.note) == (how == "unreachable" or (forwarding == "dsr" and how == "nat"))


@pytest.mark.parametrize(("address", "port"), [("10.0.0.1", 10240), ("10.0.0.1", 29999)])
def test_a_service_on_the_nodes_address_has_none_of_nats_ports(address: str, port: int) -> None:
    places = Placements(frozenset({"eth0"}), lambda wanted: {one: ROUTES[str(one)] for one in wanted})
    pools = _compiled(_virtual_service(addresses=[address], ports=[{"port": port}]))
    with pytest.raises(Conflict) as raised:
        refuse_nat_ports(pools, places, Tunables())
    assert f"{address}:{port}/tcp" in str(raised.value)
    assert "10240 to 29999" in raised.value.why
    assert "spec.nat" in raised.value.remedy
    refuse_nat_ports(pools, places, Tunables(nat_port_min=40000, nat_port_max=50000))


@pytest.mark.parametrize(
    ("address", "port"), [("10.0.0.1", 30000), ("10.0.0.1", 10239), ("10.244.0.3", 20000)]
)
def test_other_ports_and_addresses_are_free(address: str, port: int) -> None:
    places = Placements(frozenset({"eth0"}), lambda wanted: {one: ROUTES[str(one)] for one in wanted})
    refuse_nat_ports(
        _compiled(_virtual_service(addresses=[address], ports=[{"port": port}])), places, Tunables()
    )


def test_routes_are_asked_once() -> None:
    asked: list[str] = []

    def routes_to(wanted: Any) -> dict[Any, net.Route]:
        found = list(wanted)
        asked.extend(map(str, found))
        return {one: ROUTES[str(one)] for one in found}

    places = Placements(frozenset({"eth0"}), routes_to)
    for _ in range(3):
        places.place(ip_address("10.244.0.3"), "nat")
        assert places.is_own(ip_address("10.0.0.1"))
    assert sorted(asked) == ["10.0.0.1", "10.244.0.3"]
