"""Which layers draw the boundary, what that costs, and the model that comes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_data import BOTH, NETWORK, Digits, accuracy, as_built, assert_same_result, png, removed_ids, rounds

from posttrain.config import RunFile

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Sections = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def memorised(run: Run, resnet: Sections, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run on a ResNet that has memorised its labels; beside its folder, in `said`, what it wrote."""
    folder = tmp_path_factory.mktemp("memorised")
    with (folder / "said").open("w") as said, redirect_stderr(said):
        return run(folder / "run", **resnet, removal={"max_rounds": 2}, tracking={"log_model": True})


def images_embedded(log: str) -> dict[str, int]:
    """By split, the images that went through a network, from the lines that a run writes."""
    found = {"train": 0, "validation": 0, "test": 0}
    for split, count in re.findall(r"^  round \d+  embed ?(\w*) +([\d,]+) samples", log, flags=re.M):
        found[split or "train"] += int(count.replace(",", ""))
    return found


def test_early_layers_of_a_memorised_network_draw_the_boundary_and_repair_it(memorised: dict[str, Any]) -> None:
    # the first member is the best of all; which others there are depends on how a processor rounds while it trains
    layers = [member["layer"] for member in memorised["boundary"]["members"]]
    assert layers[0] in ("input", "relu", "stage1", "stage2")
    assert memorised["removal_precision"] >= 0.95
    assert memorised["test_accuracy_before"] <= 0.85
    assert memorised["test_accuracy_after"] >= memorised["test_accuracy_before"] + 0.1
    assert memorised["test_accuracy_after"] >= memorised["test_accuracy_refit"] + 0.05


def test_the_network_is_cut_behind_its_members_and_built_from_the_written_section_alone(
    memorised: dict[str, Any], large_digits: Digits
) -> None:
    model = as_built(memorised["run"])
    needed = {member["layer"] for member in memorised["boundary"]["members"]} & {"stage3", "head"}
    assert any(name.startswith("network.stage3.") for name in model.state_dict()) == bool(needed)
    labels = torch.from_numpy(large_digits.true[list(large_digits.splits["test"])])
    found = accuracy(model, large_digits.inputs("test"), labels)
    # features are stored as float16
    assert memorised["test_accuracy_after"] == pytest.approx(found, abs=0.005)


def test_a_run_takes_the_written_section_and_evaluates_the_model_as_the_former_did(
    run: Run, memorised: dict[str, Any], resnet: Sections, tmp_path: Path
) -> None:
    section = yaml.safe_load((Path(memorised["run"]) / "model.yaml").read_text())["model"]
    summary = run(tmp_path / "run", data=resnet["data"], model=section, removal={"max_rounds": 1})
    # the probe's features are stored as float16 once more
    for split in ("validation", "test"):
        assert summary[f"{split}_accuracy_before"] == pytest.approx(memorised[f"{split}_accuracy_after"], abs=0.005)
    assert [member["layer"] for member in summary["boundary"]["members"]] == ["probe"]
    assert summary["removed"] > 0 and summary["removal_precision"] >= 0.95
    own = yaml.safe_load((tmp_path / "run" / "model.yaml").read_text())["model"]
    assert {**own, "weights": ""} == {**section, "weights": ""}
    assert as_built(tmp_path / "run")(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_the_model_in_mlflow_gives_the_same_predictions(
    memorised: dict[str, Any], large_digits: Digits, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow import MlflowClient

    run_id = json.loads((Path(memorised["run"]) / "tracking.json").read_text())["run_id"]
    outputs = MlflowClient(mlflow_uri).get_run(run_id).outputs
    assert outputs is not None
    [logged] = outputs.model_outputs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    served = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    some = list(large_digits.splits["test"])[:64]
    expected = as_built(memorised["run"])(large_digits.inputs("test")[:64]).softmax(dim=1).detach().numpy()
    found = served.predict([png(large_digits.images[i]) for i in some])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_choice_is_kept_in_the_round_in_the_summary_and_in_mlflow(
    memorised: dict[str, Any], mlflow_uri: str
) -> None:
    from mlflow import MlflowClient

    folder = Path(memorised["run"])
    assert sorted(path.parent.name for path in folder.glob("rounds/*/probes.json")) == ["0000"]
    kept = json.loads((folder / "rounds" / "0000" / "probes.json").read_text())
    told = memorised["boundary"]
    assert [(m["layer"], m["l2"]) for m in told["members"]] == [tuple(member) for member in kept["members"]]
    assert [tuple(row.values()) for row in told["tried"]] == [tuple(row) for row in kept["tried"]]
    layers = ("input", "relu", "stage1", "stage2", "stage3", "head")
    expected = {(layer, l2) for layer in layers for l2 in RunFile().probe.l2}
    assert {(row["layer"], row["l2"]) for row in told["tried"]} == expected
    # each member is its layer's best, and the first one the best of all
    best = {layer: min(r["validation_loss"] for r in told["tried"] if r["layer"] == layer) for layer in layers}
    losses = {(row["layer"], row["l2"]): row["validation_loss"] for row in told["tried"]}
    of_members = [losses[member["layer"], member["l2"]] for member in told["members"]]
    assert of_members == [best[member["layer"]] for member in told["members"]]
    assert of_members[0] == min(best.values())
    client = MlflowClient(mlflow_uri)
    run_id = json.loads((folder / "tracking.json").read_text())["run_id"]
    parent = client.get_run(run_id)
    nested = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    with_choice = {
        r.info.run_name: {a.path for a in client.list_artifacts(r.info.run_id)} & {"probes.json", "removed.parquet"}
        for r in nested
    }
    assert with_choice == {
        "round 0000": {"probes.json"},
        "round 0001": {"removed.parquet"},
        "round 0002": {"removed.parquet"},
    }
    assert "model.yaml" in {a.path for a in client.list_artifacts(run_id)}


def test_all_layers_are_embedded_in_one_pass_and_never_again_while_the_backbone_stays(
    memorised: dict[str, Any],
) -> None:
    folder = Path(memorised["run"])
    assert images_embedded((folder.parent / "said").read_text()) == {"train": 900, "validation": 300, "test": 597}
    assert len(list((folder / "features").iterdir())) == 1


@pytest.mark.long
def test_a_trained_network_is_embedded_once_and_its_layers_are_chosen_anew_in_each_round(
    run: Run, resnet: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(tmp_path / "run", **resnet, removal={"max_rounds": 3, "patience": 3}, refine=NETWORK)
    live = [done["live"] for done in rounds(tmp_path / "run")]
    assert len(live) == 4
    # the network of the last round is evaluated, but no further round wants its training features
    assert images_embedded(capsys.readouterr().err) == {"train": sum(live[:-1]), "validation": 1200, "test": 4 * 597}
    choices = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/rounds/*/probes.json")}
    # round 1 works on the network of round 0
    assert sorted(choices) == ["0000", "0002", "0003"]
    assert len({choice["backbone"] for choice in choices.values()}) == 3
    # later on, every layer is tried with the l2 that was best for it
    tried = [(layer, l2) for layer, l2, _, _ in choices["0000"]["tried"]]
    loss = {(layer, l2): value for layer, l2, value, _ in choices["0000"]["tried"]}
    best = {layer: min((loss[pair], pair[1]) for pair in tried if pair[0] == layer)[1] for layer, _ in tried}
    for number in ("0002", "0003"):
        assert {(layer, l2) for layer, l2, _, _ in choices[number]["tried"]} == set(best.items())
    assert [m["layer"] for m in summary["boundary"]["members"]] == [m[0] for m in choices["0003"]["members"]]


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 4])
def test_a_boundary_on_early_layers_is_the_same_for_any_number_of_workers(
    run: Run, memorised: dict[str, Any], resnet: Sections, tmp_path: Path, workers: int
) -> None:
    run(tmp_path / "run", **resnet, removal={"max_rounds": 2}, ray={"workers": workers})
    assert_same_result(tmp_path / "run", memorised["run"])


@pytest.mark.long
def test_the_last_layer_alone_keeps_the_network_as_it_is_built(run: Run, resnet: Sections, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", **resnet, probe={"layers": "last"}, removal={"max_rounds": 1})
    assert {row["layer"] for row in summary["boundary"]["tried"]} == {"head"}
    assert [member["layer"] for member in summary["boundary"]["members"]] == ["head"]
    before, after = torch.load(resnet["model"]["weights"]), as_built(tmp_path / "run").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.long
def test_layers_may_be_named(run: Run, resnet: Sections, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", **resnet, probe={"layers": ["stage2", "stage1"]}, removal={"max_rounds": 1})
    assert {row["layer"] for row in summary["boundary"]["tried"]} == {"stage1", "stage2"}
    assert {member["layer"] for member in summary["boundary"]["members"]} <= {"stage1", "stage2"}
    assert summary["removed"] == len(removed_ids(tmp_path / "run")) > 0
    assert summary["test_accuracy_refit"] is not None
    assert not any(name.startswith("network.stage3.") for name in as_built(tmp_path / "run").state_dict())


@pytest.mark.long
def test_no_more_than_the_given_share_goes_in_all_rounds_together(run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", removal={"max_share": 0.03, "budget": 0.02, "max_rounds": 10})
    assert [done["removed"] for done in rounds(tmp_path / "run")] == [0, 18, 9]
    assert summary["removed"] == len(removed_ids(tmp_path / "run")) == 27
    assert summary["ended"].startswith(
        "27 samples were removed or relabelled, as many as removal.max_share = 0.03 allows"
    )


@pytest.mark.long
def test_where_removal_share_is_0_nothing_goes(run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", removal={"max_share": 0.0})
    assert (summary["removed"], summary["live"]) == (0, 900)
    assert summary["ended"].startswith("nothing is removed: removal.max_share = 0;")
    assert summary["validation_accuracy_after"] >= summary["validation_accuracy_before"]


@pytest.mark.parametrize(
    ("refine", "committed"),
    [
        pytest.param({}, 1, id="head"),
        pytest.param(BOTH, 1, id="both"),
        pytest.param(NETWORK, 0, id="network"),
    ],
)
@pytest.mark.long
def test_where_nothing_goes_a_boundary_that_is_clearly_better_becomes_the_head(
    run: Run, resnet: Sections, tmp_path: Path, refine: dict[str, Any], committed: int
) -> None:
    summary = run(tmp_path / "run", **resnet, removal={"max_share": 0.0}, refine=refine)
    assert (summary["removed"], summary["rounds"]) == (0, 0)
    assert len(rounds(tmp_path / "run")) == 1 + committed
    gained = summary["test_accuracy_after"] - summary["test_accuracy_before"]
    assert gained > 0.1 if committed else gained == 0


@pytest.mark.long
def test_wrong_labels_are_found_where_somebody_has_looked_through_the_validation_set(
    run: Run, digits: Digits, tmp_path: Path
) -> None:
    right = pa.array(digits.true[list(digits.splits["validation"])])
    pq.write_table(digits.table("validation", label=right), tmp_path / "validation.parquet")
    summary = run(tmp_path / "run", data={"validation": str(tmp_path / "validation.parquet")})
    assert summary["noise"]["found"] and summary["noise"]["low"] < 0.2 < summary["noise"]["high"]
    assert summary["removed"] > 100 and summary["removal_precision"] > 0.9
    assert summary["test_accuracy_after"] > summary["test_accuracy_before"]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_clean_digits_lose_nothing_and_a_network_that_is_good_stays_as_it_is(
    run: Run, tmp_path: Path, mlflow_uri: str, seed: int
) -> None:
    from posttrain.runs.clean import clean

    config = RunFile.model_validate(
        {
            "run": {"path": str(tmp_path / "run"), "seed": seed},
            "data": {"noise": None},
            "ray": {"workers": 2},
            "tracking": {"uri": mlflow_uri, "log_model": False},
        }
    )
    summary = clean(config, quiet=True)
    assert summary["removed"] == summary["relabelled"] == 0
    assert re.search(r"of the \d+ validation samples .* no more than in a clean set", summary["ended"])
    assert summary["noise"]["found"] is False and summary["noise"]["rate"] == 0
    assert summary["validation_accuracy_after"] >= summary["validation_accuracy_before"]
    pretrained = (tmp_path / "run" / "pretrained" / "model.safetensors").read_bytes()
    untouched = (tmp_path / "run" / "model.safetensors").read_bytes() == pretrained
    assert summary["rounds"] == 0 and untouched == (len(rounds(tmp_path / "run")) == 1)
    kept = pq.read_table(tmp_path / "run" / "manifest.parquet")
    assert kept.num_rows == summary["live"]
