"""The noise_model against simulations in which the truth is known, and against plain loops.

In a simulation the logits are the logarithm of what label a sample like this is given: a model that is as good as one
can be, whose temperature, memory and noise are then put in by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor

from posttrain.influence import calibration
from posttrain.influence.calibration import (
    CalibrationSums,
    NoiseEstimate,
    NoiseModel,
    calibration_sums,
    fitted_temperature,
    temperature_moments,
)
from posttrain.influence.ensemble import with_transition
from posttrain.influence.probe import in_memory
from posttrain.influence.scores import LeaveOneOut, suggestion

GRID = np.linspace(0, 16, 257)


@dataclass(frozen=True)
class Simulated:
    """Samples whose true class is known."""

    logits: Tensor
    labels: Tensor
    true: Tensor

    @property
    def wrong(self) -> Tensor:
        return self.labels != self.true

    def remembered(self, offset: float) -> Simulated:
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


def calibrated(held_out: Simulated, live: Simulated) -> NoiseModel:
    """The whole noise_model, the transition matrix included."""
    temperature = temperature_of(held_out.logits, held_out.labels)
    first = calibration.estimate(
        calibration_sums_of(held_out, temperature), calibration_sums_of(live, temperature), temperature
    )

    def posterior_sums(by: NoiseModel) -> calibration.PosteriorSums:
        return calibration.PosteriorSums(*calibration.posterior_sums(by, live.logits, live.labels))

    unit = torch.eye(live.logits.shape[1], dtype=torch.float64)
    return with_transition(first, in_memory(held_out.logits, held_out.labels, 501), unit, posterior_sums)


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    reduce = in_memory(logits, labels, 501)
    unit = torch.eye(logits.shape[1], dtype=torch.float64)
    return fitted_temperature(lambda t: reduce(temperature_moments, unit, t))


def of_bins(confident: Tensor, disagreeing: Tensor) -> CalibrationSums:
    """A calibration_sums of which only the confidences say anything."""
    count = confident.sum()
    votes = torch.zeros(3, 3, dtype=torch.float64)
    nothing = torch.zeros(4096, dtype=torch.float64)
    ones, no_class = torch.ones(257, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    return CalibrationSums(count, ones, votes, confident, disagreeing, nothing, nothing, no_class, no_class)


def leave_one_out_of(of: Simulated, noise_model: NoiseModel | None) -> LeaveOneOut:
    return LeaveOneOut(of.logits, of.labels, noise_model)


def found_noise(rate: float) -> NoiseEstimate:
    return NoiseEstimate(rate, 0.0, 1.0, 1.0, round(1000 * rate), 1000, found=True)


# -- t -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right_at", [0.1, 0.6, 1.0, 3.0, 15.0])
def test_the_temperature_is_where_scipy_finds_the_lowest_cross_entropy(right_at: float):
    held_out = simulated(2000, symmetric(5, 0.2), apart=1.5).cooled(right_at)

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(math.exp(log_t) * held_out.logits, held_out.labels))

    known = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-9})
    found = temperature_of(held_out.logits, held_out.labels)
    assert found == pytest.approx(math.exp(known.x), rel=1e-4)  # pyright: ignore[reportAttributeAccessIssue]
    assert found == pytest.approx(right_at, rel=0.1)


def test_the_temperature_stays_within_its_bounds_where_no_other_is_best():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert temperature_of(logits, torch.tensor([0, 1])) == pytest.approx(20)
    assert temperature_of(logits, torch.tensor([1, 0])) == pytest.approx(0.05)


def test_the_temperature_is_found_where_the_logits_are_saturated_or_flat():
    labels = torch.tensor([0, 1, 1, 0])
    for logits in (1e4 * torch.eye(2).double()[[0, 1, 0, 0]], torch.zeros(4, 2).double(), 1e-9 * torch.ones(4, 2)):
        assert 0.05 <= temperature_of(logits.double(), labels) <= 20


def test_the_moments_of_the_temperature_are_derivatives_of_the_cross_entropy():
    held_out = simulated(300, symmetric(4, 0.2), apart=1.0)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(t * held_out.logits, held_out.labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, t, create_graph=True)
    (curve,) = torch.autograd.grad(slope, t)
    found = temperature_moments(held_out.logits, held_out.labels, torch.eye(4).double(), t.detach())
    assert [float(part) for part in found] == pytest.approx([300, slope.item(), curve.item()], rel=1e-9)


# -- b -----------------------------------------------------------------------------------------------------


def test_the_support_is_the_given_labels_probability_after_its_logit_was_lowered():
    live = simulated(200, symmetric(6, 0.3), apart=1.0)
    found = calibration_sums(live.logits, live.labels, 0.7)[1]
    for k in (0, 1, 16, 100, 256):
        p = lowered(0.7 * live.logits, live.labels, GRID[k]).softmax(dim=1)
        assert float(found[k]) == pytest.approx(float(p.gather(1, live.labels[:, None]).sum()), rel=1e-9)


@pytest.mark.parametrize("offset", [0.3, 1.0, 2.72, 6.0, 12.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_an_offset_that_was_added_to_the_given_labels_is_found_again(offset: float, temperature: float):
    held_out = simulated(4000, symmetric(10, 0.2), apart=1.5)
    # in units of the calibrated logits
    live, seen = held_out.remembered(offset).cooled(temperature), held_out.cooled(temperature)
    found = calibration.estimate(
        calibration_sums_of(seen, temperature), calibration_sums_of(live, temperature), temperature
    )
    assert found.offset == pytest.approx(offset, abs=0.05)


def test_an_offset_is_found_on_other_samples_than_the_held_out_ones():
    errors = []
    for seed in range(10):
        held_out = simulated(4000, symmetric(10, 0.2), apart=1.5, seed=seed)
        live = simulated(8000, symmetric(10, 0.2), apart=1.5, seed=100 + seed).remembered(1.0)
        errors.append(calibrated(held_out, live).offset - 1.0)
    assert abs(float(np.mean(errors))) < 0.05


def test_there_is_no_offset_where_none_was_added_or_the_live_labels_are_less_probable():
    held_out = simulated(4000, symmetric(10, 0.2), apart=1.5)
    assert calibrated(held_out, held_out).offset == 0.0
    assert calibrated(held_out, held_out.remembered(-1.0)).offset == 0.0


def test_without_the_offset_live_labels_are_as_probable_as_held_out_ones():
    held_out = simulated(3000, symmetric(10, 0.2), apart=1.5)
    live = simulated(3000, symmetric(10, 0.2), apart=1.5, seed=5).remembered(2.0)
    found = calibrated(held_out, live)
    q = found.probabilities(live.logits, live.labels).gather(1, live.labels[:, None]).mean()
    p = (found.temperature * held_out.logits).softmax(dim=1).gather(1, held_out.labels[:, None]).mean()
    assert float(q) == pytest.approx(float(p), abs=1e-4)


def test_an_offset_beyond_all_that_are_tried_is_the_largest_of_them():
    held_out = simulated(500, symmetric(3, 0.4), apart=0.5)
    assert (
        calibration.estimate(calibration_sums_of(held_out), calibration_sums_of(held_out.remembered(40.0)), 1.0).offset
        == 16.0
    )


# -- sums over blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_survey_adds_up_over_blocks(size: int):
    live = simulated(333, symmetric(5, 0.3), apart=1.0)
    whole = calibration_sums(live.logits, live.labels, 1.3)
    blocks = zip(live.logits.split(size), live.labels.split(size), strict=True)
    parts = zip(*(calibration_sums(z, y, 1.3) for z, y in blocks), strict=True)
    for at, (known, column) in enumerate(zip(whole, parts, strict=True)):
        total = torch.stack(column).sum(dim=0)
        # what is counted is the same to the last bit, what is summed to rounding
        if at in (0, 3, 4):
            assert torch.equal(total, known)
        else:
            torch.testing.assert_close(total, known, rtol=1e-12, atol=1e-15)


def test_an_empty_block_adds_nothing():
    nothing = calibration_sums(torch.empty(0, 5), torch.empty(0, dtype=torch.long), 1.3)
    for part, known in zip(nothing, calibration_sums(torch.zeros(2, 5), torch.tensor([0, 4]), 1.3), strict=True):
        assert part.shape == known.shape
        assert part.dtype == known.dtype == torch.float64
        assert float(part.abs().sum()) == 0
    unit = torch.eye(5).double()
    empty = torch.empty(0, 5, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    assert [float(part) for part in temperature_moments(*empty, unit, torch.tensor(1.0, dtype=torch.float64))] == [
        0,
        0,
        0,
    ]


def test_a_survey_of_features_is_that_of_their_logits():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    labels = torch.arange(50) % 4
    found = calibration.calibration_sums_of_block(features, labels, weights, torch.tensor(1.3, dtype=torch.float64))
    for part, known in zip(found, calibration_sums(features @ weights.T, labels, 1.3), strict=True):
        torch.testing.assert_close(part, known, rtol=1e-12, atol=0)


def test_of_fewer_held_out_samples_than_are_counted_nothing_is_known():
    live = calibration_sums_of(simulated(2000, symmetric(5, 0.4), seed=1))
    for number, doubt in ((49, "few"), (50, None)):
        noise_model = calibration.estimate(calibration_sums_of(simulated(number, symmetric(5, 0.4))), live, 1.0)
        assert noise_model.noise.doubt == doubt and (noise_model.noise.most == 0.0) == (doubt is not None)
        # where the user says how many may go, the odds are what they would be without the doubt
        assert noise_model.live_rate > 0.25


@pytest.mark.parametrize("shift", [0, 1])
def test_where_held_out_labels_mean_other_classes_nothing_is_found(shift: int):
    held_out, live = simulated(300, symmetric(5, 0.0)), simulated(2000, symmetric(5, 0.0), seed=1)
    other = replace(held_out, labels=(held_out.labels + shift) % 5)
    found = calibration.estimate(calibration_sums_of(other), calibration_sums_of(live), 1.0)
    assert found.noise.doubt == ("chance" if shift else None)
    assert found.noise.most == 0.0
    # nothing of the surest agrees: without the doubt all labels would be wrong
    assert found.noise.rate > 0.9 if shift else not found.noise.found


@pytest.mark.parametrize("sizes", [None, np.array([12.0, 1.0, 1.0, 1.0, 1.0])])
def test_random_labels_are_not_taken_for_wrong_ones_where_the_boundary_guesses(sizes: np.ndarray | None):
    drawn = np.random.default_rng(0)
    doubts = []
    for seed in range(20):
        held_out, live = (simulated(300, symmetric(5, 0.0), seed=2 * seed + k, sizes=sizes) for k in (0, 1))
        guessing = [replace(of, logits=of.logits[torch.from_numpy(drawn.permutation(300))]) for of in (held_out, live)]
        doubts.append(
            calibration.estimate(calibration_sums_of(guessing[0]), calibration_sums_of(guessing[1]), 1.0).noise.doubt
        )
    # one in a hundred may pass
    assert doubts.count("chance") >= 19


@pytest.mark.parametrize(
    ("rate", "rare", "samples"), [(0.2, 0.4, 60), (0.2, 0.1, 150), (0.3, 0.1, 300), (0.1, 0.02, 1000), (0.0, 0.02, 200)]
)
def test_a_boundary_that_is_right_is_no_guess_where_classes_are_unequal(rate: float, rare: float, samples: int):
    """Better than a guess, though hardly better than always the more frequent label."""
    noise, sizes = symmetric(2, rate), np.array([1 - rare, rare])
    live = calibration_sums_of(simulated(1000, noise, apart=4.0, sizes=sizes, seed=99))
    drawn = [simulated(samples, noise, apart=4.0, sizes=sizes, seed=seed) for seed in range(40)]
    right = [replace(of, logits=torch.nn.functional.one_hot(of.true, 2).double() * 5) for of in drawn]
    doubts = [calibration.estimate(calibration_sums_of(of), live, 1.0).noise.doubt for of in right]
    assert doubts.count("chance") <= 2


def doubt_of(predicted: Tensor, labels: Tensor, classes: int) -> str | None:
    """What is doubted where held-out samples are predicted and labelled so."""
    logits = 5 * torch.nn.functional.one_hot(predicted, classes).double()
    return calibration.estimate(CalibrationSums(*calibration_sums(logits, labels, 1.0)), LIVE[classes], 1.0).noise.doubt


LIVE = {classes: calibration_sums_of(simulated(200, symmetric(classes, 0.1))) for classes in (2, 3, 10)}


@pytest.mark.parametrize("classes", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 10))])
def test_predictions_or_labels_of_one_class_alone_are_chance_whatever_their_number(classes: int):
    drawn = np.random.default_rng(classes)
    for n in [*range(50, 130), 999, 1200, 9999]:
        labels = torch.from_numpy(drawn.choice(classes, n, p=drawn.dirichlet(np.full(classes, 0.5))))
        for only in range(min(classes, 3)):
            same = torch.full_like(labels, only)
            assert doubt_of(same, labels, classes) == "chance", (n, only)
            assert doubt_of(labels, same, classes) == "chance", (n, only)


@pytest.mark.parametrize("classes", [10, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
@pytest.mark.parametrize("others", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 5))])
def test_predictions_nearly_all_of_one_class_pass_for_more_than_chance_in_one_of_a_hundred_cases(
    classes: int, others: int
):
    drawn = np.random.default_rng(others)
    doubts = []
    for _ in range(400):
        n = int(drawn.integers(50, 400))
        predicted = torch.zeros(n, dtype=torch.long)
        predicted[:others] = torch.from_numpy(drawn.integers(1, classes, others))
        labels = torch.from_numpy(drawn.choice(classes, n, p=drawn.dirichlet(np.full(classes, 1.0))))
        doubts.append(doubt_of(predicted, labels, classes))
    # 4 are to be expected at most
    assert doubts.count(None) <= 9


@pytest.mark.parametrize("classes", [10, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
@pytest.mark.parametrize("even", [0.5, pytest.param(5.0, marks=pytest.mark.long)])
def test_predictions_by_chance_pass_for_more_in_one_of_a_hundred_cases(classes: int, even: float):
    drawn = np.random.default_rng(0)
    doubts = []
    for _ in range(400):
        n = int(drawn.integers(50, 400))
        guesses, sizes = (drawn.dirichlet(np.full(classes, even)) for _ in range(2))
        predicted, labels = (torch.from_numpy(drawn.choice(classes, n, p=p)) for p in (guesses, sizes))
        doubts.append(doubt_of(predicted, labels, classes))
    assert doubts.count(None) <= 9


def test_the_moments_of_agreement_are_those_over_all_orders():
    """By the limit: with the quantile in plain floats from all 5,040 orders of seven labels."""
    given, predicted = [3, 2, 2], [4, 2, 1]
    labels, guesses = np.repeat(range(3), given), np.repeat(range(3), predicted)
    agreeing = np.array([(np.array(order) == guesses).sum() for order in permutations(labels)])
    spread, skewed = agreeing.std(), ((agreeing - agreeing.mean()) ** 3).mean()
    z = 2.326
    limit = agreeing.mean() + z * spread + 0.5 + max(0.0, (z * z - 1) / 6 * skewed / spread**2)
    for k in range(8):
        assert calibration._agree_by_chance(k, 7, given, predicted) == (k <= limit)


def test_a_few_right_answers_are_no_guess_where_there_are_many_classes():
    labels = torch.arange(200) % 10
    for right, doubt in ((0, "chance"), (20, "chance"), (60, None), (200, None)):
        predicted = torch.where(torch.arange(200) < right, labels, (labels + 1 + torch.arange(200) // 10 % 9) % 10)
        assert doubt_of(predicted, labels, 10) == doubt


def test_agreement_by_chance_is_that_of_labels_in_any_other_order():
    drawn, classes, n = np.random.default_rng(0), 4, 400
    sizes, guesses = [0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]
    labels, predicted = drawn.choice(classes, n, p=sizes), drawn.choice(classes, n, p=guesses)
    shuffled = np.array([(drawn.permutation(labels) == predicted).mean() for _ in range(4000)])
    limit = shuffled.mean() + 2.326 * shuffled.std()
    live = calibration_sums_of(simulated(500, symmetric(classes, 0.1)))
    # put right one by one until as many agree as only one in a hundred guesses would
    for agreeing in range(int(limit * n) - 4, int(limit * n) + 5):
        now = labels.copy()
        off = [i for i in drawn.permutation(n) if now[i] != predicted[i]]
        for i in off[: max(0, agreeing - int((labels == predicted).sum()))]:
            # an exchange keeps how many there are of each
            j = next(j for j in off if now[j] == predicted[i] and now[j] != predicted[j])
            now[i], now[j] = now[j], now[i]
            if int((now == predicted).sum()) >= agreeing:
                break
        logits = 5 * torch.nn.functional.one_hot(torch.from_numpy(predicted), classes).double()
        of = CalibrationSums(*calibration_sums(logits, torch.from_numpy(now), 1.0))
        share = float((now == predicted).mean())
        if abs(share - limit) > 2 / n:
            assert (calibration.estimate(of, live, 1.0).noise.doubt == "chance") == (share < limit)


def test_without_wrong_labels_their_directions_do_not_matter():
    """Classes that are taken for others one way only, as every real set has them."""
    confused = torch.eye(5, dtype=torch.float64)
    confused[0, :2] = 0.5

    def skewed(seed: int) -> Simulated:
        of = simulated(2000, np.eye(5), apart=3.0, seed=seed)
        return replace(of, logits=(of.logits.softmax(dim=1) @ confused).log())

    held_out, live = skewed(3), skewed(4)
    found = calibrated(held_out, live)
    assert not found.noise.found
    torch.testing.assert_close(found.transition, torch.from_numpy(symmetric(5, calibration.CLEAN)))
    assert found.prior is calibration.UNKNOWN
    # another round of a run that found some: what it saw holds
    seen = calibration.Prior(100 * torch.from_numpy(paired(5, 0.3)), 0.3, 0.3)
    later = calibration.estimate(calibration_sums_of(held_out), calibration_sums_of(live), 1.0, prior=seen).transition
    assert float(later[0, 1]) > 2 * float(later[0, 2])


def test_nothing_is_estimated_where_there_are_no_samples():
    some = calibration_sums_of(simulated(500, symmetric(5, 0.2)))
    none = CalibrationSums(*calibration_sums(torch.empty(0, 5).double(), torch.empty(0, dtype=torch.long), 1.0))
    without_live = calibration.estimate(some, none, 1.0)
    assert without_live.offset == 0.0
    torch.testing.assert_close(without_live.transition, torch.from_numpy(symmetric(5, without_live.noise.rate)))
    without_held_out = calibration.estimate(none, some, 1.0)
    assert without_held_out.offset == 0.0
    assert (without_held_out.noise.source, without_held_out.noise.doubt) == ("live", "few")
    noise = calibration.estimate(none, none, 1.0).noise
    assert (noise.rate, noise.low, noise.high, noise.counted) == (0.0, 0.0, 1.0, 0)
    assert not calibration.estimate(none, none, 1.0).noise.found


# -- the share of wrong labels -----------------------------------------------------------------------------


@pytest.mark.parametrize(("disagreeing", "counted"), [(0, 50), (1, 50), (7, 50), (50, 50), (400, 2000), (1, 1)])
def test_the_interval_is_the_exact_one_of_scipy(disagreeing: int, counted: int):
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    confident[-1], wrong[-1] = counted, disagreeing
    noise = calibration.estimate(of_bins(confident, wrong), of_bins(confident, wrong), 1.0).noise
    known = binomtest(disagreeing, counted).proportion_ci(confidence_level=0.95, method="exact")
    assert (noise.disagreeing, noise.counted) == (disagreeing, counted)
    assert (noise.low, noise.high) == pytest.approx((known.low if noise.found else 0.0, known.high), abs=1e-12)


@pytest.mark.parametrize(
    ("disagreeing", "counted"), [(0, 50), (1, 50), (2, 50), (3, 50), (4, 50), (20, 2000), (60, 2000)]
)
@pytest.mark.parametrize("side", ["held out", "live"])
def test_noise_is_found_where_scipy_says_that_there_is_more_than_in_a_clean_set(
    disagreeing: int, counted: int, side: str
):
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    # many others without an error: the boundary is a good one
    confident[-1], wrong[-1], confident[0] = counted, disagreeing, 40 * counted
    shown, clean = of_bins(confident, wrong), of_bins(confident, torch.zeros_like(wrong))
    noise = calibration.estimate(*((shown, clean) if side == "held out" else (clean, shown)), 1.0).noise
    # the one-sided test at the 5 % level
    known = binomtest(disagreeing, counted, calibration.CLEAN, alternative="greater")
    assert noise.found == (known.pvalue < 0.05)
    assert noise.source == ("live" if noise.found and side == "live" else "held-out")
    assert noise.rate == (disagreeing / counted if noise.found else 0.0)


@pytest.mark.parametrize("samples", [300, 3000])
def test_the_most_confident_are_the_highest_by_sorting(samples: int):
    drawn = np.random.default_rng(samples)
    # confidences that are more than a bin apart: 16 / 4096 in -log(1 - confidence)
    depth = drawn.permutation(np.linspace(0.7, 0.7 + 0.0045 * samples, samples))
    rest = np.exp(-depth)
    likeliest = drawn.integers(0, 3, samples)
    p = np.tile(rest[:, None] / 2, (1, 3))
    p[np.arange(samples), likeliest] = 1 - rest
    wanted = max(50, int(0.02 * samples))
    highest = np.argsort(-depth)[:wanted]
    # the less confident ones disagree far more often: no more than the wanted ones are alike
    rate = np.full(samples, 0.9)
    rate[highest] = 0.3
    labels = np.where(drawn.random(samples) < rate, (likeliest + 1) % 3, likeliest)
    of = CalibrationSums(*calibration_sums(torch.from_numpy(np.log(p)), torch.from_numpy(labels), 1.0))
    # a boundary that is wrong on so many would be taken for a guess
    of = replace(of, labels=torch.zeros(3).double())
    noise = calibration.estimate(of, of, 1.0).noise
    assert (noise.counted, noise.disagreeing) == (wanted, int((labels != likeliest)[highest].sum()))


@pytest.mark.parametrize(("per_bin", "wanted"), [(1, 81), (30, 2000)])
def test_of_a_bin_all_count_or_none(per_bin: int, wanted: int):
    confident = torch.full((4096,), float(per_bin), dtype=torch.float64)
    bins = math.ceil(wanted / per_bin)
    wrong = (torch.arange(4096) % 3 == 0).double()
    wrong[:-bins] = per_bin
    noise = calibration.estimate(of_bins(confident, wrong), of_bins(confident, wrong), 1.0).noise
    assert (noise.counted, noise.disagreeing) == (bins * per_bin, int(wrong[-bins:].sum()))


def test_removing_wrong_labels_is_not_taken_for_memory():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 6000)
    logits = torch.from_numpy(3.0 * np.eye(3)[truth] + draw.normal(size=(6000, 3)))
    wrong = draw.random(6000) < 0.3
    labels = torch.from_numpy(np.where(wrong, (truth + 1) % 3, truth))
    held_out = CalibrationSums(*calibration_sums(logits[:3000], labels[:3000], 1.0))
    kept = torch.from_numpy(~wrong[3000:])
    cleaned = CalibrationSums(*calibration_sums(logits[3000:][kept], labels[3000:][kept], 1.0))
    gone = int((~kept).sum())
    assert calibration.estimate(held_out, cleaned, 1.0).offset > 1.0
    assert calibration.estimate(held_out, cleaned, 1.0, removed=gone).offset < 0.1
    # what the removed labels still had for them is the rest
    support = float(logits[3000:][~kept].softmax(dim=1).gather(1, labels[3000:][~kept][:, None]).sum())
    whole = calibration.estimate(
        held_out, CalibrationSums(*calibration_sums(logits[3000:], labels[3000:], 1.0)), 1.0
    ).offset
    again = calibration.estimate(held_out, cleaned, 1.0, removed=gone, removed_support=support).offset
    assert again == pytest.approx(whole, abs=0.02)


def test_wrong_held_out_labels_found_once_hold_where_the_surest_samples_show_none():
    """As in later rounds of a small set: the boundary has changed, and of 50 samples none is wrong by chance."""
    rate, memory = 0.2, 1.0
    held_out = simulated(3000, symmetric(10, rate), apart=4.0, seed=1)
    live = simulated(3000, symmetric(10, rate), apart=4.0, seed=2).remembered(memory)
    temperature = temperature_of(held_out.logits, held_out.labels)
    first = calibration.estimate(
        calibration_sums_of(held_out, temperature), calibration_sums_of(live, temperature), temperature
    )
    gone = live.wrong
    own = first.probabilities(live.logits[gone], live.labels[gone]).gather(1, live.labels[gone][:, None])
    rest = Simulated(live.logits[~gone], live.labels[~gone], live.true[~gone])
    shown = calibration_sums_of(held_out, temperature)
    hidden = replace(shown, disagreeing=torch.zeros_like(shown.disagreeing))
    removed = {"removed": int(gone.sum()), "removed_support": float(own.sum())}
    found = {
        name: calibration.estimate(of, calibration_sums_of(rest, temperature), temperature, **removed, prior=prior)
        for name, of, prior in (
            ("shown", shown, calibration.UNKNOWN),
            ("forgotten", hidden, calibration.UNKNOWN),
            ("held", hidden, calibration.Prior(held_out_rate=first.held_out_rate)),
            ("of a round", hidden, first.prior),
        )
    }
    assert first.held_out_rate == pytest.approx(rate, abs=0.03)
    assert found["held"].offset == found["shown"].offset == pytest.approx(memory * temperature, abs=0.15)
    assert found["held"].held_out_rate == first.held_out_rate
    assert found["of a round"].offset == found["held"].offset
    assert (found["of a round"].held_out_rate, found["of a round"].live_rate) == (first.held_out_rate, first.live_rate)
    left = (3000 * first.live_rate - int(gone.sum())) / len(rest.labels)
    assert found["of a round"].left == pytest.approx(max(0.0, left))
    assert found["forgotten"].offset > found["held"].offset + 0.5


@pytest.mark.parametrize(("rate", "memory"), [(0.3, 6.0), (0.4, 4.0)])
def test_memory_is_known_through_all_rounds_where_the_held_out_labels_are_right(rate: float, memory: float):
    held_out = looked_through(1500, rate, seed=1001)
    live = simulated(3000, symmetric(10, rate), apart=4.0, seed=5001).remembered(memory)
    first = calibrated(held_out, live)
    wrong = torch.nonzero(live.wrong)[:, 0]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        gone = wrong[: int(share * len(wrong))]
        own = first.probabilities(live.logits[gone], live.labels[gone]).gather(1, live.labels[gone][:, None])
        kept = torch.ones(len(live.labels), dtype=torch.bool)
        kept[gone] = False
        rest = Simulated(live.logits[kept], live.labels[kept], live.true[kept])
        temperature = temperature_of(held_out.logits, held_out.labels)
        surveys = calibration_sums_of(held_out, temperature), calibration_sums_of(rest, temperature)
        found = calibration.estimate(*surveys, temperature, removed=len(gone), removed_support=float(own.sum()))
        assert memory / 2 < found.offset / temperature < 1.2 * memory
        candidates = found.judge(rest.logits, rest.labels).mislabel_odds > 0
        assert int((candidates & rest.wrong).sum()) >= 0.95 * int(rest.wrong.sum())
        assert int((candidates & ~rest.wrong).sum()) <= 0.005 * len(rest.labels)


@pytest.mark.parametrize(("apart", "memory"), [(1.2, 0.0), (1.6, 3.0)])
def test_suggestions_are_calibrated_also_where_the_held_out_labels_are_right(apart: float, memory: float):
    noisy = simulated(4000, symmetric(10, 0.4), apart=apart, seed=1001)
    live = simulated(8000, symmetric(10, 0.4), apart=apart, seed=5001).remembered(memory)
    found = calibrated(replace(noisy, labels=noisy.true), live)
    assert found.noise.found and found.noise.source != "held-out"
    p = found.judge(live.logits, live.labels).class_probabilities
    sure = p.max(dim=1).values > 0.9
    right = (p.argmax(dim=1) == live.true)[sure].double().mean()
    assert float(right) == pytest.approx(float(p.max(dim=1).values[sure].mean()), abs=0.03)


def test_as_many_count_as_disagree_alike():
    confident = torch.full((4096,), 1.0, dtype=torch.float64)
    even = (torch.arange(4096) % 20 == 0).double()
    # 81, doubled to 1,296; twice that would be more than half of all
    noise = calibration.estimate(of_bins(confident, even), of_bins(confident, even), 1.0).noise
    assert noise.counted == 1296 and noise.rate == pytest.approx(0.05, abs=0.005) and noise.found
    # from the 324th on, four times as many disagree: what is wrong there is the boundary
    steep = even.clone()
    steep[: 4096 - 324] = (torch.arange(4096 - 324) % 5 == 0).double()
    noise = calibration.estimate(of_bins(confident, steep), of_bins(confident, steep), 1.0).noise
    assert noise.counted == 324 and noise.disagreeing == int(even[-324:].sum())


def test_a_boundary_that_errs_often_has_to_disagree_more_before_labels_are_called_wrong():
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    confident[-1], wrong[-1], confident[0] = 100, 6, 900
    # 6 of 100 are more than 1 % by the one-sided test, but not more than a tenth of 45 %
    assert binomtest(6, 100, calibration.CLEAN, alternative="greater").pvalue < 0.05
    assert binomtest(6, 100, 0.0456, alternative="greater").pvalue > 0.05
    for missed, expected in ((10, True), (450, False)):
        wrong[0] = missed
        assert calibration.estimate(of_bins(confident, wrong), of_bins(confident, wrong), 1.0).noise.found == expected


def estimates(rate: float, seeds: int, *, classes: int = 10) -> list[NoiseEstimate]:
    found = []
    for seed in range(seeds):
        held_out = simulated(1500, symmetric(classes, rate), apart=4.0, seed=1000 + seed)
        live = simulated(1500, symmetric(classes, rate), apart=4.0, seed=5000 + seed).remembered(0.5)
        found.append(calibrated(held_out, live).noise)
    return found


def test_a_clean_set_is_left_alone():
    found = estimates(0.0, 100)
    assert sum(noise.found for noise in found) <= 5
    assert all((noise.rate, noise.most) == (0.0, 0.0) for noise in found if not noise.found)


@pytest.mark.parametrize(
    ("rate", "classes"), [(0.2, 2), *(pytest.param(rate, 10, marks=pytest.mark.long) for rate in (0.2, 0.4))]
)
def test_the_estimated_share_of_wrong_labels_covers_the_true_one(rate: float, classes: int):
    found = estimates(rate, 100, classes=classes)
    assert sum(noise.found for noise in found) >= 95
    assert sum(noise.low <= rate <= noise.high for noise in found) >= 90
    assert float(np.mean([noise.rate for noise in found])) == pytest.approx(rate, abs=0.02)


def looked_through(samples: int, rate: float, *, seed: int) -> Simulated:
    """Held-out samples whose labels were put right, under a boundary drawn by noisy ones."""
    noisy = simulated(samples, symmetric(10, rate), apart=4.0, seed=seed)
    return replace(noisy, labels=noisy.true)


def test_where_the_held_out_labels_are_right_the_live_ones_tell_the_share_of_wrong_labels():
    covered = 0
    for seed in range(10):
        noise = calibrated(
            looked_through(1500, 0.3, seed=1000 + seed),
            simulated(1500, symmetric(10, 0.3), apart=4.0, seed=5000 + seed),
        ).noise
        assert noise.found and noise.source == "live" and noise.most > 0.25
        covered += noise.low <= 0.3 <= noise.high
    assert covered >= 8


@pytest.mark.long
def test_where_both_are_equally_noisy_the_held_out_labels_tell_the_share():
    # two intervals of 95 % that do not meet are rarer than one difference in twenty
    assert sum(noise.source != "held-out" for noise in estimates(0.2, 100)) <= 3


@pytest.mark.parametrize(("offset", "rate"), [(0.0, 0.3), (3.0, 0.3), (8.0, 0.3), (8.0, 0.1)])
def test_where_the_held_out_labels_are_right_memorised_wrong_labels_are_found_by_comparison(offset: float, rate: float):
    covered = 0
    for seed in range(10):
        right = looked_through(1500, rate, seed=1000 + seed)
        noise = calibrated(
            right, simulated(1500, symmetric(10, rate), apart=4.0, seed=5000 + seed).remembered(offset)
        ).noise
        assert noise.found and noise.most > rate
        assert (noise.source == "comparison") == (offset > 1)
        covered += noise.low <= rate <= noise.high
    assert covered >= 8


def test_memory_of_right_labels_alone_is_not_taken_for_wrong_ones():
    found = 0
    for seed in range(30):
        held_out = simulated(300, symmetric(10, 0.0), apart=3.0, seed=1000 + seed)
        live = simulated(1500, symmetric(10, 0.0), apart=3.0, seed=5000 + seed).remembered(8.0)
        found += calibrated(held_out, live).noise.found
    assert found <= 2


@pytest.mark.parametrize("classes", [3, 5])
def test_the_distances_equal_a_plain_loop(classes: int):
    of = simulated(200, symmetric(classes, 0.3))
    rivals, strangers = np.zeros(4096), np.zeros(4096)
    for logits, label in zip((1.5 * of.logits).tolist(), of.labels.tolist(), strict=True):
        for given in range(classes):
            largest = sorted((z for c, z in enumerate(logits) if c != given), reverse=True)
            at = min(int((largest[0] - largest[1]) * 256), 4095)
            if given == label:
                rivals[at] += 1
            else:
                strangers[at] += 1 / (classes - 1)
    found = calibration_sums_of(of, 1.5)
    assert found.rivals.tolist() == rivals.tolist()
    assert found.strangers.numpy() == pytest.approx(strangers)


def test_of_two_classes_no_distance_is_known():
    found = calibration_sums_of(simulated(200, symmetric(2, 0.3)))
    assert float(found.rivals.sum() + found.strangers.sum()) == 0


def test_the_most_that_may_be_removed_is_a_bound_that_is_passed_once_in_a_thousand():
    for noise in estimates(0.2, 5):
        # with so many wrong labels, as few among those counted have a chance of 0.001
        known = binomtest(noise.disagreeing, noise.counted, noise.most, alternative="less")
        assert known.pvalue == pytest.approx(0.001)
    assert all(noise.most == 0.0 for noise in estimates(0.0, 5) if not noise.found)


# -- probabilities -----------------------------------------------------------------------------------------


def audit_with(rate: float, noise: np.ndarray, *, found: bool = True) -> NoiseModel:
    """t = 2, b = 0.7, and the same T for live and held-out samples."""
    estimate = replace(found_noise(rate), found=found)
    known = torch.from_numpy(noise)
    return NoiseModel(2.0, 0.7, estimate, rate, rate if found else 0.01, rate, known, known, known, sharpness=1.3)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_label_probabilities_undo_stretched_logits_that_remember_their_label(classes: int):
    q = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(classes), size=200))
    labels = torch.arange(200) % classes
    logits = lowered(q.log(), labels, -0.7) / 2.0
    torch.testing.assert_close(audit_with(0.2, symmetric(classes, 0.2)).probabilities(logits, labels), q)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_probabilities_are_positive_and_sum_to_one_at_any_rate(classes: int, rate: float):
    logits = 5 * torch.randn(100, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(100) % classes
    noise_model = audit_with(rate, np.eye(classes), found=rate > 0).with_votes(torch.zeros(classes, classes).double())
    judged = noise_model.judge(logits, labels)
    for p in (noise_model.probabilities(logits, labels), judged.class_probabilities, judged.posterior):
        torch.testing.assert_close(p.sum(dim=1), torch.ones(100).double())
        assert bool((p > 0).all())
    assert bool(torch.isfinite(noise_model.judge(logits, labels).mislabel_odds).all())


@pytest.mark.parametrize("noise", [symmetric(4, 0.2), paired(4, 0.3)], ids=["symmetric", "pairs"])
def test_the_odds_are_their_formula_sample_by_sample(noise: np.ndarray):
    live = simulated(50, noise, apart=1.0)
    noise_model = audit_with(0.2, noise + 1e-3)
    judged = noise_model.judge(live.logits, live.labels)
    odds, posterior = judged.mislabel_odds, judged.posterior
    classes = noise_model.judge(live.logits, live.labels).class_probabilities
    for row, (p, y) in enumerate(zip(classes.tolist(), live.labels.tolist(), strict=True)):
        joint = [p[c] * float(noise_model.transition[c, y]) for c in range(4)]
        wrong = sum(share for c, share in enumerate(joint) if c != y)
        assert float(odds[row]) == pytest.approx(math.log(wrong / joint[y]), rel=1e-9)
        assert posterior[row].tolist() == pytest.approx([share / sum(joint) for share in joint], rel=1e-9)


@pytest.mark.parametrize("left", [0.05, 0.2, 0.35, 0.45])
def test_shifted_odds_come_to_the_share_that_should_be_left_unless_they_come_to_more(left: float):
    live = simulated(3000, symmetric(6, 0.3), apart=1.5)
    noise_model = replace(audit_with(0.3, symmetric(6, 0.3)), left=left)
    blocks = zip(live.logits.split(700), live.labels.split(700), strict=True)
    parts = [calibration.posterior_sums(noise_model, z, y) for z, y in blocks]
    found = calibration.shifted(
        noise_model, calibration.PosteriorSums(*(torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)))
    )

    def mean(of: NoiseModel) -> float:
        return float(torch.sigmoid(of.judge(live.logits, live.labels).mislabel_odds).mean())

    if mean(noise_model) >= left:
        assert found == noise_model
    else:
        assert mean(found) == pytest.approx(left, abs=1e-3)
        difference = (
            found.judge(live.logits, live.labels).mislabel_odds
            - noise_model.judge(live.logits, live.labels).mislabel_odds
        )
        torch.testing.assert_close(difference, torch.full_like(difference, found.shift))


def test_odds_are_not_shifted_beyond_the_largest_that_is_tried_nor_where_there_are_no_samples():
    live = simulated(100, symmetric(6, 0.0), apart=6.0)
    noise_model = replace(audit_with(0.3, symmetric(6, 0.3)), left=0.9)
    assert (
        calibration.shifted(
            noise_model, calibration.PosteriorSums(*calibration.posterior_sums(noise_model, live.logits, live.labels))
        ).shift
        == 4.0
    )
    assert (
        calibration.shifted(
            noise_model,
            calibration.PosteriorSums(*calibration.posterior_sums(noise_model, live.logits[:0], live.labels[:0])),
        ).shift
        == 0.0
    )


def test_without_noise_in_the_held_out_labels_a_class_is_as_likely_as_its_label():
    live = simulated(50, symmetric(4, 0.2), apart=1.0)
    noise_model = replace(audit_with(0.0, symmetric(4, 0.2)), sharpness=1.0)
    q = noise_model.probabilities(live.logits, live.labels)
    p = noise_model.judge(live.logits, live.labels).class_probabilities
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 10])
def test_extreme_logits_and_one_class_alone_give_numbers(classes: int, scale: float, dtype: torch.dtype):
    logits = scale * torch.randn(300, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    for labels in (torch.arange(300) % classes, torch.ones(300, dtype=torch.long), logits.argmax(dim=1)):
        of = Simulated(logits, labels, labels)
        noise_model = calibrated(of, of.remembered(scale))
        for part in calibration_sums_of(of, noise_model.temperature).sums():
            assert bool(torch.isfinite(part).all())
        assert math.isfinite(noise_model.offset)
        assert bool(torch.isfinite(noise_model.transition).all())
        assert noise_model.probabilities(logits, labels).dtype == dtype
        judged = noise_model.judge(logits, labels)
        for found in (noise_model.probabilities(logits, labels), judged.class_probabilities, judged.posterior):
            assert bool(torch.isfinite(found).all())
        assert bool(torch.isfinite(judged.mislabel_odds).all())
        said = suggestion(leave_one_out_of(of, noise_model))
        assert bool(torch.isfinite(said.confidence).all())
        assert bool(torch.isfinite(said.self_confidence).all())


def test_float32_logits_give_the_estimates_of_float64_ones():
    held_out = simulated(2000, paired(10, 0.2))
    live = simulated(4000, paired(10, 0.2), seed=1).remembered(1.0)
    exact = calibrated(held_out, live)
    single = [replace(of, logits=of.logits.float()) for of in (held_out, live)]
    rough = calibrated(single[0], single[1])
    assert rough.temperature == pytest.approx(exact.temperature, rel=1e-4)
    assert rough.offset == pytest.approx(exact.offset, abs=1e-4)
    torch.testing.assert_close(rough.transition, exact.transition, rtol=0, atol=1e-2)
    assert rough.noise.rate == pytest.approx(exact.noise.rate, abs=0.03)


# -- what the others would label a sample ------------------------------------------------------------------


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error over 15 bins (Guo et al. 2017)."""
    bins = (15 * confidence).long().clamp_max(14)
    errors = [
        float((bins == b).sum()) * abs(float(confidence[bins == b].mean() - right[bins == b].double().mean()))
        for b in bins.unique().tolist()
    ]
    return sum(errors) / len(confidence)


@pytest.fixture(scope="module", params=[0.2, 0.4])
def remembered(request: pytest.FixtureRequest) -> tuple[Simulated, NoiseModel]:
    """Live samples with logits half as large as they should be, which remember their labels."""
    noise = symmetric(10, request.param)
    live = simulated(10_000, noise, seed=1).remembered(1.5).cooled(2.0)
    return live, calibrated(simulated(4000, noise).cooled(2.0), live)


def test_a_suggestion_is_never_the_given_label(remembered: tuple[Simulated, NoiseModel]):
    live, noise_model = remembered
    for known in (noise_model, None):
        assert bool((suggestion(leave_one_out_of(live, known)).suggested != live.labels).all())


def test_the_confidence_in_a_suggestion_is_calibrated_where_classes_lie_apart(remembered: tuple[Simulated, NoiseModel]):
    live, noise_model = remembered
    found, plain = suggestion(leave_one_out_of(live, noise_model)), suggestion(leave_one_out_of(live, None))
    assert calibration_error(found.confidence, found.suggested == live.true) < 0.05
    assert calibration_error(plain.confidence, plain.suggested == live.true) > 0.1


@pytest.mark.parametrize("apart", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_the_class_probabilities_are_calibrated_however_alike_the_classes_are(apart: float, rate: float):
    noise = symmetric(10, rate)
    live = simulated(10_000, noise, apart=apart, seed=1).cooled(2.0)
    noise_model = calibrated(simulated(6000, noise, apart=apart).cooled(2.0), live)
    confidence, likeliest = noise_model.judge(live.logits, live.labels).class_probabilities.max(dim=1)
    assert calibration_error(confidence, likeliest == live.true) < 0.05


def test_the_self_confidence_is_the_calibrated_probability_of_the_given_label(remembered: tuple[Simulated, NoiseModel]):
    live, noise_model = remembered
    found = suggestion(leave_one_out_of(live, noise_model))
    q = noise_model.probabilities(live.logits, live.labels)
    torch.testing.assert_close(found.self_confidence, q.gather(1, live.labels[:, None])[:, 0])
    assert torch.equal(found.predicted, q.argmax(dim=1))


def test_among_classes_that_are_equally_likely_the_suggestion_is_the_one_whose_samples_are_labelled_so():
    drawn = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise_model = audit_with(0.0, (drawn / drawn.sum(dim=1, keepdim=True)).numpy())
    level = Simulated(torch.zeros(6, 6).double(), torch.arange(6), torch.arange(6))
    # lowered by nothing: every class is as likely as any other
    found = suggestion(leave_one_out_of(level, replace(noise_model, offset=0.0))).suggested
    for y in range(6):
        others = {c: float(noise_model.transition[c, y]) for c in range(6) if c != y}
        assert int(found[y]) == max(others, key=lambda c: others[c])
