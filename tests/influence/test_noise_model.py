"""The noise model, against simulations in which the truth is known, and against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulations import (
    Simulated,
    calibrated,
    calibration_sums_of,
    lowered,
    paired,
    simulated,
    symmetric,
)
from torch import Tensor

from posttrain.influence.calibration import CalibrationSums, calibration_sums
from posttrain.influence.noise_model import (
    UNKNOWN,
    NoiseModel,
    PosteriorSums,
    Prior,
    estimate_noise_model,
    noise_left,
    posterior_sums,
    with_log_odds_offset,
)
from posttrain.influence.noise_rate import CLEAN_RATE, NoiseEstimate
from posttrain.influence.scores import LeaveOneOut, suggestion


def leave_one_out_of(of: Simulated, noise_model: NoiseModel | None) -> LeaveOneOut:
    return LeaveOneOut(of.logits, of.labels, noise_model)


def found_noise(rate: float) -> NoiseEstimate:
    return NoiseEstimate(rate, 0.0, 1.0, 1.0, round(1000 * rate), 1000, found=True)


def test_without_wrong_labels_their_directions_do_not_matter():
    """Classes that are taken for others one way only, as every real set has them."""
    confused = torch.eye(5, dtype=torch.float64)
    confused[0, :2] = 0.5

    def skewed(seed: int) -> Simulated:
        of = simulated(2000, np.eye(5), apart=3.0, seed=seed)
        return replace(of, logits=(of.logits.softmax(dim=1) @ confused).log())

    validation, live = skewed(3), skewed(4)
    found = calibrated(validation, live)
    assert not found.noise.found
    torch.testing.assert_close(found.transition, torch.from_numpy(symmetric(5, CLEAN_RATE)))
    assert found.prior is UNKNOWN
    # another round of a run that found some: what it saw holds
    seen = Prior(100 * torch.from_numpy(paired(5, 0.3)), 0.3, 0.3)
    later = estimate_noise_model(calibration_sums_of(validation), calibration_sums_of(live), 1.0, prior=seen).transition
    assert float(later[0, 1]) > 2 * float(later[0, 2])


def test_nothing_is_estimated_where_there_are_no_samples():
    some = calibration_sums_of(simulated(500, symmetric(5, 0.2)))
    none = CalibrationSums(*calibration_sums(torch.empty(0, 5).double(), torch.empty(0, dtype=torch.long), 1.0))
    without_live = estimate_noise_model(some, none, 1.0)
    assert without_live.memorisation_offset == 0.0
    torch.testing.assert_close(without_live.transition, torch.from_numpy(symmetric(5, without_live.noise.rate)))
    without_validation = estimate_noise_model(none, some, 1.0)
    assert without_validation.memorisation_offset == 0.0
    assert (without_validation.noise.source, without_validation.noise.doubt) == ("live", "few")
    noise = estimate_noise_model(none, none, 1.0).noise
    assert (noise.rate, noise.low, noise.high, noise.counted) == (0.0, 0.0, 1.0, 0)
    assert not estimate_noise_model(none, none, 1.0).noise.found


@pytest.mark.parametrize(("apart", "memory"), [(1.2, 0.0), (1.6, 3.0)])
def test_suggestions_are_calibrated_also_where_the_validation_labels_are_right(apart: float, memory: float):
    noisy = simulated(4000, symmetric(10, 0.4), apart=apart, seed=1001)
    live = simulated(8000, symmetric(10, 0.4), apart=apart, seed=5001).memorised(memory)
    found = calibrated(replace(noisy, labels=noisy.true), live)
    assert found.noise.found and found.noise.source != "validation"
    p = found.posterior(live.logits, live.labels).class_probabilities
    sure = p.max(dim=1).values > 0.9
    right = (p.argmax(dim=1) == live.true)[sure].double().mean()
    assert float(right) == pytest.approx(float(p.max(dim=1).values[sure].mean()), abs=0.03)


def noise_model_with(rate: float, noise: np.ndarray, *, found: bool = True) -> NoiseModel:
    """t = 2, b = 0.7, and the same T for live and validation samples."""
    estimate = replace(found_noise(rate), found=found)
    known = torch.from_numpy(noise)
    return NoiseModel(2.0, 0.7, estimate, rate, rate if found else 0.01, rate, known, known, known, sharpness=1.3)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_label_probabilities_undo_stretched_logits_that_remember_their_label(classes: int):
    q = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(classes), size=200))
    labels = torch.arange(200) % classes
    logits = lowered(q.log(), labels, -0.7) / 2.0
    torch.testing.assert_close(noise_model_with(0.2, symmetric(classes, 0.2)).probabilities(logits, labels), q)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_probabilities_are_positive_and_sum_to_one_at_any_rate(classes: int, rate: float):
    logits = 5 * torch.randn(100, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(100) % classes
    noise_model = noise_model_with(rate, np.eye(classes), found=rate > 0).with_confident_joint(
        torch.zeros(classes, classes).double()
    )
    posterior = noise_model.posterior(logits, labels)
    for p in (noise_model.probabilities(logits, labels), posterior.class_probabilities, posterior.class_posterior):
        torch.testing.assert_close(p.sum(dim=1), torch.ones(100).double())
        assert bool((p > 0).all())
    assert bool(torch.isfinite(noise_model.posterior(logits, labels).mislabel_odds).all())


@pytest.mark.parametrize("noise", [symmetric(4, 0.2), paired(4, 0.3)], ids=["symmetric", "pairs"])
def test_the_odds_are_their_formula_sample_by_sample(noise: np.ndarray):
    live = simulated(50, noise, apart=1.0)
    noise_model = noise_model_with(0.2, noise + 1e-3)
    posterior = noise_model.posterior(live.logits, live.labels)
    odds, class_posterior = posterior.mislabel_odds, posterior.class_posterior
    classes = noise_model.posterior(live.logits, live.labels).class_probabilities
    for row, (p, y) in enumerate(zip(classes.tolist(), live.labels.tolist(), strict=True)):
        joint = [p[c] * float(noise_model.transition[c, y]) for c in range(4)]
        wrong = sum(share for c, share in enumerate(joint) if c != y)
        assert float(odds[row]) == pytest.approx(math.log(wrong / joint[y]), rel=1e-9)
        assert class_posterior[row].tolist() == pytest.approx([share / sum(joint) for share in joint], rel=1e-9)


@pytest.mark.parametrize("left", [0.05, 0.2, 0.35, 0.45])
def test_offset_odds_come_to_the_share_that_should_be_left_unless_they_come_to_more(left: float):
    live = simulated(3000, symmetric(6, 0.3), apart=1.5)
    noise_model = replace(noise_model_with(0.3, symmetric(6, 0.3)), remaining_noise_rate=left)
    blocks = zip(live.logits.split(700), live.labels.split(700), strict=True)
    parts = [posterior_sums(noise_model, z, y) for z, y in blocks]
    found = with_log_odds_offset(
        noise_model, PosteriorSums(*(torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)))
    )

    def mean(of: NoiseModel) -> float:
        return float(torch.sigmoid(of.posterior(live.logits, live.labels).mislabel_odds).mean())

    if mean(noise_model) >= left:
        assert found == noise_model
    else:
        assert mean(found) == pytest.approx(left, abs=1e-3)
        difference = (
            found.posterior(live.logits, live.labels).mislabel_odds
            - noise_model.posterior(live.logits, live.labels).mislabel_odds
        )
        torch.testing.assert_close(difference, torch.full_like(difference, found.log_odds_offset))


def test_odds_are_not_raised_beyond_the_largest_that_is_tried_nor_where_there_are_no_samples():
    live = simulated(100, symmetric(6, 0.0), apart=6.0)
    noise_model = replace(noise_model_with(0.3, symmetric(6, 0.3)), remaining_noise_rate=0.9)
    assert (
        with_log_odds_offset(
            noise_model, PosteriorSums(*posterior_sums(noise_model, live.logits, live.labels))
        ).log_odds_offset
        == 4.0
    )
    assert (
        with_log_odds_offset(
            noise_model,
            PosteriorSums(*posterior_sums(noise_model, live.logits[:0], live.labels[:0])),
        ).log_odds_offset
        == 0.0
    )


def test_without_noise_in_the_validation_labels_a_class_is_as_likely_as_its_label():
    live = simulated(50, symmetric(4, 0.2), apart=1.0)
    noise_model = replace(noise_model_with(0.0, symmetric(4, 0.2)), sharpness=1.0)
    q = noise_model.probabilities(live.logits, live.labels)
    p = noise_model.posterior(live.logits, live.labels).class_probabilities
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 10])
def test_extreme_logits_and_one_class_alone_give_numbers(classes: int, scale: float, dtype: torch.dtype):
    logits = scale * torch.randn(300, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    for labels in (torch.arange(300) % classes, torch.ones(300, dtype=torch.long), logits.argmax(dim=1)):
        of = Simulated(logits, labels, labels)
        noise_model = calibrated(of, of.memorised(scale))
        for part in vars(calibration_sums_of(of, noise_model.temperature)).values():
            assert bool(torch.isfinite(part).all())
        assert math.isfinite(noise_model.memorisation_offset)
        assert bool(torch.isfinite(noise_model.transition).all())
        assert noise_model.probabilities(logits, labels).dtype == dtype
        posterior = noise_model.posterior(logits, labels)
        for found in (
            noise_model.probabilities(logits, labels),
            posterior.class_probabilities,
            posterior.class_posterior,
        ):
            assert bool(torch.isfinite(found).all())
        assert bool(torch.isfinite(posterior.mislabel_odds).all())
        said = suggestion(leave_one_out_of(of, noise_model))
        assert bool(torch.isfinite(said.confidence).all())
        assert bool(torch.isfinite(said.self_confidence).all())


def test_float32_logits_give_the_estimates_of_float64_ones():
    validation = simulated(2000, paired(10, 0.2))
    live = simulated(4000, paired(10, 0.2), seed=1).memorised(1.0)
    exact = calibrated(validation, live)
    single = [replace(of, logits=of.logits.float()) for of in (validation, live)]
    rough = calibrated(single[0], single[1])
    assert rough.temperature == pytest.approx(exact.temperature, rel=1e-4)
    assert rough.memorisation_offset == pytest.approx(exact.memorisation_offset, abs=1e-4)
    torch.testing.assert_close(rough.transition, exact.transition, rtol=0, atol=1e-2)
    assert rough.noise.rate == pytest.approx(exact.noise.rate, abs=0.03)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error over 15 bins (Guo et al. 2017)."""
    bins = (15 * confidence).long().clamp_max(14)
    errors = [
        float((bins == b).sum()) * abs(float(confidence[bins == b].mean() - right[bins == b].double().mean()))
        for b in bins.unique().tolist()
    ]
    return sum(errors) / len(confidence)


@pytest.fixture(scope="module", params=[0.2, 0.4])
def memorised(request: pytest.FixtureRequest) -> tuple[Simulated, NoiseModel]:
    """Live samples with logits half as large as they should be, which remember their labels."""
    noise = symmetric(10, request.param)
    live = simulated(10_000, noise, seed=1).memorised(1.5).cooled(2.0)
    return live, calibrated(simulated(4000, noise).cooled(2.0), live)


def test_a_suggestion_is_never_the_given_label(memorised: tuple[Simulated, NoiseModel]):
    live, noise_model = memorised
    for known in (noise_model, None):
        assert bool((suggestion(leave_one_out_of(live, known)).suggested != live.labels).all())


def test_the_confidence_in_a_suggestion_is_calibrated_where_classes_lie_apart(memorised: tuple[Simulated, NoiseModel]):
    live, noise_model = memorised
    found, plain = suggestion(leave_one_out_of(live, noise_model)), suggestion(leave_one_out_of(live, None))
    assert calibration_error(found.confidence, found.suggested == live.true) < 0.05
    assert calibration_error(plain.confidence, plain.suggested == live.true) > 0.1


@pytest.mark.parametrize("apart", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_the_class_probabilities_are_calibrated_however_alike_the_classes_are(apart: float, rate: float):
    noise = symmetric(10, rate)
    live = simulated(10_000, noise, apart=apart, seed=1).cooled(2.0)
    noise_model = calibrated(simulated(6000, noise, apart=apart).cooled(2.0), live)
    confidence, likeliest = noise_model.posterior(live.logits, live.labels).class_probabilities.max(dim=1)
    assert calibration_error(confidence, likeliest == live.true) < 0.05


def test_the_self_confidence_is_the_calibrated_probability_of_the_given_label(memorised: tuple[Simulated, NoiseModel]):
    live, noise_model = memorised
    found = suggestion(leave_one_out_of(live, noise_model))
    q = noise_model.probabilities(live.logits, live.labels)
    torch.testing.assert_close(found.self_confidence, q.gather(1, live.labels[:, None])[:, 0])
    assert torch.equal(found.predicted, q.argmax(dim=1))


def test_among_classes_that_are_equally_likely_the_suggestion_is_the_one_whose_samples_are_labelled_so():
    drawn = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise_model = noise_model_with(0.0, (drawn / drawn.sum(dim=1, keepdim=True)).numpy())
    level = Simulated(torch.zeros(6, 6).double(), torch.arange(6), torch.arange(6))
    # lowered by nothing: every class is as likely as any other
    found = suggestion(leave_one_out_of(level, replace(noise_model, memorisation_offset=0.0))).suggested
    for y in range(6):
        others = {c: float(noise_model.transition[c, y]) for c in range(6) if c != y}
        assert int(found[y]) == max(others, key=lambda c: others[c])


@pytest.mark.parametrize(
    ("removed", "relabelled", "rate"), [(0, 0, 0.2), (100, 0, 100 / 900), (0, 100, 0.1), (300, 0, 0.0)]
)
def test_what_is_removed_or_corrected_is_no_longer_among_the_noise(removed: int, relabelled: int, rate: float):
    left, transition = noise_left(torch.ones(4, 4), 0.2, 1000, acted_on=removed + relabelled, left=1000 - removed)
    assert left == pytest.approx(rate)
    assert torch.allclose(transition.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(transition.diagonal(), torch.full((4,), 1 - rate, dtype=torch.float64))
