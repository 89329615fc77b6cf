"""``mlx_hiermem doctor``: backend, speed, memory, disk, versions, and what would be faster how."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..backend import blas_facts, device_facts, idle_gpu, matmul_gflops
from ..models import find_model, shipped_models
from .disk_speed import read_speed

#: Distributions whose versions a report of a problem should name.
PACKAGES = ("mlx", "mlx-lm", "numpy", "safetensors", "sentencepiece", "huggingface-hub", "gradio")

#: What a fetch for the paper's 160M anchor reads: 18,063,360 numbers of two bytes.
FETCH = 2 * 18_063_360
#: Slower than flash of today, in bytes per second.
SLOW_DISK = 400e6
#: Memory that is free, in bytes, below which a model and its bank may be swapped out.
LITTLE_MEMORY = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="FOLDER",
        help="measure the disk of this folder, such as that of a model; 128 MiB are written to it "
        "and removed (default: the current folder)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    report = diagnose(args.folder)
    print(json.dumps(report, indent=2) if args.json else to_text(report))
    return 0


def diagnose(folder: Path = Path()) -> dict[str, Any]:
    """All facts, as JSON values. Memory is in bytes, speed in GFLOP/s of a float32 matmul.

    Keys: ``device`` (:func:`~mlx_hiermem.backend.device_facts` and its ``gflops``), ``blas``
    (:func:`~mlx_hiermem.backend.blas_facts`), ``disk`` (``folder``, ``free`` bytes,
    ``bytes_per_second`` or None), ``versions``, ``models`` (those in the package, name to bytes)
    and ``advice`` (what to mend, one line each; empty when all is well).

    Raises:
        InputError: the folder is not there, or cannot be written.
    """
    speed = read_speed(folder)  # first, since it may raise
    device, blas, models = device_facts(), blas_facts(), model_sizes()
    on_cpu = device["backend"] == "cpu"
    device["gflops"] = blas["gflops"] if on_cpu else round(matmul_gflops(4096), 1)
    if (free := free_memory()) is not None:
        device["memory"]["system_free"] = free
    disk = {
        "folder": str(folder.resolve()),
        "free": shutil.disk_usage(folder).free,
        "bytes_per_second": speed,
    }
    versions: dict[str, str | None] = {"mlx_hiermem": __version__}
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "device": device,
        "blas": blas,
        "disk": disk,
        "versions": versions,
        "models": models,
        "advice": [
            *_about_speed(device, blas), *_about_room(device, disk), *_about_parts(models)
        ],
    }  # fmt: skip


def free_memory() -> int | None:
    """Bytes that programs can still have; None where the system does not tell (macOS)."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# ---- advice ----------------------------------------------------------------------------


def _about_speed(device: dict[str, Any], blas: dict[str, Any]) -> list[str]:
    advice = []
    if idle_gpu():
        # mlx-cpu and mlx-cuda-13 install the same file, and pip lets mlx-cpu have the last word.
        advice.append(
            "an NVIDIA GPU is idle: `pip install 'mlx-hiermem[cuda]'`, then "
            f"`pip install --force-reinstall --no-deps mlx-cuda-13=={metadata.version('mlx')}`"
        )
    if device["backend"] != "cpu":
        return advice
    if blas["remedy"]:
        advice.append(f"matmul is slow ({blas['gflops']} GFLOP/s): {blas['remedy']}")
    if sys.platform == "darwin":
        advice.append(
            "MLX computes on the CPU of this Mac: it uses the GPU of Apple silicon, with a Python "
            "that is built for arm64 (`python -c 'import platform; print(platform.machine())'`)"
        )
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if threads.isdigit() and int(threads) < (os.cpu_count() or 1):
        advice.append(
            f"OPENBLAS_NUM_THREADS={threads} leaves processors idle; unset it, unless several "
            "processes share them"
        )
    return advice


def _about_room(device: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    advice = []
    speed, free = disk["bytes_per_second"], device["memory"].get("system_free")
    if speed is not None and speed < SLOW_DISK:
        advice.append(
            f"the disk of {disk['folder']} is slow ({speed / 1e6:.0f} MB/s): a fetch of "
            f"{FETCH / 1e6:.0f} MB takes {1000 * FETCH / speed:.0f} ms; keep banks on an internal "
            "disk, or quantise them (`bank quantize`)"
        )
    if free is not None and free < LITTLE_MEMORY:
        advice.append(
            f"only {free / 2**30:.1f} GiB of memory are free: close other programs, or bound what "
            "a bank keeps with --memory-budget"
        )
    return advice


def _about_parts(models: dict[str, int]) -> list[str]:
    advice = [
        f"{name} {have} is older than this package wants ({bound}): `pip install -U mlx-hiermem`"
        for name, have, bound in too_old()
    ]
    if not models:
        advice.append("no model in the package: `python -m apps.atlas build` in a checkout")
    return advice


def too_old() -> list[tuple[str, str, str]]:
    """(name, version, what is wanted) of packages that do not fit what this package asks for."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        texts = metadata.requires("mlx-hiermem") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        texts = []
    found = []
    for text in texts:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is not None and not wanted.specifier.contains(have, prereleases=True):
            found.append((wanted.name, have, str(wanted.specifier)))
    return found


# ---- what is told ----------------------------------------------------------------------


def model_sizes() -> dict[str, int]:
    """Models in the package (``load(name)`` finds them), with their size in bytes."""
    return {
        name: sum(file.stat().st_size for file in find_model(name).rglob("*") if file.is_file())
        for name in shipped_models()
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for people, one fact a line."""
    device, blas, disk = report["device"], report["blas"], report["disk"]
    lines = [
        ("backend", f"{device['backend']}, {device['device']} ({device['architecture']})"),
        ("matmul", f"{device['gflops']} GFLOP/s in float32"),
        ("BLAS", f"{blas['library']}, {blas['gflops']} GFLOP/s on the CPU"),
    ]
    lines += [
        (f"memory, {name.replace('_', ' ')}", f"{size / 2**30:.1f} GiB")
        for name, size in device["memory"].items()
    ]
    speed = disk["bytes_per_second"]
    told = "not measured" if speed is None else f"read at {speed / 1e6:,.0f} MB/s"
    lines.append(("disk", f"{told}, {disk['free'] / 2**30:.1f} GiB free ({disk['folder']})"))
    if speed is not None:
        lines.append(("a fetch of 36 MB", f"{1000 * FETCH / speed:.0f} ms from this disk"))
    lines += [(name, version or "not installed") for name, version in report["versions"].items()]
    lines += [(f"model {name}", f"{size / 1e6:.1f} MB") for name, size in report["models"].items()]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return "\n".join([text, *(f"! {line}" for line in report["advice"])])


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
