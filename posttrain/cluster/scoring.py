"""The leave-one-out pass of a round over the pool, with its score shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from torch import Tensor

import posttrain
from posttrain.cluster.pool import Pool
from posttrain.cluster.reducing import REDUCTION_GROUPS, Reducer, reduction_groups
from posttrain.cluster.views import View, view_numbers
from posttrain.influence.calibration import NoiseModel
from posttrain.influence.score_round import BlockSums, ScoringPlan
from posttrain.store.scores import ScoreShards, content_digest


def scores_key(view: View, plan: ScoringPlan, noise_model: NoiseModel) -> str:
    """Tells the scores of a view's samples from any others: a digest of all that decides them."""
    ensemble = plan.ensemble
    return content_digest(
        posttrain.__version__,
        (view.backbone, view.split, view.layers, view.standardizers),
        view.live.digest,
        (ensemble.layers, ensemble.standardizers, [fitted.weights for fitted in ensemble.probes], ensemble.members),
        (plan.curvatures, plan.seed, noise_model),
    )


@dataclass
class StoredPass:
    """`LeaveOneOutPass` over the pool. The tables are those of all partitions, in their order."""

    pool: Pool
    reducer: Reducer
    view: View
    plan: ScoringPlan
    number: int | None
    plan_in: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.plan_in = [ray.put(self.plan), f"{os.getpid()}-{next(view_numbers)}"]

    def sums(self, fn: BlockSums) -> tuple[Tensor, ...]:
        fn_in = [ray.put(fn)]
        return self.reducer.over_groups(
            reduction_groups(self.view.partitions, REDUCTION_GROUPS),
            lambda actor, groups: actor.summed.remote(self.reducer.view_in, self.view.key, groups, self.plan_in, fn_in),
        )

    def tables(self, noise_model: NoiseModel) -> Iterator[pa.Table]:
        kept, noise_model_in = None, [ray.put(noise_model)]
        if self.number is not None:
            kept = ScoreShards(self.view.folder, self.number, scores_key(self.view, self.plan, noise_model))

        def call(partition: int) -> Callable[[Any], Any]:
            return lambda actor: actor.score.remote(
                self.reducer.view_in, self.view.key, partition, self.plan_in, noise_model_in, kept
            )

        there = kept.partitions() if kept is not None else set()
        tables = self.pool.each([call(partition) for partition in self.view.partitions if partition not in there])
        for partition in self.view.partitions:
            if partition not in there:
                yield next(tables)
                continue
            assert kept is not None
            table = kept.read(partition)
            # cut short by something else than us: a file of ours is whole or not there
            yield from [table] if table is not None else self.pool.each([call(partition)])
