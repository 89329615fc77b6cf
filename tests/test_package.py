"""The wheel: what is in it, what is not, and that it works outside of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("pyproject.toml", "README.md", "LICENSE", "mlx_hiermem", "apps", "convert")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy, since a build leaves folders behind and would take stale ones from the checkout.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in NAMES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    # Only the assets are large, and what they hold does not matter here.
    assets = source / "mlx_hiermem" / "assets" / "packaged" / "memory"
    assets.mkdir(parents=True)
    for name in ("level-1.safetensors", "config.json", "words.txt.gz", "tokenizer.model"):
        (assets / name).write_bytes(b"x")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source], check=True
    )
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_everything_is_below_the_package(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mlx_hiermem"}


def test_every_file_is_in_the_wheel(names):
    for room in ("mlx_hiermem", "apps", "convert"):
        prefix = "" if room == "mlx_hiermem" else "mlx_hiermem/"
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert prefix + path.relative_to(ROOT).as_posix() in names


def test_assets_of_any_kind_are_in_the_wheel(names):
    folder = "mlx_hiermem/assets/packaged/memory/"
    for name in ("level-1.safetensors", "config.json", "words.txt.gz", "tokenizer.model"):
        assert folder + name in names


def test_installed_wheel_works_outside_of_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "-t", site, wheel], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mlx_hiermem, mlx_hiermem.apps.atlas as atlas, mlx_hiermem.apps.demo as demo\n"
        "print(mlx_hiermem.__file__, atlas.__file__, demo.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, site], cwd=elsewhere, check=True, stdout=subprocess.PIPE
    )
    for path in found.stdout.decode().split():
        assert Path(path).is_relative_to(site)
    assert (site / "bin" / "mlx_hiermem").exists()
