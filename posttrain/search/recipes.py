"""The recipes that a search tries: one trial each, in a run folder of its own and without the test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import JsonValue

from posttrain.config import RunFile, Search, Tracking
from posttrain.store.folder import RunFolder

if TYPE_CHECKING:
    from posttrain.cluster.network import Network
    from posttrain.runs.context import Run
    from posttrain.runs.inputs import Inputs
    from posttrain.search.trial import Trial


def make_trials(config: RunFile, inputs: Inputs) -> list[Trial]:
    """The trials of the search in `run.path`. Raises ConfigError for a recipe that the model or data do not allow."""
    from posttrain.data.sources import FolderSource
    from posttrain.runs.inputs import for_recipe
    from posttrain.search.trial import Trial

    folder = RunFolder(config.run.path)
    # without the data, and without true labels to measure by: no trial may know of them
    blind = replace(inputs, sources={"train": FolderSource("")}, noise=None, weights=None)
    trials = []
    for number, own in enumerate(_values(config, folder)):
        run = config.run.model_copy(update={"path": folder.absolute.beneath("trials", f"{number:04d}").location})
        # credentials of the tracking server stay here
        apart = {"run": run, "tracking": Tracking(), "search": Search()}
        recipe = config.with_values(own).model_copy(update=apart)
        trials.append(Trial(number, own, recipe, for_recipe(blind, recipe)))
    return trials


def _values(config: RunFile, folder: RunFolder) -> Sequence[Mapping[str, JsonValue]]:
    """By trial, the values of the keys that it varies: those written down, or else sampled."""
    path = folder.path("trials.json")
    if folder.exists(path):
        return folder.read_json(path)
    from posttrain.cluster import tuning

    return tuning.sample_values(config.search.space, config.search.trials, config.run.seed)


def write_values(folder: RunFolder, trials: Sequence[Trial]) -> None:
    """Write down what was sampled, for a search that goes on."""
    folder.write_json(folder.path("trials.json"), [dict(trial.values) for trial in trials])


def with_shared_features(trials: Sequence[Trial], first: Network, run: Run) -> list[Trial]:
    """The trials with the features of the untouched backbone `first`, which lie in the search's folder, that of `run`.

    One pass over the images writes every layer that any recipe tries. Only another `probe.max_features` makes other
    features.
    """
    from posttrain.runs.embed import features_of
    from posttrain.runs.networks import network_of

    stores = {}
    for width in dict.fromkeys(trial.inputs.spec.width for trial in trials):
        specs = [trial.inputs.spec for trial in trials if trial.inputs.spec.width == width]
        head = specs[0].head
        layers = dict.fromkeys(layer for spec in specs for layer in spec.layers if layer != head)
        spec = replace(specs[0], layers=(*layers, head))
        network = network_of(run, first.weights, spec)
        backbone, _ = features_of(run, network, run.live_at_start(), ("train", "validation"))
        stores[width] = (spec, run.folder.path("features", backbone))
    placed = []
    for trial in trials:
        spec, features = stores[trial.inputs.spec.width]
        placed.append(replace(trial, inputs=replace(trial.inputs, spec=spec), features=features))
    return placed
