"""posttrain's first round on a case, in memory: the same functions as in a run, without Ray, images read once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.benchmarks.cases import DATASETS, Case, Data, Part, inputs, loaded
from posttrain.cluster.devices import computing_in
from posttrain.config import Probe as ProbeSection
from posttrain.config import Removal
from posttrain.influence import ensemble
from posttrain.influence.in_memory import InMemory
from posttrain.influence.noise_model import NoiseModel
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.score_round import score_round
from posttrain.influence.scores import SCORES
from posttrain.schema import stream_seed
from posttrain.vision import layers as vision_layers
from posttrain.vision import models
from posttrain.vision.embedding import layer_features


@dataclass(frozen=True)
class FirstRound:
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


def embedded(case: Case, model: torch.nn.Module, names: Sequence[str], part: Part, width: int) -> InMemory:
    """A part's features of the named layers, one pass over its images."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    head = models.find_head(model, classes=case.classes)
    with torch.inference_mode(), computing_in(DATASETS[case.dataset].precision, torch.device("cpu")):
        for batch in inputs(case, part):
            for name, features in layer_features(model, names, head, batch, width=width).items():
                found[name].append(features.half())
    features = {name: torch.cat(parts) for name, parts in found.items()}
    return InMemory(features, torch.from_numpy(part.given.astype(np.int64)), part.ids)


def first_round(case: Case, data: Data, weights: bytes) -> FirstRound:
    """Scores, suggestions and estimates, with the default settings."""
    settings, removal = ProbeSection(), Removal()
    began = time.perf_counter()
    model = loaded(case, weights)
    example = next(iter(inputs(case, data.validation)))[:2]
    names = vision_layers.find(model, models.find_head(model, classes=data.classes), example)
    live = embedded(case, model, names, data.train, settings.max_features)
    validation = embedded(case, model, names, data.validation, settings.max_features)
    boundary = ensemble.choose(
        live,
        validation,
        candidates=[(name, l2) for name in names for l2 in settings.l2],
        classes=data.classes,
    )
    columns, noise_model = scored(case, live, validation, boundary)
    allowed = int(noise_model.noise.most * len(data.train))
    order = np.argsort(-columns["mislabel_odds"], kind="stable")
    selected = np.zeros(len(data.train), bool)
    selected[order[:allowed]] = True
    selected &= columns["mislabel_odds"] > removal.min_log_odds
    seconds = time.perf_counter() - began
    tested = embedded(case, model, boundary.layers, data.test, settings.max_features)
    logits = tested.side_by_side(boundary.layers, boundary.standardizers) @ boundary.weights.float().T
    last = ensemble.choose(live, validation, candidates=[("head", l2) for l2 in settings.l2], classes=data.classes)
    return FirstRound(
        {name: columns[name] for name in SCORES},
        columns["suggested_label"],
        columns["confidence"],
        boundary.layers,
        tuple(probe.l2 for probe in boundary.probes),
        [(fit.layer, fit.l2, fit.loss, fit.accuracy) for fit in boundary.tried],
        noise_model.noise,
        selected,
        scored(case, live, validation, last)[0]["mislabel_odds"],
        float((logits.argmax(dim=1) == tested.labels).double().mean()),
        seconds,
        # the held-out part is a fraction of a pass over the training images
        1 + len(data.validation) / len(data.train),
    )


def scored(
    case: Case, live: InMemory, validation: InMemory, boundary: ensemble.ProbeEnsemble
) -> tuple[dict[str, np.ndarray], NoiseModel]:
    """(columns [n] of `scores.parquet`, noise model) of the round that begins from this boundary."""
    found = score_round(live, validation, boundary, seed=stream_seed("control", case.seed))
    return joined(found.tables), found.noise_model


def joined(tables: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The blocks of a round's tables as one."""
    blocks = list(tables)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
