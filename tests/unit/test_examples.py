"""Every YAML under examples/ is read without complaint, and says the same after a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from hookline import model
from hookline.model import Resource
from hookline.sources import files

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".yaml", ".yml", ".json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_is_read(path: Path) -> None:
    resources = files.load([path])
    assert resources
    assert files.loads(files.dump(resources)) == resources


def test_folders_have_a_lesson() -> None:
    for folder in {path.parent for path in FILES}:
        assert (folder / "README.md").exists(), f"{folder} has no README.md"


def test_kinds_have_an_example() -> None:
    shown: set[type[Resource]] = {type(resource) for path in FILES for resource in files.load([path])}
    names = {kind.kind for kind in shown}
    assert names == {kind.kind for kind in model.supported_kinds()}
