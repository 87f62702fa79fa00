from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from posttrain.errors import LabelRangeError
from posttrain.vision.noise import symmetric, uniform

IDS = np.arange(20_000)
LABELS = np.random.default_rng(0).integers(0, 10, len(IDS))


def test_consecutive_ids_draw_uniformly():
    for seed in (0, 1, -5, 2**70):
        drawn = uniform(IDS, seed)
        assert drawn.min() >= 0 and drawn.max() < 1
        assert kstest(drawn, "uniform").pvalue > 1e-3


def test_draws_of_different_seeds_are_not_related():
    bound = 4 / math.sqrt(len(IDS))
    assert abs(np.corrcoef(uniform(IDS, 0), uniform(IDS, 1))[0, 1]) < bound
    assert abs(np.corrcoef(uniform(IDS, 0)[1:], uniform(IDS, 1)[:-1])[0, 1]) < bound


@pytest.mark.parametrize("ids", [IDS, IDS.astype(str), np.array([f"cat/{i}.png" for i in IDS], object)])
def test_the_draw_of_an_id_does_not_depend_on_order_or_company(ids: np.ndarray):
    order = np.random.default_rng(1).permutation(len(ids))
    drawn = uniform(ids, 3)
    assert (uniform(ids[order], 3) == drawn[order]).all()
    assert uniform(ids[77:78], 3) == drawn[77]


def test_the_width_of_an_id_does_not_matter():
    assert (uniform(np.arange(-5, 5, dtype=np.int32), 0) == uniform(np.arange(-5, 5), 0)).all()
    assert (uniform(np.array(["a", "bb"], "U9"), 0) == uniform(np.array(["a", "bb"], object), 0)).all()


def test_the_draws_are_the_same_in_every_version():
    assert uniform(np.array([0, 1, 40312]), 7) == pytest.approx(
        [0.7215081806049702, 0.9509972403324563, 0.16436084552798924], abs=0
    )
    assert uniform(np.array(["a/1.png", ""]), 7) == pytest.approx([0.5706923725044664, 0.2640020976892503], abs=0)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_labels_flip_at_the_rate_asked_for_and_to_all_other_classes_alike(rate: float):
    noisy = symmetric(LABELS, IDS, classes=10, rate=rate, seed=4)
    flipped = noisy != LABELS
    assert abs(flipped.sum() - rate * len(IDS)) < 4 * math.sqrt(len(IDS) * rate * (1 - rate))
    steps = np.bincount((noisy - LABELS)[flipped] % 10, minlength=10)
    assert steps[0] == 0 and chisquare(steps[1:]).pvalue > 1e-3
    assert noisy.min() >= 0 and noisy.max() <= 9


def test_noise_does_not_depend_on_the_order_of_the_samples():
    order = np.random.default_rng(1).permutation(len(IDS))
    noisy = symmetric(LABELS, IDS, classes=10, rate=0.3, seed=0)
    assert (symmetric(LABELS[order], IDS[order], classes=10, rate=0.3, seed=0) == noisy[order]).all()


def test_another_seed_flips_other_labels():
    one, two = (symmetric(LABELS, IDS, classes=10, rate=0.2, seed=seed) != LABELS for seed in (0, 1))
    assert abs((one & two).mean() - 0.04) < 0.006


def test_a_higher_rate_flips_the_same_samples_and_more():
    low, high = (symmetric(LABELS, IDS, classes=10, rate=rate, seed=0) != LABELS for rate in (0.1, 0.3))
    assert (low <= high).all() and low.sum() < high.sum()


def test_the_extremes_flip_nothing_and_everything():
    assert (symmetric(LABELS, IDS, classes=10, rate=0.0, seed=0) == LABELS).all()
    assert (symmetric(LABELS, IDS, classes=10, rate=1.0, seed=0) != LABELS).all()
    binary = LABELS % 2
    assert (symmetric(binary, IDS, classes=2, rate=1.0, seed=0) == 1 - binary).all()


def test_the_given_labels_stay_as_they_are_and_so_does_their_dtype():
    labels = LABELS.astype(np.int32)
    noisy = symmetric(labels, IDS, classes=10, rate=0.5, seed=0)
    assert noisy.dtype == np.int32 and (labels == LABELS).all()


def test_a_label_outside_the_classes_is_named_with_its_sample():
    with pytest.raises(LabelRangeError, match="label 9 at sample_id 40 lies outside the 3 classes"):
        symmetric(np.array([0, 9]), np.array([39, 40]), classes=3, rate=0.1, seed=0)


@pytest.mark.parametrize("rate, classes", [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.1, 1)])
def test_a_rate_that_makes_no_sense_is_refused(rate: float, classes: int):
    with pytest.raises(ValueError, match=f"rate {rate} with {classes} classes"):
        symmetric(np.zeros(1, int), np.zeros(1, int), classes=classes, rate=rate, seed=0)
