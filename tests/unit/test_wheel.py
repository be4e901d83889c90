"""The wheel that users install: compiled kernel programs inside, one command, no compiler needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("src/**/*.bpf.c"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not all(source.with_suffix(".o").exists() for source in SOURCES):
        pytest.skip("missing: compiled kernel programs (make setup)")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*build, "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_kernel_program_travels_in_the_wheel(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        for source in SOURCES:
            built = source.with_suffix(".o")
            name = str(built.relative_to(ROOT / "src"))
            assert archive.read(name) == built.read_bytes()


def test_wheel_is_typed_licensed_and_pure(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "hookline = hookline.cli:main" in archive.read(entry_points).decode()
    assert "hookline/py.typed" in names
    for license_text in ("Apache-2.0.txt", "GPL-2.0-only.txt", "BSD-2-Clause.txt"):
        assert any(name.endswith(f"licenses/LICENSES/{license_text}") for name in names)
    assert not {name for name in names if name.startswith(("tests/", "tools/"))}
