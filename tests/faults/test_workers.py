"""Actors that are killed while they embed, sum and score; real processes of a real Ray."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError

from posttrain.cluster.network import Network
from posttrain.cluster.partitioning import Partition, Split
from posttrain.cluster.pool import CRASHES_OF_A_CALL, Crashed, Pool
from posttrain.cluster.scoring import scores_digest
from posttrain.cluster.views import View
from posttrain.cluster.workers import Workers
from posttrain.errors import StepError
from posttrain.influence import curvature, ensemble, probe
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.score_round import ScoringPlan
from posttrain.live import Live, Rows
from posttrain.runs.stored_samples import StoredSamples
from posttrain.schema import FILE, IMAGE, LABEL, SAMPLE_ID, ImageSpec, ModelSpec
from posttrain.store.features import ShardSummary, read_shard, summarise_shard
from posttrain.store.folder import RunFolder
from posttrain.store.scores import ScoreShards
from posttrain.vision import models
from posttrain.vision.weights import to_bytes, weights_digest

pytestmark = pytest.mark.ray

UNIT = torch.eye(10, dtype=torch.float64)
NOISE_MODEL = NoiseModel(
    1.0, 0.0, NoiseEstimate(0.0, 0.0, 0.1, 0.0, 0, 100, False), 0.0, 0.1, 0.1, UNIT, UNIT, 0 * UNIT
)


class Adder:
    """An actor of the pool; the calls that crash it leave a file each time."""

    def ready(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def add(self, a: int, b: int) -> int:
        return a + b

    def memory_runs_out(self, log: str) -> int:
        """The first time, what Ray raises for an actor that it ended because its node ran out of memory."""
        try:
            Path(log).touch(exist_ok=False)
        except FileExistsError:
            return -1
        raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")

    def crashes(self, log: str, times: int) -> int:
        with Path(log).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if len(Path(log).read_text().splitlines()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return -1


@pytest.fixture
def pool(ray_session: None) -> Iterator[Pool]:
    # no other process can import a test
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = Pool(lambda reserving: ray.remote(Adder).options(num_cpus=0).remote(), 2)
    yield pool
    pool.release()


def sums(count: int) -> list[Callable[[Any], Any]]:
    return [lambda actor, i=i: actor.add.remote(i, i) for i in range(count)]


def test_an_actor_that_ran_out_of_memory_is_replaced(pool: Pool, tmp_path: Path) -> None:
    lines: list[str] = []
    pool.say = lines.append
    list(pool.each(sums(2)))
    while len(pool.ready()) < 2:
        time.sleep(0.05)
        list(pool.each(sums(1)))
    assert pool.ask(lambda actor: actor.memory_runs_out.remote(str(tmp_path / "asked"))) == [-1]
    calls = [*sums(3), lambda actor: actor.memory_runs_out.remote(str(tmp_path / "called"))]
    assert list(pool.each(calls)) == [0, 2, 4, -1]
    assert lines == ["a worker process was lost (out of memory); another takes its place"]


@pytest.mark.long
def test_more_crashes_than_one_call_may_cause_end_nothing_where_they_are_of_different_calls(
    pool: Pool, tmp_path: Path
) -> None:
    lines: list[str] = []
    pool.say = lines.append
    calls = sums(12)
    for at in range(0, 12, 2):
        log = str(tmp_path / f"{at}")
        calls[at] = lambda actor, log=log: actor.crashes.remote(log, 1)
    found = list(pool.each(calls))
    assert found == [-1 if at % 2 == 0 else 2 * at for at in range(12)]
    pids = {pid for path in tmp_path.iterdir() for pid in path.read_text().splitlines()[:1]}
    assert len(pids) == len(lines) == 6 > CRASHES_OF_A_CALL
    assert lines[0] == "a worker process was lost (killed, crashed, or out of memory); another takes its place"


def test_a_call_that_crashes_every_process_is_given_up_with_what_to_do(pool: Pool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    calls = [lambda actor: actor.crashes.remote(str(log), 100), *sums(3)]
    with pytest.raises(StepError, match=r"the same piece of work ended 5 worker processes .* start the same command"):
        list(pool.each(calls))
    pids = log.read_text().splitlines()
    assert len(pids) == len(set(pids)) == CRASHES_OF_A_CALL


@pytest.mark.long
def test_a_call_that_may_be_given_up_leaves_the_others_alone(pool: Pool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    calls = [*sums(3), lambda actor: actor.crashes.remote(str(log), 100), *sums(3)]
    found = list(pool.each(calls, max_crashes=2))
    assert found == [0, 2, 4, Crashed("killed, crashed, or out of memory"), 0, 2, 4]
    # the first time it may have been the call before it, whose answer was still on its way
    assert 2 <= len(log.read_text().splitlines()) <= 3


# -- embedding ---------------------------------------------------------------------------------------------

SPEC = ModelSpec("fatal_network:network", {}, 10, "4", ImageSpec(1, (8, 8), (0.0,), (1.0,), (8, 8)), ("input", "4"), 32)


def network() -> Network:
    model = models.build(SPEC.factory, classes=10, arguments={})
    return Network(SPEC, to_bytes(model), weights_digest(model))


def samples(partitions: int, rows: int, crashing: Set[int] = frozenset()) -> list[Partition]:
    """Partitions of so many rows each; the images of some ids begin with a white pixel."""
    found = []
    for index in range(partitions):
        ids = range(rows * index, rows * (index + 1))
        images = [np.random.default_rng(i).integers(0, 250, 64).astype(np.uint8) for i in ids]
        for i, image in zip(ids, images, strict=True):
            image[0] = 255 if i in crashing else image[0]
        table = pa.table(
            {
                SAMPLE_ID: pa.array(list(ids), pa.int64()),
                IMAGE: pa.array([image.tobytes() for image in images], pa.large_binary()),
                LABEL: pa.array([i % 10 for i in ids], pa.int32()),
                FILE: pa.array([f"{i}.png" for i in ids]),
            }
        )
        found.append(Partition(index, table.num_rows, ray.put(table)))
    return found


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[Workers]:
    workers = Workers(count=2, cpus=1, gpus=0, on_cluster=False)
    yield workers
    workers.release()


def embed(
    workers: Workers,
    folder: Path,
    *,
    crashing: Set[int],
    excluded: Mapping[int, int] | None = None,
    blocks: list[Partition] | None = None,
) -> list[ShardSummary]:
    """`excluded`: one row of each partition."""
    return workers.embed(
        network(),
        blocks or samples(2, 300, crashing),
        RunFolder(str(folder)),
        backbone="b",
        split="train",
        excluded=Rows.of(np.array(list(excluded or {})), np.array(list((excluded or {}).values()))),
        progress=lambda done, total: None,
    )


@pytest.mark.long
@pytest.mark.slow
def test_images_that_crash_their_process_are_quarantined_one_by_one_and_the_rest_is_as_without_them(
    workers: Workers, tmp_path: Path
) -> None:
    lines: list[str] = []
    workers.report_losses(lines.append)
    summaries = embed(workers, tmp_path / "run", crashing={17, 450})
    assert [[row["sample_id"] for row in found.quarantined] for found in summaries] == [[17], [450]]
    assert summaries[1].quarantined[0] == {
        "row": 150,
        "sample_id": 450,
        "file": "450.png",
        "reason": "each of 3 processes where it was decoded and embedded ended by SIGSEGV",
    }
    assert any("2 worker processes ended at the images of partition 0 of train" in line for line in lines)
    embed(workers, tmp_path / "without", crashing=set(), excluded={0: 17, 1: 150})
    for partition in range(2):
        found, expected = (
            read_shard(folder, folder.features("b", "train", partition), ["input", "4"])
            for folder in (RunFolder(str(tmp_path / name)) for name in ("run", "without"))
        )
        assert len(found.rows) == 299
        assert found.rows.tolist() == expected.rows.tolist()
        assert all(found.features[name].tobytes() == expected.features[name].tobytes() for name in ("input", "4"))
        # the shard knows it, and a run that goes on does not try again
        run = RunFolder(str(tmp_path / "run"))
        kept = summarise_shard(run, run.features("b", "train", partition), partition)
        assert kept is not None and kept.quarantined == summaries[partition].quarantined


def test_sums_are_bitwise_the_same_when_the_processes_that_form_them_are_lost(workers: Workers, tmp_path: Path) -> None:
    embed(workers, tmp_path, crashing=set())
    view = View(RunFolder(str(tmp_path)), "b", "train", (0, 1), Live(600), ("input", "4"), None)
    whole = workers.reducer(view)(probe.moments)
    reduce = workers.reducer(view)
    for _ in range(2):
        [victim, *_] = workers._pool.ask(lambda actor: actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(victim, signal.SIGKILL)
        again = reduce(probe.moments)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


# -- going on within a step --------------------------------------------------------------------------------


def test_an_embedding_that_stops_at_nine_tenths_embeds_only_the_last_tenth_when_it_goes_on(
    workers: Workers, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    spec = replace(SPEC, arguments={"log": str(log)})
    model = models.build(spec.factory, classes=10, arguments=spec.arguments)
    network = Network(spec, to_bytes(model), weights_digest(model))
    folder = RunFolder(str(tmp_path / "run"))

    def embed(count: int) -> list[ShardSummary]:
        return workers.embed(
            network,
            samples(10, 60)[:count],
            folder,
            backbone="b",
            split="train",
            excluded=Rows(),
            progress=lambda done, total: None,
        )

    def through_network() -> int:
        return sum(map(int, log.read_text().split()))

    embed(9)
    # and one that was cut short, which is not to be taken for whole
    cut = Path(folder.features("b", "train", 4))
    cut.write_bytes(cut.read_bytes()[:-100])
    assert through_network() == 540
    summaries = embed(10)
    assert through_network() == 540 + 120
    assert [found.count for found in summaries] == [60] * 10
    embed(10)
    assert through_network() == 540 + 120


@pytest.mark.long
def test_scores_that_are_there_are_not_made_again_and_all_of_them_are_the_same(
    workers: Workers, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path))
    labels = samples(6, 60)
    embed(workers, tmp_path, crashing=set(), blocks=labels)
    view, plan = planned_on(workers, folder, labels)
    whole = list(workers.leave_one_out(view, plan).tables(NOISE_MODEL))
    kept = ScoreShards(folder, 1, scores_digest(view, plan, NOISE_MODEL))
    begun = workers.leave_one_out(view, plan, number=1).tables(NOISE_MODEL)
    assert [next(begun).equals(table) for table in whole[:3]] == [True] * 3
    del begun  # as an interrupt does
    deadline = time.monotonic() + 60
    while not {0, 1, 2} <= kept.partitions():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shards = sorted(Path(folder.round(1, "scoring", kept.digest)).glob("*.parquet"))
    shards[0].write_bytes(shards[0].read_bytes()[:-30])
    for path in shards[1:]:
        os.utime(path, (0, 0))
    # by another process that drew the same boundary again
    view, plan = planned_on(workers, folder, labels)
    again = replace(kept, digest=scores_digest(view, plan, NOISE_MODEL))
    tables = workers.leave_one_out(view, plan, number=1).tables(NOISE_MODEL)
    assert [a.equals(b) for a, b in zip(tables, whole, strict=True)] == [True] * 6
    assert again.partitions() == set(range(6))
    assert [path.stat().st_mtime for path in shards[1:]] == [0.0] * (len(shards) - 1)
    assert shards[0].stat().st_mtime > 0 and again.read(0) is not None
    others = replace(view, live=view.live.quarantine(Rows.of(0, np.array([3]))))
    assert (
        scores_digest(others, plan, NOISE_MODEL)
        != again.digest
        != scores_digest(view, replace(plan, seed=1), NOISE_MODEL)
    )
    assert scores_digest(view, plan, replace(NOISE_MODEL, offset=1.0)) != again.digest


def planned_on(workers: Workers, folder: RunFolder, partitions: list[Partition]) -> tuple[View, ScoringPlan]:
    """A boundary on the features of these partitions, and its curvature, as a round has them."""
    split = Split("train", tuple(partitions), np.full(10, 36), "digest")
    live = StoredSamples(workers, folder, "b", split, Live(split.rows))
    boundary = ensemble.refit(live, live, [("4", 0.1)], classes=10)
    view = live.view(boundary.layers, boundary.standardizers)
    measured = curvature.measure(
        live.standardised(boundary.layers, boundary.standardizers), boundary.probes[0], "ekfac"
    )
    return view, ScoringPlan(boundary, (measured,), seed=0)
