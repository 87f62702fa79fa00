"""A network that ends in one linear probe on several of its layers: a torch module to train and to serve."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision import models
from posttrain.vision.embedding import INPUT, Capture, StopForward
from posttrain.vision.layers import check

FACTORY = "posttrain.vision.probed_network:build"
"""The `model.factory` of a network that ends in a probe."""

_CAPTURE: ContextVar[Capture | None] = ContextVar("capture", default=None)
"""What the `ProbedNetwork` that runs in this thread captures: the hooks are never removed, and threads share them."""


def _capture_output(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
    capture = _CAPTURE.get()
    if capture is not None:
        capture.add(name, output)


class ProbedNetwork(nn.Module):
    """A network up to the last of some layers, `network`, and one linear probe on all their features, `probe`.

    The probe sees the layers side by side, in the order given: a mean of probes on each of them is such a probe.
    Modules behind the last layer do not run and are removed: a submodule that neither runs nor has a parameter in
    use for the features, in evaluation mode, is replaced by nn.Identity, as is the network's own head in any case; an
    unused parameter that is left over does not require a gradient. `network` alone is of no use: what it returns has
    lost its meaning.
    """

    layers_and_width: Tensor

    # a parameter that is made in inference mode can never be trained
    @torch.inference_mode(False)
    def __init__(
        self, network: nn.Module, head: str, layers: Sequence[str], width: int, classes: int, example: Tensor
    ) -> None:
        super().__init__()
        self.network = network
        self.network_head = head
        self.layers = tuple(layers)
        self.width = width
        # a part of the digests: the same tensors give other features at other layers or another width
        text = "\n".join([*layers, str(width)]).encode()
        self.register_buffer("layers_and_width", torch.tensor(list(text), dtype=torch.uint8), persistent=False)
        _replace(network, network.get_submodule(head), nn.Identity())
        for name in self.layers:
            if name != INPUT:
                network.get_submodule(name).register_forward_hook(functools.partial(_capture_output, name))
        self.eval()
        # a copy: no gradient can be taken through an example that was made in inference mode
        self._remove_unused_modules(example.clone())
        with torch.no_grad():
            self.probe = nn.Linear(self.features(example).shape[1], classes)
        self.train()

    def features(self, batch: Tensor) -> Tensor:
        """The probe's input [n, d], float32, with gradients: the `layer_features` of the layers side by side."""
        capture = Capture(self.layers, self.network_head, self.width, batch)
        if not capture.done():
            before = _CAPTURE.set(capture)
            try:
                self.network(batch)
            except StopForward as stop:
                # the capture of a caller who embeds a layer of this network ends the pass, too
                if stop.capture is not capture:
                    raise
            else:
                raise capture.missing()
            finally:
                _CAPTURE.reset(before)
        return torch.cat([capture.found[name] for name in self.layers], dim=1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.probe(self.features(batch).to(self.probe.weight.dtype))

    @torch.enable_grad()
    def _remove_unused_modules(self, example: Tensor) -> None:
        called: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in self.network.modules()
        ]
        trainable = {parameter: parameter.requires_grad for parameter in self.network.parameters()}
        # frozen parameters count as used, too
        for parameter in trainable:
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            features = self.features(example)
        finally:
            for hook in hooks:
                hook.remove()
        candidates = [parameter for parameter in trainable if parameter.requires_grad]
        gradients = (
            torch.autograd.grad(features.sum(), candidates, allow_unused=True)
            if features.requires_grad
            else [None] * len(candidates)
        )
        used = {parameter for parameter, found in zip(candidates, gradients, strict=True) if found is not None}
        for parameter, was_trainable in trainable.items():
            parameter.requires_grad_(was_trainable and parameter in used)
        _remove_unused(self.network, called, used)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module by another one, under each of its names."""
    for name, module in [*network.named_modules(remove_duplicate=False)]:
        if name and module is old:
            network.set_submodule(name, new)


def _remove_unused(module: nn.Module, called: Collection[nn.Module], used: Collection[nn.Parameter]) -> None:
    for name, child in module.named_children():
        parameters = [*child.parameters()]
        # a parameter can be used without its module's running: nn.MultiheadAttention's out_proj
        if parameters and not any(p in used for p in parameters) and not any(m in called for m in child.modules()):
            setattr(module, name, nn.Identity())
        else:
            _remove_unused(child, called, used)


@torch.inference_mode(False)
def build(
    classes: int,
    *,
    network: str,
    arguments: dict[str, Any] | None = None,
    network_head: str | None = None,
    layers: Sequence[str],
    width: int,
    size: Sequence[int],
) -> nn.Module:
    """The network of a factory (see `models.build`) up to the last of `layers`, with one untrained probe on them all.

    A `ProbedNetwork`; this function is itself a factory, FACTORY. `size` is (channels, height, width) of the images.
    Raises ModelError where the network cannot be built, or where one of the layers cannot have a probe.
    """
    if not layers or len(set(layers)) < len(layers):
        raise ModelError(f"layers are {list(layers)}; name at least one, and each once")
    whole = models.build(network, classes=classes, arguments=arguments or {})
    if isinstance(whole, ProbedNetwork):
        raise ModelError("the network ends in a probe itself; name its own network and layers of that")
    head = models.find_head(whole, classes=classes, name=network_head)
    if set(layers) == {head}:
        raise ModelError(f"layer {head!r} is the head: the network as it is has its probe there")
    example = torch.zeros(2, *size)
    check(whole, head, layers, example)
    return ProbedNetwork(whole, head, layers, width, classes, example)


def with_probe(
    model: nn.Module,
    head: str,
    layers: Sequence[str],
    width: int,
    weight: Tensor,
    bias: Tensor,
    *,
    factory: str,
    arguments: Mapping[str, Any],
    size: Sequence[int],
) -> tuple[str, dict[str, Any], ProbedNetwork]:
    """A trained model up to the last of `layers`, with a probe of weight [classes, d] and bias [classes] on them.

    `factory` and `arguments` are those that built the model; d is the number of features of all layers side by side,
    in the order given. Returned are the factory and the arguments (JSON types, as far as `arguments` has such) that
    build the `ProbedNetwork` anew, and the `ProbedNetwork` itself, on the CPU; the model stays as it is. Of a model
    that is a `ProbedNetwork`, only the probe can be replaced: `layers` are its head alone, and `width` and `size`
    remain what they were. Raises ModelError as `build` does and where the factory does not give the model's modules,
    ValueError where the weights do not fit the features.
    """
    trained = model
    if factory == FACTORY:
        assert isinstance(model, ProbedNetwork), f"{FACTORY} builds nothing else"
        if tuple(layers) != (head,):
            raise ModelError(
                f"the model ends in a probe on {', '.join(model.layers)}, which can only be replaced: "
                f"name {head!r} alone instead of {', '.join(layers)}, or start from the network below the probe"
            )
        trained, recipe = model.network, dict(arguments)
    else:
        recipe = {
            "network": factory,
            "arguments": dict(arguments),
            "network_head": head,
            "layers": list(layers),
            "width": width,
            "size": list(size),
        }
    made = build(len(weight), **recipe)
    assert isinstance(made, ProbedNetwork)
    own, given = made.network.state_dict(), trained.state_dict()
    unfit = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if unfit:
        raise ModelError(f"model.factory {factory!r} called with {dict(arguments)} has other weights: {unfit[0]}")
    # taken from the original state_dict, which carries the versions of its modules (mnasnet asks for them)
    for key in given.keys() - own.keys():
        del given[key]
    made.network.load_state_dict(given)
    models.replace_head(made, "probe", weight, bias)
    return FACTORY, recipe, made
