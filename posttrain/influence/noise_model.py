"""The label-noise model: from leave-one-out logits to the probability that a given label is wrong.

Notation, with t, b and the logits z as in `calibration`, T, V and p as in `noise_matrix`:

    q       which label a sample like this would be given: softmax(t z - b at the given label y)
    p       which class it belongs to: q = T^T p with T of the validation labels, on which q is calibrated; then p is
            raised to the power s and normalised
    s       sharpness: the exponent that minimises the validation cross-entropy of T^T p^s
    a       log-odds offset: raises the odds of a wrong label until on average as many are wrong as the rate says

    P(class c | label y)  proportional to  p_c T[c, y],  for c = y times exp(-a)

T is that of the live labels in the last line. It follows Natarajan et al. (2013) and Patrini et al. (2017); s and a are
ours.
"""

# Tensor.scatter and others carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence import noise_matrix, noise_rate
from posttrain.influence.calibration import CalibrationSums, crossing, log_odds_of_others, memorisation_offset
from posttrain.influence.noise_rate import CLEAN_RATE, NoiseEstimate, NoiseRates
from posttrain.influence.probe import Reduce

_LOG_ODDS_OFFSETS = 65
_LARGEST_LOG_ODDS_OFFSET = 4.0


@dataclass(frozen=True)
class Prior:
    """What the first round that found wrong labels estimated; later rounds on the same network start from it.

    How many labels are wrong, and in which directions, is a property of the data and not of the ensemble. A later round
    sees only what remains, through an ensemble that depends on what was removed.
    """

    confident_joint: Float[Tensor, "classes classes"] | None = None
    """Its `NoiseModel.confident_joint`; None before any round found wrong labels."""
    live_noise_rate: float | None = None
    """Its `NoiseModel.live_noise_rate`, which holds; None where each round has to estimate it, as from live samples."""
    validation_noise_rate: float = 0.0
    """Its `NoiseModel.validation_noise_rate`. It holds where `live_noise_rate` is known; else it serves where the few
    most confident validation samples of a round show no wrong labels. No round removes a validation label."""

    def averaged(self, joint: Float[Tensor, "classes classes"], count: float) -> Float[Tensor, "classes classes"]:
        """The mean of the prior's confident joint and this one of `count` live samples, scaled to the same sum.

        Re-estimated from what remains alone, a direction of the noise is forgotten as its samples are removed. Kept as
        the first round found it, it is still searched once none are left. Measured after four rounds of 10 % on 16
        networks with pair flips and instance-dependent noise of 40 % (Fashion-MNIST and CIFAR-10N, two seeds), mean
        test accuracy: 62.7 by what remains, 63.4 by the first round, 63.7 by their mean.
        """
        prior = self.confident_joint
        total, number = float(joint.sum()), count if prior is None else float(prior.sum())
        own = joint * (number / total) if total else joint
        return own if prior is None else (prior.to(own) + own) / 2


UNKNOWN = Prior()


@dataclass(frozen=True)
class NoiseModel:
    """All that is estimated; see the notation at the head of the module."""

    temperature: float
    """t."""
    memorisation_offset: float
    """b, at least 0."""
    noise: NoiseEstimate
    validation_noise_rate: float
    """Share of wrong labels among the validation samples, on which the logits are calibrated."""
    live_noise_rate: float
    """Share of wrong labels among the live samples before any was removed: how likely any one of them was wrong. Were
    it lowered with each removal, the last wrong labels would no longer look wrong."""
    remaining_noise_rate: float
    """Share of wrong labels among the samples that are live now, by the same count."""
    transition: Float[Tensor, "classes classes"]
    """T of the live samples, at `live_noise_rate`."""
    validation_transition: Float[Tensor, "classes classes"]
    """T of the validation samples: the same directions, at their rate. The unit matrix where that is 0."""
    confident_joint: Float[Tensor, "classes classes"]
    """V, from which both are estimated, scaled so that its sum is the number of samples. 0 where no noise was found."""
    sharpness: float = 1.0
    """s."""
    log_odds_offset: float = 0.0
    """a, at least 0: an ensemble that is unsure of a class is unsure whether a label is wrong, too. Measured on the
    first rounds of 61 networks, means over ten kinds of noise: 76 % of the wrong labels have odds above 0, without the
    offset 69 %; of the labels with such odds 81 and 85 % are wrong; Brier score 0.0957 and 0.0967."""

    @property
    def prior(self) -> Prior:
        """What later rounds start from, where this is the first that found wrong labels.

        The rates hold where they are those of the validation labels, of which no round removes any. Measured on digits
        with a fifth of the labels wrong, three seeds, four rounds of 10 %: of what is removed 99, 95 and 97 % is wrong,
        and 92, 95 and 92 % where each round estimates the rates again.
        """
        if not (self.noise.found or self.validation_noise_rate):
            return UNKNOWN
        live_noise_rate = self.live_noise_rate if self.noise.source == "validation" else None
        return Prior(self.confident_joint, live_noise_rate, self.validation_noise_rate)

    def with_confident_joint(self, joint: Tensor) -> NoiseModel:
        """The same with both T estimated from this V, in samples."""
        return replace(
            self,
            transition=noise_matrix.estimate(joint, self.live_noise_rate),
            validation_transition=noise_matrix.estimate(joint, self.validation_noise_rate),
            confident_joint=joint,
        )

    def probabilities(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """q, calibrated on the validation labels."""
        scaled = self.temperature * logits
        lowered = scaled.new_full((len(labels), 1), -self.memorisation_offset)
        return scaled.scatter_add(1, labels[:, None], lowered).softmax(dim=1)

    def posterior(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Posterior:
        """The class probabilities of samples with these logits, with and without their given labels."""
        q = self.probabilities(logits.double(), labels)
        p = noise_matrix.noise_corrected(q, self.validation_transition) if self.validation_noise_rate else q
        log_p = noise_matrix.log_sharpened(p, self.sharpness)
        joint = noise_matrix.log_joint(log_p, labels, self.transition)
        joint = joint.scatter_add(1, labels[:, None], joint.new_full((len(labels), 1), -self.log_odds_offset))
        return Posterior(log_p, joint, labels)


@dataclass(frozen=True)
class Posterior:
    """The class probabilities of samples with given labels y under a noise model."""

    log_p: Float[Tensor, "batch classes"]
    log_joint: Float[Tensor, "batch classes"]
    """log (p_c T[c, y]), less a at c = y."""
    labels: Int[Tensor, " batch"]

    @property
    def class_probabilities(self) -> Float[Tensor, "batch classes"]:
        """p: which class a sample like this belongs to, whatever its label."""
        return self.log_p.exp()

    @property
    def class_posterior(self) -> Float[Tensor, "batch classes"]:
        """P(class c | label y): exp(log_joint), normalised."""
        return self.log_joint.softmax(dim=1)

    @property
    def mislabel_odds(self) -> Float[Tensor, " batch"]:
        """Log odds that the given label is wrong: log sum_{c != y} p_c T[c, y] - log p_y T[y, y] + a."""
        return log_odds_of_others(self.log_joint, self.labels)


@dataclass(frozen=True)
class PosteriorSums:
    """Sums over live samples under a noise model. Sums of several blocks add up."""

    count: Tensor
    confident_joint: Float[Tensor, "classes classes"]
    """V, from p."""
    expected_wrong: Float[Tensor, " offsets"]
    """Expected number of wrong labels, for each offset of a grid on top of the noise model's own."""


def posterior_sums(
    model: NoiseModel, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `PosteriorSums` of a batch."""
    posterior = model.posterior(logits, labels)
    joint = noise_matrix.confident_joint(posterior.class_probabilities, labels)
    expected_wrong = torch.sigmoid(posterior.mislabel_odds[:, None] + _log_odds_offsets().to(joint)).sum(dim=0)
    return torch.tensor(float(len(labels)), dtype=torch.float64, device=joint.device), joint, expected_wrong


def with_log_odds_offset(model: NoiseModel, sums: PosteriorSums) -> NoiseModel:
    """The noise model with a such that the mean probability of a wrong label is `remaining_noise_rate`.

    `sums` are those under `model`, which is returned as it is where the mean is higher already.
    """
    target = model.remaining_noise_rate * float(sums.count)
    offset = crossing(_log_odds_offsets().tolist(), sums.expected_wrong.tolist(), target)
    return replace(model, log_odds_offset=model.log_odds_offset + offset)


def noise_left(
    confident_joint: Float[Tensor, "classes classes"], rate: float, samples: int, *, acted_on: int, left: int
) -> tuple[float, Float[Tensor, "classes classes"]]:
    """The share of wrong labels and their T among the samples that are left.

    Of so many samples a share `rate` was wrong, and `acted_on` of these were removed or got another label.
    """
    still = max(0.0, rate * samples - acted_on) / left if left else 0.0
    return still, noise_matrix.estimate(confident_joint, still)


def _log_odds_offsets() -> Tensor:
    return torch.linspace(0, _LARGEST_LOG_ODDS_OFFSET, _LOG_ODDS_OFFSETS, dtype=torch.float64)


def estimate_noise_model(
    validation: CalibrationSums,
    live: CalibrationSums,
    temperature: float,
    *,
    removed: int = 0,
    removed_self_confidence: float = 0.0,
    prior: Prior = UNKNOWN,
) -> NoiseModel:
    """The first estimate of the noise model, from both calibration sums at this temperature; see `with_transition`.

    `removed`: samples that previous rounds removed as wrong, and the sum of their labels' probabilities at that time.
    They count along: without them the live labels would look better than the validation labels, and that would pass
    for memorisation. `prior`: what the first round that found wrong labels estimated.
    """
    rates = noise_rate.estimate(
        validation, live, known_rate=prior.validation_noise_rate, is_fixed=prior.live_noise_rate is not None
    )
    noise, classes, count = rates.live, len(live.confident_joint), float(live.count)
    if prior.confident_joint is None and (doubt := noise_rate.doubt(validation, live)) is not None:
        noise = replace(noise, most=0.0, doubt=doubt)
    live_noise_rate = prior.live_noise_rate
    if live_noise_rate is None:
        # where none were found, as many may be wrong as a clean set shows
        live_noise_rate = max(noise.rate, prior.validation_noise_rate, CLEAN_RATE)
        if noise.source != "validation" and noise.found:
            live_noise_rate = (live_noise_rate * count + removed) / (count + removed)
    remaining = max(0.0, live_noise_rate * (count + removed) - removed) / count if count else 0.0
    target = _expected_self_confidence(validation, rates, classes, count, removed)
    offset = memorisation_offset(live, target, removed=removed, removed_self_confidence=removed_self_confidence)
    joint = prior.averaged(live.confident_joint, count)
    if not (noise.found or rates.validation) and prior.confident_joint is None:
        # noise that was not found has no direction: classes that are confused in one direction more than in the other
        # would fill the small rate. Measured on human labels in which none were found (CIFAR-10N, random1, augmented,
        # two seeds): average precision 0.51 with directions, 0.58 without
        joint = torch.zeros_like(joint)
    unit = torch.eye(classes, dtype=torch.float64)
    first = NoiseModel(temperature, offset, noise, rates.validation, live_noise_rate, remaining, unit, unit, joint)
    return first.with_confident_joint(joint)


def _expected_self_confidence(
    validation: CalibrationSums, rates: NoiseRates, classes: int, count: float, removed: int
) -> float:
    """The mean self-confidence of live and removed samples, were nothing memorised: that of the validation samples.

    Lower where live labels are wrong more often than validation labels: those samples have the probability of some
    other label.
    """
    mean = float(validation.self_confidence[0] / validation.count)
    if rates.validation and rates.live.source != "comparison":
        return mean
    live_rate = rates.validation + (1 - rates.validation) * rates.excess
    wrong = (live_rate * count + removed) / (count + removed) if count + removed else 0.0
    excess = max(0.0, (wrong - rates.validation) / (1 - rates.validation)) if rates.validation < 1 else 0.0
    return (1 - excess) * mean + excess * (1 - mean) / max(1, classes - 1)


def with_transition(
    model: NoiseModel,
    validation: Reduce,
    weights: Tensor,
    sums_under: Callable[[NoiseModel], PosteriorSums],
    prior: Prior = UNKNOWN,
) -> NoiseModel:
    """The first estimate of a noise model with T, sharpness and log-odds offset estimated in full.

    `validation` sums over the validation samples under the linear head `weights`; `sums_under(model)` gives the
    posterior sums of the live samples under that model; `prior` is that of `estimate_noise_model`. Where no wrong
    labels were found, the first estimate stays: there is no noise to take out of V.
    """
    if not (model.noise.found or model.validation_noise_rate):
        return model
    temperature = torch.tensor(model.temperature, dtype=torch.float64)
    # where the validation labels are right, p does not depend on T: a third estimate would be the second
    for again in range(noise_matrix.ESTIMATES if model.validation_noise_rate else 2):
        if again:
            sums = sums_under(model)
            model = model.with_confident_joint(prior.averaged(sums.confident_joint, float(sums.count)))
        if model.validation_noise_rate:
            _, losses = validation(noise_matrix.sharpness_losses, weights, temperature, model.validation_transition)
            model = replace(model, sharpness=noise_matrix.best_sharpness(losses))
    return with_log_odds_offset(model, sums_under(model))
