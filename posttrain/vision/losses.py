"""Losses for training on noisy labels, each from the formula of its paper.

Notation: z the logits of a sample, p = softmax(z), y its given label. Every loss is the mean over a batch.

An `Objective` is what a training step minimises. Some remember something of every sample: they are told which samples
of the training process are in the batch, by their positions. `methods.METHODS` has the names and the papers' settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.methods import METHODS, NEEDS_NOISE, Method

_SMALLEST = 1e-7
"""Probabilities are at least this before their logarithm is taken."""


@dataclass(frozen=True)
class Noise:
    """What is known of the label noise."""

    rate: float
    """Share of wrong labels."""
    transition: Float[Tensor, "classes classes"] = field(repr=False)
    """T[c, y]: the probability that a sample of class c is given the label y."""


@dataclass(frozen=True)
class Size:
    """What an objective is made for."""

    classes: int
    samples: int
    """Of this training process."""
    steps: int
    """Gradient steps in all."""


@runtime_checkable
class Objective(Protocol):
    """What a training step minimises."""

    def loss(self, logits: Tensor, labels: Tensor, samples: Tensor, step: int) -> Tensor:
        """The mean loss of a batch: logits [batch, classes], labels [batch], the samples' positions [batch].

        Labels are [batch, classes] where inputs were mixed. `step` counts from 0.
        """
        ...

    def after_step(self) -> None:
        """Called after each step of the network's optimizer."""
        ...


def generalised_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, q: float
) -> Float[Tensor, ""]:
    """(1 - p_y^q) / q (Zhang & Sabuncu 2018, equation 6): cross-entropy as q goes to 0, 1 - p_y at q = 1."""
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    return (-torch.expm1(q * log_p) / q).mean()


def symmetric_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    alpha: float,
    beta: float,
    log_zero: float,
) -> Float[Tensor, ""]:
    """alpha * cross-entropy + beta * reverse cross-entropy (Wang et al. 2019, equation 7).

    The reverse one is -sum_c p_c log q_c with q one-hot and `log_zero` in place of log 0: -log_zero (1 - p_y).
    """
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    return (-alpha * log_p - beta * log_zero * (1 - log_p.exp())).mean()


def soft_bootstrapping(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, beta: float
) -> Float[Tensor, ""]:
    """-sum_c (beta [c = y] + (1 - beta) p_c) log p_c (Reed et al. 2015, equation 6)."""
    log_p = F.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    return beta * F.nll_loss(log_p, labels) + (1 - beta) * entropy


def smoothed_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, smoothing: float
) -> Float[Tensor, ""]:
    """-sum_c ((1 - smoothing) [c = y] + smoothing / classes) log p_c (Szegedy et al. 2016), by torch."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def forward_corrected(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    transition: Float[Tensor, "classes classes"],
) -> Float[Tensor, ""]:
    """-log sum_c p_c T[c, y] (Patrini et al. 2017, equation 5)."""
    of_label = (F.softmax(logits, dim=1) * transition.to(logits).T[labels]).sum(dim=1)
    return -of_label.clamp_min(_SMALLEST).log().mean()


def co_teaching_loss(
    logits: Float[Tensor, "2 batch classes"], labels: Int[Tensor, " batch"], keep: float
) -> Float[Tensor, ""]:
    """The sum of two networks' mean losses, each on the `keep` share of the batch that the other finds easiest.

    Han et al. 2018, algorithm 1. At least one sample is kept.
    """
    losses = torch.stack([F.cross_entropy(own, labels, reduction="none") for own in logits])
    count = max(1, int(keep * len(labels)))
    easiest = losses.detach().argsort(dim=1, stable=True)[:, :count]
    return losses[0][easiest[1]].mean() + losses[1][easiest[0]].mean()


@dataclass
class OfBatch:
    """An objective that is a function of a batch alone: (logits, labels) -> mean loss."""

    of_batch: Callable[[Tensor, Tensor], Tensor]

    def loss(self, logits: Tensor, labels: Tensor, samples: Tensor, step: int) -> Tensor:
        return self.of_batch(logits, labels)

    def after_step(self) -> None:
        pass


@dataclass
class CoTeaching:
    """Co-teaching on logits [2, batch, classes], as `Twins` gives them."""

    rate: float
    """Share of wrong labels."""
    steps: int
    """In all."""
    ramp: float
    """Share of all steps over which the kept share falls from 1 to 1 - rate; the paper's is 10 of 200 epochs."""

    def loss(self, logits: Tensor, labels: Tensor, samples: Tensor, step: int) -> Tensor:
        progress = min(1.0, step / max(1.0, self.ramp * self.steps))
        return co_teaching_loss(logits, labels, 1 - self.rate * progress)

    def after_step(self) -> None:
        pass


class EarlyLearning:
    """Early-learning regularisation (Liu et al. 2020, equations 6 and 9).

        cross-entropy + strength * log(1 - <p, t>),   t <- momentum * t + (1 - momentum) p

    with t the running target of the sample, updated before the loss is taken; no gradient goes through t. As in the
    authors' code, p is clamped to [1e-4, 1 - 1e-4], and normalised before it enters t.
    """

    def __init__(self, size: Size, *, strength: float, momentum: float) -> None:
        self._targets = torch.zeros(size.samples, size.classes)
        self._strength, self._momentum = strength, momentum

    def loss(self, logits: Tensor, labels: Tensor, samples: Tensor, step: int) -> Tensor:
        if self._targets.device != logits.device:
            self._targets = self._targets.to(logits.device)
        p = F.softmax(logits, dim=1).clamp(1e-4, 1 - 1e-4)
        fixed = p.detach()
        fixed = fixed / fixed.sum(dim=1, keepdim=True)
        target = self._momentum * self._targets[samples] + (1 - self._momentum) * fixed
        self._targets[samples] = target
        regulariser = (1 - (p * target).sum(dim=1)).log().mean()
        return F.cross_entropy(logits, labels) + self._strength * regulariser

    def after_step(self) -> None:
        pass


class OverParameterised:
    """Sparse over-parameterisation (Liu et al. 2022, equations 2, 4 and 5).

    Every sample has a noise s of its own, u^2 on its given label and -v^2 on the others, which gradient descent learns
    along with the network:

        cross-entropy(normalised max(p + s, 0), y) by the network and u,   ||hard(p) + s - y||^2 by u and v

    with hard(p) the one-hot likeliest class. u and v have learning rates of their own, and start near 0.
    """

    def __init__(self, size: Size, *, rate_u: float, rate_v: float, start: float = 1e-8) -> None:
        generator = torch.Generator().manual_seed(0)
        self._u = nn.Parameter(start * torch.randn(size.samples, 1, generator=generator))
        self._v = nn.Parameter(start * torch.randn(size.samples, size.classes, generator=generator))
        self._rates = rate_u, rate_v
        self._optimizer = self._made()

    def _made(self) -> torch.optim.Optimizer:
        own = zip((self._u, self._v), self._rates, strict=True)
        return torch.optim.SGD([{"params": [parameter], "lr": rate} for parameter, rate in own])

    def loss(self, logits: Tensor, labels: Tensor, samples: Tensor, step: int) -> Tensor:
        if self._u.device != logits.device:
            self._u, self._v = (nn.Parameter(own.detach().to(logits.device)) for own in (self._u, self._v))
            self._optimizer = self._made()
        given = F.one_hot(labels, logits.shape[1]).to(logits)
        u = (self._u[samples].square() * given).clamp(0, 1)
        v = (self._v[samples].square() * (1 - given)).clamp(0, 1)
        q = (F.softmax(logits, dim=1) + u - v.detach()).clamp_min(_SMALLEST)
        q = (q / q.sum(dim=1, keepdim=True)).clamp(_SMALLEST, 1.0)
        hard = F.one_hot(logits.detach().argmax(dim=1), logits.shape[1]).to(logits)
        return -(given * q.log()).sum(dim=1).mean() + (hard + u - v - given).square().sum() / len(labels)

    def after_step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class Twins(nn.Module):
    """Two networks that co-teaching trains side by side; the output is [2, batch, classes]."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([self.first(inputs), self.second(inputs)])


def mixed_up(inputs: Tensor, labels: Tensor, *, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Inputs and soft labels [batch, classes] of mixup (Zhang et al. 2018), by torchvision."""
    from torchvision.transforms import v2

    return cast(tuple[Tensor, Tensor], v2.MixUp(alpha=alpha, num_classes=classes)(inputs, labels))


_OF_BATCH: dict[Method, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "label_smoothing": smoothed_cross_entropy,
    "gce": generalised_cross_entropy,
    "sce": symmetric_cross_entropy,
    "bootstrapping": soft_bootstrapping,
}


def objective(
    method: Method, size: Size, arguments: Mapping[str, float] | None = None, noise: Noise | None = None
) -> Objective:
    """What a training step minimises under a method, with its paper's settings but for `arguments`.

    Raises ValueError where the method needs `noise` and there is none.
    """
    if noise is None and method in NEEDS_NOISE:
        raise ValueError(f"{method} needs an estimate of the label noise")
    own = {**METHODS[method], **(arguments or {})}
    if method == "elr":
        return EarlyLearning(size, **own)
    if method == "sop":
        return OverParameterised(size, **own)
    if noise is not None and method == "co_teaching":
        return CoTeaching(noise.rate, size.steps, **own)
    if noise is not None and method == "forward":
        return OfBatch(partial(forward_corrected, transition=noise.transition))
    if method == "mixup":
        # the inputs and the labels are mixed already
        return OfBatch(F.cross_entropy)
    return OfBatch(partial(_OF_BATCH[method], **own))
