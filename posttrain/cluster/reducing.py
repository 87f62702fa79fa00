"""Sums over the live samples of a view, formed by the pool and the same for any number of actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from posttrain.cluster.pool import Pool
from posttrain.cluster.views import View
from posttrain.influence.curvature import hessian_block
from posttrain.influence.probe import BlockFn

REDUCTION_GROUPS = 32
"""Sums are formed in this many groups of partitions, each by one actor, and added up in their order: the result
depends neither on the number of actors nor on which of them was faster."""


class Reducer:
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


def reduction_groups(partitions: Sequence[int], count: int) -> list[list[int]]:
    """At most `count` groups of partitions, the same for any number of actors."""
    count = max(1, min(count, len(partitions)))
    return [list(partitions[first::count]) for first in range(count)]
