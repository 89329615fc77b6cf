"""Banks of more files than the system lets a process have open, until it asks for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Opens a bank where so many files may be open, and so many if asked for ("-": as it is); says how
#: many may be open then, or why it cannot be opened.
OPENS = """
import resource, sys
from pathlib import Path
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.errors import FormatError

soft, hard = int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard if sys.argv[3] == "-" else int(sys.argv[3])))
try:
    reader = BlockReader(Path(sys.argv[1]))
except FormatError as error:
    sys.exit(str(error))
reader.block(2, 0)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def opens(folder: Path, soft: int, hard: str = "-") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", OPENS, str(folder), str(soft), hard],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_more_files_than_the_system_allows_at_first(tmp_path, make):
    """One file for each of 150 subtrees; some are left for others, so 200 are too few as well."""
    bank = make.bank(tmp_path / "memory", make.config((1, 1), branching=150, layers=1))
    assert len(list(bank.folder.glob("level-*"))) == 151
    for soft in (64, 200):
        done = opens(bank.folder, soft)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 151 + 100
    done = opens(bank.folder, 64, "64")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot be read (Too many open files); allow more open files: ulimit -n" in done.stderr


def test_a_bank_of_few_files_asks_for_nothing(bank):
    done = opens(bank.folder, 256)
    assert (done.returncode, done.stdout) == (0, "256\n"), done.stderr
