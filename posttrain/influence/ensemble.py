"""The probe ensemble: probes on several layers, chosen by validation labels that are as noisy as the rest.

The ensemble's logits are the mean of its probes' logits. That is one linear head again, on the features of all its
layers side by side; its decision boundary is the boundary of a round. A sample is left out of the ensemble by leaving
it out of each member's fit.

Nothing here knows where the samples are: a `Samples` sums block functions over them, on the features of the layers
that it is asked for.
"""

# torch.linalg, Tensor.norm and Tensor.split carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.errors import FeaturelessError
from posttrain.influence import probe as probes
from posttrain.influence.probe import Probe, Reduce, Standardizer

MAX_MEMBERS = 4
"""Each costs a fit and a curvature in every round."""

_COMPARISON_TOLERANCE = 1e-3
"""Norm of the gradient at which the fit of a candidate ends, since it is only compared."""

Change = Callable[[Tensor, Tensor], tuple[float, float]]
"""(weights before, weights after) -> (mean, standard error) of the change in validation cross-entropy by sample."""


@runtime_checkable
class Samples(Protocol):
    """Live or validation samples with the features of several layers."""

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        """Sums over the layers' features side by side, as they are."""
        ...

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        """Sums over the layers' features side by side, each layer's standardised and followed by a 1."""
        ...


@dataclass(frozen=True)
class Fit:
    """A candidate that was fitted: its layer, its probe, and its loss and accuracy on the validation samples."""

    layer: str
    probe: Probe
    loss: float
    """Mean cross-entropy on the validation labels, which are as noisy as the rest."""
    accuracy: float
    """On the same labels."""

    @property
    def l2(self) -> float:
        return self.probe.l2


@dataclass(frozen=True)
class ProbeEnsemble:
    """Probes on some layers, in the order of the members."""

    layers: tuple[str, ...]
    standardizers: tuple[Standardizer, ...]
    probes: tuple[Probe, ...]
    loss: float
    """Mean cross-entropy of the mean logits on the validation labels, which are as noisy as the rest."""
    accuracy: float
    """On the same labels."""
    tried: tuple[Fit, ...] = ()
    """All candidates, where the members were chosen from them."""

    @property
    def members(self) -> tuple[tuple[str, float], ...]:
        """(layer, l2) of each member: what a refit takes."""
        return tuple((layer, fitted.l2) for layer, fitted in zip(self.layers, self.probes, strict=True))

    @property
    def weights(self) -> Float[Tensor, "classes dim"]:
        """The linear head on the members' standardised features side by side, each followed by a 1."""
        return stacked([fitted.weights for fitted in self.probes])

    def parts(self, features: Float[Tensor, "batch dim"]) -> list[Tensor]:
        """Each member's own columns of features side by side."""
        return list(features.split([fitted.weights.shape[1] for fitted in self.probes], dim=1))

    def fold(self) -> tuple[Float[Tensor, "classes raw"], Float[Tensor, " classes"]]:
        """(weight, bias) of the Linear on the members' raw features side by side that equals the ensemble."""
        folded = [s.fold(fitted.weights) for s, fitted in zip(self.standardizers, self.probes, strict=True)]
        count = len(folded)
        bias = torch.stack([bias for _, bias in folded]).mean(dim=0)
        return torch.cat([weight / count for weight, _ in folded], dim=1), bias


def choose(
    live: Samples,
    validation: Samples,
    *,
    candidates: Sequence[tuple[str, float]],
    classes: int,
    most: int = MAX_MEMBERS,
) -> ProbeEnsemble:
    """The best ensemble of probes on the candidates (layer, l2); see `choose_members`.

    Every candidate is fitted on the live samples and compared on the validation samples. A layer whose features are all
    constant is no candidate; raises FeaturelessError where there is no other.
    """
    named = tuple(dict.fromkeys(layer for layer, _ in candidates))
    found = zip(named, standardizers_of(live, named), strict=True)
    usable = {layer: standardizer for layer, standardizer in found if standardizer.varies}
    if not usable:
        raise FeaturelessError(f"its features are constant in {', '.join(named)}")
    layers, standardizers = tuple(usable), tuple(usable.values())
    tried: list[Fit] = []
    for layer, standardizer in zip(layers, standardizers, strict=True):
        start: Tensor | None = None
        for l2 in sorted((d for name, d in candidates if name == layer), reverse=True):
            fitted = _fitted(live, layer, standardizer, l2, classes, start=start, tolerance=_COMPARISON_TOLERANCE)
            start = fitted.weights
            loss, accuracy = _loss_and_accuracy(validation.standardised((layer,), (standardizer,)), fitted.weights)
            tried.append(Fit(layer, fitted, loss, accuracy))
    widths = [len(standardizer.mean) + 1 for standardizer in standardizers]
    columns = dict(zip(layers, accumulate(widths, initial=0), strict=False))
    sums = validation.standardised(layers, standardizers)

    def change(before: Tensor, after: Tensor) -> tuple[float, float]:
        return mean_and_error(*sums(paired_losses, before, after))

    members = choose_members(tried, columns, sum(widths), change, most=most)
    # from zero, as any later refit: the same members on the same samples give the same bits
    ensemble = refit(live, validation, [(fit.layer, fit.l2) for fit in members], classes=classes)
    return replace(ensemble, tried=tuple(tried))


def refit(
    live: Samples,
    validation: Samples,
    members: Sequence[tuple[str, float]],
    *,
    classes: int,
) -> ProbeEnsemble:
    """The ensemble of these members (layer, l2), fitted on the live samples."""
    layers = tuple(layer for layer, _ in members)
    standardizers = standardizers_of(live, layers)
    fitted = tuple(
        _fitted(live, layer, standardizer, l2, classes, start=None)
        for (layer, l2), standardizer in zip(members, standardizers, strict=True)
    )
    weights = stacked([member.weights for member in fitted])
    loss, accuracy = _loss_and_accuracy(validation.standardised(layers, standardizers), weights)
    return ProbeEnsemble(layers, standardizers, fitted, loss, accuracy)


def standardizers_of(live: Samples, layers: tuple[str, ...]) -> tuple[Standardizer, ...]:
    """The standardizer of each layer's features, on the live samples."""
    found: list[Standardizer] = []
    for layer in layers:
        found.append(Standardizer.from_moments(*live.raw((layer,))(probes.moments)))
    return tuple(found)


def stacked(weights: Sequence[Tensor]) -> Float[Tensor, "classes dim"]:
    """Members' weights [classes, d] side by side, over their number: the head that gives their mean logits."""
    return torch.cat([own.double() for own in weights], dim=1) / len(weights)


def _fitted(
    live: Samples,
    layer: str,
    standardizer: Standardizer,
    l2: float,
    classes: int,
    *,
    start: Tensor | None,
    tolerance: float = 1e-6,
) -> Probe:
    return probes.fit(
        live.standardised((layer,), (standardizer,)),
        classes=classes,
        dim=len(standardizer.mean) + 1,
        l2=l2,
        start=start,
        tolerance=tolerance,
    )


def _loss_and_accuracy(reduce: Reduce, weights: Tensor) -> tuple[float, float]:
    count, loss, correct, _ = reduce(probes.loss_gradient, weights)
    return float(loss / count), float(correct / count)


def paired_losses(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    before: Float[Tensor, "classes dim"],
    after: Float[Tensor, "classes dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a block of: 1, the change in cross-entropy from `before` to `after`, its square."""

    def losses(weights: Tensor) -> Tensor:
        logits = features @ weights.to(features).T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()

    change = losses(after) - losses(before)
    count = torch.tensor(float(len(labels)), dtype=torch.float64)
    return count, change.sum(), change.square().sum()


def mean_and_error(count: Tensor, total: Tensor, square: Tensor) -> tuple[float, float]:
    """(mean, standard error) from sums of a number, of values and of their squares."""
    n = float(count)
    mean = float(total) / n
    variance = max(0.0, float(square) / n - mean**2)
    return mean, (variance / n) ** 0.5


def choose_members(
    fits: Sequence[Fit], columns: dict[str, int], dim: int, change: Change, *, most: int = MAX_MEMBERS
) -> tuple[Fit, ...]:
    """The members: the best fit, then the best fits of other layers, as long as they do not make the ensemble worse.

    Of every layer only the l2 with the lowest validation cross-entropy counts. The layers come in the order of that
    loss, and each joins unless the ensemble's validation cross-entropy rises by more than one standard error of the
    change. Measured on 46 networks (digits, Fashion-MNIST, CIFAR-10N; nine kinds of noise; memorised or not), against
    the best fit alone: mean average precision 0.80 instead of 0.78, test accuracy 72 % instead of 71 %. `columns`:
    where each layer's features begin among all `dim` of them.
    """
    best: dict[str, Fit] = {}
    for fit in fits:
        if fit.layer not in best or fit.loss < best[fit.layer].loss:
            best[fit.layer] = fit
    ranked = sorted(best.values(), key=lambda fit: fit.loss)

    def weights(members: Sequence[Fit]) -> Tensor:
        total = torch.zeros(len(members[0].probe.weights), dim, dtype=torch.float64)
        for fit in members:
            first = columns[fit.layer]
            total[:, first : first + fit.probe.weights.shape[1]] = fit.probe.weights / len(members)
        return total

    members = ranked[:1]
    for fit in ranked[1:]:
        if len(members) == most:
            break
        mean, error = change(weights(members), weights([*members, fit]))
        if mean <= error:
            members.append(fit)
    return tuple(members)
