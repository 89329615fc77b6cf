"""What is built on the package; installed as ``mlx_hiermem.apps``."""
