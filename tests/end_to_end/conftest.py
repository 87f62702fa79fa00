"""One MLflow store for the whole session; small real data sets on disk; runs that many tests look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_data import BOTH, NETWORK, Digits, memorise

from posttrain.config import RunFile


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def shared_workers(ray_session: None) -> Iterator[None]:
    """The real pools, one per number of workers and GPUs, kept over the tests: a new process takes seconds to import
    torch.

    The processes of one at a time: each takes half a gigabyte.
    """
    from posttrain.cluster import workers

    real, pools = workers.Workers, {}

    def kept(*, count: int | None, gpus: float | None, **options: Any) -> Any:
        own = (count, gpus)
        if own not in pools:
            pools[own] = real(count=count, gpus=gpus, **options)
        for other, pool in pools.items():
            if other != own:
                pool.release()
        return pools[own]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "Workers", kept)
        yield


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="session")
def digits_parquet(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, validation and test as Parquet, and `weights.pt` of a network that has memorised the train labels."""
    import torch

    from posttrain.vision.models import mlp

    folder = tmp_path_factory.mktemp("digits")
    digits.write(folder)
    torch.manual_seed(0)
    memorise(digits, mlp(10), folder / "weights.pt", epochs=300)
    return folder


@pytest.fixture(scope="session")
def large_digits() -> Digits:
    """Digits of 16 pixels a side."""
    return Digits(enlarged=2)


@pytest.fixture(scope="session")
def resnet(large_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The sections `data` and `model` of a small ResNet that has memorised its labels."""
    import torch

    from posttrain.vision.models import small_resnet

    folder = tmp_path_factory.mktemp("large_digits")
    large_digits.write(folder)
    arguments = {"width": 8, "channels": 1, "stem_stride": 2}
    torch.manual_seed(0)
    memorise(large_digits, small_resnet(10, **arguments), folder / "weights.pt", epochs=40)
    return {
        "data": {split: str(folder / split) for split in large_digits.splits},
        "model": {
            "factory": "posttrain.vision.models:small_resnet",
            "arguments": arguments,
            "image_size": 16,
            "weights": str(folder / "weights.pt"),
        },
    }


@pytest.fixture(scope="session")
def runfile(digits_parquet: Path, mlflow_uri: str) -> Callable[..., dict[str, Any]]:
    """A run file (as nested mappings) on the digits in Parquet; keywords replace keys of its sections."""

    def make(path: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "run": {"path": str(path)},
            "data": {
                "source": "parquet",
                **{split: str(digits_parquet / split) for split in ("train", "validation", "test")},
                "true_label": "true",
            },
            "model": {
                "factory": "posttrain.vision.models:mlp",
                "channels": 1,
                "image_size": 8,
                "weights": str(digits_parquet / "weights.pt"),
            },
            "removal": {"max_rounds": 3},
            "refine": {"scope": "head"},
            "ray": {"workers": 2},
            "tracking": {"uri": mlflow_uri, "log_model": False},
        }
        for section, keys in sections.items():
            raw[section] = {**raw.get(section, {}), **keys}
        return raw

    return make


@pytest.fixture(scope="session")
def run(shared_workers: None, runfile: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Runs `posttrain clean` in this process into a folder; keywords replace keys of the run file's sections."""

    def clean(path: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        from posttrain.runs.clean import clean

        return clean(RunFile.model_validate(runfile(path, **sections)), quiet=True)

    return clean


@pytest.fixture(scope="session")
def undisturbed(
    run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The summary of a run of three rounds that nothing disturbed, by its `refine.scope`."""
    summaries: dict[str, dict[str, Any]] = {}

    def get(scope: str = "head") -> dict[str, Any]:
        if scope not in summaries:
            path = tmp_path_factory.mktemp("undisturbed") / scope
            summaries[scope] = run(path, refine={"head": {}, "network": NETWORK, "both": BOTH}[scope])
        return summaries[scope]

    return get
