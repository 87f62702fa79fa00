"""Real runs in processes of their own, struck at seeded moments; the long version is `harness.faults`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness.comparison import differences, misplaced, tracked
from harness.faults import STEPS_OF, Arena

import posttrain

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("faults"), print)
    yield arena
    arena.close()


@pytest.mark.long
@pytest.mark.parametrize("kills", [6, 10])
def test_three_rounds_with_so_many_workers_killed_end_the_same_and_without_another_start(
    arena: Arena, kills: int
) -> None:
    outcome = arena.struck("workers", 0, kills)
    assert (outcome.different, outcome.lost, outcome.left_behind) == ([], 0, 0)
    assert [kill.target for kill in outcome.kills] == ["worker"] * kills
    assert outcome.starts == 1
    assert len({kill.step for kill in outcome.kills}) >= 4


@pytest.mark.long
def test_a_run_whose_driver_and_workers_are_killed_ends_the_same_when_it_is_started_again(arena: Arena) -> None:
    outcome = arena.struck("head", 1, kills=4)
    assert (outcome.different, outcome.lost, outcome.left_behind) == ([], 0, 0)
    killed = [kill.target for kill in outcome.kills]
    assert "driver" in killed and outcome.starts - outcome.by_itself == 1 + killed.count("driver")


def test_the_steps_that_are_struck_are_those_of_the_product() -> None:
    source = "".join(path.read_text() for path in Path(posttrain.__file__).parent.rglob("*.py"))
    names = {name.removesuffix(" validation") for names in STEPS_OF.values() for name in names}
    assert {name for name in names if f'"{name}"' not in source} == set()


# -- the comparison itself ---------------------------------------------------------------------------------


@pytest.fixture
def copy(arena: Arena, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the undisturbed run, to be spoiled, and the run."""
    run, _, _ = arena.undisturbed("head")
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy", run


@pytest.mark.long
def test_a_run_is_like_itself(copy: tuple[Path, Path]) -> None:
    spoiled, run = copy
    assert differences(spoiled, run) == []
    assert misplaced(spoiled) == 0
    assert tracked(run, run / "mlflow.db") == []


@pytest.mark.long
def test_one_bit_of_the_weights_or_the_scores_is_a_difference(copy: tuple[Path, Path]) -> None:
    spoiled, run = copy
    for name in ("model.safetensors", "rounds/0002/scores.parquet"):
        content = bytearray((spoiled / name).read_bytes())
        content[-9] ^= 1
        (spoiled / name).write_bytes(content)
    assert differences(spoiled, run) == ["weights", "scores of round 0002"]


@pytest.mark.long
def test_what_a_writer_that_died_left_is_a_difference(copy: tuple[Path, Path]) -> None:
    spoiled, run = copy
    (spoiled / "cleaned" / "part-00000.parquet.1234.tmp").touch()
    (spoiled / "rounds" / "0003" / "round.json").unlink()
    assert differences(spoiled, run) == ["committed rounds", "cleaned/part-00000.parquet.1234.tmp left behind"]


@pytest.mark.long
def test_a_sample_in_no_place_or_in_two_is_counted(copy: tuple[Path, Path]) -> None:
    spoiled, _ = copy
    path = spoiled / "manifest.parquet"
    manifest = pq.read_table(path)
    removed = pq.read_table(spoiled / "removed.parquet")
    pq.write_table(manifest.slice(1), path)
    # the one that is nowhere is also among the images, for which no one vouches
    assert misplaced(spoiled) == 2
    pq.write_table(manifest, path)
    pq.write_table(removed.slice(0, removed.num_rows - 2), spoiled / "removed.parquet")
    assert misplaced(spoiled) == 2


@pytest.mark.long
def test_a_round_that_mlflow_holds_twice_or_not_to_its_end_is_a_difference(copy: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    spoiled, run = copy
    database = spoiled / "mlflow.db"
    client = MlflowClient(f"sqlite:///{database}")
    [experiment] = [found for found in client.search_experiments() if found.name == "posttrain"]
    runs = client.search_runs([experiment.experiment_id])
    [round_two] = [one for one in runs if one.info.run_name == "round 0002"]
    client.create_run(experiment.experiment_id, run_name="round 0002", tags=round_two.data.tags)
    assert tracked(run, database) == [
        "MLflow holds ['round 0000', 'round 0001', 'round 0002', 'round 0002', 'round 0003']",
        "round 0002 is RUNNING",
    ]
    client.create_run(experiment.experiment_id, run_name="another", tags={"posttrain.run": str(run)})
    assert tracked(run, database)[-1] == "2 parents in MLflow"
