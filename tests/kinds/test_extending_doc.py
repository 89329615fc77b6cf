"""The sixth kind of docs/extending.md: its diff applies, and it passes what every kind has to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_diff_of_the_document_makes_a_kind(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    for folder in ("mlx_hiermem", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    where = "import mlx_hiermem.config as c; print(c.__file__, c.KINDS)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in found.stdout and "'adapter'" in found.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "adapter"]
    ran = subprocess.run(
        [*command, "tests/kinds/test_every_kind.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 30
