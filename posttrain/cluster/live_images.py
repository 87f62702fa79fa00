"""Batches of decoded live images, for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from posttrain.cluster.partitioning import Partition
from posttrain.errors import StepError
from posttrain.live import Live
from posttrain.schema import FILE, IMAGE, LABEL, SAMPLE_ID, ImageSpec
from posttrain.vision.images import decode_column

WINDOW_BYTES = 2**30
"""Decoded pixels that a training process holds: data that fit are decoded once, others once per epoch."""


class LiveImages:
    """Decoded live images of some partitions in seeded random order.

    Partitions are visited in a random order, as many at a time as fit `window_bytes`; within these the order is
    random. What fits whole is decoded once. `alone`: no other rank waits for this one at every step.
    """

    def __init__(
        self,
        partitions: tuple[Partition, ...],
        live: Live,
        spec: ImageSpec,
        *,
        seed: int,
        alone: bool = True,
        window_bytes: int = WINDOW_BYTES,
        get: Callable[[Any], Any] = ray.get,
    ) -> None:
        self._partitions, self._live = partitions, live
        self._spec, self._seed, self._alone, self._get = spec, seed, alone, get
        height, width = spec.size
        rows = max((p.rows for p in partitions), default=1)
        self._window = max(1, window_bytes // max(1, rows * spec.channels * height * width))
        self._whole: tuple[Tensor, Tensor] | None = None
        self._readable = 0
        self._unreadable: str | None = None
        """The first image that could not be read, and why."""

    def batches(self, size: int, steps: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches (uint8 [n, c, h, w], labels [n]); begins again where the rank has fewer samples.

        A rank that is alone gives one less where a single sample would be left for the last.
        """
        taken, again = 0, 0
        while taken < steps:
            generator = np.random.default_rng([self._seed, epoch, again])
            before = taken
            rest: tuple[Tensor, Tensor] | None = None
            for pixels, labels in self._windows(generator):
                if rest is not None:
                    pixels, labels = torch.cat([rest[0], pixels]), torch.cat([rest[1], labels])
                whole = len(labels) // size * size
                for start in range(0, whole, size):
                    if taken == steps:
                        return
                    yield pixels[start : start + size], labels[start : start + size]
                    taken += 1
                rest = (pixels[whole:], labels[whole:]) if whole < len(labels) else None
            # a batch of one would leave batch normalisation without a variance
            if rest is not None and len(rest[1]) > 1 and taken < steps:
                yield rest
                taken += 1
            elif rest is not None and taken == steps - 1 and self._alone:
                return
            if taken == before:
                if self._unreadable is not None:
                    raise StepError(
                        f"of the images of a training worker {self._readable} can be read, and two are needed; the "
                        f"first that cannot is {self._unreadable}"
                    )
                raise StepError("a training worker has fewer than two samples; use fewer ray.train_workers")
            again += 1

    def _windows(self, generator: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        if self._window >= len(self._partitions):
            if self._whole is None:
                self._whole = self._decode(self._partitions)
            order = torch.from_numpy(generator.permutation(len(self._whole[1])))
            # gathered batch by batch in `batches` would copy less at once, but a permuted copy is one line
            yield self._whole[0][order], self._whole[1][order]
            return
        visit = generator.permutation(len(self._partitions))
        for start in range(0, len(visit), self._window):
            chosen = tuple(self._partitions[i] for i in visit[start : start + self._window])
            pixels, labels = self._decode(chosen)
            order = torch.from_numpy(generator.permutation(len(labels)))
            yield pixels[order], labels[order]

    def _decode(self, partitions: tuple[Partition, ...]) -> tuple[Tensor, Tensor]:
        pixels, labels = [], []
        for partition in partitions:
            block = self._get(partition.block)
            rows = self._live.rows(partition.index, block.num_rows)
            block = block.take(rows)
            spec = self._spec
            decoded, readable, reasons = decode_column(
                block[IMAGE], channels=spec.channels, size=spec.size, shape=spec.shape, background=spec.background
            )
            self._readable += int(readable.sum())
            if reasons and self._unreadable is None:
                row = block.slice(int(np.flatnonzero(~readable)[0]), 1)
                where = f"{row[FILE][0].as_py() or ''} sample_id {row[SAMPLE_ID][0].as_py()!r}".strip()
                self._unreadable = f"{where}: {reasons[0]}"
            given = self._live.labels(partition.index, rows, block[LABEL].to_numpy())
            # before the first embedding nothing has been quarantined yet
            kept = torch.from_numpy(given[readable] >= 0)
            pixels.append(decoded[kept])
            labels.append(torch.from_numpy(given[readable].astype(np.int64))[kept])
        if not pixels:
            height, width = self._spec.size
            return torch.empty(0, self._spec.channels, height, width, dtype=torch.uint8), torch.empty(0).long()
        return torch.cat(pixels), torch.cat(labels)
