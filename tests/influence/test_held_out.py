"""The loss by which models are compared on noisy held-out labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.influence.held_out import _FLOORS, _TEMPERATURES, GROUPS, HeldOutLoss, corrected_loss, no_worse
from posttrain.influence.probe import in_memory

CLASSES = 5


def loss(logits: Tensor, labels: Tensor, transition: Tensor | None = None) -> float:
    """Of logits as they are: features under the unit matrix."""
    unit = torch.eye(CLASSES)
    transition = torch.eye(CLASSES, dtype=torch.float64) if transition is None else transition
    return corrected_loss(in_memory(logits, labels, 100), unit, transition).mean


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


def of(logits: Tensor, labels: Tensor) -> HeldOutLoss:
    return corrected_loss(in_memory(logits, labels, 100), torch.eye(CLASSES), torch.eye(CLASSES, dtype=torch.float64))


def test_the_standard_error_is_that_of_the_difference_over_many_draws_of_the_samples() -> None:
    logits, _, labels, _ = noisy(0.2, samples=40_000)
    generator = torch.Generator().manual_seed(1)
    worse = logits + 0.5 * torch.randn(logits.shape, generator=generator)
    found = [of(*own).above(of(*other)) for own, other in zip(parts(worse, labels), parts(logits, labels), strict=True)]
    differences = torch.tensor([difference for difference, _ in found])
    errors = torch.tensor([error for _, error in found])
    assert float(errors.mean()) == pytest.approx(float(differences.std()), rel=0.35)
    # most of the noise is common to both models: each alone is much less certain
    alone = torch.tensor([of(*own).mean for own in parts(worse, labels)]).std()
    assert float(errors.mean()) < float(alone) / 2


def parts(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(1000), labels.split(1000), strict=True))


def test_a_model_is_worse_where_its_loss_is_higher_by_more_than_a_standard_error() -> None:
    logits, _, labels, _ = noisy(0.2)
    generator = torch.Generator().manual_seed(1)
    nearly, worse = (logits + by * torch.randn(logits.shape, generator=generator) for by in (0.01, 2))
    as_it_is, as_good, not_as_good = (of(one, labels) for one in (logits, nearly, worse))
    assert no_worse(as_good, as_it_is) and no_worse(as_it_is, as_it_is)
    assert no_worse(as_it_is, not_as_good) and not no_worse(not_as_good, as_it_is)
    assert len(as_it_is.samples) == GROUPS and sum(as_it_is.samples) == 4000
