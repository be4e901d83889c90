"""Every example under examples/ is applied to a real node, and taken away again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hookline import api, lab
from hookline.lab import Lab
from hookline.model import VirtualService
from tests.lab.conftest import document

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "lab")


@pytest.fixture(scope="module")
def bare(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A lab of one node, whose names no example has."""
    name = unique_name()
    try:
        yield api.lab_up([document("Node", "node-1")], name)
    finally:
        with contextlib.suppress(lab.LabError):
            lab.down(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_it_is_applied_and_removed(bare: Lab, path: Path) -> None:
    with api.Node(bare.first_node) as node:
        before = {resource.reference for resource in node.resources()}
        applied = node.apply(path)
        try:
            made = [change.reference for change in applied.plan.resources if change.action == "create"]
            assert made
            assert {resource.reference for resource in node.resources()} == before | set(made)
            for resource in node.resources(VirtualService):
                ports = {
                    status.pool.port
                    for status in node.services()
                    if status.pool.service == resource.reference
                }
                assert len(ports) == len(resource.spec.ports)  # type: ignore[attr-defined]
            assert not node.apply(path).plan.changes
        finally:
            node.delete([change.reference for change in applied.plan.resources])
        assert {resource.reference for resource in node.resources()} == before
