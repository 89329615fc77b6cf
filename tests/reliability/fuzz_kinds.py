"""What can be fuzzed, by name; each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.reliability.fuzz_process import Target

_PLACES = {
    "models": "fuzz_models.Models",
    "trees": "fuzz_trees.Trees",
    "banks": "fuzz_banks.Banks",
    "corpora": "fuzz_corpora.Corpora",
    "documents": "fuzz_documents.Documents",
    "key maps": "fuzz_keys.KeyMaps",
    "HTTP bodies": "fuzz_http.Bodies",
    "HTTP bytes": "fuzz_http.Connections",
    "PyTorch files": "fuzz_torch.Checkpoints",
}


def _maker(place: str) -> Callable[[Path, Path], Target]:
    def make(folder: Path, canary: Path) -> Target:
        module, name = place.split(".")
        return getattr(import_module(f"tests.reliability.{module}"), name)(folder, canary)

    return make


#: Name -> what makes the target in a folder, with a canary.
KINDS = {name: _maker(place) for name, place in _PLACES.items()}
#: For the test of the processes.
TESTS = {"ending": _maker("fuzz_ending.Ending")}
