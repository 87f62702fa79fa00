"""The scores of a round on the actors of a real Ray, and of the same samples in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from posttrain.cluster.devices import torch_threads
from posttrain.cluster.partitioning import Partition, Split
from posttrain.cluster.workers import Workers
from posttrain.influence import ensemble
from posttrain.influence.in_memory import InMemory
from posttrain.influence.score_round import PreviousRemovals, RoundScores, score_round
from posttrain.influence.selection import select
from posttrain.live import Live, NewLabels, Rows
from posttrain.runs.stored_samples import StoredSamples
from posttrain.store.features import Shard, write_shard
from posttrain.store.folder import RunFolder

pytestmark = pytest.mark.ray

CLASSES, WIDTHS = 4, {"stem": 6, "head": 9}
SIZES = {"train": (150, 90, 110, 130), "validation": (120, 80)}
LIVE = Live(
    sum(SIZES["train"]),
    Rows.of(np.array([0, 0, 2]), np.array([3, 77, 5])),
    relabelled=NewLabels.of(np.array([0, 0, 3]), np.array([10, 20, 0]), np.array([1, 2, 3])),
)
ALL = Live(sum(SIZES["validation"]))


@dataclass(frozen=True)
class Part:
    ids: np.ndarray
    labels: np.ndarray
    features: dict[str, np.ndarray]


def part(number: int, size: int) -> Part:
    """Features float16 around the centre of the true class; a fifth of the labels are wrong."""
    generator = np.random.default_rng(number)
    true = generator.integers(0, CLASSES, size)
    wrong = generator.random(size) < 0.2
    labels = np.where(wrong, (true + generator.integers(1, CLASSES, size)) % CLASSES, true).astype(np.int32)
    features = {
        layer: (2 * np.random.default_rng(0).normal(size=(CLASSES, width))[true] + generator.normal(size=(size, width)))
        for layer, width in WIDTHS.items()
    }
    return Part(
        1000 * number + np.arange(size), labels, {layer: own.astype(np.float16) for layer, own in features.items()}
    )


def parts(split: str) -> list[Part]:
    return [part(10 * len(split) + at, size) for at, size in enumerate(SIZES[split])]


def stored(workers: Workers, folder: RunFolder, split: str, live: Live) -> StoredSamples:
    found, nothing = [], ray.put(pa.table({}))
    for at, own in enumerate(parts(split)):
        shard = Shard(np.arange(len(own.ids), dtype=np.int32), pa.array(own.ids), own.labels, own.features)
        write_shard(folder, folder.features("b", split, at), shard, [])
        found.append(Partition(at, len(own.ids), nothing))
    return StoredSamples(workers, folder, "b", Split(split, tuple(found), np.ones(CLASSES), "digest"), live)


def in_memory(split: str, live: Live) -> InMemory:
    """The same samples in the same blocks."""
    blocks = parts(split)
    kept, changed = [], []
    for at, own in enumerate(blocks):
        kept.append(live.mask(at, np.arange(len(own.ids))))
        rows, new = live.relabelled.in_partition(at)
        changed.append(np.isin(np.arange(len(own.ids)), rows))
        own.labels[rows] = new
    mask = np.concatenate(kept)
    labels, ids = (np.concatenate([getattr(own, name) for own in blocks])[mask] for name in ("labels", "ids"))
    features = {
        layer: torch.from_numpy(np.concatenate([own.features[layer] for own in blocks])[mask]) for layer in WIDTHS
    }
    return InMemory(
        features,
        torch.from_numpy(labels.astype(np.int64)),
        ids,
        torch.from_numpy(np.concatenate(changed)[mask]),
        [int(own.sum()) for own in kept],
    )


def scored(
    live: InMemory | StoredSamples, validation: InMemory | StoredSamples, exact_limit: int = 2048
) -> RoundScores:
    candidates = [(layer, l2) for layer in WIDTHS for l2 in (1.0, 0.01)]
    chosen = ensemble.choose(live, validation, candidates=candidates, classes=CLASSES)
    assert len(chosen.probes) == 2
    return score_round(live, validation, chosen, seed=7, previous=PreviousRemovals(3, 0.4), exact_limit=exact_limit)


def selected(labels: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    block = (ids, labels, scores)
    found = select(lambda: [block], classes=CLASSES, at_most=40, caps=np.full(CLASSES, 15), threshold=0.0)
    return ids[found.mask(*block)]


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[Workers]:
    workers = Workers(count=2, cpus=1, gpus=0, on_cluster=False)
    yield workers
    workers.release()


@pytest.mark.parametrize("exact_limit", [2048, 0])
def test_actors_and_memory_give_the_same_scores_and_select_the_same_samples(
    workers: Workers, tmp_path: Path, exact_limit: int
) -> None:
    live = LIVE
    folder = RunFolder(str(tmp_path))
    samples = stored(workers, folder, "train", live), stored(workers, folder, "validation", ALL)
    on_actors = scored(*samples, exact_limit)
    table = pa.concat_tables(on_actors.tables)
    memory = in_memory("train", live)
    with torch_threads(1):
        of_memory = scored(memory, in_memory("validation", ALL), exact_limit)
        blocks = list(of_memory.tables)
    assert on_actors.kinds == of_memory.kinds == (("exact" if exact_limit else "ekfac"),) * 2
    noise, noise_in_memory = on_actors.noise_model.noise, of_memory.noise_model.noise
    assert noise == noise_in_memory and noise.found
    for name in blocks[0]:
        found = np.concatenate([block[name] for block in blocks])
        # the blocks lie elsewhere in memory: their products may differ in the last bit
        np.testing.assert_allclose(table[name].to_numpy(), found, rtol=1e-6, atol=1e-6, err_msg=name)
    assert memory.ids is not None
    np.testing.assert_array_equal(table["sample_id"].to_numpy(), memory.ids)
    np.testing.assert_array_equal(table["label"].to_numpy(), memory.labels.numpy())
    taken = [
        selected(memory.labels.numpy().astype(np.int32), memory.ids, odds)
        for odds in (
            table["mislabel_odds"].to_numpy(),
            np.concatenate([block["mislabel_odds"] for block in blocks]),
        )
    ]
    assert len(taken[0]) == 40 and taken[0].tolist() == taken[1].tolist()


def test_relabelled_samples_are_scored_but_take_no_part_in_the_calibration() -> None:
    live, validation = in_memory("train", LIVE), in_memory("validation", ALL)
    changed = scored(live, validation)
    counts: list[float] = []

    def count(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tensor(float(len(labels))),)

    for relabelled in (live.relabelled, None):
        samples = InMemory(live.features, live.labels, live.ids, relabelled, live.blocks)
        counts.append(float(samples.leave_one_out(changed.plan).sums(count)[0]))
    assert counts[0] == counts[1] - 3
    assert sum(len(block["loss"]) for block in changed.tables) == len(live.labels)
