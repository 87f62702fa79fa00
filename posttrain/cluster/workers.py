"""The pool of actors, seen from the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from posttrain.cluster.crash_bisection import CrashingRow
from posttrain.cluster.devices import (
    gpus_per_process,
    max_processes,
    refuse_missing_gpus,
)
from posttrain.cluster.in_process import InProcess
from posttrain.cluster.network import Network
from posttrain.cluster.partitioning import Partition, Progress
from posttrain.cluster.pool import Died, Pool
from posttrain.cluster.reducing import Reducer
from posttrain.cluster.scoring import StoredPass
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

_DEATHS_OF_A_PARTITION = 2
"""Processes that a partition may end before its images are looked at one by one."""


class Workers:
    """The pool, seen from the driver. Actors start at the first call.

    With a `count` of 0 there is no pool: the driver's own process does what an actor would, and the same sums come out.
    """

    def __init__(self, *, count: int | None, cpus: float, gpus: float | None, on_cluster: bool) -> None:
        resources = ray.cluster_resources()
        available_gpus = resources.get("GPU", 0.0)
        self._on_cluster = on_cluster
        # on a cluster, which may grow, the run file says how many GPUs are meant
        asked_for = count if count and not on_cluster else 1
        self.gpus_per_worker = gpus_per_process(asked_for, available_gpus) if gpus is None else gpus
        if not on_cluster:
            refuse_missing_gpus("ray.gpus_per_worker", self.gpus_per_worker, asked_for)
        by_default = (
            max_processes(self.gpus_per_worker, available_gpus)
            if self.gpus_per_worker
            else int(resources.get("CPU", 1) / max(cpus, 1))
        )
        self.count = 0 if count == 0 else max(1, count or by_default)
        # On one machine the steps never overlap, so that actors which reserve no CPU cannot starve Ray Data or
        # Ray Train; on a cluster the reservation is what places them.
        self._cpus = cpus if on_cluster else 0.0
        self._threads = max(1, int(cpus))
        self._pool = Pool(self._actor, self.count or 1)

    def _actor(self, reserving: bool) -> Any:
        resources = ray.cluster_resources()
        memory = 0.3 * resources.get("memory", 4 * 2**30)
        if not self.count:
            share = min(1.0, self._threads / resources.get("CPU", 1))
            return InProcess(self._threads, int(memory * share))
        options = ray.remote(Worker).options(
            num_cpus=self._cpus if reserving else 0.0,
            num_gpus=self.gpus_per_worker,
            scheduling_strategy="SPREAD",
            # the pool itself calls again, and knows of what a process died
            max_restarts=0,
            max_task_retries=0,
        )
        return options.remote(self._threads, int(memory / self.count))

    def gpus_to_train(self, processes: int) -> float:
        """GPUs of each of so many training processes, where nobody says; none where those that embed have none."""
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
        """To be called before anything else needs images: what a lost node held has to be made again (see `Pool`)."""
        self._pool.make_room()

    def tell_losses(self, tell: Callable[[str], None]) -> None:
        """What is lost and replaced is told to `tell` from now on."""
        self._pool.tell = tell

    def reducer(self, view: View) -> Reducer:
        """Sums over the live samples of a view."""
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
        former: Sequence[RunFolder] = (),
    ) -> list[ShardSummary]:
        """The shards of every partition; those that are there already are kept. `progress` counts samples.

        What one of the `former` runs has embedded by the same backbone is taken from the first that has any.
        """
        found = {
            b.index: summarise_shard(folder, folder.features(backbone, split, b.index), b.index) for b in partitions
        }
        todo = [b for b in partitions if found[b.index] is None]
        if todo:
            self.make_room()
        live = {b.index: b.rows - len(excluded.in_partition(b.index)) for b in todo}
        total = sum(live.values())
        reference = ray.put(network)
        candidates = (previous_features(run, backbone, split) for run in former if todo)
        taken_up = next((found for found in candidates if found is not None), None)

        def call(partition: Partition, fatal: Sequence[CrashingRow] = ()) -> Callable[[Any], Any]:
            return lambda actor: actor.embed.remote(
                [reference],
                partition.block,
                partition.index,
                folder,
                folder.features(backbone, split, partition.index),
                excluded.in_partition(partition.index),
                taken_up,
                len(partitions),
                fatal,
            )

        done = 0
        suspects: list[Partition] = []
        for partition, outcome in zip(
            todo, self._pool.each(map(call, todo), max_deaths=_DEATHS_OF_A_PARTITION), strict=True
        ):
            if isinstance(outcome, Died):
                suspects.append(partition)
                continue
            found[partition.index] = outcome
            done += live[partition.index]
            progress(done, total)
        for partition in suspects:
            rows = np.setdiff1d(np.arange(partition.rows), excluded.in_partition(partition.index)).astype(np.int32)
            self._pool.tell(
                f"{_DEATHS_OF_A_PARTITION} worker processes ended at the images of partition {partition.index} of {split}; "
                "looking for the one that does it"
            )
            look = functools.partial(
                lambda actor, b, r: actor.fatal.remote([reference], b.block, r), b=partition, r=rows
            )
            [fatal] = self._pool.each([look])
            # all that is left in one go: features as if those images had never been there
            [found[partition.index]] = self._pool.each([call(partition, fatal)])
            done += live[partition.index]
            progress(done, total)
        return [summary for summary in (found[b.index] for b in partitions) if summary is not None]

    def pids(self) -> list[int]:
        """The processes of the actors that are ready."""
        return self._pool.ask(lambda actor: actor.pid.remote())

    def gpus(self) -> list[str | None]:
        """What the GPUs of the actors that are ready are called, None for one that computes on a CPU."""
        return self._pool.ask(lambda actor: actor.gpu.remote())

    def reduced_batch(self) -> int | None:
        """Images per forward pass of the worker with the fewest, where memory did not suffice for all; else None."""
        found = self._pool.ask(lambda actor: actor.reduced_batch.remote())
        return min((size for size in found if size is not None), default=None)

    def leave_one_out(self, view: View, plan: ScoringPlan, number: int | None = None) -> LeaveOneOutPass[pa.Table]:
        """The leave-one-out logits of the live samples of a view.

        `number`: the round whose score shards are kept, and those that are there already not made again.
        """
        self.start()
        return StoredPass(self._pool, self.reducer(view), view, plan, number)
