"""What the formulas are held against: digits with wrong labels, and refits without a sample.

Nothing here uses the product's own solver: the refits are dense Newton steps on the plain objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from posttrain.influence.probe import BlockFn, Reduce, Standardizer, moments

CLASSES = 10


def over_blocks(features: Tensor, labels: Tensor, sizes: int | Sequence[int] = 97) -> Reduce:
    """Sums over blocks of these sizes, in float64 and in their order, all in memory."""
    cut = sizes if isinstance(sizes, int) else list(sizes)
    blocks = list(zip(features.split(cut), labels.split(cut), strict=True))

    def reduce(fn: BlockFn, *arguments: Tensor) -> tuple[Tensor, ...]:
        parts = [[t.double() for t in fn(h, y, *arguments)] for h, y in blocks]
        return tuple(torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True))

    return reduce


@dataclass(frozen=True)
class Problem:
    """Digits of which some labels are wrong."""

    raw: Tensor
    """[n, raw] features as a backbone would give them."""
    features: Tensor
    """[n, raw + 1] standardised, a 1 appended, float64."""
    labels: Tensor
    flipped: Tensor
    """[n] bool."""
    classes: int = CLASSES

    @property
    def reduce(self) -> Reduce:
        return over_blocks(self.features, self.labels)


def _problem(raw: np.ndarray, labels: np.ndarray, flipped: np.ndarray, classes: int) -> Problem:
    raw_features, given = torch.from_numpy(raw), torch.from_numpy(labels)
    standardizer = Standardizer.from_moments(*moments(raw_features, given))
    features = standardizer(raw_features, torch.float64)
    return Problem(raw_features, features, given, torch.from_numpy(flipped), classes)


def _images() -> tuple[np.ndarray, np.ndarray]:
    """(pixels [1797, 64], digits [1797])."""
    pixels, truth = load_digits(return_X_y=True)
    return np.asarray(pixels), np.asarray(truth)


def digits(samples: int, *, units: int | None = None, seed: int = 0) -> Problem:
    """`samples` digits, every fifth label flipped; features are the 64 pixels, or `units` random ReLU units on them."""
    pixels, truth = _images()
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(pixels))[:samples]
    labels = truth[chosen]
    flipped = np.zeros(samples, bool)
    flipped[draw.permutation(samples)[: samples // 5]] = True
    labels = np.where(flipped, (labels + draw.integers(1, CLASSES, samples)) % CLASSES, labels)
    raw = pixels[chosen]
    if units is not None:
        # centred: each unit is lit by about half of the images
        raw = np.maximum((raw - pixels.mean(axis=0)) / 16 @ draw.normal(size=(64, units)), 0)
    return _problem(raw, labels, flipped, CLASSES)


def grouped_digits(counts: Sequence[tuple[Sequence[int], int]], *, seed: int = 0) -> Problem:
    """For each (digits, count) a class of `count` images of these digits, described by their pixels.

    The labels of every fifth image are shuffled among these, so that the classes keep their sizes.
    """
    pixels, truth = _images()
    draw = np.random.default_rng(seed)
    chosen = [draw.permutation(np.flatnonzero(np.isin(truth, list(shown))))[:count] for shown, count in counts]
    labels = np.repeat(np.arange(len(counts)), [len(images) for images in chosen])
    mixed = draw.permutation(len(labels))
    raw, right = pixels[np.concatenate(chosen)[mixed]], labels[mixed]
    some = draw.permutation(len(labels))[: len(labels) // 5]
    given = right.copy()
    given[some] = right[draw.permutation(some)]
    return _problem(raw, given, given != right, len(counts))


def objective(features: Tensor, labels: Tensor, weights: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy + l2/2 ||W||^2, as the definition has it."""
    loss = torch.nn.functional.cross_entropy(features @ weights.T, labels)
    return loss + l2 / 2 * weights.square().sum()


def dense_hessian(features: Tensor, weights: Tensor, l2: float) -> Tensor:
    """[C d, C d], sample by sample: (1/n) sum S_i (x) h_i h_i^T + l2 I."""
    total = l2 * torch.eye(weights.numel(), dtype=features.dtype)
    for h in features:
        p = (weights @ h).softmax(dim=0)
        total += torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(h, h)) / len(features)
    return total


def refits_without(features: Tensor, labels: Tensor, weights: Tensor, l2: float, rows: Tensor) -> Tensor:
    """The optima [len(rows), C, d] of the objective less the term of each of `rows`, from `weights` on.

        (1/n) sum_{j != i} loss_j(W) + l2/2 ||W||^2

    Newton steps with the dense curvature at `weights` for all rows at once, until no gradient is above 1e-9.
    """
    n, d = features.shape
    classes = len(weights)
    inverse = torch.linalg.inv(dense_hessian(features, weights, l2))
    wanted = torch.nn.functional.one_hot(labels, classes).to(features)
    refitted = weights.repeat(len(rows), 1, 1)
    going = torch.arange(len(rows))
    for _ in range(300):
        logits = (features @ refitted[going].reshape(-1, d).T).view(n, -1, classes)
        residual = logits.softmax(dim=2) - wanted[:, None]
        residual[rows[going], torch.arange(len(going))] = 0
        gradient = (residual.reshape(n, -1).T @ features).view(-1, classes, d) / n + l2 * refitted[going]
        refitted[going] -= (gradient.flatten(1) @ inverse).view_as(gradient)
        going = going[gradient.flatten(1).norm(dim=1) > 1e-9]
        if not len(going):
            return refitted
    raise AssertionError(f"{len(going)} refits did not converge")
