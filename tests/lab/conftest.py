"""What tests of the lab share: names of their own, small clusters, and a look at what a lab left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import api, lab, net
from hookline.lab import Lab, LabError
from hookline.model import Resource, parse
from hookline.model.names import lab_cgroup, lab_pins, lab_run_dir, lab_state_dir
from hookline.sources import files

EXAMPLE = Path(__file__).parents[2] / "examples" / "lab" / "cluster.yaml"


def document(kind: str, name: str, **fields: Any) -> Resource:
    """A resource by its kind, name and fields."""
    version = "hookline.dev/v1alpha1" if kind == "ExternalHost" else "v1"
    metadata = {"name": name, **fields.pop("metadata", {})}
    return parse({"apiVersion": version, "kind": kind, "metadata": metadata, **fields})


def pod(name: str, node: str = "node-1", **fields: Any) -> Resource:
    """A pod that listens on 8080/tcp and 5353/udp."""
    ports = [{"name": "http", "containerPort": 8080}, {"containerPort": 5353, "protocol": "UDP"}]
    containers = [{"name": "server", "ports": ports}]
    return document("Pod", name, spec={"nodeName": node, "containers": containers}, **fields)


def pods(number: int) -> list[Resource]:
    """Two nodes, and so many pods on them in turn: p0 on node-1, p1 on node-2."""
    nodes = [document("Node", f"node-{which}") for which in (1, 2)]
    return [*nodes, *(pod(f"p{which}", f"node-{which % 2 + 1}") for which in range(number))]


@contextlib.contextmanager
def lab_with(name: str, *members: Resource, nodes: int = 1) -> Iterator[Lab]:
    """A lab that is up in the block: so many nodes, these members, and a client outside."""
    try:
        yield api.lab_up(
            [
                *(document("Node", f"node-{which + 1}") for which in range(nodes)),
                *members,
                document("ExternalHost", "client", spec={"addresses": ["203.0.113.10", "2001:db8:203::10"]}),
            ],
            name,
        )
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)


def traces(name: str) -> list[str]:
    """Everything on the machine that belongs to a lab of this name."""
    found = [f"namespace {one}" for one in net.list_names(f"hl.{name}.")]
    places = (lab_run_dir(name), lab_state_dir(name), lab_pins(name))
    found += [f"folder {place}" for place in places if place.exists()]
    found += [f"process {line}" for line in processes(name)]
    cgroup = net.cgroups.path(lab_cgroup(name))
    found += [f"cgroup {cgroup}"] if cgroup.exists() else []
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line}" for line in mounts if f"hl.{name}." in line]
    return found


def processes(name: str) -> list[str]:
    """The servers of a lab that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hookline.lab.server" in words and name.encode() in words:
            found.append(f"{folder.name}: {b' '.join(words).decode()}")
    return found


def root_links() -> set[str]:
    """The interfaces of the namespace that the tests run in."""
    return set(os.listdir("/sys/class/net"))


@pytest.fixture
def lab_name(unique_name: Callable[[], str]) -> Iterator[str]:
    """A name for a lab that is removed after the test, however far it came."""
    name = unique_name()
    yield name
    with contextlib.suppress(LabError):
        lab.down(name)


@pytest.fixture
def other_lab_name(unique_name: Callable[[], str]) -> Iterator[str]:
    """A name for a second lab."""
    name = unique_name()
    yield name
    with contextlib.suppress(LabError):
        lab.down(name)


@pytest.fixture(scope="module")
def cluster(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """The example's lab, one for all tests of a module."""
    name = unique_name()
    try:
        yield lab.up(files.load([EXAMPLE]), name)
    finally:
        with contextlib.suppress(LabError):
            lab.down(name)
