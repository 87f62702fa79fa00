"""The ensemble: which probes are its members, and that it is one linear head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from refits import digits, over_blocks
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from posttrain.errors import FeaturelessError
from posttrain.influence import calibration
from posttrain.influence.calibration import validation_sums
from posttrain.influence.curvature import measure
from posttrain.influence.ensemble import (
    Fit,
    ProbeEnsemble,
    choose,
    choose_members,
    mean_and_error,
    paired_losses,
    refit,
    stacked,
    standardizers_of,
)
from posttrain.influence.probe import Probe, Reduce, Standardizer
from posttrain.influence.scores import evidence


@dataclass(frozen=True)
class Layered:
    """Features of some layers in memory, summed over blocks."""

    features: dict[str, Tensor]
    labels: Tensor
    size: int = 97

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        return over_blocks(torch.cat([self.features[name] for name in layers], dim=1), self.labels, self.size)

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        return over_blocks(self.side_by_side(layers, standardizers), self.labels, self.size)

    def side_by_side(self, layers: Sequence[str], standardizers: Sequence[Standardizer]) -> Tensor:
        pairs = zip(layers, standardizers, strict=True)
        return torch.cat([s(self.features[name], torch.float64) for name, s in pairs], dim=1)


def halves(features: dict[str, Tensor], labels: Tensor, live: int) -> tuple[Layered, Layered]:
    """(live, validation)."""
    first = {name: of[:live] for name, of in features.items()}
    rest = {name: of[live:] for name, of in features.items()}
    return Layered(first, labels[:live]), Layered(rest, labels[live:])


@pytest.fixture(scope="module")
def seen() -> tuple[Layered, Layered]:
    """Digits, a fifth of the labels flipped, as pixels and as random units: 500 live, 300 validation."""
    pixels, units = digits(800), digits(800, units=32)
    return halves({"pixels": pixels.raw, "units": units.raw}, pixels.labels, 500)


CANDIDATES = [(layer, l2) for layer in ("pixels", "units") for l2 in (0.03, 0.3)]


@pytest.fixture(scope="module")
def boundary(seen: tuple[Layered, Layered]) -> ProbeEnsemble:
    return choose(*seen, candidates=CANDIDATES, classes=10)


def with_blank(seen: tuple[Layered, Layered]) -> tuple[Layered, Layered]:
    """The same with a layer whose features are those of one and the same image."""
    both = [replace(of, features={**of.features, "blank": torch.full((len(of.labels), 5), 0.3).half()}) for of in seen]
    return both[0], both[1]


def test_a_layer_without_variance_is_no_candidate(seen: tuple[Layered, Layered], boundary: ProbeEnsemble):
    found = choose(*with_blank(seen), candidates=[("blank", 0.3), *CANDIDATES], classes=10)
    assert {fit.layer for fit in found.tried} == {"pixels", "units"}
    assert found.members == boundary.members and torch.equal(found.weights, boundary.weights)


def test_where_no_layer_has_variance_there_is_no_boundary(seen: tuple[Layered, Layered]):
    with pytest.raises(FeaturelessError, match="constant in blank"):
        choose(*with_blank(seen), candidates=[("blank", 0.3), ("blank", 0.03)], classes=10)


# -- one linear head ---------------------------------------------------------------------------------------


def mean_logits(boundary: ProbeEnsemble, samples: Layered) -> Tensor:
    """Member by member."""
    logits = [
        standardizer(samples.features[layer], torch.float64) @ probe.weights.T
        for layer, standardizer, probe in zip(boundary.layers, boundary.standardizers, boundary.probes, strict=True)
    ]
    return sum(logits, torch.zeros(10).double()) / len(logits)


@pytest.fixture(scope="module")
def both(seen: tuple[Layered, Layered]) -> ProbeEnsemble:
    return refit(*seen, [("units", 0.3), ("pixels", 0.03)], classes=10)


def test_the_stacked_weights_on_features_side_by_side_give_the_members_mean_logits(
    seen: tuple[Layered, Layered], both: ProbeEnsemble
):
    features = seen[1].side_by_side(both.layers, both.standardizers)
    torch.testing.assert_close(features @ both.weights.T, mean_logits(both, seen[1]))
    assert both.weights.shape == (10, 33 + 65)


def test_the_folded_boundary_on_raw_features_gives_the_members_mean_logits(
    seen: tuple[Layered, Layered], both: ProbeEnsemble
):
    weight, bias = both.fold()
    raw = torch.cat([seen[1].features[layer] for layer in both.layers], dim=1)
    found = torch.nn.functional.linear(raw, weight, bias)
    torch.testing.assert_close(found, mean_logits(both, seen[1]), rtol=1e-9, atol=1e-9)


def test_the_parts_of_features_side_by_side_are_each_members_own(seen: tuple[Layered, Layered], both: ProbeEnsemble):
    parts = both.parts(seen[1].side_by_side(both.layers, both.standardizers))
    for part, layer, standardizer in zip(parts, both.layers, both.standardizers, strict=True):
        assert torch.equal(part, standardizer(seen[1].features[layer], torch.float64))


def test_each_layer_is_standardised_as_scikit_learn_does(seen: tuple[Layered, Layered]):
    live, validation = seen
    for layer, found in zip(("units", "pixels"), standardizers_of(live, ("units", "pixels")), strict=True):
        known = StandardScaler().fit(live.features[layer].numpy())
        there = np.asarray(known.transform(validation.features[layer].numpy()))
        np.testing.assert_allclose(found(validation.features[layer], torch.float64)[:, :-1].numpy(), there, atol=1e-9)


def test_a_boundary_reports_the_validation_loss_and_accuracy_of_the_mean_logits(
    seen: tuple[Layered, Layered], both: ProbeEnsemble
):
    logits, labels = mean_logits(both, seen[1]), seen[1].labels
    assert both.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-9)
    assert both.accuracy == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()), rel=1e-12)


def test_a_refit_of_a_boundarys_members_is_the_boundary_to_the_last_bit(
    seen: tuple[Layered, Layered], boundary: ProbeEnsemble
):
    again = refit(*seen, boundary.members, classes=10)
    assert again.layers == boundary.layers
    assert torch.equal(again.weights, boundary.weights)
    assert (again.loss, again.accuracy) == (boundary.loss, boundary.accuracy)


def test_a_refit_keeps_layers_and_l2s_whatever_the_live_samples_are(
    seen: tuple[Layered, Layered], boundary: ProbeEnsemble
):
    live, validation = seen
    fewer = Layered({name: of[::2] for name, of in live.features.items()}, live.labels[::2])
    again = refit(fewer, validation, boundary.members, classes=10)
    assert again.members == boundary.members
    assert [probe.count for probe in again.probes] == [250] * len(boundary.layers)


# -- whom the validation samples choose ----------------------------------------------------------------------


def three_layers(seed: int) -> tuple[Layered, Layered]:
    """600 live and 400 validation samples of 3 classes, a fifth labelled wrongly.

    `good` shows the class, `noise` nothing; `memorised` shows the given label of the live samples, and of the
    validation samples a label drawn at random, as a layer does that learnt its labels by heart.
    """
    drawn = np.random.default_rng(seed)
    true = drawn.integers(0, 3, 1000)
    flipped = drawn.random(1000) < 0.2
    given = np.where(flipped, (true + drawn.integers(1, 3, 1000)) % 3, true)
    recalled = np.where(np.arange(1000) < 600, given, drawn.integers(0, 3, 1000))
    good = 2.0 * np.eye(3, 6)[true] + drawn.normal(size=(1000, 6))
    noise = drawn.normal(size=(1000, 8))
    memorised = 4.0 * np.eye(3, 6)[recalled] + drawn.normal(size=(1000, 6))
    layers = {"memorised": memorised, "noise": noise, "good": good}
    return halves({name: torch.from_numpy(of) for name, of in layers.items()}, torch.from_numpy(given), 600)


@pytest.mark.parametrize("seed", range(5))
def test_a_memorised_layer_is_not_chosen_though_its_own_samples_speak_for_it(seed: int):
    live, validation = three_layers(seed)
    names = ("memorised", "noise", "good")
    found = choose(live, validation, candidates=[(name, d) for name in names for d in (0.01, 0.1)], classes=3)
    assert found.layers[0] == "good"
    assert "memorised" not in found.layers
    in_sample, left_out = {}, {}
    for fit in (fit for fit in found.tried if fit.l2 == 0.01):
        in_sample[fit.layer] = fit.probe.loss
        (standardizer,) = standardizers_of(live, (fit.layer,))
        curvature = measure(live.standardised((fit.layer,), (standardizer,)), fit.probe, "exact")
        features = standardizer(live.features[fit.layer], torch.float64)
        there = evidence(features, live.labels, fit.probe.weights, curvature, torch.zeros(600).double())
        left_out[fit.layer] = float(torch.nn.functional.cross_entropy(there.loo_logits, live.labels))
    assert min(in_sample, key=lambda layer: in_sample[layer]) == "memorised"
    assert min(left_out, key=lambda layer: left_out[layer]) == "memorised"


def test_the_validation_labels_alone_decide():
    drawn = np.random.default_rng(0)
    one, other = drawn.integers(0, 2, (2, 900))
    # on the live samples both layers show the label equally well
    other[:600] = one[:600]
    shown = {"one": one, "other": other}
    features = {name: torch.from_numpy(np.eye(2)[of] + 0.5 * drawn.normal(size=(900, 2))) for name, of in shown.items()}
    candidates = [("one", 0.1), ("other", 0.1)]
    for name, labels in shown.items():
        live, validation = halves(features, torch.from_numpy(labels), 600)
        assert choose(live, validation, candidates=candidates, classes=2).layers == (name,)


def test_every_candidate_is_reported_with_its_own_validation_figures(
    seen: tuple[Layered, Layered], boundary: ProbeEnsemble
):
    live, validation = seen
    assert sorted((fit.layer, fit.l2) for fit in boundary.tried) == sorted(CANDIDATES)
    for fit in boundary.tried:
        (standardizer,) = standardizers_of(live, (fit.layer,))
        logits = standardizer(validation.features[fit.layer], torch.float64) @ fit.probe.weights.T
        assert fit.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, validation.labels)), rel=1e-9)
        right = (logits.argmax(dim=1) == validation.labels).double().mean()
        assert fit.accuracy == pytest.approx(float(right), rel=1e-12)


def test_an_ensemble_is_at_most_an_error_worse_than_its_best_member(boundary: ProbeEnsemble):
    # each join may cost one standard error; these two help
    assert boundary.loss <= min(fit.loss for fit in boundary.tried) + 0.02
    assert set(boundary.members) <= set(CANDIDATES)


def test_the_same_blocks_give_the_same_bits_and_any_blocks_the_same_boundary(
    seen: tuple[Layered, Layered], boundary: ProbeEnsemble
):
    again = choose(*seen, candidates=CANDIDATES, classes=10)
    assert torch.equal(again.weights, boundary.weights)
    assert (again.loss, again.accuracy) == (boundary.loss, boundary.accuracy)
    for size in (11, 41, 500):
        cut = [replace(part, size=size) for part in seen]
        other = choose(cut[0], cut[1], candidates=CANDIDATES, classes=10)
        assert other.members == boundary.members
        torch.testing.assert_close(other.weights, boundary.weights, rtol=0, atol=1e-9)


def test_the_order_of_the_candidates_does_not_matter(seen: tuple[Layered, Layered], boundary: ProbeEnsemble):
    again = choose(*seen, candidates=CANDIDATES[::-1], classes=10)
    assert again.members == boundary.members
    torch.testing.assert_close(again.weights, boundary.weights, rtol=0, atol=1e-9)


def test_no_more_members_are_chosen_than_the_most(seen: tuple[Layered, Layered]):
    found = choose(*seen, candidates=CANDIDATES, classes=10, most=1)
    assert found.members == (min((fit.loss, (fit.layer, fit.l2)) for fit in found.tried)[1],)


# -- the rule, with changes written by hand ----------------------------------------------------------------


def a_fit(layer: str, loss: float, l2: float = 0.1, width: int = 2) -> Fit:
    """A fit whose weights are its loss."""
    return Fit(layer, Probe(torch.full((3, width), loss, dtype=torch.float64), l2, 100, 0.5, 1e-4), loss, 0.5)


COLUMNS = {"a": 0, "b": 2, "c": 4, "d": 6, "e": 8}


def scripted(answers: Sequence[tuple[float, float]]) -> tuple[Callable[[Tensor, Tensor], tuple[float, float]], list]:
    asked: list[tuple[Tensor, Tensor]] = []

    def change(before: Tensor, after: Tensor) -> tuple[float, float]:
        asked.append((before, after))
        return answers[len(asked) - 1]

    return change, asked


def names(fits: Sequence[Fit]) -> list[str]:
    return [fit.layer for fit in fits]


@pytest.mark.parametrize(
    ("mean", "error", "joins"),
    [(-0.1, 0.01, True), (0.0, 0.0, True), (0.01, 0.01, True), (0.011, 0.01, False), (1e-9, 0.0, False)],
)
def test_a_layer_joins_unless_the_loss_rises_by_more_than_a_standard_error(mean: float, error: float, joins: bool):
    change, asked = scripted([(mean, error)])
    assert names(choose_members([a_fit("b", 0.2), a_fit("a", 0.1)], COLUMNS, 10, change)) == ["a", "b"][: 1 + joins]
    assert len(asked) == 1


def test_layers_are_asked_in_the_order_of_their_loss_and_a_refused_one_stays_out():
    change, asked = scripted([(1.0, 0.1), (0.0, 0.1), (0.0, 0.1)])
    fits = [a_fit(layer, loss) for layer, loss in (("d", 0.4), ("b", 0.2), ("a", 0.1), ("c", 0.3))]
    assert names(choose_members(fits, COLUMNS, 10, change)) == ["a", "c", "d"]
    # every question compares the mean logits of the members so far with those of the members and the next
    for (before, after), (old, new) in zip(asked, (("a", "ab"), ("a", "ac"), ("ac", "acd")), strict=True):
        for asked_about, members in ((before, old), (after, new)):
            expected = torch.zeros(3, 10, dtype=torch.float64)
            for fit in fits:
                if fit.layer in members:
                    expected[:, COLUMNS[fit.layer] : COLUMNS[fit.layer] + 2] = fit.loss / len(members)
            torch.testing.assert_close(asked_about, expected)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_there_are_never_more_than_the_most_members(most: int):
    change, asked = scripted([(-1.0, 0.0)] * 4)
    fits = [a_fit(layer, loss) for layer, loss in zip("abcde", (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)]
    assert names(choose_members(fits, COLUMNS, 10, change, most=most)) == list("abcde")[:most]
    assert len(asked) == most - 1


def test_of_a_layer_the_l2_with_the_lowest_validation_loss_stands_for_it():
    change, _ = scripted([(0.0, 0.1)])
    fits = [a_fit("a", 0.3, 1.0), a_fit("a", 0.1, 0.1), a_fit("a", 0.2, 0.01), a_fit("b", 0.15, 1.0)]
    assert [(fit.layer, fit.l2) for fit in choose_members(fits, COLUMNS, 10, change)] == [("a", 0.1), ("b", 1.0)]


def test_ties_go_to_the_one_that_was_tried_first():
    change, _ = scripted([(0.0, 0.1)])
    fits = [a_fit("b", 0.1, 1.0), a_fit("b", 0.1, 0.1), a_fit("a", 0.1, 1.0)]
    assert [(fit.layer, fit.l2) for fit in choose_members(fits, COLUMNS, 10, change)] == [("b", 1.0), ("a", 1.0)]


def test_the_change_in_loss_and_its_error_are_those_of_paired_samples(
    seen: tuple[Layered, Layered], both: ProbeEnsemble
):
    validation = seen[1]
    features = validation.side_by_side(both.layers, both.standardizers)
    before = stacked([both.probes[0].weights, torch.zeros(10, 65)])
    sums = validation.standardised(both.layers, both.standardizers)(paired_losses, before, both.weights)
    mean, error = mean_and_error(*sums)

    def losses(weights: Tensor) -> np.ndarray:
        p = (features @ weights.T).softmax(dim=1).numpy()
        return -np.log(p[np.arange(300), validation.labels.numpy()])

    difference = losses(both.weights) - losses(before)
    assert mean == pytest.approx(difference.mean(), rel=1e-9)
    assert error == pytest.approx(difference.std() / 300**0.5, rel=1e-9)


def test_equal_values_have_no_error_though_their_sums_are_rounded():
    count, value = torch.tensor(3.0).double(), torch.tensor(0.1).double()
    assert mean_and_error(count, value + value + value, 3 * value.square())[1] == pytest.approx(0, abs=1e-8)


# -- the calibration_sums of the validation samples --------------------------------------------------------------------


def test_validation_sums_are_the_calibration_sums_of_the_ensembles_logits(
    seen: tuple[Layered, Layered], both: ProbeEnsemble
):
    validation = seen[1]
    found, temperature = validation_sums(validation.standardised(both.layers, both.standardizers), both.weights)
    expected = calibration.calibration_sums(mean_logits(both, validation), validation.labels, temperature)
    for part, known in zip(vars(found).values(), expected, strict=True):
        torch.testing.assert_close(part, known)

    def loss(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(t * mean_logits(both, validation), validation.labels))

    assert loss(temperature) <= min(loss(0.99 * temperature), loss(1.01 * temperature))
