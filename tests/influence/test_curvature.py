from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from refits import dense_hessian, objective, over_blocks
from torch import Tensor

from posttrain.errors import SingularCurvatureError
from posttrain.influence.curvature import (
    Curvature,
    EkfacCurvature,
    ExactCurvature,
    Influence,
    Kind,
    among_contrasts,
    class_factor,
    contrasts,
    corrected_eigenvalues,
    hessian_block,
    measure,
)
from posttrain.influence.probe import BlockFn, Probe, Reduce, hessian_product, loss_gradient

N, D, C, DAMPING = 30, 4, 3, 0.05


@dataclass(frozen=True)
class Small:
    features: Tensor
    labels: Tensor
    probe: Probe

    @property
    def reduce(self) -> Reduce:
        return over_blocks(self.features, self.labels, 7)

    @property
    def probabilities(self) -> Tensor:
        return (self.features @ self.probe.weights.T).softmax(dim=1)

    @property
    def residual(self) -> Tensor:
        return self.probabilities - torch.nn.functional.one_hot(self.labels, len(self.probe.weights))

    def summed_loss(self, weights: Tensor) -> Tensor:
        """The plain objective less its penalty, times n; for autograd."""
        return torch.nn.functional.cross_entropy(self.features @ weights.T, self.labels, reduction="sum")

    def single_s(self) -> list[Tensor]:
        """S_i, sample by sample."""
        return [torch.diag(p) - torch.outer(p, p) for p in self.probabilities]


@pytest.fixture(scope="module")
def small() -> Small:
    return small_of(C)


def small_of(classes: int) -> Small:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    # not standard normal: the factors A and B must not be multiples of the identity
    features = features @ torch.randn(D, D, generator=generator, dtype=torch.float64)
    weights = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    return Small(features, torch.arange(N) % classes, Probe(weights, DAMPING, N, 0.0, 0.0))


@dataclass(frozen=True)
class Plain:
    """`Influence` sample by sample from a dense H^-1 [C d, C d]."""

    inverse: Tensor

    def leverage(self, h: Tensor) -> Tensor:
        x = torch.kron(torch.eye(len(self.inverse) // len(h)).to(h), h[None, :])
        return x @ self.inverse @ x.T / N

    def __call__(self, features: Tensor, acting: Tensor) -> Influence:
        pairs = list(zip(features, acting, strict=True))
        deltas = [self.leverage(h) @ x for h, x in pairs]
        norms = [(self.inverse @ torch.kron(x, h)).square().sum() for h, x in pairs]
        return Influence(acting, torch.stack(deltas), torch.stack(norms))


def assert_same(found: Influence, known: Influence, *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    # H^-1 is kept in float32
    for name in ("loo_residual", "loo_logit_delta", "solved_norm"):
        a, b = getattr(found, name), getattr(known, name)
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}"
        )


def influence_of(curvature: Curvature, small: Small) -> Influence:
    return curvature.influence(small.features, small.residual, small.probabilities)


def hessian(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # torch.func.hessian's forward mode warns about torch.jit
    return torch.func.jacrev(torch.func.jacrev(fn))


def flat_hessian(small: Small) -> Tensor:
    """[C d, C d], the second derivative of the summed loss by autograd."""
    return hessian(small.summed_loss)(small.probe.weights).reshape(C * D, C * D)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_contrasts_are_an_orthonormal_basis_of_what_is_orthogonal_to_the_ones(classes: int):
    basis = contrasts(classes)
    assert basis.shape == (classes, classes - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(classes - 1).double())
    torch.testing.assert_close(basis.sum(dim=0), torch.zeros(classes - 1).double())


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_s_among_the_contrasts_is_the_plain_product(classes: int):
    p = torch.randn(20, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    for q, lower, upper, diagonal in zip(p, *among_contrasts(p), strict=True):
        known = contrasts(classes).T @ (torch.diag(q) - torch.outer(q, q)) @ contrasts(classes)
        torch.testing.assert_close(diagonal, known.diagonal())
        torch.testing.assert_close(torch.outer(lower, upper).triu(1), known.triu(1))


def test_the_curvature_is_the_second_derivative_of_the_summed_loss_among_the_contrasts(small: Small):
    found = small.reduce(hessian_block, small.probe.weights)[0]
    basis = torch.kron(contrasts(C), torch.eye(D).double())
    torch.testing.assert_close(found, basis.T @ flat_hessian(small) @ basis)


def test_the_exact_inverse_is_that_of_the_second_derivative_of_the_plain_objective(small: Small):
    def plain(weights: Tensor) -> Tensor:
        return objective(small.features, small.labels, weights, DAMPING)

    second = hessian(plain)(small.probe.weights).reshape(C * D, C * D)
    found = measure(small.reduce, small.probe, "exact")
    assert isinstance(found, ExactCurvature)
    # along the ones, of which the contrasts know nothing, the curvature is the l2
    basis, ones = torch.kron(contrasts(C), torch.eye(D).double()), torch.ones(C, C).double() / C
    inverse = found.inverse.double().reshape((C - 1) * D, (C - 1) * D)
    product = (basis @ inverse @ basis.T + torch.kron(ones, torch.eye(D).double()) / DAMPING) @ second
    torch.testing.assert_close(product, torch.eye(C * D).double(), rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_autograd_and_of_a_plain_loop(small: Small):
    found = small.reduce(loss_gradient, small.probe.weights)[3]
    torch.testing.assert_close(found, torch.func.jacrev(small.summed_loss)(small.probe.weights))
    plain = sum((torch.outer(r, h) for h, r in zip(small.features, small.residual, strict=True)), torch.zeros(C, D))
    torch.testing.assert_close(found, plain)


def test_the_hessian_product_is_that_of_autograd(small: Small):
    generator = torch.Generator().manual_seed(1)
    for direction in torch.randn(5, C, D, generator=generator, dtype=torch.float64):
        known = torch.func.grad(lambda w, v=direction: (torch.func.grad(small.summed_loss)(w) * v).sum())(
            small.probe.weights
        )
        found = small.reduce(hessian_product, small.probe.weights, direction)[0]
        torch.testing.assert_close(found, known)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_exact_influence_equals_a_plain_loop_with_the_dense_inverse(classes: int):
    small = small_of(classes)
    plain = Plain(torch.linalg.inv(dense_hessian(small.features, small.probe.weights, DAMPING)))
    acting = [
        torch.linalg.solve(torch.eye(classes).double() - s @ plain.leverage(h), r)
        for h, s, r in zip(small.features, small.single_s(), small.residual, strict=True)
    ]
    found = measure(small.reduce, small.probe, "exact")
    assert_same(influence_of(found, small), plain(small.features, torch.stack(acting)))
    assert (found.l2, found.count) == (DAMPING, N)


def test_the_exact_influence_does_not_depend_on_the_size_of_its_chunks(small: Small, monkeypatch: pytest.MonkeyPatch):
    found = measure(small.reduce, small.probe, "exact")
    whole = influence_of(found, small)
    monkeypatch.setattr(ExactCurvature, "_CHUNK", 7 * (C - 1) * (C - 1) * D)
    assert_same(influence_of(found, small), whole, rtol=1e-7, atol=1e-7)


def test_the_class_factor_is_the_sum_of_all_s(small: Small):
    found = small.reduce(class_factor, small.probe.weights)[0]
    torch.testing.assert_close(found, torch.stack(small.single_s()).sum(dim=0))


def test_the_corrected_eigenvalues_are_the_diagonal_in_the_factors_basis(small: Small):
    generator = torch.Generator().manual_seed(0)
    u_a = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    u_b = torch.linalg.qr(torch.randn(C, C, generator=generator, dtype=torch.float64)).Q
    basis = torch.kron(u_b, u_a)
    plain = torch.zeros(C * D, dtype=torch.float64)
    for h, s in zip(small.features, small.single_s(), strict=True):
        plain += torch.diagonal(basis.T @ torch.kron(s, torch.outer(h, h)) @ basis)
    found = small.reduce(corrected_eigenvalues, small.probe.weights, u_a, u_b)[0]
    torch.testing.assert_close(found, plain.view(C, D))


def test_the_ekfac_influence_equals_a_plain_loop_with_its_dense_inverse(small: Small):
    found = measure(small.reduce, small.probe, "ekfac")
    assert isinstance(found, EkfacCurvature)
    basis = torch.kron(found.class_basis, found.feature_basis).double()
    plain = Plain(basis @ torch.diag(1 / (found.eigenvalues.flatten().double() + DAMPING)) @ basis.T)
    assert_same(influence_of(found, small), plain(small.features, small.residual))


def test_the_ekfac_bases_diagonalise_the_mean_second_derivatives(small: Small):
    found = measure(small.reduce, small.probe, "ekfac")
    assert isinstance(found, EkfacCurvature)

    def loss_of(logits: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, label)

    logits = small.features @ small.probe.weights.T
    class_factors = torch.func.vmap(hessian(loss_of))(logits, small.labels)
    feature_factors = torch.stack([torch.outer(h, h) for h in small.features])
    for basis, factor in ((found.class_basis, class_factors), (found.feature_basis, feature_factors)):
        u, mean = basis.double(), factor.mean(dim=0)
        torch.testing.assert_close(u.T @ u, torch.eye(len(u)).double(), rtol=0, atol=1e-5)
        rotated = u.T @ mean @ u
        off_diagonal = rotated - torch.diag(torch.diagonal(rotated))
        assert float(off_diagonal.abs().max()) <= 1e-5 * float(torch.linalg.matrix_norm(mean))


def test_ekfac_keeps_the_exact_trace_and_diagonal(small: Small):
    found = measure(small.reduce, small.probe, "ekfac")
    assert isinstance(found, EkfacCurvature)
    mean = flat_hessian(small) / N
    basis = torch.kron(found.class_basis, found.feature_basis).double()
    kept = torch.diagonal(basis.T @ mean @ basis)
    torch.testing.assert_close(found.eigenvalues.flatten().double(), kept, rtol=1e-4, atol=1e-5)
    assert float(found.eigenvalues.sum()) == pytest.approx(float(torch.trace(mean)), rel=1e-5)


def test_ekfac_equals_exact_where_the_curvature_is_kronecker_factored(small: Small):
    # at W = 0 every S_i is I/C - 11^T/C^2
    at_zero = Probe(torch.zeros(C, D, dtype=torch.float64), DAMPING, N, 0.0, 0.0)
    uniform = torch.full((N, C), 1 / C).double()
    residual = uniform - torch.nn.functional.one_hot(small.labels, C)
    exact = measure(small.reduce, at_zero, "exact").influence(small.features, residual, uniform)
    # what the factored curvature does with the same x
    ekfac = measure(small.reduce, at_zero, "ekfac").influence(small.features, exact.loo_residual, uniform)
    assert_same(ekfac, exact)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_the_curvature_does_not_depend_on_how_samples_are_sharded(small: Small, kind: Kind):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = over_blocks(small.features[order], small.labels[order], [1, 20, 9])
    for weights in (small.probe.weights, small.probe.weights * 0):
        probe = Probe(weights, DAMPING, N, 0.0, 0.0)
        at = Small(small.features, small.labels, probe)
        one, other = (influence_of(measure(reduce, probe, kind), at) for reduce in (small.reduce, shuffled))
        # not the bases themselves: an eigenvector's sign is nobody's
        assert_same(other, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_float32_features_give_the_influence_of_float64_ones(small: Small, kind: Kind):
    double = influence_of(measure(small.reduce, small.probe, kind), small)
    reduce = over_blocks(small.features.float(), small.labels, 7)
    rounded = (small.features.float(), small.residual.float(), small.probabilities.float())
    single = measure(reduce, small.probe, kind).influence(*rounded)
    assert single.solved_norm.dtype == single.loo_logit_delta.dtype == torch.float32
    assert_same(single, double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fn", [hessian_block, class_factor, corrected_eigenvalues])
def test_a_partition_without_live_samples_adds_nothing(small: Small, fn: BlockFn):
    more = (torch.eye(D).double(), torch.eye(C).double()) if fn is corrected_eigenvalues else ()
    with_an_empty_block = over_blocks(small.features, small.labels, [20, 0, 10])
    found = with_an_empty_block(fn, small.probe.weights, *more)[0]
    torch.testing.assert_close(found, small.reduce(fn, small.probe.weights, *more)[0])


def test_both_kinds_are_curvatures(small: Small):
    for kind in ("exact", "ekfac"):
        assert isinstance(measure(small.reduce, small.probe, kind), Curvature)


def test_a_curvature_that_is_not_positive_definite_is_refused(small: Small):
    features = small.features.clone()
    features[:, 2] = 0
    undamped = Probe(small.probe.weights, 0.0, N, 0.0, 0.0)
    with pytest.raises(SingularCurvatureError, match=r"probe\.l2 = 0\)"):
        measure(over_blocks(features, small.labels, 7), undamped, "exact")
