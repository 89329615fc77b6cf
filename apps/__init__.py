"""Applications built on the public API of mlx_hiermem. Not part of the installed package."""
