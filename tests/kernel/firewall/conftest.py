"""Interfaces in a namespace, once for the folder, and a firewall whose rows a test gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import net
from hookline.datapath.firewall.firewall import Firewall, Tunables
from tests.kernel.firewall.scene import SMALL, Gate, Scene
from tests.requirements import missing_for, missing_program, need
from tools.build_objects import ROOT, build_all

NOWHERE = Path("/sys/fs/bpf/hookline-not-pinned")


@pytest.fixture(scope="package", autouse=True)
def compiled() -> Path:
    """The firewall's object, up to date."""
    need("kernel", missing_for("kernel") or missing_program("ip"))
    build_all(ROOT)
    return ROOT / "src/hookline/datapath/firewall/firewall.bpf.o"


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
def shared_firewall(compiled: Path) -> Iterator[Firewall]:
    with Firewall.open(NOWHERE, SMALL) as firewall:
        yield firewall


@pytest.fixture
def gate(shared_firewall: Firewall, scene: Scene, inside_node: None) -> Gate:
    """The firewall with no rules and no connections, in the node's namespace."""
    made = Gate(shared_firewall)
    made.clear()
    return made


@pytest.fixture
def make_gate(compiled: Path, scene: Scene, inside_node: None) -> Iterator[Callable[[Tunables], Gate]]:
    """Makes firewalls of other sizes."""
    opened: list[Firewall] = []

    def make(tunables: Tunables) -> Gate:
        opened.append(Firewall.open(NOWHERE, tunables))
        gate = Gate(opened[-1])
        gate.clear()
        return gate

    yield make
    for firewall in opened:
        firewall.close()
