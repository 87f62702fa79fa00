from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from posttrain.errors import StepError, TrackingError
from posttrain.store.registry import CHALLENGER, CHAMPION, PREVIOUS, RUN, Registry, Version, is_unused
from posttrain.store.tracking import Tracking
from posttrain.vision import models
from posttrain.vision.weights import load_weights, to_bytes

IMAGE = {"channels": 1, "size": (8, 8), "mean": (0.5,), "std": (0.5,), "shape": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def logged(home: Path) -> Iterator[tuple[str, str, bytes]]:
    """(models:/m-..., its run's id, its weights)."""
    model = models.mlp(10)
    torch.nn.init.constant_(models.head_of(model, "head").bias, 7.0)
    (home / "w.safetensors").write_bytes(to_bytes(model))
    with Tracking.open(None, run_folder=home, experiment="e", run_name="r", params={}, tags={}) as tracking:
        uri = tracking.log_model(
            home / "w.safetensors",
            factory="posttrain.vision.models:mlp",
            arguments={},
            classes=10,
            head="head",
            image=IMAGE,
        )
        yield uri, tracking.run_id, (home / "w.safetensors").read_bytes()


@pytest.fixture
def registry(home: Path, request: pytest.FixtureRequest) -> Registry:
    """A registered model of its own for each test."""
    return Registry.open(None, home=home, name=request.node.name)


def aliases(registry: Registry) -> tuple[str | None, ...]:
    found = [registry.version(alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)]
    return tuple(version.number if version else None for version in found)


def register(registry: Registry, logged: tuple[str, str, bytes], run: str) -> Version:
    return registry.register(logged[0], run=run, run_id=logged[1], tags={"posttrain.base": "b"})


def test_a_model_that_nobody_registered_has_no_versions(registry: Registry) -> None:
    assert aliases(registry) == (None, None, None)
    assert registry.of_run("r") is None and registry.by_number("1") is None


def test_a_run_makes_one_version_however_often_it_registers(registry: Registry, logged: tuple[str, str, bytes]) -> None:
    made = [register(registry, logged, run) for run in ("a", "a", "b", "a")]
    assert [version.number for version in made] == ["1", "1", "2", "1"]
    assert made[0].tags == {RUN: "a", "posttrain.base": "b"}
    assert registry.by_number("2") == registry.of_run("b") == made[2]


def test_promotion_moves_the_champion_to_previous_and_may_be_repeated(
    registry: Registry, logged: tuple[str, str, bytes]
) -> None:
    first, second = (register(registry, logged, run) for run in "ab")
    for _ in range(2):
        registry.promote(first)
        assert aliases(registry) == ("1", None, None)
    for _ in range(2):
        registry.promote(second)
        assert aliases(registry) == ("2", "1", None)


def test_a_promotion_that_was_killed_half_way_ends_the_same(
    registry: Registry, logged: tuple[str, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (register(registry, logged, run) for run in "abc")
    registry.promote(first)
    registry.promote(second)
    point = Registry.point

    def dies(self: Registry, alias: str, number: str) -> None:
        if alias == CHAMPION:
            raise KeyboardInterrupt
        point(self, alias, number)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "point", dies)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(third)
    assert aliases(registry)[0] == "2"
    registry.promote(third)
    assert aliases(registry) == ("3", "2", None)


def test_a_version_comes_back_with_its_weights_and_what_builds_the_network(
    registry: Registry, logged: tuple[str, str, bytes], tmp_path: Path
) -> None:
    weights, recipe = registry.fetch(register(registry, logged, "a"), tmp_path)
    assert weights.read_bytes() == logged[2]
    assert recipe is not None
    assert {key: recipe[key] for key in ("factory", "arguments", "classes", "head")} == {
        "factory": "posttrain.vision.models:mlp",
        "arguments": {},
        "classes": 10,
        "head": "head",
    }
    model = models.build(recipe["factory"], classes=recipe["classes"], arguments=recipe["arguments"])
    load_weights(model, weights)
    assert (models.head_of(model, "head").bias == 7).all()


def test_a_database_is_unused_until_a_model_or_a_run_is_in_it(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    assert is_unused(database) and not database.exists()
    database.write_bytes(b"")  # killed before the first table
    assert is_unused(database)
    registry = Registry.open(None, home=tmp_path, name="m")
    assert registry.version(CHAMPION) is None and is_unused(database)
    MlflowClient(registry.uri, registry_uri=registry.uri).create_registered_model("m")
    assert not is_unused(database)


def test_what_mlflow_refuses_is_one_sentence_with_the_way_on(registry: Registry) -> None:
    with pytest.raises(StepError, match=r"did not answer when asked to make version 9 champion .*; start the same"):
        registry.point(CHAMPION, "9")


def test_a_server_that_is_not_there_is_said_before_any_work(home: Path) -> None:
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 cannot be used"):
        Registry.open("http://127.0.0.1:9", home=home, name="x")
