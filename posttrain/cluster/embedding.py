"""The features of a partition: computed by the network, or taken from a previous run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from posttrain.cluster import crash_bisection
from posttrain.cluster.crash_bisection import CrashingRow, quarantine_rows
from posttrain.cluster.devices import (
    BatchSize,
    computing_in,
    moved,
)
from posttrain.cluster.network import Network, for_inference
from posttrain.schema import (
    FILE,
    IMAGE,
    LABEL,
    ROW,
    SAMPLE_ID,
    ModelSpec,
    Precision,
)
from posttrain.store.features import (
    PreviousFeatures,
    Shard,
    ShardSummary,
    image_digests,
    write_shard,
)
from posttrain.store.folder import RunFolder
from posttrain.vision.embedding import layer_features
from posttrain.vision.images import decode_column, normalize

BATCH = 256
"""Images that go through the network at a time, where memory suffices."""


@dataclass(frozen=True)
class EmbeddingTask:
    """Which shard to write of a partition's block."""

    partition: int
    folder: RunFolder
    path: str
    """Of the shard, in the folder."""
    skip: np.ndarray
    """Rows that are not embedded: excluded ones."""
    previous: PreviousFeatures | None
    """Features of a previous run, taken where the image is the same."""
    partitions: int
    """How many the split has."""
    crashing: Sequence[CrashingRow] = ()
    """Rows to quarantine unseen."""


def write_partition(
    model: torch.nn.Module,
    network: Network,
    block: pa.Table,
    task: EmbeddingTask,
    device: torch.device,
    batch: BatchSize,
) -> ShardSummary:
    """Writes the shard of a partition, with the features that a previous run has and those that the model gives."""
    skip = np.union1d(task.skip, [found.row for found in task.crashing]).astype(np.int32)
    reused = reused_rows(block, skip, network.spec.layers, task.previous)
    if reused is not None:
        skip = np.union1d(skip, reused.rows)
    embedded, unreadable = embed_block(
        model, network.spec, block, skip, device, precision=network.precision, batch=batch
    )
    quarantined = sorted([*unreadable, *quarantine_rows(block, task.crashing)], key=lambda row: int(str(row[ROW])))
    shard, count = merged(embedded, reused, block), len(embedded.rows)
    write_shard(task.folder, task.path, shard, quarantined, embedded=count, partitions=task.partitions)
    return ShardSummary(task.partition, len(shard.rows), quarantined, count)


def crashing_rows(network: Network, block: pa.Table, skip: np.ndarray, device: torch.device) -> list[CrashingRow]:
    """The rows of a partition but `skip` whose images crash the process that embeds them."""
    return crash_bisection.crashing_rows(
        lambda some: functools.partial(_embed_in_child, network, block.take(pa.array(some)), device),
        np.setdiff1d(np.arange(block.num_rows), skip).astype(np.int32),
        what="decoded and embedded",
        preload=[__name__],
    )


def _embed_in_child(network: Network, block: pa.Table, device: torch.device) -> None:
    torch.set_num_threads(1)
    model = for_inference(network, device)
    embed_block(model, network.spec, block, np.empty(0, np.int32), device, precision=network.precision)


def embed_block(
    model: torch.nn.Module,
    spec: ModelSpec,
    block: pa.Table,
    skip: np.ndarray,
    device: torch.device,
    *,
    precision: Precision = "float32",
    batch: BatchSize | None = None,
) -> tuple[Shard, list[dict[str, object]]]:
    """Features of a partition's rows but `skip`, and what could not be read, with the reason.

    `batch` is how many images go through the network at a time; it is halved where memory does not suffice.
    """
    batch = batch or BatchSize(BATCH)
    rows = np.setdiff1d(np.arange(block.num_rows), skip)
    block = block.take(pa.array(rows))
    image = spec.image
    pixels, readable, reasons = decode_column(
        block[IMAGE], channels=image.channels, size=image.size, shape=image.shape, background=image.background
    )
    labels = block[LABEL].to_numpy()
    why = dict(zip(np.flatnonzero(~readable).tolist(), reasons, strict=True))
    why |= {int(at): "no label" for at in np.flatnonzero(readable & (labels < 0))}
    parts: dict[str, list[Tensor]] = {layer: [] for layer in spec.layers}
    # a partition without a readable image: one black image gives the widths
    images = pixels if len(pixels) else pixels.new_zeros(1, image.channels, *image.size)

    def features_of(start: int, size: int) -> dict[str, Tensor]:
        inputs = normalize(moved(images[start : start + size], device), image.mean, image.std)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        found = layer_features(model, spec.layers, spec.head, inputs, width=spec.width)
        return {layer: features.cpu().half() for layer, features in found.items()}

    done = 0
    with torch.inference_mode(), computing_in(precision, device):
        while done < len(images):
            found = batch.run(functools.partial(features_of, done))
            done += len(found[spec.head])
            for layer, features in found.items():
                parts[layer].append(features[: len(pixels)])
    halves = {layer: torch.cat(found) for layer, found in parts.items()}
    finite = torch.stack([torch.isfinite(matrix).all(dim=1) for matrix in halves.values()]).all(dim=0).numpy()
    where_readable = np.flatnonzero(readable)
    for at in where_readable[~finite]:
        why.setdefault(int(at), "features are not finite in float16 (an extreme image, or weights that overflow)")
    good = np.array([at not in why for at in range(len(rows))], bool)
    ids = _as_array(block[SAMPLE_ID])
    files = block[FILE]
    quarantined: list[dict[str, object]] = [
        {ROW: int(rows[at]), SAMPLE_ID: ids[at].as_py(), FILE: files[at].as_py(), "reason": reason}
        for at, reason in sorted(why.items())
    ]
    kept = {layer: matrix.numpy()[good[where_readable]] for layer, matrix in halves.items()}
    return Shard(rows[good], ids.filter(pa.array(good)), labels[good], kept), quarantined


def reused_rows(
    block: pa.Table, skip: np.ndarray, layers: Sequence[str], previous: PreviousFeatures | None
) -> Shard | None:
    """The rows but `skip` that a previous run embedded from the same image, with their present labels."""
    if previous is None:
        return None
    labels = block[LABEL].to_numpy()
    # a row that has lost its label is quarantined
    rows = np.setdiff1d(np.flatnonzero(labels >= 0), skip)
    wanted = block.take(pa.array(rows))
    digests = image_digests(wanted[IMAGE])
    ids = _as_array(wanted[SAMPLE_ID])
    at, features = previous.of(ids, digests, layers)
    return Shard(rows[at], ids.take(pa.array(at)), labels[rows[at]], features, digests[at])


def merged(embedded: Shard, reused: Shard | None, block: pa.Table) -> Shard:
    """Both parts of a partition as one shard in the order of the rows, with the digests of the images."""
    embedded = replace(embedded, digests=image_digests(block[IMAGE].take(pa.array(embedded.rows))))
    if reused is None or not len(reused.rows):
        return embedded
    rows = np.concatenate([embedded.rows, reused.rows])
    order = np.argsort(rows, kind="stable")
    assert embedded.digests is not None and reused.digests is not None
    features = {
        layer: np.concatenate([matrix, reused.features[layer]])[order] for layer, matrix in embedded.features.items()
    }
    return Shard(
        rows[order],
        pa.concat_arrays([embedded.sample_ids, reused.sample_ids]).take(pa.array(order)),
        np.concatenate([embedded.labels, reused.labels])[order],
        features,
        np.concatenate([embedded.digests, reused.digests])[order],
    )


def _as_array(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    return whole
