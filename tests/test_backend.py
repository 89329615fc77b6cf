"""What the backend module changes in the process."""

import resource
import subprocess
import sys

from mlx_hiermem import backend

CODE = """
import ctypes, os, sys
from mlx_hiermem.backend import keep_freed_memory
taken = keep_freed_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
block = libc.malloc(64 << 20)
ctypes.memset(block, 1, 64 << 20)
libc.free(block)
pages = int(open("/proc/self/statm").read().split()[1])
print(taken, pages * os.sysconf("SC_PAGE_SIZE") > (48 << 20))
"""


def run(choice):
    done = subprocess.run(
        [sys.executable, "-c", CODE, choice], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_freed_memory_stays_in_the_process_on_glibc():
    if sys.platform != "linux":
        from mlx_hiermem.backend import keep_freed_memory

        assert keep_freed_memory() is False
        return
    assert run("plain") == ["None", "False"]
    assert run("keep") == ["True", "True"]


def test_openblas_is_left_alone_where_it_may_wait_forever(monkeypatch):
    """Older ones do so for memory that a limit (``ulimit -v``) keeps from them."""
    if sys.platform != "linux":
        return
    loaded = []
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name, mode: loaded.append(name))
    monkeypatch.setattr(backend.os, "cpu_count", lambda: 8)
    for limit, found in (((5 << 30) - 1, False), (resource.RLIM_INFINITY, True), (6 << 30, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert backend.preload_blas() is found
        assert bool(loaded) is found
