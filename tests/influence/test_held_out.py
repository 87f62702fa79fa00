"""The loss by which models are compared on noisy held-out labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.influence.held_out import _FLOORS, _TEMPERATURES, corrected_loss
from posttrain.influence.probe import in_memory

CLASSES = 5


def loss(logits: Tensor, labels: Tensor, transition: Tensor | None = None) -> float:
    """Of logits as they are: features under the unit matrix."""
    unit = torch.eye(CLASSES)
    transition = torch.eye(CLASSES, dtype=torch.float64) if transition is None else transition
    return corrected_loss(in_memory(logits, labels, 100), unit, transition)


def noisy(rate: float, *, seed: int = 0, samples: int = 4000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that are the class probabilities, the classes drawn from them, noisy labels, and their T."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, CLASSES, generator=generator)
    classes = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    transition = torch.full((CLASSES, CLASSES), rate / (CLASSES - 1), dtype=torch.float64)
    transition.fill_diagonal_(1 - rate)
    labels = torch.multinomial(transition[classes], 1, generator=generator)[:, 0]
    return logits, classes, labels, transition


def test_it_is_the_lowest_value_of_the_formula_over_the_grids() -> None:
    logits, _, labels, transition = noisy(0.2, samples=30)
    best = math.inf
    for t in _TEMPERATURES:
        for e in _FLOORS:
            total = 0.0
            for z, y in zip(logits.double(), labels.tolist(), strict=True):
                p = (t * z).softmax(dim=0)
                total -= math.log(sum(float(p[c] * ((1 - e) * transition[c, y] + e / CLASSES)) for c in range(CLASSES)))
            best = min(best, total / len(labels))
    assert loss(logits, labels, transition) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("known", [True, False])
def test_the_better_model_has_the_lower_loss_however_sure_it_is_of_itself(known: bool) -> None:
    logits, classes, labels, transition = noisy(0.4)
    generator = torch.Generator().manual_seed(1)
    worse = logits + 1.5 * torch.randn(logits.shape, generator=generator)
    assert float((worse.argmax(1) == classes).double().mean()) < float((logits.argmax(1) == classes).double().mean())
    of_labels = transition if known else None
    # the better one is much too sure: its plain cross-entropy is the higher one
    sure = 6 * logits
    plain = torch.nn.functional.cross_entropy
    assert plain(sure, labels) > plain(worse, labels)
    assert loss(sure, labels, of_labels) < loss(worse, labels, of_labels)
    assert loss(sure, labels, of_labels) == pytest.approx(loss(logits, labels, of_labels), abs=0.01)
