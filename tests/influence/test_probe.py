from __future__ import annotations

import numpy as np
import pytest
import torch
from refits import CLASSES, Problem, dense_hessian, digits, objective, over_blocks
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from posttrain.errors import SingularCurvatureError
from posttrain.influence.probe import (
    Probe,
    Standardizer,
    fit,
    hessian_product,
    in_memory,
    loss_gradient,
    moments,
    second_moment,
)

DAMPING = 0.1


@pytest.fixture(scope="module")
def problem() -> Problem:
    return digits(400)


@pytest.fixture(scope="module")
def probe(problem: Problem) -> Probe:
    return fit(problem.reduce, classes=CLASSES, dim=problem.features.shape[1], l2=DAMPING, tolerance=1e-10)


def test_the_gradient_of_the_plain_objective_is_zero_at_the_fit(problem: Problem, probe: Probe):
    weights = probe.weights.clone().requires_grad_()
    objective(problem.features, problem.labels, weights, DAMPING).backward()
    assert weights.grad is not None
    assert weights.grad.norm() <= 1e-9
    assert probe.gradient_norm == pytest.approx(float(weights.grad.norm()), abs=1e-12)


def test_a_fit_reports_its_samples_and_its_mean_cross_entropy(problem: Problem, probe: Probe):
    assert (probe.count, probe.l2) == (400, DAMPING)
    assert probe.loss == pytest.approx(
        float(objective(problem.features, problem.labels, probe.weights, 0.0)), rel=1e-12
    )


def test_a_fit_equals_scikit_learns_logistic_regression(problem: Problem, probe: Probe):
    # scikit-learn minimises C * sum of losses + ||W||^2 / 2; the bias is the column of ones, and penalised
    known = LogisticRegression(C=1 / (400 * DAMPING), fit_intercept=False, tol=1e-10, max_iter=5000)
    known.fit(problem.features.numpy(), problem.labels.numpy())
    np.testing.assert_allclose(probe.weights.numpy(), known.coef_, atol=1e-4)


def test_a_fit_does_not_depend_on_how_samples_are_sharded(problem: Problem, probe: Probe):
    order = torch.from_numpy(np.random.default_rng(1).permutation(400))
    for rows, sizes in ((order, [1, 5, 200, 0, 194]), (torch.arange(400), 31)):
        reduce = over_blocks(problem.features[rows], problem.labels[rows], sizes)
        again = fit(reduce, classes=CLASSES, dim=65, l2=DAMPING, tolerance=1e-10)
        torch.testing.assert_close(again.weights, probe.weights, rtol=0, atol=1e-10)


def test_a_fit_does_not_depend_on_where_it_starts(problem: Problem, probe: Probe):
    for start in (torch.randn(CLASSES, 65, generator=torch.Generator().manual_seed(0)), probe.weights):
        again = fit(problem.reduce, classes=CLASSES, dim=65, l2=DAMPING, start=start, tolerance=1e-10)
        torch.testing.assert_close(again.weights, probe.weights, rtol=0, atol=1e-8)


def test_a_fit_leaves_the_start_that_it_was_given_as_it_was(problem: Problem):
    start = torch.ones(CLASSES, 65, dtype=torch.float64)
    fit(problem.reduce, classes=CLASSES, dim=65, l2=DAMPING, start=start)
    assert bool((start == 1).all())


@pytest.mark.parametrize("l2", [1.0, 1e-2])
def test_float32_features_reach_the_float64_optimum(problem: Problem, l2: float):
    single = over_blocks(problem.features.float(), problem.labels)
    rough = fit(single, classes=CLASSES, dim=65, l2=l2)
    exact = fit(problem.reduce, classes=CLASSES, dim=65, l2=l2, tolerance=1e-10)
    assert rough.gradient_norm <= 1e-6
    # strong convexity: the distance is at most gradient norm / l2
    assert float((rough.weights - exact.weights).norm()) <= 1e-4 / l2
    agree = (problem.features @ rough.weights.T).argmax(1) == (problem.features @ exact.weights.T).argmax(1)
    assert float(agree.double().mean()) >= 0.995


def test_more_features_than_samples_and_a_class_without_samples_can_be_fitted():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    found = fit(over_blocks(features, labels, 5), classes=4, dim=40, l2=1e-2, tolerance=1e-9)
    weights = found.weights.clone().requires_grad_()
    objective(features, labels, weights, 1e-2).backward()
    assert weights.grad is not None
    assert weights.grad.norm() <= 1e-8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_to_begin_with_that_are_not_finite_are_refused(problem: Problem, value: float):
    start = torch.zeros(CLASSES, 65, dtype=torch.float64)
    start[2, 3] = value
    with pytest.raises(SingularCurvatureError, match="not finite"):
        fit(problem.reduce, classes=CLASSES, dim=65, l2=1.0, start=start)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(problem: Problem, value: float):
    features = problem.features.clone()
    features[17, 3] = value
    with pytest.raises(SingularCurvatureError, match=r"features hold values that are not finite$"):
        fit(over_blocks(features, problem.labels), classes=CLASSES, dim=65, l2=DAMPING)


def test_a_fit_that_does_not_end_says_so_and_names_the_way_out(problem: Problem):
    with pytest.raises(SingularCurvatureError, match=r"1 Newton steps.*larger probe\.l2"):
        fit(problem.reduce, classes=CLASSES, dim=65, l2=1e-4, max_steps=1, tolerance=1e-10)


def test_the_block_sums_equal_autograd_and_a_dense_curvature():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(23) % 3
    weights = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(features @ weights.T, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weights)
    plain = weights.detach()
    count, total, correct, found = loss_gradient(features, labels, plain)
    torch.testing.assert_close(found, gradient)
    assert float(total) == pytest.approx(loss.item())
    assert (int(count), int(correct)) == (23, int(((features @ plain.T).argmax(1) == labels).sum()))
    direction = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    (product,) = hessian_product(features, labels, plain, direction)
    dense = 23 * dense_hessian(features, plain, 0.0)
    torch.testing.assert_close(product.flatten(), dense @ direction.flatten())
    ones, moment = second_moment(features, labels)
    torch.testing.assert_close(moment, sum((torch.outer(h, h) for h in features), torch.zeros(4, 4).double()))
    assert int(ones) == 23


@pytest.mark.parametrize("size", [1, 37, 400, 2048])
def test_sums_over_blocks_in_memory_equal_those_over_all_at_once(problem: Problem, size: int):
    weights = torch.randn(CLASSES, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = in_memory(problem.features, problem.labels, size)(loss_gradient, weights)
    for part, whole in zip(found, loss_gradient(problem.features, problem.labels, weights), strict=True):
        torch.testing.assert_close(part, whole)
    again = in_memory(problem.features, problem.labels, size)(loss_gradient, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_sums_in_memory_are_float64_in_the_order_of_the_blocks():
    sizes: list[int] = []

    def counted(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor]:
        sizes.append(len(labels))
        return (features.sum(),)

    features = torch.tensor([[2.0**24], [1.0], [1.0]])
    (total,) = in_memory(features, torch.zeros(3, dtype=torch.long), 2)(counted)
    assert sizes == [2, 1]
    # the first block is summed in float32, which does not know 2^24 + 1; the blocks are not
    assert (total.dtype, float(total)) == (torch.float64, 2.0**24 + 1)


def test_no_samples_in_memory_sum_to_zeros():
    nothing = in_memory(torch.empty(0, 5), torch.empty(0, dtype=torch.long))
    count, second = nothing(second_moment)
    assert float(count) == 0
    assert torch.equal(second, torch.zeros(5, 5, dtype=torch.float64))


def test_the_standardizer_equals_scikit_learns_and_appends_a_one(problem: Problem):
    reduce = over_blocks(problem.raw, problem.labels, 31)
    found = Standardizer.from_moments(*reduce(moments))(problem.raw, torch.float64)
    # scikit-learn too divides a constant feature (the pixels in the corners) by 1
    known = StandardScaler().fit_transform(problem.raw.numpy())
    np.testing.assert_allclose(found[:, :-1].numpy(), known, atol=1e-9)
    assert bool((found[:, -1] == 1).all())


def test_a_feature_that_varies_less_than_float16_can_tell_is_not_blown_up():
    generator = torch.Generator().manual_seed(0)
    raw = torch.cat([100 + 1e-3 * torch.randn(50, 1, generator=generator), torch.zeros(50, 1)], dim=1)
    standardizer = Standardizer.from_moments(*moments(raw.double(), torch.zeros(50, dtype=torch.long)))
    assert standardizer.scale.tolist() == [1.0, 1.0]
    assert float(standardizer(raw)[:, :-1].abs().max()) < 0.01


def test_a_small_spread_on_a_large_mean_survives_the_moments():
    generator = torch.Generator().manual_seed(0)
    raw = 50 + torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    standardizer = Standardizer.from_moments(*moments(raw, torch.zeros(1000, dtype=torch.long)))
    assert float(standardizer.scale) == pytest.approx(float(raw.std(correction=0)), rel=1e-9)


def test_the_folded_head_on_raw_features_equals_the_probe(problem: Problem, probe: Probe):
    standardizer = Standardizer.from_moments(*moments(problem.raw, problem.labels))
    weight, bias = standardizer.fold(probe.weights)
    head = torch.nn.functional.linear(problem.raw, weight, bias)
    torch.testing.assert_close(head, problem.features @ probe.weights.T, rtol=1e-10, atol=1e-10)
