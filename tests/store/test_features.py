from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.schema import order_key, partition_boundaries, partition_count
from posttrain.store.features import (
    PreviousFeatures,
    Shard,
    ShardSummary,
    image_digests,
    previous_features,
    quarantine_table,
    read_shard,
    summarise_shard,
    write_shard,
)
from posttrain.store.folder import RunFolder

# a shard's layers as a network names them: one name begins another, some hold dots
LAYERS = ("input", "layer2", "layer2.0", "layer2.0.conv1", "0", "fc")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def a_shard(count: int, *, layers: tuple[str, ...] = ("fc",), text: bool = False) -> Shard:
    """A shard whose first layer has 5 features, and each further one as many as the last and one more."""
    draw = np.random.default_rng(0)
    ids = [f"train/é{i}.png" for i in range(count)] if text else [3 * i - 7 for i in range(count)]
    return Shard(
        # with gaps: what could not be read is left out
        np.arange(0, 2 * count, 2, dtype=np.int32),
        pa.array(ids, pa.string() if text else pa.int64()),
        draw.integers(0, 10, count).astype(np.int32),
        {layer: draw.normal(size=(count, 5 + at)).astype(np.float16) for at, layer in enumerate(layers)},
    )


def unreadable(row: int, sample_id: int | str) -> dict[str, object]:
    return {"row": row, "sample_id": sample_id, "file": "a/é.png", "reason": "not an image"}


@pytest.mark.parametrize("text", [False, True], ids=["int ids", "string ids"])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_shard_comes_back_bit_for_bit(folder: RunFolder, count: int, text: bool):
    shard, path = a_shard(count, text=text), folder.features("abc", "train", 3)
    write_shard(folder, path, shard, [])
    found = read_shard(folder, path, ["fc"])
    assert found.features["fc"].dtype == np.float16
    assert found.features["fc"].shape == (count, 5)
    assert found.features["fc"].tobytes() == shard.features["fc"].tobytes()
    assert found.rows.tolist() == shard.rows.tolist()
    assert found.labels.tolist() == shard.labels.tolist()
    assert found.sample_ids.equals(shard.sample_ids)


@pytest.mark.parametrize("count", [0, 300])
def test_each_layer_of_a_shard_comes_back_alone_and_beside_others(folder: RunFolder, count: int):
    shard, path = a_shard(count, layers=LAYERS), folder.path("s.parquet")
    write_shard(folder, path, shard, [])
    for asked in [*((layer,) for layer in LAYERS), ("layer2.0", "input"), LAYERS]:
        found = read_shard(folder, path, asked)
        # in the order asked for, not in that of the file
        assert tuple(found.features) == asked
        for layer in asked:
            assert found.features[layer].shape == shard.features[layer].shape
            assert found.features[layer].tobytes() == shard.features[layer].tobytes()


def test_layers_that_are_not_asked_for_are_not_read(folder: RunFolder):
    shard, path = a_shard(300, layers=LAYERS), folder.path("s.parquet")
    write_shard(folder, path, shard, [])
    footer = pq.read_metadata(path).row_group(0)
    columns = {(c := footer.column(at)).path_in_schema: c for at in range(footer.num_columns)}
    spoilt = bytearray(folder.read_bytes(path))
    for layer in LAYERS:
        if layer != "layer2":
            column = columns[f"features:{layer}.list.element"]
            start = column.data_page_offset
            spoilt[start : start + column.total_compressed_size] = bytes([255]) * column.total_compressed_size
    folder.write_bytes(path, bytes(spoilt))
    assert read_shard(folder, path, ["layer2"]).features["layer2"].tobytes() == shard.features["layer2"].tobytes()
    for layer in set(LAYERS) - {"layer2"}:
        with pytest.raises(OSError):
            read_shard(folder, path, ["layer2", layer])


def test_a_shard_without_a_layer_that_is_asked_for_is_an_error(folder: RunFolder):
    write_shard(folder, folder.path("s.parquet"), a_shard(3, layers=("layer2.0", "fc")), [])
    # the name of an asked layer begins that of a stored one
    with pytest.raises(pa.ArrowInvalid, match="layer2"):
        read_shard(folder, folder.path("s.parquet"), ["fc", "layer2"])


def test_the_extremes_of_float16_come_back_as_they_were(folder: RunFolder):
    features = np.array([[65504, -65504, 6e-8, -0.0, 0.0]], np.float16)
    shard = Shard(np.array([0]), pa.array([1]), np.array([0]), {"fc": features})
    write_shard(folder, folder.path("s.parquet"), shard, [])
    assert read_shard(folder, folder.path("s.parquet"), ["fc"]).features["fc"].tobytes() == features.tobytes()


def test_features_that_lie_transposed_in_memory_are_written_row_by_row(folder: RunFolder):
    features = np.arange(12, dtype=np.float16).reshape(4, 3).T
    shard = Shard(np.arange(3), pa.array([1, 2, 3]), np.zeros(3, np.int32), {"fc": features, "1": features[:, ::2]})
    write_shard(folder, folder.path("s.parquet"), shard, [])
    found = read_shard(folder, folder.path("s.parquet"), ["fc", "1"]).features
    np.testing.assert_array_equal(found["fc"], features)
    np.testing.assert_array_equal(found["1"], features[:, ::2])


def test_the_summary_of_a_shard_needs_only_its_footer_and_says_what_was_left_out(folder: RunFolder):
    path, left_out = folder.path("s.parquet"), [unreadable(1, "b"), unreadable(9, "c")]
    write_shard(folder, path, a_shard(4, layers=LAYERS), left_out)
    assert summarise_shard(folder, path, 12) == ShardSummary(12, 4, left_out)


def test_a_partition_of_which_nothing_could_be_read_is_a_shard_all_the_same(folder: RunFolder):
    path = folder.path("s.parquet")
    write_shard(folder, path, a_shard(0), [unreadable(0, 5)])
    assert summarise_shard(folder, path, 0) == ShardSummary(0, 0, [unreadable(0, 5)])


def test_a_shard_that_is_missing_cut_short_or_no_shard_has_no_summary(folder: RunFolder):
    path = folder.path("s.parquet")
    assert summarise_shard(folder, path, 0) is None
    write_shard(folder, path, a_shard(300), [])
    content = folder.read_bytes(path)
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        folder.write_bytes(path, content[:length])
        assert summarise_shard(folder, path, 0) is None, length
    folder.write_table(path, pa.table({"features:fc": [1.0]}))  # Parquet, but another's
    assert summarise_shard(folder, path, 0) is None
    folder.write_bytes(path, content)
    assert summarise_shard(folder, path, 0) is not None


def test_the_quarantine_lists_every_sample_left_out_with_its_partition():
    summaries = [
        ShardSummary(0, 3, [unreadable(1, 10)]),
        ShardSummary(1, 4, []),
        ShardSummary(2, 0, [unreadable(0, 20), unreadable(2, 30)]),
    ]
    table = quarantine_table(summaries)
    assert table.column_names == ["partition", "row", "sample_id", "file", "reason"]
    assert table["partition"].to_pylist() == [0, 2, 2]
    assert table["row"].to_pylist() == [1, 0, 2]
    assert table["sample_id"].to_pylist() == [10, 20, 30]
    assert table["sample_id"].type == pa.int64()
    assert set(table["reason"].to_pylist()) == {"not an image"}


def test_the_quarantine_keeps_string_ids_as_strings_and_may_be_empty():
    assert quarantine_table([ShardSummary(0, 3, [unreadable(1, "007")])])["sample_id"].to_pylist() == ["007"]
    assert quarantine_table([]).num_rows == 0


# what a former run embedded


def embedded_store(
    folder: RunFolder, ids: np.ndarray, digests: np.ndarray, features: dict[str, np.ndarray], *, text: bool = False
) -> None:
    """The shards of a run, as `workers` writes them: its samples in partitions by the hash of their ids."""
    names = np.array([f"é{i}" for i in ids], object) if text else ids
    count = partition_count(len(ids))
    partition_of = np.searchsorted(partition_boundaries(count), order_key(names), side="right")
    for partition in range(count):
        mine = np.flatnonzero(partition_of == partition)
        mine = mine[np.argsort(order_key(names[mine]))]
        shard = Shard(
            np.arange(len(mine)),
            pa.array(names[mine], pa.string() if text else pa.int64()),
            np.zeros(len(mine), np.int32),
            {layer: matrix[mine] for layer, matrix in features.items()},
            digests[mine],
        )
        write_shard(folder, folder.features("b", "train", partition), shard, [], partitions=count)


@pytest.mark.parametrize("text", [False, True], ids=["int ids", "string ids"])
@pytest.mark.parametrize(("before", "now"), [(300, 900), (9_000, 30_000), (30_000, 9_000), (2_048 * 4 + 1, 2_048 * 5)])
def test_features_are_found_again_whatever_partitions_the_samples_lie_in(
    folder: RunFolder, before: int, now: int, text: bool
):
    draw = np.random.default_rng(before)
    features = {"input": draw.normal(size=(before, 3)).astype(np.float16), "fc": draw.normal(size=(before, 2))}
    features["fc"] = features["fc"].astype(np.float16)
    digests = draw.integers(0, 2**63, before).astype(np.uint64)
    embedded_store(folder, np.arange(before), digests, features, text=text)
    former = previous_features(folder, "b", "train")
    assert former is not None and former.partitions == partition_count(before)
    # some images have changed, and many ids are new
    present = np.concatenate([digests, draw.integers(0, 2**63, max(0, now - before)).astype(np.uint64)])[:now]
    changed = draw.random(now) < 0.1
    present[changed] += np.uint64(1)
    ids = np.arange(now)
    names = np.array([f"é{i}" for i in ids], object) if text else ids
    edges = partition_boundaries(partition_count(now))
    partition_of = np.searchsorted(edges, order_key(names), side="right")
    found = set()
    for partition in range(len(edges) + 1):
        mine = draw.permutation(np.flatnonzero(partition_of == partition))
        at, taken = former.of(
            pa.array(names[mine], pa.string() if text else pa.int64()), present[mine], ["fc", "input"]
        )
        assert (np.diff(at) > 0).all()
        for layer, matrix in taken.items():
            assert matrix.tobytes() == features[layer][mine[at]].tobytes()
        found |= set(mine[at].tolist())
    assert found == {i for i in range(min(before, now)) if not changed[i]}


def test_only_the_shards_in_whose_hash_range_samples_lie_are_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    ids = np.arange(20_000)
    embedded_store(folder, ids, ids.astype(np.uint64), {"fc": np.zeros((len(ids), 1), np.float16)})
    former = previous_features(folder, "b", "train")
    assert former is not None and former.partitions == 10
    read: list[int] = []
    monkeypatch.setattr(PreviousFeatures, "_read", lambda self, partition, layers: read.append(partition))
    partition_of = np.searchsorted(partition_boundaries(4), order_key(ids), side="right")
    mine = ids[partition_of == 1]
    former.of(pa.array(mine), mine.astype(np.uint64), ["fc"])
    # the second quarter of ten: from 2.5 to 5
    assert read == [2, 3, 4]


def test_a_damaged_or_missing_shard_of_a_former_run_only_means_that_its_samples_are_embedded_anew(folder: RunFolder):
    ids = np.arange(400)
    embedded_store(folder, ids, ids.astype(np.uint64), {"fc": np.zeros((400, 1), np.float16)})
    former = previous_features(folder, "b", "train")
    assert former is not None
    (Path(folder.location) / "features/b/train/00001.parquet").unlink()
    folder.write_bytes(folder.features("b", "train", 2), b"PAR1")
    at, _ = former.of(pa.array(ids), ids.astype(np.uint64), ["fc"])
    partition_of = np.searchsorted(partition_boundaries(4), order_key(ids), side="right")
    assert at.tolist() == np.flatnonzero(~np.isin(partition_of, [1, 2])).tolist()


def test_a_run_without_these_features_has_nothing_to_take_up(folder: RunFolder):
    assert previous_features(folder, "b", "train") is None
    write_shard(folder, folder.features("b", "train", 0), a_shard(3), [])  # of an older version: no digests
    assert previous_features(folder, "b", "train") is None
    assert previous_features(folder, "c", "train") is None


def test_a_digest_tells_the_bytes_of_an_image_and_nothing_of_how_they_are_stored():
    images = [b"a", b"b", b"", b"a"]
    found = image_digests(pa.array(images))
    assert found.dtype == np.uint64 and found[0] == found[3] and len(set(found.tolist())) == 3
    for other in (
        pa.chunked_array([images[:1], images[1:]]),
        pa.array(images, pa.large_binary()),
        pa.array([{"bytes": image, "path": f"{at}.png"} for at, image in enumerate(images)]),
    ):
        assert image_digests(other).tolist() == found.tolist()
    lists = image_digests(pa.array([[1, 2], [12], None, [1, 2]]))
    assert lists[0] == lists[3] and len(set(lists.tolist())) == 3


def test_a_digest_tells_tensors_apart_that_differ_in_their_centre_alone():
    extensions = pytest.importorskip("ray.data.extensions")
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images[1, 16, 16] = 1
    fixed = image_digests(extensions.ArrowTensorArray.from_numpy(images)).tolist()
    assert fixed[0] == fixed[2] != fixed[1]
    cells = np.empty(4, object)
    cells[:] = [*images, images[0].reshape(16, 64, 3)]
    mixed = image_digests(extensions.ArrowVariableShapedTensorArray.from_numpy(cells)).tolist()
    assert mixed[:3] == fixed and mixed[3] not in fixed
