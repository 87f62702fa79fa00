"""Calibration: temperature, memorisation offset, and the sums over samples from which the label noise is estimated.

The sums run over the validation samples (which the network has not seen, and whose labels are as noisy as the rest, or
better) and over the live samples, with leave-one-out logits. No clean label is used. Notation:

    z   logits of a sample; of a live sample the leave-one-out logits
    y   its given label
    t   inverse temperature: softmax(t z) has the lowest cross-entropy on the validation labels (temperature scaling,
        Guo et al. 2017)
    p   softmax(t z)
    b   memorisation offset: by how much the given label's logit of a live sample is inflated, because the network was
        trained on that label. Once b is subtracted, live labels are on average as probable as validation labels. Ours;
        no published source
"""

# Tensor.scatter and others carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence import noise_matrix
from posttrain.influence.probe import Reduce

_OFFSETS = 257
_LARGEST_OFFSET = 16.0
_BINS = 4096
_LAST_BIN = 16.0
"""Confidences are binned by -log(1 - confidence) up to this: e^-16 is what float32 can still tell from 1. So are
top-2 gaps."""


@dataclass(frozen=True)
class CalibrationSums:
    """Sums over samples. Sums of several blocks add up."""

    count: Tensor
    self_confidence: Float[Tensor, " offsets"]
    """Sum of the given label's probability, for each memorisation offset b of a grid."""
    confident_joint: Float[Tensor, "classes classes"]
    """V of `noise_matrix`, from p."""
    confidences: Float[Tensor, " bins"]
    """Histogram of the largest class probability."""
    disagreeing: Float[Tensor, " bins"]
    """The same, of the samples whose likeliest class is not the given label."""
    top2_gaps: Float[Tensor, " bins"]
    """Histogram of the top-2 gap in t z with the given label masked. It is large where the label is wrong, since the
    right class then is one of the two; memorisation of the given label has no part in it."""
    top2_gaps_if_wrong: Float[Tensor, " bins"]
    """The null of `top2_gaps`, what it would be under wrong labels: every sample is given each of the other labels in
    turn, all with equal weight."""
    labels: Float[Tensor, " classes"]
    """Samples by given label."""
    predicted: Float[Tensor, " classes"]
    """Samples by likeliest class."""


def calibration_sums(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], temperature: float
) -> tuple[Tensor, ...]:
    """The fields of `CalibrationSums` of a batch."""
    scaled = temperature * logits.double()
    p = scaled.softmax(dim=1)
    # sigmoid(u - b) is the given label's probability after its logit was lowered by b
    u = -log_odds_of_others(scaled, labels)
    self_confidence = torch.sigmoid(u[:, None] - _offset_grid().to(u)).sum(dim=0)
    confidence, likeliest = p.max(dim=1)
    depth = -torch.log1p(-confidence.clamp_max(1 - math.exp(-_LAST_BIN)))
    bins = (depth * (_BINS / _LAST_BIN)).long().clamp_max(_BINS - 1)
    confidences = torch.bincount(bins, minlength=_BINS).double()
    disagreeing = torch.bincount(bins[likeliest != labels], minlength=_BINS).double()
    count = torch.tensor(float(len(labels)), dtype=torch.float64, device=p.device)
    by_class = [torch.bincount(c, minlength=p.shape[1]).double() for c in (labels, likeliest)]
    joint = noise_matrix.confident_joint(p, labels)
    return count, self_confidence, joint, confidences, disagreeing, *_top2_gaps(scaled, labels), *by_class


def calibration_sums_of_block(
    features: Tensor, labels: Tensor, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """`calibration_sums` of a block of features under a linear head [classes, d]; `temperature` is a scalar."""
    return calibration_sums(features @ weights.to(features).T, labels, float(temperature))


def validation_sums(reduce: Reduce, weights: Tensor) -> tuple[CalibrationSums, float]:
    """The calibration sums of the validation samples under a linear head, and the fitted t at which they were made."""
    temperature = fitted_temperature(lambda t: reduce(temperature_moments, weights, t))
    t = torch.tensor(temperature, dtype=torch.float64)
    return CalibrationSums(*reduce(calibration_sums_of_block, weights, t)), temperature


def log_odds_of_others(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log sum_{c != y} exp z_c - z_y: under the softmax, the log odds of all other labels against the given one."""
    given = labels[:, None]
    return logits.scatter(1, given, -torch.inf).logsumexp(dim=1) - logits.gather(1, given)[:, 0]


def temperature_moments(
    features: Tensor, labels: Tensor, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a block of: 1, and the first and second derivative of the cross-entropy by t."""
    logits = (features @ weights.to(features).T).double()
    p = (temperature.to(logits) * logits).softmax(dim=1)
    mean = (p * logits).sum(dim=1)
    slope = mean - logits.gather(1, labels[:, None])[:, 0]
    curve = (p * (logits - mean[:, None]).square()).sum(dim=1)
    return torch.tensor(float(len(labels)), dtype=torch.float64), slope.sum(), curve.sum()


def fitted_temperature(moments: Callable[[Tensor], tuple[Tensor, ...]], *, steps: int = 50) -> float:
    """The t > 0 with the lowest cross-entropy (convex in t), between 1/20 and 20.

    `moments(t)` gives the sums of `temperature_moments`. Newton steps, each at most by a factor of 2.
    """
    t = 1.0
    for _ in range(steps):
        _, slope, curve = (float(part) for part in moments(torch.tensor(t, dtype=torch.float64)))
        target = t - slope / curve if curve > 0 else (20.0 if slope < 0 else 0.05)
        following = min(max(target, t / 2, 0.05), 2 * t, 20.0)
        if abs(following - t) <= 1e-5 * t:
            return following
        t = following
    return t


def memorisation_offset(
    live: CalibrationSums, target: float, *, removed: int = 0, removed_self_confidence: float = 0.0
) -> float:
    """The b at which the mean self-confidence of live and removed samples is `target`; 0 where it is lower anyway.

    `removed`: samples that were removed; `removed_self_confidence`: sum of their labels' probabilities at that time.
    """
    means = ((live.self_confidence + removed_self_confidence) / (live.count + removed)).tolist()
    return crossing(_offset_grid().tolist(), [-mean for mean in means], -target)


def crossing(grid: Sequence[float], increasing: Sequence[float], target: float) -> float:
    """Where values that increase along a grid reach `target`, interpolated; the grid's end where they never do.

    The grid's start where the first value reaches it already, or is not a number.
    """
    # not a number where there are no samples: nothing is known then
    if not increasing[0] < target:
        return grid[0]
    for k in range(1, len(grid)):
        if increasing[k] >= target:
            share = (target - increasing[k - 1]) / (increasing[k] - increasing[k - 1])
            return grid[k - 1] + share * (grid[k] - grid[k - 1])
    return grid[-1]


def _offset_grid() -> Tensor:
    return torch.linspace(0, _LARGEST_OFFSET, _OFFSETS, dtype=torch.float64)


def _top2_gaps(scaled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`top2_gaps` and `top2_gaps_if_wrong` of a batch of logits t z."""
    classes = scaled.shape[1]
    gaps, gaps_if_wrong = (torch.zeros(_BINS, dtype=torch.float64, device=scaled.device) for _ in range(2))
    # of two classes only one remains where the label is masked: there is no gap
    if classes < 3 or not len(labels):
        return gaps, gaps_if_wrong
    (first, second, third), ranks = scaled.topk(3, dim=1).values.T, scaled.topk(3, dim=1).indices
    # the gap where the first, the second, or any other class is masked
    masked = torch.stack([second - third, first - third, first - second], dim=1)
    is_label = torch.stack([ranks[:, 0] == labels, ranks[:, 1] == labels], dim=1)
    given = torch.cat([is_label, ~is_label.any(dim=1, keepdim=True)], dim=1).double()
    others = torch.cat([torch.ones_like(given[:, :2]), torch.full_like(given[:, :1], classes - 2)], dim=1) - given
    bins = (masked * (_BINS / _LAST_BIN)).long().clamp_max(_BINS - 1).flatten()
    gaps.index_add_(0, bins, given.flatten())
    gaps_if_wrong.index_add_(0, bins, others.flatten() / (classes - 1))
    return gaps, gaps_if_wrong
