"""The registered champion as the start of a run: its network, the run file, the inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import JobFile, Model, RunFile
from posttrain.data.listing import File
from posttrain.errors import DataError, ModelError
from posttrain.jobs.job_folder import Base, JobFolder
from posttrain.store.folder import RunFolder

if TYPE_CHECKING:
    from posttrain.runs.inputs import Inputs
    from posttrain.schema import ModelSpec
    from posttrain.store.registry import Registry, Version

BASE = "posttrain.base"
"""Tag of a version: the key of its base network in the job's folder."""

_RECIPE = ("factory", "arguments", "head")


def base_network(config: JobFile, job: JobFolder, registry: Registry, champion: Version | None) -> Base | None:
    """The network that the champion's features come from; the champion itself where that is not known."""
    if champion is None:
        return None
    if (key := champion.tags.get(BASE)) and (known := job.base(key)):
        return known
    with tempfile.TemporaryDirectory() as folder:
        weights, recipe = registry.fetch(champion, Path(folder))
        recipe = trusted_recipe(recipe, config.model, f"version {champion.number} of {config.job.name}")
        return Base(f"version {champion.number}", recipe or {}, None, weights.read_bytes(), weights.suffix)


def own_network(registry: Registry, champion: Version, given: Model, spec: ModelSpec) -> tuple[bytes, ModelSpec]:
    """The champion's own weights, and what builds its network: `spec`, or what its version says.

    `given`: the section `model` of the job file.
    """
    from posttrain.vision import models
    from posttrain.vision.weights import load_weights, to_bytes

    with tempfile.TemporaryDirectory() as folder:
        weights, recipe = registry.fetch(champion, Path(folder))
        recipe = trusted_recipe(recipe, given, f"version {champion.number} of {registry.name}")
        own = {name: recipe[name] for name in _RECIPE} if recipe else {}
        if any(value != getattr(spec, name) for name, value in own.items()):
            spec = replace(spec, **own, layers=(own["head"],))
        model = models.build(spec.factory, classes=spec.classes, arguments=spec.arguments)
        load_weights(model, weights)
    return to_bytes(model), spec


def trusted_recipe(recipe: dict[str, Any] | None, model: Model, where: str) -> dict[str, Any] | None:
    """The recipe of a registered model, if it builds what the job file names, or a network of torchvision.

    Whoever may write to the registry could name any function there, and it would be called. Raises ModelError.
    """
    if recipe is None:
        return None
    named, known = _network(recipe["factory"], recipe["arguments"]), _network(model.factory, model.arguments)
    if named != known and (not isinstance(named, str) or ":" in named):
        raise ModelError(
            f"{where} is to be built by {named!r}, and model.factory is {known!r}: set model.factory to it if you "
            "trust it, or begin a job of its own in a new folder"
        )
    return recipe


def _network(factory: object, arguments: object) -> object:
    """The factory of the network itself, also where a probe was put on it."""
    from posttrain.vision.probed_network import FACTORY

    return arguments.get("network") if factory == FACTORY and isinstance(arguments, dict) else factory


def run_file(config: JobFile, folder: RunFolder, base: Base | None) -> RunFile:
    """The run file of a run of the job in this folder, which starts from the base network."""
    own: dict[str, Any] = {
        "run": config.run.model_copy(update={"path": folder.location}),
        # what pre-training would hand down is settled by the job file, not by what the run starts from
        "refine": config.refining,
        "tracking": config.tracking.model_copy(update={"log_model": False}),
    }
    if base is not None:
        recipe = {name: base.recipe[name] for name in _RECIPE if name in base.recipe}
        own["model"] = config.model.model_copy(update={**recipe, "weights": None})
        if config.data.classes is None and base.classes is not None:
            # the classes stay what they were, whatever labels the files of today hold
            own["data"] = config.data.model_copy(update={"classes": base.classes})
    return config.run_file(**own)


def prepare_inputs(config: RunFile, files: Iterable[File], base: Base | None) -> Inputs:
    """The inputs of the run from these files alone, with the weights of the base network.

    Raises DataError where the champion cannot be compared on these data.
    """
    from posttrain.runs.inputs import prepare
    from posttrain.vision import models
    from posttrain.vision.weights import load_weights, to_bytes

    only: dict[str, set[str]] = {}
    for file in files:
        only.setdefault(file.split, set()).add(file.path)
    inputs = prepare(config, only={split: frozenset(paths) for split, paths in only.items()})
    if base is None:
        return inputs
    if base.classes is None and "validation" not in inputs.sources:
        raise DataError(
            f"the champion ({base.key}) was not made by this job, and the data have no validation set that it has not "
            "seen; set data.validation (sources parquet and folder)"
        )
    if base.classes is not None and base.classes != inputs.classes:
        raise DataError(
            f"the champion tells {len(base.classes)} classes apart ({', '.join(base.classes[:5])}, ...), and the data "
            f"have {len(inputs.classes)} ({', '.join(inputs.classes[:5])}, ...): correct data.classes, or begin a job "
            "of its own in a new folder"
        )
    model = models.build(inputs.spec.factory, classes=inputs.spec.classes, arguments=inputs.spec.arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"base{base.suffix}")
        path.write_bytes(base.weights)
        load_weights(model, path)
    # those that the factory draws are the ones that its training began with only where the job trained it
    known = base.initial_weights_known or config.model.initial_weights is not None
    return replace(inputs, weights=to_bytes(model), initial_weights=inputs.initial_weights if known else None)
