from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from posttrain.cluster.leakage import compare, held_out_images
from posttrain.runs.leakage import Leaks
from posttrain.schema import FILE, IMAGE, LABEL, SAMPLE_ID

_DATA = load_digits()
assert not isinstance(_DATA, tuple)
DIGITS = (_DATA.images * 255 / 16).round().astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def block(images: list[bytes], ids: list[int], labels: list[int]) -> pa.Table:
    return pa.table(
        {
            SAMPLE_ID: pa.array(ids, pa.int64()),
            IMAGE: pa.array(images, pa.large_binary()),
            LABEL: pa.array(labels, pa.int32()),
            FILE: ["a.parquet"] * len(ids),
        }
    )


@pytest.fixture(scope="module")
def pairs() -> pa.Table:
    """What two held-out partitions share with training: one image the same, one brighter, one mirrored."""
    originals = [png(DIGITS[i]) for i in range(40)]
    planted = [originals[3], png(np.clip(DIGITS[25].astype(int) + 20, 0, 255).astype(np.uint8))]
    planted += [png(DIGITS[30][:, ::-1].copy()), originals[4][:30]]
    train = block([png(DIGITS[i]) for i in range(100, 150)] + planted, list(range(54)), [0] * 54)
    validation = block([*originals[:20], originals[4][:30]], list(range(1000, 1021)), [0] * 10 + [1] * 11)
    test = block(originals[20:], list(range(2000, 2020)), [1] * 20)
    held_out = [held_out_images(validation, None, "validation", 0), held_out_images(test, None, "test", 7)]
    return compare(train, 5, None, held_out)


def test_pairs_say_which_images_of_which_sets_and_how_they_are_alike(pairs: pa.Table) -> None:
    columns = ["partition", "row", "sample_id", "split", "other_partition", "other_row", "other_id"]
    assert [tuple(row[name] for name in columns) for row in pairs.to_pylist()] == [
        (5, 50, 50, "validation", 0, 3, 1003),
        (5, 51, 51, "test", 7, 5, 2005),
        (5, 52, 52, "test", 7, 10, 2010),
    ]
    assert pairs["identical"].to_pylist() == [True, False, False]
    assert pairs["mirrored"].to_pylist() == [False, False, True]
    assert pairs["same_label"].to_pylist() == [True, False, False]
    assert pairs["difference"][0].as_py() == 0 < pairs["difference"][1].as_py()


def test_blank_images_are_paired_by_their_bytes_alone_and_not_all_with_all() -> None:
    blank, other = png(np.zeros((8, 8), np.uint8)), png(np.full((8, 8), 255, np.uint8))
    train = block([blank] * 30 + [other], list(range(31)), [0] * 31)
    held_out = [held_out_images(block([blank] * 20, list(range(100, 120)), [0] * 20), None, "test", 0)]
    found = compare(train, 0, None, held_out)
    assert set(found["sample_id"].to_pylist()) == set(range(30))
    assert set(found["other_id"].to_pylist()) == set(range(100, 120))
    assert found.num_rows <= 50


def test_a_choice_leaves_out_one_side_with_the_reason_or_none(pairs: pa.Table) -> None:
    for choice in ("report", "refuse"):
        assert Leaks(pairs, choice).excluded() == {} and Leaks(pairs, choice).quarantined().num_rows == 0
    own = Leaks(pairs, "refuse", frozenset({"validation", "test"}))
    assert {name: {b: rows.tolist() for b, rows in of.by_partition()} for name, of in own.excluded().items()} == {
        "validation": {0: [3]}
    }
    assert own.quarantined()["reason"].to_pylist() == ["the same image as 50 of the train set (data.leakage = refuse)"]
    training = Leaks(pairs, "exclude_training")
    assert {name: {b: rows.tolist() for b, rows in of.by_partition()} for name, of in training.excluded().items()} == {
        "train": {5: [50, 51, 52]}
    }
    assert training.quarantined()["reason"].to_pylist() == [
        "the same image as 1003 of the validation set (data.leakage = exclude_training)",
        "nearly the same image as 2005 of the test set (data.leakage = exclude_training)",
        "nearly the same image as 2010 of the test set (data.leakage = exclude_training)",
    ]
    evaluation = Leaks(pairs, "exclude_evaluation")
    assert {
        name: {b: rows.tolist() for b, rows in of.by_partition()} for name, of in evaluation.excluded().items()
    } == {
        "test": {7: [5, 10]},
        "validation": {0: [3]},
    }
    assert evaluation.quarantined()["sample_id"].to_pylist() == [1003, 2005, 2010]
    assert evaluation.counts() == {
        "test": {"samples": 2, "identical": 0, "other_label": 2},
        "validation": {"samples": 1, "identical": 1, "other_label": 0},
    }
    assert Leaks(None, "off").counts() is None and Leaks(None, "off").excluded() == {}
