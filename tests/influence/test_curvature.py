from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from refits import dense_hessian, over_blocks
from torch import Tensor

from posttrain.errors import SingularCurvatureError
from posttrain.influence.curvature import (
    Curvature,
    DenseLeverage,
    EkfacCurvature,
    ExactCurvature,
    FactoredLeverage,
    Kind,
    class_factor,
    corrected_eigenvalues,
    hessian_block,
    measure,
)
from posttrain.influence.probe import BlockFn, Probe, Reduce

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
    def residual(self) -> Tensor:
        probabilities = (self.features @ self.probe.weights.T).softmax(dim=1)
        return probabilities - torch.nn.functional.one_hot(self.labels, C)

    def single_s(self) -> list[Tensor]:
        """S_i, sample by sample."""
        rows = (self.features @ self.probe.weights.T).softmax(dim=1)
        return [torch.diag(p) - torch.outer(p, p) for p in rows]


@pytest.fixture(scope="module")
def small() -> Small:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    # not standard normal: the factors A and B must not be multiples of the identity
    features = features @ torch.randn(D, D, generator=generator, dtype=torch.float64)
    weights = torch.randn(C, D, generator=generator, dtype=torch.float64)
    return Small(features, torch.arange(N) % C, Probe(weights, DAMPING, N, 0.0, 0.0))


def plain_influence(inverse: Tensor, features: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(K_i, ||H^-1 g_i||^2) sample by sample from a dense H^-1 [C d, C d]."""
    leverages, norms = [], []
    for h, r in zip(features, residual, strict=True):
        x = torch.kron(torch.eye(len(r), dtype=h.dtype), h[None, :])
        leverages.append(x @ inverse @ x.T / N)
        norms.append((inverse @ torch.kron(r, h)).square().sum())
    return torch.stack(leverages), torch.stack(norms)


def test_the_curvature_is_the_second_derivative_of_the_summed_loss(small: Small):
    def summed_loss(flat: Tensor) -> Tensor:
        logits = small.features @ flat.view(C, D).T
        return torch.nn.functional.cross_entropy(logits, small.labels, reduction="sum")

    derivative = torch.autograd.functional.hessian(summed_loss, small.probe.weights.flatten())
    found = small.reduce(hessian_block, small.probe.weights)[0]
    torch.testing.assert_close(found, torch.as_tensor(derivative))


def test_the_exact_influence_equals_a_plain_loop_with_the_dense_inverse(small: Small):
    inverse = torch.linalg.inv(dense_hessian(small.features, small.probe.weights, DAMPING))
    known, known_norms = plain_influence(inverse, small.features, small.residual)
    found = measure(small.reduce, small.probe, "exact")
    leverage, norms = found.influence(small.features, small.residual)
    # the inverse is kept in float32
    torch.testing.assert_close(leverage.matrix(), known, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms, known_norms, rtol=1e-4, atol=1e-6)
    assert (found.damping, found.count) == (DAMPING, N)


def test_the_exact_influence_does_not_depend_on_the_size_of_its_chunks(small: Small, monkeypatch: pytest.MonkeyPatch):
    found = measure(small.reduce, small.probe, "exact")
    whole, norms = found.influence(small.features, small.residual)
    monkeypatch.setattr(ExactCurvature, "_CHUNK", 7 * C * C * D)
    chunked, chunked_norms = found.influence(small.features, small.residual)
    torch.testing.assert_close(chunked.matrix(), whole.matrix())
    torch.testing.assert_close(chunked_norms, norms)


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
    inverse = basis @ torch.diag(1 / (found.eigenvalues.flatten().double() + DAMPING)) @ basis.T
    known, known_norms = plain_influence(inverse, small.features, small.residual)
    leverage, norms = found.influence(small.features, small.residual)
    torch.testing.assert_close(leverage.matrix(), known, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms, known_norms, rtol=1e-4, atol=1e-6)


def test_ekfac_keeps_the_exact_trace_and_diagonal(small: Small):
    found = measure(small.reduce, small.probe, "ekfac")
    assert isinstance(found, EkfacCurvature)
    hessian = dense_hessian(small.features, small.probe.weights, 0.0)
    basis = torch.kron(found.class_basis, found.feature_basis).double()
    kept = torch.diagonal(basis.T @ hessian @ basis)
    torch.testing.assert_close(found.eigenvalues.flatten().double(), kept, rtol=1e-4, atol=1e-5)


def test_ekfac_equals_exact_where_the_curvature_is_kronecker_factored(small: Small):
    # at W = 0 every S_i is I/C - 11^T/C^2
    at_zero = Probe(torch.zeros(C, D, dtype=torch.float64), DAMPING, N, 0.0, 0.0)
    residual = torch.full((N, C), 1 / C).double() - torch.nn.functional.one_hot(small.labels, C)
    exact, exact_norms = measure(small.reduce, at_zero, "exact").influence(small.features, residual)
    ekfac, ekfac_norms = measure(small.reduce, at_zero, "ekfac").influence(small.features, residual)
    torch.testing.assert_close(ekfac.matrix(), exact.matrix(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ekfac_norms, exact_norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_the_curvature_does_not_depend_on_how_samples_are_sharded(small: Small, kind: Kind):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = over_blocks(small.features[order], small.labels[order], [1, 20, 9])
    for weights in (small.probe.weights, small.probe.weights * 0):
        probe = Probe(weights, DAMPING, N, 0.0, 0.0)
        one = measure(small.reduce, probe, kind).influence(small.features, small.residual)
        other = measure(shuffled, probe, kind).influence(small.features, small.residual)
        # not the bases themselves: an eigenvector's sign is nobody's
        torch.testing.assert_close(other[0].matrix(), one[0].matrix(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other[1], one[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["exact", "ekfac"])
def test_float32_features_give_the_influence_of_float64_ones(small: Small, kind: Kind):
    double = measure(small.reduce, small.probe, kind).influence(small.features, small.residual)
    reduce = over_blocks(small.features.float(), small.labels, 7)
    single = measure(reduce, small.probe, kind).influence(small.features.float(), small.residual.float())
    assert single[1].dtype == torch.float32
    torch.testing.assert_close(single[0].matrix().double(), double[0].matrix(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(single[1].double(), double[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fn", [hessian_block, class_factor, corrected_eigenvalues])
def test_a_bucket_without_live_samples_adds_nothing(small: Small, fn: BlockFn):
    more = (torch.eye(D).double(), torch.eye(C).double()) if fn is corrected_eigenvalues else ()
    with_an_empty_block = over_blocks(small.features, small.labels, [20, 0, 10])
    found = with_an_empty_block(fn, small.probe.weights, *more)[0]
    torch.testing.assert_close(found, small.reduce(fn, small.probe.weights, *more)[0])


def test_a_leverage_applied_to_vectors_equals_its_matrix_times_them():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(C, C, generator=generator)).Q
    diagonal, vectors = torch.rand(9, C, generator=generator), torch.randn(9, C, generator=generator)
    factored = FactoredLeverage(basis, diagonal)
    dense = DenseLeverage(torch.stack([basis @ torch.diag(k) @ basis.T for k in diagonal]))
    torch.testing.assert_close(factored.matrix(), dense.values)
    torch.testing.assert_close(factored.product(vectors), dense.product(vectors))
    plain = torch.stack([k @ v for k, v in zip(dense.values, vectors, strict=True)])
    torch.testing.assert_close(dense.product(vectors), plain)


def test_both_kinds_are_curvatures(small: Small):
    for kind in ("exact", "ekfac"):
        assert isinstance(measure(small.reduce, small.probe, kind), Curvature)


def test_a_curvature_that_is_not_positive_definite_is_refused(small: Small):
    features = small.features.clone()
    features[:, 2] = 0
    undamped = Probe(small.probe.weights, 0.0, N, 0.0, 0.0)
    with pytest.raises(SingularCurvatureError, match=r"probe\.damping = 0\)"):
        measure(over_blocks(features, small.labels, 7), undamped, "exact")
