"""posttrain's first round on a case, in memory: the same functions as in a run, without Ray, images read once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.benchmarks.cases import Case, Data, Part, inputs, loaded
from posttrain.config import Probe as ProbeSection
from posttrain.config import Removal
from posttrain.influence import curvature, ensemble, noise_model, scores
from posttrain.influence.calibration import CalibrationSums, calibration_sums, validation_sums
from posttrain.influence.noise_model import UNKNOWN, NoiseModel, PosteriorSums, Prior
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.probe import Reduce, Standardizer, in_memory
from posttrain.schema import stream_seed, uniform
from posttrain.vision import layers as vision_layers
from posttrain.vision import models
from posttrain.vision.embedding import layer_features


@dataclass(frozen=True)
class Ours:
    """What posttrain says of a case's training samples, of which there are n."""

    scores: dict[str, np.ndarray]
    """[n] each, larger is more suspect."""
    suggested: np.ndarray
    confidence: np.ndarray
    layers: tuple[str, ...]
    l2_values: tuple[float, ...]
    table: list[tuple[str, float, float, float]]
    """(layer, l2, held-out cross-entropy, held-out accuracy) of all that was tried."""
    noise: NoiseEstimate
    selected: np.ndarray
    """[n] bool: what one round without a budget would remove."""
    last_layer: np.ndarray
    """[n] the default score of a probe on the last layer alone."""
    boundary_test_accuracy: float
    seconds: float
    """Without `last_layer` and the test accuracy, which only the benchmark asks for."""
    passes: float


@dataclass(frozen=True)
class InMemory:
    """`ensemble.Samples` of float16 features in memory."""

    features: dict[str, Tensor]
    labels: Tensor

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        return in_memory(torch.cat([self.features[name].float() for name in layers], dim=1), self.labels)

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        return in_memory(self.side_by_side(layers, standardizers), self.labels)

    def side_by_side(self, layers: tuple[str, ...], standardizers: Sequence[Standardizer]) -> Tensor:
        """The layers' standardised features, each followed by a 1."""
        return torch.cat([s(self.features[name]) for name, s in zip(layers, standardizers, strict=True)], dim=1)


def embedded(case: Case, model: torch.nn.Module, names: Sequence[str], part: Part, width: int) -> InMemory:
    """A part's features of the named layers, one pass over its images."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.inference_mode():
        for batch in inputs(case, part):
            for name, features in layer_features(model, names, "head", batch, width=width).items():
                found[name].append(features.half())
    features = {name: torch.cat(parts) for name, parts in found.items()}
    return InMemory(features, torch.from_numpy(part.given.astype(np.int64)))


def ours(case: Case, data: Data, weights: bytes) -> Ours:
    """Scores, suggestions and estimates, with the default settings."""
    settings, removal = ProbeSection(), Removal()
    began = time.perf_counter()
    model = loaded(case, weights)
    example = next(iter(inputs(case, data.validation)))[:2]
    names = vision_layers.find(model, models.find_head(model, classes=data.classes), example)
    live = embedded(case, model, names, data.train, settings.max_features)
    held_out = embedded(case, model, names, data.validation, settings.max_features)
    boundary = ensemble.choose(
        live,
        held_out,
        candidates=[(name, l2) for name in names for l2 in settings.l2],
        classes=data.classes,
    )
    found = evidence(case, data, live, held_out, boundary)
    columns = {str(name): score(found).numpy() for name, score in scores.SCORES.items()}
    suggestion = scores.suggestion(found.leave_one_out)
    assert found.noise_model is not None
    allowed = int(found.noise_model.noise.most * len(data.train))
    order = np.argsort(-columns["mislabel_odds"], kind="stable")
    selected = np.zeros(len(data.train), bool)
    selected[order[:allowed]] = True
    selected &= columns["mislabel_odds"] > removal.min_log_odds
    seconds = time.perf_counter() - began
    tested = embedded(case, model, boundary.layers, data.test, settings.max_features)
    logits = tested.side_by_side(boundary.layers, boundary.standardizers) @ boundary.weights.float().T
    last = ensemble.choose(live, held_out, candidates=[("head", l2) for l2 in settings.l2], classes=data.classes)
    return Ours(
        columns,
        suggestion.suggested.numpy(),
        suggestion.confidence.numpy(),
        boundary.layers,
        tuple(probe.l2 for probe in boundary.probes),
        [(fit.layer, fit.l2, fit.loss, fit.accuracy) for fit in boundary.tried],
        found.noise_model.noise,
        selected,
        scores.mislabel_odds(evidence(case, data, live, held_out, last)).numpy(),
        float((logits.argmax(dim=1) == tested.labels).double().mean()),
        seconds,
        # the held-out part is a fraction of a pass over the training images
        1 + len(data.validation) / len(data.train),
    )


def evidence(
    case: Case,
    data: Data,
    live: InMemory,
    held_out: InMemory,
    boundary: ensemble.ProbeEnsemble,
    *,
    removed: int = 0,
    removed_self_confidence: float = 0.0,
    prior: Prior = UNKNOWN,
) -> scores.Evidence:
    """The calibrated evidence on the live samples; what former rounds removed and found as `estimate` takes it."""
    settings = ProbeSection()
    of_validation = held_out.standardised(boundary.layers, boundary.standardizers)
    of_held_out, temperature = validation_sums(of_validation, boundary.weights)
    members = []
    for layer, standardizer, fitted in zip(boundary.layers, boundary.standardizers, boundary.probes, strict=True):
        reduce = live.standardised((layer,), (standardizer,))
        kind = "exact" if fitted.weights.numel() <= settings.exact_limit else "ekfac"
        members.append(
            (standardizer(live.features[layer]), fitted.weights.float(), curvature.measure(reduce, fitted, kind))
        )
    random = torch.from_numpy(uniform(data.train.ids, stream_seed("control", case.seed))).float()
    uncalibrated = scores.joint_evidence(members, live.labels, random)
    of_live = CalibrationSums(*calibration_sums(uncalibrated.loo_logits, live.labels, temperature))
    first = noise_model.estimate_noise_model(
        of_held_out,
        of_live,
        temperature,
        removed=removed,
        removed_self_confidence=removed_self_confidence,
        prior=prior,
    )

    def sums_under(model: NoiseModel) -> PosteriorSums:
        return PosteriorSums(*noise_model.posterior_sums(model, uncalibrated.loo_logits, live.labels))

    model = noise_model.with_transition(first, of_validation, boundary.weights, sums_under, prior)
    return scores.Evidence(uncalibrated.members, live.labels, random, model)
