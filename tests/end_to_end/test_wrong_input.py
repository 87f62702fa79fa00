"""Wrong input: exit code 2, one sentence that names file, value and way out, and no run folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from harness import RESULTS
from harness.bad_rows import FILES, ROWS, run_rows
from harness.refusals import REFUSALS, Refusal
from harness.refusals import refused as outcome_of
from harness.workshop import Workshop
from PIL import Image
from small_data import Digits, removed_ids
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.cluster import partitioning
from posttrain.cluster.session import refuse_unreachable
from posttrain.errors import ConfigError

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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("bad_input"), mlflow_uri)


def of_the_table(refusal: Refusal) -> str:
    return f"{refusal.kind} ({refusal.given})"


@pytest.mark.parametrize("refusal", [r for r in REFUSALS if not r.reads], ids=of_the_table)
def test_what_the_table_calls_refused_is_refused_before_anything_is_read(
    refusal: Refusal, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    assert_refused(refusal, workshop)


@pytest.mark.parametrize("refusal", [r for r in REFUSALS if r.reads], ids=of_the_table)
def test_what_the_table_calls_refused_on_reading_is_refused_then(
    refusal: Refusal, workshop: Workshop, shared_workers: None
) -> None:
    assert_refused(refusal, workshop)


def assert_refused(refusal: Refusal, workshop: Workshop) -> None:
    code, said, left = outcome_of(workshop, refusal)
    assert (code, left) == (2, []), said
    assert said.count("error: ") == 1 and "\n" not in said
    assert refusal.says in said


def test_rows_of_a_run_are_taken_or_quarantined_as_the_table_says(
    workshop: Workshop, shared_workers: None, tmp_path: Path
) -> None:
    outcomes = run_rows(workshop, tmp_path / "run")
    for row, found in zip(ROWS, outcomes, strict=False):
        assert (found.kind, found.given) == (row.kind, row.given)
        if row.reason is None:
            assert (found.outcome, found.message) == ("taken", ""), row.given
        else:
            assert found.outcome == "quarantined" and found.message.startswith(row.reason), row.given
    assert all(found.outcome == "taken" for found in outcomes[len(ROWS) :])


def test_the_table_has_the_kinds_that_it_promises() -> None:
    kinds = {entry.kind for entry in (*ROWS, *FILES, *REFUSALS)}
    assert len(kinds) >= 60
    written = (RESULTS / "bad_input.md").read_text(encoding="utf-8")
    assert not {kind for kind in kinds if f"| {kind} |" not in written}


def test_images_none_of_which_can_be_read(runfile: Make, shared_workers: None, digits: Digits, tmp_path: Path) -> None:
    cut = pa.array([image[:40] for image in digits.table("train")["image"].to_pylist()], pa.binary())
    data = {"train": written(digits.table("train", image=cut), tmp_path / "train")}
    raw = runfile(tmp_path / "run", data=data, model={"weights": None})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    result = CliRunner().invoke(app, ["clean", str(file)])
    assert result.exit_code == 1, result.output
    [said] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "of the images of a training worker 0 can be read, and two are needed" in said
    assert f"the first that cannot is {tmp_path}/train/part.parquet sample_id" in said
    assert "not an image in a known format (40 bytes" in said


def test_images_that_can_be_read_of_one_class_alone(
    runfile: Make, shared_workers: None, digits: Digits, tmp_path: Path
) -> None:
    table = digits.table("train")
    labels = table["label"].to_pylist()
    images = [
        image if label == 3 else image[:40] for image, label in zip(table["image"].to_pylist(), labels, strict=True)
    ]
    folder = written(table.set_column(1, "image", pa.array(images, pa.binary())), tmp_path / "data")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(runfile(tmp_path / "run", data={"train": folder})))
    result = CliRunner().invoke(app, ["clean", str(file)])
    assert result.exit_code == 2, result.output
    assert (
        f"data.train = {folder}: only one class (3) is left" in result.stderr and "quarantine.parquet" in result.stderr
    )


def in_alpha_alone(pixels: np.ndarray) -> bytes:
    """The image as a black one whose shape is in the alpha channel."""
    image = Image.new("RGBA", pixels.shape[::-1], "black")
    image.putalpha(Image.fromarray(255 - pixels))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def alpha_alone(digits: Digits, folder: Path, kind: str) -> dict[str, Any]:
    """The data section of digits whose shape is in the alpha channel alone."""
    names = ("train", "validation")
    folder.mkdir()
    for split in names:
        images = {i: in_alpha_alone(digits.images[i]) for i in digits.splits[split]}
        if kind == "parquet":
            pq.write_table(
                digits.table(split, image=pa.array(list(images.values()), pa.binary())), folder / f"{split}.parquet"
            )
            continue
        for i, image in images.items():
            own = folder / split / str(digits.given[i])
            own.mkdir(parents=True, exist_ok=True)
            (own / f"{i:04d}.png").write_bytes(image)
    found = {split: str(folder / (f"{split}.parquet" if kind == "parquet" else split)) for split in names}
    return {"source": kind, **found, "test": None, **({} if kind == "parquet" else {"true_label": None})}


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("parquet", True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("parquet", False), ("folder", True), ("folder", False))
        ),
    ],
)
def test_images_that_all_look_the_same(
    runfile: Make,
    shared_workers: None,
    digits: Digits,
    tmp_path: Path,
    kind: str,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not small:
        monkeypatch.setattr(partitioning, "SMALL_BYTES", 0)
    raw = runfile(tmp_path / "run", data=alpha_alone(digits, tmp_path / "data", kind), model={"background": 0})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    for _ in range(2):  # a second start says the same
        result = CliRunner().invoke(app, ["clean", str(file)])
        assert result.exit_code == 2, result.output
        [said] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (
            f"data.train = {raw['data']['train']}: the 900 training images that can be read all look the same" in said
        )
        assert "set data.image (image)" in said and "model.background (0)" in said
        assert not list((tmp_path / "run").rglob("removed.parquet")) and not (tmp_path / "run" / "cleaned").exists()


@pytest.mark.long
@pytest.mark.parametrize("small", [True, False])
def test_shapes_in_the_alpha_channel_alone_are_cleaned_as_any_others(
    run: Callable[..., dict[str, Any]],
    digits: Digits,
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not small:
        monkeypatch.setattr(partitioning, "SMALL_BYTES", 0)
    data = alpha_alone(digits, tmp_path / "data", "parquet")
    run(tmp_path / "run", data=data)
    # black where the alpha is, on white: the very digits
    assert removed_ids(tmp_path / "run") == removed_ids(undisturbed()["run"])


def test_a_missing_file(runfile: Make, tmp_path: Path) -> None:
    raw = runfile(tmp_path / "run", data={"train": str(tmp_path / "absent")})
    assert refused(raw, tmp_path) == (
        f"error: {tmp_path}/absent: no such file or folder; check data.train, data.validation, data.test"
    )


def test_a_folder_without_parquet(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused(runfile(tmp_path / "run", data={"train": str(tmp_path / "empty")}), tmp_path)
    assert f"{tmp_path}/empty: holds no .parquet file" in said


def test_a_missing_column(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", data={"label": "labels"}), tmp_path)
    assert "no column 'labels'" in said and "the file has id, image, label, true" in said and "data.label" in said


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


def test_a_layer_that_is_not_there(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", probe={"layers": ["hiden"]}), tmp_path)
    assert "probe.layers" in said and "layer 'hiden' does not exist" in said
    assert "the nearest that a probe can sit on: hidden" in said


def test_layers_of_a_model_that_ends_in_a_probe(runfile: Make, tmp_path: Path) -> None:
    raw = runfile(
        tmp_path / "run",
        data={"validation": None},
        model={
            "factory": "posttrain.vision.probed_network:build",
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


def test_a_folder_that_holds_something_else(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(runfile(tmp_path / "run")))
    result = CliRunner().invoke(app, ["clean", str(file)])
    assert result.exit_code == 2
    assert "is not empty and holds no run" in result.stderr
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_a_label_column_that_holds_images(runfile: Make, digits: Digits, tmp_path: Path) -> None:
    table = digits.table("train")
    train = written(table.set_column(2, "label", table["image"]), tmp_path / "train")
    said = refused(runfile(tmp_path / "run", data={"train": train}), tmp_path)
    assert "column 'label' is binary; labels have to be integers or class names" in said


def test_a_run_path_beneath_a_file(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raw = runfile(tmp_path / "file" / "run")
    assert f"{tmp_path}/file is a file; name a folder" in refused(raw, tmp_path)


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address = 127\.0\.0\.1:1: nothing answers there"):
        refuse_unreachable("127.0.0.1:1")
