"""Samples whose features are held in memory: what `ensemble.choose`, `ensemble.refit` and `score_round` run on."""

# torch.Tensor.split carries no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.probe import Reduce, Standardizer, in_memory
from posttrain.influence.score_round import BlockSums, ScoringPlan
from posttrain.influence.scores import LeaveOneOut, score_columns
from posttrain.schema import uniform


@dataclass(frozen=True)
class InMemory:
    """`LiveSamples`, or validation samples, with their features in memory."""

    features: Mapping[str, Float[Tensor, "samples raw"]]
    """Of each layer, float16 or float32."""
    labels: Int[Tensor, " samples"]
    ids: Int[np.ndarray, " samples"] | None = None
    """Of which the random control score is a function; None: the rows."""
    relabelled: Tensor | None = None
    """bool [samples]: which no longer have the label they came with; None: none."""
    blocks: int | list[int] = 2048
    """Samples in a block, or of each block: sums are formed block by block, and their order decides the last bits."""

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        features = torch.cat([self.features[name].float() for name in layers], dim=1)
        return in_memory(features, self.labels, self.blocks)

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        return in_memory(self.side_by_side(layers, standardizers), self.labels, self.blocks)

    def side_by_side(self, layers: Sequence[str], standardizers: Sequence[Standardizer]) -> Tensor:
        """The layers' standardised features, each layer's followed by a 1."""
        return torch.cat([s(self.features[name]) for name, s in zip(layers, standardizers, strict=True)], dim=1)

    def leave_one_out(self, plan: ScoringPlan) -> InMemoryPass:
        ids = np.arange(len(self.labels)) if self.ids is None else self.ids
        uniforms = torch.from_numpy(uniform(ids, plan.seed))
        parts = (self.labels, uniforms, *(self.features[name] for name in plan.ensemble.layers))
        found: list[LeaveOneOut] = []
        for labels, own, *raw in zip(*(part.split(self.blocks) for part in parts), strict=True):
            block = InMemory(dict(zip(plan.ensemble.layers, raw, strict=True)), labels)
            features = block.side_by_side(plan.ensemble.layers, plan.ensemble.standardizers)
            found.append(plan.leave_one_out(features, labels, own))
        return InMemoryPass(tuple(found), None if self.relabelled is None else self.relabelled.split(self.blocks))

    def rows(self, mask: Tensor) -> InMemory:
        """The samples in a mask [samples]; each block keeps those of its own that are in it."""
        sizes = [self.blocks] * (len(mask) // self.blocks + 1) if isinstance(self.blocks, int) else self.blocks
        ends = np.minimum(np.cumsum(sizes), len(mask))
        kept = np.diff(np.concatenate([[0], mask.cumsum(0).numpy()])[np.concatenate([[0], ends])])
        return replace(
            self,
            blocks=[int(size) for size in kept if size],
            features={name: own[mask] for name, own in self.features.items()},
            labels=self.labels[mask],
            ids=None if self.ids is None else self.ids[mask.numpy()],
            relabelled=None if self.relabelled is None else self.relabelled[mask],
        )


@dataclass(frozen=True)
class InMemoryPass:
    """`LeaveOneOutPass` over blocks in memory."""

    blocks: tuple[LeaveOneOut, ...]
    relabelled: Sequence[Tensor] | None = field(repr=False)

    def sums(self, fn: BlockSums) -> tuple[Tensor, ...]:
        total: tuple[Tensor, ...] | None = None
        for at, block in enumerate(self.blocks):
            if self.relabelled is not None:
                block = block.rows(~self.relabelled[at])
            part = fn(block.logits, block.labels)
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        return total or ()

    def tables(self, noise_model: NoiseModel) -> Iterator[dict[str, np.ndarray]]:
        return (score_columns(replace(block, noise_model=noise_model)) for block in self.blocks)
