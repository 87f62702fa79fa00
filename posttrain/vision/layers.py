"""Probes on several layers: which layers, their features in one pass, and a network that ends in a probe on them.

A layer goes by its module's dotted name and stands for that module's output; two names are special. The head's
stands for the head's own *input*, as in `models.embed`; "input" stands for the images.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.schema import stream_seed
from posttrain.vision import models

INPUT = "input"
"""The name of the images themselves as a layer, also where the model has a module of that name."""

FACTORY = "posttrain.vision.layers:probed"
"""What `model.factory` is called for a network that ends in a probe."""

_GRIDS = (4, 2, 1)


@dataclass(frozen=True)
class _Call:
    """One call of a module, noted when it returned."""

    name: str
    module: nn.Module
    input: object
    output: Any


# which layers


def find(model: nn.Module, head: str, example: Tensor, *, most: int = 6) -> tuple[str, ...]:
    """The layers worth a probe in the order of the forward pass, at most `most`: "input", stages, the head.

    A stage has parameters and runs once, before the head; its output is one floating tensor [batch, ...] and not
    yet what goes into the head. A module is opened into its children where it holds the head or more than half
    of the network's layers, or is no stage itself; norms, activations and poolings that follow directly belong
    to the stage before them. Where there are more stages than asked for, the last ones at each spatial size are
    preferred and the rest is spread evenly.

    Runs the model once on `example` (two images do) and leaves it in evaluation mode. Raises ModelError where
    `models.embed` does, ValueError for `most` below 2.
    """
    if most < 2:
        raise ValueError(f"most is {most}; the input and the head alone are 2 layers")
    calls = _trace(model, head, example)
    at = _head_at(calls, model, head)
    stages = _stages(model, calls[:at], calls[at], len(example))
    return (INPUT, *(stages[i].name for i in _thinned([_grid(stage.output) for stage in stages], most - 2)), head)


def check(model: nn.Module, head: str, names: Sequence[str], example: Tensor) -> tuple[str, ...]:
    """The names, each once, in the order of the forward pass.

    Runs the model once on `example` and leaves it in evaluation mode. Raises ModelError for a layer that does not
    exist, does not run exactly once and before the head, or whose output is not one floating tensor
    [batch, ...] of 2 to 4 dimensions; it names the nearest layers that do.
    """
    calls = _trace(model, head, example)
    at = _head_at(calls, model, head)
    times = Counter(call.module for call in calls)
    last = {call.module: place for place, call in enumerate(calls)}
    modules = dict(model.named_modules(remove_duplicate=False))

    def fault(name: str) -> str | None:
        module = modules.get(name) if name else None
        if module is None:
            return "does not exist"
        if times[module] != 1:
            return f"runs {times[module]} times per forward pass, not once"
        if last[module] > at:
            return f"is not done before the head {head!r}"
        output = calls[last[module]].output
        return None if _serves(output, len(example)) else f"gives {_described(output)}, {_NEEDED}"

    places = {INPUT: -1, head: at}
    for name in names:
        if name in places:
            continue
        found = fault(name)
        if found:
            # the head is a module, and a module may be called "input": each counts once
            serving = dict.fromkeys([INPUT, head, *(other for other in modules if fault(other) is None)])
            nearest = difflib.get_close_matches(name, serving, n=3, cutoff=0)
            raise ModelError(f"layer {name!r} {found}; the nearest that a probe can sit on: {', '.join(nearest)}")
        places[name] = last[modules[name]]
    return tuple(sorted(dict.fromkeys(names), key=lambda name: places[name]))


def _trace(model: nn.Module, head: str, example: Tensor) -> list[_Call]:
    """All calls of modules in one pass, in the order in which they returned."""
    calls: list[_Call] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(_Call(name, module, inputs[0] if inputs else None, output))

        return note

    # prepended: the last layer of a `Probed` must be noted before its own hook ends the pass
    hooks = [module.register_forward_hook(noting(name), prepend=True) for name, module in model.named_modules() if name]
    try:
        models.embed(model, head, example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _head_at(calls: Sequence[_Call], model: nn.Module, head: str) -> int:
    module = model.get_submodule(head)
    return next(at for at, call in enumerate(calls) if call.module is module)


def _stages(model: nn.Module, calls: Sequence[_Call], head: _Call, samples: int) -> list[_Call]:
    times = Counter(call.module for call in calls)
    serving = [call for call in calls if times[call.module] == 1 and _serves(call.output, samples)]
    whole = {call.module for call in serving}
    weighted = {call.module for call in calls if any(True for _ in call.module.parameters(recurse=False))}
    candidates: set[nn.Module] = set()

    def open_up(module: nn.Module) -> None:
        for child in module.children():
            candidates.add(child)
            inside = set(child.modules())
            if head.module in inside or child not in whole or 2 * len(inside & weighted) > len(weighted):
                open_up(child)

    open_up(model)
    stages: list[_Call] = []
    for call in serving:
        if call.module not in candidates or call.name == INPUT:
            continue
        # the same tensor: an activation in place, or the module that encloses the last stage
        if stages and (call.output is stages[-1].output or _completes(call, stages[-1])):
            stages[-1] = call
        elif any(True for _ in call.module.parameters()):
            stages.append(call)
    features: Any = head.input  # a tensor: models.embed refuses anything else
    return [stage for stage in stages if not torch.equal(stage.output.flatten(1), features)]


def _completes(call: _Call, stage: _Call) -> bool:
    """Whether the call is a norm, an activation or a (not global) pooling right behind the stage."""
    if call.input is not stage.output or any(parameter.ndim > 1 for parameter in call.module.parameters()):
        return False
    before, after = stage.output.shape, call.output.shape
    if len(before) != 4 or len(after) != 4:
        return before == after
    smaller = all(new == old or 1 < new < old for old, new in zip(before[2:], after[2:], strict=True))
    return before[1] == after[1] and smaller


def _thinned(grids: Sequence[tuple[int, ...]], most: int) -> list[int]:
    """Which at most `most` of the stages to take, by their spatial sizes; the last one always."""
    if len(grids) <= most:
        return list(range(len(grids)))
    ends = [at for at, grid in enumerate(grids) if at + 1 == len(grids) or grids[at + 1] != grid]
    if most <= 1:
        return ends[-1:] if most else []
    if len(ends) >= most:
        return [ends[round(i * (len(ends) - 1) / (most - 1))] for i in range(most)]
    starts = [-1, *ends[:-1]]
    parts = [1] * len(ends)
    for _ in range(most - len(ends)):
        widest = max(range(len(ends)), key=lambda i: (ends[i] - starts[i]) / parts[i])
        parts[widest] += 1
    return [
        start + round(part * (end - start) / count)
        for start, end, count in zip(starts, ends, parts, strict=True)
        for part in range(1, count + 1)
    ]


_NEEDED = "where one floating tensor [batch, ...] of 2 to 4 dimensions is needed"


def _serves(output: object, samples: int) -> bool:
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and 2 <= output.ndim <= 4
        and len(output) == samples
        and output.numel() > 0
    )


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} of {output.dtype}"
    return f"a {type(output).__name__}"


# features


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
    # sums over many values: a network that computes in 16 bits does not extend to them
    with torch.autocast(output.device.type, enabled=False):
        features = output.float()
        if features.ndim == 4:
            features = _channels_first(features)
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
        # drawn in float64: the vectorised float32 normals differ between processors in the last bits
        gaussian = torch.randn(dim, width, generator=generator, dtype=torch.float64, device="cpu")
        return (gaussian / width**0.5).float().to(device)


def _channels_first(maps: Tensor) -> Tensor:
    _, first, second, third = maps.shape
    return maps.permute(0, 3, 1, 2) if first == second < third else maps


def _grid(output: Tensor) -> tuple[int, ...]:
    if output.ndim == 4:
        return tuple(_channels_first(output).shape[2:])
    return tuple(output.shape[1:-1])


class _Enough(BaseException):
    """Ends a forward pass; no Exception, so that no network takes it for a failure of its own."""

    def __init__(self, ended: _Pass) -> None:
        self.ended = ended


class _Pass:
    """The features that one forward pass is to give, and those that it gave so far."""

    def __init__(self, layers: Collection[str], head: str, width: int, batch: Tensor) -> None:
        self.layers, self.head, self.width = layers, head, width
        self.samples = len(batch)
        self.found: dict[str, Tensor] = {}
        if INPUT in layers:
            self._take(INPUT, batch)

    def done(self) -> bool:
        return all(name in self.found for name in self.layers)

    def meet(self, name: str, output: object) -> None:
        """Takes the output of a layer, the head's input for the head; raises _Enough after the last one."""
        self._take(name, output)
        if self.done():
            raise _Enough(self)

    def _take(self, name: str, output: Any) -> None:
        if name in self.found:
            raise ModelError(f"layer {name!r} runs more than once per forward pass; name one that runs once")
        if not _serves(output, self.samples):
            raise ModelError(f"layer {name!r} gives {_described(output)}, {_NEEDED}")
        # copies: what follows may work in place, and the gradient of the pooling asks for its input as it was
        tracked = torch.is_grad_enabled() and output.requires_grad
        own = output.clone() if tracked else output
        features = own.float() if name == self.head else pooled(own, self.width)
        self.found[name] = features.clone() if features.data_ptr() == output.data_ptr() else features

    def missing(self) -> ModelError:
        name = next(name for name in self.layers if name not in self.found)
        return ModelError(f"layer {name!r} does not run in a forward pass; name one that runs once")


def embed(model: nn.Module, layers: Sequence[str], head: str, batch: Tensor, *, width: int) -> dict[str, Tensor]:
    """The features of each layer, float32 [n, d of the layer], from one forward pass without gradients.

    The head's are its input exactly as `models.embed` gives it, never projected; all others are `pooled` to at
    most `width`. The pass ends after the last layer unless the head is among them, and leaves the model in
    evaluation mode. Raises ModelError where `models.embed` does, and for a layer that does not exist, does not
    run once or gives no such tensor (see `check`).
    """
    modules = {name: _module(model, name) for name in layers if name not in (INPUT, head)}
    with torch.no_grad():
        wanted = _Pass(layers, head, width, batch)

    def meeting(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: wanted.meet(name, output)

    # prepended: before the hook of a `Probed` on the same layer ends the pass
    hooks = [module.register_forward_hook(meeting(name), prepend=True) for name, module in modules.items()]
    try:
        if modules or head in layers:
            wanted.found[head] = models.embed(model, head, batch)[0]
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not wanted.done():
        raise wanted.missing()
    return {name: wanted.found[name] for name in layers}


def _module(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        nearest = difflib.get_close_matches(name, dict.fromkeys([INPUT, *filter(None, modules)]), n=3, cutoff=0)
        raise ModelError(f"layer {name!r} does not exist (nearest: {', '.join(nearest)})")
    return modules[name]


# a network that ends in a probe

_RUNNING: ContextVar[_Pass | None] = ContextVar("running", default=None)
"""The pass of the `Probed` that runs in this thread: its hooks stay, so that passes of several threads do not meet."""


def _met(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
    running = _RUNNING.get()
    if running is not None:
        running.meet(name, output)


class Probed(nn.Module):
    """A network up to the last of some layers, `network`, and one linear probe on all their features, `probe`.

    The probe sees the layers side by side, in the order given: a mean of probes on each of them is such a probe.
    What lies behind the last layer does not run and is no part of the module: a submodule that neither ran nor
    lent a parameter to the features, in evaluation mode, is replaced by nn.Identity, as the network's own head
    is in any case, and a parameter without effect that is left over does not require a gradient. `network` alone
    is of no use: what it returns has lost its meaning.
    """

    place: Tensor

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
        # seen by the fingerprints: the same tensors give other features at other layers or another width
        place = torch.tensor(list("\n".join([*layers, str(width)]).encode()), dtype=torch.uint8)
        self.register_buffer("place", place, persistent=False)
        _replace(network, network.get_submodule(head), nn.Identity())
        for name in self.layers:
            if name != INPUT:
                network.get_submodule(name).register_forward_hook(functools.partial(_met, name))
        self.eval()
        # a copy: no gradient can be taken through an example that was made in inference mode
        self._drop_what_lies_behind(example.clone())
        with torch.no_grad():
            self.probe = nn.Linear(self.features(example).shape[1], classes)
        self.train()

    def features(self, batch: Tensor) -> Tensor:
        """What goes into the probe [n, d], float32, with gradients: `embed`'s features of the layers side by side."""
        wanted = _Pass(self.layers, self.network_head, self.width, batch)
        if not wanted.done():
            before = _RUNNING.set(wanted)
            try:
                self.network(batch)
            except _Enough as enough:
                # of somebody who embeds a layer of this network
                if enough.ended is not wanted:
                    raise
            else:
                raise wanted.missing()
            finally:
                _RUNNING.reset(before)
        return torch.cat([wanted.found[name] for name in self.layers], dim=1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.probe(self.features(batch).to(self.probe.weight.dtype))

    @torch.enable_grad()
    def _drop_what_lies_behind(self, example: Tensor) -> None:
        started: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, _: started.add(module)) for module in self.network.modules()
        ]
        wanted = {parameter: parameter.requires_grad for parameter in self.network.parameters()}
        # frozen parameters take part, too
        for parameter in wanted:
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            features = self.features(example)
        finally:
            for hook in hooks:
                hook.remove()
        sought = [parameter for parameter in wanted if parameter.requires_grad]
        gradients = (
            torch.autograd.grad(features.sum(), sought, allow_unused=True)
            if features.requires_grad
            else [None] * len(sought)
        )
        used = {parameter for parameter, found in zip(sought, gradients, strict=True) if found is not None}
        for parameter, trainable in wanted.items():
            parameter.requires_grad_(trainable and parameter in used)
        _drop(self.network, started, used)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module into the place of another one, under each of its names."""
    for name, module in [*network.named_modules(remove_duplicate=False)]:
        if name and module is old:
            network.set_submodule(name, new)


def _drop(module: nn.Module, started: Collection[nn.Module], used: Collection[nn.Parameter]) -> None:
    for name, child in module.named_children():
        parameters = [*child.parameters()]
        # a parameter can be used without its module's running: nn.MultiheadAttention's out_proj
        if parameters and not any(p in used for p in parameters) and not any(m in started for m in child.modules()):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, started, used)


@torch.inference_mode(False)
def probed(
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

    A `Probed`, and itself a factory, `posttrain.vision.layers:probed`; `size` is (channels, height, width) of the
    images. Raises ModelError where the network cannot be built or a probe cannot sit on the layers.
    """
    if not layers or len(set(layers)) < len(layers):
        raise ModelError(f"layers are {list(layers)}; name at least one, and each once")
    whole = models.build(network, classes=classes, arguments=arguments or {})
    if isinstance(whole, Probed):
        raise ModelError("the network ends in a probe itself; name its own network and layers of that")
    head = models.find_head(whole, classes=classes, name=network_head)
    if set(layers) == {head}:
        raise ModelError(f"layer {head!r} is the head: the network as it is has its probe there")
    example = torch.zeros(2, *size)
    check(whole, head, layers, example)
    return Probed(whole, head, layers, width, classes, example)


def as_probed(
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
) -> tuple[str, dict[str, Any], Probed]:
    """A model that `factory` and `arguments` built, cut behind `layers`, with weight [classes, d] and bias [classes].

    d are the features of all layers side by side, in the order given. Returned are the factory and the arguments
    (JSON types, as far as `arguments` has such) that build the `Probed` anew, and the `Probed` itself, on the CPU;
    the model stays as it is. Of a `Probed` model only the probe can be replaced: `layers` are its head alone, and
    `width` and `size` remain what they were. Raises ModelError as `probed` does and where the recipe does not fit
    the model, ValueError where the weights do not fit the features.
    """
    trained = model
    if factory == FACTORY:
        assert isinstance(model, Probed), f"{FACTORY} builds nothing else"
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
    made = probed(len(weight), **recipe)
    assert isinstance(made, Probed)
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
