"""The figures of the detection benchmark against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.benchmarks.detection_findings import Removed, calibration_error, ranking, removed


def test_average_precision_is_the_mean_over_the_wrong_labels_of_the_precision_down_to_each():
    draw = np.random.default_rng(0)
    wrong = draw.random(300) < 0.3
    scores = wrong + draw.normal(size=300)
    found = ranking("peer", "any", scores, wrong, seconds=1.0, passes=2.0)
    hits, precisions = 0, []
    for rank, at in enumerate(np.argsort(-scores), start=1):
        if wrong[at]:
            hits += 1
            precisions.append(hits / rank)
    assert found.average_precision == pytest.approx(np.mean(precisions))
    ahead = [a > b for a in scores[wrong] for b in scores[~wrong]]
    assert found.auroc == pytest.approx(np.mean(ahead))


def test_precision_at_the_noise_rate_looks_at_as_many_as_are_wrong():
    # three wrong; of the three highest, two are
    wrong = np.array([True, False, True, False, False, True])
    scores = np.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    found = ranking("peer", "any", scores, wrong, seconds=0.0, passes=0.0)
    assert found.precision_at_noise == pytest.approx(2 / 3)


def test_scores_that_are_no_numbers_are_refused():
    wrong = np.array([True, False, True])
    with pytest.raises(ValueError, match=r"tracin: \(3,\) scores for 3 samples, 1 of them not finite"):
        ranking("peer", "tracin", np.array([0.1, np.nan, 0.3]), wrong, seconds=0.0, passes=0.0)


def test_what_is_removed_is_counted_against_what_is_wrong():
    taken = np.array([True, True, True, False, False, False, False, False])
    wrong = np.array([True, True, False, True, True, False, False, False])
    assert removed(taken, wrong) == Removed(3 / 8, 2 / 3, 2 / 4)
    nothing = np.zeros(8, bool)
    assert removed(nothing, wrong) == Removed(0.0, None, 0.0)
    assert removed(taken, nothing) == Removed(3 / 8, 0.0, None)


def test_the_calibration_error_is_the_weighted_gap_of_each_bin():
    draw = np.random.default_rng(1)
    confidence = draw.random(500)
    right = draw.random(500) < confidence**2
    expected = 0.0
    for lower in range(15):
        inside = [i for i in range(500) if lower / 15 < confidence[i] <= (lower + 1) / 15]
        if inside:
            gap = np.mean(confidence[inside]) - np.mean(right[inside])
            expected += len(inside) / 500 * abs(gap)
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0
    assert calibration_error(np.empty(0), np.empty(0, bool)) is None
