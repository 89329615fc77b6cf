"""The figures in docs/distributed.md are those that the program beside them prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_arithmetic_is_what_its_program_prints():
    pairs = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
    assert pairs
    for program, printed in pairs:
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert found.stdout == printed, found.stderr
