"""What an actor keeps between calls: features that it has read, and leave-one-out logits that it has computed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from posttrain.cluster.shared import Shared
from posttrain.cluster.views import View, read_live, side_by_side
from posttrain.influence.score_round import ScoringPlan
from posttrain.influence.scores import LeaveOneOut
from posttrain.schema import uniform
from posttrain.store.features import Shard

_VIEWS_KEPT = 8
"""Most views whose features are kept: those of an ensemble's members, live and held out."""


@dataclass(frozen=True)
class LiveBlock:
    """The live rows of a partition, on the actor's device."""

    shard: Shard
    features: Tensor
    """[rows, d] float32, those of the view's layers side by side."""
    labels: Tensor
    """[rows] int64, the present ones."""


class FeatureCache:
    """Live blocks by view and partition, and the leave-one-out logits of one plan, in at most `limit` bytes.

    The oldest view makes room for the one that is asked for; what still does not fit is made again for every call.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._used = 0
        self._blocks: OrderedDict[str, dict[int, LiveBlock]] = OrderedDict()
        """By the view's key, then by partition."""
        self._plan = ("", "")
        """The keys of the view and the plan that `_logits` belong to."""
        self._logits: dict[int, tuple[Shard, LeaveOneOut]] = {}

    def block(self, view: Shared[View], partition: int) -> LiveBlock:
        """The live rows of a partition."""
        if view.key not in self._blocks:
            self._blocks[view.key] = {}
            while len(self._blocks) > _VIEWS_KEPT:
                self._forget_oldest_view()
        blocks = self._blocks[view.key]
        if partition in blocks:
            return blocks[partition]
        found = view.get()
        shard = read_live(found, partition)
        features = side_by_side(shard, found).to(self._device)
        block = LiveBlock(shard, features, torch.from_numpy(shard.labels.astype(np.int64)).to(self._device))
        if self._used + features.nbytes > self._limit and self._plan[0] != view.key:
            self._forget_logits()
        if self._fits(features.nbytes, view.key):
            self._used += features.nbytes
            blocks[partition] = block
        return block

    def leave_one_out(self, view: Shared[View], plan: Shared[ScoringPlan], partition: int) -> tuple[Shard, LeaveOneOut]:
        """The live rows of a partition without their features, and their leave-one-out logits."""
        if self._plan != (view.key, plan.key):
            self._forget_logits()
            self._plan = (view.key, plan.key)
        if partition in self._logits:
            return self._logits[partition]
        scoring = plan.get()
        block = self.block(view, partition)
        sampled = uniform(block.shard.sample_ids.to_numpy(zero_copy_only=False), scoring.seed)
        logits = scoring.leave_one_out(block.features, block.labels, torch.from_numpy(sampled))
        found = replace(block.shard, features={}), logits
        if self._fits(logits.nbytes, view.key):
            self._used += logits.nbytes
            self._logits[partition] = found
        return found

    def _fits(self, size: int, key: str) -> bool:
        """Whether so many more bytes fit, once views older than that of the key are forgotten."""
        while self._used + size > self._limit and next(iter(self._blocks)) != key:
            self._forget_oldest_view()
        return self._used + size <= self._limit

    def _forget_oldest_view(self) -> None:
        _, dropped = self._blocks.popitem(last=False)
        self._used -= sum(block.features.nbytes for block in dropped.values())

    def _forget_logits(self) -> None:
        self._used -= sum(logits.nbytes for _, logits in self._logits.values())
        self._plan, self._logits = ("", ""), {}
