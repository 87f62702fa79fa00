"""The main job on a GPU gives what it gives on the CPU, whoever trains, and the GPU is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import NETWORK, removed_ids

pytestmark = [pytest.mark.ray, pytest.mark.gpu]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def on_cpu(run: Run, resnet: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The summary of a run on the CPU, by its section `refine`."""
    summaries: dict[str, dict[str, Any]] = {}

    def get(**refine: Any) -> dict[str, Any]:
        key = str(refine)
        if key not in summaries:
            without = {"gpus_per_worker": 0, "gpus_per_train_worker": 0}
            summaries[key] = run(tmp_path_factory.mktemp("cpu") / "run", **resnet, refine=refine, ray=without)
        return summaries[key]

    return get


@contextmanager
def memory_of_others() -> Iterator[Callable[[], int]]:
    """Bytes of the GPU that other processes took at most in here."""
    torch.zeros(1, device="cuda")
    most, over = [0], threading.Event()

    def watch() -> None:
        free, total = torch.cuda.mem_get_info()
        before = total - free - torch.cuda.memory_reserved()
        while not over.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free - torch.cuda.memory_reserved() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 2])
def test_scores_of_a_gpu_remove_what_those_of_the_cpu_remove(
    run: Run, on_cpu: Run, resnet: dict[str, dict[str, Any]], tmp_path: Path, workers: int, precision: str
) -> None:
    with memory_of_others() as taken:
        on_gpu = run(tmp_path / "gpu", **resnet, ray={"workers": workers, "precision": precision})
    # a CUDA context alone takes more
    assert taken() > 100 * 2**20
    wanted = on_cpu()
    one, other = (set(removed_ids(summary["run"])) for summary in (on_gpu, wanted))
    # features are rounded otherwise: what is at the edge of a round's budget may change places
    assert len(one & other) >= 0.95 * max(len(one), len(other))
    assert on_gpu["test_accuracy_after"] == pytest.approx(wanted["test_accuracy_after"], abs=0.02)


@pytest.mark.parametrize(
    "training",
    [
        {"train_workers": 0},
        {"train_workers": 1},
        {"train_workers": 2, "gpus_per_train_worker": 0.5},
    ],
    ids=["driver", "one worker", "two that share it"],
)
def test_training_on_a_gpu_learns_what_the_cpu_learns(
    run: Run, on_cpu: Run, resnet: dict[str, dict[str, Any]], tmp_path: Path, training: dict[str, Any]
) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    on_gpu = run(tmp_path / "gpu", **resnet, refine=NETWORK, ray={"workers": 1, **training})
    in_driver = torch.cuda.max_memory_allocated() > before + 2**20
    assert in_driver == (training["train_workers"] == 0)
    wanted = on_cpu(**NETWORK)
    assert on_gpu["removal_precision"] == pytest.approx(wanted["removal_precision"], abs=0.05)
    assert on_gpu["test_accuracy_after"] == pytest.approx(wanted["test_accuracy_after"], abs=0.04)


def test_a_second_worker_that_asks_for_the_only_gpu_is_refused(run: Run, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    there = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=r"ray\.gpus_per_worker = 1 is too much for"):
        run(tmp_path / "run", ray={"workers": there + 1, "gpus_per_worker": 1})
