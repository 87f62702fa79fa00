"""Actors that live through all rounds: each embeds, sums and scores the partitions it is given.

An actor keeps the network of the current round and the features that it has read, so that neither a pass over
the feature store nor a round pays for starting processes or for reading twice. What a call needs is named by its
arguments alone: where an actor dies, any other goes on with the same call.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

import posttrain
from posttrain.cluster import crash_bisection
from posttrain.cluster.crash_bisection import CrashingRow, quarantine_rows
from posttrain.cluster.devices import (
    BatchSize,
    computing_in,
    gpu_name,
    gpus_per_process,
    max_processes,
    moved,
    own_device,
    refuse_missing_gpus,
)
from posttrain.cluster.partitioning import Partition, Progress
from posttrain.cluster.pool import Died, Pool
from posttrain.influence.curvature import hessian_block
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.probe import BlockFn, Standardizer
from posttrain.influence.score_round import BlockSums, LeaveOneOutPass, ScoringPlan
from posttrain.influence.scores import LeaveOneOut, score_columns
from posttrain.live import Live, Rows
from posttrain.schema import (
    FILE,
    IMAGE,
    LABEL,
    PARTITION,
    ROW,
    SAMPLE_ID,
    ModelSpec,
    Precision,
    uniform,
)
from posttrain.store.features import (
    PreviousFeatures,
    Shard,
    ShardSummary,
    image_digests,
    previous_features,
    read_shard,
    summarise_shard,
    write_shard,
)
from posttrain.store.folder import RunFolder
from posttrain.store.scores import ScoreShards, content_digest
from posttrain.vision import models
from posttrain.vision.embedding import layer_features
from posttrain.vision.images import decode_column, normalize
from posttrain.vision.weights import backbone_digest, load_bytes

REDUCTION_GROUPS = 32
"""Sums are formed in this many groups of partitions, each by one actor, and added up in their order: the result
depends neither on the number of actors nor on which of them was faster."""

EMBEDDING_BATCH = 256

_DEATHS_OF_A_PARTITION = 2
"""Processes that a partition may end before its images are looked at one by one."""

_VIEWS_KEPT = 8
"""Views whose features an actor keeps at most: those of a ensemble's members, live and held out."""

_view_numbers = itertools.count()


@dataclass(frozen=True)
class View:
    """The live samples of one split in a feature store."""

    folder: RunFolder
    backbone: str
    split: str
    partitions: tuple[int, ...]
    live: Live
    layers: tuple[str, ...]
    """Whose features lie side by side."""
    standardizers: tuple[Standardizer, ...] | None
    """Of each layer, whose features a 1 then follows; None: raw features, without the 1."""
    key: str = field(default_factory=lambda: f"{os.getpid()}-{next(_view_numbers)}")


@dataclass(frozen=True)
class Network:
    """A network by its recipe and weights; `key` tells one set of weights from another."""

    spec: ModelSpec
    weights: bytes = field(repr=False)
    key: str
    precision: Precision = "float32"
    """In what it computes where it embeds and is trained."""

    @property
    def backbone(self) -> str:
        """Tells one feature store from another: everything that its features depend on."""
        spec = self.spec
        backbone = backbone_digest(load_network(self), spec.head)
        # the weights alone do not say how images are seen, nor what is done with the weights
        recipe = f"{spec.factory}:{json.dumps(spec.arguments, sort_keys=True, default=str)}:{spec.head}:{spec.image}"
        kept = f"{backbone}:{recipe}:{spec.layers}:{spec.width}"
        if self.precision != "float32":
            kept += f":{self.precision}"
        return hashlib.sha256(kept.encode()).hexdigest()[:16]


def load_network(network: Network) -> torch.nn.Module:
    model = models.build(network.spec.factory, classes=network.spec.classes, arguments=network.spec.arguments)
    load_bytes(model, network.weights)
    return model


def _for_inference(network: Network, device: torch.device) -> torch.nn.Module:
    return load_network(network).to(device).to(memory_format=torch.channels_last).eval()


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


class _Worker:
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
            lambda some: functools.partial(_embed_alone, network, block.take(pa.array(some)), self.device),
            rows,
            what="decoded and embedded",
            preload=[__name__],
        )

    def _model(self, network: Network) -> torch.nn.Module:
        if self.network is None or self.network[0] != network.key:
            self.network = (network.key, _for_inference(network, self.device))
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


def read_live(view: View, partition: int) -> Shard:
    """The live rows of a partition with their present labels, features as stored (float16)."""
    shard = read_shard(view.folder, view.folder.features(view.backbone, view.split, partition), view.layers)
    labels = view.live.labels(partition, shard.rows, shard.labels)
    live = view.live.mask(partition, shard.rows)
    if live.all():
        return replace(shard, labels=labels)
    features = {layer: matrix[live] for layer, matrix in shard.features.items()}
    return Shard(shard.rows[live], shard.sample_ids.filter(pa.array(live)), labels[live], features)


def side_by_side(shard: Shard, view: View) -> Tensor:
    """The features of the view's layers in one matrix, float32."""
    raw = [torch.from_numpy(shard.features[layer].copy()) for layer in view.layers]
    if view.standardizers is None:
        return torch.cat([features.float() for features in raw], dim=1)
    return torch.cat([s(features) for s, features in zip(view.standardizers, raw, strict=True)], dim=1)


def embed_block(
    model: torch.nn.Module,
    spec: ModelSpec,
    block: pa.Table,
    skip: np.ndarray,
    device: torch.device,
    *,
    precision: Precision = "float32",
    batch: BatchSize | None = None,
) -> tuple[Shard, list[dict[str, object]]]:
    """Features of a partition's rows but `skip`, and what could not be read, with the reason.

    `batch` is how many images go through the network at a time; it is halved where memory does not suffice.
    """
    batch = batch or BatchSize(EMBEDDING_BATCH)
    rows = np.setdiff1d(np.arange(block.num_rows), skip)
    block = block.take(pa.array(rows))
    image = spec.image
    pixels, readable, reasons = decode_column(
        block[IMAGE], channels=image.channels, size=image.size, shape=image.shape, background=image.background
    )
    labels = block[LABEL].to_numpy()
    why = dict(zip(np.flatnonzero(~readable).tolist(), reasons, strict=True))
    why |= {int(at): "no label" for at in np.flatnonzero(readable & (labels < 0))}
    parts: dict[str, list[Tensor]] = {layer: [] for layer in spec.layers}
    # a partition without a readable image: one black image gives the widths
    images = pixels if len(pixels) else pixels.new_zeros(1, image.channels, *image.size)

    def embedded(start: int, size: int) -> dict[str, Tensor]:
        inputs = normalize(moved(images[start : start + size], device), image.mean, image.std)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        found = layer_features(model, spec.layers, spec.head, inputs, width=spec.width)
        return {layer: features.cpu().half() for layer, features in found.items()}

    done = 0
    with torch.inference_mode(), computing_in(precision, device):
        while done < len(images):
            found = batch.run(functools.partial(embedded, done))
            done += len(found[spec.head])
            for layer, features in found.items():
                parts[layer].append(features[: len(pixels)])
    halves = {layer: torch.cat(found) for layer, found in parts.items()}
    finite = torch.stack([torch.isfinite(matrix).all(dim=1) for matrix in halves.values()]).all(dim=0).numpy()
    where_readable = np.flatnonzero(readable)
    for at in where_readable[~finite]:
        why.setdefault(int(at), "features are not finite in float16 (an extreme image, or weights that overflow)")
    good = np.array([at not in why for at in range(len(rows))], bool)
    ids = block[SAMPLE_ID].combine_chunks()
    files = block[FILE]
    quarantined: list[dict[str, object]] = [
        {ROW: int(rows[at]), SAMPLE_ID: ids[at].as_py(), FILE: files[at].as_py(), "reason": reason}
        for at, reason in sorted(why.items())
    ]
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], ids.type)
    kept = {layer: matrix.numpy()[good[where_readable]] for layer, matrix in halves.items()}
    return Shard(rows[good], ids.filter(pa.array(good)), labels[good], kept), quarantined


def _embed_alone(network: Network, block: pa.Table, device: torch.device) -> None:
    torch.set_num_threads(1)
    model = _for_inference(network, device)
    embed_block(model, network.spec, block, np.empty(0, np.int32), device, precision=network.precision)


def known_rows(
    block: pa.Table, skip: np.ndarray, layer_names: Sequence[str], former: PreviousFeatures | None
) -> Shard | None:
    """The rows of a partition but `skip` that a former run embedded from the same image, with their present labels."""
    if former is None:
        return None
    labels = block[LABEL].to_numpy()
    # what has lost its label is to be quarantined
    rows = np.setdiff1d(np.flatnonzero(labels >= 0), skip)
    wanted = block.take(pa.array(rows))
    digests = image_digests(wanted[IMAGE])
    ids = _one_array(wanted[SAMPLE_ID])
    at, features = former.of(ids, digests, layer_names)
    return Shard(rows[at], ids.take(pa.array(at)), labels[rows[at]], features, digests[at])


def with_known(fresh: Shard, known: Shard | None, block: pa.Table) -> Shard:
    """Both parts of a partition as one shard in the order of the rows, with the digests of the images."""
    fresh = replace(fresh, digests=image_digests(block[IMAGE].take(pa.array(fresh.rows))))
    if known is None or not len(known.rows):
        return fresh
    rows = np.concatenate([fresh.rows, known.rows])
    order = np.argsort(rows, kind="stable")
    assert fresh.digests is not None and known.digests is not None
    features = {
        layer: np.concatenate([matrix, known.features[layer]])[order] for layer, matrix in fresh.features.items()
    }
    return Shard(
        rows[order],
        pa.concat_arrays([fresh.sample_ids, known.sample_ids]).take(pa.array(order)),
        np.concatenate([fresh.labels, known.labels])[order],
        features,
        np.concatenate([fresh.digests, known.digests])[order],
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    return whole


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads: sums come out bitwise the same only where their number is the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _InProcess:
    """A worker in this very process, called as if it were an actor: at once, and results come as references."""

    def __init__(self, threads: int, cache_bytes: int) -> None:
        self._threads = threads
        with computing_threads(threads):
            self._worker = _Worker(threads, cache_bytes)

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._worker, method), self._threads)


@dataclass(frozen=True)
class _Method:
    call: Callable[..., Any]
    threads: int

    def remote(self, *arguments: Any) -> Any:
        # as Ray does for an actor: references among the arguments arrive as what they refer to
        values = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in arguments]
        with computing_threads(self.threads):
            return ray.put(self.call(*values))


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
            return _InProcess(self._threads, int(memory * share))
        options = ray.remote(_Worker).options(
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

    def reducer(self, view: View) -> _Reducer:
        """Sums over the live samples of a view."""
        self.start()
        return _Reducer(self._pool, view)

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
        return _StoredPass(self._pool, self.reducer(view), view, plan, number)


@dataclass
class _StoredPass:
    """`LeaveOneOutPass` over the pool. The tables are those of all partitions, in their order."""

    pool: Pool
    reducer: _Reducer
    view: View
    plan: ScoringPlan
    number: int | None
    plan_in: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.plan_in = [ray.put(self.plan), f"{os.getpid()}-{next(_view_numbers)}"]

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


def reduction_groups(partitions: Sequence[int], count: int) -> list[list[int]]:
    """At most `count` groups of partitions, the same for any number of actors."""
    count = max(1, min(count, len(partitions)))
    return [list(partitions[first::count]) for first in range(count)]


class _Reducer:
    """`influence.probe.Reduce` over the pool."""

    # beyond this an argument travels once through the object store instead of with every call
    _INLINE_BYTES = 1_000_000
    _MATRICES_BYTES = 2_000_000_000

    def __init__(self, pool: Pool, view: View) -> None:
        self._pool, self._view = pool, view
        self.view_in = [ray.put(view)]

    def __call__(self, fn: BlockFn, *arguments: Tensor) -> tuple[Tensor, ...]:
        plain = [a.detach().cpu().numpy() for a in arguments]
        large = sum(a.nbytes for a in plain) > self._INLINE_BYTES
        arguments_in = [ray.put(plain)] if large else [plain]
        count = REDUCTION_GROUPS
        if fn is hessian_block:
            # every group sends a matrix of ((C - 1) d)^2 float64 to the driver
            classes, dim = arguments[0].shape
            count = min(count, self._MATRICES_BYTES // (8 * ((classes - 1) * dim) ** 2))
        return self.over_groups(
            reduction_groups(self._view.partitions, count),
            lambda actor, groups: actor.reduce.remote(self.view_in, self._view.key, groups, fn, arguments_in),
        )

    def over_groups(self, groups: list[list[int]], call: Callable[[Any, list[list[int]]], Any]) -> tuple[Tensor, ...]:
        """The sums of all groups, each formed by one actor, added up in their order."""
        count = len(self._pool.ready())
        owned = [mine for i in range(count) if (mine := list(range(i, len(groups), count)))]
        # the first call goes to the first actor, and so on: each has the features of its groups at hand
        calls = [lambda actor, mine=mine: call(actor, [groups[g] for g in mine]) for mine in owned]
        by_group = {
            g: sums
            for mine, part in zip(owned, self._pool.each(calls), strict=True)
            for g, sums in zip(mine, part, strict=True)
        }
        total: list[Tensor] | None = None
        for g in range(len(groups)):
            part = [torch.from_numpy(np.array(a)) for a in by_group[g]]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        return tuple(total or [])
