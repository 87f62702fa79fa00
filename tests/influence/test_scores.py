"""Every score against its definition: what the probe does when it is fitted again without the sample.

The refits keep the penalty and leave out the sample's term, for 200 samples from the lowest to the highest score and
for the whole of the smallest class. The exact curvature takes the sample's share out of itself, and its values are
held against the refits throughout. The factored one cannot: where no sample has a large share in it (dense features)
its values are held, where some do (pixels that are lit in a handful of images) its order is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from refits import CLASSES, Problem, digits, grouped_digits, over_blocks, refits_without
from scipy.stats import rankdata
from torch import Tensor

from posttrain.influence.curvature import EkfacCurvature, Kind, loo_residual, measure
from posttrain.influence.ensemble import stacked
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.probe import Probe, Standardizer, fit, moments, residuals
from posttrain.influence.scores import SCORES, Evidence, Score, evidence, joint_evidence, label_margin

DAMPING = 0.1
KINDS: tuple[Kind, ...] = ("exact", "ekfac")
INFORMED: tuple[Score, ...] = tuple(name for name in SCORES if name != "random")


@dataclass(frozen=True)
class Case:
    """A fitted probe, its scores, and the truth about some samples from refits without them."""

    problem: Problem
    probe: Probe
    found: dict[Kind, Evidence]
    rows: Tensor
    loo_logits: Tensor
    truth: dict[Score, Tensor]


def pearson(found: Tensor, truth: Tensor) -> float:
    return float(np.corrcoef(found, truth)[0, 1])


def spearman(found: Tensor, truth: Tensor) -> float:
    return float(np.corrcoef(rankdata(found), rankdata(truth))[0, 1])


def fitted(problem: Problem) -> Probe:
    dim = problem.features.shape[1]
    return fit(problem.reduce, classes=problem.classes, dim=dim, l2=DAMPING, tolerance=1e-10)


def evidence_of(problem: Problem, probe: Probe, kind: Kind) -> Evidence:
    uniform = torch.from_numpy(np.random.default_rng(9).random(len(problem.labels)))
    curvature = measure(problem.reduce, probe, kind)
    return evidence(problem.features, problem.labels, probe.weights, curvature, uniform)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    # 64 random ReLU units, no sample stands alone
    "dense": lambda seed: digits(400, units=64, seed=seed),
    # 64 pixels, some lit in a handful of images
    "rare": lambda seed: digits(400, seed=seed),
    "binary": lambda seed: grouped_digits([([3], 150), ([8], 150)], seed=seed),
    # 100 : 10 : 1
    "imbalanced": lambda seed: grouped_digits([(range(4), 600), (range(4, 7), 60), (range(7, 10), 6)], seed=seed),
}


@cache
def refitted(samples: str, seed: int) -> Case:
    problem = PROBLEMS[samples](seed)
    probe = fitted(problem)
    found: dict[Kind, Evidence] = {kind: evidence_of(problem, probe, kind) for kind in KINDS}
    ranked = SCORES["loo_margin"](found["exact"]).argsort()
    spread = ranked[torch.linspace(0, len(ranked) - 1, 200).long()]
    smallest = torch.nonzero(problem.labels == problem.labels.bincount().argmin())[:, 0]
    rows = torch.cat([spread, smallest]).unique()
    without = refits_without(problem.features, problem.labels, probe.weights, DAMPING, rows)
    own = torch.einsum("bd,bcd->bc", problem.features[rows], without)
    likely = own.softmax(dim=1).gather(1, problem.labels[rows][:, None])[:, 0]
    before = (problem.features @ probe.weights.T).log_softmax(dim=1)
    after = torch.einsum("nd,bcd->bnc", problem.features, without).log_softmax(dim=2)
    truth: dict[Score, Tensor] = {
        "loo_margin": label_margin(own, problem.labels[rows]),
        # without a noise model
        "mislabel_odds": -torch.logit(likely),
        "parameter": (without - probe.weights).flatten(1).norm(dim=1),
        "data": (before.exp() * (before - after)).sum(dim=2).mean(dim=1),
        # the baselines know only the fit with the sample; this is what each stands in for
        "loss": torch.nn.functional.cross_entropy(own, problem.labels[rows], reduction="none"),
    }
    truth |= {"margin": truth["loo_margin"], "gradient_norm": truth["parameter"]}
    return Case(problem, probe, found, rows, own, truth)


# rare: of six draws the one on which first order was worst, and the one on which a Newton step was; imbalanced: of
# three draws the worst
DENSE = [("dense", 0), ("dense", 1), ("dense", 2)]
RARE = [("rare", 2), ("rare", 5)]
FEW_CLASSES = [("binary", 0), ("imbalanced", 2)]


def named(case: tuple[str, int]) -> str:
    return f"{case[0]}{case[1]}"


@pytest.fixture(params=DENSE, ids=named)
def dense(request: pytest.FixtureRequest) -> Case:
    return refitted(*request.param)


@pytest.fixture(params=DENSE + RARE, ids=named)
def case(request: pytest.FixtureRequest) -> Case:
    return refitted(*request.param)


@pytest.fixture(params=DENSE + RARE + FEW_CLASSES, ids=named)
def any_case(request: pytest.FixtureRequest) -> Case:
    return refitted(*request.param)


@pytest.fixture
def one() -> Case:
    return refitted(*DENSE[0])


# -- against refitting without the sample ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "least"), [("exact", 0.99), ("ekfac", 0.95)])
def test_the_loo_margin_ranks_as_refits_without_the_sample_do(any_case: Case, kind: Kind, least: float):
    found = SCORES["loo_margin"](any_case.found[kind])[any_case.rows]
    assert spearman(found, any_case.truth["loo_margin"]) >= least


def movement(case: Case) -> Tensor:
    """How far each sample's own logits move without it."""
    return (case.loo_logits - case.found["exact"].logits[case.rows]).norm(dim=1)


def shortfall(case: Case) -> Tensor:
    """How far each sample's leave-one-out logits are from those of its refit."""
    return (case.found["exact"].loo_logits[case.rows] - case.loo_logits).norm(dim=1)


def test_the_exact_loo_logits_of_most_samples_are_those_of_the_refits(any_case: Case):
    assert float((shortfall(any_case) / movement(any_case)).median()) <= 0.02


def test_the_exact_loo_logits_of_all_samples_are_near_the_refits_where_none_stands_alone(dense: Case):
    assert float(shortfall(dense).max()) <= 0.1 * float(movement(dense).max())


def test_the_loo_margin_says_on_which_side_the_sample_falls_in_the_refit(any_case: Case):
    found, truth = SCORES["loo_margin"](any_case.found["exact"])[any_case.rows], any_case.truth["loo_margin"]
    assert float(((found > 0) == (truth > 0)).double().mean()) >= 0.99


def test_the_loo_margin_of_a_class_of_six_samples_is_that_of_the_refits():
    case = refitted("imbalanced", 2)
    counts = case.problem.labels.bincount()
    assert counts.tolist() == [600, 60, 6]
    few = case.problem.labels[case.rows] == 2
    assert int(few.sum()) == 6
    found = SCORES["loo_margin"](case.found["exact"])[case.rows]
    torch.testing.assert_close(found[few], case.truth["loo_margin"][few], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("score", ["parameter", "data"])
def test_the_exact_influence_is_what_refits_without_the_sample_show(any_case: Case, score: Score):
    found, truth = SCORES[score](any_case.found["exact"])[any_case.rows], any_case.truth[score]
    assert pearson(found, truth) >= 0.95
    assert spearman(found, truth) >= 0.99
    # in its own unit, not merely in proportion
    assert 0.98 <= float((found / truth).median()) <= 1.02


@pytest.mark.parametrize("score", ["parameter", "data"])
def test_the_factored_influence_is_near_what_refits_without_the_sample_show(dense: Case, score: Score):
    found, truth = SCORES[score](dense.found["ekfac"])[dense.rows], dense.truth[score]
    assert pearson(found, truth) >= 0.95
    # first order: it falls short, or overshoots, by about the sample's leverage
    assert 0.75 <= float((found / truth).median()) <= 1.25


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
@pytest.mark.parametrize("score", ["parameter", "data"])
def test_influence_ranks_as_refits_without_the_sample_do(any_case: Case, score: Score, kind: Kind):
    assert spearman(SCORES[score](any_case.found[kind])[any_case.rows], any_case.truth[score]) >= 0.95


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_features_stored_as_float16_are_as_true_to_the_refits_as_float64_ones(case: Case, kind: Kind):
    halves, labels = case.problem.raw.half(), case.problem.labels
    # as they are read back: float16 in the store, float32 in the sums
    standardizer = Standardizer.from_moments(*moments(halves, labels))
    features = standardizer(halves)
    reduce = over_blocks(features, labels)
    probe = fit(reduce, classes=CLASSES, dim=features.shape[1], l2=DAMPING)
    rough = evidence(features, labels, probe.weights.float(), measure(reduce, probe, kind), torch.zeros(len(labels)))
    for name in INFORMED:
        before, after = (spearman(SCORES[name](e)[case.rows], case.truth[name]) for e in (case.found[kind], rough))
        assert abs(after - before) <= 0.005, name
        assert spearman(SCORES[name](rough), SCORES[name](case.found[kind])) >= 0.995, name


# -- of an ensemble, against refitting every member without the sample ---------------------------------------


@dataclass(frozen=True)
class EnsembleCase:
    """Two probes on the same digits, pixels and random units, and the truth from refits of both."""

    members: tuple[Problem, Problem]
    found: dict[Kind, Evidence]
    rows: Tensor
    truth: dict[Score, Tensor]


@pytest.fixture(scope="module", params=[0, 2])
def ensemble(request: pytest.FixtureRequest) -> EnsembleCase:
    members = digits(400, seed=request.param), digits(400, units=64, seed=request.param)
    pixels, labels = members[0], members[0].labels
    assert torch.equal(labels, members[1].labels)
    probes = [fitted(member) for member in members]

    def of(kind: Kind) -> Evidence:
        parts = [(m.features, p.weights, measure(m.reduce, p, kind)) for m, p in zip(members, probes, strict=True)]
        return joint_evidence(parts, labels, torch.zeros(len(pixels.labels)))

    found: dict[Kind, Evidence] = {kind: of(kind) for kind in KINDS}
    rows = SCORES["loo_margin"](found["exact"]).argsort()[torch.linspace(0, 399, 200).long()]
    own, kl, without = [], [], []
    for member, probe in zip(members, probes, strict=True):
        refits = refits_without(member.features, labels, probe.weights, DAMPING, rows)
        own.append(torch.einsum("bd,bcd->bc", member.features[rows], refits))
        before = (member.features @ probe.weights.T).log_softmax(dim=1)
        after = torch.einsum("nd,bcd->bnc", member.features, refits).log_softmax(dim=2)
        kl.append((before.exp() * (before - after)).sum(dim=2).mean(dim=1))
        without.append(refits)
    whole = stacked([probe.weights for probe in probes])
    moved = [float((stacked(list(weights)) - whole).norm()) for weights in zip(*without, strict=True)]
    truth: dict[Score, Tensor] = {
        "loo_margin": label_margin((own[0] + own[1]) / 2, labels[rows]),
        "parameter": torch.tensor(moved, dtype=torch.float64),
        "data": (kl[0] + kl[1]) / 2,
    }
    return EnsembleCase(members, found, rows, truth)


@pytest.mark.parametrize(("kind", "least"), [("exact", 0.99), ("ekfac", 0.95)])
@pytest.mark.parametrize("score", ["loo_margin", "parameter", "data"])
def test_an_ensembles_scores_rank_as_refits_of_all_members_do(
    ensemble: EnsembleCase, score: Score, kind: Kind, least: float
):
    assert spearman(SCORES[score](ensemble.found[kind])[ensemble.rows], ensemble.truth[score]) >= least


@pytest.mark.parametrize("score", ["parameter", "data"])
def test_an_ensembles_exact_influence_is_what_refits_of_all_members_show(ensemble: EnsembleCase, score: Score):
    found, truth = SCORES[score](ensemble.found["exact"])[ensemble.rows], ensemble.truth[score]
    assert pearson(found, truth) >= 0.95
    assert 0.98 <= float((found / truth).median()) <= 1.02


def test_an_ensembles_loo_margin_says_on_which_side_the_sample_falls_in_the_refits(ensemble: EnsembleCase):
    found = SCORES["loo_margin"](ensemble.found["exact"])[ensemble.rows]
    assert float(((found > 0) == (ensemble.truth["loo_margin"] > 0)).double().mean()) >= 0.99


def test_an_ensembles_baselines_are_those_of_the_mean_logits(ensemble: EnsembleCase):
    found = ensemble.found["exact"]
    mean = torch.stack([m.features @ fitted(m).weights.T for m in ensemble.members]).mean(dim=0)
    labels = ensemble.members[0].labels
    torch.testing.assert_close(found.logits, mean)
    torch.testing.assert_close(SCORES["margin"](found), label_margin(mean, labels))
    loss = torch.nn.functional.cross_entropy(mean, labels, reduction="none")
    torch.testing.assert_close(SCORES["loss"](found), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_one_probe_twice_scores_as_the_probe_does(one: Case, kind: Kind):
    single = one.found[kind]
    twice = replace(single, members=single.members * 2)
    for name in SCORES:
        # the same weights twice, each over two: a norm is shorter by the root of two
        shorter = 2**0.5 if name in ("parameter", "gradient_norm") else 1.0
        torch.testing.assert_close(SCORES[name](twice) * shorter, SCORES[name](single), msg=name)


# -- the odds of a wrong label -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_noise_model_the_odds_are_those_of_any_other_label(any_case: Case, kind: Kind):
    found = any_case.found[kind]
    p = found.loo_logits.softmax(dim=1).gather(1, found.labels[:, None])[:, 0]
    torch.testing.assert_close(SCORES["mislabel_odds"](found), ((1 - p) / p).log(), rtol=1e-6, atol=1e-9)


def test_only_the_odds_depend_on_the_noise_model(one: Case):
    noise = NoiseEstimate(0.2, 0.1, 0.3, 0.4, 10, 50, found=True)
    mixed = torch.full((10, 10), 0.2 / 9, dtype=torch.float64).fill_diagonal_(0.8)
    noise_model = NoiseModel(1.7, 0.6, noise, 0.2, 0.2, 0.2, mixed, mixed, mixed, sharpness=1.2)
    calibrated = replace(one.found["exact"], noise_model=noise_model)
    odds = SCORES["mislabel_odds"](calibrated)
    torch.testing.assert_close(
        odds, noise_model.posterior(calibrated.loo_logits, calibrated.labels).mislabel_odds.to(odds)
    )
    assert odds.dtype == calibrated.loo_logits.dtype
    for name in SCORES:
        if name != "mislabel_odds":
            assert torch.equal(SCORES[name](calibrated), SCORES[name](one.found["exact"])), name


# -- against what the name says ----------------------------------------------------------------------------


def test_the_gradient_norm_is_that_of_autograd_sample_by_sample(one: Case):
    def loss_of(weights: Tensor, features: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(weights @ features, label)

    per_sample = torch.func.vmap(torch.func.jacrev(loss_of), in_dims=(None, 0, 0))
    gradients = per_sample(one.probe.weights, one.problem.features, one.problem.labels)
    found = SCORES["gradient_norm"](one.found["exact"])
    torch.testing.assert_close(found, gradients.flatten(1).norm(dim=1), rtol=1e-9, atol=0)


def test_loss_and_margin_are_those_of_the_fitted_probe(one: Case):
    loss, margin = SCORES["loss"](one.found["exact"]), SCORES["margin"](one.found["exact"])
    for row in one.rows[::10].tolist():
        logits = (one.probe.weights @ one.problem.features[row]).tolist()
        given = logits[int(one.problem.labels[row])]
        others = [z for c, z in enumerate(logits) if c != int(one.problem.labels[row])]
        assert float(loss[row]) == pytest.approx(np.log(np.sum(np.exp(logits))) - given, rel=1e-9)
        assert float(margin[row]) == pytest.approx(max(others) - given, rel=1e-9)


@dataclass(frozen=True)
class Plain:
    """A small problem with its matrices written out."""

    problem: Problem
    probe: Probe
    gradients: Tensor
    """[n, C d], of each sample's loss."""
    shares: Tensor
    """[n, C d, C d], each sample's S_i (x) h_i h_i^T / n."""

    @property
    def damped(self) -> Tensor:
        return DAMPING * torch.eye(self.gradients.shape[1]).double()

    def scores(self, steps: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor]:
        """(`parameter`, `data`) of what the weights move by, [n, C d]."""
        return steps.norm(dim=1), torch.einsum("ba,ak,bk->b", steps, fisher, steps) / 2


@pytest.fixture(scope="module")
def plain() -> Plain:
    problem = digits(60, units=4)
    probe = fitted(problem)
    _, p, r = residuals(problem.features, problem.labels, probe.weights)
    pairs = list(zip(problem.features, p, strict=True))
    shares = [torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(h, h)) / 60 for h, q in pairs]
    gradients = torch.einsum("bc,bd->bcd", r, problem.features).flatten(1)
    return Plain(problem, probe, gradients, torch.stack(shares))


def test_the_exact_scores_are_one_newton_step_on_the_objective_without_the_sample(plain: Plain):
    fisher = plain.shares.sum(dim=0)
    steps = []
    for gradient, share in zip(plain.gradients, plain.shares, strict=True):
        # the gradient without the sample is -g/n at the optimum with it
        steps.append(torch.linalg.solve(fisher + plain.damped - share, gradient / 60))
    moved = torch.stack(steps)
    found = evidence_of(plain.problem, plain.probe, "exact")
    parameter, data = plain.scores(moved, fisher)
    torch.testing.assert_close(SCORES["parameter"](found), parameter, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(SCORES["data"](found), data, rtol=1e-4, atol=1e-9)
    weights = plain.probe.weights + moved.view(60, CLASSES, -1)
    own = torch.einsum("bd,bcd->bc", plain.problem.features, weights)
    torch.testing.assert_close(found.loo_logits, own, rtol=1e-4, atol=1e-5)


def test_the_factored_scores_are_the_first_order_of_their_formulas(plain: Plain):
    curvature = measure(plain.problem.reduce, plain.probe, "ekfac")
    assert isinstance(curvature, EkfacCurvature)
    basis = torch.kron(curvature.class_basis, curvature.feature_basis).double()
    fisher = basis @ torch.diag(curvature.eigenvalues.flatten().double()) @ basis.T
    moved = torch.linalg.solve(fisher + plain.damped, plain.gradients.T).T / 60
    found = evidence_of(plain.problem, plain.probe, "ekfac")
    parameter, data = plain.scores(moved, fisher)
    torch.testing.assert_close(SCORES["parameter"](found), parameter, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(SCORES["data"](found), data, rtol=1e-4, atol=1e-9)


def test_random_depends_on_the_random_number_alone(one: Case):
    uniform = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for problem in (one.problem, digits(400, units=64, seed=3)):
        curvature = measure(problem.reduce, one.probe, "ekfac")
        found = evidence(problem.features, problem.labels, one.probe.weights, curvature, uniform)
        assert torch.equal(SCORES["random"](found), uniform)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
@pytest.mark.parametrize("score", INFORMED)
def test_flipped_labels_score_higher_than_clean_ones(case: Case, score: Score, kind: Kind):
    found, flipped = SCORES[score](case.found[kind]), case.problem.flipped
    assert float(found[flipped].mean()) > float(found[~flipped].mean())


def test_the_loo_margin_finds_flipped_labels_that_the_loss_does_not(dense: Case):
    # what the method is for: the probe has fitted its wrong labels, and knows better without them
    def hits(score: Score) -> float:
        highest = SCORES[score](dense.found["exact"]).argsort(descending=True)[: int(dense.problem.flipped.sum())]
        return float(dense.problem.flipped[highest].double().mean())

    assert hits("loo_margin") > max(hits("loss"), hits("random"))


def test_scores_do_not_depend_on_the_batch_that_a_sample_is_in(one: Case):
    curvature = measure(one.problem.reduce, one.probe, "exact")
    whole = one.found["exact"]
    part = slice(100, 137)
    again = evidence(
        one.problem.features[part], one.problem.labels[part], one.probe.weights, curvature, whole.uniform[part]
    )
    for name, score in SCORES.items():
        torch.testing.assert_close(score(again), score(whole)[part], msg=name)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_features_stored_as_float16_leave_every_ranking_as_it_was(kind: Kind):
    precise = digits(400, units=64)
    halves = precise.raw.half()
    # as they are read back: float16 in the store, float32 in the sums
    standardizer = Standardizer.from_moments(*moments(halves, precise.labels))
    stored = Problem(halves, standardizer(halves), precise.labels, precise.flipped)
    probe = fit(stored.reduce, classes=CLASSES, dim=65, l2=DAMPING)
    curvature = measure(stored.reduce, probe, kind)
    rough = evidence(stored.features, stored.labels, probe.weights.float(), curvature, torch.zeros(400))
    exact = evidence_of(precise, fitted(precise), kind)
    for name in INFORMED:
        assert spearman(SCORES[name](rough), SCORES[name](exact)) >= 0.995, name


# -- leave-one-out and its leverages -------------------------------------------------------------------------


def random_system(classes: int, highest: float) -> tuple[Tensor, Tensor, Tensor]:
    """(p, r, K) of 20 samples; the largest eigenvalue of S K is `highest` for each."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, classes, generator=generator, dtype=torch.float64)
    p = logits.softmax(dim=1)
    residual = p - torch.nn.functional.one_hot(torch.arange(20) % classes, classes)
    root = torch.randn(20, classes, classes, generator=generator, dtype=torch.float64)
    k = root @ root.transpose(1, 2)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    largest = torch.linalg.eigvals(s @ k).real.amax(dim=1)
    return p, residual, k * (highest / largest)[:, None, None]


@pytest.mark.parametrize("highest", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("classes", [3, 10, 80])
def test_the_loo_residual_solves_its_equation_sample_by_sample(classes: int, highest: float):
    p, residual, leverage = random_system(classes, highest)
    found = loo_residual(residual, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], leverage)
    for q, r, k, own in zip(p, residual, leverage, found, strict=True):
        s = torch.diag(q) - torch.outer(q, q)
        inverse = torch.linalg.inv(torch.eye(classes).double() - s @ k)
        # K x, which is all that the scores see of it
        assert float((k @ own - k @ inverse @ r).norm()) <= 1e-3 * float((k @ inverse @ r).norm())
        torch.testing.assert_close(own - s @ k @ own, r)


@pytest.mark.parametrize("classes", [10, 80])
def test_the_ekfac_loo_margin_stays_near_the_exact_one_where_leverages_are_high(classes: int):
    # little l2 and few samples: the factored leverage of some samples comes out above 1
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    features = torch.cat([features.relu(), torch.ones(400, 1).double()], dim=1)
    labels = (features @ torch.randn(17, classes, generator=generator, dtype=torch.float64)).argmax(dim=1)
    flipped = torch.rand(400, generator=generator) < 0.2
    labels[flipped] = torch.randint(classes, (int(flipped.sum()),), generator=generator)
    reduce = over_blocks(features, labels)
    probe = fit(reduce, classes=classes, dim=17, l2=1e-3)
    margins = {}
    for kind in KINDS:
        curvature = measure(reduce, probe, kind)
        found = evidence(features, labels, probe.weights, curvature, torch.zeros(400).double())
        margins[kind] = SCORES["loo_margin"](found)
    assert bool(torch.isfinite(margins["ekfac"]).all())
    assert float(margins["ekfac"].abs().max()) <= 5 * float(margins["exact"].abs().max())
    assert spearman(margins["ekfac"], margins["exact"]) >= 0.95


@pytest.mark.parametrize("classes", [10, 80])
def test_a_partition_without_live_samples_has_no_scores_and_is_no_error(classes: int):
    curvature = EkfacCurvature(torch.eye(5), torch.eye(classes), torch.ones(classes, 5), DAMPING, 100)
    labels = torch.empty(0, dtype=torch.long)
    nothing = evidence(torch.empty(0, 5), labels, torch.zeros(classes, 5), curvature, torch.empty(0))
    for name, score in SCORES.items():
        assert score(nothing).shape == (0,), name


def test_the_label_margin_is_above_zero_exactly_where_another_class_wins():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]])
    assert label_margin(logits, torch.tensor([1, 2, 0])).tolist() == [-1.0, 1.0, -1.0]
