"""Wrong input: exit code 2, one sentence that names file, value and way out, and no run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_data import Digits
from typer.testing import CliRunner

from pipelines.cli import app
from posttrain.cluster.session import refuse_unreachable
from posttrain.errors import ConfigError
from posttrain.vision.models import mlp

pytestmark = pytest.mark.ray

Make = Callable[..., dict[str, Any]]


def refused(raw: dict[str, Any], tmp_path: Path) -> str:
    """The one line that `posttrain clean` says of the run file."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    result = CliRunner().invoke(app, ["clean", str(file)])
    assert result.exit_code == 2, result.output
    assert not Path(raw["run"]["path"]).exists()
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def written(table: pa.Table, folder: Path) -> str:
    folder.mkdir()
    pq.write_table(table, folder / "part.parquet")
    return str(folder)


def test_a_missing_file(runfile: Make, tmp_path: Path) -> None:
    raw = runfile(tmp_path / "run", data={"train": str(tmp_path / "absent")})
    assert refused(raw, tmp_path) == (
        f"error: {tmp_path}/absent: no such file or folder; check data.train, data.validation, data.test"
    )


def test_a_folder_without_parquet(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused(runfile(tmp_path / "run", data={"train": str(tmp_path / "empty")}), tmp_path)
    assert f"{tmp_path}/empty: holds no .parquet file" in said


def test_a_file_that_is_no_parquet(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    said = refused(runfile(tmp_path / "run", data={"train": str(tmp_path / "a.parquet")}), tmp_path)
    assert f"{tmp_path}/a.parquet" in said and "not readable as Parquet" in said


def test_a_missing_column(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", data={"label": "labels"}), tmp_path)
    assert "no column 'labels'" in said and "the file has id, image, label, true" in said and "data.label" in said


def test_an_empty_data_set(runfile: Make, digits: Digits, tmp_path: Path) -> None:
    empty = written(digits.table("train").slice(0, 0), tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": empty}), tmp_path)
    assert f"{empty}: holds no samples" in said


def test_a_label_outside_the_classes(runfile: Make, shared_workers: None, digits: Digits, tmp_path: Path) -> None:
    labels = digits.table("train")["label"].to_pylist()
    labels[5] = 17
    train = written(digits.table("train", label=pa.array(labels)), tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": train, "classes": 10}), tmp_path)
    assert f"{train}/part.parquet: label 17 at sample_id 5, but there are 10 classes (0..9)" in said
    assert "data.classes" in said


def test_weights_for_another_number_of_classes(runfile: Make, tmp_path: Path) -> None:
    torch.save(mlp(7).state_dict(), tmp_path / "seven.pt")
    said = refused(runfile(tmp_path / "run", model={"weights": str(tmp_path / "seven.pt")}), tmp_path)
    assert f"the weights in {tmp_path}/seven.pt do not fit the model" in said
    assert "head.weight (7, 128) for (10, 128)" in said


def test_weights_that_hold_pickled_objects(runfile: Make, tmp_path: Path) -> None:
    torch.save(mlp(10), tmp_path / "whole.pt")
    said = refused(runfile(tmp_path / "run", model={"weights": str(tmp_path / "whole.pt")}), tmp_path)
    assert f"{tmp_path}/whole.pt" in said and "state_dict" in said


def test_duplicate_ids(runfile: Make, shared_workers: None, digits: Digits, tmp_path: Path) -> None:
    ids = digits.table("train")["id"].to_pylist()
    ids[800] = 3
    train = written(digits.table("train", id=pa.array(ids)), tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": train}), tmp_path)
    assert f"{train}/part.parquet: sample_id 3 occurs twice in the train data" in said and "data.id" in said


def test_a_validation_set_that_shares_ids(runfile: Make, shared_workers: None, digits: Digits, tmp_path: Path) -> None:
    ids = digits.table("validation")["id"].to_pylist()
    ids[0] = 12
    validation = written(digits.table("validation", id=pa.array(ids)), tmp_path / "validation")
    said = refused(runfile(tmp_path / "run", data={"validation": validation}), tmp_path)
    assert "sample_id 12 is in both the train and the validation set" in said


def test_ids_that_begin_anew_in_each_set_may_be_shared(
    run: Callable[..., dict[str, Any]], digits: Digits, tmp_path: Path
) -> None:
    ids = pa.array(range(len(digits.splits["validation"])), pa.int64())
    validation = written(digits.table("validation", id=ids), tmp_path / "validation")
    summary = run(tmp_path / "run", data={"validation": validation, "id_scope": "set"}, removal={"max_rounds": 1})
    assert summary["rounds"] == 1


def test_an_unknown_key(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", removal={"budgte": 0.1}), tmp_path)
    assert "removal.budgte" in said and "removal.budget" in said


def test_weights_without_a_validation_set(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", data={"validation": None}), tmp_path)
    assert "a validation set the model has not seen is required" in said


def test_a_head_that_is_not_there(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", model={"head": "fc"}), tmp_path)
    assert "model.head 'fc' does not exist" in said and "head" in said


def test_a_layer_that_is_not_there(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", probe={"layers": ["hiden"]}), tmp_path)
    assert "probe.layers" in said and "layer 'hiden' does not exist" in said
    assert "the nearest that a probe can sit on: hidden" in said


def test_layers_of_a_model_that_ends_in_a_probe(runfile: Make, tmp_path: Path) -> None:
    raw = runfile(
        tmp_path / "run",
        data={"validation": None},
        model={
            "factory": "posttrain.vision.layers:probed",
            "weights": None,
            "arguments": {
                "network": "posttrain.vision.models:mlp",
                "layers": ["hidden"],
                "width": 256,
                "size": [1, 8, 8],
            },
        },
        probe={"layers": ["network.hidden"]},
    )
    assert "probe.layers names layers of a model that ends in a probe already" in refused(raw, tmp_path)


def test_only_one_class(runfile: Make, digits: Digits, tmp_path: Path) -> None:
    zeros = digits.table("train", label=pa.array([0] * len(digits.splits["train"])))
    train = written(zeros, tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": train}), tmp_path)
    assert "only one class" in said


def test_a_folder_that_holds_something_else(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(runfile(tmp_path / "run")))
    result = CliRunner().invoke(app, ["clean", str(file)])
    assert result.exit_code == 2
    assert "is not empty and holds no run" in result.stderr
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_a_label_column_that_holds_images(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", data={"label": "image"}), tmp_path)
    assert "column 'image' is binary; labels have to be integers or class names" in said


def test_a_label_column_that_holds_no_classes(runfile: Make, digits: Digits, tmp_path: Path) -> None:
    far = pa.array([1_700_000_000_000 + i for i in digits.splits["train"]])
    train = written(digits.table("train", label=far), tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": train}), tmp_path)
    assert "the labels go up to 1700000000899, with 900 samples" in said and "set data.classes" in said


def test_a_run_path_beneath_a_file(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raw = runfile(tmp_path / "file" / "run")
    assert f"{tmp_path}/file is a file; name a folder" in refused(raw, tmp_path)


def test_a_network_that_cannot_take_the_images(runfile: Make, tmp_path: Path) -> None:
    said = refused(
        runfile(tmp_path / "run", model={"factory": "resnet18", "weights": None}, data={"validation": None}), tmp_path
    )
    assert "the model cannot take a batch of shape (2, 1, 8, 8)" in said and "model.channels" in said


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address = 127\.0\.0\.1:1: nothing answers there"):
        refuse_unreachable("127.0.0.1:1")
