"""The pool of actors, seen from the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from posttrain.cluster.devices import (
    gpus_per_process,
    max_processes,
    refuse_missing_gpus,
)
from posttrain.cluster.embedding import EmbeddingTask
from posttrain.cluster.in_process import InProcessActor
from posttrain.cluster.network import Network
from posttrain.cluster.partitioning import Partition, Progress
from posttrain.cluster.pool import Crashed, Pool
from posttrain.cluster.reducing import Reducer
from posttrain.cluster.scoring import PoolPass
from posttrain.cluster.shared import share
from posttrain.cluster.views import View
from posttrain.cluster.worker import Worker
from posttrain.influence.score_round import LeaveOneOutPass, ScoringPlan
from posttrain.live import Rows
from posttrain.store.features import (
    ShardSummary,
    previous_features,
    summarise_shard,
)
from posttrain.store.folder import RunFolder

_CRASHES_OF_A_PARTITION = 2
"""Processes that a partition may crash before the images that do so are searched for."""


class Workers:
    """The pool, seen from the driver. Actors start at the first call.

    With a `count` of 0 there is no pool: the driver's own process does what an actor would, with the same sums.
    """

    def __init__(self, *, count: int | None, cpus: float, gpus: float | None, on_cluster: bool) -> None:
        resources = ray.cluster_resources()
        available_gpus = resources.get("GPU", 0.0)
        self._on_cluster = on_cluster
        # on a cluster, which may grow, the run file says how many GPUs are meant
        processes = count if count and not on_cluster else 1
        self.gpus_per_worker = gpus_per_process(processes, available_gpus) if gpus is None else gpus
        if not on_cluster:
            refuse_missing_gpus("ray.gpus_per_worker", self.gpus_per_worker, processes)
        default_count = (
            max_processes(self.gpus_per_worker, available_gpus)
            if self.gpus_per_worker
            else int(resources.get("CPU", 1) / max(cpus, 1))
        )
        self.count = 0 if count == 0 else max(1, count or default_count)
        # On one machine the steps never overlap, so that actors which reserve no CPU cannot starve Ray Data or
        # Ray Train; on a cluster the reservation is what places them.
        self._cpus = cpus if on_cluster else 0.0
        self._threads = max(1, int(cpus))
        self._pool = Pool(self._actor, self.count or 1)

    def _actor(self, reserving: bool) -> Any:
        resources = ray.cluster_resources()
        memory = 0.3 * resources.get("memory", 4 * 2**30)
        if not self.count:
            cpu_share = min(1.0, self._threads / resources.get("CPU", 1))
            cache_bytes = int(memory * cpu_share)
            return InProcessActor(lambda: Worker(self._threads, cache_bytes), self._threads)
        options = ray.remote(Worker).options(
            num_cpus=self._cpus if reserving else 0.0,
            num_gpus=self.gpus_per_worker,
            scheduling_strategy="SPREAD",
            # the pool repeats calls itself, and counts which of them crash their process
            max_restarts=0,
            max_task_retries=0,
        )
        return options.remote(self._threads, int(memory / self.count))

    def gpus_to_train(self, processes: int) -> float:
        """GPUs of each of so many training processes by default: none where the workers have none."""
        if not self.gpus_per_worker:
            return 0.0
        return 1.0 if self._on_cluster else gpus_per_process(processes, ray.cluster_resources().get("GPU", 0.0))

    def start(self) -> None:
        """Start the actors without waiting for them."""
        self._pool.start()

    def release(self) -> None:
        """End the actors: their CPUs and GPUs are wanted elsewhere. The next call starts new ones."""
        self._pool.release()

    def make_room(self) -> None:
        """Call this before anything else needs images: blocks of a lost node have to be made again (see `Pool`)."""
        self._pool.make_room()

    def report_losses(self, say: Callable[[str], None]) -> None:
        """Call `say` with a sentence for every process or node that is lost from now on."""
        self._pool.say = say

    def reducer(self, view: View) -> Reducer:
        """`Reduce` over the live samples of a view."""
        self.start()
        return Reducer(self._pool, view)

    def embed(
        self,
        network: Network,
        partitions: Sequence[Partition],
        folder: RunFolder,
        *,
        backbone: str,
        split: str,
        excluded: Rows,
        progress: Progress,
        previous_runs: Sequence[RunFolder] = (),
    ) -> list[ShardSummary]:
        """Writes the shards of the partitions that have none; the summaries of all. `progress` counts samples.

        Features come from the first of the `previous_runs` that has any by the same backbone, where the image is the
        same.
        """
        paths = {p.index: folder.features(backbone, split, p.index) for p in partitions}
        summaries = {index: summarise_shard(folder, path, index) for index, path in paths.items()}
        missing = [p for p in partitions if summaries[p.index] is None]
        if missing:
            self.make_room()
        candidates = (previous_features(run, backbone, split) for run in previous_runs if missing)
        previous = next((found for found in candidates if found is not None), None)
        tasks = [
            EmbeddingTask(
                p.index, folder, paths[p.index], excluded.in_partition(p.index), previous, partitions=len(partitions)
            )
            for p in missing
        ]
        samples = {p.index: p.rows - len(task.skip) for p, task in zip(missing, tasks, strict=True)}
        done = 0
        for summary in self._embedded(network, missing, tasks, split):
            summaries[summary.partition] = summary
            done += samples[summary.partition]
            progress(done, sum(samples.values()))
        return [summary for summary in summaries.values() if summary is not None]

    def _embedded(
        self, network: Network, partitions: Sequence[Partition], tasks: Sequence[EmbeddingTask], split: str
    ) -> Iterator[ShardSummary]:
        """The summaries as they come; last, those of partitions with images that crash the workers."""
        shared = share(network, network.digest)

        def embed(partition: Partition, task: EmbeddingTask) -> Callable[[Any], Any]:
            return lambda actor: actor.embed.remote(shared, partition.block, task)

        def search(partition: Partition, task: EmbeddingTask) -> Callable[[Any], Any]:
            return lambda actor: actor.crashing_rows.remote(shared, partition.block, task.skip)

        crashed: list[tuple[Partition, EmbeddingTask]] = []
        outcomes = self._pool.each(map(embed, partitions, tasks), max_crashes=_CRASHES_OF_A_PARTITION)
        for partition, task, outcome in zip(partitions, tasks, outcomes, strict=True):
            if isinstance(outcome, Crashed):
                crashed.append((partition, task))
            else:
                yield outcome
        for partition, task in crashed:
            self._pool.say(
                f"{_CRASHES_OF_A_PARTITION} worker processes ended at the images of partition {partition.index} of "
                f"{split}; looking for the one that does it"
            )
            [crashing] = self._pool.each([search(partition, task)])
            # all the others in one go: their features are as if those images had never been there
            yield from self._pool.each([embed(partition, replace(task, crashing=crashing))])

    def gpus(self) -> list[str | None]:
        """The names of the GPUs of the actors that are ready; None for one that computes on a CPU."""
        return self._pool.ask(lambda actor: actor.gpu.remote())

    def reduced_batch(self) -> int | None:
        """The smallest number of images per forward pass, where a worker had too little memory for all; else None."""
        found = self._pool.ask(lambda actor: actor.reduced_batch.remote())
        return min((size for size in found if size is not None), default=None)

    def leave_one_out(self, view: View, plan: ScoringPlan, number: int | None = None) -> LeaveOneOutPass[pa.Table]:
        """The leave-one-out logits of the live samples of a view.

        `number`: of the round whose score shards are written, and read where they exist.
        """
        self.start()
        return PoolPass(self._pool, self.reducer(view), plan, share(plan), number)
