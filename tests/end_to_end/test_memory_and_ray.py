"""The rounds in memory and a run on Ray are the same method: same scores, same removed samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import rounds

from posttrain.cluster.devices import torch_threads
from posttrain.config import Probe, Removal
from posttrain.in_memory import ValidationSet, clean_in_memory
from posttrain.influence.in_memory import InMemory
from posttrain.store.features import read_shard
from posttrain.store.folder import RunFolder

pytestmark = pytest.mark.ray


def stored(folder: RunFolder, split: str, layers: tuple[str, ...]) -> InMemory:
    """A split's samples from a run's feature store, in the run's own blocks."""
    [backbone] = Path(folder.path("features")).iterdir()
    count = len(list((backbone / split).glob("*.parquet")))
    shards = [read_shard(folder, folder.features(backbone.name, split, at), layers) for at in range(count)]
    features = {
        layer: torch.from_numpy(np.concatenate([shard.features[layer] for shard in shards])) for layer in layers
    }
    labels = np.concatenate([shard.labels for shard in shards]).astype(np.int64)
    ids = np.concatenate([shard.sample_ids.to_numpy(zero_copy_only=False) for shard in shards])
    return InMemory(features, torch.from_numpy(labels), ids, blocks=[len(shard.rows) for shard in shards])


def test_memory_and_ray_remove_the_same_samples_in_the_same_rounds(undisturbed: Any) -> None:
    path = undisturbed()["run"]
    folder = RunFolder(path)
    tried = folder.read_json(folder.round(0, "probes.json"))["tried"]
    layers = tuple(dict.fromkeys(layer for layer, *_ in tried))
    samples, validation = (stored(folder, split, layers) for split in ("train", "validation"))
    with torch_threads(1):
        found = clean_in_memory(
            samples, ValidationSet(validation), classes=10, probe=Probe(), removal=Removal(max_rounds=3), seed=0
        )
    assert [done.removed for done in found.history] == [done["removed"] for done in rounds(path)]
    assert samples.ids is not None
    for number in range(1, len(found.history)):
        removed = folder.read_table(folder.round(number, "removed.parquet")).to_pandas().set_index("sample_id")
        own = found.removed_in == number
        assert set(removed.index) == set(samples.ids[own])
        odds = removed["mislabel_odds"].loc[samples.ids[own]].to_numpy()
        # products over blocks that lie elsewhere in memory may differ in the last bit
        np.testing.assert_allclose(found.columns["mislabel_odds"][own], odds, rtol=1e-5, atol=1e-5)
