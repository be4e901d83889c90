"""Sets of pools as a user might want them, what tables they must give, and maps of plain memory that fail on request.

Used by the tests of `hookline.control.tables`, without a kernel and with one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from hookline import bpf, net
from hookline.control.placement import Placements
from hookline.control.pools import Frontend, Pool, Protocol, Target
from hookline.control.tables import (
    SERVICE_ADDRESS,
    SERVICE_MODULO,
    SERVICE_NODE_OWN,
    Tables,
    frontend_key,
    service_key,
)
from hookline.datapath.loadbalancer import maglev
from hookline.datapath.loadbalancer._object import object_bytes
from hookline.datapath.loadbalancer.balancer import MAPS, LoadBalancer, Tunables, pages_for

Address = IPv4Address | IPv6Address
Array = npt.NDArray[Any]

FRONTENDS = IPv4Network("192.0.2.0/24")
OWN = ip_address("192.0.2.1")  # the node's own; the other services' addresses are not


def route_to(address: Address) -> net.Route:
    """Every kind of route, by the address' last octet: local, on the uplink, behind a router, none."""
    source = ip_address("10.0.0.1") if address.version == 4 else ip_address("2001:db8::1")
    if address == OWN:
        return net.Route("lo", None, source, "local")
    if address in FRONTENDS:
        return net.Route("eth0", ip_address("10.0.0.254"), source, "unicast")
    match int(address) % 4:
        case 0:
            return net.Route("pod0", None, source, "unicast")
        case 1:
            return net.Route("eth0", None, source, "unicast")
        case 2:
            gateway = ip_address("10.0.0.254") if address.version == 4 else ip_address("fe80::1")
            return net.Route("eth0", gateway, source, "unicast")
    return net.Route("", None, None, "unreachable")


def placements() -> Placements:
    return Placements(frozenset({"eth0"}), lambda found: {address: route_to(address) for address in found})


def make_pool(
    service: str = "s",
    port: str = "http",
    *,
    addresses: Sequence[str] = ("192.0.2.1",),
    number: int = 80,
    protocol: Protocol = "TCP",
    targets: Mapping[str, int] | None = None,
    target_port: int = 8080,
    forwarding: Literal["nat", "dsr"] = "nat",
    algorithm: Literal["maglev", "modulo"] = "maglev",
    size: int = 1021,
) -> Pool:
    """A pool of these backends and weights."""
    weights = {"10.244.0.4": 100, "10.244.0.5": 100} if targets is None else targets
    active = [weight for weight in weights.values() if weight]
    if not active:
        size = 0
    elif algorithm == "modulo":
        size = len(maglev.modulo(active))
    found = tuple(
        Target(ip_address(address), target_port, weight, address) for address, weight in weights.items()
    )
    frontends = tuple(Frontend(ip_address(address), number, protocol) for address in addresses)
    version: Literal[4, 6] = 4 if frontends[0].address.version == 4 else 6
    return Pool(service, port, version, protocol, frontends, found, forwarding, algorithm, size)


@st.composite
def _pools_of_one_service(draw: st.DrawFn, index: int) -> list[Pool]:
    service = f"s{index}"
    four = draw(st.booleans())
    addresses = (
        [f"192.0.2.{index * 2 + 1}", f"192.0.2.{index * 2 + 2}"]
        if four
        else [f"2001:db8:f::{index * 2 + 1:x}", f"2001:db8:f::{index * 2 + 2:x}"]
    )
    base = "10.244.0." if four else "2001:db8:1::"
    chosen = draw(st.lists(st.sampled_from(addresses), min_size=1, max_size=2, unique=True))
    forwarding: Literal["nat", "dsr"] = draw(st.sampled_from(["nat", "dsr"]))
    algorithm: Literal["maglev", "modulo"] = draw(st.sampled_from(["maglev", "maglev", "modulo"]))
    found = []
    for number in draw(st.lists(st.sampled_from([80, 443]), min_size=1, max_size=2, unique=True)):
        targets = draw(
            st.dictionaries(
                st.integers(1, 9).map(lambda n: f"{base}{n}"), st.sampled_from([0, 1, 100, 200]), max_size=5
            )
        )
        found.append(
            make_pool(
                service,
                f"{draw(st.sampled_from('ab'))}{number}",
                addresses=chosen,
                number=number,
                protocol=draw(st.sampled_from(["TCP", "UDP"])),
                targets=targets,
                target_port=draw(st.sampled_from([8080, 9090])),
                forwarding=forwarding,
                algorithm=algorithm,
                size=draw(st.sampled_from([1021, 1031, 2053])),
            )
        )
    return found


@st.composite
def pool_sets(draw: st.DrawFn, services: int = 4) -> list[Pool]:
    """What a user might want at one time."""
    wanted = draw(st.lists(st.integers(0, services - 1), unique=True, max_size=services))
    return [pool for index in wanted for pool in draw(_pools_of_one_service(index))]


# What must be in the maps


def check(balancer: LoadBalancer, pools: Sequence[Pool]) -> None:
    """Holds the maps against the pools: everything there, in its place, and nothing else."""
    where = placements()
    tables = Tables(balancer)
    change = tables.diff(pools, where)
    assert not change, change
    _check_services(balancer, tables, pools, where)
    wanted = set()
    for pool in pools:
        for target in pool.targets:
            placement = where.place(target.address, pool.forwarding)
            if placement.how != "unreachable":
                wanted.add(
                    (pool.key, _packed(target.address), target.port, placement.flags, placement.source)
                )
    _, rows = balancer.maps["backends"].read()
    there = [
        (
            int(row["pool"]),
            row["address"].tobytes(),
            int(row["port"].byteswap()),
            int(row["flags"]),
            row["source"].tobytes(),
        )
        for row in rows
        if row["flags"]
    ]
    assert len(there) == len(wanted)
    assert set(there) == wanted
    assert not rows[0]["flags"]


def _check_services(balancer: LoadBalancer, tables: Tables, pools: Sequence[Pool], where: Placements) -> None:
    expected: dict[bytes, int] = {}
    for pool in pools:
        for frontend in pool.frontends:
            own = where.is_own(frontend.address)
            expected[frontend_key(frontend)] = SERVICE_MODULO if pool.algorithm == "modulo" else 0
            expected[service_key(frontend.address)] = SERVICE_ADDRESS | (SERVICE_NODE_OWN if own else 0)
    assert {key: row.flags for key, row in tables.services.items()} == expected
    numbers = [row.id for row in tables.services.values() if row.pool]
    assert len(set(numbers)) == len(numbers)
    assert 0 not in numbers
    _, rows = balancer.maps["backends"].read()
    for pool in pools:
        owners = _expected_table(pool, where)
        for frontend in pool.frontends:
            row = tables.services[frontend_key(frontend)]
            assert (row.pool, row.table_size) == (pool.key, len(owners))
            slots = tables.table(frontend)
            names = [(address.tobytes()) for address in rows["address"][slots]["words"]] if len(slots) else []
            assert names == owners
    check_nothing_is_half_done(balancer)


def _expected_table(pool: Pool, where: Placements) -> list[bytes]:
    active = [
        target for target in pool.active if where.place(target.address, pool.forwarding).how != "unreachable"
    ]
    if not active:
        return []
    weights = [target.weight for target in active]
    table = (
        maglev.modulo(weights)
        if pool.algorithm == "modulo"
        else _python_table(tuple(target.identity for target in active), tuple(weights), pool.table_size)
    )
    addresses = [_packed(target.address) for target in active]
    return [addresses[position] for position in table.tolist()]


@lru_cache(maxsize=4096)
def _python_table(identities: tuple[bytes, ...], weights: tuple[int, ...], size: int) -> Array:
    return maglev.build(identities, weights, size)


def check_nothing_is_half_done(balancer: LoadBalancer) -> None:
    """What a program may meet at any moment: whole tables of active backends of the service's own pool."""
    tables = Tables(balancer)
    _, rows = balancer.maps["backends"].read()
    owner: dict[int, tuple[int, int]] = {}
    for row in tables.services.values():
        if not row.table_size:
            continue
        count = pages_for(row.table_size)
        for page in range(row.table_page, row.table_page + count):
            assert owner.setdefault(page, (row.pool, row.fingerprint)) == (row.pool, row.fingerprint)
        slots = balancer.pages[row.table_page : row.table_page + count].reshape(-1)[: row.table_size]
        named = np.unique(slots)
        assert named[0] > 0
        assert (rows["flags"][named] != 0).all()
        assert (rows["pool"][named] == row.pool).all()


def _packed(address: Address) -> bytes:
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


# Maps of plain memory


class Interrupted(Exception):  # noqa: N818
    """The process ended here."""


class Interruption:
    """Lets a number of changes through and ends the process at the next one, half of it done or none."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.halfway = False
        self.met = 0

    def after(self, changes: int, *, halfway: bool) -> None:
        self.left, self.halfway, self.met = changes, halfway, 0

    def off(self) -> None:
        self.left = None

    def allows(self, count: int) -> int:
        """How many of a change's entries are made; the caller raises when it is less than all."""
        self.met += 1
        if self.left is None:
            return count
        if self.left:
            self.left -= 1
            return count
        return count // 2 if self.halfway else 0


class MemoryMap:
    """A hash or array map of this process's own memory, with as much of `bpf.Map` as `Tables` uses."""

    def __init__(self, like: bpf.Map, size: int, interruption: Interruption) -> None:
        self.type, self.key_dtype, self.value_dtype = like.type, like.key_dtype, like.value_dtype
        self.max_entries = size
        self._interruption = interruption
        self._entries: dict[bytes, Any] = {}
        self._array = np.zeros(0 if "hash" in self.type else size, self.value_dtype)

    def read(self) -> tuple[Array, Array]:
        if "hash" not in self.type:
            return np.arange(self.max_entries, dtype=np.uint32), self._array.copy()
        keys = np.frombuffer(b"".join(self._entries), self.key_dtype)
        return keys, np.array(list(self._entries.values()), self.value_dtype)

    def write(self, keys: Array, values: Array) -> None:
        made = self._interruption.allows(len(keys))
        for key, value in zip(keys[:made], values[:made], strict=True):
            if "hash" in self.type:
                if key.tobytes() not in self._entries and len(self._entries) == self.max_entries:
                    raise bpf.MapFull("no room")
                self._entries[key.tobytes()] = value.copy()
            else:
                self._array[int(key)] = value
        if made < len(keys):
            raise Interrupted

    def remove(self, keys: Array) -> int:
        made = self._interruption.allows(len(keys))
        for key in keys[:made]:
            self._entries.pop(key.tobytes(), None)
        if made < len(keys):
            raise Interrupted
        return made

    def view(self, *, first: int = 0, count: int | None = None) -> Array:
        return self._array[first:][:count]


@lru_cache(maxsize=4096)
def _taken(size: int, offset: tuple[int, ...], skip: tuple[int, ...], quota: tuple[int, ...]) -> Array:
    """Which candidate takes each slot."""
    slot, left = list(offset), list(quota)
    takers = [-1] * size
    for _ in range(max(quota)):
        for turn, step in enumerate(skip):
            if left[turn]:
                here = slot[turn]
                while takers[here] >= 0:
                    here = (here + step) % size
                takers[here], slot[turn] = turn, here
                left[turn] -= 1
    return np.array(takers)


class MemoryBuilder:
    """``build_maglev`` in Python, on the same candidates."""

    id = 1

    def __init__(self, maps: Mapping[str, MemoryMap], interruption: Interruption) -> None:
        self._candidates = maps["maglev_candidates"].view()
        self._pages = maps["maglev"].view()["backends"]
        self._interruption = interruption

    def test_run(self, *, context: bytes) -> SimpleNamespace:
        first, size, last, _ = struct.unpack("=IIII", context)
        wanted = self._interruption.allows(size)
        slots = self._pages[first : first + pages_for(size)].reshape(-1)
        candidates = self._candidates[: last + 1]
        takers = _taken(size, *(tuple(candidates[name].tolist()) for name in ("slot", "skip", "quota")))
        slots[:wanted] = candidates["backend"][takers[:wanted]]
        if wanted < size:
            raise Interrupted
        return SimpleNamespace(verdict=0)


def memory_balancer(
    *, services: int = 64, backends: int = 128, pages: int = 64
) -> tuple[LoadBalancer, Interruption]:
    """A load balancer of plain memory; the types are the compiled object's."""
    sizes = {
        "services": services,
        "service_metrics": services,
        "backends": backends,
        "backend_metrics": backends,
        "maglev": pages,
        "connections": 16,
    }
    interruption = Interruption()
    with bpf.Object.open(object_bytes(), name="loadbalancer") as obj:
        maps = {
            name: MemoryMap(obj.maps[name], sizes.get(name, obj.maps[name].max_entries), interruption)
            for name in MAPS
        }
    programs = {"build_maglev": MemoryBuilder(maps, interruption)}
    return (
        LoadBalancer(
            Path("/nowhere"),
            Tunables(),
            cast(Mapping[str, bpf.Program], programs),
            cast(Mapping[str, bpf.Map], maps),
            fresh=True,
        ),
        interruption,
    )


def bring(balancer: LoadBalancer, pools: Sequence[Pool]) -> Tables:
    """What a process does that finds the maps and makes them the pools'."""
    tables = Tables(balancer)
    change = tables.diff(pools, placements())
    tables.check_fits(change)
    tables.carry_out(change)
    return tables


@contextmanager
def interrupted(interruption: Interruption, changes: int, *, halfway: bool) -> Iterator[None]:
    """Ends what runs inside after a number of changes; nothing happens where there are not so many."""
    interruption.after(changes, halfway=halfway)
    try:
        yield
    except Interrupted:
        pass
    finally:
        interruption.off()
