"""The loop: embed, fit, score, select, refine, evaluate, commit, until it stops helping.

This page is the whole method. It knows neither Ray nor MLflow nor a disk: its steps are handed to it as functions,
and only `commit` makes what a round did last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from posttrain import policy
from posttrain.schema import Round

Features = TypeVar("Features")
Probe = TypeVar("Probe")
Scores = TypeVar("Scores")
Removal = TypeVar("Removal")
Model = TypeVar("Model")


REFERENCE = "reference_accuracy"
"""In the metrics of round 0: the validation accuracy that the rounds begin from, where that is not the model's own. Of
rounds that put a new head on, it is that of this head with nothing removed."""


@dataclass(frozen=True)
class Limits:
    """When a run ends."""

    max_rounds: int
    minimum: float
    """Share of the live samples: fewer candidates than this are what a clean set gives."""
    patience: int
    """Rounds in a row whose validation accuracy lies below the best by more than two standard errors."""


@dataclass(frozen=True)
class State(Generic[Model]):
    """Where a run is: its rounds so far and the model after the last of them."""

    history: tuple[Round, ...]
    model: Model
    validation_samples: int

    @property
    def number(self) -> int:
        return self.history[-1].number

    @property
    def live(self) -> int:
        return self.history[-1].live


@dataclass(frozen=True)
class Cut:
    """What `select` found: how many of the live samples look wrong, how many of them go."""

    live: int
    """Samples that were scored."""
    candidates: int
    removed: int
    relabelled: int
    """Samples that stay, with another label."""
    estimate: str
    """What is known of the share of wrong labels, as a clause."""
    exhausted: bool
    """Whether as many samples have been dealt with as may be in all rounds; true from the start where none may."""
    share: float | None = None
    """How many may be in all rounds, where the user says so (`removal.max_share`); None: as many as may be wrong."""

    @property
    def taken(self) -> int:
        """Samples that were dealt with."""
        return self.removed + self.relabelled


@dataclass(frozen=True)
class Steps(Generic[Features, Probe, Scores, Removal, Model]):
    """The steps of a round, in their order."""

    embed: Callable[[State[Model]], Features]
    fit: Callable[[State[Model], Features], Probe]
    score: Callable[[State[Model], Features, Probe], Scores]
    select: Callable[[State[Model], Scores], Removal]
    count: Callable[[Removal], Cut]
    refine: Callable[[State[Model], Features, Removal, Probe], Model]
    evaluate: Callable[[State[Model], Model], dict[str, float]]
    commit: Callable[[State[Model], Removal, Model, Round], Round]
    """Makes the round last; returns it with its timings."""


@dataclass(frozen=True)
class Outcome(Generic[Model]):
    """The last committed state, and why there was no further round."""

    state: State[Model]
    reason: str


def clean(start: State[Model], steps: Steps[Features, Probe, Scores, Removal, Model], limits: Limits) -> Outcome[Model]:
    """Rounds from `start` on until one of the limits is reached."""
    state = start
    while (reason := limit_reached(state, limits)) is None:
        features = steps.embed(state)
        probe = steps.fit(state, features)
        scores = steps.score(state, features, probe)
        removal = steps.select(state, scores)
        cut = steps.count(removal)
        if cut.taken == 0 or cut.candidates < limits.minimum * cut.live:
            return Outcome(state, nothing_left(state, cut))
        model = steps.refine(state, features, removal, probe)
        metrics = steps.evaluate(state, model)
        done = Round(state.number + 1, cut.live - cut.removed, cut.candidates, cut.removed, cut.relabelled, metrics)
        done = steps.commit(state, removal, model, done)
        state = replace(state, history=(*state.history, done), model=model)
    return Outcome(state, reason)


def limit_reached(state: State[Model], limits: Limits) -> str | None:
    """Why no round may follow; None where one may."""
    if state.history[-1].ended:
        return state.history[-1].ended
    if state.number >= limits.max_rounds:
        return f"removal.max_rounds = {limits.max_rounds} reached"
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


def nothing_left(state: State[Model], cut: Cut) -> str:
    """The reason where there is nothing (more) to do."""
    if cut.exhausted:
        done = policy.acted_on(state.history)
        of_user = None if cut.share is None else f"removal.max_share = {cut.share:g}"
        if not done:
            return f"no sample goes: {of_user + '; ' if of_user else ''}{cut.estimate}"
        most = f"{of_user} allows" if of_user else "may be wrong"
        return f"{done} samples are dealt with, as many as {most}; {cut.estimate}"
    if cut.candidates and not cut.taken:
        looks = "1 sample looks" if cut.candidates == 1 else f"{cut.candidates} samples look"
        return f"{looks} wrong, but the budget or the class floors let none of them go"
    return f"what is left no longer looks wrong: {cut.candidates} of {cut.live} samples would be candidates"
