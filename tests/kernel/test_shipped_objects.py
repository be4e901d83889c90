"""Every object that ships loads, on whatever kernel this is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hookline import bpf
from tools.build_objects import ROOT, build_all, object_of

SOURCES = sorted((ROOT / "src").rglob("*.bpf.c"))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_all(ROOT)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(path, id=path.name, marks=pytest.mark.feature("other", f"{object_of(path).name} loads"))
        for path in SOURCES
    ],
)
def test_it_loads(source: Path) -> None:
    with bpf.Object.open(object_of(source)) as obj:
        obj.load()
        assert obj.programs
        for name, program in obj.programs.items():
            assert program.info.id == program.id, name
            assert program.info.instructions > 0, name
        held = [table.id for table in obj.maps.values()]
        assert len(set(held)) == len(held)
