"""The method: embed, fit, score, select, remove, refine, evaluate, commit, until it stops helping.

This page is the whole of it. It knows neither Ray nor MLflow nor a disk: its steps are handed to it as functions, and
only `commit` makes what a round did last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from posttrain import config, policy
from posttrain.live import Live, Removal
from posttrain.schema import Round

Features = TypeVar("Features")
Probe = TypeVar("Probe")
Scores = TypeVar("Scores")
Choice = TypeVar("Choice", bound="Selected")
Model = TypeVar("Model")


REFERENCE = "reference_accuracy"
"""Metric of round 0: the validation accuracy from which the patience rule counts, where it is not the model's own.
Rounds that put a new head on are compared with such a head fitted on all samples."""


@dataclass(frozen=True)
class Limits:
    """When a run ends."""

    max_rounds: int
    minimum: float
    """Share of the live samples: a round with fewer candidates than this finds no more than a clean set would show."""
    patience: int
    """Rounds in a row whose validation accuracy lies below the best by more than two standard errors."""
    section: str = "removal."
    """What stands before the names of settings in messages: nothing where they come from no run file."""

    @classmethod
    def of(cls, removal: config.Removal, *, section: str = "removal.") -> Limits:
        """Those of the section `removal` of a run file."""
        return cls(removal.max_rounds, removal.min_share, removal.patience, section)


@dataclass(frozen=True)
class State(Generic[Model, Probe]):
    """Where a run is: its rounds so far, and the samples that take part and the model after the last of them."""

    history: tuple[Round, ...]
    live: Live
    model: Model
    first: Model
    """The model as it came."""
    base: Model
    """The model whose features the rounds take where they change nothing but the head: the first one, the network with
    the weights that its training began with, or the network trained again on what the rounds before had left."""
    validation_samples: int
    probe: Probe | None = None
    """Fitted on the live samples already, where refining the model did that."""

    @property
    def number(self) -> int:
        return self.history[-1].number


@dataclass(frozen=True)
class RoundCounts:
    """How many live samples look wrong, and whether more of them may go."""

    candidates: int
    estimate: str
    """What is known of the share of wrong labels, as a clause."""
    exhausted: bool
    """Whether as many samples were acted on as all rounds may; true from the start where they may act on none."""
    share: float | None = None
    """How many all rounds may act on, where the user says so (`removal.max_share`); None: as many as may be wrong."""


@dataclass(frozen=True)
class Selected:
    """What `select` found: the samples to remove or relabel in this round."""

    removal: Removal
    counts: RoundCounts
    metrics: dict[str, float]
    """What fitting and scoring found out, for the round's metrics."""

    @property
    def acted_on(self) -> int:
        """Samples that are removed or relabelled."""
        return len(self.removal.removed) + len(self.removal.relabelled)


@dataclass(frozen=True)
class Steps(Generic[Features, Probe, Scores, Choice, Model]):
    """The steps of a round, in their order."""

    embed: Callable[[State[Model, Probe]], tuple[Features, Live]]
    """The features, and what is live without the samples that cannot be embedded."""
    fit: Callable[[State[Model, Probe], Features], Probe]
    score: Callable[[State[Model, Probe], Features, Probe], Scores]
    select: Callable[[State[Model, Probe], Scores], Choice]
    refine: Callable[[State[Model, Probe], Features, Probe, Choice, Live], tuple[Model, Probe | None]]
    """The model on the samples that are live after the removal, and the probe, where that was fitted on them anew."""
    evaluate: Callable[[State[Model, Probe], Model], dict[str, float]]
    commit: Callable[[State[Model, Probe], Choice, Round], Round]
    """Makes the round last; returns it with its timings. The state has the round's live samples and model."""


@dataclass(frozen=True)
class FinalScoring(Generic[Probe]):
    """Probe and metrics of the scoring after which no round followed."""

    probe: Probe
    metrics: dict[str, float]


@dataclass(frozen=True)
class Outcome(Generic[Model, Probe]):
    """The last committed state, and why there was no further round."""

    state: State[Model, Probe]
    reason: str
    final_scoring: FinalScoring[Probe] | None = None


def clean(
    start: State[Model, Probe], steps: Steps[Features, Probe, Scores, Choice, Model], limits: Limits
) -> Outcome[Model, Probe]:
    """Rounds from `start` on until one of the limits is reached."""
    state = start
    while (reason := limit_reached(state, limits)) is None:
        features, live = steps.embed(state)
        state = replace(state, live=live)
        probe = steps.fit(state, features)
        scores = steps.score(state, features, probe)
        selected = steps.select(state, scores)
        candidates = selected.counts.candidates
        if selected.acted_on == 0 or candidates < limits.minimum * state.live.count:
            return Outcome(state, nothing_left(state, selected, limits), FinalScoring(probe, selected.metrics))

        live = state.live.without(selected.removal)
        model, refitted = steps.refine(state, features, probe, selected, live)
        metrics = {**steps.evaluate(state, model), **selected.metrics}
        removed, relabelled = len(selected.removal.removed), len(selected.removal.relabelled)
        done = Round(state.number + 1, live.count, candidates, removed, relabelled, metrics)
        state = replace(state, live=live, model=model, probe=refitted)
        done = steps.commit(state, selected, done)
        state = replace(state, history=(*state.history, done))
    return Outcome(state, reason)


def limit_reached(state: State[Model, Probe], limits: Limits) -> str | None:
    """Why no round may follow; None where one may."""
    if state.history[-1].ended:
        return state.history[-1].ended
    if state.number >= limits.max_rounds:
        return f"{limits.section}max_rounds = {limits.max_rounds} reached"
    first = state.history[0].metrics
    # a network may be better than any new head on it: what the rounds then do is judged from that head on
    accuracies = [first.get(REFERENCE, first["validation_accuracy"])]
    accuracies += [done.metrics["validation_accuracy"] for done in state.history[1:]]
    best = max(accuracies)
    # one would be passed by chance every few rounds: the best of several is itself an extreme
    error = 2 * policy.standard_error(best, state.validation_samples)
    worse = 0
    for accuracy in reversed(accuracies):
        if accuracy >= best - error:
            break
        worse += 1
    if worse >= limits.patience:
        return (
            f"validation accuracy lay more than two standard errors ({error:.4f}) below its best ({best:.4f}) "
            f"for {worse} rounds"
        )
    return None


def nothing_left(state: State[Model, Probe], selected: Selected, limits: Limits) -> str:
    """The reason where there is nothing (more) to do."""
    counts, acted_on = selected.counts, selected.acted_on
    if counts.exhausted:
        done = policy.acted_on(state.history)
        of_user = None if counts.share is None else f"{limits.section}max_share = {counts.share:g}"
        if not done:
            return f"nothing is removed: {of_user + '; ' if of_user else ''}{counts.estimate}"
        most = f"{of_user} allows" if of_user else "may be wrong"
        return f"{done} samples were removed or relabelled, as many as {most}; {counts.estimate}"
    if counts.candidates and not acted_on:
        looks = "1 sample looks" if counts.candidates == 1 else f"{counts.candidates} samples look"
        return f"{looks} wrong, but the class floors or the budget allow none of them to be removed"
    return f"what is left no longer looks wrong: {counts.candidates} of {state.live.count} samples would be candidates"
