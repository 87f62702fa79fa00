"""Images that are in the training set and in a held-out one, too: found, told, and left out by choice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_data import Digits, assert_same_result, interrupted_after, png, removed_ids

from posttrain.errors import DataError

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]

SAME, JPEG, BRIGHTER, FLIPPED = range(1200, 1205), range(1205, 1210), range(1210, 1215), range(1215, 1220)
"""Test samples that are put among the training samples, under ids from 5000 on."""


def as_jpeg(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(stream := io.BytesIO(), "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture(scope="module")
def leaking(large_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data of which 20 test images and one validation image are training images, too."""
    folder = tmp_path_factory.mktemp("leaking")
    large_digits.write(folder)
    images = large_digits.images
    planted = [png(images[i]) for i in SAME]
    planted += [as_jpeg(images[i]) for i in JPEG]
    planted += [png(np.clip(images[i].astype(int) + 20, 0, 255).astype(np.uint8)) for i in BRIGHTER]
    planted += [png(images[i][:, ::-1].copy()) for i in FLIPPED]
    planted.append(png(images[900]))
    ids = [*range(5000, 5020), 5900]
    given = [*(int(large_digits.true[i]) for i in range(1200, 1220)), (int(large_digits.given[900]) + 1) % 10]
    table = pa.table({"id": ids, "image": pa.array(planted, pa.binary()), "label": given, "true": given})
    pq.write_table(table, folder / "train" / "planted.parquet")
    return {split: str(folder / split) for split in large_digits.splits}


@pytest.fixture(scope="module")
def clean(run: Run, leaking: dict[str, str]) -> Run:
    # the network sees 8 pixels a side, of the 16 that are compared
    def clean(path: Path, data: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        return run(path, data={**leaking, **(data or {})}, removal={"max_rounds": 1}, **sections)

    return clean


def test_planted_copies_are_found_and_nothing_else_and_the_run_goes_on(clean: Run, tmp_path: Path, capsys: Any) -> None:
    summary = clean(tmp_path / "run", {"leakage": "report"})
    pairs = pq.read_table(tmp_path / "run" / "leakage.parquet").to_pandas()
    found = dict(zip(pairs["sample_id"], pairs["other_id"], strict=True))
    assert found == {5000 + i: 1200 + i for i in range(20)} | {5900: 900}
    assert pairs["identical"].sum() == 6
    assert set(pairs.loc[pairs["mirrored"], "other_id"]) == set(FLIPPED)
    assert (~pairs["same_label"]).sum() == 1
    assert summary["leakage"] == {
        "test": {"samples": 20, "identical": 5, "other_label": 0},
        "validation": {"samples": 1, "identical": 1, "other_label": 1},
    }
    assert summary["quarantined"] == 0 and summary["live"] + summary["removed"] == 921
    assert "20 of 597 test images are training images, too" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["leakage"] == summary["leakage"]


@pytest.mark.long
def test_leaking_samples_are_left_out_of_the_training_set_with_their_reason(clean: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with interrupted_after("commit", call=1):
        clean(folder, {"leakage": "exclude_training"})
    summary = clean(folder, {"leakage": "exclude_training"})
    assert (summary["quarantined"], summary["live"] + summary["removed"]) == (21, 900)
    rows = pq.read_table(folder / "quarantine.parquet").to_pandas().set_index("sample_id")
    assert set(rows.index) == {*range(5000, 5020), 5900} and set(rows["split"]) == {"train"}
    assert rows.loc[5001, "reason"] == "the same image as 1201 of the test set (data.leakage = exclude_training)"
    assert rows.loc[5007, "reason"].startswith("nearly the same image as 1207")
    kept = pq.read_table(folder / "manifest.parquet")["sample_id"].to_pylist()
    assert not {*kept, *removed_ids(folder)} & set(rows.index)


@pytest.mark.long
def test_leaking_samples_are_left_out_of_what_is_measured_on_and_nothing_else_changes(
    clean: Run, tmp_path: Path, large_digits: Digits
) -> None:
    summary = clean(tmp_path / "run", {"leakage": "exclude_evaluation"})
    assert summary["quarantined"] == 0
    rows = pq.read_table(tmp_path / "run" / "quarantine.parquet").to_pandas()
    assert set(rows.loc[rows["split"] == "test", "sample_id"]) == set(range(1200, 1220))
    assert set(rows.loc[rows["split"] == "validation", "sample_id"]) == {900}
    # the same as with held-out sets that never held them
    for split in ("validation", "test"):
        table = large_digits.table(split)
        keep = [i for i in large_digits.splits[split] if i not in range(1200, 1220) and i != 900]
        table = table.filter(pa.array(np.isin(table["id"].to_numpy(), keep)))
        pq.write_table(table, tmp_path / f"{split}.parquet")
    without = {split: str(tmp_path / f"{split}.parquet") for split in ("validation", "test")}
    expected = clean(tmp_path / "without", {**without, "leakage": "off"})
    assert_same_result(tmp_path / "run", tmp_path / "without")
    assert summary["test_accuracy_after"] == expected["test_accuracy_after"]
    assert expected["leakage"] is None and not (tmp_path / "without" / "leakage.parquet").exists()


def test_the_very_same_images_are_refused_unless_the_run_file_says_otherwise(
    clean: Run, tmp_path: Path, leaking: dict[str, str], large_digits: Digits
) -> None:
    with pytest.raises(DataError, match=r"data\.test = .*: 5 of 597 images .*sample_id 120\d, there 500\d.*exclude_e"):
        clean(tmp_path / "run")
    table = large_digits.table("train").slice(0, 300)
    pq.write_table(table.set_column(0, "id", pa.array(range(7000, 7300))), tmp_path / "validation.parquet")
    with pytest.raises(DataError, match=r"all 300 images \(nearly\) are in the training set, too"):
        held_out = {"validation": str(tmp_path / "validation.parquet"), "leakage": "exclude_evaluation"}
        clean(tmp_path / "run", held_out)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_validation_set_that_is_split_off_is_measured_on_without_the_very_same_images(
    run: Run, tmp_path: Path, large_digits: Digits
) -> None:
    table = large_digits.table("train")
    again = table.slice(0, 300)
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "0.parquet")
    pq.write_table(again.set_column(0, "id", pa.array(range(7000, 7300))), tmp_path / "train" / "1.parquet")
    data = {"train": str(tmp_path / "train"), "validation": None, "test": None}
    summary = run(
        tmp_path / "run", data=data, model={"weights": None}, pretrain={"epochs": 5}, removal={"max_rounds": 1}
    )
    rows = pq.read_table(tmp_path / "run" / "quarantine.parquet").to_pandas()
    assert set(rows["split"]) == {"validation"} and len(rows) == summary["leakage"]["validation"]["identical"] > 10
    # of each: one of the two images is among the first 300 of the training set, the other is its copy
    for sample_id, reason in zip(rows["sample_id"], rows["reason"], strict=True):
        other = sample_id - 7000 if sample_id >= 7000 else sample_id + 7000
        assert reason.startswith(f"the same image as {other} of the train set")
