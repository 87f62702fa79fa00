"""Actors that live through all rounds: each embeds, sums and scores the partitions it is given.

An actor keeps the network of the current round and the features that it has read, so that neither a pass over
the feature store nor a round pays for starting processes or for reading twice. What a call needs is named by its
arguments alone: where an actor dies, any other goes on with the same call.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from posttrain.cluster import crash_bisection
from posttrain.cluster.crash_bisection import CrashingRow, quarantine_rows
from posttrain.cluster.devices import (
    BatchSize,
    gpu_name,
    own_device,
)
from posttrain.cluster.embedding import EMBEDDING_BATCH, embed_alone, embed_block, known_rows, with_known
from posttrain.cluster.network import Network, for_inference
from posttrain.cluster.views import View, read_live, side_by_side
from posttrain.influence.probe import BlockFn
from posttrain.influence.score_round import BlockSums, ScoringPlan
from posttrain.influence.scores import LeaveOneOut, score_columns
from posttrain.schema import (
    LABEL,
    PARTITION,
    ROW,
    SAMPLE_ID,
    uniform,
)
from posttrain.store.features import (
    PreviousFeatures,
    Shard,
    ShardSummary,
    write_shard,
)
from posttrain.store.folder import RunFolder
from posttrain.store.scores import ScoreShards

_VIEWS_KEPT = 8
"""Views whose features an actor keeps at most: those of a ensemble's members, live and held out."""


class Worker:
    """One process of the pool; only ids, one bucket's scores and small matrices leave it."""

    def __init__(self, threads: int, cache_bytes: int) -> None:
        torch.set_num_threads(threads)
        self.device = own_device()
        self.batch = BatchSize(EMBEDDING_BATCH)
        self.network: tuple[str, torch.nn.Module] | None = None
        self.views: OrderedDict[str, dict[int, tuple[Shard, Tensor, Tensor]]] = OrderedDict()
        self.planned = ("", "")
        """The view and the plan of `left_out`, by their keys."""
        self.left_out: dict[int, tuple[Shard, LeaveOneOut]] = {}
        self.cache_bytes = cache_bytes
        self.cached = 0

    def ready(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def pid(self) -> int:
        return os.getpid()

    def gpu(self) -> str | None:
        return gpu_name(self.device)

    def reduced_batch(self) -> int | None:
        return self.batch.reduced

    def embed(
        self,
        network_in: list[Any],
        block: pa.Table,
        partition: int,
        folder: RunFolder,
        path: str,
        skip: np.ndarray,
        former: PreviousFeatures | None = None,
        partitions: int = 0,
        fatal: Sequence[CrashingRow] = (),
    ) -> ShardSummary:
        network: Network = ray.get(network_in[0])
        model = self._model(network)
        skip = np.union1d(skip, [one.row for one in fatal]).astype(np.int32)
        known = known_rows(block, skip, network.spec.layers, former)
        if known is not None:
            skip = np.union1d(skip, known.rows)
        fresh, quarantined = embed_block(
            model, network.spec, block, skip, self.device, precision=network.precision, batch=self.batch
        )
        quarantined = sorted([*quarantined, *quarantine_rows(block, fatal)], key=lambda row: int(str(row[ROW])))
        shard, embedded = with_known(fresh, known, block), len(fresh.rows)
        write_shard(folder, path, shard, quarantined, embedded=embedded, partitions=partitions)
        return ShardSummary(partition, len(shard.rows), quarantined, embedded)

    def fatal(self, network_in: list[Any], block: pa.Table, rows: np.ndarray) -> list[CrashingRow]:
        network: Network = ray.get(network_in[0])
        return crash_bisection.crashing_rows(
            lambda some: functools.partial(embed_alone, network, block.take(pa.array(some)), self.device),
            rows,
            what="decoded and embedded",
            preload=[embed_alone.__module__],
        )

    def _model(self, network: Network) -> torch.nn.Module:
        if self.network is None or self.network[0] != network.key:
            self.network = (network.key, for_inference(network, self.device))
        return self.network[1]

    def reduce(
        self,
        view_in: list[Any],
        key: str,
        groups: Sequence[Sequence[int]],
        fn: BlockFn,
        arguments_in: list[Any],
    ) -> list[list[np.ndarray]]:
        arguments = ray.get(arguments_in[0]) if isinstance(arguments_in[0], ray.ObjectRef) else arguments_in[0]
        tensors = [torch.from_numpy(np.array(a)).to(self.device) for a in arguments]
        sums = []
        for group in groups:
            total: list[Tensor] | None = None
            for partition in group:
                _, features, labels = self._block(view_in, key, partition)
                part = [t.double() for t in fn(features, labels, *tensors)]
                total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
            sums.append([t.cpu().numpy() for t in total or []])
        return sums

    def summed(
        self, view_in: list[Any], key: str, groups: Sequence[Sequence[int]], plan_in: list[Any], fn_in: list[Any]
    ) -> list[list[np.ndarray]]:
        """`plan_in` is the plan's reference and its key."""
        view: View = ray.get(view_in[0])
        fn: BlockSums = ray.get(fn_in[0])
        sums = []
        for group in groups:
            total: tuple[Tensor, ...] | None = None
            for partition in group:
                shard, found = self._leave_one_out(view_in, key, partition, plan_in)
                # corrected labels would be mistaken for memorised ones
                as_given = ~view.live.relabelled.rows.contains(partition, shard.rows)
                if not as_given.all():
                    found = found.rows(torch.from_numpy(as_given).to(self.device))
                part = fn(found.logits, found.labels)
                total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
            sums.append([t.cpu().numpy() for t in total or ()])
        return sums

    def score(
        self,
        view_in: list[Any],
        key: str,
        partition: int,
        plan_in: list[Any],
        noise_model_in: list[Any],
        kept: ScoreShards | None,
    ) -> pa.Table:
        shard, found = self._leave_one_out(view_in, key, partition, plan_in)
        columns = score_columns(replace(found, noise_model=ray.get(noise_model_in[0])))
        table = pa.table(
            {
                SAMPLE_ID: shard.sample_ids,
                PARTITION: pa.array(np.full(len(shard.rows), partition), pa.int32()),
                ROW: pa.array(shard.rows, pa.int32()),
                LABEL: pa.array(shard.labels, pa.int32()),
                **{name: pa.array(column) for name, column in columns.items()},
            }
        )
        if kept is not None:
            kept.write(partition, table)
        return table

    def _leave_one_out(
        self, view_in: list[Any], key: str, partition: int, plan_in: list[Any]
    ) -> tuple[Shard, LeaveOneOut]:
        """A partition's live rows without their features, and their leave-one-out logits; cached while they fit."""
        if self.planned != (key, plan_in[1]):
            self._forget_plan()
            self.planned = (key, plan_in[1])
        if partition not in self.left_out:
            plan: ScoringPlan = ray.get(plan_in[0])
            shard, features, labels = self._block(view_in, key, partition)
            draws = torch.from_numpy(uniform(shard.sample_ids.to_numpy(zero_copy_only=False), plan.seed))
            found = plan.leave_one_out(features, labels, draws)
            shard = replace(shard, features={})
            while self.cached + found.nbytes > self.cache_bytes and next(iter(self.views)) != key:
                self._forget_oldest()
            if self.cached + found.nbytes > self.cache_bytes:
                return shard, found
            self.cached += found.nbytes
            self.left_out[partition] = (shard, found)
        return self.left_out[partition]

    def _forget_plan(self) -> None:
        self.cached -= sum(found.nbytes for _, found in self.left_out.values())
        self.planned, self.left_out = ("", ""), {}

    def _block(self, view_in: list[Any], key: str, partition: int) -> tuple[Shard, Tensor, Tensor]:
        """A partition's live rows: the shard, features side by side, labels; cached while they fit."""
        if key not in self.views:
            self.views[key] = {}
            while len(self.views) > _VIEWS_KEPT:
                self._forget_oldest()
        blocks = self.views[key]
        if partition not in blocks:
            view: View = ray.get(view_in[0])
            shard = read_live(view, partition)
            features = side_by_side(shard, view).to(self.device)
            block = (shard, features, torch.from_numpy(shard.labels.astype(np.int64)).to(self.device))
            if self.cached + features.nbytes > self.cache_bytes and self.planned[0] != key:
                self._forget_plan()
            while self.cached + features.nbytes > self.cache_bytes and next(iter(self.views)) != key:
                self._forget_oldest()
            if self.cached + features.nbytes > self.cache_bytes:
                return block
            self.cached += features.nbytes
            blocks[partition] = block
        return blocks[partition]

    def _forget_oldest(self) -> None:
        _, dropped = self.views.popitem(last=False)
        self.cached -= sum(features.nbytes for _, features, _ in dropped.values())
