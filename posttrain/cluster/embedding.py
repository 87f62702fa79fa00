"""The features of a partition: computed by the network, or taken from a previous run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

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
    image_digests,
)
from posttrain.vision.embedding import layer_features
from posttrain.vision.images import decode_column, normalize

EMBEDDING_BATCH = 256


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
    batch = batch or BatchSize(EMBEDDING_BATCH)
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

    def embedded(start: int, size: int) -> dict[str, Tensor]:
        inputs = normalize(moved(images[start : start + size], device), image.mean, image.std)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        found = layer_features(model, spec.layers, spec.head, inputs, width=spec.width)
        return {layer: features.cpu().half() for layer, features in found.items()}

    done = 0
    with torch.inference_mode(), computing_in(precision, device):
        while done < len(images):
            found = batch.run(functools.partial(embedded, done))
            done += len(found[spec.head])
            for layer, features in found.items():
                parts[layer].append(features[: len(pixels)])
    halves = {layer: torch.cat(found) for layer, found in parts.items()}
    finite = torch.stack([torch.isfinite(matrix).all(dim=1) for matrix in halves.values()]).all(dim=0).numpy()
    where_readable = np.flatnonzero(readable)
    for at in where_readable[~finite]:
        why.setdefault(int(at), "features are not finite in float16 (an extreme image, or weights that overflow)")
    good = np.array([at not in why for at in range(len(rows))], bool)
    ids = block[SAMPLE_ID].combine_chunks()
    files = block[FILE]
    quarantined: list[dict[str, object]] = [
        {ROW: int(rows[at]), SAMPLE_ID: ids[at].as_py(), FILE: files[at].as_py(), "reason": reason}
        for at, reason in sorted(why.items())
    ]
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], ids.type)
    kept = {layer: matrix.numpy()[good[where_readable]] for layer, matrix in halves.items()}
    return Shard(rows[good], ids.filter(pa.array(good)), labels[good], kept), quarantined


def embed_alone(network: Network, block: pa.Table, device: torch.device) -> None:
    torch.set_num_threads(1)
    model = for_inference(network, device)
    embed_block(model, network.spec, block, np.empty(0, np.int32), device, precision=network.precision)


def known_rows(
    block: pa.Table, skip: np.ndarray, layer_names: Sequence[str], former: PreviousFeatures | None
) -> Shard | None:
    """The rows of a partition but `skip` that a former run embedded from the same image, with their present labels."""
    if former is None:
        return None
    labels = block[LABEL].to_numpy()
    # what has lost its label is to be quarantined
    rows = np.setdiff1d(np.flatnonzero(labels >= 0), skip)
    wanted = block.take(pa.array(rows))
    digests = image_digests(wanted[IMAGE])
    ids = _one_array(wanted[SAMPLE_ID])
    at, features = former.of(ids, digests, layer_names)
    return Shard(rows[at], ids.take(pa.array(at)), labels[rows[at]], features, digests[at])


def with_known(fresh: Shard, known: Shard | None, block: pa.Table) -> Shard:
    """Both parts of a partition as one shard in the order of the rows, with the digests of the images."""
    fresh = replace(fresh, digests=image_digests(block[IMAGE].take(pa.array(fresh.rows))))
    if known is None or not len(known.rows):
        return fresh
    rows = np.concatenate([fresh.rows, known.rows])
    order = np.argsort(rows, kind="stable")
    assert fresh.digests is not None and known.digests is not None
    features = {
        layer: np.concatenate([matrix, known.features[layer]])[order] for layer, matrix in fresh.features.items()
    }
    return Shard(
        rows[order],
        pa.concat_arrays([fresh.sample_ids, known.sample_ids]).take(pa.array(order)),
        np.concatenate([fresh.labels, known.labels])[order],
        features,
        np.concatenate([fresh.digests, known.digests])[order],
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    return whole
