"""Fit: the ensemble of probes on the live samples' features, by whose boundary the labels are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from posttrain.cluster.network import Network
from posttrain.cluster.views import View
from posttrain.errors import DataError, FeaturelessError, RecipeError
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.held_out import HeldOutLoss, corrected_loss
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.stored_samples import StoredSamples, stored
from posttrain.schema import Round

Members = tuple[tuple[str, float], ...]
"""(layer, l2) of each probe of an ensemble."""


@dataclass(frozen=True)
class Choice:
    """Which probes were chosen on a backbone, and what was compared."""

    backbone: str
    members: Members
    tried: tuple[tuple[str, float, float, float], ...]
    """(layer, l2, validation cross-entropy, validation accuracy)."""

    @classmethod
    def read(cls, record: dict[str, Any]) -> Choice:
        members, tried = (tuple(map(tuple, record[name])) for name in ("members", "tried"))
        return cls(record["backbone"], members, tried)

    def best_of_layers(self) -> list[tuple[str, float]]:
        """(layer, l2) with the lowest validation cross-entropy of each layer."""
        best: dict[str, tuple[float, float]] = {}
        for layer, l2, loss, _ in self.tried:
            if layer not in best or loss < best[layer][1]:
                best[layer] = (l2, loss)
        return [(layer, l2) for layer, (l2, _) in best.items()]

    def as_record(self) -> dict[str, object]:
        """For the summary: the members, and what was compared."""
        return {
            "members": [{"layer": layer, "l2": l2} for layer, l2 in self.members],
            "tried": [
                {"layer": layer, "l2": l2, "validation_loss": loss, "validation_accuracy": accuracy}
                for layer, l2, loss, accuracy in self.tried
            ],
        }


@dataclass(frozen=True)
class Fitted:
    """A fitted ensemble, with the samples that it was fitted and compared on."""

    ensemble: ProbeEnsemble
    choice: Choice
    samples: StoredSamples
    validation: StoredSamples

    def is_of(self, backbone: str, live: Live) -> bool:
        """Whether these samples and features are what it was fitted on."""
        return self.choice.backbone == backbone and self.samples.live.digest == live.digest

    @property
    def held_out_loss(self) -> HeldOutLoss:
        """Of the boundary on the validation labels, whose noise is not known yet."""
        boundary, unit = self.ensemble, torch.eye(len(self.ensemble.weights), dtype=torch.float64)
        reduce = self.validation.standardised(boundary.layers, boundary.standardizers)
        return corrected_loss(reduce, boundary.weights, unit)

    @property
    def view(self) -> View:
        """The live samples with the features of the members' layers."""
        return self.samples.view(self.ensemble.layers, self.ensemble.standardizers)


def fit(run: Run, state: State[Network, Fitted], backbone: str) -> Fitted:
    """The ensemble on the live samples; for a new backbone its members are chosen first."""
    with run.progress.step("fit"):
        return fitted(run, backbone, state.live, state.history, state.number + 1, known=state.probe)


def fitted(
    run: Run, backbone: str, live: Live, history: Sequence[Round], number: int, *, known: Fitted | None = None
) -> Fitted:
    """The ensemble on the live samples, which is `known` where that was fitted on the same.

    A choice holds as long as the backbone stays. For a new one, members are chosen and kept as those of round `number`:
    of the first backbone among all layers and all L2, of a later one among all layers, each with the L2 that was its
    best before.
    """
    if known is not None and known.is_of(backbone, live):
        return known
    choices = chosen_in(run, history)
    for choice in choices:
        if choice.backbone == backbone:
            return refitted(run, choice, choice.members, live)
    try:
        found = chosen(run, backbone, live, candidates=choices[-1].best_of_layers() if choices else None)
    except FeaturelessError as error:
        raise _featureless(run, live, number, error) from error
    keep_choice(run, number, found.choice)
    return found


def chosen(run: Run, backbone: str, live: Live, *, candidates: Sequence[tuple[str, float]] | None = None) -> Fitted:
    """The best ensemble on the live samples, of candidates (layer, l2): without them, of all layers and all L2.

    Raises FeaturelessError.
    """
    if candidates is None:
        candidates = [(layer, l2) for layer in run.inputs.layers for l2 in run.config.probe.l2]
    samples, validation = stored(run, backbone, "train", live), stored(run, backbone, "validation")
    found = ensemble.choose(samples, validation, candidates=candidates, classes=len(run.inputs.classes))
    tried = tuple((one.layer, one.l2, one.loss, one.accuracy) for one in found.tried)
    return Fitted(found, Choice(backbone, found.members, tried), samples, validation)


def keep_choice(run: Run, number: int, choice: Choice) -> None:
    """Write the choice down as that of round `number`, for later rounds."""
    run.folder.write_json(_path(run, number), asdict(choice))


def _featureless(run: Run, live: Live, number: int, error: FeaturelessError) -> DataError | RecipeError:
    """What to say where no feature tells the training images apart."""
    config = run.config
    if number and not config.refine.keeps_backbone:
        return RecipeError(
            f"after round {number - 1} the network sees no difference between the {live.count:,} training images "
            f"({error}); lower refine.learning_rate ({config.refine.learning_rate:g})"
        )
    train = f"data.train = {config.data.train}" if config.data.train else f"data.source = {config.data.source}"
    return DataError(
        f"{train}: the {live.count:,} training images that can be read all look the same to the network ({error}); set "
        f"data.image ({config.data.image}) to the column that holds the pictures, model.background "
        f"({config.model.background}) to a colour from which they stand out where their shape is in the alpha channel "
        "alone, and model.mean and model.std to those that the model was trained with"
    )


def refitted(run: Run, choice: Choice, members: Members, live: Live) -> Fitted:
    """The ensemble of these members on the live samples, with the features of the choice's backbone."""
    backbone = choice.backbone
    samples, validation = stored(run, backbone, "train", live), stored(run, backbone, "validation")
    # from zero: a run that goes on after an interruption has no previous fit to start from
    found = ensemble.refit(samples, validation, members, classes=len(run.inputs.classes))
    return Fitted(found, choice, samples, validation)


def chosen_in(run: Run, history: Sequence[Round]) -> list[Choice]:
    """The choices that these rounds made, in their order."""
    paths = [_path(run, done.number) for done in history]
    return [Choice.read(run.folder.read_json(path)) for path in paths if run.folder.exists(path)]


def _path(run: Run, number: int) -> str:
    return run.folder.round(number, "probes.json")
