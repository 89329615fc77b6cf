"""Saves state dicts as folders of ``torch.distributed.checkpoint``, from real processes.

FSDP (``fully_shard``) gives each of n processes a piece of every parameter along its first axis, as
a DTensor, and DCP writes one file per process and the ``.metadata``. Here the same is done with
tensors that are there already: gloo on this machine's loopback, the processes meet over a file.

Run as a script it is one of the processes; :func:`save_dcp` starts them. All folders of one call
share the start of the processes, which takes most of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: After so many seconds a process is given up.
_LONGEST = 120


@dataclass(frozen=True)
class Job:
    """One folder to save.

    Attributes:
        folder: where; is made.
        state: name -> tensor, or a plain value (such as ``epoch``), or a mapping of these.
        axis: along which tensors are cut among the processes (the last one, of a tensor of fewer).
        whole: names of tensors that every process holds whole, as FSDP does with buffers.
    """

    folder: Path
    state: Mapping[str, Any]
    axis: int = 0
    whole: Sequence[str] = ()


def save_dcp(jobs: Sequence[Job], processes: int = 2) -> None:
    """Save each job's state from so many processes.

    Raises:
        RuntimeError: a process failed; the text is what it wrote.
    """
    import torch

    with tempfile.TemporaryDirectory() as place:
        torch.save(
            [(str(job.folder), dict(job.state), job.axis, list(job.whole)) for job in jobs],
            Path(place) / "jobs.pt",
        )
        running = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(processes), place],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": _loopback(), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]
        try:
            for process in running:
                _, said = process.communicate(timeout=_LONGEST)
                if process.returncode:
                    raise RuntimeError(f"saving a DCP folder failed: {said}")
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.communicate()


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _process(rank: int, processes: int, place: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meeting = f"file://{place / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))

    def cut(state: Mapping[str, Any], axis: int, whole: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in state.items():
            if isinstance(value, Mapping):
                value = cut(value, axis, whole)
            elif isinstance(value, torch.Tensor) and value.ndim and name not in whole:
                value = distribute_tensor(value, mesh, [Shard(min(axis, value.ndim - 1))])
            found[name] = value
        return found

    # Written a moment ago by the process that started this one.
    for folder, state, axis, whole in torch.load(place / "jobs.pt", weights_only=True):
        dcp.save(cut(state, axis, whole), checkpoint_id=folder)
    dist.barrier()
    # All is saved. Taking gloo down ends now and then in "terminate called without an active
    # exception" (torch 2.13, a busy machine): it is left to the system.
    os._exit(0)


if __name__ == "__main__":
    _process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
