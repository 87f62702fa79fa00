from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare, kstest, truncnorm

from posttrain.errors import LabelRangeError
from posttrain.schema import stream_seed
from posttrain.vision.noise import from_matrix, instance_chances, instance_dependent, pair, symmetric, uniform

IDS = np.arange(20_000)
LABELS = np.random.default_rng(0).integers(0, 10, len(IDS))
PIXELS = np.random.default_rng(1).integers(0, 256, (len(IDS), 1, 4, 4)).astype(np.uint8)
# rows that differ in how much they flip and to what; class 9 is never given to a 0
MATRIX = np.random.default_rng(2).dirichlet(np.ones(10), 10)
MATRIX[0, 9], MATRIX[0, 0] = 0, MATRIX[0, 0] + MATRIX[0, 9]

Flip = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
# each takes labels, ids, images, seed
KINDS: dict[str, Flip] = {
    "symmetric": lambda labels, ids, pixels, seed: symmetric(labels, ids, classes=10, rate=0.3, seed=seed),
    "pair": lambda labels, ids, pixels, seed: pair(labels, ids, classes=10, rate=0.3, seed=seed),
    "matrix": lambda labels, ids, pixels, seed: from_matrix(labels, ids, matrix=MATRIX, seed=seed),
    "instance": lambda labels, ids, pixels, seed: instance_dependent(
        labels, ids, pixels, classes=10, rate=0.3, seed=seed
    ),
}
every_kind = pytest.mark.parametrize("flip", KINDS.values(), ids=KINDS.keys())


def assert_rate(flipped: np.ndarray, rate: float) -> None:
    """A binomial share, within four standard deviations."""
    assert abs(flipped.sum() - rate * len(flipped)) < 4 * math.sqrt(len(flipped) * rate * (1 - rate))


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
    assert_rate(flipped, rate)
    steps = np.bincount((noisy - LABELS)[flipped] % 10, minlength=10)
    assert steps[0] == 0 and chisquare(steps[1:]).pvalue > 1e-3
    assert noisy.min() >= 0 and noisy.max() <= 9


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45])
def test_pair_noise_flips_at_the_rate_asked_for_and_to_the_next_class_alone(rate: float):
    noisy = pair(LABELS, IDS, classes=10, rate=rate, seed=4)
    assert_rate(noisy != LABELS, rate)
    assert set((noisy - LABELS) % 10) == {0, 1}
    assert set(noisy[(noisy != LABELS) & (LABELS == 9)]) == {0}


def test_a_matrix_gives_each_class_the_labels_that_its_row_says():
    noisy = from_matrix(LABELS, IDS, matrix=MATRIX, seed=4)
    for y in range(10):
        given = np.bincount(noisy[y == LABELS], minlength=10)
        possible = MATRIX[y] > 0
        assert given[~possible].sum() == 0
        assert chisquare(given[possible], given.sum() * MATRIX[y][possible]).pvalue > 1e-3


def test_the_matrix_of_symmetric_noise_flips_as_often_and_to_all_alike():
    matrix = np.full((10, 10), 0.3 / 9)
    np.fill_diagonal(matrix, 0.7)
    noisy = from_matrix(LABELS, IDS, matrix=matrix, seed=4)
    assert_rate(noisy != LABELS, 0.3)
    assert chisquare(np.bincount((noisy - LABELS)[noisy != LABELS] % 10, minlength=10)[1:]).pvalue > 1e-3


def test_the_identity_flips_nothing_and_a_permutation_flips_as_it_says():
    order = np.random.default_rng(3).permutation(10)
    assert (from_matrix(LABELS, IDS, matrix=np.eye(10), seed=0) == LABELS).all()
    assert (from_matrix(LABELS, IDS, matrix=np.eye(10)[order], seed=0) == order[LABELS]).all()


def test_a_row_that_is_a_little_off_in_the_last_digits_is_taken():
    matrix = np.full((3, 3), 0.3333333)
    assert set(from_matrix(LABELS % 3, IDS, matrix=matrix, seed=0)) == {0, 1, 2}


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_instance_noise_draws_from_the_chances_of_its_papers_loop(rate: float):
    few, classes, values, seed = 400, 4, 64, 5
    labels, ids = LABELS[:few] % classes, IDS[:few].astype(str)
    pixels = np.random.default_rng(6).integers(0, 256, (few, 64)).astype(np.uint8)
    # Xia et al. 2020, Algorithm 2, line by line; only where the random numbers come from is ours
    generator = torch.Generator().manual_seed(stream_seed("instance noise", seed) % 2**63)
    w = [torch.randn(values, classes, generator=generator).double().numpy() for _ in range(classes)]
    q = truncnorm((0 - rate) / 0.1, (1 - rate) / 0.1, loc=rate, scale=0.1)
    flip_rate = q.ppf(uniform(ids, stream_seed("flip rate", seed)))
    draws = uniform(ids, seed)
    expected, noisy = [], []
    for i in range(few):
        p = (pixels[i] / 255 * 2 - 1) @ w[labels[i]]
        p[labels[i]] = -math.inf
        p = flip_rate[i] * softmax(p)
        p[labels[i]] = 1 - flip_rate[i]
        expected.append(p)
        noisy.append(int(np.searchsorted(np.cumsum(p), draws[i], side="right")))
    common: dict[str, Any] = {"classes": classes, "rate": rate, "seed": seed}
    # the weights are rounded to 2^-20, so that 64 of them are off by 64 * 2^-21 at most
    assert instance_chances(labels, ids, pixels, **common) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-12)
    assert instance_dependent(labels, ids, pixels, **common).tolist() == noisy


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_instance_noise_flips_at_the_mean_of_rates_that_vary_by_a_tenth(rate: float):
    rates = truncnorm((0 - rate) / 0.1, (1 - rate) / 0.1, loc=rate, scale=0.1)
    assert rates.mean() == pytest.approx(rate, abs=0.006)
    assert_rate(instance_dependent(LABELS, IDS, PIXELS, classes=10, rate=rate, seed=4) != LABELS, float(rates.mean()))
    chances = instance_chances(LABELS, IDS, PIXELS, classes=10, rate=rate, seed=4)
    assert kstest(1 - chances[np.arange(len(IDS)), LABELS], rates.cdf).pvalue > 1e-3


def test_samples_with_the_same_image_and_label_flip_to_the_same_favoured_class():
    images = np.random.default_rng(7).integers(0, 256, (20, 1, 28, 28)).astype(np.uint8)
    which = IDS % 20
    chances = instance_chances(which % 2, IDS, images[which], classes=10, rate=0.4, seed=0)
    noisy = instance_dependent(which % 2, IDS, images[which], classes=10, rate=0.4, seed=0)
    flipped = noisy != which % 2
    favoured: dict[int, set[int]] = {0: set(), 1: set()}
    for image in range(20):
        label = image % 2
        mine = which == image
        others = np.delete(chances[mine], label, axis=1)
        assert len(set(others.argmax(axis=1))) == 1
        assert chances[mine, label].std() == pytest.approx(0.1, rel=0.15)  # the rates are each sample's own
        counts = np.bincount(noisy[mine & flipped], minlength=10)
        expected = (others / others.sum(axis=1, keepdims=True))[0]
        assert counts.max() / counts.sum() == pytest.approx(expected.max(), abs=4 * math.sqrt(0.25 / counts.sum()))
        favoured[label].add(int(counts.argmax()))
    # a function of the image: one label's images favour several classes
    assert all(len(classes) >= 3 for classes in favoured.values())


def test_which_labels_instance_noise_flips_to_depends_on_the_true_label_too():
    image = PIXELS[:1].repeat(10, axis=0)
    chances = instance_chances(np.arange(10), IDS[:10], image, classes=10, rate=0.4, seed=0)
    np.fill_diagonal(chances, 0)
    assert len(set(chances.argmax(axis=1))) >= 3


@pytest.mark.parametrize("values", [16, 3 * 32 * 32])
def test_the_chances_of_a_sample_are_bit_by_bit_the_same_in_any_order_and_company(values: int):
    few = 300
    pixels = np.random.default_rng(8).integers(0, 256, (few, values)).astype(np.uint8)

    def chances(rows: Any) -> np.ndarray:
        return instance_chances(LABELS[rows], IDS[rows], pixels[rows], classes=10, rate=0.3, seed=0)

    whole = chances(np.arange(few))
    order = np.random.default_rng(1).permutation(few)
    assert (chances(order) == whole[order]).all()
    for size in (1, 7, 64):
        blocks = [chances(np.arange(start, min(start + size, few))) for start in range(0, few, size)]
        assert (np.concatenate(blocks) == whole).all()


def test_images_that_are_not_multiplied_all_at_once_get_the_same_chances(monkeypatch: pytest.MonkeyPatch):
    whole = instance_chances(LABELS, IDS, PIXELS, classes=10, rate=0.3, seed=0)
    monkeypatch.setattr("posttrain.vision.noise._SUM_VALUES", 100)
    assert (instance_chances(LABELS, IDS, PIXELS, classes=10, rate=0.3, seed=0) == whole).all()


@every_kind
def test_noise_does_not_depend_on_the_order_of_the_samples_or_their_company(flip: Flip):
    order = np.random.default_rng(1).permutation(len(IDS))
    noisy = flip(LABELS, IDS, PIXELS, 0)
    assert (flip(LABELS[order], IDS[order], PIXELS[order], 0) == noisy[order]).all()
    assert (flip(LABELS[70:77], IDS[70:77], PIXELS[70:77], 0) == noisy[70:77]).all()
    assert flip(LABELS[:0], IDS[:0], PIXELS[:0], 0).shape == (0,)


@every_kind
def test_flips_of_different_seeds_are_not_related(flip: Flip):
    for y in range(10):
        mine = np.flatnonzero(y == LABELS)
        one, two = (flip(LABELS, IDS, PIXELS, seed)[mine] != y for seed in (0, 1))
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(len(mine))


@pytest.mark.parametrize("kind", [symmetric, pair])
def test_a_higher_rate_flips_the_same_samples_and_more(kind: Callable[..., np.ndarray]):
    low, high = (kind(LABELS, IDS, classes=10, rate=rate, seed=0) != LABELS for rate in (0.1, 0.3))
    assert (low <= high).all() and low.sum() < high.sum()


@pytest.mark.parametrize("kind", [symmetric, pair])
def test_the_extremes_flip_nothing_and_everything(kind: Callable[..., np.ndarray]):
    assert (kind(LABELS, IDS, classes=10, rate=0.0, seed=0) == LABELS).all()
    assert (kind(LABELS, IDS, classes=10, rate=1.0, seed=0) != LABELS).all()
    binary = LABELS % 2
    assert (kind(binary, IDS, classes=2, rate=1.0, seed=0) == 1 - binary).all()


def test_instance_noise_at_rate_0_flips_nothing():
    assert (instance_dependent(LABELS, IDS, PIXELS, classes=10, rate=0.0, seed=0) == LABELS).all()


@pytest.mark.parametrize("rate, classes", [(0.0, 10), (0.4, 2), (0.4, 10), (1.0, 10)])
def test_the_chances_of_every_sample_are_a_distribution(rate: float, classes: int):
    chances = instance_chances(LABELS % classes, IDS, PIXELS, classes=classes, rate=rate, seed=0)
    assert chances.min() >= 0
    assert chances.sum(axis=1) == pytest.approx(np.ones(len(IDS)))


@every_kind
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_the_given_labels_stay_as_they_are_and_so_does_their_dtype(flip: Flip, dtype: type):
    labels = LABELS.astype(dtype)
    noisy = flip(labels, IDS, PIXELS, 0)
    assert noisy.dtype == dtype and (labels == LABELS).all()
    assert (noisy == flip(LABELS, IDS, PIXELS, 0)).all()


@every_kind
@pytest.mark.parametrize("wrong", [10, -1])
def test_a_label_outside_the_classes_is_named_with_its_sample(flip: Flip, wrong: int):
    with pytest.raises(LabelRangeError, match=f"label {wrong} at sample_id 40 lies outside the 10 classes"):
        flip(np.array([0, wrong]), np.array([39, 40]), PIXELS[:2], 0)


@pytest.mark.parametrize("rate, classes", [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.1, 1)])
def test_a_rate_that_makes_no_sense_is_refused(rate: float, classes: int):
    one = np.zeros(1, int)
    for kind in (symmetric, pair):
        with pytest.raises(ValueError, match=f"rate {rate} with {classes} classes"):
            kind(one, one, classes=classes, rate=rate, seed=0)
    with pytest.raises(ValueError, match=f"rate {rate} with {classes} classes"):
        instance_dependent(one, one, PIXELS[:1], classes=classes, rate=rate, seed=0)


@pytest.mark.parametrize(
    "matrix, message",
    [
        ([[1.0, 0.0]], r"shape \(1, 2\); it has to be square"),
        ([0.5, 0.5], r"shape \(2,\); it has to be square"),
        ([[1.0, 0.0], [0.5, 0.4]], "row 1 .* is no distribution: its smallest value is 0.4 and its sum 0.9"),
        ([[1.5, -0.5], [0.0, 1.0]], "row 0 .* is no distribution: its smallest value is -0.5 and its sum 1"),
        ([[1.0, 0.0], [math.nan, 1.0]], "row 1 .* is no distribution"),
    ],
)
def test_a_matrix_that_is_none_of_transitions_is_refused_with_its_row(matrix: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_matrix(np.zeros(1, int), np.zeros(1, int), matrix=np.array(matrix), seed=0)


@pytest.mark.parametrize("pixels", [PIXELS[:3], PIXELS[:2] / 255])
def test_pixels_that_are_not_one_uint8_image_per_label_are_refused(pixels: np.ndarray):
    with pytest.raises(ValueError, match=r"for 2 labels; one uint8 image each is needed"):
        instance_dependent(LABELS[:2], IDS[:2], pixels, classes=10, rate=0.2, seed=0)
