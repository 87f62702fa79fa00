"""The main job on a GPU gives what it gives on the CPU, whoever trains, and says which GPU it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import NETWORK, removed_ids

from posttrain.config import RunFile

pytestmark = [pytest.mark.ray, pytest.mark.gpu]

Clean = Callable[..., tuple[dict[str, Any], str]]
Made = Callable[..., dict[str, Any]]


@pytest.fixture
def clean(
    shared_workers: None,
    runfile: Made,
    resnet: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Clean:
    """A run on the small ResNet: its summary, and what it printed."""

    def run(**sections: Any) -> tuple[dict[str, Any], str]:
        from posttrain.runs.clean import clean

        summary = clean(RunFile.model_validate(runfile(tmp_path / "gpu", **{**resnet, **sections})))
        printed = capsys.readouterr()
        return summary, printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def on_cpu(run: Made, resnet: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The summary of a run on the CPU, by its section `refine`."""
    summaries: dict[str, dict[str, Any]] = {}

    def get(**refine: Any) -> dict[str, Any]:
        key = str(refine)
        if key not in summaries:
            without = {"gpus_per_worker": 0, "gpus_per_train_worker": 0}
            summaries[key] = run(tmp_path_factory.mktemp("cpu") / "run", **resnet, refine=refine, ray=without)
        return summaries[key]

    return get


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 2])
def test_scores_of_a_gpu_remove_what_those_of_the_cpu_remove(
    clean: Clean, on_cpu: Made, workers: int, precision: str
) -> None:
    found, printed = clean(ray={"workers": workers, "precision": precision})
    assert f"embed: on {torch.cuda.get_device_name()}\n" in printed
    one, other = (set(removed_ids(summary["run"])) for summary in (found, on_cpu()))
    # features are rounded otherwise: what is at the edge of a round's budget may change places
    assert len(one & other) >= 0.95 * max(len(one), len(other))
    assert found["test_accuracy_after"] == pytest.approx(on_cpu()["test_accuracy_after"], abs=0.02)


@pytest.mark.parametrize(
    "training",
    [
        {"train_workers": 0},
        {"train_workers": 1},
        {"train_workers": 2},
    ],
    ids=["driver", "one worker", "two that share it"],
)
def test_training_on_a_gpu_learns_what_the_cpu_learns(clean: Clean, on_cpu: Made, training: dict[str, Any]) -> None:
    found, printed = clean(refine=NETWORK, ray={"workers": 1, **training})
    assert f"steps on {torch.cuda.get_device_name()}, accuracy" in printed
    wanted = on_cpu(**NETWORK)
    assert found["removal_precision"] == pytest.approx(wanted["removal_precision"], abs=0.05)
    assert found["test_accuracy_after"] == pytest.approx(wanted["test_accuracy_after"], abs=0.05)


def test_a_second_worker_that_asks_for_the_only_gpu_is_refused(clean: Clean) -> None:
    from posttrain.errors import ConfigError

    workers = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=r"ray\.gpus_per_worker = 1 is too much for"):
        clean(ray={"workers": workers, "gpus_per_worker": 1})
