"""How much each sample bends the decision boundary, each score in words and in symbols.

Every score is larger for a sample that is more suspect. Notation as in `probe` and `curvature`; z_i are
logits. The probe without sample i is W + H^-1 (x_i (x) h_i) / n with

    exact curvature:     x_i = (I - S_i K_i)^-1 r_i      (one Newton step)
    factored curvature:  x_i = r_i                       (first order; Koh & Liang 2017)

Measured against refits without the sample, on digits with a fifth of the labels flipped (nine draws), the Spearman
correlation of `loo_margin`, `parameter` and `data` is at least 0.999 with the exact curvature; with the factored one
0.995 for `loo_margin`, 0.976 for the others.
"""

# torch.linalg, Tensor.norm and Tensor.split carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence.curvature import Curvature, Influence
from posttrain.influence.probe import residuals

Score = Literal["loo_margin", "parameter", "data", "loss", "margin", "gradient_norm", "random"]


@dataclass(frozen=True)
class Evidence:
    """What the scores of a batch are computed from."""

    features: Float[Tensor, "batch dim"]
    labels: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch classes"]
    residual: Float[Tensor, "batch classes"]
    influence: Influence
    draw: Float[Tensor, " batch"]
    """A number in [0, 1) that depends on the sample's id and the round's seed alone."""
    damping: float
    count: int

    @property
    def loo_logits(self) -> Float[Tensor, "batch classes"]:
        """z_i + K_i x_i: the sample's logits, had the probe been fitted without it (approximate leave-one-out)."""
        return self.logits + self.influence.shift


def evidence(features: Tensor, labels: Tensor, weights: Tensor, curvature: Curvature, draw: Tensor) -> Evidence:
    """The evidence on a batch from the probe's weights [classes, d] and its curvature."""
    logits, probabilities, residual = residuals(features, labels, weights)
    influence = curvature.influence(features, residual, probabilities)
    return Evidence(features, labels, logits, residual, influence, draw, curvature.damping, curvature.count)


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max over the other classes of z_c, minus z of the given label; above 0 another class wins."""
    given = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.max(dim=1).values - given


def loo_margin(e: Evidence) -> Float[Tensor, " batch"]:
    """On which side of the boundary the sample falls when only the others draw it.

    max_{c != y} z_c^(-i) - z_y^(-i): above 0, the others give it another label.
    """
    return label_margin(e.loo_logits, e.labels)


def parameter_influence(e: Evidence) -> Float[Tensor, " batch"]:
    """How far the probe's weights would move without the sample.

    ||H^-1 (x_i (x) h_i)|| / n
    """
    return e.influence.solved_norm.clamp_min(0).sqrt() / e.count


def data_influence(e: Evidence) -> Float[Tensor, " batch"]:
    """How much the predictions on all live samples would move without the sample.

        1/(2 n^2) v_i^T F v_i,  v_i = H^-1 (x_i (x) h_i),  F = H - damping I, the Fisher information of the live samples

    which is the mean Kullback-Leibler divergence between their predictions with and without it, to second
    order. Uses v_i^T H v_i = n x_i^T K_i x_i.
    """
    quadratic = e.count * (e.influence.loo_residual * e.influence.shift).sum(dim=1)
    return (quadratic - e.damping * e.influence.solved_norm).clamp_min(0) / (2 * e.count**2)


def loss(e: Evidence) -> Float[Tensor, " batch"]:
    """Cross-entropy of the given label under the probe (baseline)."""
    return torch.nn.functional.cross_entropy(e.logits, e.labels, reduction="none")


def margin(e: Evidence) -> Float[Tensor, " batch"]:
    """Margin of the fitted probe, the sample itself included (baseline)."""
    return label_margin(e.logits, e.labels)


def gradient_norm(e: Evidence) -> Float[Tensor, " batch"]:
    """||r_i|| ||h_i||, the norm of the loss gradient by the probe's weights (baseline)."""
    return e.residual.norm(dim=1) * e.features.norm(dim=1)


def at_random(e: Evidence) -> Float[Tensor, " batch"]:
    """A draw that knows nothing of the sample (control)."""
    return e.draw


SCORES: dict[Score, Callable[[Evidence], Tensor]] = {
    "loo_margin": loo_margin,
    "parameter": parameter_influence,
    "data": data_influence,
    "loss": loss,
    "margin": margin,
    "gradient_norm": gradient_norm,
    "random": at_random,
}
