"""Evaluate: the model on what was never trained on and never cleaned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from posttrain.cluster.network import Network
from posttrain.influence import probe
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.held_out import corrected_loss
from posttrain.influence.probe import Reduce, Standardizer
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.embed import features_of
from posttrain.runs.networks import feature_network, head_layers, linear_head
from posttrain.runs.stored_samples import stored
from posttrain.store.features import read_shard


def evaluate(run: Run, state: State[Network, Any], model: Network, *, may_quarantine: bool = True) -> dict[str, float]:
    """Accuracy and cross-entropy on the validation and the test set; `may_quarantine` as in `features_of`."""
    splits = [name for name in ("validation", "test") if name in run.splits]
    backbone, layers = _features_of_head(run, state, model, splits, may_quarantine=may_quarantine)
    with run.progress.step("evaluate") as tell:
        metrics = _of_linear_head(run, backbone, layers, *linear_head(model))
        total = sum(run.splits[name].rows for name in splits)
        tell(total, total)
    return metrics


def held_out_loss(run: Run, state: State[Network, Any], model: Network, transition: torch.Tensor) -> float:
    """`influence.held_out` of the model on the validation labels, whose transition matrix is given."""
    backbone, layers = _features_of_head(run, state, model, ["validation"], may_quarantine=False)
    reduce, weights = _on_raw_features(run, backbone, "validation", layers, *linear_head(model))
    return corrected_loss(reduce, weights, transition).mean


def _features_of_head(
    run: Run, state: State[Network, Any], model: Network, splits: Sequence[str], *, may_quarantine: bool
) -> tuple[str, tuple[str, ...]]:
    """The feature store of what the model's head takes, with these splits in it, and the layers."""
    network = feature_network(model, state.base)
    backbone, _ = features_of(run, network, state.live, splits, may_quarantine=may_quarantine)
    layers = head_layers(model, network)
    assert layers is not None, "a network's head takes its own features"
    return backbone, layers


def of_boundary(run: Run, backbone: str, boundary: ProbeEnsemble) -> dict[str, float]:
    """The same of the boundary of an ensemble."""
    weight, bias = boundary.fold()
    return _of_linear_head(run, backbone, boundary.layers, weight.float(), bias.float())


def _of_linear_head(
    run: Run, backbone: str, layers: tuple[str, ...], weight: torch.Tensor, bias: torch.Tensor
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ("validation", "test"):
        if name in run.splits:
            reduce, weights = _on_raw_features(run, backbone, name, layers, weight, bias)
            count, loss, correct, _ = reduce(probe.loss_gradient, weights)
            metrics |= {f"{name}_accuracy": float(correct / count), f"{name}_loss": float(loss / count)}
    return metrics


def by_class(
    run: Run, state: State[Network, Any], model: Network, *, on: Network | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Held-out samples of each class, and how many of them the model gets right.

    On the test set, where there is one, else on the validation set. `on`: a network whose features are in the store;
    where the model is not this network with a new head, the images go through the model itself.
    """
    split = "test" if "test" in run.splits else "validation"
    on = on or feature_network(model, state.base)
    names = head_layers(model, on)
    if names is None:
        on = model = replace(model, spec=replace(model.spec, layers=(model.spec.head,)))
        names = (model.spec.head,)
    backbone, _ = features_of(run, on, state.live, [split])
    reduce, weights = _on_raw_features(run, backbone, split, names, *linear_head(model))
    samples, correct = reduce(probe.class_hits, weights)
    return tuple(map(int, samples.tolist())), tuple(map(int, correct.tolist()))


def _on_raw_features(
    run: Run, backbone: str, split: str, layers: tuple[str, ...], weight: torch.Tensor, bias: torch.Tensor
) -> tuple[Reduce, torch.Tensor]:
    """Sums over a split's raw features of these layers, and the weights of a linear head as they take it."""
    path = run.folder.features(backbone, split, run.splits[split].partitions[0].index)
    sizes = [matrix.shape[1] for matrix in read_shard(run.folder, path, layers).features.values()]
    # one block of columns and its 1 per layer: the bias goes with the first
    parts = []
    for at, own in enumerate(weight.split(sizes, dim=1)):
        parts += [own, (bias if at == 0 else torch.zeros_like(bias))[:, None]]
    standardizers = tuple(Standardizer(torch.zeros(size).double(), torch.ones(size).double()) for size in sizes)
    return stored(run, backbone, split).standardised(layers, standardizers), torch.cat(parts, dim=1)
