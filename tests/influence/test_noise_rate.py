"""The share of wrong labels, against simulations in which it is known, and against scipy."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from simulations import (
    calibrated,
    calibration_sums_of,
    corrected,
    simulated,
    sums_of_bins,
    symmetric,
)
from torch import Tensor

from posttrain.influence.calibration import CalibrationSums, calibration_sums
from posttrain.influence.noise_model import estimate_noise_model
from posttrain.influence.noise_rate import CLEAN_RATE, NoiseEstimate, agrees_by_chance


def test_of_fewer_validation_samples_than_are_counted_nothing_is_known():
    live = calibration_sums_of(simulated(2000, symmetric(5, 0.4), seed=1))
    for number, doubt in ((49, "few"), (50, None)):
        noise_model = estimate_noise_model(calibration_sums_of(simulated(number, symmetric(5, 0.4))), live, 1.0)
        assert noise_model.noise.doubt == doubt and (noise_model.noise.most == 0.0) == (doubt is not None)
        # where the user says how many may go, the odds are what they would be without the doubt
        assert noise_model.live_noise_rate > 0.25


@pytest.mark.parametrize(
    ("sizes", "doubt"),
    [
        ([3] * 100, "sparse"),
        ([4] * 100, "sparse"),
        ([5] * 100, None),
        ([20] * 100, None),
        ([100] * 10, None),
        # most classes are small, and most samples are not of them
        ([3] * 100 + [50] * 10, None),
        ([3] * 100 + [29] * 10, "sparse"),
    ],
)
def test_classes_of_a_few_training_samples_each_tell_nothing_of_their_labels(sizes: list[int], doubt: str | None):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    logits = 5 * torch.nn.functional.one_hot((labels + (torch.arange(len(labels)) % 5 == 0)) % len(sizes)).double()
    live = CalibrationSums(*calibration_sums(logits, labels, 1.0))
    # a few validation samples of each class are enough
    few = torch.arange(len(sizes)).repeat(6)
    validation = CalibrationSums(*calibration_sums(5 * torch.nn.functional.one_hot(few).double(), few, 1.0))
    noise = estimate_noise_model(validation, live, 1.0).noise
    assert noise.doubt == doubt and (noise.most == 0.0 or doubt is None)


@pytest.mark.parametrize("by", [0, 1])
def test_where_validation_labels_mean_other_classes_nothing_is_found(by: int):
    validation, live = simulated(300, symmetric(5, 0.0)), simulated(2000, symmetric(5, 0.0), seed=1)
    other = replace(validation, labels=(validation.labels + by) % 5)
    found = estimate_noise_model(calibration_sums_of(other), calibration_sums_of(live), 1.0)
    assert found.noise.doubt == ("chance" if by else None)
    assert found.noise.most == 0.0
    # none of the most confident agrees: without the doubt all labels would be wrong
    assert found.noise.rate > 0.9 if by else not found.noise.found


@pytest.mark.parametrize("sizes", [None, np.array([12.0, 1.0, 1.0, 1.0, 1.0])])
def test_random_labels_are_not_taken_for_wrong_ones_where_the_boundary_guesses(sizes: np.ndarray | None):
    drawn = np.random.default_rng(0)
    doubts = []
    for seed in range(20):
        validation, live = (simulated(300, symmetric(5, 0.0), seed=2 * seed + k, sizes=sizes) for k in (0, 1))
        guessing = [
            replace(of, logits=of.logits[torch.from_numpy(drawn.permutation(300))]) for of in (validation, live)
        ]
        doubts.append(
            estimate_noise_model(calibration_sums_of(guessing[0]), calibration_sums_of(guessing[1]), 1.0).noise.doubt
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
    doubts = [estimate_noise_model(calibration_sums_of(of), live, 1.0).noise.doubt for of in right]
    assert doubts.count("chance") <= 2


def doubt_of(predicted: Tensor, labels: Tensor, classes: int) -> str | None:
    """What is doubted where validation samples are predicted and labelled so."""
    logits = 5 * torch.nn.functional.one_hot(predicted, classes).double()
    return estimate_noise_model(CalibrationSums(*calibration_sums(logits, labels, 1.0)), LIVE[classes], 1.0).noise.doubt


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
    for _ in range(200):
        n = int(drawn.integers(50, 400))
        predicted = torch.zeros(n, dtype=torch.long)
        predicted[:others] = torch.from_numpy(drawn.integers(1, classes, others))
        labels = torch.from_numpy(drawn.choice(classes, n, p=drawn.dirichlet(np.full(classes, 1.0))))
        doubts.append(doubt_of(predicted, labels, classes))
    # 2 are to be expected at most
    assert doubts.count(None) <= 4


@pytest.mark.parametrize("classes", [10, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
@pytest.mark.parametrize("even", [0.5, pytest.param(5.0, marks=pytest.mark.long)])
def test_predictions_by_chance_pass_for_more_in_one_of_a_hundred_cases(classes: int, even: float):
    drawn = np.random.default_rng(0)
    doubts = []
    for _ in range(200):
        n = int(drawn.integers(50, 400))
        guesses, sizes = (drawn.dirichlet(np.full(classes, even)) for _ in range(2))
        predicted, labels = (torch.from_numpy(drawn.choice(classes, n, p=p)) for p in (guesses, sizes))
        doubts.append(doubt_of(predicted, labels, classes))
    assert doubts.count(None) <= 4


def test_the_moments_of_agreement_are_those_over_all_orders():
    """By the limit: with the quantile in plain floats from all 5,040 orders of seven labels."""
    given, predicted = [3, 2, 2], [4, 2, 1]
    labels, guesses = np.repeat(range(3), given), np.repeat(range(3), predicted)
    agreeing = np.array([(np.array(order) == guesses).sum() for order in permutations(labels)])
    spread, skewed = agreeing.std(), ((agreeing - agreeing.mean()) ** 3).mean()
    z = 2.326
    limit = agreeing.mean() + z * spread + 0.5 + max(0.0, (z * z - 1) / 6 * skewed / spread**2)
    for k in range(8):
        assert agrees_by_chance(k, 7, given, predicted) == (k <= limit)


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
            assert (estimate_noise_model(of, live, 1.0).noise.doubt == "chance") == (share < limit)


@pytest.mark.parametrize(("disagreeing", "counted"), [(0, 50), (1, 50), (7, 50), (50, 50), (400, 2000), (1, 1)])
def test_the_interval_is_the_exact_one_of_scipy(disagreeing: int, counted: int):
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    confident[-1], wrong[-1] = counted, disagreeing
    noise = estimate_noise_model(sums_of_bins(confident, wrong), sums_of_bins(confident, wrong), 1.0).noise
    known = binomtest(disagreeing, counted).proportion_ci(confidence_level=0.95, method="exact")
    assert (noise.disagreeing, noise.counted) == (disagreeing, counted)
    assert (noise.low, noise.high) == pytest.approx((known.low if noise.found else 0.0, known.high), abs=1e-12)


@pytest.mark.parametrize(
    ("disagreeing", "counted"), [(0, 50), (1, 50), (2, 50), (3, 50), (4, 50), (20, 2000), (60, 2000)]
)
@pytest.mark.parametrize("side", ["validation", "live"])
def test_noise_is_found_where_scipy_says_that_there_is_more_than_in_a_clean_set(
    disagreeing: int, counted: int, side: str
):
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    # many others without an error: the boundary is a good one
    confident[-1], wrong[-1], confident[0] = counted, disagreeing, 40 * counted
    shown, clean = sums_of_bins(confident, wrong), sums_of_bins(confident, torch.zeros_like(wrong))
    noise = estimate_noise_model(*((shown, clean) if side == "validation" else (clean, shown)), 1.0).noise
    # the one-sided test at the 5 % level
    known = binomtest(disagreeing, counted, CLEAN_RATE, alternative="greater")
    assert noise.found == (known.pvalue < 0.05)
    assert noise.source == ("live" if noise.found and side == "live" else "validation")
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
    noise = estimate_noise_model(of, of, 1.0).noise
    assert (noise.counted, noise.disagreeing) == (wanted, int((labels != likeliest)[highest].sum()))


@pytest.mark.parametrize(("per_bin", "wanted"), [(1, 81), (30, 2000)])
def test_of_a_bin_all_count_or_none(per_bin: int, wanted: int):
    confident = torch.full((4096,), float(per_bin), dtype=torch.float64)
    bins = math.ceil(wanted / per_bin)
    wrong = (torch.arange(4096) % 3 == 0).double()
    wrong[:-bins] = per_bin
    noise = estimate_noise_model(sums_of_bins(confident, wrong), sums_of_bins(confident, wrong), 1.0).noise
    assert (noise.counted, noise.disagreeing) == (bins * per_bin, int(wrong[-bins:].sum()))


def test_as_many_count_as_disagree_alike():
    confident = torch.full((4096,), 1.0, dtype=torch.float64)
    even = (torch.arange(4096) % 20 == 0).double()
    # 81, doubled to 1,296; twice that would be more than half of all
    noise = estimate_noise_model(sums_of_bins(confident, even), sums_of_bins(confident, even), 1.0).noise
    assert noise.counted == 1296 and noise.rate == pytest.approx(0.05, abs=0.005) and noise.found
    # from the 324th on, four times as many disagree: what is wrong there is the boundary
    steep = even.clone()
    steep[: 4096 - 324] = (torch.arange(4096 - 324) % 5 == 0).double()
    noise = estimate_noise_model(sums_of_bins(confident, steep), sums_of_bins(confident, steep), 1.0).noise
    assert noise.counted == 324 and noise.disagreeing == int(even[-324:].sum())


def test_a_boundary_that_errs_often_has_to_disagree_more_before_labels_are_called_wrong():
    confident, wrong = torch.zeros(2, 4096, dtype=torch.float64)
    confident[-1], wrong[-1], confident[0] = 100, 6, 900
    # 6 of 100 are more than 1 % by the one-sided test, but not more than a tenth of 45 %
    assert binomtest(6, 100, CLEAN_RATE, alternative="greater").pvalue < 0.05
    assert binomtest(6, 100, 0.0456, alternative="greater").pvalue > 0.05
    for missed, expected in ((10, True), (450, False)):
        wrong[0] = missed
        assert (
            estimate_noise_model(sums_of_bins(confident, wrong), sums_of_bins(confident, wrong), 1.0).noise.found
            == expected
        )


def estimates(rate: float, seeds: int, *, classes: int = 10) -> list[NoiseEstimate]:
    found = []
    for seed in range(seeds):
        validation = simulated(1500, symmetric(classes, rate), apart=4.0, seed=1000 + seed)
        live = simulated(1500, symmetric(classes, rate), apart=4.0, seed=5000 + seed).memorised(0.5)
        found.append(calibrated(validation, live).noise)
    return found


def test_a_clean_set_is_left_alone():
    found = estimates(0.0, 60)
    assert sum(noise.found for noise in found) <= 3
    assert all((noise.rate, noise.most) == (0.0, 0.0) for noise in found if not noise.found)


@pytest.mark.parametrize(
    ("rate", "classes"), [(0.2, 2), *(pytest.param(rate, 10, marks=pytest.mark.long) for rate in (0.2, 0.4))]
)
def test_the_estimated_share_of_wrong_labels_covers_the_true_one(rate: float, classes: int):
    found = estimates(rate, 40, classes=classes)
    assert sum(noise.found for noise in found) >= 38
    assert sum(noise.low <= rate <= noise.high for noise in found) >= 36
    assert float(np.mean([noise.rate for noise in found])) == pytest.approx(rate, abs=0.02)


def test_where_the_validation_labels_are_right_the_live_ones_tell_the_share_of_wrong_labels():
    covered = 0
    for seed in range(10):
        noise = calibrated(
            corrected(1500, 0.3, seed=1000 + seed),
            simulated(1500, symmetric(10, 0.3), apart=4.0, seed=5000 + seed),
        ).noise
        assert noise.found and noise.source == "live" and noise.most > 0.25
        covered += noise.low <= 0.3 <= noise.high
    assert covered >= 8


@pytest.mark.long
def test_where_both_are_equally_noisy_the_validation_labels_tell_the_share():
    # two intervals of 95 % that do not meet are rarer than one difference in twenty
    assert sum(noise.source != "validation" for noise in estimates(0.2, 100)) <= 3


@pytest.mark.parametrize(("offset", "rate"), [(0.0, 0.3), (3.0, 0.3), (8.0, 0.3), (8.0, 0.1)])
def test_where_the_validation_labels_are_right_memorised_wrong_labels_are_found_by_comparison(
    offset: float, rate: float
):
    covered = 0
    for seed in range(10):
        right = corrected(1500, rate, seed=1000 + seed)
        noise = calibrated(
            right, simulated(1500, symmetric(10, rate), apart=4.0, seed=5000 + seed).memorised(offset)
        ).noise
        assert noise.found and noise.most > rate
        assert (noise.source == "comparison") == (offset > 1)
        covered += noise.low <= rate <= noise.high
    assert covered >= 8


def test_memory_of_right_labels_alone_is_not_taken_for_wrong_ones():
    found = 0
    for seed in range(30):
        validation = simulated(300, symmetric(10, 0.0), apart=3.0, seed=1000 + seed)
        live = simulated(1500, symmetric(10, 0.0), apart=3.0, seed=5000 + seed).memorised(8.0)
        found += calibrated(validation, live).noise.found
    assert found <= 2


def test_the_most_that_may_be_removed_is_a_bound_that_is_passed_once_in_a_thousand():
    for noise in estimates(0.2, 5):
        # with so many wrong labels, as few among those counted have a chance of 0.001
        known = binomtest(noise.disagreeing, noise.counted, noise.most, alternative="less")
        assert known.pvalue == pytest.approx(0.001)
    assert all(noise.most == 0.0 for noise in estimates(0.0, 5) if not noise.found)
