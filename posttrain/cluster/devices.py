"""How a process computes: on which GPU or how many threads, in which number format, and how much at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
"""Added before rounding down: 1 / (1 / 49) is a little less than 49."""


def own_device() -> torch.device:
    """The GPU that Ray has given to this process, else the CPU; without Ray, the GPU that is there."""
    # a process that Ray has given no GPU sees those of the others all the same
    given = not ray.is_initialized() or ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def max_processes(gpus: float, available: float) -> int:
    """How many processes can have `gpus` GPUs each (more than 0): Ray takes a fraction from a single GPU."""
    if gpus >= 1 or available < 1:
        return int(available / gpus + _ROUNDING)
    return int(available) * int(1 / gpus + _ROUNDING)


def gpus_per_process(processes: int, available: float) -> float:
    """One GPU for each process, or an equal share of one where there are fewer; 0 where there is none."""
    return 1.0 / max(1, math.ceil(processes / int(available))) if available >= 1 else 0.0


def refuse_missing_gpus(key: str, gpus: float, processes: int) -> None:
    """Raises ConfigError, naming the run file's key, where so many processes cannot have so many GPUs each.

    A process that gets none never starts, and Ray Train would wait for it for ever.
    """
    there = ray.cluster_resources().get("GPU", 0.0)
    if gpus and processes > max_processes(gpus, there):
        raise ConfigError(
            f"{key} = {gpus:g} is too much for {processes} worker{'s' * (processes > 1)}: this machine shows {there:g} "
            f"GPU{'s' * (there != 1)}; leave it out"
        )


def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU, None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products and convolutions are carried out in `precision`; weights stay as they are."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "float32")


def moved(batch: Tensor, device: torch.device) -> Tensor:
    """The batch on the device; to a GPU it is copied from page-locked memory, while the program goes on."""
    if device.type == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads: with another number, sums may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class BatchSize:
    """How many samples are computed at once: halved for good each time that memory does not suffice for them."""

    def __init__(self, size: int) -> None:
        self.first = self.size = size

    @property
    def reduced(self) -> int | None:
        """The size, where it has been halved; else None."""
        return self.size if self.size < self.first else None

    def run(self, work: Callable[[int], T]) -> T:
        """The result of `work` for the size.

        After a torch.OutOfMemoryError, `work` is called again with half the size. Raises StepError where memory does
        not suffice for a size of 1.
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
            # after the handler: inside it, the error still holds the tensors that fill the memory
            self.size //= 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
