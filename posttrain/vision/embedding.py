"""Features of images: what the head and other layers of a network compute, each from one forward pass."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.schema import stream_seed
from posttrain.vision import models

INPUT = "input"
"""The name of the images themselves as a layer, also where the model has a module of that name."""

_GRIDS = (4, 2, 1)
"""Cells a side of the grids over which maps are averaged."""


def features_and_logits(model: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the output of the head: features [n, d] and logits [n, classes], both float32.

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
            f"the model cannot take a batch of shape {tuple(batch.shape)}: {models.error_line(error)}; "
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


def refuse_irreproducible_features(model: nn.Module, head: str, batch: Tensor) -> None:
    """Raises ModelError where features or logits are not finite, not deterministic, or depend on the rest of a batch.

    Runs the model twice on the batch, of two or more, and once on its first half among other samples. Rounding may
    differ with the size of a batch, by less than a ten-thousandth of the largest feature.
    """

    def differ(found: tuple[Tensor, Tensor], again: tuple[Tensor, Tensor]) -> bool:
        return any(
            float((one - other).abs().max()) > 1e-4 * max(float(one.abs().max()), 1e-3)
            for one, other in zip(found, again, strict=True)
        )

    half = len(batch) // 2
    found = features_and_logits(model, head, batch)
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise ModelError(
            f"what the model computes at model.head {head!r} is not finite for an image of random pixels; use other "
            "weights, or check model.mean and model.std"
        )
    if differ(found, features_and_logits(model, head, batch)):
        raise ModelError(
            f"the model gives other values at model.head {head!r} for the same images when it is run again, in "
            "evaluation mode; take the randomness out of its forward pass (dropout: training=self.training)"
        )
    among_others = torch.cat([batch[:half], 3 * batch[half:].flip(-1) + 1, -batch])
    again = features_and_logits(model, head, among_others)
    if differ((found[0][:half], found[1][:half]), (again[0][:half], again[1][:half])):
        raise ModelError(
            f"what the model computes at model.head {head!r} for an image depends on the other images of its batch, in "
            "evaluation mode; use the running statistics of its batch norms (track_running_stats=True, "
            "training=self.training)"
        )


def pooled(output: Tensor, width: int) -> Tensor:
    """A layer's output as features [n, d], float32, d <= width; they depend on nothing but their own sample.

    Vectors [n, d] stay as they are. Maps [n, c, h, w] are averaged over the cells of the finest g x g grid,
    g = 4, 2 or 1, that is no finer than the map and gives no more than 4 * width values (g = 1 may give more);
    tokens [n, t, c] over t. What is still wider than `width` is projected by a Gaussian matrix [d, width] /
    sqrt(width) that depends on d and width alone: distances are kept up to a factor of about
    1 +- 1 / sqrt(width) (Johnson and Lindenstrauss 1984). Gradients flow through.

    Maps with channels last, as swin's, cannot be told from others by shape in general: a square in dimensions 1
    and 2 that is smaller than dimension 3 is taken for one, anything else for channels first.
    """
    # sums over many values: in float32, also where the network computes in 16 bits
    with torch.autocast(output.device.type, enabled=False):
        features = output.float()
        if features.ndim == 4:
            features = channels_first(features)
            channels, *sides = features.shape[1:]
            grid = next(g for g in _GRIDS if g == 1 or (g <= min(sides) and channels * g * g <= 4 * width))
            features = F.adaptive_avg_pool2d(features, grid).flatten(1)
        elif features.ndim == 3:
            features = features.mean(dim=1)
        elif features.ndim != 2:
            raise ValueError(f"an output of shape {tuple(output.shape)} is neither vectors, tokens nor maps")
        dim = features.shape[1]
        return features if dim <= width else features @ _projection(dim, width, features.device)


@functools.lru_cache(maxsize=16)
def _projection(dim: int, width: int, device: torch.device) -> Tensor:
    # not an inference tensor: the same matrix serves training afterwards
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(stream_seed("layer projection", dim, width) % 2**63)
        # sampled in float64: the vectorised float32 normals differ between processors in the last bits
        gaussian = torch.randn(dim, width, generator=generator, dtype=torch.float64, device="cpu")
        return (gaussian / width**0.5).float().to(device)


def channels_first(maps: Tensor) -> Tensor:
    """Maps [n, c, h, w], also of [n, h, w, c] (told apart as `pooled` says)."""
    _, first, second, third = maps.shape
    return maps.permute(0, 3, 1, 2) if first == second < third else maps


def unusable_output(output: object, samples: int) -> str | None:
    """What a layer gives instead of an output that can be pooled to features of so many samples; None where it can."""
    if isinstance(output, Tensor):
        usable = 2 <= output.ndim <= 4 and len(output) == samples and output.numel() > 0
        if usable and output.is_floating_point():
            return None
        found = f"a tensor {tuple(output.shape)} of {output.dtype}"
    else:
        found = f"a {type(output).__name__}"
    return f"{found}, where one floating tensor [batch, ...] of 2 to 4 dimensions is needed"


class StopForward(BaseException):
    """Ends a forward pass early; no Exception, so that no network takes it for a failure of its own."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture


class Capture:
    """Captures the features of some layers in one forward pass, and ends the pass after the last of them."""

    def __init__(self, layers: Collection[str], head: str, width: int, batch: Tensor) -> None:
        self.layers, self.head, self.width = layers, head, width
        self.samples = len(batch)
        self.found: dict[str, Tensor] = {}
        if INPUT in layers:
            self._keep(INPUT, batch)

    def done(self) -> bool:
        return all(name in self.found for name in self.layers)

    def add(self, name: str, output: object) -> None:
        """Keeps the output of a layer (of the head, its input); raises StopForward after the last layer."""
        self._keep(name, output)
        if self.done():
            raise StopForward(self)

    def _keep(self, name: str, output: Any) -> None:
        if name in self.found:
            raise ModelError(f"layer {name!r} runs more than once per forward pass; name one that runs once")
        if (unusable := unusable_output(output, self.samples)) is not None:
            raise ModelError(f"layer {name!r} gives {unusable}")
        # copies: later layers may work in place, and the gradient of the pooling needs its input as it was
        needs_gradient = torch.is_grad_enabled() and output.requires_grad
        copied = output.clone() if needs_gradient else output
        features = copied.float() if name == self.head else pooled(copied, self.width)
        self.found[name] = features.clone() if features.data_ptr() == output.data_ptr() else features

    def missing(self) -> ModelError:
        """The error for the first layer that has not run."""
        name = next(name for name in self.layers if name not in self.found)
        return ModelError(f"layer {name!r} does not run in a forward pass; name one that runs once")


def layer_features(
    model: nn.Module, layers: Sequence[str], head: str, batch: Tensor, *, width: int
) -> dict[str, Tensor]:
    """The features of each layer, float32 [n, d of the layer], from one forward pass without gradients.

    The head's are its input exactly as `features_and_logits` gives it, never projected; all others are `pooled` to at
    most `width`. The pass ends after the last layer unless the head is among them, and leaves the model in
    evaluation mode. Raises ModelError where `features_and_logits` does, and for a layer that does not exist, does not
    run once or gives no such tensor (see `layers.check`).
    """
    modules = {name: _module(model, name) for name in layers if name not in (INPUT, head)}
    with torch.no_grad():
        capture = Capture(layers, head, width, batch)

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: capture.add(name, output)

    # prepended: the hook of a `ProbedNetwork` on the same layer ends the pass
    hooks = [module.register_forward_hook(hook_of(name), prepend=True) for name, module in modules.items()]
    try:
        if modules or head in layers:
            capture.found[head] = features_and_logits(model, head, batch)[0]
    except StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not capture.done():
        raise capture.missing()
    return {name: capture.found[name] for name in layers}


def _module(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        nearest = difflib.get_close_matches(name, dict.fromkeys([INPUT, *filter(None, modules)]), n=3, cutoff=0)
        raise ModelError(f"layer {name!r} does not exist (nearest: {', '.join(nearest)})")
    return modules[name]
