"""How well a model does on held-out samples whose labels are as noisy as the rest: by which models are compared.

    L = min over t, e of the mean of  -log sum_c p_c ((1 - e) T[c, y] + e / C),   p = softmax(t z)

with z the logits, y the given label, T the transition matrix of these labels (the unit matrix where no noise is known),
t an inverse temperature and e the share of labels that are drawn from all C classes. L is the cross-entropy of the
noisy label (forward correction, Patrini et al. 2017): the model whose p is the class probability has the lowest.
Networks that have memorised their labels are too sure of themselves, and human labels are wrong more often than their
T says; t and e take both out of the comparison. Taking the minimum over them is ours; no published source.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence.probe import Reduce

_TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-16, 17))
_FLOORS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def corrected_losses(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    weights: Float[Tensor, "classes dim"],
    transition: Float[Tensor, "classes classes"],
) -> tuple[Tensor, Tensor]:
    """Sums over a block under a linear head: 1, and the loss for every t and e of the grids, [t, e]."""
    logits = (features @ weights.to(features).T).double()
    of_label = transition.to(logits).T[labels]
    floors = torch.tensor(_FLOORS, dtype=torch.float64, device=logits.device)
    rows: list[Tensor] = []
    for t in _TEMPERATURES:
        # [batch]: the probability of the given label where e = 0
        q = ((t * logits).softmax(dim=1) * of_label).sum(dim=1)
        mixed = q[:, None] * (1 - floors) + floors / logits.shape[1]
        rows.append(-mixed.clamp_min(1e-30).log().sum(dim=0))
    return torch.tensor(float(len(labels)), dtype=torch.float64), torch.stack(rows)


def corrected_loss(reduce: Reduce, weights: Tensor, transition: Tensor) -> float:
    """L of the held-out samples that `reduce` sums over, under a linear head."""
    count, losses = reduce(corrected_losses, weights, transition)
    return float(losses.min() / count)
