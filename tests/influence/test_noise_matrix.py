"""The noise transition matrix against plain loops, and against simulations in which it is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from posttrain.influence import noise_matrix
from posttrain.influence.calibration import CalibrationSums, calibration_sums
from posttrain.influence.noise_model import (
    UNKNOWN,
    NoiseModel,
    PosteriorSums,
    Prior,
    estimate_noise_model,
    posterior_sums,
    with_transition,
)
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.probe import in_memory


def symmetric(classes: int, rate: float) -> np.ndarray:
    """T[c, y]: how often what belongs to c is labelled y."""
    return np.where(np.eye(classes, dtype=bool), 1 - rate, rate / (classes - 1))


def paired(classes: int, rate: float) -> np.ndarray:
    return (1 - rate) * np.eye(classes) + rate * np.roll(np.eye(classes), 1, axis=1)


def mixed(classes: int, rate: float) -> np.ndarray:
    """Half of the noise in pairs, half of it anywhere."""
    return (symmetric(classes, rate) + paired(classes, rate)) / 2


class Simulated:
    """Gaussian classes in 8 dimensions, labelled by a T; the logits are those of a model that knows q = T^T p."""

    def __init__(self, samples: int, noise: np.ndarray, *, apart: float, seed: int, sizes: np.ndarray | None = None):
        classes, drawn = len(noise), np.random.default_rng(seed)
        share = np.full(classes, 1 / classes) if sizes is None else sizes / sizes.sum()
        centres = np.random.default_rng(1).normal(size=(classes, 8)) * apart / 2**0.5
        true = drawn.choice(classes, size=samples, p=share)
        points = centres[true] + drawn.normal(size=(samples, 8))
        self.p = torch.from_numpy(-np.square(points[:, None] - centres).sum(axis=2) / 2 + np.log(share)).softmax(dim=1)
        given = (noise[true].cumsum(axis=1) < drawn.random(samples)[:, None]).sum(axis=1).clip(max=classes - 1)
        self.logits = (self.p @ torch.from_numpy(noise)).clamp_min(1e-300).log()
        self.labels, self.true = torch.from_numpy(given), torch.from_numpy(true)

    @property
    def wrong(self) -> np.ndarray:
        return (self.labels != self.true).numpy()


def calibrated(
    validation: Simulated, live: Simulated, *, memory: float = 0.0, kept: Tensor | None = None, **removed: Any
) -> tuple[NoiseModel, Tensor]:
    """The noise model by those of the live samples that are kept, and the logits of all, which remember their labels.

    `removed`: what `estimate_noise_model` is told of the others.
    """
    logits = live.logits + memory * torch.nn.functional.one_hot(live.labels, live.logits.shape[1])
    own = slice(None) if kept is None else kept
    mine, given = logits[own], live.labels[own]
    sums = [
        CalibrationSums(*calibration_sums(z, y, 1.0))
        for z, y in ((validation.logits, validation.labels), (mine, given))
    ]

    def sums_under(model: NoiseModel) -> PosteriorSums:
        return PosteriorSums(*posterior_sums(model, mine, given))

    unit = torch.eye(logits.shape[1], dtype=torch.float64)
    reduce = in_memory(validation.logits, validation.labels, 501)
    found = estimate_noise_model(sums[0], sums[1], 1.0, **removed)
    return with_transition(found, reduce, unit, sums_under, removed.get("prior", UNKNOWN)), logits


# -- joint -------------------------------------------------------------------------------------------------


def test_the_confident_joint_holds_powers_of_the_probabilities_by_given_label_and_add_up():
    live = Simulated(60, symmetric(4, 0.3), apart=1.0, seed=0)
    joint = np.zeros((4, 4))
    for p, y in zip(live.p.tolist(), live.labels.tolist(), strict=True):
        for c in range(4):
            joint[c, y] += p[c] ** 4
    whole = noise_matrix.confident_joint(live.p, live.labels)
    np.testing.assert_allclose(whole.numpy(), joint, rtol=1e-12)
    parts = [noise_matrix.confident_joint(p, y) for p, y in zip(live.p.split(7), live.labels.split(7), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole)
    assert float(noise_matrix.confident_joint(live.p[:0], live.labels[:0]).abs().sum()) == 0


# -- T -----------------------------------------------------------------------------------------------------


def by_hand(joint: np.ndarray, count: float, rate: float) -> np.ndarray:
    classes = len(joint)
    joint = joint * (count / joint.sum())
    size = joint.sum(axis=1)
    found = np.zeros((classes, classes))
    for c in range(classes):
        excess = np.zeros(classes)
        for y in range(classes):
            there, back = joint[c, y] / size[c], joint[y, c] / size[y]
            error = math.sqrt(
                max(joint[c, y], 0.5) / max(size[c], 1) ** 2 + max(joint[y, c], 0.5) / max(size[y], 1) ** 2
            )
            fewer = min(size[c], size[y])
            if joint[c, y] > joint[y, c] or max(size[c] / size[y], size[y] / size[c]) < 3:
                excess[y] = max(0.0, there - back - error) * fewer / (fewer + 5)
        if excess.sum() > rate:
            excess *= rate / excess.sum()
        for y in range(classes):
            if y != c:
                rest = (rate - excess.sum()) / (classes - 1)
                found[c, y] = 0.9 * (excess[y] + rest) + 0.1 * rate / (classes - 1)
        found[c, c] = 1 - found[c].sum()
    return found


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_the_estimate_equals_a_plain_loop(classes: int, rate: float):
    joint = np.random.default_rng(classes).gamma(0.5, 40.0, size=(classes, classes)) + 50 * np.eye(classes)
    found = noise_matrix.estimate(torch.from_numpy(joint * (3000 / joint.sum())), rate)
    np.testing.assert_allclose(found.numpy(), by_hand(joint, 3000.0, rate), rtol=1e-9)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(classes).double())
    torch.testing.assert_close(found.diagonal(), torch.full((classes,), 1 - rate).double())


@pytest.mark.parametrize("sizes", [[100, 100, 100, 100], [1000, 300, 30, 10]], ids=["balanced", "100:1"])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_confusions_that_go_both_ways_alike_has_no_direction(sizes: list[int], rate: float):
    alike = np.eye(4)
    alike[:2, :2] = [[0.7, 0.3], [0.3, 0.7]]
    for confusion in (symmetric(4, rate), alike):
        joint = torch.from_numpy(np.array(sizes, dtype=float)[:, None] * confusion)
        found = noise_matrix.estimate(joint, rate)
        np.testing.assert_allclose(found.numpy(), symmetric(4, rate), atol=1e-12)


def test_one_wrong_label_in_a_class_of_two_says_nothing_and_the_same_share_of_many_much():
    joint = np.diag([500.0, 500.0, 1.0])
    joint[2, 0] = 1.0
    found = noise_matrix.estimate(torch.from_numpy(joint), 0.2)
    joint[2] *= 100
    sure = noise_matrix.estimate(torch.from_numpy(joint), 0.2)
    assert float(found[2, 0]) == pytest.approx(0.1)
    assert float(sure[2, 0]) > 0.18


def test_a_confident_joint_without_a_class_or_of_one_class_alone_has_no_direction():
    joint = np.zeros((4, 4))
    joint[:3, :3] = 50 * symmetric(3, 0.2)
    single = np.zeros((4, 4))
    single[2, 2] = 100
    for of in (joint, single, np.zeros((4, 4))):
        found = noise_matrix.estimate(torch.from_numpy(of), 0.2)
        np.testing.assert_allclose(found.numpy(), symmetric(4, 0.2), atol=1e-12)


@pytest.mark.parametrize("rate", [0.95, 1.0])
def test_a_label_is_never_held_to_be_wrong_always(rate: float):
    found = noise_matrix.estimate(torch.eye(5) * 100, rate)
    # a tenth above what a label drawn by chance would be right
    assert float(found.diagonal().min()) == pytest.approx(1 - 0.9 * 0.8)
    assert bool((found > 0).all())


@pytest.mark.parametrize("apart", [2.0, pytest.param(3.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("memory", [0.0, 1.0])
@pytest.mark.parametrize(
    "noise", [symmetric(10, 0.3), paired(10, 0.2), paired(10, 0.4), mixed(10, 0.3)], ids=["any", "20", "40", "both"]
)
def test_the_matrix_by_which_labels_were_drawn_is_found_again(noise: np.ndarray, memory: float, apart: float):
    validation = Simulated(4000, noise, apart=apart, seed=0)
    found, _ = calibrated(validation, Simulated(8000, noise, apart=apart, seed=1), memory=memory)
    # the rate is known to a few hundredths, a tenth of it has no direction in any case, and where classes overlap a
    # part of what is confused one way is still taken for confusion
    assert float((found.transition - torch.from_numpy(noise)).abs().max()) < (0.1 if apart > 2 else 0.12)
    torch.testing.assert_close(found.validation_transition, found.transition)


# -- from labels to classes --------------------------------------------------------------------------------


def test_without_noise_labels_are_classes():
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), size=20))
    torch.testing.assert_close(noise_matrix.noise_corrected(p, torch.eye(5).double()), p)


@pytest.mark.parametrize("noise", [symmetric(6, 0.3), paired(6, 0.3), mixed(6, 0.3)], ids=["any", "pairs", "both"])
def test_classes_that_are_clear_are_found_behind_noisy_labels(noise: np.ndarray):
    p = 0.94 * torch.eye(6).double() + 0.01
    found = noise_matrix.noise_corrected(p @ torch.from_numpy(noise), torch.from_numpy(noise))
    assert float((found - p).abs().max()) < 0.06


@pytest.mark.parametrize("directed", ["no pair", "one pair of each class", "every pair"])
def test_many_classes_are_corrected_as_by_the_dense_matrix(directed: str):
    generator = torch.Generator().manual_seed(0)
    classes, rate = 80, 0.3
    joint = torch.eye(classes, dtype=torch.float64) * 100
    if directed == "one pair of each class":
        joint += torch.roll(torch.eye(classes, dtype=torch.float64), 1, dims=1) * 60
    elif directed == "every pair":
        joint += torch.rand(classes, classes, generator=generator, dtype=torch.float64).triu(1) * 60
    noise = noise_matrix.estimate(joint, rate)
    off_diagonal = noise[~torch.eye(classes, dtype=torch.bool)]
    assert (len(off_diagonal.unique()) == 1) == (directed == "no pair")
    # more samples than are corrected at a time
    q = (3 * torch.randn(2000, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    p = q
    for _ in range(noise_matrix._STEPS):
        p = p * ((q / (p @ noise)) @ noise.T)
        p = p / p.sum(dim=1, keepdim=True)
    torch.testing.assert_close(noise_matrix.noise_corrected(q, noise), p, rtol=1e-9, atol=1e-15)


def test_each_step_makes_the_labels_likelier(monkeypatch: pytest.MonkeyPatch):
    noise = torch.from_numpy(mixed(6, 0.4))
    q = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(6, 0.3), size=50)).clamp_min(1e-9)
    likelihoods = []
    for steps in range(0, 40, 4):
        monkeypatch.setattr(noise_matrix, "_STEPS", steps)
        p = noise_matrix.noise_corrected(q, noise)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(50).double())
        likelihoods.append(float((q * (p @ noise).log()).sum()))
    assert likelihoods == sorted(likelihoods)


# -- sharpness ---------------------------------------------------------------------------------------------


def test_the_sharpness_losses_equal_a_plain_loop_and_add_up():
    noise = torch.from_numpy(mixed(4, 0.3))
    validation = Simulated(40, noise.numpy(), apart=1.0, seed=0)
    unit, at = torch.eye(4).double(), torch.tensor(0.7, dtype=torch.float64)
    count, losses = noise_matrix.sharpness_losses(validation.logits, validation.labels, unit, at, noise)
    assert float(count) == 40
    p = noise_matrix.noise_corrected((0.7 * validation.logits).softmax(dim=1), noise)
    for k in (0, 20, 56):
        s = 0.25 * 48 ** (k / 56)
        known = 0.0
        for row, y in zip(p.tolist(), validation.labels.tolist(), strict=True):
            sharper = [c**s for c in row]
            known -= math.log(sum(c * float(noise[i, y]) for i, c in enumerate(sharper)) / sum(sharper))
        assert float(losses[k]) == pytest.approx(known, rel=1e-9)
    parts = [
        noise_matrix.sharpness_losses(z, y, unit, at, noise)[1]
        for z, y in zip(validation.logits.split(7), validation.labels.split(7), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), losses)


@pytest.mark.parametrize("flattened", [0.4, 0.7, 1.0])
def test_probes_that_are_less_sure_of_a_class_than_they_might_be_are_found_out(flattened: float):
    noise = symmetric(6, 0.3)
    validation = Simulated(20_000, noise, apart=2.0, seed=0)
    p = (validation.p**flattened) / (validation.p**flattened).sum(dim=1, keepdim=True)
    logits = (p @ torch.from_numpy(noise)).log()
    one = torch.tensor(1.0, dtype=torch.float64)
    _, losses = noise_matrix.sharpness_losses(
        logits, validation.labels, torch.eye(6).double(), one, torch.from_numpy(noise)
    )
    assert noise_matrix.best_sharpness(losses) == pytest.approx(1 / flattened, rel=0.15)


def test_where_no_sharpness_is_better_than_another_there_is_none():
    assert noise_matrix.best_sharpness(torch.zeros(57)) == 1.0


# -- what it is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [1.5, pytest.param(2.5, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "noise", [symmetric(10, 0.2), paired(10, 0.2), paired(10, 0.4), mixed(10, 0.4)], ids=["any", "20", "40", "both"]
)
def test_the_odds_of_a_wrong_label_are_calibrated(noise: np.ndarray, apart: float):
    live = Simulated(10_000, noise, apart=apart, seed=1)
    found, logits = calibrated(Simulated(4000, noise, apart=apart, seed=0), live)
    likely = torch.sigmoid(found.posterior(logits, live.labels).mislabel_odds).numpy()
    bins = np.minimum((10 * likely).astype(int), 9)
    error = sum(abs((likely - live.wrong)[bins == b].sum()) for b in range(10)) / len(likely)
    assert error < 0.06


def test_the_odds_are_those_of_bayes_where_everything_is_known():
    noise = mixed(5, 0.3)
    live = Simulated(500, noise, apart=2.0, seed=1)
    known_t = torch.from_numpy(noise)
    estimate = NoiseEstimate(0.3, 0.2, 0.4, 0.5, 30, 100, found=True)
    found = (
        NoiseModel(1.0, 0.0, estimate, 0.3, 0.3, 0.3, known_t, known_t, known_t)
        .posterior(live.logits, live.labels)
        .mislabel_odds
    )
    joint = live.p * known_t.T[live.labels]
    own = joint.gather(1, live.labels[:, None])[:, 0]
    known = ((joint.sum(dim=1) - own) / own).log()
    near = known.abs() < 3
    assert float((found - known)[near].abs().median()) < 0.1
    assert bool(((found > 0) == (known > 0))[known.abs() > 1].all())


@pytest.mark.parametrize("sizes", [None, np.geomspace(1, 0.01, 10)], ids=["balanced", "100:1"])
@pytest.mark.parametrize(("noise", "gain"), [(paired(10, 0.2), 0.05), (symmetric(10, 0.2), -0.01)])
def test_more_pair_flips_are_found_than_by_the_margin_and_no_fewer_symmetric_ones(
    noise: np.ndarray, gain: float, sizes: np.ndarray | None
):
    live = Simulated(6000, noise, apart=2.0, seed=1, sizes=sizes)
    found, logits = calibrated(Simulated(3000, noise, apart=2.0, seed=0, sizes=sizes), live, memory=1.0)
    own = logits.gather(1, live.labels[:, None])[:, 0]
    margin = logits.scatter(1, live.labels[:, None], -torch.inf).max(dim=1).values - own
    odds = found.posterior(logits, live.labels).mislabel_odds
    ours, plain = (float(average_precision_score(live.wrong, score.numpy())) for score in (odds, margin))
    assert ours >= plain + gain


def test_under_pair_flips_more_suggestions_are_the_true_class_than_without_directions():
    noise = paired(10, 0.3)
    live = Simulated(10_000, noise, apart=1.5, seed=1)
    found, logits = calibrated(Simulated(4000, noise, apart=1.5, seed=0), live, memory=0.5)

    def right(p: Tensor) -> float:
        suggested = p.scatter(1, live.labels[:, None], -torch.inf).argmax(dim=1)
        return float((suggested == live.true).numpy()[live.wrong].mean())

    assert (
        right(found.posterior(logits, live.labels).class_posterior)
        > right(found.probabilities(logits, live.labels)) + 0.05
    )


# -- rounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1.0, pytest.param(0.0, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(mixed(10, 0.4), id="both"),
        pytest.param(paired(10, 0.4), id="pairs", marks=pytest.mark.long),
        pytest.param(symmetric(10, 0.4), id="any", marks=pytest.mark.long),
    ],
)
def test_directions_do_not_fade_as_the_labels_that_went_them_are_removed(noise: np.ndarray, memory: float):
    validation = Simulated(4000, noise, apart=2.0, seed=0)
    live = Simulated(8000, noise, apart=2.0, seed=1)
    kept, self_confidence = torch.ones(8000, dtype=torch.bool), 0.0
    first, logits = calibrated(validation, live, memory=memory)
    found, wrong = first, torch.from_numpy(live.wrong)
    whole = first.posterior(logits, live.labels).mislabel_odds > 0
    faded: list[float] = []
    for _ in range(5):
        odds = found.posterior(logits, live.labels).mislabel_odds.masked_fill(~kept, -torch.inf)
        gone = odds.argsort(descending=True)[:800]
        gone = gone[odds[gone] > 0]
        own = found.probabilities(logits[gone], live.labels[gone]).gather(1, live.labels[gone][:, None])
        self_confidence, kept = self_confidence + float(own.sum()), kept.index_fill(0, gone, False)
        removed = {"removed": int((~kept).sum()), "removed_self_confidence": self_confidence, "prior": first.prior}
        found, _ = calibrated(validation, live, memory=memory, kept=kept, **removed)
        faded.append(float((found.transition - first.transition).abs().max()))
    # no more than by half
    assert max(faded) < 0.6 * float((noise - np.diag(np.diag(noise))).max())
    # the same boundary in all rounds: they come to what one without a budget would have taken
    assert float((whole == ~kept).double().mean()) > 0.98
    precision = [float(wrong[taken].double().mean()) for taken in (whole, ~kept)]
    assert precision[1] > precision[0] - 0.02


def test_a_prior_and_the_live_samples_tell_half_each():
    first, live = torch.tensor([[30.0, 10.0], [0.0, 60.0]]).double(), torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    torch.testing.assert_close(Prior().averaged(live, 80.0), 20 * live)
    torch.testing.assert_close(Prior(first).averaged(live, 80.0), (first + 25 * live) / 2)
    torch.testing.assert_close(Prior(first).averaged(0 * live, 0.0), first / 2)


def test_a_round_that_found_nothing_holds_nothing():
    clean = Simulated(4000, symmetric(10, 0.0), apart=3.0, seed=0)
    found, _ = calibrated(clean, Simulated(4000, symmetric(10, 0.0), apart=3.0, seed=1))
    assert not found.noise.found and found.prior == UNKNOWN


def test_rates_hold_where_they_are_of_the_validation_labels():
    noise = symmetric(10, 0.3)
    validation, live = (Simulated(4000, noise, apart=3.0, seed=seed) for seed in (0, 1))
    found, _ = calibrated(validation, live)
    assert (found.prior.live_noise_rate, found.prior.validation_noise_rate) == (
        found.live_noise_rate,
        found.validation_noise_rate,
    )
    # somebody has looked through these
    validation.labels = validation.true
    validation.logits = validation.p.clamp_min(1e-300).log()
    live.logits = live.p.clamp_min(1e-300).log()
    found, _ = calibrated(validation, live)
    assert found.noise.source == "live" and found.live_noise_rate == pytest.approx(0.3, abs=0.05)
    assert (found.prior.live_noise_rate, found.prior.validation_noise_rate) == (None, 0.0)
