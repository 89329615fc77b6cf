"""Cluster trees that were grown elsewhere: centroids of k-means in files, as a ClusterTree."""

from .read import read_tree

__all__ = ["read_tree"]
