"""Models: built by name or by the user's own factory, and their head, found and replaced."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from posttrain.errors import ModelError


def mlp(classes: int, *, inputs: int = 64, width: int = 128) -> nn.Module:
    """A network of two layers: flattened pixels, `width` ReLU units, the head."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(inputs, width),
            relu=nn.ReLU(),
            head=nn.Linear(width, classes),
        )
    )


def small_resnet(
    classes: int, *, width: int = 16, blocks: int = 1, channels: int = 3, stem_stride: int = 1
) -> nn.Module:
    """A ResNet for images of 28 to 32 pixels: a 3x3 stem and three stages of `blocks` basic blocks each.

    The stages have width, 2 * width and 4 * width channels and halve the image twice (He et al. 2016, section
    4.2: with width 16, depth is 6 * blocks + 2). A `stem_stride` of 2 halves it once more, at a quarter of the
    cost. Features: the 4 * width channels averaged over all pixels.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=_convolution(channels, width, 3, stem_stride), relu=nn.ReLU()
    )
    inputs = width
    for stage in range(3):
        outputs, stride = width * 2**stage, 1 if stage == 0 else 2
        shortcut = None if stage == 0 else _convolution(inputs, outputs, 1, stride)
        first = BasicBlock(inputs, outputs, stride, shortcut)
        rest = [BasicBlock(outputs, outputs) for _ in range(blocks - 1)]
        layers[f"stage{stage + 1}"] = nn.Sequential(first, *rest)
        inputs = outputs
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(inputs, classes))
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def build(factory: str, *, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that `factory` names, untrained: a torchvision classifier, or "package.module:function".

    The function is called with classes= and the arguments; the current directory is searched, too.
    Raises ModelError where the name leads to nothing or the call does not give a torch.nn.Module.
    """
    if ":" in factory:
        make = _imported(factory)
        settings = {"classes": classes, **arguments}
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if factory not in known:
            raise ModelError(
                f"model.factory {factory!r} is no classifier of torchvision{_nearest(factory, known)}; "
                "a function of your own is written package.module:function"
            )
        make = torchvision.models.get_model_builder(factory)
        settings = {"weights": None, "num_classes": classes, **arguments}
    try:
        model = make(**settings)
    except Exception as error:  # the user's own code: whatever it raises, this is where it came from
        raise ModelError(
            f"model.factory {factory!r} called with {settings} failed: {error_line(error)}; check model.arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.factory {factory!r} returned {type(model).__name__}; return a torch.nn.Module")
    return model


def find_head(model: nn.Module, *, classes: int, name: str | None = None) -> str:
    """The dotted name of the head: the last nn.Linear with `classes` outputs, or `name` if it is such a one.

    Raises ModelError with the Linear modules that could be meant.
    """
    modules = dict(model.named_modules())
    linear = {path: module for path, module in modules.items() if path and isinstance(module, nn.Linear)}
    fitting = [path for path, module in linear.items() if module.out_features == classes]
    sizes = [f"{path} ({module.in_features} -> {module.out_features})" for path, module in linear.items()]
    listed = ", ".join(sizes) or "none"
    if name is None:
        if not fitting:
            raise ModelError(
                f"no Linear module of the model has {classes} outputs, one for each class (Linear modules: "
                f"{listed}); give the model such a head and name it by model.head, or correct data.classes"
            )
        return fitting[-1]
    if name in fitting:
        return name
    if name in linear:
        fault = f"has {linear[name].out_features} outputs for {classes} classes"
    elif name in modules:
        fault = f"is a {type(modules[name]).__name__}, not a Linear"
    else:
        fault = "does not exist"
    meant = ", ".join(fitting) or listed
    raise ModelError(f"model.head {name!r} {fault}; the Linear modules that could be meant: {meant}")


def head_of(model: nn.Module, head: str) -> nn.Linear:
    """The head by its dotted name, as `find_head` gives it."""
    module = model.get_submodule(head)
    assert isinstance(module, nn.Linear), f"{head} comes from find_head"
    return module


def replace_head(model: nn.Module, head: str, weight: Tensor, bias: Tensor) -> None:
    """Copies weight [classes, d] and bias [classes] into the head; a head without a bias gets one unless it is 0.

    Raises ValueError where the shapes are not the head's.
    """
    linear = head_of(model, head)
    if weight.shape != linear.weight.shape or bias.shape != linear.weight.shape[:1]:
        raise ValueError(
            f"head {head!r} has weight {tuple(linear.weight.shape)}; "
            f"given are weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
        )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias)
        elif bias.any():
            linear.bias = nn.Parameter(bias.to(linear.weight, copy=True))


def _imported(factory: str) -> Any:
    module_name, _, function = factory.partition(":")
    # in front, as `python -m` has it: a console script searches its own folder instead of the user's
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code runs here
        raise ModelError(
            f"model.factory {factory!r}: {module_name!r} cannot be imported from {os.getcwd()} or the "
            f"installed packages ({error_line(error)}); install it, or start from the folder that holds it"
        ) from error
    make = getattr(module, function, None)
    if make is None:
        candidates = [name for name, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"model.factory {factory!r}: {module_name} has no function {function!r}"
            f"{_nearest(function, candidates)}; write package.module:function"
        )
    if not callable(make):
        raise ModelError(
            f"model.factory {factory!r} is a {type(make).__name__}, not a function; "
            "name one that takes classes= and returns a torch.nn.Module"
        )
    return make


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (nearest: {', '.join(near)})" if near else ""


def error_line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
