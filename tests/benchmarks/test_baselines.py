"""The baselines of the detection benchmark, each against its formula written as a plain loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.benchmarks import baselines, cases
from pipelines.benchmarks.baselines import PEERS, Context
from pipelines.benchmarks.cases import Case, OutOfSample
from posttrain.vision import models
from posttrain.vision.weights import to_bytes

CLASSES = 4


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"needs {package}: pip install 'posttrain[benchmark]'")


NEEDED = {
    "confident_learning": "cleanlab",
    "self_confidence": "cleanlab",
    "tracin": "captum",
    "ekfac": "kronfluence",
}


def noisy(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [n, CLASSES] that know the true labels, these, and given labels of which 0.3 are wrong."""
    draw = np.random.default_rng(seed)
    true = np.arange(n) % CLASSES
    given = np.where(draw.random(n) < 0.3, (true + draw.integers(1, CLASSES, n)) % CLASSES, true)
    logits = draw.normal(size=(n, CLASSES))
    logits[np.arange(n), true] += 8.0
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), true, given


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return baselines.context(Case("digits", "symmetric 40", "memorised", 0), tmp_path_factory.mktemp("cells"))


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PEERS if name != "random"])
def test_every_peer_finds_flipped_digits_in_a_memorised_network(memorised: Context, name: str):
    if name in NEEDED:
        needs(NEEDED[name])
    train = memorised.data.train
    measured = PEERS[name](memorised)
    assert measured.scores.shape == (len(train),) and measured.scores.dtype == np.float64
    assert measured.seconds >= 0 and measured.passes >= 0
    # 0.80 (ekfac) to 0.99 (knn) were measured
    assert roc_auc_score(train.given != train.true, measured.scores) > 0.75


@pytest.mark.long
@pytest.mark.slow
def test_the_control_finds_nothing_and_draws_the_same_again(memorised: Context):
    train = memorised.data.train
    scores = PEERS["random"](memorised).scores
    wrong = train.given != train.true
    # three standard deviations of the AUROC of two equal distributions
    few, many = wrong.sum(), (~wrong).sum()
    assert abs(roc_auc_score(wrong, scores) - 0.5) < 3 * np.sqrt((few + many + 1) / (12 * few * many))
    np.testing.assert_array_equal(scores, PEERS["random"](memorised).scores)


# -- cleanlab ----------------------------------------------------------------------------------------------


def test_self_confidence_is_the_probability_of_the_given_label():
    needs("cleanlab")
    probabilities, _, given = noisy(200, seed=0)
    plain = [-probabilities[i, given[i]] for i in range(200)]
    np.testing.assert_allclose(baselines.self_confidence(probabilities, given), plain, atol=1e-12)


def test_confident_learning_flags_the_wrong_labels_where_the_predictions_are_right():
    needs("cleanlab")
    probabilities, true, given = noisy(400, seed=1)
    _, flagged = baselines.confident_learning(probabilities, given)
    assert flagged.dtype == bool
    np.testing.assert_array_equal(flagged, given != true)


def test_confident_learning_ranks_the_flagged_first_and_within_them_by_margin():
    needs("cleanlab")
    probabilities, _, given = noisy(400, seed=2)
    # predictions that are often wrong: the margin alone would mix flagged and unflagged
    probabilities = 0.3 * probabilities + 0.7 * np.random.default_rng(2).dirichlet(np.ones(CLASSES), 400)
    scores, flagged = baselines.confident_learning(probabilities, given)
    margins = np.array(
        [p[y] - max(p[c] for c in range(CLASSES) if c != y) for p, y in zip(probabilities, given, strict=True)]
    )
    assert margins[flagged].max() > margins[~flagged].min()
    assert scores[flagged].min() > scores[~flagged].max()
    for group in (flagged, ~flagged):
        assert group.sum() > 20
        np.testing.assert_array_equal(np.argsort(-scores[group]), np.argsort(margins[group]))


def test_the_suggested_label_is_the_most_probable_one():
    probabilities, true, _ = noisy(200, seed=3)
    np.testing.assert_array_equal(
        baselines.suggested(probabilities), [max(range(CLASSES), key=list(p).__getitem__) for p in probabilities]
    )
    assert (baselines.suggested(probabilities) == true).mean() > 0.95


# -- captum ------------------------------------------------------------------------------------------------


def squared_gradients(model: nn.Module, images: Tensor, labels: np.ndarray) -> np.ndarray:
    """||gradient of the head's weight||^2 of each sample, one sample at a time."""
    weight = models.head_of(model, "head").weight
    found = []
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(model(image[None]), torch.tensor([label]))
        found.append(float(torch.autograd.grad(loss, weight)[0].double().square().sum()))
    return np.array(found)


def test_tracin_is_the_sum_over_checkpoints_of_rate_times_squared_gradient():
    needs("captum")
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(30, 3, 8, 8, generator=draw)
    labels = np.random.default_rng(0).integers(0, CLASSES, 30)
    networks: list[nn.Module] = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = models.small_resnet(CLASSES, width=4)
        # running statistics of its own: in training mode, the loop over single images would give something else
        network.train()(images + seed)
        networks.append(network.eval())
    rates = [0.1, 0.03, 0.002]
    plain = sum(rate * squared_gradients(net, images, labels) for rate, net in zip(rates, networks, strict=True))
    checkpoints = [(to_bytes(net), rate) for rate, net in zip(rates, networks, strict=True)]
    model = models.small_resnet(CLASSES, width=4).eval()
    found = baselines.tracin_self_influence(model, "head", images, labels, checkpoints)
    np.testing.assert_allclose(found, plain, rtol=1e-3)


def test_tracin_weights_each_checkpoint_by_the_rate_of_its_epoch():
    needs("captum")
    case = Case("digits", "symmetric 40", "augmented", 0)
    whole = cases.load(case)
    data = replace(whole, train=whole.train.rows(np.arange(200)))
    trained = cases.train(case, data.train, seed=0, watch=True)
    context = Context(case, data, trained, OutOfSample(np.empty((0, 10)), 0.0, fresh=False))
    measured = baselines.by_tracin(context)
    epochs = 60
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(epochs):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    # of 60 epochs every tenth is kept; the last, at the rate 0, adds nothing
    assert len(trained.checkpoints) == measured.passes == 5
    images, some = context.images()[:50], data.train.given[:50]
    plain = np.zeros(50)
    for number, weights in enumerate(trained.checkpoints):
        plain += rates[10 * (number + 1)] * squared_gradients(cases.loaded(case, weights), images, some)
    np.testing.assert_allclose(measured.scores[:50], plain, rtol=1e-3)


# -- kronfluence -------------------------------------------------------------------------------------------


def spearman(found: np.ndarray, plain: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(found), rankdata(plain))[0, 1])


@pytest.mark.parametrize("l2", [1e-2, pytest.param(None, marks=pytest.mark.long)])
def test_ekfac_orders_samples_as_the_dense_fisher_does(l2: float | None):
    needs("kronfluence")
    n, dim = 1500, 5
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(n, dim, generator=draw)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("head", nn.Linear(dim, CLASSES))
    labels = np.random.default_rng(0).integers(0, CLASSES, n)
    with torch.no_grad():
        probabilities = model(images).softmax(dim=1).double()
    features = torch.cat([images.double(), torch.ones(n, 1)], dim=1)
    # gradient of each possible label; the Fisher information is their mean over the model's own predictions
    residual = probabilities[:, None, :] - torch.eye(CLASSES, dtype=torch.float64)
    gradients = (residual[:, :, :, None] * features[:, None, None, :]).flatten(2)
    fisher = torch.zeros(gradients.shape[2], gradients.shape[2], dtype=torch.float64)
    for i in range(n):
        for label in range(CLASSES):
            fisher += probabilities[i, label] * torch.outer(gradients[i, label], gradients[i, label]) / n
    strength = 0.1 * float(fisher.diagonal().mean()) if l2 is None else l2
    inverse = torch.linalg.inv(fisher + strength * torch.eye(len(fisher)))
    own = [gradients[i, labels[i]] for i in range(n)]
    plain = np.array([float(g @ inverse @ g) for g in own])
    found = baselines.ekfac_self_influence(model, "head", images, labels, seed=0, l2=l2)
    assert spearman(found, plain) > 0.9
    # and of the same size: Kronecker factors and drawn labels are what differs
    assert 0.8 < np.median(found / plain) < 1.25


# -- without a package -------------------------------------------------------------------------------------


def test_neighbour_disagreement_is_the_weighted_share_of_other_labels():
    draw = np.random.default_rng(5)
    features = draw.normal(size=(60, 4)).astype(np.float32)
    labels = draw.integers(0, CLASSES, 60)
    found = baselines.neighbour_disagreement(features, labels, neighbours=7)
    for i in range(60):
        similarity = {
            j: float(features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]))
            for j in range(60)
            if j != i
        }
        nearest = sorted(similarity, key=lambda j: -similarity[j])[:7]
        other = sum(similarity[j] for j in nearest if labels[j] != labels[i])
        assert found[i] == pytest.approx(other / sum(similarity[j] for j in nearest), abs=1e-5)


def test_a_sample_is_not_its_own_neighbour():
    # two of each: the one neighbour that counts is the twin
    features = np.repeat(np.eye(6, dtype=np.float32), 2, axis=0)
    labels = np.arange(12)
    np.testing.assert_allclose(baselines.neighbour_disagreement(features, labels, neighbours=1), 1.0)
    np.testing.assert_allclose(baselines.neighbour_disagreement(features, labels // 2, neighbours=1), 0.0)
