"""Wrong input: exit code 2, one sentence that names file, value and way out, and no run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from harness import bad_input
from small_data import Digits
from typer.testing import CliRunner

from posttrain.cli import app
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
def workshop(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> bad_input.Workshop:
    return bad_input.Workshop(tmp_path_factory.mktemp("bad_input"), mlflow_uri)


def of_the_table(refusal: bad_input.Refusal) -> str:
    return f"{refusal.kind} ({refusal.given})"


@pytest.mark.parametrize("refusal", [r for r in bad_input.REFUSALS if not r.reads], ids=of_the_table)
def test_what_the_table_calls_refused_is_refused_before_anything_is_read(
    refusal: bad_input.Refusal, workshop: bad_input.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    assert_refused(refusal, workshop)


@pytest.mark.parametrize("refusal", [r for r in bad_input.REFUSALS if r.reads], ids=of_the_table)
def test_what_the_table_calls_refused_on_reading_is_refused_then(
    refusal: bad_input.Refusal, workshop: bad_input.Workshop, shared_workers: None
) -> None:
    assert_refused(refusal, workshop)


def assert_refused(refusal: bad_input.Refusal, workshop: bad_input.Workshop) -> None:
    code, said, left = bad_input.refused(workshop, refusal)
    assert (code, left) == (2, []), said
    assert said.count("error: ") == 1 and "\n" not in said
    assert refusal.says in said


def test_rows_of_a_run_are_taken_or_quarantined_as_the_table_says(
    workshop: bad_input.Workshop, shared_workers: None, tmp_path: Path
) -> None:
    outcomes = bad_input.run_rows(workshop, tmp_path / "run")
    for row, found in zip(bad_input.ROWS, outcomes, strict=False):
        assert (found.kind, found.given) == (row.kind, row.given)
        if row.reason is None:
            assert (found.outcome, found.message) == ("taken", ""), row.given
        else:
            assert found.outcome == "quarantined" and found.message.startswith(row.reason), row.given
    assert all(found.outcome == "taken" for found in outcomes[len(bad_input.ROWS) :])


def test_the_table_has_the_kinds_that_it_promises() -> None:
    kinds = {entry.kind for entry in (*bad_input.ROWS, *bad_input.FILES, *bad_input.REFUSALS)}
    assert len(kinds) >= 60
    written = (Path(bad_input.__file__).parent / "results" / "bad_input.md").read_text(encoding="utf-8")
    # those that only Ray's reading finds may stand below the table
    assert not {kind for kind in kinds if f"| {kind} |" not in written and f"{kind} (" not in written}


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


def test_a_label_column_that_holds_images(runfile: Make, tmp_path: Path) -> None:
    said = refused(runfile(tmp_path / "run", data={"label": "image"}), tmp_path)
    assert "column 'image' is binary; labels have to be integers or class names" in said


def test_a_run_path_beneath_a_file(runfile: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raw = runfile(tmp_path / "file" / "run")
    assert f"{tmp_path}/file is a file; name a folder" in refused(raw, tmp_path)


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address = 127\.0\.0\.1:1: nothing answers there"):
        refuse_unreachable("127.0.0.1:1")
