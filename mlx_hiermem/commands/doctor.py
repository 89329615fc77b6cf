"""``mlx_hiermem doctor``: the backend, its speed, the versions, and what to mend."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any

from .. import __version__
from ..backend import blas_facts, device_facts, idle_gpu, matmul_gflops
from ..models import find_model, shipped_models

#: Distributions whose versions a report of a problem should name.
PACKAGES = ("mlx", "mlx-lm", "numpy", "safetensors", "sentencepiece", "huggingface-hub", "gradio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = diagnose()
    print(json.dumps(report, indent=2) if args.json else to_text(report))
    return 0


def diagnose() -> dict[str, Any]:
    """All facts, as JSON values. Memory is in bytes, speed in GFLOP/s of a float32 matmul.

    Keys: ``device`` (:func:`~mlx_hiermem.backend.device_facts` and its ``gflops``), ``blas``
    (:func:`~mlx_hiermem.backend.blas_facts`), ``versions``, ``models`` (those in the package, name
    to bytes) and ``advice`` (what to mend, one line each; empty when all is well).
    """
    device, blas, models = device_facts(), blas_facts(), model_sizes()
    on_cpu = device["backend"] == "cpu"
    device["gflops"] = blas["gflops"] if on_cpu else round(matmul_gflops(4096), 1)
    advice = []
    if idle_gpu():
        # mlx-cpu and mlx-cuda-13 install the same file, and pip lets mlx-cpu have the last word.
        advice.append(
            "an NVIDIA GPU is idle: `pip install 'mlx-hiermem[cuda]'`, then "
            f"`pip install --force-reinstall --no-deps mlx-cuda-13=={metadata.version('mlx')}`"
        )
    if on_cpu and blas["remedy"]:
        advice.append(f"matmul is slow ({blas['gflops']} GFLOP/s): {blas['remedy']}")
    if not models:
        advice.append("no model in the package: `python -m apps.atlas build` in a checkout")
    versions = {"mlx_hiermem": __version__, "python": platform.python_version()}
    versions["platform"] = platform.platform()
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "device": device,
        "blas": blas,
        "versions": versions,
        "models": models,
        "advice": advice,
    }


def model_sizes() -> dict[str, int]:
    """Models in the package (``load(name)`` finds them), with their size in bytes."""
    return {
        name: sum(file.stat().st_size for file in find_model(name).rglob("*") if file.is_file())
        for name in shipped_models()
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for people, one fact a line."""
    device, blas = report["device"], report["blas"]
    lines = [
        ("backend", f"{device['backend']}, {device['device']} ({device['architecture']})"),
        ("matmul", f"{device['gflops']} GFLOP/s in float32"),
        ("BLAS", f"{blas['library']}, {blas['gflops']} GFLOP/s on the CPU"),
    ]
    lines += [
        (f"memory, {name.replace('_', ' ')}", f"{size / 2**30:.1f} GiB")
        for name, size in device["memory"].items()
    ]
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
