"""The leave-one-out pass of a round over the pool, with its score shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import posttrain
from posttrain.cluster.pool import Pool
from posttrain.cluster.reducing import REDUCTION_GROUPS, Reducer, reduction_groups
from posttrain.cluster.shared import Shared, share
from posttrain.cluster.views import View
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.score_round import BlockSums, ScoringPlan
from posttrain.influence.scores import LeaveOneOut, score_columns
from posttrain.live import Live
from posttrain.schema import LABEL, PARTITION, ROW, SAMPLE_ID
from posttrain.store.features import Shard
from posttrain.store.scores import ScoreShards, content_digest


def scores_digest(view: View, plan: ScoringPlan, noise_model: NoiseModel) -> str:
    """A digest of everything that determines the scores of a view's samples."""
    ensemble = plan.ensemble
    return content_digest(
        posttrain.__version__,
        (view.backbone, view.split, view.layers, view.standardizers),
        view.live.digest,
        (ensemble.layers, ensemble.standardizers, [fitted.weights for fitted in ensemble.probes], ensemble.members),
        (plan.curvatures, plan.seed, noise_model),
    )


def sums_under_given_labels(
    fn: BlockSums, live: Live, partition: int, shard: Shard, logits: LeaveOneOut
) -> tuple[Tensor, ...]:
    """The sums over those rows of a partition that still have the label they came with."""
    # corrected labels would be mistaken for memorised ones
    as_given = ~live.relabelled.rows.contains(partition, shard.rows)
    if not as_given.all():
        logits = logits.rows(torch.from_numpy(as_given).to(logits.logits.device))
    return fn(logits.logits, logits.labels)


def score_table(partition: int, shard: Shard, logits: LeaveOneOut, noise_model: NoiseModel) -> pa.Table:
    """{sample_id, partition, row, label} and the columns of `score_columns`, of a partition's live rows."""
    columns = score_columns(replace(logits, noise_model=noise_model))
    return pa.table(
        {
            SAMPLE_ID: shard.sample_ids,
            PARTITION: pa.array(np.full(len(shard.rows), partition), pa.int32()),
            ROW: pa.array(shard.rows, pa.int32()),
            LABEL: pa.array(shard.labels, pa.int32()),
            **{name: pa.array(column) for name, column in columns.items()},
        }
    )


@dataclass(frozen=True)
class PoolPass:
    """`LeaveOneOutPass` over the pool. The tables are those of all partitions, in their order."""

    pool: Pool
    reducer: Reducer
    plan: ScoringPlan
    shared_plan: Shared[ScoringPlan]
    number: int | None
    """Of the round whose score shards are written, and read where they exist; None: no shards."""

    def sums(self, fn: BlockSums) -> tuple[Tensor, ...]:
        view, shared_fn = self.reducer.shared_view, share(fn)
        return self.reducer.over_groups(
            reduction_groups(self.reducer.view.partitions, REDUCTION_GROUPS),
            lambda actor, groups: actor.sum_leave_one_out.remote(view, groups, self.shared_plan, shared_fn),
        )

    def tables(self, noise_model: NoiseModel) -> Iterator[pa.Table]:
        view, shared_view, shared_model = self.reducer.view, self.reducer.shared_view, share(noise_model)
        shards = None
        if self.number is not None:
            shards = ScoreShards(view.folder, self.number, scores_digest(view, self.plan, noise_model))

        def call(partition: int) -> Callable[[Any], Any]:
            return lambda actor: actor.score.remote(shared_view, partition, self.shared_plan, shared_model, shards)

        written = shards.partitions() if shards is not None else set()
        tables = self.pool.each([call(partition) for partition in view.partitions if partition not in written])
        for partition in view.partitions:
            if shards is None or partition not in written:
                yield next(tables)
                continue
            table = shards.read(partition)
            # a shard of ours is whole or does not exist: this one was cut short by something else
            yield from [table] if table is not None else self.pool.each([call(partition)])
