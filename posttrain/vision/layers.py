"""Which layers of a network to fit probes on: found by tracing a forward pass, or checked where they are named.

A layer is called by its module's dotted name and stands for that module's output; two names are special. The head's
stands for the head's own *input*, as in `embedding.features_and_logits`; "input" stands for the images.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision.embedding import INPUT, channels_first, features_and_logits, unusable_output


@dataclass(frozen=True)
class _Call:
    """One call of a module, recorded when it returned."""

    name: str
    module: nn.Module
    input: object
    output: Any


def find(model: nn.Module, head: str, example: Tensor, *, most: int = 6) -> tuple[str, ...]:
    """The layers worth a probe in the order of the forward pass, at most `most`: "input", stages, the head.

    A stage has parameters and runs once, before the head; its output is one floating tensor [batch, ...] and not
    yet what goes into the head. A module is opened into its children where it holds the head or more than half
    of the network's layers, or is no stage itself; norms, activations and poolings that follow directly belong
    to the stage before them. Where there are more stages than asked for, the last ones at each spatial size are
    preferred and the rest is spread evenly.

    Runs the model once on `example` (two images do) and leaves it in evaluation mode. Raises ModelError where
    `features_and_logits` does, ValueError for `most` below 2.
    """
    if most < 2:
        raise ValueError(f"most is {most}; the input and the head alone are 2 layers")
    calls = _trace(model, head, example)
    at = _head_at(calls, model, head)
    stages = _stages(model, calls[:at], calls[at], len(example))
    return (INPUT, *(stages[i].name for i in _spread([_grid(stage.output) for stage in stages], most - 2)), head)


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
        unusable = unusable_output(calls[last[module]].output, len(example))
        return None if unusable is None else f"gives {unusable}"

    places = {INPUT: -1, head: at}
    for name in names:
        if name in places:
            continue
        found = fault(name)
        if found:
            # the head is a module, and a module may be called "input": each counts once
            usable = dict.fromkeys([INPUT, head, *(other for other in modules if fault(other) is None)])
            nearest = difflib.get_close_matches(name, usable, n=3, cutoff=0)
            raise ModelError(f"layer {name!r} {found}; the nearest that a probe can sit on: {', '.join(nearest)}")
        places[name] = last[modules[name]]
    return tuple(sorted(dict.fromkeys(names), key=lambda name: places[name]))


def _trace(model: nn.Module, head: str, example: Tensor) -> list[_Call]:
    """All calls of modules in one pass, in the order in which they returned."""
    calls: list[_Call] = []

    def hook_of(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(_Call(name, module, inputs[0] if inputs else None, output))

        return record

    # prepended: the last layer of a `ProbedNetwork` has to be recorded before its own hook ends the pass
    hooks = [
        module.register_forward_hook(hook_of(name), prepend=True) for name, module in model.named_modules() if name
    ]
    try:
        features_and_logits(model, head, example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _head_at(calls: Sequence[_Call], model: nn.Module, head: str) -> int:
    module = model.get_submodule(head)
    return next(at for at, call in enumerate(calls) if call.module is module)


def _stages(model: nn.Module, calls: Sequence[_Call], head: _Call, samples: int) -> list[_Call]:
    times = Counter(call.module for call in calls)
    usable = [call for call in calls if times[call.module] == 1 and unusable_output(call.output, samples) is None]
    usable_modules = {call.module for call in usable}
    weighted = {call.module for call in calls if any(True for _ in call.module.parameters(recurse=False))}
    candidates: set[nn.Module] = set()

    def open_up(module: nn.Module) -> None:
        for child in module.children():
            candidates.add(child)
            inside = set(child.modules())
            if head.module in inside or child not in usable_modules or 2 * len(inside & weighted) > len(weighted):
                open_up(child)

    open_up(model)
    stages: list[_Call] = []
    for call in usable:
        if call.module not in candidates or call.name == INPUT:
            continue
        # the same tensor: an activation in place, or the module that encloses the last stage
        if stages and (call.output is stages[-1].output or _completes(call, stages[-1])):
            stages[-1] = call
        elif any(True for _ in call.module.parameters()):
            stages.append(call)
    features: Any = head.input  # a tensor: features_and_logits refuses anything else
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


def _spread(grids: Sequence[tuple[int, ...]], most: int) -> list[int]:
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


def _grid(output: Tensor) -> tuple[int, ...]:
    """The spatial size of a layer's output."""
    if output.ndim == 4:
        return tuple(channels_first(output).shape[2:])
    return tuple(output.shape[1:-1])
