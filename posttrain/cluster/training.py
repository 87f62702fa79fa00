"""Training the whole network on the live images, through Ray Train.

With `workers = 0` Ray Train's local mode runs the loop in the driver's process, which costs no start-up; with more
it is distributed data-parallel training. The loop takes every random number from (seed, epoch), and goes by
partitions, so that its result does not depend on files or blocks.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posttrain.cluster.devices import BatchSize, gpu_name
from posttrain.cluster.failures import raise_cause
from posttrain.cluster.live_images import LiveImages
from posttrain.cluster.network import Network, load_network
from posttrain.cluster.partitioning import Progress, Split
from posttrain.cluster.training_step import Mix, Passes
from posttrain.errors import RecipeError, StepError
from posttrain.live import Live
from posttrain.methods import METHODS, Method
from posttrain.schema import ImageSpec, Precision
from posttrain.store.folder import RunFolder
from posttrain.vision.augmentation import augmentation
from posttrain.vision.losses import Noise, Size, Twins, mixed_up, objective
from posttrain.vision.weights import to_bytes

RESTARTS_OF_A_TRAINING = 5
"""Times that training begins again because one of its workers was lost."""


@dataclass(frozen=True)
class Training:
    """How the network is trained; see the sections `pretrain` and `refine` of the run file."""

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: Literal["constant", "cosine"]
    augment: Literal["none", "crop", "crop_flip"]
    until_train_accuracy: float | None = None
    """Stop after the first epoch whose mean accuracy on the training data (as given, labels included) reaches this."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs: for controls."""
    method: Method = "cross_entropy"
    """What is minimised; see `vision.losses`."""
    method_arguments: dict[str, float] = field(default_factory=dict)
    """In place of the paper's settings."""
    ema: float | None = None
    """Decay of the moving average of the weights by step, which is what training leaves behind; None: the last ones."""


@dataclass(frozen=True)
class Trained:
    """The trained weights, and the figures of the last epoch."""

    weights: bytes = field(repr=False)
    epochs: int
    steps: int
    train_accuracy: float
    train_loss: float
    seconds: float
    part: int | None = None
    """Samples per forward pass, where memory did not suffice for a whole step."""
    gpu: str | None = None
    """Name of the first training worker's GPU; None where it trained on a CPU."""


def train(
    network: Network,
    split: Split,
    live: Live,
    training: Training,
    *,
    seed: int,
    workers: int,
    gpus_per_worker: float,
    folder: RunFolder,
    run_name: str,
    progress: Progress,
    noise: Noise | None = None,
) -> Trained:
    """The network after training on the split's live samples, under their present labels.

    It computes in the network's precision, on a GPU where `gpus_per_worker` is above 0 and there is one. `progress`
    counts samples; with `workers > 0` it is called once, at the end. Raises StepError where the loss is not finite,
    memory does not suffice, or training fails.
    """
    started = time.perf_counter()
    config: dict[str, Any] = {
        "network": network,
        "partitions": split.partitions,
        "live": live,
        "training": training,
        "noise": noise,
        "seed": seed,
        "threads": None if workers == 0 else 1,
        "gpu": gpus_per_worker > 0,
    }
    if workers == 0:
        config["progress"] = progress
    trainer = _trainer(config, workers=workers, gpus_per_worker=gpus_per_worker, folder=folder, run_name=run_name)
    try:
        result = trainer.fit()
    except Exception as error:
        raise_cause(error)
    found = result.return_value
    if found is None:
        raise StepError("training ended without a result; start the same command again to go on")
    if "failed" in found:
        raise (RecipeError if found["by_its_settings"] else StepError)(found["failed"])
    if workers:
        # Ray Train's own state, of use to nobody: a further attempt begins anew
        folder.delete_folder(folder.path("training"))
        progress(live.count * found["epochs"], live.count * found["epochs"])
    return Trained(
        found["weights"],
        found["epochs"],
        found["steps"],
        found["accuracy"],
        found["loss"],
        time.perf_counter() - started,
        found["part"],
        found["gpu"],
    )


def _trainer(
    config: dict[str, Any], *, workers: int, gpus_per_worker: float, folder: RunFolder, run_name: str
) -> TorchTrainer:
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    return TorchTrainer(
        _train_loop,
        train_loop_config=config,
        # NCCL refuses two processes on one GPU
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus_per_worker >= 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus_per_worker > 0 and workers > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus_per_worker} if gpus_per_worker and workers else None,
        ),
        run_config=None
        if workers == 0
        else ray.train.RunConfig(
            # under the same name Ray Train would go on from the state of the previous attempt
            name=f"{run_name}-{uuid.uuid4().hex[:8]}",
            storage_path=folder.path("training"),
            storage_filesystem=folder.files,
            # every attempt begins anew: only time is lost
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS_OF_A_TRAINING),
        ),
    )


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    rank, world = 0, 1
    # in local mode there is nothing to ask, and inside a trial of Ray Tune it would be an error
    alone = config["threads"] is None
    if not alone:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(config["threads"])
    network: Network = config["network"]
    training: Training = config["training"]
    # a process without a GPU of its own sees those of other processes nevertheless
    on_gpu = config["gpu"] and torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda") if alone else ray.train.torch.get_device()
    # in local mode, training must leave the driver's generator as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"] * 1_000_003 + rank)
        # convolutions on the CPU and on tensor cores take this layout: 16 s an epoch on two cores instead of 25
        model = load_network(network)
        if training.method == "co_teaching":
            model = twins(model, network.spec.head)
        model = model.to(device).to(memory_format=torch.channels_last).train()
        parallel = ray.train.torch.prepare_model(model, move_to_device=device) if world > 1 else model
        images = LiveImages(
            config["partitions"][rank::world],
            config["live"],
            network.spec.image,
            seed=config["seed"] + 7919 * rank,
            alone=world == 1,
        )
        try:
            outcome = fit_network(
                parallel,
                images,
                training,
                spec=network.spec.image,
                live=config["live"].count,
                world=world,
                device=device,
                seed=config["seed"],
                progress=config.get("progress", lambda done, total: None),
                classes=network.spec.classes,
                noise=config["noise"],
                precision=network.precision,
            )
        except StepError as error:
            if alone or world > 1:
                raise
            # raised, Ray Train would take it for a lost worker, and begin again
            return {"failed": str(error), "by_its_settings": isinstance(error, RecipeError)}
    return {"weights": to_bytes(model.first if isinstance(model, Twins) else model), "gpu": gpu_name(device), **outcome}


def twins(model: torch.nn.Module, head: str) -> Twins:
    """The network and a copy with a head of its own: two networks that start alike would stay alike."""
    twin = copy.deepcopy(model)
    twin.get_submodule(head).reset_parameters()  # pyright: ignore[reportCallIssue]  the head is a Linear
    return Twins(model, twin)


def fit_network(
    model: torch.nn.Module,
    images: LiveImages,
    training: Training,
    *,
    spec: ImageSpec,
    live: int,
    world: int,
    device: torch.device,
    seed: int,
    progress: Progress,
    classes: int,
    noise: Noise | None = None,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """The training loop itself; every rank takes the same number of steps.

    Where memory does not suffice for a step's samples, they go through the network in parts, whose gradients add up
    to the same step (but for batch normalisation, whose statistics are then those of a part).
    """
    per_rank = max(1, training.batch_size // world)
    steps_per_epoch = max(1, math.ceil(live / (per_rank * world)))
    optimizer = _optimizer(model, training)
    total_steps = min(steps_per_epoch * training.epochs, training.max_steps or sys.maxsize)
    augment = augmentation(training.augment, spec.size)
    passes = Passes(
        model,
        optimizer,
        objective(training.method, Size(classes, images.samples, total_steps), training.method_arguments, noise),
        _mix(training, classes),
        BatchSize(per_rank),
        spec,
        world,
        device,
        precision,
    )
    average = _average(model, training.ema)
    taken = 0
    epochs, accuracy, loss_mean = 0, 0.0, 0.0
    for epoch in range(training.epochs):
        generator = torch.Generator().manual_seed((seed * 10_007 + epoch) * 2 + 1)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in images.batches(per_rank, min(steps_per_epoch, total_steps - taken), epoch):
            _set_learning_rate(optimizer, training, taken / total_steps)
            sums += passes.step(replace(batch, pixels=augment(batch.pixels, generator)))
            taken += 1
            if average is not None:
                average.update_parameters(_of_ranks(model))
            progress(min(taken * per_rank * world, live * training.epochs), live * training.epochs)
        if world > 1:
            torch.distributed.all_reduce(sums)
        loss_mean, accuracy = float(sums[0] / sums[2]), float(sums[1] / sums[2])
        epochs = epoch + 1
        _refuse_divergence(loss_mean, epochs, training)
        reached = training.until_train_accuracy is not None and accuracy >= training.until_train_accuracy
        if reached or taken >= total_steps:
            break
    if average is not None:
        _of_ranks(model).load_state_dict(average.module.state_dict())
    return {"epochs": epochs, "steps": taken, "accuracy": accuracy, "loss": loss_mean, "part": passes.batch.reduced}


def _refuse_divergence(loss: float, epoch: int, training: Training) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"training diverged in epoch {epoch} (loss {loss}); lower the learning rate "
            f"({training.learning_rate:g}) of this section of the run file"
        )


def _of_ranks(model: torch.nn.Module) -> torch.nn.Module:
    """The network itself, which DistributedDataParallel wraps."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _average(model: torch.nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    return AveragedModel(_of_ranks(model), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _set_learning_rate(optimizer: torch.optim.Optimizer, training: Training, done: float) -> None:
    """The learning rate after a share of all steps."""
    if training.schedule == "cosine":
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _mix(training: Training, classes: int) -> Mix | None:
    if training.method != "mixup":
        return None
    return partial(mixed_up, classes=classes, **{**METHODS["mixup"], **training.method_arguments})


def _optimizer(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        training.learning_rate,
        training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.momentum > 0,
    )
