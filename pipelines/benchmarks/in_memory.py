"""All rounds of posttrain on a case, without Ray and without a folder, by the loop of a real run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import Case, Data, Part
from pipelines.benchmarks.first_round import embedded, joined
from pipelines.benchmarks.training import refining, round_seed, trained_on
from posttrain import policy, rounds
from posttrain.config import Probe as ProbeSection
from posttrain.config import Removal
from posttrain.in_memory import Choice as Taken
from posttrain.in_memory import Scored, select_scored
from posttrain.influence import ensemble, noise_matrix, selection
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.in_memory import InMemory
from posttrain.influence.noise_model import UNKNOWN, Prior, noise_left
from posttrain.influence.score_round import PreviousRemovals, score_round
from posttrain.live import Live, Rows
from posttrain.methods import Method
from posttrain.rounds import Outcome, State, Steps
from posttrain.runs.fit import Choice
from posttrain.schema import Round, stream_seed
from posttrain.vision import layers, models
from posttrain.vision.losses import Noise

PROBE = ProbeSection()
REMOVAL = Removal(budget=0.1, max_rounds=4)
"""posttrain's defaults but for larger and fewer rounds, which a grid of many cases asks for."""

Mode = policy.Scope


@dataclass(frozen=True)
class Estimate:
    """The share of wrong labels as posttrain estimates it on the validation samples, with its 95 % interval."""

    rate: float
    low: float
    high: float
    found: bool
    """Whether there is any sign of wrong labels."""


@dataclass(frozen=True)
class Model:
    """What a round leaves behind."""

    weights: bytes = field(repr=False)
    boundary: ProbeEnsemble | None = None
    """What classifies in place of the network's own head."""


@dataclass(frozen=True)
class Features:
    """Of all training and validation samples, from one network."""

    train: InMemory
    validation: InMemory


@dataclass(frozen=True)
class Start:
    """Round 0: the network as it came, embedded once, and what a removal has to be compared with."""

    weights: bytes = field(repr=False)
    layers: tuple[str, ...]
    """Those to try."""
    features: Features
    test: InMemory
    boundary: ProbeEnsemble
    """Chosen, and drawn by all samples."""
    head: ProbeEnsemble
    """A probe on the head's input, its l2 by held-out loss, fitted on all samples."""
    accuracies: dict[str, float]
    """Of the network itself, by split."""


def start(case: Case, data: Data, weights: bytes, kept: np.ndarray | None = None) -> Start:
    """The case's network before the first round; its boundaries by the samples in the mask `kept` [n], or by all."""
    model = cases.loaded(case, weights)
    head = models.find_head(model, classes=data.classes)
    names = layers.find(model, head, next(iter(cases.inputs(case, data.validation)))[:2])
    train, validation, test = (
        embedded(case, model, names, part, PROBE.max_features) for part in (data.train, data.validation, data.test)
    )
    tried = [(name, l2) for name in names for l2 in PROBE.l2]
    live = train if kept is None else rows(train, kept)
    boundary = ensemble.choose(live, validation, candidates=tried, classes=data.classes)
    of_head = [candidate for candidate in best_by_layer(boundary) if candidate[0] == head]
    new = ensemble.refit(live, validation, of_head, classes=data.classes)
    return Start(
        weights, names, Features(train, validation), test, boundary, new, network_accuracies(case, data, weights)
    )


def best_by_layer(boundary: ProbeEnsemble) -> list[tuple[str, float]]:
    """(layer, l2) of each layer's best: what later rounds try."""
    tried = tuple((fit.layer, fit.l2, fit.loss, fit.accuracy) for fit in boundary.tried)
    return Choice("", boundary.members, tried).best_of_layers()


@dataclass
class CleaningInMemory:
    """posttrain on a case, without Ray and without a folder: its steps are what `rounds.clean` is handed."""

    case: Case
    data: Data
    mode: Mode
    start: Start
    removal: Removal = field(default_factory=lambda: REMOVAL)
    method: Method = "cross_entropy"
    """By which the whole network is trained on."""
    kept: np.ndarray = field(init=False)
    """bool [n]: the live samples."""
    history: tuple[Round, ...] = ()
    """Of the last `clean`, or what it goes on from."""
    steps: list[int] = field(default_factory=list)
    """Gradient steps of each round."""
    estimates: list[Estimate] = field(default_factory=list)
    _prior: Prior = UNKNOWN
    """What the first round that found wrong labels saw of them."""
    _features: tuple[bytes, Features] = field(init=False)
    _chosen: tuple[bytes, ProbeEnsemble] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.data.train), bool)
        self._features = (self.start.weights, self.start.features)
        self._chosen = (self.start.weights, self.start.boundary)

    def embed(self, state: State[Model, ProbeEnsemble]) -> tuple[Features, Live]:
        """Features of the model's backbone; with a new head alone, that is the first network in all rounds."""
        weights = state.model.weights
        if weights != self._features[0]:
            model = cases.loaded(self.case, weights)
            train, validation = (
                embedded(self.case, model, self.start.layers, part, PROBE.max_features)
                for part in (self.data.train, self.data.validation)
            )
            self._features = (weights, Features(train, validation))
        return self._features[1], state.live

    def fit(self, state: State[Model, ProbeEnsemble], features: Features) -> ProbeEnsemble:
        """The boundary on the live samples: of a refined network its members are chosen anew."""
        if state.model.boundary is not None:
            return state.model.boundary
        weights, chosen = self._chosen
        if weights != state.model.weights:
            live, candidates = rows(features.train, self.kept), best_by_layer(chosen)
            chosen = ensemble.choose(live, features.validation, candidates=candidates, classes=self.data.classes)
            self._chosen = (state.model.weights, chosen)
        return chosen

    def score(self, state: State[Model, ProbeEnsemble], features: Features, boundary: ProbeEnsemble) -> Scored:
        """The scores of the live samples."""
        kept = self.mask(state.live)
        found = score_round(
            rows(features.train, kept),
            features.validation,
            boundary,
            seed=stream_seed("control", self.case.seed),
            previous=PreviousRemovals(
                policy.acted_on(state.history),
                sum(done.metrics.get("acted_on_self_confidence", 0.0) for done in state.history),
            ),
            prior=self._prior,
        )
        noise = found.noise_model.noise
        if self._prior.confident_joint is None:
            self._prior = found.noise_model.prior
        self.estimates.append(Estimate(noise.rate, noise.low, noise.high, noise.found))
        labels = self.data.train.given[kept].astype(np.int64)
        return Scored(joined(found.tables), labels, np.flatnonzero(kept), found.noise_model)

    def select(self, state: State[Model, ProbeEnsemble], scored: Scored) -> Taken:
        """What the round removes, by the rules of a run."""
        return select_scored(scored, self.start.features.train, state.history, self.removal, self.data.classes)

    def refine(
        self,
        state: State[Model, ProbeEnsemble],
        features: Features,
        boundary: ProbeEnsemble,
        selected: Taken,
        live: Live,
    ) -> tuple[Model, None]:
        """The model without this round's samples: the boundary drawn again, or the whole network trained on."""
        kept = self.mask(live)
        if self.mode == "head":
            train = rows(features.train, kept)
            drawn = ensemble.refit(train, features.validation, boundary.members, classes=self.data.classes)
            return Model(state.model.weights, drawn), None
        weights, steps = trained_on(
            self.case,
            self.data.train.rows(kept),
            state.model.weights,
            seed=round_seed(self.case, state.number + 1),
            settings=refining(self.case.dataset, self.method),
            noise=_noise_left(selected, live),
        )
        self.steps.append(steps)
        return Model(weights), None

    def evaluate(self, state: State[Model, ProbeEnsemble], model: Model) -> dict[str, float]:
        """Accuracy on what was never trained on and never cleaned."""
        if model.boundary is None:
            return network_accuracies(self.case, self.data, model.weights)
        test = self.start.test
        if model.weights != self.start.weights:
            network = cases.loaded(self.case, model.weights)
            test = embedded(self.case, network, model.boundary.layers, self.data.test, PROBE.max_features)
        return boundary_accuracies(model.boundary, test)

    def commit(self, state: State[Model, ProbeEnsemble], selected: Taken, done: Round) -> Round:
        """Take the round's samples out."""
        self.kept = self.mask(state.live)
        return done

    def validation_transition(self) -> torch.Tensor:
        """T of the validation labels, as the first round that found wrong labels saw them; else the unit matrix."""
        joint = self._prior.confident_joint
        if joint is None:
            return torch.eye(self.data.classes, dtype=torch.float64)
        return noise_matrix.estimate(joint, self._prior.validation_noise_rate)

    def mask(self, live: Live) -> np.ndarray:
        """bool [n] over all training samples."""
        return live.mask(0, np.arange(len(self.data.train)))

    def clean(self) -> Outcome[Model, ProbeEnsemble]:
        """All rounds, from the network as it came."""
        metrics = dict(self.start.accuracies)
        if self.mode == "head":
            metrics[rounds.REFERENCE] = self.start.boundary.accuracy
        history = self.history or (Round(0, len(self.data.train), 0, 0, 0, metrics),)
        model = Model(self.start.weights)
        live = Live(len(self.data.train), removed=Rows.of(0, np.flatnonzero(~self.kept)))
        state = State[Model, ProbeEnsemble](history, live, model, model, model, len(self.data.validation))
        steps = Steps(self.embed, self.fit, self.score, self.select, self.refine, self.evaluate, self.commit)
        outcome = rounds.clean(state, steps, rounds.Limits.of(self.removal))
        self.history = outcome.state.history
        return outcome

    def going_on(self, start: Start) -> CleaningInMemory:
        """What goes on with the samples that are left and the features of another network, as `runs.bases` does."""
        metrics = boundary_accuracies(start.boundary, start.test)
        history = (*self.history, Round(self.history[-1].number + 1, int(self.kept.sum()), 0, 0, 0, metrics))
        following = replace(self, start=start, history=history, steps=[], estimates=[], _prior=UNKNOWN)
        following.kept = self.kept
        return following

    def concluded(self, state: State[Model, ProbeEnsemble], mode: Mode) -> State[Model, ProbeEnsemble]:
        """After the last round, where `policy` says so: the boundary as the new head, or the network as it came."""
        state = self._last_boundary(state, mode)
        first, last = (of.metrics["validation_accuracy"] for of in (state.history[0], state.history[-1]))
        if not policy.first_model_stays(first, last, state.validation_samples):
            return state
        done = Round(state.number + 1, state.live.count, 0, 0, 0, state.history[0].metrics)
        return replace(state, history=(*state.history, done), model=Model(self.start.weights))

    def _last_boundary(self, state: State[Model, ProbeEnsemble], mode: Mode) -> State[Model, ProbeEnsemble]:
        if not policy.boundary_may_become_head(mode, state.number):
            return state
        boundary = self.fit(state, self.embed(state)[0])
        before = state.history[-1].metrics["validation_accuracy"]
        if not policy.boundary_becomes_head(mode, state.number, before, boundary.accuracy, state.validation_samples):
            return state
        model = Model(state.model.weights, boundary)
        done = Round(state.number + 1, state.live.count, 0, 0, 0, self.evaluate(state, model))
        return replace(state, history=(*state.history, done), model=model)


def _noise_left(selected: Taken, live: Live) -> Noise:
    """Of the samples that are live after a removal, as `runs.select` tells it."""
    model, before = selected.scored.noise_model, len(selected.scored.labels)
    rate = model.remaining_noise_rate
    return Noise(*noise_left(model.confident_joint, rate, before, acted_on=selected.acted_on, left=live.count))


def rows(features: InMemory, kept: np.ndarray) -> InMemory:
    """The features of the samples in a mask [n]."""
    return replace(features.rows(torch.from_numpy(kept)), blocks=features.blocks)


def taken(
    part: Part, kept: np.ndarray, scores: np.ndarray, *, classes: int, at_most: int, threshold: float = -np.inf
) -> tuple[selection.Selection, np.ndarray]:
    """The cut among the kept samples by their scores, float32 [kept], and the mask [n] of what goes.

    Every class keeps its floor, a share of all its samples in the part.
    """
    ids, labels = part.ids[kept], part.given[kept]
    live, samples = (np.bincount(own, minlength=classes) for own in (labels, part.given))
    cut = selection.select(
        lambda: [(ids, labels, scores)],
        classes=classes,
        at_most=at_most,
        caps=policy.caps(live, samples, REMOVAL.class_floor),
        threshold=threshold,
    )
    gone = np.zeros(len(part), bool)
    gone[np.flatnonzero(kept)[cut.mask(ids, labels, scores)]] = True
    return cut, gone


def boundary_logits(boundary: ProbeEnsemble, part: InMemory) -> torch.Tensor:
    """[n, classes]."""
    return part.side_by_side(boundary.layers, boundary.standardizers) @ boundary.weights.float().T


def boundary_accuracies(boundary: ProbeEnsemble, test: InMemory) -> dict[str, float]:
    """Of a boundary, on both held-out sets: of the validation set it is known."""
    logits = boundary_logits(boundary, test)
    accuracy = float((logits.argmax(dim=1) == test.labels).double().mean())
    return {"validation_accuracy": boundary.accuracy, "test_accuracy": accuracy}


def network_accuracies(case: Case, data: Data, weights: bytes) -> dict[str, float]:
    """Of a network, on both held-out sets."""
    model = cases.loaded(case, weights)
    parts = {"validation": data.validation, "test": data.test}
    return {f"{name}_accuracy": cases.accuracy(case, model, part) for name, part in parts.items()}
