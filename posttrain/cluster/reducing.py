"""Sums over the live samples of a view, formed by the pool and the same for any number of actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.cluster.cache import LiveBlock
from posttrain.cluster.pool import Pool
from posttrain.cluster.shared import share
from posttrain.cluster.views import View
from posttrain.influence.curvature import hessian_block
from posttrain.influence.probe import BlockFn

REDUCTION_GROUPS = 32
"""Sums are formed in this many groups of partitions, each by one actor, and added up in their order: the result
depends neither on the number of actors nor on which of them was faster."""

_INLINE_BYTES = 1_000_000
"""Arguments of more bytes travel once through the object store instead of with every call."""

_MATRICES_BYTES = 2_000_000_000
"""Most bytes of the Hessian blocks that all groups together send to the driver."""


class Reducer:
    """`influence.probe.Reduce` over the pool."""

    def __init__(self, pool: Pool, view: View) -> None:
        self._pool, self.view = pool, view
        self.shared_view = share(view, view.key)

    def __call__(self, fn: BlockFn, *arguments: Tensor) -> tuple[Tensor, ...]:
        plain = [a.detach().cpu().numpy() for a in arguments]
        large = sum(a.nbytes for a in plain) > _INLINE_BYTES
        sent = share(plain) if large else plain
        count = REDUCTION_GROUPS
        if fn is hessian_block:
            # of each group it is a matrix of ((C - 1) d)^2 float64
            classes, dim = arguments[0].shape
            count = min(count, _MATRICES_BYTES // (8 * ((classes - 1) * dim) ** 2))
        return self.over_groups(
            reduction_groups(self.view.partitions, count),
            lambda actor, groups: actor.reduce.remote(self.shared_view, groups, fn, sent),
        )

    def over_groups(self, groups: list[list[int]], call: Callable[[Any, list[list[int]]], Any]) -> tuple[Tensor, ...]:
        """The sums of all groups, each formed by one actor, added up in their order."""
        count = len(self._pool.ready())
        owned = [mine for i in range(count) if (mine := list(range(i, len(groups), count)))]
        # the first call goes to the first actor, and so on: each has the features of its groups in its cache
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


def sum_groups(groups: Sequence[Sequence[int]], sums_of: Callable[[int], Sequence[Tensor]]) -> list[list[np.ndarray]]:
    """For each group of partitions, the sums of `sums_of(partition)` over it, in the order of its partitions."""
    found = []
    for group in groups:
        total: Sequence[Tensor] = ()
        for at, partition in enumerate(group):
            sums = sums_of(partition)
            total = [a + b for a, b in zip(total, sums, strict=True)] if at else sums
        found.append([t.cpu().numpy() for t in total])
    return found


def sums_of_block(fn: BlockFn, block: LiveBlock, arguments: Sequence[Tensor]) -> list[Tensor]:
    """`fn` of a block, float64."""
    return [t.double() for t in fn(block.features, block.labels, *arguments)]
