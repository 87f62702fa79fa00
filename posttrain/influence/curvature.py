"""The probe's curvature H, and what every score needs of its inverse.

    H = (1/n) sum_i S_i (x) h_i h_i^T + l2 * I,     S_i = diag(p_i) - p_i p_i^T

h_i, p_i and l2 are those of `probe`, n is the number of samples, r_i = p_i - y_i the residual with y_i one-hot.
K_i = X_i (nH)^-1 X_i^T with X_i = I_C (x) h_i^T is a sample's leverage: how far its logits follow its own residual.
`exact` keeps the matrix, d (C - 1) x d (C - 1) among the contrasts of the classes, `ekfac` its Kronecker factors with
corrected eigenvalues (George et al. 2018; Grosse et al. 2023): in the basis U_B (x) U_A of the factors B = mean S_i
and A = mean h_i h_i^T the diagonal of H is kept exactly, and the rest is taken as zero.
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
from posttrain.influence.probe import Probe, Reduce, class_probabilities, second_moment

Kind = Literal["exact", "ekfac"]


@runtime_checkable
class Curvature(Protocol):
    """H^-1, applied to a batch."""

    @property
    def l2(self) -> float: ...

    @property
    def count(self) -> int: ...

    def influence(
        self,
        features: Float[Tensor, "batch dim"],
        residual: Float[Tensor, "batch classes"],
        probabilities: Float[Tensor, "batch classes"],
    ) -> Influence:
        """What the removal of each sample does to the probe; `residual` is r_i, `probabilities` p_i."""
        ...


@dataclass(frozen=True)
class Influence:
    """The probe without sample i, to one step from its optimum: W_i = W + H^-1 (x_i (x) h_i) / n."""

    loo_residual: Float[Tensor, "batch classes"]
    """x_i, with which the removal acts: see `loo_residual`; r_i itself where the curvature is factored."""
    loo_logit_delta: Float[Tensor, "batch classes"]
    """K_i x_i: the sample's leave-one-out logits minus its logits."""
    solved_norm: Float[Tensor, " batch"]
    """||H^-1 (x_i (x) h_i)||^2."""


def contrasts(classes: int) -> Float[Tensor, "classes contrasts"]:
    """Orthonormal columns that are orthogonal to the ones, Helmert's contrasts; [classes, classes - 1], float64."""
    columns = torch.ones(classes, classes, dtype=torch.float64).triu()[:, :-1]
    size = torch.arange(1, classes, dtype=torch.float64)
    columns[size.long(), size.long() - 1] = -size
    return columns / (size * (size + 1)).sqrt()


def among_contrasts(
    probabilities: Float[Tensor, "batch classes"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Q^T S_i Q for the contrasts Q, as (lower, upper, diagonal), each [batch, classes - 1].

    The product is symmetric, and entry (j, k) is lower_j upper_k for j < k: with a_k = 1 / sqrt((k + 1) (k + 2)) the
    column k of Q is a_k (k + 1 ones, then -(k + 1), then zeros), so that

        lower_k = (Q^T p)_k,  upper_k = a_k (sum_{l > k} p_l + (k + 1) p_{k+1}),
        diagonal_k = a_k^2 (sum_{l <= k} p_l + (k + 1)^2 p_{k+1}) - lower_k^2.
    """
    size = torch.arange(1, probabilities.shape[1], dtype=torch.float64)
    scale, size = (size * (size + 1)).rsqrt().to(probabilities), size.to(probabilities)
    first = probabilities.cumsum(dim=1)[:, :-1]
    last = probabilities.flip(1).cumsum(dim=1).flip(1)[:, 1:]
    following = size * probabilities[:, 1:]
    lower = scale * (first - following)
    return lower, scale * (last + following), scale.square() * (first + size * following) - lower.square()


def loo_residual(
    residual: Float[Tensor, "batch basis"],
    s: Float[Tensor, "batch basis basis"],
    leverage: Float[Tensor, "batch basis basis"],
) -> Float[Tensor, "batch basis"]:
    """x_i = (I - S_i K_i)^-1 r_i, with which the removal of a sample acts on the probe; `s` is S_i, `leverage` K_i.

    All three in one orthonormal basis, of all classes or of the contrasts, which hold r_i and what S_i maps to.
    One Newton step on the objective without sample i, whose gradient is -g_i / n and whose curvature is
    H_i = H - S_i (x) h_i h_i^T / n, is H_i^-1 g_i / n = H^-1 (x_i (x) h_i) / n (Woodbury). To first order x_i is the
    residual at the leave-one-out logits z_i + K_i x_i, whence its name.
    """
    system = torch.eye(residual.shape[1], dtype=residual.dtype, device=residual.device) - s @ leverage
    return torch.linalg.solve(system, residual[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class ExactCurvature:
    """H^-1 among the contrasts Q of the classes (`contrasts`), as a tensor [classes - 1, d, classes - 1, d].

    S_i times the ones is 0, and so is the sum of r_i. Along the ones H is the l2 alone, and nothing has a part there.
    """

    inverse: Float[Tensor, "contrasts dim contrasts dim"]
    l2: float
    count: int

    # the intermediate [batch, classes - 1, classes - 1, d] is kept under 64 MB, and with few classes near a CPU's
    # caches: with more samples at a time each took up to 1.7 times as long
    _CHUNK = 16_000_000
    _ROWS = 128

    def influence(self, features: Tensor, residual: Tensor, probabilities: Tensor) -> Influence:
        size, dim = self.inverse.shape[:2]
        inverse, basis = self.inverse.to(features), contrasts(size + 1).to(features)
        # [d, (C - 1)^2 d]: one matrix product serves the leverage and the solve
        unfolded = inverse.permute(1, 0, 2, 3).reshape(dim, -1)
        loo_residuals, deltas, norms = [], [], []
        step = max(1, min(self._ROWS, self._CHUNK // (size * size * dim)))
        batch = zip(features.split(step), residual.split(step), probabilities.split(step), strict=True)
        for h, r, p in batch:
            rows = (h @ unfolded).view(len(h), size, size, dim)
            k = torch.einsum("bcke,be->bck", rows, h) / self.count
            lower, upper, diagonal = among_contrasts(p)
            above = (lower[:, :, None] * upper[:, None, :]).triu(1)
            x = loo_residual(r @ basis, above + above.transpose(1, 2) + torch.diag_embed(diagonal), k)
            loo_residuals.append(x @ basis.T)
            deltas.append(torch.einsum("bck,bk->bc", k, x) @ basis.T)
            norms.append(torch.einsum("bcke,bc->bke", rows, x).square().sum(dim=(1, 2)))
        return Influence(torch.cat(loo_residuals), torch.cat(deltas), torch.cat(norms))


@dataclass(frozen=True)
class EkfacCurvature:
    """H^-1 = (U_B (x) U_A) diag(1 / (eigenvalues + l2)) (U_B (x) U_A)^T.

    Its K_i is no leverage in the strict sense: eigenvalues of S_i K_i exceed 1 for a sample that nearly alone has
    some feature (measured: up to 8), and (I - S_i K_i)^-1 changes sign there. Read as the leverage without i,
    K_i (I - S_i K_i)^-1, it needs no correction: x_i = r_i. Bounded forms of x_i were measured against refits and
    are not better on the whole.
    """

    feature_basis: Float[Tensor, "dim dim"]
    class_basis: Float[Tensor, "classes classes"]
    eigenvalues: Float[Tensor, "classes dim"]
    l2: float
    count: int

    def influence(self, features: Tensor, residual: Tensor, probabilities: Tensor) -> Influence:
        class_basis = self.class_basis.to(features)
        inverse = 1.0 / (self.eigenvalues.to(features) + self.l2)
        squares = (features @ self.feature_basis.to(features)).square()
        rotated = residual @ class_basis
        # K_i = U_B diag(k_i) U_B^T with one U_B for all samples: a product costs C^2, not C^3
        delta = (rotated * (squares @ inverse.T)) @ class_basis.T / self.count
        return Influence(residual, delta, (rotated.square() * (squares @ inverse.square().T)).sum(dim=1))


def hessian_block(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor]:
    """Sum over a block of Q^T S_i Q (x) h_i h_i^T, as a matrix [(classes - 1) * d, (classes - 1) * d].

    Q are the contrasts of the classes.
    """
    lower, upper, diagonal = among_contrasts(class_probabilities(features, weights)[1])
    (batch, dim), size = features.shape, diagonal.shape[1]
    total = features.new_zeros(size * dim, size * dim)
    for c in range(size):
        # the block row of contrast c, for all k >= c; the rest by symmetry
        row = torch.cat([diagonal[:, c : c + 1], lower[:, c : c + 1] * upper[:, c + 1 :]], dim=1)
        others = (row[:, :, None] * features[:, None, :]).reshape(batch, (size - c) * dim)
        rows = features.T @ others
        total[c * dim : (c + 1) * dim, c * dim :] = rows
        total[c * dim :, c * dim : (c + 1) * dim] = rows.T
    return (total,)


def class_factor(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor]:
    """Sum over a block of S_i = diag(p_i) - p_i p_i^T, [classes, classes]."""
    _, p = class_probabilities(features, weights)
    return (torch.diag(p.sum(dim=0)) - p.T @ p,)


def corrected_eigenvalues(
    features: Tensor, labels: Tensor, weights: Tensor, feature_basis: Tensor, class_basis: Tensor
) -> tuple[Tensor]:
    """Sum over a block of the diagonal of S_i (x) h_i h_i^T in the factors' basis, [classes, d]."""
    _, p = class_probabilities(features, weights)
    basis = class_basis.to(features)
    variance = p @ basis.square() - (p @ basis).square()
    return (variance.T @ (features @ feature_basis.to(features)).square(),)


def measure(reduce: Reduce, probe: Probe, kind: Kind) -> Curvature:
    """The curvature at the probe's optimum.

    Raises SingularCurvatureError where it is not positive definite (`exact`: among the contrasts).
    """
    classes, dim = probe.weights.shape
    n, l2 = probe.count, probe.l2
    if kind == "exact":
        hessian = reduce(hessian_block, probe.weights)[0].double() / n
        hessian.diagonal().add_(l2)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            raise SingularCurvatureError(
                f"the probe's curvature is not positive definite (probe.l2 = {l2:g}); a larger probe.l2 makes it so"
            )
        inverse = torch.cholesky_inverse(factor).view(classes - 1, dim, classes - 1, dim)
        return ExactCurvature(inverse.float(), l2, n)
    _, second = reduce(second_moment)
    feature_basis = torch.linalg.eigh(second.double() / n).eigenvectors
    class_basis = torch.linalg.eigh(reduce(class_factor, probe.weights)[0].double() / n).eigenvectors
    eigenvalues = reduce(corrected_eigenvalues, probe.weights, feature_basis, class_basis)[0] / n
    return EkfacCurvature(feature_basis.float(), class_basis.float(), eigenvalues.clamp_min(0).float(), l2, n)
