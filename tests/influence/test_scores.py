"""Every score against its definition: what the probe does when it is fitted again without the sample.

The refits keep the penalty and leave out the sample's term, for 200 samples from the lowest to the highest score.
First-order influence (`parameter`, `data`) takes the curvature as it is with the sample. Where no sample has a
large share in it (dense features), its value is held against the refits; where some do (pixels that are lit in a
handful of images), its order is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from refits import CLASSES, Problem, digits, over_blocks, refits_without
from scipy.stats import rankdata
from torch import Tensor

from posttrain.influence.curvature import DenseLeverage, EkfacCurvature, Kind, measure
from posttrain.influence.probe import Probe, Standardizer, fit, moments, residuals
from posttrain.influence.scores import SCORES, Evidence, Score, evidence, label_margin, loo_logits

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
    return fit(problem.reduce, classes=CLASSES, dim=dim, damping=DAMPING, tolerance=1e-10)


def evidence_of(problem: Problem, probe: Probe, kind: Kind) -> Evidence:
    draw = torch.from_numpy(np.random.default_rng(9).random(len(problem.labels)))
    curvature = measure(problem.reduce, probe, kind)
    return evidence(problem.features, problem.labels, probe.weights, curvature, draw)


@cache
def refitted(samples: str, seed: int) -> Case:
    problem = digits(400, units=64 if samples == "dense" else None, seed=seed)
    probe = fitted(problem)
    found: dict[Kind, Evidence] = {kind: evidence_of(problem, probe, kind) for kind in KINDS}
    ranked = SCORES["loo_margin"](found["exact"]).argsort()
    rows = ranked[torch.linspace(0, len(ranked) - 1, 200).long()]
    without = refits_without(problem.features, problem.labels, probe.weights, DAMPING, rows)
    own = torch.einsum("bd,bcd->bc", problem.features[rows], without)
    before = (problem.features @ probe.weights.T).log_softmax(dim=1)
    after = torch.einsum("nd,bcd->bnc", problem.features, without).log_softmax(dim=2)
    truth: dict[Score, Tensor] = {
        "loo_margin": label_margin(own, problem.labels[rows]),
        "parameter": (without - probe.weights).flatten(1).norm(dim=1),
        "data": (before.exp() * (before - after)).sum(dim=2).mean(dim=1),
    }
    return Case(problem, probe, found, rows, own, truth)


# dense: 64 random ReLU units, no sample stands alone. rare: 64 pixels, some lit in a handful of images; of six
# draws the one on which approximations were worst.
DENSE = [("dense", 0), ("dense", 1), ("dense", 2)]
RARE = [("rare", 2)]


def named(case: tuple[str, int]) -> str:
    return f"{case[0]}{case[1]}"


@pytest.fixture(params=DENSE, ids=named)
def dense(request: pytest.FixtureRequest) -> Case:
    return refitted(*request.param)


@pytest.fixture(params=DENSE + RARE, ids=named)
def case(request: pytest.FixtureRequest) -> Case:
    return refitted(*request.param)


@pytest.fixture
def one() -> Case:
    return refitted(*DENSE[0])


# -- against refitting without the sample ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "least"), [("exact", 0.99), ("ekfac", 0.95)])
def test_the_loo_margin_ranks_as_refits_without_the_sample_do(case: Case, kind: Kind, least: float):
    found = SCORES["loo_margin"](case.found[kind])[case.rows]
    assert spearman(found, case.truth["loo_margin"]) >= least


def movement(case: Case) -> Tensor:
    """How far each sample's own logits move without it."""
    return (case.loo_logits - case.found["exact"].logits[case.rows]).norm(dim=1)


def test_the_exact_loo_logits_are_those_of_the_refits(dense: Case):
    moved = movement(dense)
    wrong = (dense.found["exact"].loo_logits[dense.rows] - dense.loo_logits).norm(dim=1)
    assert float((wrong / moved).median()) <= 0.02
    assert float(wrong.max()) <= 0.1 * float(moved.max())


def test_the_loo_margin_says_on_which_side_the_sample_falls_in_the_refit(case: Case):
    found, truth = SCORES["loo_margin"](case.found["exact"])[case.rows], case.truth["loo_margin"]
    assert float(((found > 0) == (truth > 0)).double().mean()) >= 0.99


@pytest.mark.parametrize("score", ["parameter", "data"])
def test_influence_is_what_refits_without_the_sample_show(dense: Case, score: Score):
    found, truth = SCORES[score](dense.found["exact"])[dense.rows], dense.truth[score]
    assert pearson(found, truth) >= 0.95
    # in its own unit, not merely in proportion: first order falls short by about the sample's leverage
    assert 0.75 <= float((found / truth).median()) <= 1.05


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
@pytest.mark.parametrize("score", ["parameter", "data"])
def test_influence_ranks_as_refits_without_the_sample_do(case: Case, score: Score, kind: Kind):
    assert spearman(SCORES[score](case.found[kind])[case.rows], case.truth[score]) >= 0.95


# -- against what the name says ----------------------------------------------------------------------------


def test_the_gradient_norm_is_that_of_autograd_sample_by_sample(one: Case):
    found = SCORES["gradient_norm"](one.found["exact"])
    for row in one.rows[::10].tolist():
        weights = one.probe.weights.clone().requires_grad_()
        logits = one.problem.features[row : row + 1] @ weights.T
        torch.nn.functional.cross_entropy(logits, one.problem.labels[row : row + 1]).backward()
        assert weights.grad is not None
        assert float(found[row]) == pytest.approx(float(weights.grad.norm()), rel=1e-9)


def test_loss_and_margin_are_those_of_the_fitted_probe(one: Case):
    loss, margin = SCORES["loss"](one.found["exact"]), SCORES["margin"](one.found["exact"])
    for row in one.rows[::10].tolist():
        logits = (one.probe.weights @ one.problem.features[row]).tolist()
        given = logits[int(one.problem.labels[row])]
        others = [z for c, z in enumerate(logits) if c != int(one.problem.labels[row])]
        assert float(loss[row]) == pytest.approx(np.log(np.sum(np.exp(logits))) - given, rel=1e-9)
        assert float(margin[row]) == pytest.approx(max(others) - given, rel=1e-9)


def test_the_data_influence_is_the_quadratic_form_of_its_formula():
    problem = digits(60, units=4)
    probe = fitted(problem)
    found = SCORES["data"](evidence_of(problem, probe, "exact"))
    _, p, r = residuals(problem.features, problem.labels, probe.weights)
    fisher = torch.zeros(50, 50, dtype=torch.float64)
    for h, q in zip(problem.features, p, strict=True):
        fisher += torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(h, h)) / 60
    inverse = torch.linalg.inv(fisher + DAMPING * torch.eye(50).double())
    gradients = torch.einsum("bc,bd->bcd", r, problem.features).flatten(1)
    plain = ((gradients @ inverse) @ fisher * (gradients @ inverse)).sum(dim=1) / (2 * 60**2)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-9)


def test_random_depends_on_the_draw_alone(one: Case):
    draw = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for problem in (one.problem, digits(400, units=64, seed=3)):
        curvature = measure(problem.reduce, one.probe, "ekfac")
        found = evidence(problem.features, problem.labels, one.probe.weights, curvature, draw)
        assert torch.equal(SCORES["random"](found), draw)


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
        one.problem.features[part], one.problem.labels[part], one.probe.weights, curvature, whole.draw[part]
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
    probe = fit(stored.reduce, classes=CLASSES, dim=65, damping=DAMPING)
    curvature = measure(stored.reduce, probe, kind)
    rough = evidence(stored.features, stored.labels, probe.weights.float(), curvature, torch.zeros(400))
    exact = evidence_of(precise, fitted(precise), kind)
    for name in INFORMED:
        assert spearman(SCORES[name](rough), SCORES[name](exact)) >= 0.995, name


# -- leave-one-out and its leverages -------------------------------------------------------------------------


def random_system(classes: int, highest: float) -> tuple[Tensor, Tensor, Tensor, DenseLeverage]:
    """(z, p, r, K) of 20 samples; the largest eigenvalue of S K is `highest` for each."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, classes, generator=generator, dtype=torch.float64)
    p = logits.softmax(dim=1)
    residual = p - torch.nn.functional.one_hot(torch.arange(20) % classes, classes)
    root = torch.randn(20, classes, classes, generator=generator, dtype=torch.float64)
    k = root @ root.transpose(1, 2)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    largest = torch.linalg.eigvals(s @ k).real.amax(dim=1)
    return logits, p, residual, DenseLeverage(k * (highest / largest)[:, None, None])


@pytest.mark.parametrize("highest", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("classes", [3, 10, 80])
def test_the_loo_logits_are_a_plain_newton_step_sample_by_sample(classes: int, highest: float):
    logits, p, residual, leverage = random_system(classes, highest)
    found = loo_logits(logits, p, residual, leverage)
    for z, q, r, k, own in zip(logits, p, residual, leverage.values, found, strict=True):
        s = torch.diag(q) - torch.outer(q, q)
        plain = z + k @ torch.linalg.inv(torch.eye(classes).double() - s @ k) @ r
        assert float((own - plain).norm()) <= 1e-3 * float((plain - z).norm())


@pytest.mark.parametrize("classes", [10, 80])
def test_the_ekfac_loo_margin_stays_near_the_exact_one_where_leverages_are_high(classes: int):
    # little damping and few samples: the factored leverage of some samples comes out above 1
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    features = torch.cat([features.relu(), torch.ones(400, 1).double()], dim=1)
    labels = (features @ torch.randn(17, classes, generator=generator, dtype=torch.float64)).argmax(dim=1)
    flipped = torch.rand(400, generator=generator) < 0.2
    labels[flipped] = torch.randint(classes, (int(flipped.sum()),), generator=generator)
    reduce = over_blocks(features, labels)
    probe = fit(reduce, classes=classes, dim=17, damping=1e-3)
    margins = {}
    for kind in KINDS:
        curvature = measure(reduce, probe, kind)
        found = evidence(features, labels, probe.weights, curvature, torch.zeros(400).double())
        margins[kind] = SCORES["loo_margin"](found)
    assert bool(torch.isfinite(margins["ekfac"]).all())
    assert float(margins["ekfac"].abs().max()) <= 5 * float(margins["exact"].abs().max())
    assert spearman(margins["ekfac"], margins["exact"]) >= 0.95


@pytest.mark.parametrize("classes", [10, 80])
def test_a_bucket_without_live_samples_has_no_scores_and_is_no_error(classes: int):
    curvature = EkfacCurvature(torch.eye(5), torch.eye(classes), torch.ones(classes, 5), DAMPING, 100)
    labels = torch.empty(0, dtype=torch.long)
    nothing = evidence(torch.empty(0, 5), labels, torch.zeros(classes, 5), curvature, torch.empty(0))
    for name, score in SCORES.items():
        assert score(nothing).shape == (0,), name


def test_the_label_margin_is_above_zero_exactly_where_another_class_wins():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]])
    assert label_margin(logits, torch.tensor([1, 2, 0])).tolist() == [-1.0, 1.0, -1.0]
