"""What every test runs with: the fast BLAS, no network, and no time limit per example."""

from __future__ import annotations

import os

from hypothesis import settings

from mlx_hiermem.backend import preload_blas

# Before any test module imports MLX.
preload_blas()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

# A machine that is busy with something else must not fail a property.
settings.register_profile("mlx_hiermem", deadline=None)
settings.load_profile("mlx_hiermem")
