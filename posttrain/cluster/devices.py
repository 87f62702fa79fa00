"""What a GPU adds to a computation: which one, how exactly, how data get there, and how much of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import ray
import torch
from torch import Tensor

from posttrain.errors import ConfigError, StepError
from posttrain.schema import Precision

T = TypeVar("T")

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


_ROUNDING = 1e-6
"""1 / (1 / 49) is a little less than 49."""


def own_device() -> torch.device:
    """The GPU that Ray has given to this process, else the CPU; without Ray, the GPU that is there."""
    # a process without a GPU of its own sees those of the others all the same
    given = not ray.is_initialized() or ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def places(gpus: float, available: float) -> int:
    """How many processes can have so many GPUs each, more than 0: Ray takes a fraction from a single GPU."""
    if gpus >= 1 or available < 1:
        return int(available / gpus + _ROUNDING)
    return int(available) * int(1 / gpus + _ROUNDING)


def gpus_of_each(processes: int, available: float) -> float:
    """One GPU for each process, or an equal share of one where there are fewer; 0 where there is none."""
    return 1.0 / max(1, math.ceil(processes / int(available))) if available >= 1 else 0.0


def refuse_missing_gpus(key: str, gpus: float, processes: int) -> None:
    """Raises ConfigError, naming the run file's key, where so many processes cannot have so many GPUs each.

    One that has none never starts, and Ray Train would wait for it for ever.
    """
    there = ray.cluster_resources().get("GPU", 0.0)
    if gpus and processes > places(gpus, there):
        raise ConfigError(
            f"{key} = {gpus:g} is too much for {processes} worker{'s' * (processes > 1)}: this machine shows {there:g} "
            f"GPU{'s' * (there != 1)}; leave it out"
        )


def name_of(device: torch.device) -> str | None:
    """What a GPU is called, None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products and convolutions are carried out in `precision`; weights stay as they are."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "float32")


def moved(batch: Tensor, device: torch.device) -> Tensor:
    """The batch on the device; to a GPU from page-locked memory, while the program goes on."""
    if device.type == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


class BatchSize:
    """A number of samples that is halved, and stays so, each time that memory does not suffice for it."""

    def __init__(self, size: int) -> None:
        self.first = self.size = size

    @property
    def reduced(self) -> int | None:
        """The size, where it is not the one that was asked for."""
        return self.size if self.size < self.first else None

    def carried(self, work: Callable[[int], T]) -> T:
        """What `work` gives for the largest size tried that it can be done with.

        `work` is called again with half the size after a torch.OutOfMemoryError. Raises StepError where that came
        for a size of 1.
        """
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError as error:
                if self.size == 1:
                    reason = str(error).splitlines()[0] if str(error) else "out of memory"
                    raise StepError(
                        f"memory does not suffice for one image at a time ({reason}); use a GPU with more memory, "
                        "fewer workers on one (ray.gpus_per_worker), or ray.precision: bfloat16"
                    ) from None
            # behind the handler: in it, the error still holds the tensors that fill the memory
            self.size //= 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
