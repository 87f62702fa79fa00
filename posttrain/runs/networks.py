"""Networks of a run: built from weights, kept as checkpoints of its rounds, and described by their recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from posttrain.cluster.network import Network, load_network
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.schema import ModelSpec
from posttrain.vision import models
from posttrain.vision.probed_network import FACTORY, ProbedNetwork
from posttrain.vision.weights import load_bytes, weights_digest


def network_of(run: Run, weights: bytes, spec: ModelSpec | None = None) -> Network:
    """A network with these weights: the run's own, or that of another recipe."""
    spec = spec or run.inputs.spec
    model = models.build(spec.factory, classes=spec.classes, arguments=spec.arguments)
    load_bytes(model, weights)
    return Network(spec, weights, weights_digest(model), run.config.ray.precision)


def initial_network(run: Run, model: Network) -> Network | None:
    """The network with its initial weights; None where the rounds have no use for it."""
    if run.config.refine.scope != "auto" or run.inputs.initial_weights is None:
        return None
    initial = network_of(run, run.inputs.initial_weights)
    return None if initial.backbone == model.backbone else initial


def recipe(spec: ModelSpec) -> dict[str, Any]:
    """What builds the model anew: factory, arguments, head."""
    return {"factory": spec.factory, "arguments": spec.arguments, "head": spec.head}


def write_checkpoint(run: Run, number: int, model: Network) -> None:
    """Keep the model as that of round `number`."""
    run.folder.write_bytes(run.folder.checkpoint(number), model.weights)
    run.folder.write_json(run.folder.round(number, "checkpoint", "model.json"), recipe(model.spec))


def read_checkpoint(run: Run, number: int) -> Network:
    """The model of round `number`."""
    weights = run.folder.read_bytes(run.folder.checkpoint(number))
    return network_from(run, weights, run.folder.read_json(run.folder.round(number, "checkpoint", "model.json")))


def network_from(run: Run, weights: bytes, kept: dict[str, Any]) -> Network:
    """The network of these weights and of a recipe that was kept."""
    spec = run.inputs.spec
    if kept["head"] != spec.head or kept["factory"] != spec.factory:
        spec = replace(spec, **kept, layers=(kept["head"],))
    return network_of(run, weights, spec)


def feature_network(model: Network, base: Network) -> Network:
    """The network whose features the model's head takes: the base where the model is that with a new head."""
    return model if head_layers(model, base) is None else base


def network_of_round(run: Run, state: State[Network, Any]) -> Network:
    """The network whose features the round after this state takes."""
    return state.base if run.config.refine.keeps_backbone else feature_network(state.model, state.base)


def linear_head(model: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the model's last layer."""
    head = models.head_of(load_network(model), model.spec.head)
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
    return head.weight.detach(), bias


def head_layers(model: Network, on: Network) -> tuple[str, ...] | None:
    """The layers of `on` whose features the model's head takes; None where the model is not `on` with a new head."""
    if model.backbone == on.backbone:
        return (model.spec.head,)
    if model.spec.factory != FACTORY:
        return None
    arguments = model.spec.arguments
    names = tuple(arguments["layers"])
    if arguments["width"] != on.spec.width or arguments["network"] != on.spec.factory or set(names) - {*on.spec.layers}:
        return None
    own, given = load_network(model), load_network(on).state_dict()
    assert isinstance(own, ProbedNetwork), f"{FACTORY} builds nothing else"
    kept = own.network.state_dict()
    same = all(key in given and torch.equal(given[key], tensor) for key, tensor in kept.items())
    return names if same else None
