"""The live samples of one split in the feature store, partition by partition."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pyarrow as pa
import torch
from torch import Tensor

from posttrain.cluster.shared import new_key
from posttrain.influence.probe import Standardizer
from posttrain.live import Live
from posttrain.store.features import (
    Shard,
    read_shard,
)
from posttrain.store.folder import RunFolder


@dataclass(frozen=True)
class View:
    """The live samples of one split in a feature store."""

    folder: RunFolder
    backbone: str
    split: str
    partitions: tuple[int, ...]
    live: Live
    layers: tuple[str, ...]
    """Whose features lie side by side."""
    standardizers: tuple[Standardizer, ...] | None
    """Of each layer, whose features a 1 then follows; None: raw features, without the 1."""
    key: str = field(default_factory=new_key)
    """Under which actors cache its features."""


def read_live(view: View, partition: int) -> Shard:
    """The live rows of a partition with their present labels, features as stored (float16)."""
    shard = read_shard(view.folder, view.folder.features(view.backbone, view.split, partition), view.layers)
    labels = view.live.labels(partition, shard.rows, shard.labels)
    live = view.live.mask(partition, shard.rows)
    if live.all():
        return replace(shard, labels=labels)
    features = {layer: matrix[live] for layer, matrix in shard.features.items()}
    return Shard(shard.rows[live], shard.sample_ids.filter(pa.array(live)), labels[live], features)


def side_by_side(shard: Shard, view: View) -> Tensor:
    """The features of the view's layers in one matrix, float32."""
    raw = [torch.from_numpy(shard.features[layer].copy()) for layer in view.layers]
    if view.standardizers is None:
        return torch.cat([features.float() for features in raw], dim=1)
    return torch.cat([s(features) for s, features in zip(view.standardizers, raw, strict=True)], dim=1)
