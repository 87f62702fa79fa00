"""The probe: a linear softmax head fitted on frozen features, by Newton's method on sums over blocks.

With h_i the standardised features of sample i and a 1 appended (length d), p_i = softmax(W h_i) and y_i the
one-hot given label, the probe minimises

    L(W) = (1/n) sum_i -log p_i[y_i] + (l2/2) ||W||^2,      W: [classes, d], the last column is the bias.

Nothing here knows where the blocks are: `fit` is handed a `Reduce` that sums a function over all of them.
"""

# torch.linalg, Tensor.norm and Tensor.split carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.errors import SingularCurvatureError

BlockFn = Callable[..., tuple[Tensor, ...]]
"""(features [b, d] with the 1 appended, labels [b], *arguments) -> tensors that may be added over blocks."""


@runtime_checkable
class Reduce(Protocol):
    """Sums a block function over all live samples; the order of the additions must be fixed."""

    def __call__(self, fn: BlockFn, *arguments: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Standardizer:
    """Mean and standard deviation of every raw feature; the scale of a constant feature is 1."""

    mean: Float[Tensor, " raw"]
    scale: Float[Tensor, " raw"]
    varies: bool = True
    """Whether any feature is not constant."""

    @staticmethod
    def from_moments(count: Tensor, total: Tensor, square: Tensor) -> Standardizer:
        """From `moments` summed over all blocks (float64)."""
        mean = total / count
        variance = (square / count - mean**2).clamp_min(0)
        # what varies less than float16 can tell apart is constant: dividing by it would amplify rounding
        constant = variance <= (1e-3 * mean.abs().clamp_min(1e-3)) ** 2
        scale = torch.where(constant, torch.ones_like(variance), variance.sqrt())
        return Standardizer(mean, scale, not bool(constant.all()))

    def __call__(self, features: Float[Tensor, "batch raw"], dtype: torch.dtype = torch.float32) -> Tensor:
        """[batch, raw + 1]: standardised, a 1 appended."""
        mean, scale = self.mean.to(dtype=dtype), self.scale.to(dtype=dtype)
        standardised = (features.to(dtype) - mean.to(features.device)) / scale.to(features.device)
        return torch.cat([standardised, torch.ones_like(standardised[:, :1])], dim=1)

    def fold(self, weights: Float[Tensor, "classes dim"]) -> tuple[Tensor, Tensor]:
        """(weight [classes, raw], bias [classes]) of the Linear on raw features that equals the probe."""
        weight = weights[:, :-1].double() / self.scale
        return weight, weights[:, -1].double() - weight @ self.mean


@dataclass(frozen=True)
class Probe:
    """A fitted probe."""

    weights: Float[Tensor, "classes dim"]
    l2: float
    count: int
    """Samples that it was fitted on: the n of the formulas."""
    loss: float
    """Mean cross-entropy on those samples."""
    gradient_norm: float


def in_memory(
    features: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"], size: int | list[int] = 2048
) -> Reduce:
    """Sums over blocks of `size` samples, or of these sizes, held in memory; in float64 and in their order."""
    blocks = list(zip(features.split(size), labels.split(size), strict=True))

    def reduce(fn: BlockFn, *arguments: Tensor) -> tuple[Tensor, ...]:
        total: list[Tensor] | None = None
        for h, y in blocks:
            part = [t.double() for t in fn(h, y, *arguments)]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        return tuple(total or [])

    return reduce


def moments(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares of raw features, float64."""
    exact = features.double()
    return torch.tensor(float(len(exact)), dtype=torch.float64), exact.sum(0), exact.square().sum(0)


def class_probabilities(
    features: Float[Tensor, "batch dim"], weights: Float[Tensor, "classes dim"]
) -> tuple[Tensor, Tensor]:
    """(logits z, probabilities p), each [batch, classes], with the classes as the outer dimension in memory.

    There torch's softmax on a CPU works on many samples at a time; along a short inner dimension it took 7 times as
    long (10 classes), and was half of the time of a product with the Hessian.
    """
    logits = weights.to(features) @ features.T
    return logits.T, logits.softmax(dim=0).T


def hits(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Tensor:
    """bool [batch]: where the given label has the largest logit, the first of equal ones."""
    # argmax took 9 times as long with 10 classes
    return logits.T.max(dim=0).indices == labels


def residuals(
    features: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], weights: Float[Tensor, "classes dim"]
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits z, probabilities p, residuals r = p - y), each [batch, classes]."""
    logits, probabilities = class_probabilities(features, weights)
    residual = probabilities.clone()
    residual[torch.arange(len(labels), device=residual.device), labels] -= 1
    return logits, probabilities, residual


def loss_gradient(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over a block of: 1, cross-entropy, correct predictions, gradient r (x) h [classes, d]."""
    logits, _, residual = residuals(features, labels, weights)
    loss = -logits.T.log_softmax(dim=0).gather(0, labels[None])
    correct = hits(logits, labels)
    count = torch.tensor(float(len(labels)), dtype=torch.float64)
    return count, loss.double().sum(), correct.double().sum(), residual.T @ features


def class_hits(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a block of: samples of each class [classes], correct predictions among them [classes]."""
    logits, _ = class_probabilities(features, weights)
    right = labels[hits(logits, labels)]
    classes = len(weights)
    return labels.bincount(minlength=classes).double(), right.bincount(minlength=classes).double()


def hessian_product(features: Tensor, labels: Tensor, weights: Tensor, direction: Tensor) -> tuple[Tensor]:
    """Sum over a block of (S_i (x) h_i h_i^T) V with S_i = diag(p_i) - p_i p_i^T; V and result [classes, d]."""
    _, probabilities = class_probabilities(features, weights)
    p, change = probabilities.T, direction.to(features) @ features.T
    change = p * (change - (p * change).sum(dim=0))
    return (change @ features,)


def second_moment(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a block of: 1, h h^T [d, d]."""
    return torch.tensor(float(len(labels)), dtype=torch.float64), features.T @ features


def fit(
    reduce: Reduce,
    *,
    classes: int,
    dim: int,
    l2: float,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 50,
) -> Probe:
    """The probe at its optimum: Newton steps, each solved by preconditioned conjugate gradients.

    The preconditioner is the curvature at W = 0, which is Kronecker-factored exactly:
    (I/C - 11^T/C^2) (x) (1/n) sum h h^T. `tolerance` bounds the norm of the gradient of L, as far as
    float32 features allow. Raises SingularCurvatureError where the steps do not come to an end (features or labels that
    are not finite).
    """
    weights = torch.zeros(classes, dim, dtype=torch.float64) if start is None else start.double().clone()
    count, second = reduce(second_moment)
    if not bool(torch.isfinite(second).all()):
        raise SingularCurvatureError("the features hold values that are not finite")
    n = float(count)
    eigenvalues, basis = torch.linalg.eigh(second / n)
    # the eigenvalues of I/C - 11^T/C^2 are 1/C (C-1 times) and 0; 1/C for all is close enough
    inverse = 1.0 / (eigenvalues.clamp_min(0) / classes + l2)

    def precondition(vector: Tensor) -> Tensor:
        return ((vector @ basis) * inverse) @ basis.T

    def objective(at: Tensor) -> tuple[float, float, Tensor]:
        _, loss, _, gradient = reduce(loss_gradient, at)
        mean = float(loss) / n
        return mean + l2 / 2 * float(at.square().sum()), mean, gradient / n + l2 * at

    value, loss, gradient = objective(weights)
    for _ in range(max_steps):
        norm = float(gradient.norm())
        if norm <= tolerance:
            return Probe(weights, l2, round(n), loss, norm)
        direction = _conjugate_gradients(
            lambda v, at=weights: reduce(hessian_product, at, v)[0] / n + l2 * v,
            -gradient,
            precondition,
            tolerance=min(0.1, norm**0.5) * norm,
        )
        slope = float((gradient * direction).sum())
        if not math.isfinite(slope):
            raise SingularCurvatureError("the probe's loss is not finite; a larger probe.l2 makes it converge")
        step = _line_search(objective, weights, direction, value, slope, norm)
        if step is None:
            return Probe(weights, l2, round(n), loss, norm)
        length, (value, loss, gradient) = step
        weights = weights + length * direction
    raise SingularCurvatureError(
        f"the probe did not converge in {max_steps} Newton steps (gradient norm {float(gradient.norm()):.2g}); "
        "a larger probe.l2 makes it converge"
    )


def _line_search(
    objective: Callable[[Tensor], tuple[float, float, Tensor]],
    weights: Tensor,
    direction: Tensor,
    value: float,
    slope: float,
    norm: float,
) -> tuple[float, tuple[float, float, Tensor]] | None:
    """(length of the step, `objective` after it), halved until L falls enough (Armijo 1966); None at the optimum.

    `value`, `slope` and `norm` are L, its derivative along `direction`, and the norm of its gradient at `weights`.
    """
    length, whole = 1.0, objective(weights + direction)
    candidate = whole
    while not candidate[0] <= value + 1e-4 * length * slope:
        # float32 sums over blocks cannot tell smaller steps apart by their loss. If the whole Newton step does not
        # halve the gradient either, what remains of it is rounding: this is the optimum that can be reached
        if -slope * length <= 1e-7 * max(1.0, abs(value)):
            return (1.0, whole) if float(whole[2].norm()) <= norm / 2 else None
        length /= 2
        candidate = objective(weights + length * direction)
    return length, candidate


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_steps: int = 100,
) -> Tensor:
    """x with ||A x - right|| <= tolerance, A symmetric positive definite (Hestenes & Stiefel 1952)."""
    x = torch.zeros_like(right)
    residual = right.clone()
    scaled = precondition(residual)
    direction = scaled.clone()
    energy = (residual * scaled).sum()
    for _ in range(max_steps):
        image = product(direction)
        length = energy / (direction * image).sum()
        x = x + length * direction
        residual = residual - length * image
        if float(residual.norm()) <= tolerance:
            break
        scaled = precondition(residual)
        following = (residual * scaled).sum()
        direction = scaled + following / energy * direction
        energy = following
    return x
