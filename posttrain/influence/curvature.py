"""The probe's curvature H, and what every score needs of its inverse.

    H = (1/n) sum_i S_i (x) h_i h_i^T + damping * I,     S_i = diag(p_i) - p_i p_i^T

`exact` keeps the (d C) x (d C) matrix, `ekfac` its Kronecker factors with corrected eigenvalues (George et al.
2018; Grosse et al. 2023): in the basis U_B (x) U_A of the factors B = mean S_i and A = mean h_i h_i^T the diagonal
of H is kept exactly, and the rest is taken as zero.
"""

# torch.linalg, Tensor.norm and Tensor.split carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.errors import SingularCurvatureError
from posttrain.influence.probe import Probe, Reduce, residuals, second_moment

Kind = Literal["exact", "ekfac"]


@runtime_checkable
class Leverage(Protocol):
    """K_i = X_i (nH)^-1 X_i^T of a batch, X_i = I_C (x) h_i^T: how far each logit follows its own residual."""

    def matrix(self) -> Float[Tensor, "batch classes classes"]: ...

    def product(self, vectors: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]: ...


@runtime_checkable
class Curvature(Protocol):
    """H^-1, applied to a batch."""

    @property
    def damping(self) -> float: ...

    @property
    def count(self) -> int: ...

    def influence(
        self, features: Float[Tensor, "batch dim"], residual: Float[Tensor, "batch classes"]
    ) -> tuple[Leverage, Float[Tensor, " batch"]]:
        """The leverages K_i, and the squared norms ||H^-1 g_i||^2 with g_i = r_i (x) h_i."""
        ...


@dataclass(frozen=True)
class DenseLeverage:
    """K as full matrices."""

    values: Float[Tensor, "batch classes classes"]

    def matrix(self) -> Tensor:
        return self.values

    def product(self, vectors: Tensor) -> Tensor:
        return torch.einsum("bck,bk->bc", self.values, vectors)


@dataclass(frozen=True)
class FactoredLeverage:
    """K_i = U diag(k_i) U^T with one U for all samples: a product costs C^2, not C^3."""

    basis: Float[Tensor, "classes classes"]
    diagonal: Float[Tensor, "batch classes"]

    def matrix(self) -> Tensor:
        return torch.einsum("ck,bk,lk->bcl", self.basis, self.diagonal, self.basis)

    def product(self, vectors: Tensor) -> Tensor:
        return ((vectors @ self.basis) * self.diagonal) @ self.basis.T


@dataclass(frozen=True)
class ExactCurvature:
    """H^-1 as a tensor [classes, d, classes, d]."""

    inverse: Float[Tensor, "classes dim classes dim"]
    damping: float
    count: int

    # the intermediate [batch, classes, classes, d] is kept under 64 MB
    _CHUNK = 16_000_000

    def influence(self, features: Tensor, residual: Tensor) -> tuple[Leverage, Tensor]:
        classes, dim = self.inverse.shape[:2]
        inverse = self.inverse.to(features)
        # [d, C * C * d]: one matrix product serves the leverage and the solve
        unfolded = inverse.permute(1, 0, 2, 3).reshape(dim, -1)
        matrices, norms = [], []
        step = max(1, self._CHUNK // (classes * classes * dim))
        for h, r in zip(features.split(step), residual.split(step), strict=True):
            rows = (h @ unfolded).view(len(h), classes, classes, dim)
            matrices.append(torch.einsum("bcke,be->bck", rows, h) / self.count)
            norms.append(torch.einsum("bcke,bc->bke", rows, r).square().sum(dim=(1, 2)))
        return DenseLeverage(torch.cat(matrices)), torch.cat(norms)


@dataclass(frozen=True)
class EkfacCurvature:
    """H^-1 = (U_B (x) U_A) diag(1 / (eigenvalues + damping)) (U_B (x) U_A)^T."""

    feature_basis: Float[Tensor, "dim dim"]
    class_basis: Float[Tensor, "classes classes"]
    eigenvalues: Float[Tensor, "classes dim"]
    damping: float
    count: int

    def influence(self, features: Tensor, residual: Tensor) -> tuple[Leverage, Tensor]:
        class_basis = self.class_basis.to(features)
        inverse = 1.0 / (self.eigenvalues.to(features) + self.damping)
        squares = (features @ self.feature_basis.to(features)).square()
        leverage = FactoredLeverage(class_basis, squares @ inverse.T / self.count)
        rotated = (residual @ class_basis).square()
        return leverage, (rotated * (squares @ inverse.square().T)).sum(dim=1)


def hessian_block(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor]:
    """Sum over a block of S_i (x) h_i h_i^T, as a matrix [classes * d, classes * d]."""
    _, p, _ = residuals(features, labels, weights)
    classes, dim = weights.shape
    total = features.new_zeros(classes * dim, classes * dim)
    for c in range(classes):
        # the block row of class c: sum_i p_ic (1[c = k] - p_ik) h_i h_i^T for all k >= c; the rest by symmetry
        weighted = features * p[:, c : c + 1]
        others = torch.einsum("bk,bd->bkd", p[:, c:], features).reshape(len(features), (classes - c) * dim)
        rows = -(weighted.T @ others)
        rows[:, :dim] += weighted.T @ features
        total[c * dim : (c + 1) * dim, c * dim :] = rows
        total[c * dim :, c * dim : (c + 1) * dim] = rows.T
    return (total,)


def class_factor(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor]:
    """Sum over a block of S_i = diag(p_i) - p_i p_i^T, [classes, classes]."""
    _, p, _ = residuals(features, labels, weights)
    return (torch.diag(p.sum(dim=0)) - p.T @ p,)


def corrected_eigenvalues(
    features: Tensor, labels: Tensor, weights: Tensor, feature_basis: Tensor, class_basis: Tensor
) -> tuple[Tensor]:
    """Sum over a block of the diagonal of S_i (x) h_i h_i^T in the factors' basis, [classes, d]."""
    _, p, _ = residuals(features, labels, weights)
    basis = class_basis.to(features)
    variance = p @ basis.square() - (p @ basis).square()
    return (variance.T @ (features @ feature_basis.to(features)).square(),)


def measure(reduce: Reduce, probe: Probe, kind: Kind) -> Curvature:
    """The curvature at the probe's optimum.

    Raises SingularCurvatureError where it is not positive definite.
    """
    classes, dim = probe.weights.shape
    n, damping = probe.count, probe.damping
    if kind == "exact":
        hessian = reduce(hessian_block, probe.weights)[0].double() / n
        hessian.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            raise SingularCurvatureError(
                f"the probe's curvature is not positive definite (probe.damping = {damping:g}); "
                "a larger probe.damping makes it so"
            )
        inverse = torch.cholesky_inverse(factor).view(classes, dim, classes, dim)
        return ExactCurvature(inverse.float(), damping, n)
    _, second = reduce(second_moment)
    feature_basis = torch.linalg.eigh(second.double() / n).eigenvectors
    class_basis = torch.linalg.eigh(reduce(class_factor, probe.weights)[0].double() / n).eigenvectors
    eigenvalues = reduce(corrected_eigenvalues, probe.weights, feature_basis, class_basis)[0] / n
    return EkfacCurvature(feature_basis.float(), class_basis.float(), eigenvalues.clamp_min(0).float(), damping, n)
