"""Actors that live through all rounds: each embeds, sums and scores the partitions it is given.

An actor keeps the network of the current round and the features that it has read, so that neither a pass over the
feature store nor a round pays for starting processes or for reading twice. The arguments of a call hold all that it
needs: where an actor crashes, the same call goes to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
import torch

from posttrain.cluster import embedding
from posttrain.cluster.cache import FeatureCache
from posttrain.cluster.crash_bisection import CrashingRow
from posttrain.cluster.devices import BatchSize, gpu_name, own_device
from posttrain.cluster.embedding import EmbeddingTask
from posttrain.cluster.network import Network, for_inference
from posttrain.cluster.reducing import sum_groups, sums_of_block
from posttrain.cluster.scoring import score_table, sums_under_given_labels
from posttrain.cluster.shared import Shared
from posttrain.cluster.views import View
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.probe import BlockFn
from posttrain.influence.score_round import BlockSums, ScoringPlan
from posttrain.store.features import ShardSummary
from posttrain.store.scores import ScoreShards


class Worker:
    """One process of the pool. Only ids, the scores of one partition and small matrices leave it."""

    def __init__(self, threads: int, cache_bytes: int) -> None:
        torch.set_num_threads(threads)
        self._device = own_device()
        self._batch = BatchSize(embedding.BATCH)
        self._network: tuple[str, torch.nn.Module] | None = None
        """The digest of the current network, and its model."""
        self._cache = FeatureCache(self._device, cache_bytes)

    def ready(self) -> str:
        """The id of the node."""
        return ray.get_runtime_context().get_node_id()

    def gpu(self) -> str | None:
        return gpu_name(self._device)

    def reduced_batch(self) -> int | None:
        return self._batch.reduced

    def embed(self, network: Shared[Network], block: pa.Table, task: EmbeddingTask) -> ShardSummary:
        found = network.get()
        if self._network is None or self._network[0] != found.digest:
            self._network = (found.digest, for_inference(found, self._device))
        return embedding.write_partition(self._network[1], found, block, task, self._device, self._batch)

    def crashing_rows(self, network: Shared[Network], block: pa.Table, skip: np.ndarray) -> list[CrashingRow]:
        return embedding.crashing_rows(network.get(), block, skip, self._device)

    def reduce(
        self,
        view: Shared[View],
        groups: Sequence[Sequence[int]],
        fn: BlockFn,
        arguments: list[np.ndarray] | Shared[list[np.ndarray]],
    ) -> list[list[np.ndarray]]:
        plain = arguments.get() if isinstance(arguments, Shared) else arguments
        tensors = [torch.from_numpy(np.array(a)).to(self._device) for a in plain]
        return sum_groups(groups, lambda partition: sums_of_block(fn, self._cache.block(view, partition), tensors))

    def sum_leave_one_out(
        self, view: Shared[View], groups: Sequence[Sequence[int]], plan: Shared[ScoringPlan], fn: Shared[BlockSums]
    ) -> list[list[np.ndarray]]:
        live, sums = view.get().live, fn.get()
        return sum_groups(
            groups,
            lambda partition: sums_under_given_labels(
                sums, live, partition, *self._cache.leave_one_out(view, plan, partition)
            ),
        )

    def score(
        self,
        view: Shared[View],
        partition: int,
        plan: Shared[ScoringPlan],
        noise_model: Shared[NoiseModel],
        shards: ScoreShards | None,
    ) -> pa.Table:
        table = score_table(partition, *self._cache.leave_one_out(view, plan, partition), noise_model.get())
        if shards is not None:
            shards.write(partition, table)
        return table
