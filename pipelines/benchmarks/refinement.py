"""Is the model better afterwards? Test accuracy before and after posttrain, beside its controls.

`python -m pipelines.benchmarks.refinement --seeds 0 1 2` takes cases of `cases` and starts everything from the
same trained network: posttrain's rounds by the loop of a real run (`posttrain.rounds.clean`), with each `refine.scope`,
as many gradient steps without its removal, and training from scratch on what was kept. What is finished stays in
`--folder`, one file for each case: started again, it goes on with what is missing. `--report` only writes the tables
of what is there, `--readme` prints the short one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter
from scipy.stats import t as student
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.benchmarks import cases, peers
from pipelines.benchmarks.cases import DATASETS, NETWORKS, NOISES, Case, Data, Part
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.ours import InMemory, embedded, evidence
from pipelines.boundary import Choice
from pipelines.steps import in_words
from posttrain import policy, rounds
from posttrain.cluster.refining import Training
from posttrain.config import Probe as ProbeSection
from posttrain.config import Refine, Removal
from posttrain.influence import committee, scores, selection
from posttrain.influence.audit import NoiseEstimate
from posttrain.influence.committee import Boundary
from posttrain.rounds import Cut, State, Steps
from posttrain.schema import Round, stream_seed, uniform
from posttrain.vision import layers, models

PROBE = ProbeSection()
REMOVAL = Removal(budget=0.1, max_rounds=4)
"""posttrain's defaults but for larger and fewer rounds, which a grid of many cases asks for."""
REFINE = Refine(scope="network", epochs=2, batch_size=64)
"""Of each round. Digits are cropped and not mirrored."""
DECAY = 0.99
"""Of the moving average of weights, by gradient step."""

Mode = policy.Scope
MODES: tuple[Mode, ...] = ("head", "network", "both")

UNTOUCHED = "the network as it came"
OURS: dict[Mode, str] = {mode: f"posttrain, {mode}" for mode in MODES}
NEW_HEAD = "new head, nothing removed"
CHOSEN = "chosen boundary, nothing removed"
NO_REMOVAL = "no removal, same steps"
EMA = "same, EMA"
THEN_BOUNDARY = "same, then the boundary"
RANDOM = "random removal"
BY_LOSS = "removal by loss"
CLEANLAB = "cleanlab's removal, same steps"
SCRATCH = "from scratch, all"
SCRATCH_OURS = "from scratch, what posttrain (network) kept"
SCRATCH_BY_LOSS = "from scratch, what removal by loss kept"
SCRATCH_CLEANLAB = "from scratch, what cleanlab kept"
ORACLE = "from scratch, the right labels alone"

REFINED = (OURS["network"], OURS["both"], NO_REMOVAL, EMA, THEN_BOUNDARY, RANDOM, BY_LOSS, CLEANLAB)
"""The rows that take the same gradient steps from the trained network."""
FROM_SCRATCH = (SCRATCH, SCRATCH_OURS, SCRATCH_BY_LOSS, SCRATCH_CLEANLAB, ORACLE)
ROWS = (UNTOUCHED, OURS["head"], NEW_HEAD, CHOSEN, *REFINED, *FROM_SCRATCH)
CONTROLS = (UNTOUCHED, NO_REMOVAL, EMA, RANDOM, BY_LOSS, CLEANLAB, NEW_HEAD)
"""What a user could do instead of posttrain."""
ABLATIONS: dict[Mode, str] = {"head": CHOSEN, "network": NO_REMOVAL, "both": THEN_BOUNDARY}
"""The same without the removal: what of posttrain's gain is not due to it."""
AFTER_FOLDS = (CLEANLAB, SCRATCH_CLEANLAB)
"""The rows that need out-of-sample predictions, thus `cases.FOLDS` more networks."""

DEFAULTS: dict[str, list[str]] = {
    "datasets": list(DATASETS),
    "noises": ["clean", "symmetric 40", "pair 40", "instance 40", "human random1"],
    "networks": list(NETWORKS),
}


# -- what is measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A network or a boundary, and what it was made of."""

    name: str
    test_accuracy: float
    validation_accuracy: float
    """On labels that are as noisy as the rest."""
    steps: int
    """Gradient steps of the whole network, since the trained network or from scratch."""
    samples: int
    """Training samples that are left in the end."""
    wrong: int
    """Of these, with a wrong label."""


@dataclass(frozen=True)
class Estimate:
    """The share of wrong labels as posttrain estimates it on the validation samples, with its 95 % interval."""

    rate: float
    low: float
    high: float
    found: bool
    """Whether there is any sign of wrong labels."""


@dataclass(frozen=True)
class Cleaning:
    """How one of posttrain's modes went; the tuples are by round."""

    reason: str
    """Why there was no further round."""
    new_boundary: bool
    """Whether a boundary took the head's place after the last round."""
    removed: tuple[int, ...]
    steps: tuple[int, ...]
    """Gradient steps of the whole network; empty for the head."""
    test_accuracies: tuple[float, ...]
    estimates: tuple[Estimate, ...]
    """Also of the last one, in which nothing was removed."""


@dataclass(frozen=True)
class Finding:
    """Everything that was measured on a case."""

    case: Case
    samples: int
    wrong: int
    """Training samples with a wrong label."""
    cleanings: dict[Mode, Cleaning]
    rows: tuple[Row, ...]
    hardware: str
    threads: int
    settings: dict[str, Any]

    def row(self, name: str) -> Row | None:
        """The row of that name, None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def ours(self, mode: Mode) -> Row:
        """The mode's row."""
        row = self.row(OURS[mode])
        assert row is not None, "measured in every case"
        return row

    @property
    def best(self) -> Mode:
        """The mode with the highest validation accuracy, by which a user could choose; the first one of equals."""
        return max(MODES, key=lambda mode: self.ours(mode).validation_accuracy)


# -- posttrain in memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a round leaves behind."""

    weights: bytes = field(repr=False)
    boundary: Boundary | None = None
    """What classifies in place of the network's own head."""


@dataclass(frozen=True)
class Features:
    """Of all training and validation samples, from one network."""

    train: InMemory
    validation: InMemory


@dataclass(frozen=True)
class Taken:
    """What a round takes out."""

    cut: selection.Selection
    gone: np.ndarray
    """bool [n] over all training samples."""
    live: int
    """Samples that were scored."""
    support: float
    """Sum of the given labels' probabilities of those that go."""
    noise: NoiseEstimate
    exhausted: bool


@dataclass(frozen=True)
class Start:
    """Round 0: the network as it came, embedded once, and what a removal has to be compared with."""

    weights: bytes = field(repr=False)
    layers: tuple[str, ...]
    """Those to try."""
    features: Features
    test: InMemory
    boundary: Boundary
    """Chosen, and drawn by all samples."""
    head: Boundary
    """A probe on the head's input, its damping by held-out loss, fitted on all samples."""
    accuracies: dict[str, float]
    """Of the network itself, by split."""


def start(case: Case, data: Data, weights: bytes) -> Start:
    """The case's network before the first round."""
    model = cases.loaded(case, weights)
    head = models.find_head(model, classes=data.classes)
    names = layers.find(model, head, next(iter(cases.inputs(case, data.validation)))[:2])
    train, validation, test = (
        embedded(case, model, names, part, PROBE.width) for part in (data.train, data.validation, data.test)
    )
    tried = [(name, damping) for name in names for damping in PROBE.damping]
    boundary = committee.draw(train, validation, candidates=tried, classes=data.classes)
    of_head = [candidate for candidate in best_by_layer(boundary) if candidate[0] == head]
    new = committee.refit(train, validation, of_head, classes=data.classes)
    return Start(
        weights, names, Features(train, validation), test, boundary, new, network_accuracies(case, data, weights)
    )


def best_by_layer(boundary: Boundary) -> list[tuple[str, float]]:
    """(layer, damping) of each layer's best: what later rounds try."""
    tried = tuple((fit.layer, fit.damping, fit.loss, fit.accuracy) for fit in boundary.tried)
    return Choice("", boundary.members, tried).candidates()


@dataclass
class CleaningInMemory:
    """posttrain on a case, without Ray and without a folder: its steps are what `rounds.clean` is handed."""

    case: Case
    data: Data
    mode: Mode
    start: Start
    removal: Removal = field(default_factory=lambda: REMOVAL)
    kept: np.ndarray = field(init=False)
    """bool [n]: the live samples."""
    steps: list[int] = field(default_factory=list)
    """Gradient steps of each round."""
    estimates: list[Estimate] = field(default_factory=list)
    _removed_support: float = 0.0
    """Sum of the removed samples' given labels' probabilities."""
    _most: float = 0.0
    """Largest share of wrong labels that any round thought possible."""
    _features: tuple[bytes, Features] = field(init=False)
    _chosen: tuple[bytes, Boundary] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.data.train), bool)
        self._features = (self.start.weights, self.start.features)
        self._chosen = (self.start.weights, self.start.boundary)

    def embed(self, state: State[Model]) -> Features:
        """Features of the model's backbone; with a new head alone, that is the first network in all rounds."""
        weights = state.model.weights
        if weights != self._features[0]:
            model = cases.loaded(self.case, weights)
            train, validation = (
                embedded(self.case, model, self.start.layers, part, PROBE.width)
                for part in (self.data.train, self.data.validation)
            )
            self._features = (weights, Features(train, validation))
        return self._features[1]

    def fit(self, state: State[Model], features: Features) -> Boundary:
        """The boundary on the live samples: of a refined network its members are chosen anew."""
        if state.model.boundary is not None:
            return state.model.boundary
        weights, chosen = self._chosen
        if weights != state.model.weights:
            live, candidates = rows(features.train, self.kept), best_by_layer(chosen)
            chosen = committee.draw(live, features.validation, candidates=candidates, classes=self.data.classes)
            self._chosen = (state.model.weights, chosen)
        return chosen

    def score(self, state: State[Model], features: Features, boundary: Boundary) -> scores.Evidence:
        """The audited evidence on the live samples."""
        live = replace(self.data, train=self.data.train.rows(self.kept))
        train, removed = rows(features.train, self.kept), int((~self.kept).sum())
        found = evidence(
            self.case,
            live,
            train,
            features.validation,
            boundary,
            removed=removed,
            removed_support=self._removed_support,
        )
        assert found.audit is not None
        noise = found.audit.noise
        self.estimates.append(Estimate(noise.rate, noise.low, noise.high, noise.found))
        return found

    def select(self, state: State[Model], found: scores.Evidence) -> Taken:
        """The round's cut: at most the budget, at most what is estimated to be wrong, no class below its floor."""
        assert found.audit is not None
        noise, live = found.audit.noise, int(self.kept.sum())
        self._most = max(self._most, noise.most)
        in_all = policy.allowance(state.history, self._most)
        cut, gone = taken(
            self.data.train,
            self.kept,
            scores.SCORES[self.removal.score](found).float().numpy(),
            classes=self.data.classes,
            at_most=min(policy.in_one_round(live, self.removal.budget), in_all),
            threshold=self.removal.threshold,
        )
        support = float(scores.suggestion(found).self_confidence[torch.from_numpy(gone[self.kept])].sum())
        return Taken(cut, gone, live, support, noise, in_all == 0)

    def count(self, removal: Taken) -> Cut:
        """How many samples were scored, how many are candidates, how many go."""
        return Cut(
            removal.live, removal.cut.candidates, removal.cut.total, 0, in_words(removal.noise), removal.exhausted
        )

    def refine(self, state: State[Model], features: Features, removal: Taken, boundary: Boundary) -> Model:
        """The model without this round's samples: the boundary drawn again, or the whole network trained on."""
        kept = self.kept & ~removal.gone
        if self.mode == "head":
            live = rows(features.train, kept)
            drawn = committee.refit(live, features.validation, boundary.members, classes=self.data.classes)
            return Model(state.model.weights, drawn)
        weights, steps = trained_on(
            self.case,
            self.data.train.rows(kept),
            state.model.weights,
            seed=round_seed(self.case, state.number + 1),
            settings=refining(self.case.dataset),
        )
        self.steps.append(steps)
        return Model(weights)

    def evaluate(self, state: State[Model], model: Model) -> dict[str, float]:
        """Accuracy on what was never trained on and never cleaned."""
        if model.boundary is None:
            return network_accuracies(self.case, self.data, model.weights)
        test = self.start.test
        if model.weights != self.start.weights:
            network = cases.loaded(self.case, model.weights)
            test = embedded(self.case, network, model.boundary.layers, self.data.test, PROBE.width)
        return boundary_accuracies(model.boundary, test)

    def commit(self, state: State[Model], removal: Taken, model: Model, done: Round) -> Round:
        """Take the round's samples out."""
        self._removed_support += removal.support
        self.kept = self.kept & ~removal.gone
        return done

    def clean(self) -> rounds.Outcome[Model]:
        """All rounds, from the network as it came."""
        first = Round(0, len(self.data.train), 0, 0, 0, self.start.accuracies)
        state = State((first,), Model(self.start.weights), len(self.data.validation))
        steps = Steps(
            self.embed, self.fit, self.score, self.select, self.count, self.refine, self.evaluate, self.commit
        )
        limits = rounds.Limits(self.removal.max_rounds, self.removal.minimum, self.removal.patience)
        return rounds.clean(state, steps, limits)

    def last_boundary(self, state: State[Model], mode: Mode) -> State[Model]:
        """After the last round: the boundary as the new head, where `policy` says so."""
        if not policy.boundary_is_due(mode, state.number):
            return state
        boundary = self.fit(state, self.embed(state))
        before = state.history[-1].metrics["validation_accuracy"]
        if not policy.boundary_is_taken(mode, before, boundary.accuracy, state.validation_samples):
            return state
        model = Model(state.model.weights, boundary)
        done = Round(state.number + 1, state.live, 0, 0, 0, self.evaluate(state, model))
        return replace(state, history=(*state.history, done), model=model)


def rows(features: InMemory, kept: np.ndarray) -> InMemory:
    """The features of the samples in a mask [n]."""
    mask = torch.from_numpy(kept)
    return InMemory({name: own[mask] for name, own in features.features.items()}, features.labels[mask])


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
    gone[np.flatnonzero(kept)[cut.taken(ids, labels, scores)]] = True
    return cut, gone


def boundary_accuracies(boundary: Boundary, test: InMemory) -> dict[str, float]:
    """Of a boundary, on both held-out sets: of the validation set it is known."""
    logits = test.side_by_side(boundary.layers, boundary.standardizers) @ boundary.weights.float().T
    accuracy = float((logits.argmax(dim=1) == test.labels).double().mean())
    return {"validation_accuracy": boundary.accuracy, "test_accuracy": accuracy}


def network_accuracies(case: Case, data: Data, weights: bytes) -> dict[str, float]:
    """Of a network, on both held-out sets."""
    model = cases.loaded(case, weights)
    parts = {"validation": data.validation, "test": data.test}
    return {f"{name}_accuracy": cases.accuracy(case, model, part) for name, part in parts.items()}


# -- training ----------------------------------------------------------------------------------------------


def refining(dataset: str) -> Training:
    """How the data set's network is trained in one round of refining."""
    settings = REFINE.model_dump(exclude={"scope"})
    return Training(**{**settings, "augment": "crop" if dataset == "digits" else "crop_flip"})


def round_seed(case: Case, number: int) -> int:
    """The seed of a round's training, the same for posttrain and its controls."""
    return case.seed + 1000 * number


def steps_of_epoch(samples: int, batch_size: int) -> int:
    """Gradient steps of one epoch: a last batch of a single sample is left out."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1)


def trained_on(
    case: Case,
    part: Part,
    weights: bytes | None,
    *,
    seed: int,
    settings: Training,
    steps: int | None = None,
    watch: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[bytes, int]:
    """The network after training on a part, and the gradient steps that it took.

    `steps`: exactly as many, whatever the settings' epochs. Without weights the training starts from those of
    the case's seed. `watch` sees the model before each step.
    """
    if steps is not None:
        epochs = -(-steps // steps_of_epoch(len(part), settings.batch_size))
        settings = cases.with_settings(settings, epochs=epochs, max_steps=steps)
    passed = 0

    def before_step(model: nn.Module) -> None:
        nonlocal passed
        passed += 1
        watch(model)

    # a forward pass for each step, and the hook runs before it
    result = cases.train(case, part, seed=seed, weights=weights, settings=settings, after_step=before_step)
    return result.weights, passed


class Average:
    """The moving average of a network's weights and buffers over the gradient steps of a training."""

    def __init__(self, case: Case, weights: bytes) -> None:
        self._case = case
        self._model = AveragedModel(
            cases.loaded(case, weights), multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True
        )

    def watch(self, model: nn.Module) -> None:
        """Before each step: the first call finds the weights that the average begins with."""
        self._model.update_parameters(model)

    def finished(self, weights: bytes) -> bytes:
        """The averaged network, once the weights after the last step are in it."""
        self._model.update_parameters(cases.loaded(self._case, weights))
        return models.to_bytes(self._model.module)


Ranking = Callable[[int, bytes, np.ndarray], np.ndarray]
"""(round, weights, kept [n]) -> scores, float32 [kept], larger goes first."""


def refined(
    case: Case,
    data: Data,
    weights: bytes,
    plan: Cleaning,
    *,
    kept: np.ndarray | None = None,
    ranking: Ranking | None = None,
    watch: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[bytes, np.ndarray, int]:
    """(weights, kept samples [n], steps) after as many steps in each round as posttrain took in its `plan`.

    With a ranking as many samples go in each round, too; without one, nothing goes but what is not in `kept`.
    """
    kept = np.ones(len(data.train), bool) if kept is None else kept
    total = 0
    for number, (steps, removed) in enumerate(zip(plan.steps, plan.removed, strict=True), start=1):
        if ranking is not None:
            ranks = ranking(number, weights, kept)
            kept = kept & ~taken(data.train, kept, ranks, classes=data.classes, at_most=removed)[1]
        part = data.train.rows(kept)
        seed, settings = round_seed(case, number), refining(case.dataset)
        weights, done = trained_on(case, part, weights, seed=seed, settings=settings, steps=steps, watch=watch)
        total += done
    return weights, kept, total


def by_loss(case: Case, data: Data) -> Ranking:
    """The network's own cross-entropy."""

    def ranking(number: int, weights: bytes, kept: np.ndarray) -> np.ndarray:
        part = data.train.rows(kept)
        logits = cases.logits(case, cases.loaded(case, weights), part)
        return cross_entropy(logits, torch.from_numpy(part.given), reduction="none").numpy()

    return ranking


def at_random(case: Case, data: Data) -> Ranking:
    """Numbers that know nothing of the samples."""

    def ranking(number: int, weights: bytes, kept: np.ndarray) -> np.ndarray:
        draw = uniform(data.train.ids[kept], stream_seed("random removal", case.seed, number))
        return draw.astype(np.float32)

    return ranking


# -- one case ----------------------------------------------------------------------------------------------


def measure(case: Case, folder: Path, *, cleanlab: bool = False, scratch: bool = True) -> Finding:
    """What is to be known of the case, from its file in the folder as far as it is there; kept there.

    cleanlab's rows are measured where its out-of-sample predictions are in the folder; with `cleanlab` everywhere.
    Without `scratch` a new finding has no rows from scratch.
    Raises ValueError where the file was measured with other settings.
    """
    found = kept(case, folder)
    wanted = cleanlab or (folder / "out_of_sample" / f"{case.key}.pt").exists()
    missing = [CLEANLAB] if wanted and (found is None or found.row(CLEANLAB) is None) else []
    if found is not None and not missing:
        return found
    data = cases.load(case)
    trained = cases.trained(case, data, folder)
    # what the network of the case took itself
    own = trained.epochs * steps_of_epoch(len(data.train), DATASETS[case.dataset].training[case.network].batch_size)
    if found is None:
        found = _measured(case, data, trained.weights, own, scratch=scratch)
        _keep(found, folder)
    if missing:
        plan, rest = found.cleanings["network"], ~flagged(case, data, folder)
        added = [_after_cleanlab(case, data, trained.weights, plan, rest)]
        if found.row(SCRATCH) is not None:
            accuracies, steps = _from_scratch(case, data, rest, own)
            added.append(replace(added[0], name=SCRATCH_CLEANLAB, steps=steps, **accuracies))
        found = replace(found, rows=(*found.rows, *added))
        _keep(found, folder)
    return found


def _measured(case: Case, data: Data, weights: bytes, own_steps: int, *, scratch: bool) -> Finding:
    begin = start(case, data, weights)
    wrong = data.train.given != data.train.true
    everything = np.ones(len(wrong), bool)
    measured: list[Row] = []

    def note(name: str, accuracies: dict[str, float], kept: np.ndarray, steps: int) -> None:
        measured.append(Row(name, **accuracies, steps=steps, samples=int(kept.sum()), wrong=int(wrong[kept].sum())))

    note(UNTOUCHED, begin.accuracies, everything, 0)
    note(NEW_HEAD, boundary_accuracies(begin.head, begin.test), everything, 0)
    note(CHOSEN, boundary_accuracies(begin.boundary, begin.test), everything, 0)
    cleanings: dict[Mode, Cleaning] = {}
    head, network = (CleaningInMemory(case, data, mode, begin) for mode in ("head", "network"))
    outcomes: dict[Mode, rounds.Outcome[Model]] = {"head": head.clean(), "network": network.clean()}
    # the same rounds: only what follows them differs
    outcomes["both"] = outcomes["network"]
    for mode, outcome in outcomes.items():
        run = head if mode == "head" else network
        state = run.last_boundary(outcome.state, mode)
        cleanings[mode] = _cleaning(run, outcome, state)
        metrics = {name: state.history[-1].metrics[name] for name in begin.accuracies}
        note(OURS[mode], metrics, run.kept, sum(run.steps))
    kept_by = {SCRATCH: everything, SCRATCH_OURS: network.kept, ORACLE: ~wrong}
    for name, accuracies, kept, steps in _controls(case, data, begin, cleanings["network"]):
        note(name, accuracies, kept, steps)
        if name == BY_LOSS:
            kept_by[SCRATCH_BY_LOSS] = kept
    done: dict[bytes, tuple[dict[str, float], int]] = {}
    for name, kept in kept_by.items() if scratch else ():
        if kept.tobytes() not in done:
            done[kept.tobytes()] = _from_scratch(case, data, kept, own_steps)
        accuracies, steps = done[kept.tobytes()]
        note(name, accuracies, kept, steps)
    return Finding(
        case,
        len(data.train),
        int(wrong.sum()),
        cleanings,
        tuple(measured),
        hardware(),
        torch.get_num_threads(),
        settings(case.dataset),
    )


def _controls(
    case: Case, data: Data, begin: Start, plan: Cleaning
) -> Iterator[tuple[str, dict[str, float], np.ndarray, int]]:
    """(row, accuracies, kept samples [n], steps) of each control that trains the network as posttrain's plan did."""
    everything = np.ones(len(data.train), bool)
    average = Average(case, begin.weights)
    after, _, steps = refined(case, data, begin.weights, plan, watch=average.watch)
    accuracies = network_accuracies(case, data, after)
    yield NO_REMOVAL, accuracies, everything, steps
    yield EMA, network_accuracies(case, data, average.finished(after)), everything, steps
    trained = tuple(Round(number, len(everything), 0, 0, 0, accuracies) for number in range(1 + len(plan.steps)))
    control = CleaningInMemory(case, data, "both", begin)
    state = control.last_boundary(State(trained, Model(after), len(data.validation)), "both")
    yield THEN_BOUNDARY, state.history[-1].metrics, everything, steps
    for name, ranking in ((RANDOM, at_random(case, data)), (BY_LOSS, by_loss(case, data))):
        after, kept, steps = refined(case, data, begin.weights, plan, ranking=ranking)
        yield name, network_accuracies(case, data, after), kept, steps


def _cleaning(run: CleaningInMemory, outcome: rounds.Outcome[Model], last: State[Model]) -> Cleaning:
    history = outcome.state.history[1:]
    return Cleaning(
        outcome.reason,
        last.number > outcome.state.number,
        tuple(done.removed for done in history),
        tuple(run.steps),
        tuple(done.metrics["test_accuracy"] for done in history),
        tuple(run.estimates),
    )


def _after_cleanlab(case: Case, data: Data, weights: bytes, plan: Cleaning, kept: np.ndarray) -> Row:
    wrong = int((data.train.given != data.train.true)[kept].sum())
    after, _, steps = refined(case, data, weights, plan, kept=kept)
    return Row(CLEANLAB, **network_accuracies(case, data, after), steps=steps, samples=int(kept.sum()), wrong=wrong)


def _from_scratch(case: Case, data: Data, kept: np.ndarray, steps: int) -> tuple[dict[str, float], int]:
    training = cases.with_settings(DATASETS[case.dataset].training[case.network], until_train_accuracy=None)
    part = data.train.rows(kept)
    weights, done = trained_on(case, part, None, seed=case.seed, settings=training, steps=steps)
    return network_accuracies(case, data, weights), done


def flagged(case: Case, data: Data, folder: Path) -> np.ndarray:
    """bool [n]: what cleanlab's `find_label_issues` would remove."""
    probabilities = cases.out_of_sample(case, data, folder).probabilities
    return peers.confident_learning(probabilities, data.train.given)[1]


def settings(dataset: str) -> dict[str, Any]:
    """Everything that was set, as it comes back from a file."""
    used = {
        "probe": PROBE.model_dump(),
        "removal": REMOVAL.model_dump(),
        "refine": asdict(refining(dataset)),
        "decay": DECAY,
    }
    return json.loads(json.dumps(used))


# -- the files ---------------------------------------------------------------------------------------------


def kept(case: Case, folder: Path) -> Finding | None:
    """The case's finding from the folder, None where there is none."""
    path = _path(case, folder)
    if not path.exists():
        return None
    found = TypeAdapter(Finding).validate_python(json.loads(path.read_text()))
    if found.settings != settings(case.dataset):
        raise ValueError(f"{path} was measured with other settings than these; name another --folder, or remove it")
    return found


def _keep(found: Finding, folder: Path) -> None:
    path = _path(found.case, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(found), indent=1, allow_nan=False))
    os.replace(aside, path)


def _path(case: Case, folder: Path) -> Path:
    return folder / "refinement" / f"{case.key}.json"


def table(findings: Iterable[Finding]) -> pa.Table:
    """One row for each case and row; what is known of posttrain's own rounds stands in its rows alone."""
    unknown: dict[str, Any] = dict.fromkeys(Cleaning.__dataclass_fields__)
    found: list[dict[str, Any]] = []
    for finding in findings:
        known = {OURS[mode]: asdict(cleaning) for mode, cleaning in finding.cleanings.items()}
        whole = {"all_samples": finding.samples, "all_wrong": finding.wrong}
        machine = {"hardware": finding.hardware, "threads": finding.threads}
        for row in finding.rows:
            removal = {"removal_precision": precision(finding, row), "removal_recall": recall(finding, row)}
            own = {f"posttrain_{name}": value for name, value in known.get(row.name, unknown).items()}
            found.append({**asdict(finding.case), **asdict(row), **whole, **removal, **own, **machine})
    return pa.Table.from_pylist(found)


def precision(finding: Finding, row: Row) -> float | None:
    """Share of wrong labels in what the row does without; None where that is nothing."""
    removed = finding.samples - row.samples
    return (finding.wrong - row.wrong) / removed if removed else None


def recall(finding: Finding, row: Row) -> float | None:
    """Share of the wrong labels that the row does without; None where there are none."""
    return (finding.wrong - row.wrong) / finding.wrong if finding.wrong else None


# -- the report --------------------------------------------------------------------------------------------

Setting = tuple[str, str, str]
"""(data set, noise, network): what the seeds of a mean share."""
Variant = Mode | Literal["best"]
VARIANTS: dict[Variant, str] = {**OURS, "best": "posttrain, the best of them"}


@dataclass(frozen=True)
class Comparison:
    """posttrain and the best control on one setting, by seed."""

    setting: Setting
    ours: tuple[float, ...]
    controls: tuple[tuple[str, float], ...]
    """Which one was the best, and its test accuracy."""

    @property
    def differences(self) -> list[float]:
        return [own - control for own, (_, control) in zip(self.ours, self.controls, strict=True)]

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def error(self) -> float | None:
        """Standard error of the mean difference; None of one seed."""
        seeds = len(self.differences)
        return statistics.stdev(self.differences) / seeds**0.5 if seeds > 1 else None

    @property
    def above(self) -> bool:
        """Whether the difference is larger than two standard errors; never of one seed."""
        return self.error is not None and self.difference > 2 * self.error

    @property
    def below(self) -> bool:
        return self.error is not None and self.difference < -2 * self.error


def compared(findings: Sequence[Finding], variant: Variant) -> list[Comparison]:
    """Each setting's comparison of a mode, or of the best of them, with the best control.

    The best mode is chosen by validation accuracy, the best control by test accuracy, in each seed.
    """
    found: list[Comparison] = []
    for setting, group in _by_setting(findings).items():
        ours = [f.ours(f.best if variant == "best" else variant).test_accuracy for f in group]
        controls = [
            max(((row.name, row.test_accuracy) for row in map(f.row, CONTROLS) if row is not None), key=lambda c: c[1])
            for f in group
        ]
        found.append(Comparison(setting, tuple(ours), tuple(controls)))
    return found


def report(findings: Sequence[Finding], command: str) -> str:
    """All tables in Markdown."""
    sections = [
        _head(findings, command),
        _verdict(findings),
        _differences(findings),
        _due_to_removal(findings),
        _clean(findings),
        _accuracies(findings),
        _removals(findings),
    ]
    return "\n".join("\n".join(section) + "\n" for section in sections if section)


def short(findings: Sequence[Finding]) -> str:
    """The README's table: test accuracy, mean over the noisy cases."""
    groups: dict[str, list[Finding]] = {}
    for (dataset, _, network), group in _by_setting(_noisy(findings)).items():
        groups.setdefault(f"{dataset}, {network}", []).extend(group)
    return "\n".join(_lines(["", *groups], _accuracy_rows(list(groups.values()))))


def _head(findings: Sequence[Finding], command: str) -> list[str]:
    sizes = [
        f"{name} ({DATASETS[name].train} / {DATASETS[name].validation} / {DATASETS[name].test})"
        for name in DATASETS
        if any(f.case.dataset == name for f in findings)
    ]
    machines = sorted({f"{f.hardware}; {f.threads} thread(s)" for f in findings})
    seeds = sorted({f.case.seed for f in findings})
    with_cleanlab = sum(f.row(CLEANLAB) is not None for f in findings)
    return [
        "# Is the model better afterwards?",
        "",
        f"`{command}`",
        "",
        f"- data sets (training / validation / test images): {', '.join(sizes)}",
        f"- seeds: {', '.join(map(str, seeds))} (the sample, the wrong labels and the network depend on them)",
        f"- cases: {len(findings)}, of which {len(_noisy(findings))} with wrong labels; "
        f"cleanlab's removal was measured on {with_cleanlab}",
        *(f"- measured on: {machine}" for machine in machines),
        f"- posttrain's defaults but for removal.budget = {REMOVAL.budget:g} (not {Removal().budget:g}) and "
        f"removal.max_rounds = {REMOVAL.max_rounds} (not {Removal().max_rounds})",
        f"- refining the network, each round: {REFINE.epochs} epochs of {REFINE.optimizer}, learning rate "
        f"{REFINE.learning_rate:g}, momentum {REFINE.momentum:g}, weight decay {REFINE.weight_decay:g}, batch "
        f"{REFINE.batch_size}, augmentation {REFINE.augment} (digits: crop), {REFINE.schedule} schedule",
        "",
        "Test accuracy in percent, mean ± standard deviation over seeds; the test labels are right. All rows of a case",
        "start from the same trained network. posttrain's modes are its refine.scope: a new head (the boundary), the",
        "whole network, or both (the network, and in the end the boundary as its head, unless the validation accuracy",
        "falls). The rows of the whole network take the same number of gradient steps, round by round with the same",
        "seeds; where posttrain stopped before its first round they take none, and are the network as it came. EMA:",
        f"moving average of weights and batch-norm statistics, decay {DECAY:g} a step. Then the boundary: drawn by all",
        "samples on what `no removal, same steps` gave, it becomes the head by the rule of posttrain, both.",
        "From scratch: as many steps as the case's network took, by the same settings without its early stop, so that",
        "a falling learning rate falls to its end. A number in brackets: so many seeds were measured, fewer than of",
        "the other rows.",
    ]


def _verdict(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    lines = [
        "## Verdict",
        "",
        "On the settings (data set, noise, network) with wrong labels. The best control is picked by test accuracy in",
        "every seed, which favours the controls; the best of posttrain's modes by validation accuracy, on labels as",
        f"noisy as the rest. Controls: {', '.join(CONTROLS)}.",
        _on_two_errors(noisy),
    ]
    for variant, name in VARIANTS.items():
        found = compared(noisy, variant)
        known = [c for c in found if c.error is not None]
        above, rest = [c for c in known if c.above], [c for c in known if not c.above]
        unknown = f" Of {len(found) - len(known)} settings there is one seed alone." if len(known) < len(found) else ""
        lines += [
            "",
            f"**{name}**: above the best control by more than 2 standard errors on {len(above)} of {len(known)} "
            f"settings, not on {len(rest)}; below it by more than that on {sum(c.below for c in rest)}.{unknown}"
            + (" Not above:" if rest else ""),
            *([""] if rest else []),
            *(f"- {', '.join(c.setting)}: {_difference(c)}{' (below)' if c.below else ''}" for c in rest),
        ]
    return lines


def _on_two_errors(findings: Sequence[Finding]) -> str:
    fewest = min(len(group) for group in _by_setting(findings).values())
    if fewest < 2:
        return "Of one seed there is no standard error, and nothing is called above."
    # of normal differences
    wanted = float(student.ppf(0.975, fewest - 1))
    return f"Of {fewest} seeds, a 95 % interval would ask for {wanted:.1f} standard errors: 2 are weak evidence."


def _differences(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    parts = {variant: compared(noisy, variant) for variant in VARIANTS}
    lines: list[list[str]] = []
    for own in zip(*parts.values(), strict=True):
        best = Counter(name for name, _ in own[-1].controls).most_common()
        lines.append(
            [
                *own[0].setting,
                str(len(own[0].ours)),
                *(f"**{_difference(c)}**" if c.above else _difference(c) for c in own),
                ", ".join(f"{name} {number}" for name, number in best),
            ]
        )
    columns = ["data set", "noise", "network", "seeds", *VARIANTS.values(), "best of all controls (seeds)"]
    return [
        "## posttrain minus the best control",
        "",
        "Points of test accuracy, mean over seeds ± standard error of the paired differences; bold: above by more than",
        "2 standard errors.",
        "",
        *_lines(columns, lines),
    ]


def _due_to_removal(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    lines: list[list[str]] = []
    for setting, group in _by_setting(noisy).items():
        cells = []
        for mode, without in ABLATIONS.items():
            pairs = [(f.ours(mode), row) for f in group if (row := f.row(without)) is not None]
            cells.append(_percent([own.test_accuracy - row.test_accuracy for own, row in pairs], signed=True))
        lines.append([*setting, str(len(group)), *cells])
    columns = ["data set", "noise", "network", "seeds", *(f"{OURS[m]} minus {ABLATIONS[m]}" for m in MODES)]
    return [
        "## What is due to the removal",
        "",
        "Points of test accuracy against the same without removing anything, mean ± standard deviation over seeds.",
        "",
        *_lines(columns, lines),
    ]


def _clean(findings: Sequence[Finding]) -> list[str]:
    clean = [f for f in findings if not f.wrong]
    if not clean:
        return []
    names = (*OURS.values(), NEW_HEAD, CHOSEN, NO_REMOVAL, EMA, THEN_BOUNDARY)
    lines: list[list[str]] = []
    for (dataset, _, network), group in _by_setting(clean).items():
        cells = [_percent([row.test_accuracy if (row := f.row(UNTOUCHED)) else None for f in group])]
        cells += [_percent([_gain(f, name) for f in group], signed=True) for name in names]
        cells += [_percent([1 - f.ours(mode).samples / f.samples for f in group]) for mode in ("head", "network")]
        lines.append([dataset, network, str(len(group)), *cells])
    columns = ["data set", "network", "seeds", UNTOUCHED, *names, "removed, head", "removed, network"]
    return [
        "## Clean data",
        "",
        "The network as it came: test accuracy. Then the difference to it, in points, and the share removed, in",
        "percent: everything that is removed here is wrongly removed.",
        "",
        *_lines(columns, lines),
    ]


def _gain(finding: Finding, name: str) -> float | None:
    row, before = finding.row(name), finding.row(UNTOUCHED)
    return None if row is None or before is None else row.test_accuracy - before.test_accuracy


def _accuracies(findings: Sequence[Finding]) -> list[str]:
    parts: dict[tuple[str, str], dict[str, list[Finding]]] = {}
    for (dataset, noise, network), group in _by_setting(findings).items():
        parts.setdefault((dataset, network), {})[noise] = group
    lines = ["## Test accuracy"]
    for (dataset, network), by_noise in parts.items():
        seeds = " or ".join(map(str, sorted({len(group) for group in by_noise.values()})))
        lines += ["", f"### {dataset}, {network} (seeds: {seeds})", ""]
        lines += _lines(["", *by_noise], _accuracy_rows(list(by_noise.values())))
    return lines


def _accuracy_rows(groups: Sequence[Sequence[Finding]]) -> list[list[str]]:
    """A cell for each group, of the rows that any of them has."""
    found: list[list[str]] = []
    for name in ROWS:
        cells = [
            _by_seed([(f.case.seed, row.test_accuracy if (row := f.row(name)) else None) for f in g]) for g in groups
        ]
        found += [[name, *cells]] if any(cells) else []
    return found


def _removals(findings: Sequence[Finding]) -> list[str]:
    lines: list[list[str]] = []
    # both removes what the network does
    modes: dict[Mode, Mode] = {"head": "head", "network": "both"}
    for setting, group in _by_setting(findings).items():
        for mode, last in modes.items():
            own = [(f, f.ours(mode)) for f in group]
            cleanings = [f.cleanings[mode] for f in group]
            first = [c.estimates[0] for c in cleanings]
            low, high = (100 * statistics.mean(ends) for ends in ([e.low for e in first], [e.high for e in first]))
            reasons = Counter(_shortened(c.reason) for c in cleanings).most_common()
            lines.append(
                [
                    *setting,
                    mode,
                    _percent([f.wrong / f.samples for f in group]),
                    f"{_percent([e.rate for e in first])} ({low:.1f} to {high:.1f})",
                    _percent([c.estimates[-1].rate for c in cleanings]),
                    ", ".join(str(len(c.removed)) for c in cleanings),
                    _percent([1 - row.samples / f.samples for f, row in own]),
                    _percent([precision(f, row) for f, row in own if f.wrong]),
                    _percent([recall(f, row) for f, row in own]),
                    ", ".join(f"{reason} {number}" for reason, number in reasons),
                    str(sum(f.cleanings[last].new_boundary for f in group)),
                ]
            )
    columns = ["data set", "noise", "network", "mode", "wrong labels", "estimate, first round (95 % interval)"]
    columns += ["estimate, last", "rounds by seed", "removed", "precision", "recall", "stopped by (seeds)"]
    columns += ["boundary as the head in the end (seeds)"]
    return [
        "## What posttrain removed",
        "",
        "Percent. The estimates are of the share of wrong labels among the validation samples, which stay as they are;",
        "the interval's ends are means over seeds. Stopped by: no sign of wrong labels; the estimate, once as many are",
        f"out as labels are estimated to be wrong; nothing left that looks wrong; rounds, after {REMOVAL.max_rounds};",
        "the validation accuracy, once it falls; floors of the classes. The boundary becomes the head in the end:",
        "of the head where nothing was removed and it is clearly better, of both where the validation accuracy",
        "does not fall.",
        "",
        *_lines(columns, lines),
    ]


def _shortened(reason: str) -> str:
    words = {
        "max_rounds": "rounds",
        "no sample goes": "no sign",
        "are dealt with": "the estimate",
        "no longer looks wrong": "nothing left",
        "class floors": "floors",
        "validation accuracy": "validation",
    }
    return next((short for phrase, short in words.items() if phrase in reason), reason)


def _difference(comparison: Comparison) -> str:
    error = "" if comparison.error is None else f" ± {100 * comparison.error:.1f}"
    return f"{100 * comparison.difference:+.1f}{error}"


def _by_setting(findings: Iterable[Finding]) -> dict[Setting, list[Finding]]:
    """In the order of the benchmark's lists, seeds ascending."""
    found: dict[Setting, list[Finding]] = {}
    for f in sorted(findings, key=lambda f: f.case.seed):
        found.setdefault((f.case.dataset, f.case.noise, f.case.network), []).append(f)
    names = list(DATASETS)
    return dict(
        sorted(found.items(), key=lambda i: (names.index(i[0][0]), NETWORKS.index(i[0][2]), NOISES.index(i[0][1])))
    )


def _noisy(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.wrong]


def _by_seed(values: Sequence[tuple[int, float | None]]) -> str:
    """`_percent` of each seed's mean; in brackets the number of values, where some are not known."""
    known: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None:
            known.setdefault(seed, []).append(value)
    text = _percent([statistics.mean(own) for own in known.values()])
    number = sum(map(len, known.values()))
    return text + (f" ({number})" if number and number < len(values) else "")


def _percent(values: Sequence[float | None], *, signed: bool = False) -> str:
    """Mean and standard deviation in percent, in brackets the number of values, where some are not known."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    number = f" ({len(known)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):{'+' if signed else ''}.1f}{deviation}{number}"


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


# -- the command -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=DEFAULTS["datasets"])
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=DEFAULTS["noises"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=DEFAULTS["networks"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/detection"), help="networks and findings")
    parser.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"), help="the tables")
    parser.add_argument("--cleanlab", action="store_true", help="train cleanlab's networks where they are not there")
    parser.add_argument("--without-scratch", action="store_true", help="leave out the training from scratch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables of what is there")
    parser.add_argument("--readme", action="store_true", help="measure nothing, print the README's table")
    options = parser.parse_args(arguments)
    chosen = list(cases.cases(options.datasets, options.noises, options.networks, options.seeds))
    if not (options.report or options.readme):
        torch.set_num_threads(options.threads)
        with threadpool_limits(limits=options.threads):
            for number, case in enumerate(chosen, start=1):
                print(f"[{number}/{len(chosen)}] {case}", file=sys.stderr)
                measure(case, options.folder, cleanlab=options.cleanlab, scratch=not options.without_scratch)
    findings = [found for case in chosen if (found := kept(case, options.folder)) is not None]
    if not findings:
        parser.error(f"{options.folder} holds nothing of these {len(chosen)} cases; measure them first")
    if options.readme:
        print(short(findings))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(findings), options.out / "refinement.parquet")
    text = report(findings, _command(options))
    options.out.joinpath("refinement.md").write_text(text)
    print(text)


def _command(options: argparse.Namespace) -> str:
    """What was asked for, without the folders, which are of one machine."""
    parts = ["python", "-m", "pipelines.benchmarks.refinement"]
    for name, whole in DEFAULTS.items():
        given = getattr(options, name)
        parts += [] if given == whole else [f"--{name}", *given]
    parts += ["--seeds", *(str(seed) for seed in options.seeds), *(["--cleanlab"] if options.cleanlab else [])]
    return shlex.join([*parts, *(["--threads", str(options.threads)] if options.threads != 1 else [])])


if __name__ == "__main__":
    main()
