"""The tables in the kernel, pinned: carried out, interrupted, adopted, and carried over to another version.

The logic alone has its tests in tests/unit/test_tables.py; these hold it against real maps and the real builder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookline import bpf, net
from hookline.control import tables as tables_module
from hookline.control._errors import DoesNotFit
from hookline.control.pools import Pool
from hookline.control.tables import Tables
from hookline.datapath import pinning
from hookline.datapath.loadbalancer import balancer as balancer_module
from hookline.datapath.loadbalancer.balancer import MAPS, PROGRAMS, LoadBalancer, Tunables, attached, remove
from tests.kernel.loadbalancer import packets
from tests.kernel.loadbalancer.packets import tcp, to_service
from tests.kernel.loadbalancer.scene import Scene, flow
from tests.pool_sets import (
    Interrupted,
    Interruption,
    bring,
    check,
    check_nothing_is_half_done,
    make_pool,
    placements,
    pool_sets,
)

SMALL = Tunables(connections=1024, services=64, backends=128, maglev_pages=64)
BEFORE = [
    make_pool("a"),
    make_pool("gone", addresses=["192.0.2.9"]),
    make_pool("b", number=81),
    make_pool("six", addresses=["2001:db8:f::1"], targets={"2001:db8:1::4": 3, "2001:db8:1::5": 1}),
]
WANTED = [
    make_pool("a", targets={"10.244.0.5": 1, "10.244.0.6": 3}),
    make_pool("new", addresses=["192.0.2.7", "192.0.2.8"], size=4099),
    make_pool("b", number=81, algorithm="modulo"),
    make_pool("six", addresses=["2001:db8:f::1"], targets={"2001:db8:1::4": 3, "2001:db8:1::8": 1}),
]

OpenBalancer = Callable[..., LoadBalancer]


@pytest.fixture
def pins(unique_name: Callable[[], str]) -> Iterator[Path]:
    """A folder of the test's own in bpffs."""
    path = Path(f"/sys/fs/bpf/hookline-test-{unique_name()}")
    yield path
    remove(path)
    assert not path.exists()


@pytest.fixture
def open_balancer(compiled: Path, inside_node: None, pins: Path) -> Iterator[OpenBalancer]:
    """Opens the load balancer pinned there, in the node's namespace."""
    with ExitStack() as opened:

        def opening(tunables: Tunables = SMALL) -> LoadBalancer:
            return opened.enter_context(LoadBalancer.open(pins, tunables))

        yield opening


@pytest.fixture
def balancer(open_balancer: OpenBalancer) -> LoadBalancer:
    """Fresh, pinned and attached nowhere."""
    fresh = open_balancer()
    assert fresh.fresh
    fresh.activate([])
    return fresh


# Changes


def test_there_and_back(balancer: LoadBalancer) -> None:
    for pools in (BEFORE, WANTED, BEFORE, [], WANTED):
        bring(balancer, pools)
        check(balancer, pools)


@given(sets=st.lists(pool_sets(), min_size=1, max_size=4))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_sequence_of_sets(balancer: LoadBalancer, sets: list[list[Pool]]) -> None:
    """One map lives through all of it: leaks would fill it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tables_module, "QUARANTINE_SECONDS", 0)
        tables = Tables(balancer)
        for pools in sets:
            change = tables.diff(pools, placements())
            tables.check_fits(change)
            tables.carry_out(change)
            check(balancer, pools)


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    """Ends the process at a write to a map of the kernel, or at building a table."""
    found = Interruption()
    write, remove_, build = bpf.Map.write, bpf.Map.remove, LoadBalancer.build_table

    def partly_write(self: bpf.Map, keys: Any, values: Any) -> None:
        made = found.allows(len(keys))
        if made:
            write(self, keys[:made], values[:made])
        if made < len(keys):
            raise Interrupted

    def partly_remove(self: bpf.Map, keys: Any) -> int:
        made = found.allows(len(keys))
        if made:
            remove_(self, keys[:made])
        if made < len(keys):
            raise Interrupted
        return made

    def partly_build(self: LoadBalancer, first: int, size: int, rows: Any, plan: Any) -> None:
        made = found.allows(size)
        build(self, first, size, rows, plan)
        if made < size:
            self.pages[first].reshape(-1)[made:] = 0
            raise Interrupted

    monkeypatch.setattr(bpf.Map, "write", partly_write)
    monkeypatch.setattr(bpf.Map, "remove", partly_remove)
    monkeypatch.setattr(LoadBalancer, "build_table", partly_build)
    return found


@pytest.mark.parametrize("halfway", [False, True])
def test_every_step_can_be_the_last(
    open_balancer: OpenBalancer, balancer: LoadBalancer, interruption: Interruption, halfway: bool
) -> None:
    """Killed at each write, the maps are never half a change, and the next process finishes it."""
    for changes in range(100):
        bring(balancer, BEFORE)
        interruption.after(changes, halfway=halfway)
        try:
            bring(balancer, WANTED)
        except Interrupted:
            finished = False
        else:
            finished = True
        interruption.off()
        check_nothing_is_half_done(balancer)
        with LoadBalancer.open(balancer.pins, SMALL) as adopted:
            assert not adopted.fresh
            bring(adopted, WANTED)
            check(adopted, WANTED)
        if finished:
            break
    assert changes >= 8


# What does not fit


@pytest.mark.parametrize(
    ("tunables", "pools", "words"),
    [
        (
            Tunables(connections=64, services=8, backends=3, maglev_pages=8),
            [make_pool(targets={f"10.244.0.{number}": 1 for number in (4, 5, 6)})],
            "3 backends do not fit: the map backends has room for 2",
        ),
        (
            Tunables(connections=64, services=3, backends=16, maglev_pages=8),
            [make_pool(f"s{number}", number=number) for number in (1, 2, 3)],
            "4 rows of services do not fit: each address takes one and each of its ports another, and the map",
        ),
        (
            Tunables(connections=64, services=8, backends=16, maglev_pages=2),
            [make_pool(size=4099)],
            "tables of 5 pages do not fit: the map maglev has 2 pages",
        ),
    ],
    ids=["backends", "services", "maglev"],
)
def test_does_not_fit(open_balancer: OpenBalancer, tunables: Tunables, pools: list[Pool], words: str) -> None:
    balancer = open_balancer(tunables)
    tables = Tables(balancer)
    with pytest.raises(DoesNotFit) as error:
        tables.check_fits(tables.diff(pools, placements()))
    assert words in str(error.value)
    check(balancer, [])


def test_a_full_map_of_services_is_used_to_its_last_row(open_balancer: OpenBalancer) -> None:
    balancer = open_balancer(Tunables(connections=64, services=4, backends=16, maglev_pages=8))
    pools = [make_pool(f"s{number}", number=number) for number in (1, 2, 3)]
    bring(balancer, pools)
    check(balancer, pools)


# Counters


def test_counters_of_a_reused_row_begin_at_zero(balancer: LoadBalancer) -> None:
    one, other = make_pool(targets={"10.244.0.4": 1}), make_pool(targets={"10.244.0.5": 1})
    (row,) = bring(balancer, [one]).pool_rows(one).values()
    balancer.maps["backend_metrics"][row] = {"packets": 7}
    bring(balancer, [])
    assert balancer.maps["backend_metrics"][row]["packets"].sum() > 0
    assert list(bring(balancer, [other]).pool_rows(other).values()) == [row]
    assert not balancer.maps["backend_metrics"][row]["packets"].any()


def test_counters_go_on_when_weights_change(balancer: LoadBalancer) -> None:
    pool = make_pool()
    tables = bring(balancer, [pool])
    row = next(iter(tables.pool_rows(pool).values()))
    (number,) = (entry.id for entry in tables.services.values() if entry.pool)
    balancer.maps["backend_metrics"][row] = {"packets": 7}
    balancer.maps["service_metrics"][number] = {"packets": 7}
    bring(balancer, [make_pool(targets={"10.244.0.4": 100, "10.244.0.5": 50})])
    assert (balancer.maps["backend_metrics"][row]["packets"] == 7).all()
    assert (balancer.maps["service_metrics"][number]["packets"] == 7).all()


# Adoption and other versions


def test_adoption(open_balancer: OpenBalancer, balancer: LoadBalancer, pins: Path) -> None:
    bring(balancer, BEFORE)
    ids = {name: table.id for name, table in balancer.maps.items()}
    adopted = open_balancer()
    assert not adopted.fresh
    assert not adopted.replaced
    assert {name: table.id for name, table in adopted.maps.items()} == ids
    check(adopted, BEFORE)
    assert [one.change for one in adopted.activate([])] == ["kept"]
    assert attached(pins) == [("count_exceptions", "")]


def _ids(pins: Path, names: tuple[str, ...], kind: str) -> dict[str, int]:
    opener = bpf.Map if kind == "maps" else bpf.Program
    found = {}
    for name in names:
        with opener.from_pin(pins / kind / name) as thing:
            found[name] = thing.id
    return found


def test_another_constant_is_another_version_around_the_same_maps(
    open_balancer: OpenBalancer, balancer: LoadBalancer, pins: Path
) -> None:
    bring(balancer, BEFORE)
    maps, programs = _ids(pins, MAPS, "maps"), _ids(pins, PROGRAMS, "programs")
    changed = dataclasses.replace(SMALL, nat_port_max=20_000)
    newer = open_balancer(changed)
    assert newer.fresh
    assert not newer.replaced
    # Nothing is pinned until it is activated.
    assert _ids(pins, PROGRAMS, "programs") == programs
    check(newer, BEFORE)
    assert {one.program: one.change for one in newer.activate([])} == {"count_exceptions": "updated"}
    assert _ids(pins, MAPS, "maps") == maps
    assert not set(_ids(pins, PROGRAMS, "programs").values()) & set(programs.values())
    assert not open_balancer(changed).fresh


def _connect(balancer: LoadBalancer, number: int) -> None:
    row = {"backend": 1, "generation": 1, "service": 1, "kind": 1, "last_seen_ns": 1}
    balancer.maps["connections"][flow(to_service(4, source_port=number))] = row


def test_connections_are_carried_over_to_a_table_of_another_size(
    open_balancer: OpenBalancer, balancer: LoadBalancer
) -> None:
    bring(balancer, BEFORE)
    for number in range(1, 101):
        _connect(balancer, number)
    larger = open_balancer(dataclasses.replace(SMALL, connections=4096))
    assert larger.replaced == ("connections",)
    assert len(larger.maps["connections"]) == 100
    check(larger, BEFORE)
    larger.activate([])
    smaller = open_balancer(dataclasses.replace(SMALL, connections=64))
    assert smaller.replaced == ("connections",)
    assert 0 < len(smaller.maps["connections"]) <= 64
    check(smaller, BEFORE)


@pytest.mark.parametrize(
    "tunables",
    [
        dataclasses.replace(SMALL, services=256),
        dataclasses.replace(SMALL, backends=256),
        dataclasses.replace(SMALL, maglev_pages=256),
    ],
    ids=["services", "backends", "maglev"],
)
def test_tables_of_another_size_are_filled_anew(
    open_balancer: OpenBalancer, balancer: LoadBalancer, tunables: Tunables
) -> None:
    """The three maps name each other's rows: none of the old is mixed with the new, and the old ones still serve."""
    bring(balancer, BEFORE)
    _, rows_before = balancer.maps["backends"].read()
    larger = open_balancer(tunables)
    assert set(larger.replaced) >= {"services", "backends", "maglev"}
    # Connections name rows of backends by number and generation: these go along.
    _, rows = larger.maps["backends"].read()
    assert np.array_equal(rows[:128], rows_before)
    bring(larger, BEFORE)
    check(larger, BEFORE)
    check(balancer, BEFORE)
    larger.activate([])
    again = open_balancer(tunables)
    assert not again.fresh
    check(again, BEFORE)


def test_a_mixture_of_two_versions_is_never_adopted(
    open_balancer: OpenBalancer, balancer: LoadBalancer, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the pins change hands: whichever version comes next loads its own programs."""
    bring(balancer, BEFORE)
    other = dataclasses.replace(SMALL, connections=2048)
    pin = pinning.pin_in_place
    total = len(MAPS) + len(PROGRAMS)
    for allowed in (4, total - 1):
        left = iter(range(allowed))

        def interrupted_pin(thing: Any, path: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Interrupted
            pin(thing, path)

        with monkeypatch.context() as patched:
            patched.setattr(pinning, "pin_in_place", interrupted_pin)
            with LoadBalancer.open(pins, other) as newer:
                bring(newer, WANTED)
                with pytest.raises(Interrupted):
                    newer.activate([])
        for tunables in (other, SMALL):
            with LoadBalancer.open(pins, tunables) as after:
                assert after.fresh
        with LoadBalancer.open(pins, SMALL) as after:
            bring(after, BEFORE)
            after.activate([])
            check(after, BEFORE)


# Attached


def test_attached_kept_updated_detached(open_balancer: OpenBalancer, scene: Scene, pins: Path) -> None:
    """On the node's uplink; an update exchanges the programs in their links, whatever maps changed."""
    pool = make_pool(addresses=[packets.SERVICE[4]], targets={"10.244.0.4": 1})
    first = open_balancer()
    bring(first, [pool])
    uplinks: list[tuple[str, balancer_module.XdpMode]] = [("uplink", "native")]
    assert {one.change for one in first.activate(uplinks)} == {"attached"}
    assert {one.change for one in first.activate(uplinks)} == {"kept"}
    newer = open_balancer(dataclasses.replace(SMALL, maglev_pages=128))
    bring(newer, [pool])
    check(newer, [pool])
    assert {one.change for one in newer.activate(uplinks)} == {"updated"}
    before = newer.totals().verdicts["pass"][0]
    newer._programs["balance"].test_run(tcp(to_service(4)), ingress="uplink")
    assert newer.totals().verdicts["pass"][0] > before
    assert newer.totals().verdicts["aborted"] == (0, 0)
    assert {one.change for one in newer.activate([])} == {"kept", "detached"}
    assert attached(pins) == [("count_exceptions", "")]


def test_nothing_is_left_where_an_interface_is_taken(
    open_balancer: OpenBalancer, scene: Scene, pins: Path, empty_object: Path
) -> None:
    with bpf.Object.open(empty_object) as obj:
        obj.load()
        with obj.programs["empty_xdp"].attach_xdp("other", mode="native"):
            balancer = open_balancer()
            bring(balancer, BEFORE)
            with pytest.raises(bpf.BpfError, match="other"):
                balancer.activate([("uplink", "native"), ("other", "native")])
    assert not attached(pins)
    assert not LoadBalancer.exists(pins)
    assert not os.path.exists(pins)
    # The uplink is free again.
    with net.inside(scene.node):
        balancer.activate([("uplink", "native")])
