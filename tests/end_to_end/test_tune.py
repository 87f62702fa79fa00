"""A search from end to end: shared features, early stops, the best recipe repeated, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_data import removed_ids, rounds

from posttrain.cluster.views import View
from posttrain.cluster.workers import Workers
from posttrain.config import RunFile, load
from posttrain.errors import ConfigError, RunFolderError
from posttrain.influence import probe
from posttrain.live import Live
from posttrain.runs.clean import clean
from posttrain.search.tune import tune
from posttrain.store.features import summarise_shard
from posttrain.store.folder import RunFolder

pytestmark = pytest.mark.ray

Runfile = Callable[..., dict[str, Any]]

# with seed 1: trial 0 as it is, 1 diverges, 2 refines heads on the last layer, 3 the network on the last layer
SPACE = {
    "refine.scope": {"choice": ["head", "network"]},
    "probe.layers": {"choice": ["auto", "last"]},
    "refine.learning_rate": {"choice": [0.001, 1e6]},
    "removal.budget": {"uniform": [0.03, 0.08]},
}


@pytest.fixture(scope="module")
def searched(shared_workers: None, runfile: Runfile, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFile, Any]:
    """A search of four trials, and its summary."""
    folder = tmp_path_factory.mktemp("search") / "search"
    raw = runfile(
        folder,
        run={"path": str(folder), "seed": 1},
        removal={"max_rounds": 2},
        refine={"augment": "crop"},
        search={"trials": 4, "space": SPACE, "grace_rounds": 2},
        tracking={"uri": None},
    )
    config = RunFile.model_validate(raw)
    return config, tune(config, quiet=True)


def trial_rounds(search: str, number: int) -> list[dict[str, Any]]:
    return rounds(Path(search) / "trials" / f"{number:04d}")


def test_every_image_goes_through_the_untouched_backbone_once_for_all_trials(searched: Any) -> None:
    _, summary = searched
    folder = RunFolder(summary["search"])
    (backbone,) = (folder.local / "features").iterdir()
    assert {split.name for split in backbone.iterdir()} == {"train", "validation"}
    embedded = 0
    for split in ("train", "validation"):
        for partition in range(4):
            found = summarise_shard(folder, folder.features(backbone.name, split, partition), partition)
            assert found is not None
            embedded += found.embedded
    assert embedded == 900 + 300
    written = max(path.stat().st_mtime_ns for path in backbone.rglob("*.parquet"))
    for trial in (folder.local / "trials").iterdir():
        assert (trial / "run.yaml").stat().st_mtime_ns > written
        # with `scope: network` it had some of its own, of refined backbones
        assert not list((trial / "features").rglob("*.parquet"))


def test_the_search_never_looks_at_the_test_set_or_at_true_labels(searched: Any) -> None:
    _, summary = searched
    for number in range(4):
        for done in trial_rounds(summary["search"], number):
            assert {"validation_accuracy", "validation_loss"} <= set(done["metrics"])
            assert not [name for name in done["metrics"] if "test" in name or name.startswith("removal_")]


def test_the_first_trial_is_the_run_file_as_it_is_and_the_best_is_no_worse(searched: Any) -> None:
    config, summary = searched
    record = yaml.safe_load((Path(summary["search"]) / "trials" / "0000" / "run.yaml").read_text())["config"]
    of_trial = RunFile.model_validate(record)
    assert (of_trial.probe, of_trial.removal, of_trial.refine) == (config.probe, config.removal, config.refine)
    assert [trial["how"] for trial in summary["trials"]][:2] == ["finished", "failed"]
    assert "training diverged" in summary["trials"][1]["ended"]
    finished = [trial for trial in summary["trials"] if trial["how"] == "finished"]
    best = summary["trials"][summary["best"]]
    assert best["validation_accuracy"] == max(trial["validation_accuracy"] for trial in finished)
    assert best["validation_accuracy"] >= summary["trials"][0]["validation_accuracy"]
    for trial in summary["trials"]:
        done = trial_rounds(summary["search"], trial["number"])
        acted = [of for of in done if of["removed"] + of["relabelled"]]
        assert (trial["rounds"], trial["validation_accuracy"]) == (
            len(acted),
            done[-1]["metrics"]["validation_accuracy"],
        )


def test_whoever_is_best_its_run_file_repeats_its_figures_exactly(searched: Any, tmp_path: Path) -> None:
    _, summary = searched
    best = Path(summary["files"]["best run file"])
    config = load(best)
    assert config.run.path == str(Path(summary["search"]) / "best")
    assert "search" not in yaml.safe_load(best.read_text())
    again = clean(config, quiet=True)
    of_trial = trial_rounds(summary["search"], summary["best"])
    assert [done["removed"] for done in rounds(again["run"])] == [done["removed"] for done in of_trial]
    assert again["validation_accuracy_after"] == of_trial[-1]["metrics"]["validation_accuracy"]
    assert sorted(removed_ids(again["run"])) == taken(summary["search"], summary["best"])


def taken(search: str, number: int) -> list[int]:
    """The ids that a trial removed."""
    import pyarrow.parquet as pq

    trial = Path(search) / "trials" / f"{number:04d}" / "rounds"
    there = [done["number"] for done in trial_rounds(search, number) if done["removed"]]
    tables = [pq.read_table(trial / f"{n:04d}" / "removed.parquet", columns=["sample_id"]) for n in there]
    return sorted(i for table in tables for i in table["sample_id"].to_pylist())


@pytest.mark.long
def test_a_network_refined_in_a_trial_is_bitwise_the_one_that_a_run_refines(searched: Any, tmp_path: Path) -> None:
    config, summary = searched
    values = summary["trials"][3]["values"]
    assert values["refine.scope"] == "network"
    of_trial = trial_rounds(summary["search"], 3)
    recipe = config.with_values({**values, "removal.max_rounds": of_trial[-1]["number"]})
    run = config.run.model_copy(update={"path": str(tmp_path / "run")})
    clean(recipe.model_copy(update={"run": run}), quiet=True)
    for done in of_trial:
        path = Path("rounds", f"{done['number']:04d}", "checkpoint", "model.safetensors")
        trial = Path(summary["search"], "trials", "0003")
        assert (tmp_path / "run" / path).read_bytes() == (trial / path).read_bytes()


def runs_beneath(client: Any, run_id: str, experiment: str) -> list[Any]:
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")


def test_mlflow_has_the_trials_beneath_the_search_and_the_rounds_beneath_the_trials(searched: Any) -> None:
    from mlflow import MlflowClient

    _, summary = searched
    client = MlflowClient(f"sqlite:///{summary['search']}/mlflow.db")
    parent = client.get_run(json.loads((Path(summary["search"]) / "tracking.json").read_text())["run_id"])
    trials = runs_beneath(client, parent.info.run_id, parent.info.experiment_id)
    assert sorted(str(run.info.run_name) for run in trials) == [f"trial {n:04d}" for n in range(4)]
    for run in trials:
        number = int(run.data.tags["posttrain.trial"])
        history = trial_rounds(summary["search"], number)
        beneath = runs_beneath(client, run.info.run_id, parent.info.experiment_id)
        assert sorted(str(r.info.run_name) for r in beneath) == [f"round {done['number']:04d}" for done in history]
        curve = client.get_metric_history(run.info.run_id, "validation_accuracy")
        assert [point.value for point in curve] == [done["metrics"]["validation_accuracy"] for done in history]
        assert run.info.status == ("FAILED" if number == 1 else "FINISHED")
    assert parent.info.status == "FINISHED"


def test_a_finished_search_says_so_and_shows_its_table(searched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config, summary = searched
    before = {path: path.stat().st_mtime_ns for path in Path(summary["search"]).rglob("*") if path.is_file()}
    assert tune(config) == summary
    shown = capsys.readouterr()
    assert "this search is finished" in shown.err
    assert f"posttrain clean {summary['files']['best run file']}" in shown.out
    assert {path: path.stat().st_mtime_ns for path in Path(summary["search"]).rglob("*") if path.is_file()} == before


def test_a_search_is_not_taken_for_a_run_nor_gone_on_with_under_other_settings(
    searched: Any, undisturbed: Any, runfile: Runfile
) -> None:
    config, _ = searched
    with pytest.raises(RunFolderError, match=r"holds a search \(of posttrain tune\) and no run"):
        clean(config, quiet=True)
    with pytest.raises(RunFolderError, match=r"holds a run \(of posttrain clean\) and no search"):
        tune(RunFile.model_validate(runfile(Path(undisturbed()["run"]))), quiet=True)
    more = config.search.model_copy(update={"trials": 5})
    with pytest.raises(RunFolderError, match=r"search with other settings \(search\.trials: 4 -> 5\)"):
        tune(config.model_copy(update={"search": more}), quiet=True)


def test_a_machine_that_cannot_carry_a_trial_is_named_at_once(shared_workers: None, runfile: Runfile, tmp_path: Path):
    raw = runfile(tmp_path / "search", ray={"cpus_per_worker": 64})
    with pytest.raises(ConfigError, match=r"a trial takes 64 CPUs of one node, and there is none .*2 CPUs and 0 GPUs"):
        tune(RunFile.model_validate(raw), quiet=True)
    assert not (tmp_path / "search").exists()


def test_a_process_by_itself_gives_bitwise_the_sums_of_a_pool(undisturbed: Any) -> None:
    folder = RunFolder(undisturbed()["run"])
    (backbone,) = (folder.local / "features").iterdir()
    view = View(folder, backbone.name, "train", (0, 1, 2, 3), Live(0), ("head",), None)
    width = 0
    found = []
    for count in (0, 2):
        workers = Workers(count=count, cpus=1, gpus=0, on_cluster=True)
        reduce = workers.reducer(view)
        sums = reduce(probe.moments)
        width = sums[1].numel()
        weights = torch.linspace(-1, 1, 10 * width).reshape(10, width)
        found.append([*sums, *reduce(probe.loss_gradient, weights)])
        workers.release()
    assert found[0][0] == 900 and width > 1
    assert all(torch.equal(alone, pooled) for alone, pooled in zip(*found, strict=True))


@pytest.mark.long
def test_a_search_that_is_killed_and_started_again_loses_and_repeats_nothing(
    shared_workers: None, runfile: Runfile, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    raw = runfile(
        folder,
        removal={"max_rounds": 4},
        refine={"augment": "crop"},
        search={
            "trials": 4,
            "space": {"removal.budget": {"uniform": [0.02, 0.05]}},
            "max_concurrent_trials": 1,
            "grace_rounds": 2,
        },
        ray={"num_cpus": 2},
        tracking={"uri": None},
    )
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "posttrain.cli", "tune", str(tmp_path / "search.yaml"), "--json"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        try:
            while not (half := half_done(folder)):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    before = {path: path.stat().st_mtime_ns for path in lasting(folder)}
    assert 0 < len(list(folder.glob("trials/*/trial.json"))) < 4
    raw["ray"].pop("num_cpus")
    summary = tune(RunFile.model_validate(raw), quiet=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert half in {path.parent for path in lasting(folder) if path.name == "trial.json"}
    assert [trial["how"] for trial in summary["trials"]].count("failed") == 0
    assert len(summary["trials"]) == 4 and summary["trials"][0]["how"] == "finished"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    parent = client.get_run(json.loads((folder / "tracking.json").read_text())["run_id"])
    trials = runs_beneath(client, parent.info.run_id, parent.info.experiment_id)
    assert sorted(str(run.info.run_name) for run in trials) == [f"trial {n:04d}" for n in range(4)]
    for run in trials:
        beneath = runs_beneath(client, run.info.run_id, parent.info.experiment_id)
        assert len(beneath) == len(trial_rounds(str(folder), int(run.data.tags["posttrain.trial"])))


def half_done(folder: Path) -> Path | None:
    """A trial with a committed round that is not at its end, while another one is."""
    ended = {path.parent for path in folder.glob("trials/*/trial.json")}
    begun = {path.parents[2] for path in folder.glob("trials/*/rounds/0001/round.json")}
    return next(iter(begun - ended), None) if ended else None


def lasting(folder: Path) -> list[Path]:
    """What a committed round, or a trial at its end, never writes again."""
    names = ("rounds/*/round.json", "rounds/*/removed.parquet", "trial.json")
    found = [path for name in names for path in folder.glob(f"trials/*/{name}")]
    return [path for path in found if path.name != "removed.parquet" or path.with_name("round.json").exists()]
