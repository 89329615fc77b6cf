"""Open each file that is named on the command line, in a process of its own: python -m ... FILES.

Prints a JSON object {file: what came of it}, and at the end which modules it must not import it
did. Memory is limited where the system can, so that a bomb ends this process and no other.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import HierMemError

_MEMORY = 4 << 30


def main() -> None:
    """Open all."""
    if sys.platform == "linux":  # macOS has no limit of this kind
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    results = {}
    for name in sys.argv[1:]:
        try:
            with open_source(Path(name)) as source:
                results[name] = ["opened", ", ".join(source.tensors)]
        except HierMemError as error:
            results[name] = [type(error).__name__, str(error)]
        except BaseException as error:
            results[name] = ["fault", repr(error)[:500]]
    results["imported"] = ["", ", ".join(name for name in ("torch",) if name in sys.modules)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
