"""How well a model does on held-out samples whose labels are as noisy as the rest: by which models are compared.

    L = min over t, e of the mean of  -log sum_c p_c ((1 - e) T[c, y] + e / C),   p = softmax(t z)

with z the logits, y the given label, T the transition matrix of these labels (the unit matrix where no noise is known),
t an inverse temperature and e the share of labels that are drawn from all C classes. L is the cross-entropy of the
noisy label (forward correction, Patrini et al. 2017): the model whose p is the class probability has the lowest.
Networks that have memorised their labels are too sure of themselves, and human labels are wrong more often than their
T says; t and e take both out of the comparison. Taking the minimum over them is ours; no published source.

Sums are kept by groups of samples: all models are compared on the same samples in the same blocks, and how much the
difference of two models varies from group to group gives its standard error.
"""

# torch.Tensor.tolist carries no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence.probe import Reduce

_TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-16, 17))
GROUPS = 50
"""A sample belongs to the group of its position in its block, modulo this."""
_FLOORS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def corrected_losses(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    weights: Float[Tensor, "classes dim"],
    transition: Float[Tensor, "classes classes"],
) -> tuple[Tensor, Tensor]:
    """Sums over a block under a linear head, by group: 1, and the loss for every t and e of the grids, [t, e]."""
    logits = (features @ weights.to(features).T).double()
    of_label = transition.to(logits).T[labels]
    floors = torch.tensor(_FLOORS, dtype=torch.float64, device=logits.device)
    group = torch.arange(len(labels), device=logits.device) % GROUPS
    rows: list[Tensor] = []
    for t in _TEMPERATURES:
        # [batch]: the probability of the given label where e = 0
        q = ((t * logits).softmax(dim=1) * of_label).sum(dim=1)
        mixed = q[:, None] * (1 - floors) + floors / logits.shape[1]
        rows.append(mixed.new_zeros(GROUPS, len(floors)).index_add_(0, group, -mixed.clamp_min(1e-30).log()))
    return torch.bincount(group, minlength=GROUPS).double(), torch.stack(rows, dim=1)


@dataclass(frozen=True)
class HeldOutLoss:
    """L of a model, as sums by group."""

    samples: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """L."""
        return sum(self.losses) / sum(self.samples)

    def above(self, other: HeldOutLoss) -> tuple[float, float]:
        """By how much L is above that of another model on the same samples, and the standard error of that.

        It is that of a ratio of sums over groups (Cochran 1977, section 2.11): its square is
        G / (G - 1) sum_g r_g^2 / n^2, with G the number of groups with samples, n that of the samples, and r_g the
        difference of the two models' losses in group g, less its expectation. 0 where there is one group.
        """
        residuals = [
            (loss - count * self.mean) - (other_loss - other_count * other.mean)
            for count, loss, other_count, other_loss in zip(
                self.samples, self.losses, other.samples, other.losses, strict=True
            )
        ]
        groups = sum(count > 0 for count in self.samples)
        variance = sum(own**2 for own in residuals) * groups / max(1, groups - 1)
        return self.mean - other.mean, variance**0.5 / sum(self.samples)


def corrected_loss(reduce: Reduce, weights: Tensor, transition: Tensor) -> HeldOutLoss:
    """L of the held-out samples that `reduce` sums over, under a linear head."""
    count, losses = reduce(corrected_losses, weights, transition)
    best = divmod(int(losses.sum(dim=0).argmin()), len(_FLOORS))
    return HeldOutLoss(tuple(count.tolist()), tuple(losses[:, best[0], best[1]].tolist()))


def no_worse(one: HeldOutLoss, other: HeldOutLoss) -> bool:
    """Whether a model's L is above that of another one by at most one standard error of the difference."""
    difference, error = one.above(other)
    return difference <= error
