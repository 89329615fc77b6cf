"""The names of the atlas's clusters: those that ship are those that the command makes."""

from __future__ import annotations

import shutil

from apps.atlas.build import add_names
from apps.atlas.recipe import Recipe
from mlx_hiermem.bank.manifest import read_manifest, write_manifest
from mlx_hiermem.models import find_model
from mlx_hiermem.routing.names import NAMES, ClusterNames, unnamed


def test_the_names_that_ship_are_made_by_the_command_without_training(tmp_path):
    shipped = find_model("atlas")
    manifest = read_manifest(shipped / "memory")
    shutil.copytree(shipped, tmp_path / "atlas")
    names = ClusterNames.load(shipped / "memory")
    ClusterNames([["a"] * 16]).save(tmp_path / "atlas/memory")
    write_manifest(tmp_path / "atlas/memory")
    assert add_names(Recipe(), tmp_path / "atlas") == manifest.revision
    made = (tmp_path / "atlas/memory" / NAMES).read_bytes()
    assert made == names.to_bytes() == (shipped / "memory" / NAMES).read_bytes()
    assert read_manifest(tmp_path / "atlas/memory") == manifest


def test_every_cluster_of_the_atlas_has_telling_words():
    names = ClusterNames.load(find_model("atlas") / "memory")
    names.check(16, 2)
    for level in names.levels:
        assert not {name for i, name in enumerate(level) if name == unnamed(i)}
        assert len(set(level)) > 0.95 * len(level)
    assert "england" in " ".join(names.levels[0]) and "the" not in names.levels[0]
