"""Reading a bank changes nothing, waits for nobody, and holds little: other processes, read-only
disks, and files that claim gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.bank.checksums import write_checksums
from mlx_hiermem.bank.header import build_header
from mlx_hiermem.bank.layout import expected_files, shards
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError
from tests.bank.mutations import reseal, state
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]

READS = """
import sys
from pathlib import Path
import numpy as np
import mlx_hiermem
from mlx_hiermem import cli
from mlx_hiermem.bank.store import MemoryBank

folder = Path(sys.argv[1])

def read():
    for options in ({}, {"check_blocks": True, "memory_budget": 10**6}):
        with MemoryBank.open(folder / "memory", **options) as bank:
            for leaf in range(9):
                bank.prefetch((leaf // 3, leaf)).wait()
                bank.fetch((leaf // 3, leaf)).release()
            bank.fetch_many([(0, 0), (1, 3)])
            bank.generic()
            bank.verify()
            bank.inspect()
    for command in (["verify"], ["inspect"], ["inspect", "--text", sys.argv[2], "--tree"]):
        assert cli.main(["bank", *command, "--model", str(folder)]) == 0
    for memory in ("fetched", "generic"):
        generate = ["generate", "--model", str(folder), "--prompt", "gold", "--max-tokens", "2"]
        assert cli.main([*generate, "--memory", memory]) == 0
"""

WATCHED = """
import os
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LOOKS = ("os.listdir", "os.scandir", "os.walk", "os.getxattr", "os.listxattr", "os.fwalk")
seen, opened = [], 0

def watch(event, arguments):
    global opened
    names = [os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes, os.PathLike))]
    if not any(str(folder) in name for name in names):
        return
    if event == "open":
        opened += 1
        if arguments[2] & WRITES:
            seen.append(event)
    elif event.startswith(("os.", "shutil.", "tempfile.")) and event not in LOOKS:
        seen.append(event)

read()  # imports all there is
if sys.argv[3] == "nobody":
    os.seteuid(65534)
sys.addaudithook(watch)
read()
assert not seen, seen
assert opened > 20, opened
# It is read-only, and the hook sees what it should.
for attempt in (
    lambda: (folder / "memory" / "new").write_text("x"),
    lambda: os.rename(folder / "memory" / "config.json", folder / "memory" / "other"),
    lambda: os.remove(folder / "memory" / "config.json"),
):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("the folder can be written")
assert seen == ["open", "os.rename", "os.remove"], seen
"""


def _python(*arguments, prefix=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _mounts():
    """Whether we may mount in a namespace of our own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mount --bind /tmp /tmp && umount /tmp"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def home():
    """A folder that other users may enter, which those of pytest are not."""
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    yield home
    for path in (home, *(path for path in home.rglob("*") if path.is_dir())):
        path.chmod(0o755)
    shutil.rmtree(home)


def test_a_bank_on_a_disk_that_is_read_only(home):
    folder = make_tiny_model(home / "tiny")
    (home / "texts.txt").write_text("gold is\n\niron is\n")
    prefix, user = [], "same"
    if _mounts():
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        prefix = ["unshare", "-m", "sh", "-c", mount, str(folder)]
    else:
        # Root may write everywhere, so it becomes an ordinary user once all is imported.
        user = "nobody" if os.geteuid() == 0 else "same"
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(folder)
    _python(READS + WATCHED, folder, home / "texts.txt", user, prefix=prefix)
    assert state(folder) == before


READS_ALL = """
import hashlib, sys
import numpy as np
from mlx_hiermem.bank.store import MemoryBank

with MemoryBank.open(sys.argv[1], tiers=sys.argv[2]) as bank:
    print("open", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        digest = hashlib.sha256()
        for leaf in range(4):
            memory = bank.fetch((leaf // 2, leaf))
            digest.update(np.array(memory.joined.view(__import__("mlx.core").core.uint16)))
            memory.release()
        print(digest.hexdigest())
"""


def test_two_processes_read_one_bank(bank):
    command = [sys.executable, "-c", READS_ALL, str(bank.folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    readers = [
        subprocess.Popen([*command, tiers], env=environment, **pipes)
        for tiers in ("disk", "cached")
    ]
    for reader in readers:
        assert reader.stdout.readline() == "open\n"
    for reader in readers:  # both have it open; now both read
        reader.stdin.write("\n")
        reader.stdin.flush()
    seen = {line for reader in readers for line in reader.communicate(timeout=120)[0].split()}
    assert [reader.returncode for reader in readers] == [0, 0]
    with MemoryBank.open(bank.folder) as opened:
        blocks = [opened.fetch((leaf // 2, leaf)).joined for leaf in range(4)]
        digest = hashlib.sha256(b"".join(bytes(np.array(one.view(mx.uint16))) for one in blocks))
    assert seen == {digest.hexdigest()}


def test_files_that_cannot_be_read_any_more_are_opened_again(bank):
    """The disk went away and is back: no request is lost, whichever file it needs."""
    reader = BlockReader(bank.folder)
    before = [reader.stored(2, leaf).tobytes() for leaf in range(4)]
    dead = os.open(bank.folder, os.O_RDONLY)  # which cannot be read, like files of such a disk
    for fd in reader.descriptors:
        os.dup2(dead, fd)
    os.close(dead)
    away = bank.folder.with_name("away")
    bank.folder.rename(away)
    for told in ("cannot be read .Is a directory", "and the bank is not there any more"):
        with pytest.raises(FormatError, match=told):
            reader.stored(2, 0)
    away.rename(bank.folder)
    assert [reader.stored(2, leaf).tobytes() for leaf in range(4)] == before
    reader.close()


FETCHES_ONE = """
import re, sys
from pathlib import Path
from mlx_hiermem.bank.store import MemoryBank
import mlx.core as mx
mx.eval(mx.zeros(3))

def peak():
    if sys.platform != "linux":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

before = peak()
with MemoryBank.open(sys.argv[1], tiers="disk", check_blocks=True) as bank:
    assert bank.bytes_on_disk > 9.5e9
    memory = bank.fetch((99, 9999))
    assert memory.report.bytes_read > 1.9e6 and not mx.any(memory.joined).item()
    bank.inspect()
print(peak() - before)
"""


def test_a_bank_that_claims_ten_gigabytes_takes_little_memory(tmp_path, make):
    config = make.config((10, 10), 100, hidden=2048, layers=8)
    folder = tmp_path / "memory"
    folder.mkdir()
    files = {"config.json": json.dumps(config.to_dict()).encode()}
    sizes = {name: len(data) for name, data in files.items()}
    plan = [shard for level in (1, 2) for shard in shards(config, level)]
    for shard in plan:
        shape = (shard.rows, config.stored_size(shard.level))
        files[shard.name] = build_header("blocks", "bfloat16", shape, shard.metadata)
        sizes[shard.name] = len(files[shard.name]) + 2 * shape[0] * shape[1]
    size = config.fetch_size()
    files["generic.safetensors"] = build_header("generic", "bfloat16", (size,), {"format": "mlx"})
    sizes["generic.safetensors"] = len(files["generic.safetensors"]) + 2 * size
    assert set(files) == set(expected_files(config))
    for name, data in files.items():
        (folder / name).write_bytes(data)
        os.truncate(folder / name, sizes[name])  # the rest is a hole that reads as zeros
    zeros = hashlib.sha256(bytes(config.block_bytes(1))).digest()
    digests = {"level1": zeros * 100, "level2": zeros * 10_000, "generic": zeros * 2}
    entry = write_checksums(folder, digests)
    table = {name: {"bytes": sizes[name], "sha256": "0" * 64} for name in sizes}
    table["config.json"]["sha256"] = hashlib.sha256(files["config.json"]).hexdigest()
    table["checksums.safetensors"] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (folder / "manifest.json").write_text(
        json.dumps({"format_version": 1, "revision": "", "files": table})
    )
    reseal(folder, [])
    # One fetched memory is 2 MB, and the checksums are 0.3 MB.
    assert int(_python(FETCHES_ONE, folder)) < 50 * 2**20
