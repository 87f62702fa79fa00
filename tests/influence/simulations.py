"""Simulations in which the truth is known, for the tests of calibration, noise rate and noise model.

The logits are the logarithm of which label a sample like this is given: an ideal model, whose temperature, memorisation
and noise are then put in by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from posttrain.influence.calibration import CalibrationSums, calibration_sums, fitted_temperature, temperature_moments
from posttrain.influence.noise_model import (
    NoiseModel,
    PosteriorSums,
    estimate_noise_model,
    posterior_sums,
    with_transition,
)
from posttrain.influence.probe import in_memory


@dataclass(frozen=True)
class Simulated:
    """Samples whose true class is known."""

    logits: Tensor
    labels: Tensor
    true: Tensor

    @property
    def wrong(self) -> Tensor:
        return self.labels != self.true

    def memorised(self, offset: float) -> Simulated:
        """The same, the given label's logit too high."""
        return replace(self, logits=lowered(self.logits, self.labels, -offset))

    def cooled(self, temperature: float) -> Simulated:
        """The same, with logits that are right at this inverse temperature."""
        return replace(self, logits=self.logits / temperature)


def lowered(logits: Tensor, labels: Tensor, by: float) -> Tensor:
    return logits - by * torch.nn.functional.one_hot(labels, logits.shape[1])


def symmetric(classes: int, rate: float) -> np.ndarray:
    """T[c, y]: how often what belongs to c is labelled y."""
    return np.where(np.eye(classes, dtype=bool), 1 - rate, rate / (classes - 1))


def paired(classes: int, rate: float) -> np.ndarray:
    return (1 - rate) * np.eye(classes) + rate * np.roll(np.eye(classes), 1, axis=1)


def simulated(
    samples: int, noise: np.ndarray, *, apart: float = 3.0, seed: int = 0, sizes: np.ndarray | None = None
) -> Simulated:
    """Samples of Gaussian classes in 8 dimensions; `sizes` are the classes' shares, `apart` scales their distances."""
    classes = len(noise)
    drawn = np.random.default_rng(seed)
    share = np.full(classes, 1 / classes) if sizes is None else sizes / sizes.sum()
    centres = np.random.default_rng(1).normal(size=(classes, 8)) * apart / 2**0.5
    true = drawn.choice(classes, size=samples, p=share)
    points = centres[true] + drawn.normal(size=(samples, 8))
    logits = torch.from_numpy(-np.square(points[:, None] - centres).sum(axis=2) / 2 + np.log(share))
    given = (noise[true].cumsum(axis=1) < drawn.random(samples)[:, None]).sum(axis=1).clip(max=classes - 1)
    q = (logits.softmax(dim=1) @ torch.from_numpy(noise)).clamp_min(1e-300)
    return Simulated(q.log(), torch.from_numpy(given), torch.from_numpy(true))


def calibration_sums_of(of: Simulated, temperature: float = 1.0) -> CalibrationSums:
    return CalibrationSums(*calibration_sums(of.logits, of.labels, temperature))


def calibrated(validation: Simulated, live: Simulated) -> NoiseModel:
    """The whole noise model, the transition matrix included."""
    temperature = temperature_of(validation.logits, validation.labels)
    first = estimate_noise_model(
        calibration_sums_of(validation, temperature), calibration_sums_of(live, temperature), temperature
    )

    def sums_under(model: NoiseModel) -> PosteriorSums:
        return PosteriorSums(*posterior_sums(model, live.logits, live.labels))

    unit = torch.eye(live.logits.shape[1], dtype=torch.float64)
    return with_transition(first, in_memory(validation.logits, validation.labels, 501), unit, sums_under)


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    reduce = in_memory(logits, labels, 501)
    unit = torch.eye(logits.shape[1], dtype=torch.float64)
    return fitted_temperature(lambda t: reduce(temperature_moments, unit, t))


def sums_of_bins(confident: Tensor, disagreeing: Tensor) -> CalibrationSums:
    """Calibration sums with confidences only."""
    count = confident.sum()
    joint = torch.zeros(3, 3, dtype=torch.float64)
    nothing = torch.zeros(4096, dtype=torch.float64)
    ones, no_class = torch.ones(257, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    return CalibrationSums(count, ones, joint, confident, disagreeing, nothing, nothing, no_class, no_class)


def corrected(samples: int, rate: float, *, seed: int) -> Simulated:
    """Validation samples with corrected labels, under an ensemble fitted on noisy ones."""
    noisy = simulated(samples, symmetric(10, rate), apart=4.0, seed=seed)
    return replace(noisy, labels=noisy.true)
