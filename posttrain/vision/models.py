"""Models: built by name or by the user's own factory, their head found, their weights loaded and saved."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
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
            f"model.factory {factory!r} called with {settings} failed: {_brief(error)}; check model.arguments"
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


def embed(model: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the head and what comes out: features [n, d] and logits [n, classes], both float32.

    One forward pass without gradients; leaves the model in evaluation mode. The logits are the head's own,
    whatever the model makes of them afterwards. Raises ModelError where the model cannot take the batch, the
    head does not run exactly once, or its input is not one vector per sample.
    """
    passes: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passes.append((inputs[0], output))

    hook = model.get_submodule(head).register_forward_hook(keep)
    model.eval()
    try:
        with torch.no_grad():
            model(batch)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot take a batch of shape {tuple(batch.shape)}: {_brief(error)}; "
            "do model.channels and model.image_size fit the model?"
        ) from error
    finally:
        hook.remove()
    if len(passes) != 1:
        raise ModelError(f"model.head {head!r} runs {len(passes)} times per forward pass; name one that runs once")
    features, logits = passes[0]
    if features.ndim != 2 or len(features) != len(batch):
        raise ModelError(
            f"the input of model.head {head!r} has shape {tuple(features.shape)} for {len(batch)} samples, "
            "not one vector for each; name a Linear behind the pooling or flattening"
        )
    return features.float(), logits.float()


def refuse_unsteady(model: nn.Module, head: str, batch: Tensor) -> None:
    """Raises ModelError where a sample's features are not finite, or depend on more than the sample.

    Runs the model on the batch of two or more twice, and on its first half with other samples beside it. Rounding
    differs with the size of a batch, by less than a ten-thousandth of the largest feature.
    """

    def differing(found: tuple[Tensor, Tensor], again: tuple[Tensor, Tensor]) -> bool:
        return any(
            float((one - other).abs().max()) > 1e-4 * max(float(one.abs().max()), 1e-3)
            for one, other in zip(found, again, strict=True)
        )

    half = len(batch) // 2
    found = embed(model, head, batch)
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise ModelError(
            f"what the model computes at model.head {head!r} is not finite for an image of random pixels; use other "
            "weights, or check model.mean and model.std"
        )
    if differing(found, embed(model, head, batch)):
        raise ModelError(
            f"the model gives other values at model.head {head!r} for the same images when it is run again, in "
            "evaluation mode; take the randomness out of its forward pass (dropout: training=self.training)"
        )
    beside = torch.cat([batch[:half], 3 * batch[half:].flip(-1) + 1, -batch])
    first = (found[0][:half], found[1][:half])
    of_first = embed(model, head, beside)
    if differing(first, (of_first[0][:half], of_first[1][:half])):
        raise ModelError(
            f"what the model computes at model.head {head!r} for an image depends on the other images of its batch, in "
            "evaluation mode; use the running statistics of its batch norms (track_running_stats=True, "
            "training=self.training)"
        )


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the weights of a .safetensors file, or of a file by torch.save, into the model without unpickling.

    Takes a bare state_dict, {"state_dict": ...} or {"model": ...}; prefixes of DataParallel and torch.compile
    go. Every tensor must fit and be finite, none may be missing or left over; only a bias for a Linear
    without one is taken on (see `replace_head`). Raises ModelError with the file and what does not fit.
    """
    state = _state(_read(path), path)
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    biases = _added_biases(model, state)
    # tied tensors: safetensors' save_model stores one of them; and BatchNorm counts only since torch 0.4.1
    stored = {own[key].data_ptr() for key in state if key in own}
    missing = [
        key
        for key, tensor in own.items()
        if key not in state and tensor.data_ptr() not in stored and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in own and key not in biases]
    misshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    faults = [
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if keys
    ]
    if faults:
        raise ModelError(
            f"the weights in {path} do not fit the model ({'; '.join(faults)}); "
            "check model.factory, model.arguments and the number of classes"
        )
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"the weights in {path} are not finite in {', '.join(broken[:3])}; use other weights")
    for key, linear in biases.items():
        linear.bias = nn.Parameter(state[key].to(linear.weight, copy=True))
    model.load_state_dict(state, strict=False)


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the model's state_dict as a .safetensors file; tied tensors are written under each name."""
    safetensors.torch.save_file(_state_to_save(model), path)


def to_bytes(model: nn.Module) -> bytes:
    """The model's state_dict in the safetensors format; `load_bytes` takes it back."""
    return safetensors.torch.save(_state_to_save(model))


def load_bytes(model: nn.Module, weights: bytes) -> None:
    """Puts weights of `to_bytes` into the model."""
    state = safetensors.torch.load(weights)
    for key, linear in _added_biases(model, state).items():
        linear.bias = nn.Parameter(state[key].to(linear.weight, copy=True))
    model.load_state_dict(state)


def _state_to_save(model: nn.Module) -> dict[str, Tensor]:
    # clones: safetensors refuses tensors that share memory
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in model.state_dict().items()}


def head_of(model: nn.Module, head: str) -> nn.Linear:
    """The head by its dotted name."""
    return _linear(model, head)


def replace_head(model: nn.Module, head: str, weight: Tensor, bias: Tensor) -> None:
    """Puts weight [classes, d] and bias [classes] into the head; without a bias, it gets one unless it is 0.

    Raises ValueError where the shapes are not the head's.
    """
    linear = _linear(model, head)
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


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over all parameters and buffers: name, dtype, shape, bytes."""
    return _fingerprint(_tensors(model))


def backbone_fingerprint(model: nn.Module, head: str) -> str:
    """As `fingerprint`, over everything but the head: equal as long as the features are."""
    own = {f"{head}.{name}" for name, _ in _tensors(_linear(model, head))}
    return _fingerprint((name, tensor) for name, tensor in _tensors(model) if name not in own)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    # buffers that are not part of the state_dict shape the features, too
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _linear(model: nn.Module, head: str) -> nn.Linear:
    module = model.get_submodule(head)
    assert isinstance(module, nn.Linear), f"{head} comes from find_head"
    return module


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
            f"installed packages ({_brief(error)}); install it, or start from the folder that holds it"
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


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _read(path: Path) -> object:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; check model.weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the readers of torch raise a dozen types for files that are not theirs
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and culprit:
            raise ModelError(
                f"{path} holds pickled objects ({culprit[1]}), which could run code and are refused; "
                "save the model's state_dict() instead"
            ) from error
        raise ModelError(
            f"{path} is not a readable weights file ({type(error).__name__}); "
            "save the model's state_dict() by torch.save or as safetensors"
        ) from error


def _state(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"{path} holds no state_dict (names to tensors), at the top or under 'state_dict' or 'model'; "
            "save the model's state_dict()"
        )
    return {str(key): tensor for key, tensor in content.items()}


def _added_biases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """The biases in `state` that belong to a Linear of the model that has none, by their names."""
    return {
        f"{path}.bias": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.bias is None
        and f"{path}.bias" in state
        and state[f"{path}.bias"].shape == (module.out_features,)
    }
