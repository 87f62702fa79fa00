"""Features of a previous run reused in other partitions, and its samples found again; without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from posttrain.cluster.embedding import embed_block, merged, reused_rows
from posttrain.cluster.matching import NEW_LABEL, describe, match
from posttrain.cluster.network import Network
from posttrain.schema import (
    DIGEST,
    FILE,
    IMAGE,
    LABEL,
    ROW,
    SAMPLE_ID,
    SELF_CONFIDENCE,
    ImageSpec,
    ModelSpec,
    order_key,
    partition_boundaries,
    partition_count,
)
from posttrain.store.features import PreviousFeatures, Shard, previous_features, read_shard, write_shard
from posttrain.store.folder import RunFolder
from posttrain.vision import models
from posttrain.vision.weights import to_bytes

IMAGE_SPEC = ImageSpec(1, (8, 8), (0.5,), (0.5,), (8, 8))
MLP = ModelSpec("posttrain.vision.models:mlp", {}, 10, "head", IMAGE_SPEC, ("input", "relu", "head"), 32)
RESNET = replace(
    MLP,
    factory="posttrain.vision.models:small_resnet",
    arguments={"width": 4, "channels": 1},
    layers=("stage1", "stage2", "head"),
)
NOTHING = np.empty(0, np.int32)
CPU = torch.device("cpu")


def samples(ids: np.ndarray, *, seed: int = 0) -> pa.Table:
    """Rows as `reading` makes them; an id's image depends on the id and the seed alone."""
    images = [np.random.default_rng([seed, i]).integers(0, 256, 64, np.uint8).tobytes() for i in ids.tolist()]
    return pa.table(
        {
            SAMPLE_ID: pa.array(ids, pa.int64()),
            IMAGE: pa.array(images, pa.large_binary()),
            LABEL: pa.array(ids % 10, pa.int32()),
            FILE: pa.array(["f"] * len(ids)),
        }
    )


def partitions(table: pa.Table) -> list[pa.Table]:
    keys = order_key(table[SAMPLE_ID].to_numpy())
    table = table.take(pa.array(np.argsort(keys)))
    edges = np.searchsorted(np.sort(keys), partition_boundaries(partition_count(table.num_rows)))
    return [table.slice(start, stop - start) for start, stop in zip([0, *edges], [*edges, table.num_rows], strict=True)]


def built(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(spec.factory, classes=10, arguments=spec.arguments).eval()


def embedded(
    spec: ModelSpec, blocks: list[pa.Table], previous: PreviousFeatures | None = None
) -> tuple[list[Shard], int]:
    """The shards as a worker makes them, and how many images went through the network."""
    model, shards, count = built(spec), [], 0
    for block in blocks:
        reused = reused_rows(block, NOTHING, spec.layers, previous)
        fresh, _ = embed_block(model, spec, block, NOTHING if reused is None else reused.rows, CPU)
        count += len(fresh.rows)
        shards.append(merged(fresh, reused, block))
    return shards, count


def stored(folder: RunFolder, shards: list[Shard]) -> PreviousFeatures:
    for partition, shard in enumerate(shards):
        write_shard(folder, folder.features("b", "train", partition), shard, [], partitions=len(shards))
    previous = previous_features(folder, "b", "train")
    assert previous is not None
    return previous


@pytest.mark.parametrize("spec", [MLP, RESNET], ids=["mlp", "resnet"])
def test_only_what_is_new_goes_through_the_network_and_all_features_are_as_if_all_had(
    spec: ModelSpec, tmp_path: Path
) -> None:
    old, new = np.arange(900), np.arange(200, 1500)
    previous = stored(RunFolder(str(tmp_path)), embedded(spec, partitions(samples(old)))[0])
    blocks = partitions(samples(new))
    whole, all_of_them = embedded(spec, blocks)
    shards, count = embedded(spec, blocks, previous)
    assert (all_of_them, count) == (1300, 600)
    for shard, expected in zip(shards, whole, strict=True):
        assert shard.rows.tolist() == expected.rows.tolist()
        assert shard.sample_ids.equals(expected.sample_ids)
        assert shard.labels.tolist() == expected.labels.tolist()
        assert shard.digests is not None and expected.digests is not None
        assert shard.digests.tolist() == expected.digests.tolist()
        for layer, features in expected.features.items():
            assert shard.features[layer].tobytes() == features.tobytes()


def test_a_sample_with_another_image_is_embedded_anew_and_one_with_another_label_is_not(tmp_path: Path) -> None:
    ids = np.arange(300)
    previous = stored(RunFolder(str(tmp_path)), embedded(MLP, partitions(samples(ids)))[0])
    changed = pa.concat_tables([samples(ids[:40], seed=1), samples(ids[40:])])
    labels = changed[LABEL].to_numpy().copy()
    labels[100:160] = 7
    labels[160:170] = -1  # has lost its label: to be quarantined
    changed = changed.set_column(2, LABEL, pa.array(labels, pa.int32()))
    shards, count = embedded(MLP, partitions(changed), previous)
    assert count == 40
    found = {i: label for s in shards for i, label in zip(s.sample_ids.to_pylist(), s.labels.tolist(), strict=True)}
    assert found == {i: labels[i] for i in range(300) if not 160 <= i < 170}
    expected, _ = embedded(MLP, partitions(changed))
    for shard, whole in zip(shards, expected, strict=True):
        assert shard.features["relu"].tobytes() == whole.features["relu"].tobytes()


def test_what_a_previous_run_had_quarantined_is_looked_at_again(tmp_path: Path) -> None:
    ids = np.arange(100)
    broken = samples(ids)
    images = broken[IMAGE].to_pylist()
    images[5] = b"no image"
    broken = broken.set_column(1, IMAGE, pa.array(images, pa.large_binary()))
    previous = stored(RunFolder(str(tmp_path)), embedded(MLP, partitions(broken))[0])
    assert embedded(MLP, partitions(broken), previous)[1] == 0
    shards, count = embedded(MLP, partitions(samples(ids)), previous)
    assert count == 1 and sum(len(shard.rows) for shard in shards) == 100


def test_excluded_rows_are_neither_embedded_nor_reused(tmp_path: Path) -> None:
    block = samples(np.arange(50))
    shard, _ = embed_block(built(MLP), MLP, block, NOTHING, CPU)
    previous = stored(RunFolder(str(tmp_path)), [merged(shard, None, block)])
    reused = reused_rows(block, np.array([3, 4], np.int32), MLP.layers, previous)
    assert reused is not None and not {3, 4} & set(reused.rows.tolist()) and len(reused.rows) == 48


def test_shards_written_and_read_carry_their_digests_beside_the_features(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    shards, _ = embedded(MLP, partitions(samples(np.arange(100))))
    stored(folder, shards)
    again = read_shard(folder, folder.features("b", "train", 0), ["head"])
    assert again.features["head"].tobytes() == shards[0].features["head"].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"image": replace(IMAGE_SPEC, mean=(0.4,))},
        {"image": replace(IMAGE_SPEC, size=(8, 16))},
        {"layers": ("input", "head")},
        {"width": 16},
        {"arguments": {"inputs": 64}},
    ],
)
def test_features_are_those_of_a_backbone_as_it_sees_images(change: dict[str, Any]) -> None:
    weights = to_bytes(built(MLP))
    network, other = Network(MLP, weights, "k"), Network(replace(MLP, **change), weights, "k")
    assert network.backbone == Network(MLP, weights, "another digest").backbone
    assert network.backbone != other.backbone


def test_samples_that_were_taken_out_are_found_again_as_long_as_image_and_given_label_are_the_same() -> None:
    block = samples(np.arange(100, 160))
    known = describe(block, np.array([3, 10, 20, 30])).drop_columns([ROW])
    known = known.append_column(NEW_LABEL, pa.array([None, 8, None, None], pa.int32()))
    known = known.append_column(SELF_CONFIDENCE, pa.array([0.1, 0.2, 0.3, 0.4], pa.float32()))
    shuffled = block.take(pa.array(np.random.default_rng(0).permutation(60)))
    found = match(shuffled, known).to_pylist()
    ids = shuffled[SAMPLE_ID].to_pylist()
    assert {(ids[row[ROW]], row[NEW_LABEL]) for row in found} == {(103, None), (110, 8), (120, None), (130, None)}
    support = {ids[row[ROW]]: round(row[SELF_CONFIDENCE], 6) for row in found}
    assert support == {103: 0.1, 110: 0.2, 120: 0.3, 130: 0.4}
    labels = block[LABEL].to_numpy().copy()
    labels[20] = 9  # somebody has corrected it
    images = block[IMAGE].to_pylist()
    images[30] = b"another"
    changed = block.set_column(2, LABEL, pa.array(labels)).set_column(1, IMAGE, pa.array(images, pa.large_binary()))
    assert sorted(match(changed, known)[ROW].to_pylist()) == [3, 10]
    assert match(block.slice(40), known).num_rows == 0
    as_text = known.set_column(0, SAMPLE_ID, pa.array(["103", "110", "120", "130"]))
    assert match(block, as_text).num_rows == 0
    assert known.column_names == [SAMPLE_ID, DIGEST, LABEL, NEW_LABEL, SELF_CONFIDENCE]
