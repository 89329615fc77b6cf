"""What MLX computes with on this machine, and a fast BLAS for its CPU backend.

MLX's Linux wheel brings the reference BLAS, whose float32 matmul is some fifty times slower than
OpenBLAS. A library that is already loaded with global symbols takes precedence when
``mlx.core`` is loaded, so :func:`preload_blas` has to run before that, and can do nothing after.
MLX is imported inside the functions that report on it, never by this module.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

#: Sonames of OpenBLAS, the threaded build first (the second is threaded on Debian and Ubuntu).
OPENBLAS = ("libopenblasp.so.0", "libopenblas.so.0")

#: The reference BLAS stays below 10 GFLOP/s on any processor of today, an optimised one well above.
SLOW_GFLOPS = 20.0

REMEDY = (
    "install OpenBLAS: `apt install libopenblas0-pthread` (Debian, Ubuntu) or "
    "`dnf install openblas-threads` (Fedora); mlx_hiermem finds it by itself"
)


def preload_blas() -> bool:
    """Let MLX's CPU backend use the system's OpenBLAS, where there is one (Linux only).

    Returns:
        Whether OpenBLAS was loaded. False, silently, on other systems, without OpenBLAS, or
        when ``mlx.core`` is imported already and so bound to its own BLAS.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or not _has_room_for_openblas():
        return False
    for name in OPENBLAS:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _has_room_for_openblas() -> bool:
    """Whether the address space of this process is not limited to little (``ulimit -v``).

    OpenBLAS before 0.3.30 waits forever for the 128 MiB of each thread if it cannot have them.
    """
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = (4 << 30) + (os.cpu_count() or 1) * (128 << 20)
    return limit == resource.RLIM_INFINITY or limit >= needed


def keep_freed_memory() -> bool:
    """Let the C allocator keep freed memory instead of giving it back to the system (glibc only).

    MLX's CPU backend allocates every result anew. Beyond 128 KiB glibc maps fresh pages each time,
    and clearing them takes longer than many an operation: an addition on 50 MB is ten times faster
    without. The price is that the process stays as large as it once was, so this is for training.

    Returns:
        Whether the allocator took the settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20))
    return all(mallopt(*setting) for setting in settings)


def backend_name() -> str:
    """``"metal"``, ``"cuda"`` or ``"cpu"``: what MLX's default device is."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_facts() -> dict[str, Any]:
    """The default device: ``backend``, ``device``, ``architecture``, and memory in bytes.

    ``memory`` holds what the backend and the system tell; keys that they do not know are absent.
    """
    import mlx.core as mx

    info = mx.device_info() if hasattr(mx, "device_info") else {}
    backend = backend_name()
    memory = {"system": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    for name, key in {
        "device": "memory_size" if backend == "metal" else "total_memory",
        "device_free": "free_memory",
        "recommended_working_set": "max_recommended_working_set_size",
        "longest_buffer": "max_buffer_length",
    }.items():
        if key in info:
            memory[name] = int(info[key])
    memory["mlx_limit"] = mx.get_memory_limit()
    return {
        "backend": backend,
        "device": str(info.get("device_name", "unknown")),
        "architecture": str(info.get("architecture", "unknown")),
        "memory": memory,
    }


def idle_gpu() -> bool:
    """Whether an NVIDIA GPU is here that MLX's default device does not use."""
    return backend_name() == "cpu" and Path("/proc/driver/nvidia/version").exists()


def matmul_gflops(size: int = 1024, seconds: float = 0.5, *, cpu: bool = False) -> float:
    """Speed of a float32 ``(size, size) @ (size, size)``, in GFLOP/s: the best of several.

    Args:
        size: rows and columns of both matrices.
        seconds: about how long to measure; at least two products are timed.
        cpu: measure the CPU backend even where the default device is a GPU.
    """
    import mlx.core as mx

    stream = mx.cpu if cpu else mx.default_device()
    left = mx.random.normal((size, size), stream=stream)
    right = mx.random.normal((size, size), stream=stream)
    # The first product also starts threads or compiles a kernel.
    mx.eval(mx.matmul(left, right, stream=stream))
    best, runs, start = float("inf"), 0, time.perf_counter()
    while runs < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        mx.eval(mx.matmul(left, right, stream=stream))
        best, runs = min(best, time.perf_counter() - before), runs + 1
    return 2 * size**3 / best / 1e9


def blas_facts() -> dict[str, Any]:
    """The CPU backend's BLAS: ``library``, measured ``gflops``, and ``remedy`` (None when fast)."""
    gflops = matmul_gflops(cpu=True)
    # dlsym over the global symbols: true after preload_blas and after LD_PRELOAD alike.
    if sys.platform == "darwin":
        library = "Accelerate"
    elif hasattr(ctypes.CDLL(None), "openblas_get_config"):
        library = "OpenBLAS"
    else:
        library = "of the MLX wheel" if gflops < SLOW_GFLOPS else "other"
    return {
        "library": library,
        "gflops": round(gflops, 1),
        "remedy": REMEDY if library == "of the MLX wheel" else None,
    }
