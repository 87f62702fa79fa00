"""Temperature, memorisation offset and calibration sums, against simulations and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from simulations import (
    Simulated,
    calibrated,
    calibration_sums_of,
    corrected,
    lowered,
    simulated,
    symmetric,
    temperature_of,
)

from posttrain.influence import calibration
from posttrain.influence.calibration import CalibrationSums, calibration_sums, temperature_moments
from posttrain.influence.noise_model import UNKNOWN, Prior, estimate_noise_model

GRID = np.linspace(0, 16, 257)


@pytest.mark.parametrize("right_at", [0.1, 0.6, 1.0, 3.0, 15.0])
def test_the_temperature_is_where_scipy_finds_the_lowest_cross_entropy(right_at: float):
    validation = simulated(2000, symmetric(5, 0.2), apart=1.5).cooled(right_at)

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(math.exp(log_t) * validation.logits, validation.labels))

    known = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-9})
    found = temperature_of(validation.logits, validation.labels)
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
    validation = simulated(300, symmetric(4, 0.2), apart=1.0)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(t * validation.logits, validation.labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, t, create_graph=True)
    (curve,) = torch.autograd.grad(slope, t)
    found = temperature_moments(validation.logits, validation.labels, torch.eye(4).double(), t.detach())
    assert [float(part) for part in found] == pytest.approx([300, slope.item(), curve.item()], rel=1e-9)


def test_the_self_confidence_is_the_given_labels_probability_after_its_logit_was_lowered():
    live = simulated(200, symmetric(6, 0.3), apart=1.0)
    found = calibration_sums(live.logits, live.labels, 0.7)[1]
    for k in (0, 1, 16, 100, 256):
        p = lowered(0.7 * live.logits, live.labels, GRID[k]).softmax(dim=1)
        assert float(found[k]) == pytest.approx(float(p.gather(1, live.labels[:, None]).sum()), rel=1e-9)


@pytest.mark.parametrize("offset", [0.3, 1.0, 2.72, 6.0, 12.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_an_offset_that_was_added_to_the_given_labels_is_found_again(offset: float, temperature: float):
    validation = simulated(4000, symmetric(10, 0.2), apart=1.5)
    # in units of the calibrated logits
    live, seen = validation.memorised(offset).cooled(temperature), validation.cooled(temperature)
    found = estimate_noise_model(
        calibration_sums_of(seen, temperature), calibration_sums_of(live, temperature), temperature
    )
    assert found.memorisation_offset == pytest.approx(offset, abs=0.05)


def test_an_offset_is_found_on_other_samples_than_the_validation_samples():
    errors = []
    for seed in range(10):
        validation = simulated(4000, symmetric(10, 0.2), apart=1.5, seed=seed)
        live = simulated(8000, symmetric(10, 0.2), apart=1.5, seed=100 + seed).memorised(1.0)
        errors.append(calibrated(validation, live).memorisation_offset - 1.0)
    assert abs(float(np.mean(errors))) < 0.05


def test_there_is_no_offset_where_none_was_added_or_the_live_labels_are_less_probable():
    validation = simulated(4000, symmetric(10, 0.2), apart=1.5)
    assert calibrated(validation, validation).memorisation_offset == 0.0
    assert calibrated(validation, validation.memorised(-1.0)).memorisation_offset == 0.0


def test_without_the_offset_live_labels_are_as_probable_as_validation_labels():
    validation = simulated(3000, symmetric(10, 0.2), apart=1.5)
    live = simulated(3000, symmetric(10, 0.2), apart=1.5, seed=5).memorised(2.0)
    found = calibrated(validation, live)
    q = found.probabilities(live.logits, live.labels).gather(1, live.labels[:, None]).mean()
    p = (found.temperature * validation.logits).softmax(dim=1).gather(1, validation.labels[:, None]).mean()
    assert float(q) == pytest.approx(float(p), abs=1e-4)


def test_an_offset_beyond_all_that_are_tried_is_the_largest_of_them():
    validation = simulated(500, symmetric(3, 0.4), apart=0.5)
    assert (
        estimate_noise_model(
            calibration_sums_of(validation), calibration_sums_of(validation.memorised(40.0)), 1.0
        ).memorisation_offset
        == 16.0
    )


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_calibration_sums_add_up_over_blocks(size: int):
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


def test_the_calibration_sums_of_features_are_those_of_their_logits():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    labels = torch.arange(50) % 4
    found = calibration.calibration_sums_of_block(features, labels, weights, torch.tensor(1.3, dtype=torch.float64))
    for part, known in zip(found, calibration_sums(features @ weights.T, labels, 1.3), strict=True):
        torch.testing.assert_close(part, known, rtol=1e-12, atol=0)


def test_removing_wrong_labels_is_not_taken_for_memorisation():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 6000)
    logits = torch.from_numpy(3.0 * np.eye(3)[truth] + draw.normal(size=(6000, 3)))
    wrong = draw.random(6000) < 0.3
    labels = torch.from_numpy(np.where(wrong, (truth + 1) % 3, truth))
    validation = CalibrationSums(*calibration_sums(logits[:3000], labels[:3000], 1.0))
    kept = torch.from_numpy(~wrong[3000:])
    cleaned = CalibrationSums(*calibration_sums(logits[3000:][kept], labels[3000:][kept], 1.0))
    gone = int((~kept).sum())
    assert estimate_noise_model(validation, cleaned, 1.0).memorisation_offset > 1.0
    assert estimate_noise_model(validation, cleaned, 1.0, removed=gone).memorisation_offset < 0.1
    # what the removed labels still had for them is the rest
    gone_self_confidence = float(logits[3000:][~kept].softmax(dim=1).gather(1, labels[3000:][~kept][:, None]).sum())
    whole = estimate_noise_model(
        validation, CalibrationSums(*calibration_sums(logits[3000:], labels[3000:], 1.0)), 1.0
    ).memorisation_offset
    again = estimate_noise_model(
        validation, cleaned, 1.0, removed=gone, removed_self_confidence=gone_self_confidence
    ).memorisation_offset
    assert again == pytest.approx(whole, abs=0.02)


def test_wrong_validation_labels_found_once_hold_where_the_most_confident_samples_show_none():
    """As in later rounds of a small set: the boundary has changed, and of 50 samples none is wrong by chance."""
    rate, memory = 0.2, 1.0
    validation = simulated(3000, symmetric(10, rate), apart=4.0, seed=1)
    live = simulated(3000, symmetric(10, rate), apart=4.0, seed=2).memorised(memory)
    temperature = temperature_of(validation.logits, validation.labels)
    first = estimate_noise_model(
        calibration_sums_of(validation, temperature), calibration_sums_of(live, temperature), temperature
    )
    gone = live.wrong
    own = first.probabilities(live.logits[gone], live.labels[gone]).gather(1, live.labels[gone][:, None])
    rest = Simulated(live.logits[~gone], live.labels[~gone], live.true[~gone])
    shown = calibration_sums_of(validation, temperature)
    hidden = replace(shown, disagreeing=torch.zeros_like(shown.disagreeing))
    removed = {"removed": int(gone.sum()), "removed_self_confidence": float(own.sum())}
    found = {
        name: estimate_noise_model(of, calibration_sums_of(rest, temperature), temperature, **removed, prior=prior)
        for name, of, prior in (
            ("shown", shown, UNKNOWN),
            ("forgotten", hidden, UNKNOWN),
            ("held", hidden, Prior(validation_noise_rate=first.validation_noise_rate)),
            ("of a round", hidden, first.prior),
        )
    }
    assert first.validation_noise_rate == pytest.approx(rate, abs=0.03)
    assert (
        found["held"].memorisation_offset
        == found["shown"].memorisation_offset
        == pytest.approx(memory * temperature, abs=0.15)
    )
    assert found["held"].validation_noise_rate == first.validation_noise_rate
    assert found["of a round"].memorisation_offset == found["held"].memorisation_offset
    assert (found["of a round"].validation_noise_rate, found["of a round"].live_noise_rate) == (
        first.validation_noise_rate,
        first.live_noise_rate,
    )
    left = (3000 * first.live_noise_rate - int(gone.sum())) / len(rest.labels)
    assert found["of a round"].remaining_noise_rate == pytest.approx(max(0.0, left))
    assert found["forgotten"].memorisation_offset > found["held"].memorisation_offset + 0.5


@pytest.mark.parametrize(("rate", "memory"), [(0.3, 6.0), (0.4, 4.0)])
def test_memory_is_known_through_all_rounds_where_the_validation_labels_are_right(rate: float, memory: float):
    validation = corrected(1500, rate, seed=1001)
    live = simulated(3000, symmetric(10, rate), apart=4.0, seed=5001).memorised(memory)
    first = calibrated(validation, live)
    wrong = torch.nonzero(live.wrong)[:, 0]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        gone = wrong[: int(share * len(wrong))]
        own = first.probabilities(live.logits[gone], live.labels[gone]).gather(1, live.labels[gone][:, None])
        kept = torch.ones(len(live.labels), dtype=torch.bool)
        kept[gone] = False
        rest = Simulated(live.logits[kept], live.labels[kept], live.true[kept])
        temperature = temperature_of(validation.logits, validation.labels)
        sums = calibration_sums_of(validation, temperature), calibration_sums_of(rest, temperature)
        found = estimate_noise_model(*sums, temperature, removed=len(gone), removed_self_confidence=float(own.sum()))
        assert memory / 2 < found.memorisation_offset / temperature < 1.2 * memory
        candidates = found.posterior(rest.logits, rest.labels).mislabel_odds > 0
        assert int((candidates & rest.wrong).sum()) >= 0.95 * int(rest.wrong.sum())
        assert int((candidates & ~rest.wrong).sum()) <= 0.005 * len(rest.labels)


@pytest.mark.parametrize("classes", [3, 5])
def test_the_top2_gaps_equal_a_plain_loop(classes: int):
    of = simulated(200, symmetric(classes, 0.3))
    gaps, gaps_if_wrong = np.zeros(4096), np.zeros(4096)
    for logits, label in zip((1.5 * of.logits).tolist(), of.labels.tolist(), strict=True):
        for given in range(classes):
            largest = sorted((z for c, z in enumerate(logits) if c != given), reverse=True)
            at = min(int((largest[0] - largest[1]) * 256), 4095)
            if given == label:
                gaps[at] += 1
            else:
                gaps_if_wrong[at] += 1 / (classes - 1)
    found = calibration_sums_of(of, 1.5)
    assert found.top2_gaps.tolist() == gaps.tolist()
    assert found.top2_gaps_if_wrong.numpy() == pytest.approx(gaps_if_wrong)


def test_of_two_classes_no_top2_gap_is_known():
    found = calibration_sums_of(simulated(200, symmetric(2, 0.3)))
    assert float(found.top2_gaps.sum() + found.top2_gaps_if_wrong.sum()) == 0
