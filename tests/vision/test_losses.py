"""Losses against closed forms, plain loops, and what their papers say of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.methods import METHODS, NEEDS_NOISE, Method
from posttrain.vision import losses
from posttrain.vision.losses import Noise, Size, objective

CLASSES, SAMPLES = 4, 12


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and positions."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, CLASSES, (SAMPLES,), generator=generator), torch.arange(SAMPLES)


def made(method: Method, **arguments: float) -> losses.Objective:
    transition = torch.full((CLASSES, CLASSES), 0.1) + 0.6 * torch.eye(CLASSES)
    return objective(method, Size(CLASSES, SAMPLES, 100), arguments, Noise(0.3, transition))


def plain(logits: Tensor, labels: Tensor, of_sample: object) -> float:
    """The mean of `of_sample(p, y)` over the samples, one after the other."""
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        exponentials = [math.exp(value) for value in z]
        total += of_sample([e / sum(exponentials) for e in exponentials], y)  # pyright: ignore[reportCallIssue]
    return total / len(labels)


@pytest.mark.parametrize(
    ("method", "of_sample"),
    [
        ("cross_entropy", lambda p, y: -math.log(p[y])),
        ("mixup", lambda p, y: -math.log(p[y])),
        (
            "label_smoothing",
            lambda p, y: -sum((0.9 * (c == y) + 0.1 / CLASSES) * math.log(p[c]) for c in range(CLASSES)),
        ),
        ("gce", lambda p, y: (1 - p[y] ** 0.7) / 0.7),
        (
            "sce",
            lambda p, y: -0.1 * math.log(p[y]) - sum(p[c] * (0.0 if c == y else -4.0) for c in range(CLASSES)),
        ),
        (
            "bootstrapping",
            lambda p, y: -sum((0.95 * (c == y) + 0.05 * p[c]) * math.log(p[c]) for c in range(CLASSES)),
        ),
        ("forward", lambda p, y: -math.log(sum(p[c] * (0.7 if c == y else 0.1) for c in range(CLASSES)))),
    ],
)
def test_losses_of_a_batch_are_their_formulas(
    batch: tuple[Tensor, Tensor, Tensor], method: Method, of_sample: object
) -> None:
    logits, labels, samples = batch
    found = float(made(method).loss(logits, labels, samples, 0))
    assert found == pytest.approx(plain(logits, labels, of_sample), rel=1e-6)


def test_generalised_cross_entropy_lies_between_cross_entropy_and_absolute_error(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    logits, labels, samples = batch
    low, high = (float(made("gce", q=q).loss(logits, labels, samples, 0)) for q in (1e-6, 1.0))
    assert low == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    p = logits.softmax(dim=1)
    # the absolute error of a one-hot label is 2 (1 - p_y)
    assert high == pytest.approx(float((p - F.one_hot(labels, CLASSES)).abs().sum(dim=1).mean()) / 2)


def test_mixup_mixes_inputs_and_labels_by_one_share() -> None:
    inputs, labels = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    mixed, soft = losses.mixed_up(inputs, labels, classes=3, alpha=1.0)
    # the value of each input is the expectation of its soft label
    assert torch.allclose(mixed[:, 0, 0, 0], soft @ torch.arange(3.0))
    assert torch.allclose(soft.sum(dim=1), torch.ones(3)) and 0 < float(soft.max()) < 1


def test_each_twin_learns_from_what_the_other_finds_easiest(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, samples = batch
    both = torch.stack([logits, logits.flip(1)]).requires_grad_()
    # the ramp is over: 70 % are kept
    made("co_teaching").loss(both, labels, samples, 100).backward()
    own = [F.cross_entropy(z, labels, reduction="none") for z in both.detach()]
    count = int(0.7 * SAMPLES)
    assert both.grad is not None
    for twin in (0, 1):
        learnt = set(both.grad[twin].abs().sum(dim=1).nonzero()[:, 0].tolist())
        assert learnt == set(own[1 - twin].argsort()[:count].tolist())


def test_early_learning_pulls_towards_the_running_mean_of_the_predictions(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, samples = batch
    logits = logits.float()
    early = made("elr")
    targets = [[0.0] * CLASSES for _ in range(SAMPLES)]
    for step in range(3):
        z = logits / (step + 1)
        expected = 0.0
        for i, p in enumerate(z.softmax(dim=1).tolist()):
            p = [min(max(value, 1e-4), 1 - 1e-4) for value in p]
            targets[i] = [0.7 * t + 0.3 * value / sum(p) for t, value in zip(targets[i], p, strict=True)]
            inner = sum(value * t for value, t in zip(p, targets[i], strict=True))
            expected += 3 * math.log(1 - inner) / SAMPLES
        expected += float(F.cross_entropy(z, labels))
        assert float(early.loss(z, labels, samples, step)) == pytest.approx(expected, rel=1e-5)


def test_over_parameterisation_takes_up_the_labels_that_the_network_contradicts() -> None:
    # the network is sure, and every third label contradicts it
    true = torch.arange(SAMPLES) % CLASSES
    labels = torch.where(torch.arange(SAMPLES) % 3 == 0, (true + 1) % CLASSES, true)
    logits = 8.0 * F.one_hot(true, CLASSES).float()
    sop = made("sop", rate_u=1.0, rate_v=1.0)
    samples = torch.arange(SAMPLES)
    first = float(sop.loss(logits, labels, samples, 0).detach())
    for step in range(200):
        sop.loss(logits, labels, samples, step).backward()
        sop.after_step()
    assert float(sop.loss(logits, labels, samples, 200).detach()) < 0.1 * first
    noise = sop._u.detach()[:, 0].square()  # pyright: ignore[reportAttributeAccessIssue]
    assert bool((noise[labels != true] > 0.9).all()) and bool((noise[labels == true] < 0.1).all())


@pytest.mark.parametrize("method", list(METHODS))
def test_a_step_down_the_gradient_lowers_the_loss(batch: tuple[Tensor, Tensor, Tensor], method: Method) -> None:
    _, labels, samples = batch
    torch.manual_seed(0)
    network: nn.Module = nn.Linear(5, CLASSES)
    inputs = torch.randn(SAMPLES, 5)
    if method == "co_teaching":
        network = losses.Twins(network, nn.Linear(5, CLASSES))
    goal = made(method)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    found = []
    for step in range(30):
        optimizer.zero_grad()
        loss = goal.loss(network(inputs), labels, samples, step)
        loss.backward()
        optimizer.step()
        goal.after_step()
        found.append(float(loss.detach()))
    assert found[-1] < found[5]


@pytest.mark.parametrize("method", NEEDS_NOISE)
def test_methods_that_need_to_know_the_noise_are_refused_without(method: Method) -> None:
    with pytest.raises(ValueError, match="needs an estimate"):
        objective(method, Size(CLASSES, SAMPLES, 100))
