"""One step of training: as many forward and backward passes as memory asks for, then the optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from posttrain.cluster.devices import BatchSize, computing_in, moved
from posttrain.errors import StepError
from posttrain.schema import ImageSpec, Precision
from posttrain.vision.images import normalize
from posttrain.vision.losses import Objective

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(inputs, labels [n]) -> mixed inputs, soft labels [n, classes]."""


@dataclass(frozen=True)
class Batch:
    """Live samples, as the training loop takes them."""

    pixels: Tensor
    """uint8 [n, channels, height, width]."""
    labels: Tensor
    """int64 [n]."""
    samples: Tensor
    """int64 [n]: their positions among the samples of the training process."""

    def split(self, parts: int) -> list[Batch]:
        """As many nearly equal parts."""
        own = (tensor.tensor_split(parts) for tensor in (self.pixels, self.labels, self.samples))
        return [Batch(*part) for part in zip(*own, strict=True)]

    def at(self, rows: Tensor | slice) -> Batch:
        """The samples of these rows."""
        return Batch(self.pixels[rows], self.labels[rows], self.samples[rows])


def joined(parts: Sequence[Batch]) -> Batch:
    """One batch of several, of which there is at least one."""
    own = zip(*((part.pixels, part.labels, part.samples) for part in parts), strict=True)
    return Batch(*(torch.cat(tensors) for tensors in own))


class Passes:
    """Steps of the optimizer, each in as many forward and backward passes as memory asks for."""

    _SETTLING = 3
    """Steps until memory is known to suffice. In these the ranks all-reduce an out-of-memory flag before the gradients:
    a rank that ran out of memory in the middle of that exchange would leave the others waiting for ever."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        mix: Mix | None,
        batch: BatchSize,
        spec: ImageSpec,
        world: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.batch = batch
        self._model, self._optimizer, self._spec = model, optimizer, spec
        self._objective, self._mix = objective, mix
        self._world, self._device = world, device
        self._precision: Precision = precision
        # the gradients of float16 would vanish; the scaler skips a step where they overflow
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self._settled, self._settled_size = 0, 0
        self._taken = 0

    def step(self, batch: Batch) -> Tensor:
        """One step; float64 (sum of losses, correct, n)."""
        sums = self.batch.run(lambda size: self._gradients(batch, size))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._objective.after_step()
        self._taken += 1
        return sums

    def _gradients(self, batch: Batch, size: int) -> Tensor:
        if size != self._settled_size:
            self._settled, self._settled_size = 0, size
        settling = self._settled < self._SETTLING
        before = [buffer.clone() for buffer in self._model.buffers()] if settling else []
        self._optimizer.zero_grad(set_to_none=True)
        sums, short = None, False
        try:
            sums = self._accumulated(batch, size, apart=settling)
        except torch.OutOfMemoryError:
            if not settling and self._world > 1:
                raise StepError(
                    f"a training worker ran out of memory after {self._SETTLING} steps of {size} samples went well; "
                    "lower batch_size of this section of the run file"
                ) from None
            short = True
        if settling and self._world > 1:
            flag = torch.tensor(float(short), device=self._device)
            torch.distributed.all_reduce(flag)
            short = bool(flag)
        if sums is None or short:
            # statistics of batch normalisation: the step begins anew
            for buffer, kept in zip(self._model.buffers(), before, strict=False):
                buffer.copy_(kept)
            self._optimizer.zero_grad(set_to_none=True)
            raise torch.OutOfMemoryError(f"a step of {len(batch.labels)} samples, {size} at a time")
        if settling:
            self._settled += 1
            if self._world > 1:
                _average_gradients(self._model, self._world)
        return sums

    def _accumulated(self, batch: Batch, size: int, *, apart: bool) -> Tensor:
        """Adds up the gradients of the mean loss; with `apart` every rank's stay its own."""
        whole = len(batch.labels)
        parts = batch.split(math.ceil(whole / size))
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for number, part in enumerate(parts):
            alone = self._world > 1 and (apart or number < len(parts) - 1)
            with cast(Any, self._model).no_sync() if alone else contextlib.nullcontext():
                inputs = normalize(moved(part.pixels, self._device), self._spec.mean, self._spec.std)
                labels = targets = moved(part.labels, self._device)
                if self._mix is not None:
                    inputs, targets = self._mix(inputs, labels)
                inputs = inputs.contiguous(memory_format=torch.channels_last)
                with computing_in(self._precision, self._device):
                    logits = self._model(inputs)
                loss = self._objective.loss(logits.float(), targets, moved(part.samples, self._device), self._taken)
                self._scaler.scale(loss * (len(labels) / whole)).backward()
            with torch.no_grad():
                # of twins, the first
                predicted = (logits if logits.ndim == 2 else logits[0]).argmax(dim=1)
                correct = (predicted == labels).sum()
                sums += torch.stack([loss.detach() * len(labels), correct, correct.new_tensor(len(labels))]).double()
        return sums


def _average_gradients(model: torch.nn.Module, world: int) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
