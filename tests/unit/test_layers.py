"""Imports go one way, from a folder to those below it, and a public package exports its ``__all__``."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hookline"


def layers() -> list[str]:
    """The layers of docs/design.md, the highest first."""
    text = (ROOT / "docs" / "design.md").read_text()
    block = re.search(r"^## Layers\n.*?^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "docs/design.md has no list of layers"
    return [line.split()[0] for line in block[1].splitlines() if line.strip()]


LAYERS = layers()


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The lines and the layers of hookline that a module imports."""
    package = ("hookline", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "hookline" else [base]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "hookline" and rest:
                yield node.lineno, rest.partition(".")[0]


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders <= set(LAYERS)
    assert LAYERS[-1] == "errors"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_from_below(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own not in LAYERS:
        return  # hookline/__init__.py, the top, may name them all
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {own} imports {layer}, which is not below it"
        for line, layer in imports(path)
        if layer in LAYERS and LAYERS.index(layer) < LAYERS.index(own)
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_private_modules_are_their_packages_own(path: Path) -> None:
    """``hookline.model._fields`` is for ``hookline.model`` alone."""
    parts = path.relative_to(SOURCE).parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hookline."):
            layer, *inner = node.module.split(".")[1:]
            if any(part.startswith("_") for part in inner):
                assert layer == parts[0], f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}"


def test_model_is_pure() -> None:
    for path in (SOURCE / "model").glob("*.py"):
        if path.name != "names.py":
            tree = ast.parse(path.read_text())
            roots = {
                name.name.split(".")[0]
                for n in ast.walk(tree)
                if isinstance(n, ast.Import)
                for name in n.names
            }
            roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not roots & {"os", "pathlib", "socket", "subprocess", "yaml", "sys", "io"}, path.name


def public_packages() -> list[str]:
    """The packages and modules that declare what they export."""
    found = []
    for path in modules():
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if any(name.startswith("_") for name in names):
            continue
        tree = ast.parse(path.read_text())
        targets = [target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            found.append(".".join(names))
    return found


@pytest.mark.parametrize("name", public_packages())
def test_all_is_what_is_exported(name: str) -> None:
    module = importlib.import_module(name)
    declared = module.__all__
    assert len(declared) == len(set(declared))
    missing = [member for member in declared if not hasattr(module, member)]
    assert not missing
    if module.__file__ and module.__file__.endswith("__init__.py"):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hookline.")
            for alias in node.names
        }
        assert {member for member in imported if not member.startswith("_")} <= set(declared)


def test_packages_with_exports_are_found() -> None:
    assert "hookline.model" in public_packages()
