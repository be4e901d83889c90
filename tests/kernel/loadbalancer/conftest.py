"""The scene, once for the folder; balancers with the default constants, or with a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hookline import bpf, net
from tests.kernel.loadbalancer.scene import Balancer, Scene
from tests.requirements import missing_for, missing_program, need
from tools.build_objects import ROOT, build_all

MakeBalancer = Callable[..., Balancer]


@pytest.fixture(scope="package", autouse=True)
def compiled() -> Path:
    """The load balancer's object, up to date."""
    need("kernel", missing_for("kernel") or missing_program("ip"))
    build_all(ROOT)
    return ROOT / "src/hookline/datapath/loadbalancer/loadbalancer.bpf.o"


@pytest.fixture(scope="package")
def empty_object(compiled: Path) -> Path:
    """Programs that pass everything, up to date."""
    return ROOT / "src/hookline/bench/empty.bpf.o"


@pytest.fixture(scope="package")
def scene(compiled: Path, unique_name: Callable[[], str]) -> Iterator[Scene]:
    need("kernel", "" if net.ipv6_available() else "IPv6")
    with Scene.built(unique_name()) as built:
        yield built


@pytest.fixture
def inside_node(scene: Scene) -> Iterator[None]:
    """Runs the test in the node's namespace."""
    with net.inside(scene.node):
        yield


@pytest.fixture(scope="package")
def shared_balancer(compiled: Path) -> Iterator[Balancer]:
    with bpf.Object.open(compiled) as obj:
        yield Balancer(obj)


@pytest.fixture
def balancer(shared_balancer: Balancer, inside_node: None) -> Balancer:
    """The load balancer with its default constants and empty tables, in the node's namespace."""
    shared_balancer.clear()
    return shared_balancer


@pytest.fixture
def make_balancer(compiled: Path, inside_node: None) -> Iterator[MakeBalancer]:
    """Makes balancers with constants and sizes of the test's own."""
    with ExitStack() as opened:

        def make(constants: dict[str, int] | None = None, sizes: dict[str, int] | None = None) -> Balancer:
            return Balancer(opened.enter_context(bpf.Object.open(compiled)), constants, sizes)

        yield make
