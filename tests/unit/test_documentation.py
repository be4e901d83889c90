"""What the README and its neighbours say must be so: their YAML parses, their targets and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hookline import model

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/bpf.md", "docs/services.md"]


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_readme_shows_a_service() -> None:
    kinds = [yaml.safe_load(text)["kind"] for text in fences("README.md", "yaml")]
    assert "VirtualService" in kinds


@pytest.mark.parametrize("page", PAGES)
def test_yaml_is_accepted(page: str) -> None:
    for text in fences(page, "yaml"):
        for document in yaml.safe_load_all(text):
            assert model.parse(document).kind == document["kind"]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(
        re.findall(r"^make ([a-z-]+)$", text, re.MULTILINE)
    )
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_linked_to_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    assert [name for name in linked if not ((ROOT / page).parent / name).exists()] == []


def test_diagrams_have_no_outside_references() -> None:
    diagrams = sorted((ROOT / "docs" / "diagrams").glob("*.svg"))
    assert diagrams
    for diagram in diagrams:
        text = diagram.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http" not in text
        assert "var(" not in text
