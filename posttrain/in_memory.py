"""The rounds of a run on features in memory: the steps that `rounds.clean` is handed, with no Ray and no disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain import policy, rounds
from posttrain.config import Probe, Removal
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble, Samples
from posttrain.influence.in_memory import InMemory
from posttrain.influence.noise_model import UNKNOWN, NoiseModel, Prior
from posttrain.influence.probe import BlockFn, Reduce, Standardizer
from posttrain.influence.score_round import PreviousRemovals, score_round
from posttrain.influence.selection import select
from posttrain.live import Live, Rows
from posttrain.live import Removal as Removed
from posttrain.rounds import Outcome, RoundCounts, Selected, State, Steps
from posttrain.runs.noise_report import (
    OF_RUN,
    OF_VALIDATION_SET,
    OUT_OF_FOLD,
    Wording,
    noise_metrics,
    noise_sentence,
)
from posttrain.schema import Round, stream_seed, uniform

Members = Sequence[tuple[str, float]]
"""(layer, L2 penalty) of each probe."""


class Validation(Protocol):
    """Where the ensemble is measured and calibrated: on labels that its probes were not fitted on."""

    @property
    def count(self) -> int: ...

    @property
    def wording(self) -> Wording:
        """What its samples are called."""
        ...

    def choose(self, live: InMemory, candidates: Members, classes: int) -> Members:
        """The members that the candidates' losses speak for."""
        ...

    def samples(self, live: InMemory, kept: np.ndarray, members: Members, classes: int) -> Samples:
        """The validation samples of an ensemble of these members that is fitted on the kept training samples."""
        ...


@dataclass(frozen=True)
class ValidationSet:
    """Samples of their own, on which no model was trained."""

    own: InMemory
    wording: Wording = OF_VALIDATION_SET

    @property
    def count(self) -> int:
        return len(self.own.labels)

    def choose(self, live: InMemory, candidates: Members, classes: int) -> Members:
        return ensemble.choose(live, self.own, candidates=candidates, classes=classes).members

    def samples(self, live: InMemory, kept: np.ndarray, members: Members, classes: int) -> Samples:
        return self.own


@dataclass(frozen=True)
class OutOfFold:
    """The training samples themselves, each judged by probes that were fitted without its fold.

    Also what was removed goes on being judged, under the label that it was given: like those of a validation set, these
    labels stay as noisy as they are.
    """

    fold: np.ndarray
    """int [samples]."""
    folds: int
    wording: Wording = OUT_OF_FOLD

    @classmethod
    def by_id(cls, ids: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> OutOfFold:
        """Folds of equal size within each class, by a hash of the ids."""
        order = np.lexsort((uniform(ids, stream_seed("fold", seed)), labels))
        fold = np.empty(len(ids), np.int64)
        fold[order] = np.arange(len(ids)) % folds
        return cls(fold, folds)

    @property
    def count(self) -> int:
        return len(self.fold)

    def choose(self, live: InMemory, candidates: Members, classes: int) -> Members:
        chosen = []
        for k in range(self.folds):
            others, own = (live.rows(torch.from_numpy(mask)) for mask in (self.fold != k, self.fold == k))
            chosen.append(ensemble.choose(others, own, candidates=candidates, classes=classes))
        losses: dict[tuple[str, float], float] = {}
        for found in chosen:
            for fit in found.tried:
                losses[fit.layer, fit.l2] = losses.get((fit.layer, fit.l2), 0.0) + fit.loss
        votes = {layer: sum(layer in found.layers for found in chosen) for layer, _ in losses}
        best = {layer: min((loss, l2) for (name, l2), loss in losses.items() if name == layer) for layer in votes}
        ranked = sorted(best, key=lambda layer: best[layer])
        most = max(votes.values())
        # what most folds chose; where they agree on nothing, what is chosen most often
        agreed = [layer for layer in ranked if votes[layer] > min(len(chosen) / 2, most - 0.5)]
        return [(layer, best[layer][1]) for layer in agreed[: ensemble.MAX_MEMBERS]]

    def samples(self, live: InMemory, kept: np.ndarray, members: Members, classes: int) -> Samples:
        parts = []
        for k in range(self.folds):
            own = live.rows(torch.from_numpy(self.fold == k))
            others = live.rows(torch.from_numpy(kept & (self.fold != k)))
            parts.append((own, ensemble.refit(others, own, members, classes=classes)))
        return _OfFolds(tuple(parts))


@dataclass(frozen=True)
class _OfFolds:
    """`ensemble.Samples` whose sums are taken fold by fold, each with the probes that have not seen it."""

    parts: tuple[tuple[InMemory, ProbeEnsemble], ...]

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        raise NotImplementedError("of validation samples, only standardised features are summed")

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        def reduce(fn: BlockFn, weights: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            # the weights asked for are those of the whole ensemble, which has seen these samples
            total: tuple[Tensor, ...] | None = None
            for own, fitted in self.parts:
                part = own.standardised(fitted.layers, fitted.standardizers)(fn, fitted.weights, *arguments)
                total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
            return total or ()

        return reduce


@dataclass(frozen=True)
class Fitted:
    """An ensemble that was fitted on the live samples, and the samples that it is calibrated on."""

    ensemble: ProbeEnsemble
    validation: Samples


@dataclass(frozen=True)
class Scored:
    """The scores of the live samples in a round."""

    columns: dict[str, np.ndarray]
    """[live] each: all scores, and what the other samples would label each one."""
    labels: np.ndarray
    rows: np.ndarray
    """[live]: positions among all samples."""
    noise_model: NoiseModel


@dataclass(frozen=True)
class Choice(Selected):
    """What a round removes, and what its scores say."""

    scored: Scored


@dataclass
class _Ledger:
    """What the rounds wrote down, as a run does in its folder."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """[samples] each: of every sample the scores of the last round that scored it."""
    removed_in: dict[int, np.ndarray] = field(default_factory=dict)
    """Round -> positions of the samples that it removed."""
    prior: Prior = UNKNOWN
    """What the first round that found wrong labels knew of them."""
    first: NoiseModel | None = None
    last: NoiseModel | None = None


@dataclass(frozen=True)
class Cleaned:
    """What the rounds leave behind."""

    ensemble: ProbeEnsemble
    """Fitted on the samples that stay."""
    columns: dict[str, np.ndarray]
    removed_in: np.ndarray
    """int64 [samples]: the round that removed the sample; 0 where it stayed."""
    first: NoiseModel
    """Of the first round: the noise of the labels as they came."""
    last: NoiseModel
    history: tuple[Round, ...]
    ended: str


def select_scored(
    scored: Scored,
    samples: InMemory,
    history: Sequence[Round],
    removal: Removal,
    classes: int,
    wording: Wording = OF_RUN,
) -> Choice:
    """The live samples that most likely have a wrong label, as far as budget, estimate and class floors allow."""
    noise = scored.noise_model.noise
    still = policy.allowance(history, policy.largest_share(history, noise.most, removal.max_share))
    above = None if removal.score == "random" else removal.min_log_odds
    scores = policy.candidate_scores(scored.columns[removal.score], scored.columns["mislabel_odds"], above)
    ids = scored.rows if samples.ids is None else samples.ids[scored.rows]
    live, whole = (np.bincount(own, minlength=classes) for own in (scored.labels, samples.labels.numpy()))
    block = (ids, scored.labels, scores)
    selection = select(
        lambda: [block],
        classes=classes,
        at_most=min(policy.in_one_round(len(scores), removal.budget), still),
        caps=policy.caps(live, whole, removal.class_floor),
        threshold=-np.inf,
    )
    gone = selection.mask(*block)
    metrics = {
        **noise_metrics(noise),
        "acted_on_self_confidence": float(scored.columns["self_confidence"][gone].sum(dtype=np.float64)),
    }
    share = None if removal.max_share == "estimated" else removal.max_share
    counts = RoundCounts(selection.candidates, noise_sentence(noise, wording), still == 0, share)
    return Choice(Removed(Rows.of(0, scored.rows[gone])), counts, metrics, scored)


@dataclass(frozen=True)
class _Rounds:
    """The steps of a round on samples in memory."""

    samples: InMemory
    validation: Validation
    members: Members
    classes: int
    probe: Probe
    removal: Removal
    seed: int
    ledger: _Ledger

    def mask(self, live: Live) -> np.ndarray:
        """bool [samples]: which are live."""
        return live.mask(0, np.arange(live.samples))

    def fitted(self, live: Live) -> Fitted:
        kept = self.mask(live)
        validation = self.validation.samples(self.samples, kept, self.members, self.classes)
        own = self.samples.rows(torch.from_numpy(kept))
        return Fitted(ensemble.refit(own, validation, self.members, classes=self.classes), validation)

    def fit(self, state: State[ProbeEnsemble, Fitted], features: None) -> Fitted:
        return state.probe or self.fitted(state.live)

    def score(self, state: State[ProbeEnsemble, Fitted], features: None, fitted: Fitted) -> Scored:
        rows = np.flatnonzero(self.mask(state.live))
        live = self.samples.rows(torch.from_numpy(self.mask(state.live)))
        confidence = sum(done.metrics.get("acted_on_self_confidence", 0.0) for done in state.history)
        found = score_round(
            live,
            fitted.validation,
            fitted.ensemble,
            seed=stream_seed("control", self.seed, state.number),
            curvature_kind=self.probe.curvature,
            exact_limit=self.probe.exact_limit,
            previous=PreviousRemovals(policy.acted_on(state.history), confidence),
            prior=self.ledger.prior,
        )
        blocks = list(found.tables)
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        for name, values in columns.items():
            self.ledger.columns.setdefault(name, np.zeros(state.live.samples, values.dtype))[rows] = values
        self.ledger.first = self.ledger.first or found.noise_model
        self.ledger.last = found.noise_model
        if self.ledger.prior.confident_joint is None:
            self.ledger.prior = found.noise_model.prior
        return Scored(columns, live.labels.numpy(), rows, found.noise_model)

    def select(self, state: State[ProbeEnsemble, Fitted], scored: Scored) -> Choice:
        wording = self.validation.wording
        return select_scored(scored, self.samples, state.history, self.removal, self.classes, wording)

    def refine(
        self, state: State[ProbeEnsemble, Fitted], features: None, fitted: Fitted, selected: Choice, live: Live
    ) -> tuple[ProbeEnsemble, Fitted]:
        again = self.fitted(live)
        return again.ensemble, again

    def commit(self, state: State[ProbeEnsemble, Fitted], selected: Choice, done: Round) -> Round:
        self.ledger.removed_in[done.number] = selected.removal.removed.in_partition(0)
        return done

    def steps(self) -> Steps[None, Fitted, Scored, Choice, ProbeEnsemble]:
        return Steps(
            embed=lambda state: (None, state.live),
            fit=self.fit,
            score=self.score,
            select=self.select,
            refine=self.refine,
            evaluate=lambda state, fitted: {"validation_accuracy": fitted.accuracy},
            commit=self.commit,
        )


def clean_in_memory(
    samples: InMemory,
    validation: Validation,
    *,
    classes: int,
    probe: Probe,
    removal: Removal,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Cleaned:
    """All rounds on these samples, each of which may be removed once; `tell` is called with what is being done."""
    tell("choosing layers and L2")
    candidates = [(layer, l2) for layer in samples.features for l2 in probe.l2]
    members = validation.choose(samples, candidates, classes)
    run = _Rounds(samples, validation, members, classes, probe, removal, seed, _Ledger())
    live = Live(len(samples.labels))
    first = run.fitted(live)
    metrics = {"validation_accuracy": first.ensemble.accuracy}
    history, boundary = (Round(0, live.count, 0, 0, 0, metrics),), first.ensemble
    start = State(history, live, boundary, boundary, boundary, validation.count, first)
    steps = run.steps()

    def scored(state: State[ProbeEnsemble, Fitted], features: None, fitted: Fitted) -> Scored:
        tell(f"round {state.number + 1}: {state.live.count:,} samples")
        return run.score(state, features, fitted)

    limits = rounds.Limits.of(removal, section="")
    outcome: Outcome[ProbeEnsemble, Fitted] = rounds.clean(start, replace(steps, score=scored), limits)
    removed_in = np.zeros(live.samples, np.int64)
    for number, rows in run.ledger.removed_in.items():
        removed_in[rows] = number
    assert run.ledger.first is not None and run.ledger.last is not None, "max_rounds is at least 1"
    return Cleaned(
        outcome.state.model,
        run.ledger.columns,
        removed_in,
        run.ledger.first,
        run.ledger.last,
        outcome.state.history,
        outcome.reason,
    )
