"""A change is proved before it is made: the plan says what moves and ends, and a table that came out wrong is never used.

The table builder is made to err for real: the kernel's program runs with a candidates array that was changed below the
check, or a slot is written over after it. Connections and answers are those of real sockets.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hookline import api, cli
from hookline.control import Plan, PoolSummary, TableRefused
from hookline.control.tables import Tables, frontend_key
from hookline.datapath.loadbalancer.balancer import LoadBalancer
from hookline.lab import Lab
from tests.lab.conftest import lab_with, pod

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
    with lab_with(
        unique_name(),
        *(pod(one, metadata={"labels": {"app": one}}) for one in "abcd"),
    ) as up:
        yield up


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


FRONTENDS = [(4, "192.0.2.{number}"), (6, "2001:db8:2::{number}")]
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


# -- what the plan says, and what then happens


class Flows:
    """Connections of the client that stay open: TCP and UDP, IPv4 and IPv6, and who answered each first."""

    def __init__(self, made: Lab, number: int = 10, each: int = 12) -> None:
        self.open: list[tuple[str, socket.socket, str]] = []
        for family, address in FRONTENDS:
            for protocol, port in (("tcp", 80), ("udp", 53)):
                for one in made.sockets("external/client", family, protocol, each):  # type: ignore[arg-type]
                    one.settimeout(3)
                    one.connect((address.format(number=number), port))
                    self.open.append((f"{protocol}{family}", one, ask(one)))

    def close(self) -> None:
        for _, one, _ in self.open:
            one.close()

    def of(self, name: str, kind: str) -> list[socket.socket]:
        """Those of a kind that a backend answered first."""
        return [one for which, one, answered in self.open if which == kind and answered == name]


def ask(one: socket.socket) -> str:
    one.sendall(b"?\n")
    return one.recv(100).decode().strip().removeprefix("default/")


@pytest.fixture
def flows(made: Lab) -> Iterator[Callable[..., Flows]]:
    """Makes flows that are closed after the test."""
    every: list[Flows] = []

    def make(**options: Any) -> Flows:
        every.append(Flows(made, **options))
        return every[-1]

    yield make
    for one in every:
        one.close()


def by_pool(plan: Plan) -> dict[str, PoolSummary]:
    """The plan's pools as ``tcp4``, ``udp6`` …"""
    names = {"http": "tcp", "dns": "udp"}
    return {f"{names[one.port]}{one.family[-1]}": one for one in plan.pools}


def test_a_backend_that_goes(
    made: Lab, node: api.Node, write: Callable[..., Path], flows: Callable[..., Flows]
) -> None:
    node.apply(write(service("a", "b", "c")))
    before = slots_of(node)
    held = flows(each=40)  # so that none of the three backends is left out by chance
    counted = {kind: len(held.of("a", kind)) for kind in ("tcp4", "tcp6", "udp4", "udp6")}
    assert all(counted.values()), "a has connections of every kind"
    plan = node.plan(write(service("b", "c")))
    pools = by_pool(plan)
    for kind, pool in pools.items():
        moves = pool.moves
        assert moves is not None
        stay, move = (counted[kind], 0) if kind.startswith("tcp") else (0, counted[kind])
        assert (moves.stay, moves.move, moves.end) == (stay, move, 0), kind
    document = {one["family"] + one["port"]: one for one in plan.as_dict()["services"]}
    assert document["IPv4http"]["open_connections_stay"] == counted["tcp4"]
    assert document["IPv6dns"]["open_connections_move"] == counted["udp6"]

    node.apply(write(service("b", "c")))
    after = slots_of(node)
    for kind, (old, _) in before.items():
        moves = pools[kind].moves
        assert moves is not None
        differ = int((np.array(old) != np.array(after[kind][0])).sum())
        assert (moves.slots, moves.size) == (differ, 1021)
        assert moves.share == pytest.approx(differ / 1021)
    for kind in ("tcp4", "tcp6"):
        assert {ask(one) for one in held.of("a", kind)} == {"a"}, "they stay"
    for kind in ("udp4", "udp6"):
        assert {ask(one) for one in held.of("a", kind)} <= {"b", "c"}, "they move"
    for kind in counted:
        for name in "bc":
            assert {ask(one) for one in held.of(name, kind)} <= {name}, "nobody else does"


def test_a_service_that_goes(
    made: Lab, node: api.Node, write: Callable[..., Path], flows: Callable[..., Flows]
) -> None:
    node.apply(write(service("a", "b"), service("c", number=11, name="t")))
    held = flows(each=3)
    others = flows(number=11, each=3)
    plan = node.plan(delete=["VirtualService/default/s"])
    assert {kind: pool.moves and pool.moves[3:] for kind, pool in by_pool(plan).items()} == dict.fromkeys(
        ("tcp4", "tcp6", "udp4", "udp6"), (0, 0, 3)
    )
    node.delete(["VirtualService/default/s"])
    for _, one, _ in held.open[::3]:
        one.settimeout(0.3)
        with pytest.raises(OSError, match=r"timed out|refused|reset|unreachable|No route"):
            ask(one)
    assert {ask(one) for _, one, _ in others.open} == {"c"}
    plan = node.plan(delete=["VirtualService/default/t"])
    assert plan.detaches
    assert {pool.moves.end for pool in plan.pools if pool.moves} == {3}


def test_an_address_that_goes_and_one_that_comes(
    node: api.Node, write: Callable[..., Path], flows: Callable[..., Flows]
) -> None:
    text = service("a", "b")
    node.apply(write(text.replace('"192.0.2.10",', '"192.0.2.10", "192.0.2.12",')))
    flows(each=4)
    plan = node.plan(write(text.replace('"192.0.2.10",', '"192.0.2.12",')))
    moves = {kind: pool.moves for kind, pool in by_pool(plan).items()}
    assert {kind: one and (one.slots, one.stay, one.move, one.end) for kind, one in moves.items()} == {
        "tcp4": (0, 0, 0, 4),
        "udp4": (0, 0, 0, 4),
    }


def test_the_last_backend_goes(
    node: api.Node, write: Callable[..., Path], flows: Callable[..., Flows]
) -> None:
    node.apply(write(service("a")))
    held = flows(each=2)
    plan = node.plan(write(service("nobody")))
    moves = {kind: pool.moves for kind, pool in by_pool(plan).items()}
    assert {kind: one and (one.slots, one.size, one.share, *one[3:]) for kind, one in moves.items()} == {
        "tcp4": (1021, 1021, 1.0, 2, 0, 0),
        "tcp6": (1021, 1021, 1.0, 2, 0, 0),
        "udp4": (1021, 1021, 1.0, 0, 0, 2),
        "udp6": (1021, 1021, 1.0, 0, 0, 2),
    }
    node.apply(write(service("nobody")))
    assert {ask(one) for kind in ("tcp4", "tcp6") for one in held.of("a", kind)} == {"a"}
    for kind in ("udp4", "udp6"):
        for one in held.of("a", kind):
            one.settimeout(0.3)
            with pytest.raises(OSError, match=r"timed out|refused|unreachable"):
                ask(one)


def test_what_ended_is_not_counted(
    node: api.Node, write: Callable[..., Path], flows: Callable[..., Flows]
) -> None:
    node.apply(write(service("a")))
    flows(each=2).close()
    moves = by_pool(node.plan(write(service("b"))))["tcp4"].moves
    assert moves is not None
    assert (moves.stay, moves.move, moves.end) == (0, 0, 0)


@pytest.mark.parametrize("size", [1031, 65_537])
def test_a_table_that_changes_its_size(node: api.Node, write: Callable[..., Path], size: int) -> None:
    node.apply(write(service("a", "b", "c")))
    before = slots_of(node)
    text = service("a", "b", "c").replace("  algorithm", f"  tableSize: {size}\n  algorithm")
    plan = by_pool(node.plan(write(text)))
    node.apply(write(text))
    after = slots_of(node)
    hashes = np.arange(0, 1 << 32, 4_099, dtype=np.int64)
    for kind in before:
        moves = plan[kind].moves
        assert moves is not None
        old, new = np.array(before[kind][0]), np.array(after[kind][0])
        assert moves.size == len(new) == size
        really = float(np.mean(old[hashes * len(old) >> 32] != new[hashes * len(new) >> 32]))
        assert moves.share == pytest.approx(really, abs=0.002)
        assert 0 < moves.slots <= size


def test_plans_of_a_new_service_and_of_nothing(node: api.Node, write: Callable[..., Path]) -> None:
    path = write(service("a", "b"))
    for pool in node.plan(path).pools:
        assert pool.moves == (0, 0, 0.0, 0, 0, 0)
    node.apply(path)
    assert node.plan(path).pools == []


def test_the_plan_is_printed(
    node: api.Node,
    write: Callable[..., Path],
    flows: Callable[..., Flows],
    capsys: pytest.CaptureFixture[str],
) -> None:
    node.apply(write(service("a")))
    flows(each=2)
    capsys.readouterr()
    assert cli.run(["apply", "--dry-run", "-f", str(write(service("b"))), "--node", str(node.name)]) == 0
    out = capsys.readouterr().out
    assert "SLOTS MOVED" in out
    assert "1021 of 1021" in out
    assert "100" in out


def slots_of(node: api.Node) -> dict[str, tuple[list[bytes], int]]:
    """The backends' addresses by slot of each pool, as ``tcp4`` … and the table's size."""
    balancer = LoadBalancer.pinned(node.name.pins)
    assert balancer is not None
    names = {"TCP": "tcp", "UDP": "udp"}
    with balancer:
        tables = Tables(balancer)
        _, backends = balancer.maps["backends"].read()
        return {
            f"{names[pool.protocol]}{pool.version}": (
                [one.tobytes() for one in backends["address"][tables.table(pool.frontends[0])]],
                pool.table_size,
            )
            for group in node._pools.values()
            for pool in group
        }


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
