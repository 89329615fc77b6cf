"""One script per claim: ``python -m benchmarks.NAME [--smoke] [--json FILE]``.

What is measured is a ratio of things done side by side in one run; see ``harness.py``.
"""

from mlx_hiermem.backend import preload_blas

# Before any script imports MLX, which would bind it to the BLAS of its own wheel.
preload_blas()
