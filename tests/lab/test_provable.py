"""A change is proved before it is made: the plan says what moves and ends, and a table that came out wrong is never used.

The table builder is made to err for real: the kernel's program runs with a candidates array that was changed below the
check, or a slot is written over after it. Connections and answers are those of real sockets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import api, lab
from hookline.control import TableRefused
from hookline.control.tables import Tables, frontend_key
from hookline.datapath.loadbalancer.balancer import LoadBalancer
from hookline.lab import Lab, LabError
from tests.lab.conftest import document, pod

SERVICE = """
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {{name: {name}}}
spec:
  addresses: ["192.0.2.{number}", "2001:db8:2::{number}"]
  ports:
    - {{name: http, port: 80, targetPort: 8080}}
    - {{name: dns, port: 53, targetPort: 5353, protocol: UDP}}
  algorithm: {algorithm}
  backends: [{backends}]
"""


def service(*apps: str, number: int = 10, algorithm: str = "maglev", name: str = "s", **weights: int) -> str:
    backends = ", ".join(f"{{selector: {{app: {app}}}, weight: {weights.get(app, 100)}}}" for app in apps)
    return SERVICE.format(name=name, number=number, backends=backends, algorithm=algorithm)


@pytest.fixture(scope="module")
def made(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A node with pods a, b, c and d, and a client."""
    name = unique_name()
    try:
        yield api.lab_up(
            [
                document("Node", "node-1"),
                *(pod(one, metadata={"labels": {"app": one}}) for one in "abcd"),
                document("ExternalHost", "client", spec={"addresses": ["203.0.113.10", "2001:db8:203::10"]}),
            ],
            name,
        )
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)


@pytest.fixture
def node(made: Lab) -> Iterator[api.Node]:
    """The lab's node, with no service before and after."""
    with api.Node(f"lab/{made.name}") as opened:
        yield opened
    with api.Node(f"lab/{made.name}") as opened:
        opened.delete(
            [one.reference for one in opened.resources() if opened.source_of(one.reference) != "lab"]
        )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of documents."""

    def write(*texts: str, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.write_text("\n---\n".join(texts))
        return path

    return write


TARGETS = ("192.0.2.10:80", "192.0.2.10:53/udp", "[2001:db8:2::10]:80", "[2001:db8:2::10]:53/udp")


def answers(made: Lab, times: int = 6) -> set[str]:
    """Who answers the client, in both families and over TCP and UDP."""
    return {
        made.probe("external/client", target).answered_by.removeprefix("default/")
        for target in TARGETS
        for _ in range(times)
    }


# -- a table that is wrong is not used


def quotas(rows: Any, plan: Any) -> tuple[Any, Any]:
    """One backend two slots short, another two too many: less than a thousandth of the table."""
    quota = plan.quota.copy()
    quota[0] -= 2
    quota[1] += 2
    return rows, replace(plan, quota=quota)


def stranger(rows: Any, plan: Any) -> tuple[Any, Any]:
    """A candidate that is a row of another service."""
    return np.concatenate([rows[:-1], rows[-1:] + np.uint32(40)]), plan


def doubled(rows: Any, plan: Any) -> tuple[Any, Any]:
    """A backend twice, and another that has no candidate."""
    return np.concatenate([rows[:-1], rows[:1]]), plan


def nobody(rows: Any, plan: Any) -> tuple[Any, Any]:
    """Row 0, which is never a backend."""
    return np.concatenate([rows[:-1], np.zeros(1, np.uint32)]), plan


@pytest.mark.parametrize("fault", [quotas, stranger, doubled])
def test_a_builder_that_errs(
    made: Lab, node: api.Node, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    node.apply(write(service("a")))
    before = tables_of(node)
    original = LoadBalancer.build_table

    def errs(self: LoadBalancer, first: int, size: int, rows: Any, plan: Any) -> None:
        original(self, first, size, *fault(rows, plan))

    monkeypatch.setattr(LoadBalancer, "build_table", errs)
    with pytest.raises(TableRefused, match="was not put to use") as raised:
        node.apply(write(service("b", "c", "d")))
    assert "report this" in raised.value.remedy
    assert answers(made) == {"a"}, "the table before is in use"
    assert tables_of(node) == before
    assert [one.reference for one in node.resources() if one.kind == "VirtualService"]
    monkeypatch.undo()
    node.apply(write(service("b", "c", "d")))
    assert answers(made, 20) == {"b", "c", "d"}


def test_row_0_as_a_backend(
    node: api.Node, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty slot is row 0: the builder itself sees that the table is not whole."""
    node.apply(write(service("a")))
    before = tables_of(node)
    original = LoadBalancer.build_table

    def errs(self: LoadBalancer, first: int, size: int, rows: Any, plan: Any) -> None:
        original(self, first, size, *nobody(rows, plan))

    monkeypatch.setattr(LoadBalancer, "build_table", errs)
    with pytest.raises(TableRefused, match="was not put to use"):
        node.apply(write(service("b", "c", "d")))
    assert tables_of(node) == before


def test_a_slot_that_is_written_over(
    made: Lab, node: api.Node, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot of all, of a backend that has no weight: of the service, and still not to be there."""
    node.apply(write(service("a")))
    original = LoadBalancer.build_table

    def errs(self: LoadBalancer, first: int, size: int, rows: Any, plan: Any) -> None:
        original(self, first, size, rows, plan)
        _, backends = self.maps["backends"].read()
        drained = set(np.flatnonzero(backends["flags"]).tolist()) - set(rows.tolist())
        self.pages[first].flat[0] = max(drained)

    monkeypatch.setattr(LoadBalancer, "build_table", errs)
    with pytest.raises(TableRefused, match="not put to use") as raised:
        node.apply(write(service("b", "c", "d", d=0)))
    assert "1 of 1021 slots name rows that are not the service's" in raised.value.why
    assert answers(made) == {"a"}


def test_modulo_is_checked_too(
    made: Lab, node: api.Node, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.apply(write(service("a", algorithm="modulo")))
    original = LoadBalancer.write_table

    def errs(self: LoadBalancer, first: int, slots: Any) -> None:
        original(self, first, np.where(np.arange(len(slots)) == 0, slots[-1], slots))

    monkeypatch.setattr(LoadBalancer, "write_table", errs)
    with pytest.raises(TableRefused):
        node.apply(write(service("b", "c", "d", algorithm="modulo")))
    assert answers(made) == {"a"}


def test_what_is_refused_leaves_nothing_behind_after_the_next_change(
    node: api.Node, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.apply(write(service("a")))
    used = usage(node)
    original = LoadBalancer.build_table

    def errs(self: LoadBalancer, first: int, size: int, rows: Any, plan: Any) -> None:
        original(self, first, size, *quotas(rows, plan))

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(LoadBalancer, "build_table", errs)
            with pytest.raises(TableRefused):
                node.apply(write(service("b", "c", "d")))
    node.apply(write(service("a")))
    assert usage(node) == used


def usage(node: api.Node) -> tuple[int, int]:
    """Backends' rows and pages in use."""
    balancer = LoadBalancer.pinned(node.name.pins)
    assert balancer is not None
    with balancer:
        tables = Tables(balancer)
        return tables.backends_in_use(), sum(tables.used_pages().values())


def tables_of(node: api.Node) -> dict[bytes, tuple[Any, bytes]]:
    """Every service row with the slots of its table, read afresh."""
    balancer = LoadBalancer.pinned(node.name.pins)
    assert balancer is not None
    with balancer:
        tables = Tables(balancer)
        pools = [pool for group in node._pools.values() for pool in group]
        return {
            frontend_key(one): (tables.services.get(frontend_key(one)), tables.table(one).tobytes())
            for pool in pools
            for one in pool.frontends
        }
