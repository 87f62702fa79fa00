"""The main job from end to end on a real Ray and a real MLflow store."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from small_data import (
    NETWORK,
    Digits,
    accuracy,
    as_built,
    assert_same_result,
    interrupted_after,
    memorise,
    png,
    removed_ids,
    rounds,
)

from posttrain.cluster import partitioning
from posttrain.report.summary import print_summary

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Undisturbed = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("threshold", "least_precision", "least_recall"),
    [(0.5, 0.95, 0.75), pytest.param(0.1, 0.9, 0.9, marks=pytest.mark.long)],
)
def test_wrong_labels_go_and_the_model_gets_better(
    run: Run, digits: Digits, tmp_path: Path, threshold: float, least_precision: float, least_recall: float
) -> None:
    # of these held-out labels a fifth is wrong, but of the 100 that are looked at 12: the odds start too low
    # a large budget: three rounds until no label looks wrong
    summary = run(tmp_path / "run", removal={"budget": 0.15, "max_rounds": 10, "threshold": threshold})
    wrong = {i for i in digits.splits["train"] if digits.given[i] != digits.true[i]}
    removed = set(removed_ids(summary["run"]))
    precision, recall = len(removed & wrong) / len(removed), len(removed & wrong) / len(wrong)
    assert precision >= least_precision
    assert recall >= least_recall
    assert summary["removal_precision"] == pytest.approx(precision)
    assert summary["removal_recall"] == pytest.approx(recall)
    assert summary["test_accuracy_after"] >= summary["test_accuracy_before"] + 0.08


@pytest.mark.parametrize(
    "scope", ["head", *(pytest.param(scope, marks=pytest.mark.long) for scope in ("network", "both"))]
)
def test_the_refined_model_classifies_as_the_summary_says(undisturbed: Undisturbed, digits: Digits, scope: str) -> None:
    import torch

    summary = undisturbed(scope)
    labels = torch.from_numpy(digits.true[list(digits.splits["test"])])
    found = accuracy(as_built(summary["run"]), digits.inputs("test"), labels)
    # features are stored as float16: a sample on the boundary may fall to the other side
    assert summary["test_accuracy_after"] == pytest.approx(found, abs=2 / len(labels))


def test_every_sample_ends_up_in_exactly_one_place(undisturbed: Undisturbed, digits: Digits) -> None:
    summary = undisturbed()
    folder = Path(summary["run"])
    removed = removed_ids(folder)
    kept = pq.read_table(folder / "manifest.parquet")["sample_id"].to_pylist()
    # the folder as a whole is a data set: nothing else lies in it
    images = pq.read_table(folder / "cleaned")
    assert sorted(removed + kept) == list(digits.splits["train"])
    assert images.column_names == ["id", "image", "label", "class_name"]
    assert sorted(images["id"].to_pylist()) == sorted(kept)
    by_id = dict(zip(images["id"].to_pylist(), images["image"].to_pylist(), strict=True))
    assert all(by_id[i] == png(digits.images[i]) for i in kept[:50])
    assert (summary["removed"], summary["live"]) == (len(removed), len(kept))
    with (folder / "issues.csv").open() as stream:
        issues = list(csv.DictReader(stream))
    assert {"is_label_issue", "label_quality", "label_score", "given_label", "predicted_label"} <= set(issues[0])
    assert sorted(int(row["sample_id"]) for row in issues) == list(digits.splits["train"])
    assert {int(row["sample_id"]) for row in issues if row["is_label_issue"] == "true"} == set(removed)


def test_removed_samples_say_why_and_what_instead(undisturbed: Undisturbed, digits: Digits) -> None:
    table = pq.read_table(Path(undisturbed()["run"]) / "removed.parquet").to_pandas()
    assert {"loo_margin", "parameter", "data", "loss", "margin", "gradient_norm", "random", "round"} <= set(table)
    assert (table["label"].to_numpy() == digits.given[table["sample_id"]]).all()
    assert (table["suggested_label"] != table["label"]).all()
    assert table["confidence"].between(0, 1).all()
    suggested_right = table["suggested_label"].to_numpy() == digits.true[table["sample_id"]]
    assert suggested_right.mean() >= 0.85
    assert table["reason"].str.contains("most likely class instead").all()


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.long)])
def test_the_removed_ids_are_the_same_for_any_number_of_workers(
    run: Run, undisturbed: Undisturbed, tmp_path: Path, workers: int
) -> None:
    run(tmp_path / "other", ray={"workers": workers})
    assert_same_result(tmp_path / "other", undisturbed()["run"])


# that Ray Data makes the same partitions: tests/end_to_end/test_reading.py
@pytest.mark.parametrize("reader", ["driver", pytest.param("ray data", marks=pytest.mark.long)])
def test_the_removed_ids_are_the_same_for_another_file_layout_whoever_reads_it(
    run: Run, undisturbed: Undisturbed, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setattr(partitioning, "SMALL_BYTES", 0 if reader == "ray data" else 2**40)
    table = digits.table("train")
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    (tmp_path / "layout").mkdir()
    for part, (start, stop) in enumerate([(0, 17), (17, 500), (500, 640), (640, 900)]):
        pq.write_table(shuffled.slice(start, stop - start), tmp_path / "layout" / f"{part}.parquet", row_group_size=50)
    run(tmp_path / "other", data={"train": str(tmp_path / "layout")})
    assert_same_result(tmp_path / "other", undisturbed()["run"])


@pytest.mark.long
def test_a_model_that_is_clearly_better_than_its_new_head_stays_and_the_labels_are_cleaned_all_the_same(
    run: Run, digits: Digits, tmp_path: Path
) -> None:
    """A network that learned right labels, and a boundary on the pixels alone."""
    import torch

    from posttrain.vision.models import mlp

    right = copy.copy(digits)
    right.given = digits.true
    torch.manual_seed(0)
    network = mlp(10)
    memorise(right, network, tmp_path / "right.pt", epochs=60)
    recipe: dict[str, Any] = {
        "model": {"weights": str(tmp_path / "right.pt")},
        "probe": {"layers": ["input"], "l2": [3.0]},
        "removal": {"max_rounds": 2},
    }
    whole = run(tmp_path / "whole", **recipe)
    assert whole["rounds"] == 2 and len(rounds(tmp_path / "whole")) == 4 and whole["removed"] > 50
    assert "removal.max_rounds = 2 reached; the model stays as it came: of the validation set" in whole["ended"]
    for split in ("validation", "test"):
        assert whole[f"{split}_accuracy_after"] == whole[f"{split}_accuracy_before"]
    state = as_built(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    with interrupted_after("write_checkpoint", call=4):
        run(tmp_path / "run", **recipe)
    again = run(tmp_path / "run", **recipe)
    assert_same_result(tmp_path / "run", tmp_path / "whole")
    assert again["ended"] == whole["ended"]


def test_what_the_first_round_sees_of_the_labels_as_they_came_holds(undisturbed: Undisturbed) -> None:
    whole = Path(undisturbed()["run"])
    _, first, *later = (done["metrics"] for done in rounds(whole))
    assert later
    for metrics in later:
        assert (metrics["live_noise"], metrics["validation_noise"]) == (first["live_noise"], first["validation_noise"])
    joint = pq.read_table(whole / "rounds" / "0001" / "confident_joint.parquet")
    assert joint.column_names == ["class", "label", "samples"]
    assert joint["samples"].to_numpy().sum() == pytest.approx(900)
    assert not (whole / "rounds" / "0002" / "confident_joint.parquet").exists()


@pytest.mark.parametrize(
    ("of_validation", "says"),
    [
        (
            lambda table: table.slice(0, 20),
            "fewer than 50 validation samples tell nothing of the labels; name a larger data.validation",
        ),
        pytest.param(
            lambda table: table.set_column(2, "label", pa.array((table["true"].to_numpy() + 1) % 10)),
            "the boundary agrees with the validation labels no more often than by chance",
            marks=pytest.mark.long,
        ),
    ],
)
def test_nothing_goes_where_the_validation_labels_say_nothing(
    of_validation: Callable[[pa.Table], pa.Table],
    says: str,
    run: Run,
    digits: Digits,
    tmp_path: Path,
) -> None:
    pq.write_table(of_validation(digits.table("validation")), tmp_path / "validation.parquet")
    summary = run(tmp_path / "run", data={"validation": str(tmp_path / "validation.parquet")})
    assert summary["removed"] == 0
    assert says in summary["ended"]
    assert summary["noise"] == {"rate": None, "low": None, "high": None, "found": False, "known": False}
    shown = Console(file=io.StringIO(), width=120)
    print_summary(shown, summary)
    assert isinstance(shown.file, io.StringIO) and "not known" in shown.file.getvalue()


def test_a_run_that_removes_nothing_leaves_all_columns(run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", removal={"threshold": 1.0})
    assert (summary["removed"], summary["live"]) == (0, 900)
    assert summary["ended"] == "what is left no longer looks wrong: 0 of 900 samples would be candidates"
    empty = pq.read_table(tmp_path / "run" / "removed.parquet")
    assert empty.num_rows == 0
    assert empty.schema == pq.read_table(Path(undisturbed()["run"]) / "removed.parquet").schema


@pytest.mark.long
def test_random_removal_is_blind_to_the_labels(run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", removal={"score": "random", "budget": 0.3, "max_share": 1.0, "max_rounds": 1})
    assert summary["removed"] == 270
    # 20 % of the labels are wrong: three standard errors of 270 draws are 7 points
    assert summary["removal_precision"] == pytest.approx(0.2, abs=0.07)


def test_mlflow_holds_one_run_per_round_beneath_one_parent(undisturbed: Undisturbed, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    summary = undisturbed()
    known = json.loads((Path(summary["run"]) / "tracking.json").read_text())
    client = MlflowClient(mlflow_uri)
    parent = client.get_run(known["run_id"])
    assert parent.info.status == "FINISHED"
    nested = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{known['run_id']}'")
    assert sorted(r.info.run_name or "" for r in nested) == [f"round {n:04d}" for n in range(summary["rounds"] + 1)]
    curve = client.get_metric_history(known["run_id"], "test_accuracy")
    assert [m.step for m in curve] == list(range(summary["rounds"] + 1))
    assert curve[-1].value == pytest.approx(summary["test_accuracy_after"])
    last = next(r for r in nested if r.info.run_name == f"round {summary['rounds']:04d}")
    paths = [a.path for folder in (None, "figures") for a in client.list_artifacts(last.info.run_id, folder)]
    assert {"removed.parquet", "round.json", "figures/scores.png"} <= set(paths)
    assert parent.inputs is not None
    assert {i.dataset.name for i in parent.inputs.dataset_inputs} >= {"parquet/train", "parquet/test"}


def test_a_corrupt_image_is_quarantined_with_its_reason_and_the_run_goes_on(
    run: Run, digits: Digits, tmp_path: Path
) -> None:
    table = digits.table("train")
    images = table["image"].to_pylist()
    images[3], images[7] = images[3][:40], b"no image at all"
    labels = table["label"].to_pylist()
    labels[11] = None
    table = table.set_column(1, "image", pa.array(images, pa.binary())).set_column(2, "label", pa.array(labels))
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "corrupt.parquet")
    summary = run(tmp_path / "run", data={"train": str(tmp_path / "train")}, removal={"max_rounds": 1})
    quarantine = pq.read_table(Path(summary["run"]) / "quarantine.parquet").to_pylist()
    assert {row["sample_id"] for row in quarantine} == {3, 7, 11}
    assert all(row["reason"] and row["file"].endswith("corrupt.parquet") for row in quarantine)
    assert next(row["reason"] for row in quarantine if row["sample_id"] == 11) == "no label"
    assert summary["quarantined"] == 3
    assert summary["live"] + summary["removed"] == 897
    assert not {3, 7, 11} & set(removed_ids(summary["run"]))


def test_class_folders_and_text_ids_go_through_the_same_run(run: Run, digits: Digits, tmp_path: Path) -> None:
    for split, rows in digits.splits.items():
        labels = digits.true if split == "test" else digits.given
        for i in rows:
            path = tmp_path / split / f"digit {labels[i]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(digits.images[i]))
    folders = {split: str(tmp_path / split) for split in digits.splits}
    summary = run(tmp_path / "run", data={"source": "folder", "true_label": None, **folders}, removal={"max_rounds": 1})
    removed = removed_ids(summary["run"])
    wrong = [digits.given[i] != digits.true[i] for i in (int(Path(r).stem) for r in removed)]
    assert removed[0].startswith("digit ") and removed[0].endswith(".png")
    assert np.mean(wrong) >= 0.9
    assert summary["removal_precision"] is None
    names = pq.read_table(Path(summary["run"]) / "removed.parquet")["suggested_name"].to_pylist()
    assert set(names) <= {f"digit {c}" for c in range(10)}


@pytest.mark.long
def test_raw_uint8_cells_give_the_same_removals_as_encoded_images(
    run: Run, undisturbed: Undisturbed, digits: Digits, tmp_path: Path
) -> None:
    rows = list(digits.splits["train"])
    raw = pa.array([digits.images[i].tobytes() for i in rows], pa.binary(64))
    (tmp_path / "raw").mkdir()
    pq.write_table(digits.table("train", image=raw), tmp_path / "raw" / "a.parquet")
    for split in ("validation", "test"):
        table = digits.table(split)
        cells = pa.array([digits.images[i].tobytes() for i in digits.splits[split]], pa.binary(64))
        pq.write_table(table.set_column(1, "image", cells), tmp_path / f"{split}.parquet")
    run(
        tmp_path / "other",
        data={
            "train": str(tmp_path / "raw"),
            "validation": str(tmp_path / "validation.parquet"),
            "test": str(tmp_path / "test.parquet"),
            "image_shape": [8, 8],
        },
    )
    assert_same_result(tmp_path / "other", undisturbed()["run"])


def test_on_clean_labels_next_to_nothing_is_removed(run: Run, digits: Digits, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        table = digits.table(split)
        pq.write_table(table.set_column(2, "label", table["true"]), tmp_path / f"{split}.parquet")
    summary = run(
        tmp_path / "run",
        data={"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")},
        model={"weights": None},
        removal={"max_rounds": 10},
    )
    assert summary["removed"] <= 0.01 * 900
    assert summary["test_accuracy_after"] >= summary["test_accuracy_before"] - 0.01


@pytest.mark.long
@pytest.mark.slow
def test_the_network_trains_with_two_workers_of_ray_train(run: Run, tmp_path: Path) -> None:
    summary = run(
        tmp_path / "run",
        refine=NETWORK,
        ray={"workers": 2, "train_workers": 2},
        removal={"max_rounds": 1},
    )
    assert summary["rounds"] == 1
    assert not (tmp_path / "run" / "training").exists()
    assert summary["test_accuracy_after"] >= summary["test_accuracy_before"] - 0.05
