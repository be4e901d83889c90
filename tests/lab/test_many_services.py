"""Ten thousand Services on one node: each answers, inside and outside, and a change of one is not a change of all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from hookline import api, lab
from hookline.lab import Lab
from hookline.model import Resource, parse
from tests.lab.conftest import document

SERVICES = 10_000
BACKENDS = {"default/web-1", "default/web-2"}
SAMPLE = (0, 1, 2, 3, 4_998, 4_999, 9_998, 9_999)
"""Both families and both protocols, at the beginning, in the middle and at the end."""


def _address(number: int) -> str:
    high, low = divmod(number, 250)
    return f"10.97.{high}.{low + 1}" if number % 2 == 0 else f"fd00:97::{high:x}:{low + 1:x}"


def _protocol(number: int) -> Literal["tcp", "udp"]:
    return "tcp" if number // 2 % 2 == 0 else "udp"


def _service(number: int, app: str = "web") -> Resource:
    address, protocol = _address(number), _protocol(number)
    target = "http" if protocol == "tcp" else "dns"
    return parse(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"s{number}"},
            "spec": {
                "clusterIP": address,
                "selector": {"app": app},
                "ports": [{"name": target, "port": 80, "targetPort": target, "protocol": protocol.upper()}],
            },
        }
    )


def _pod(name: str, node: str, app: str) -> Resource:
    ports: list[dict[str, Any]] = [
        {"name": "http", "containerPort": 8080},
        {"name": "dns", "containerPort": 5353, "protocol": "UDP"},
    ]
    spec = {"nodeName": node, "containers": [{"name": "server", "ports": ports}]}
    return document("Pod", name, metadata={"labels": {"app": app}}, spec=spec)


@pytest.fixture
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes with a pod of the services each, one pod of another kind, one that only asks; and room in the maps."""
    name = unique_name()
    sizes = {"services": 32_768, "backends": 65_536, "maglevPages": 16_384}
    config = {
        "apiVersion": "hookline.dev/v1alpha1",
        "kind": "NodeConfig",
        "metadata": {"name": "node-1"},
        "spec": {"maps": sizes},
    }
    resources = [
        *(document("Node", f"node-{number}") for number in (1, 2)),
        _pod("web-1", "node-1", "web"),
        _pod("web-2", "node-2", "web"),
        _pod("other", "node-1", "other"),
        document("Pod", "asker", spec={"nodeName": "node-1"}),
        document("ExternalHost", "client", spec={"addresses": ["198.51.100.7", "2001:db8:51::7"]}),
        parse(config),
    ]
    try:
        yield api.lab_up(resources, name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


def _answers(place: Lab, source: str, number: int, times: int) -> set[str]:
    at = _address(number), 80, _protocol(number)
    return {place.probe(source, *at).answered_by for _ in range(times)}


def test_ten_thousand_services(place: Lab) -> None:
    with api.Node(place.first_node) as node:
        node.apply([_service(number) for number in range(SERVICES)])
        for number in SAMPLE:
            for source in ("default/asker", "external/client"):
                assert _answers(place, source, number, 20) == BACKENDS, f"service {number} from {source}"

        begun = time.process_time()
        applied = node.apply(_service(4_999, "other"))
        spent = time.process_time() - begun
        assert [pool.service for pool in applied.plan.pools] == ["Service/default/s4999"]
        assert spent < 1, "a change of one service takes as long as if it were of all"
        for source in ("default/asker", "external/client"):
            assert _answers(place, source, 4_999, 4) == {"default/other"}
            assert _answers(place, source, 4_998, 20) == BACKENDS

        node.delete([f"Service/default/s{number}" for number in range(SERVICES)])
        assert node.services() == []
