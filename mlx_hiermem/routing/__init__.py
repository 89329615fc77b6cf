"""Routing: text -> unit vector (encoder) -> cluster path (tree); and how a tree is grown.

Light to import: only numpy and safetensors. The BERT encoder brings in MLX and a tokenizer when
it is loaded.
"""

from .encoder import Encoder
from .loading import load_encoder
from .tree import ClusterPath, ClusterTree

__all__ = ["ClusterPath", "ClusterTree", "Encoder", "load_encoder"]
