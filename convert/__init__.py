"""PyTorch <-> MLX: anchors and memory banks that were trained in PyTorch, and the way back.

torch is imported in here and in tests only.
"""
