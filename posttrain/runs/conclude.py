"""Conclude: after the last round the best alternative is delivered, the boundary becomes the head, or the model stays.

Each is a round of its own, which removes nothing. `posttrain.policy` decides, or the loss on the validation labels.
"""

from __future__ import annotations

from dataclasses import replace

from posttrain import policy
from posttrain.cluster.network import Network
from posttrain.rounds import Outcome, State
from posttrain.runs import alternatives
from posttrain.runs.bases import with_last_boundary
from posttrain.runs.commit import commit_without_removal
from posttrain.runs.context import Run
from posttrain.runs.evaluate import evaluate
from posttrain.runs.fit import Fitted
from posttrain.runs.networks import feature_network, read_checkpoint
from posttrain.runs.refine import Train, train, with_boundary_as_head


def conclude(run: Run, outcome: Outcome[Network, Fitted], *, train: Train = train) -> Outcome[Network, Fitted]:
    """The outcome with the model that the run leaves behind; where a network is trained for it, by `train`."""
    if run.config.refine.scope == "auto":
        return _best_alternative(run, outcome, train)
    outcome = _boundary_as_head(run, outcome)
    state = outcome.state
    first, last = state.history[0].metrics, state.history[-1].metrics
    accuracies = first["validation_accuracy"], last["validation_accuracy"]
    if not policy.first_model_stays(*accuracies, state.validation_samples):
        return outcome
    reason = (
        f"{outcome.reason}; the model stays as it came: of the validation set it has "
        f"{100 * accuracies[0]:.1f} % right, and what became of it {100 * accuracies[1]:.1f} %"
    )
    number = state.number + 1
    run.progress.begin_round(number)
    # measured in round 0, on the same samples
    metrics = last | {name: first[name] for name in first if name.startswith(("validation_", "test_"))}
    said = "the model as it came: "
    done = commit_without_removal(run, number, state.live, state.first, metrics, ended=reason, said=said)
    return replace(outcome, state=replace(state, history=(*state.history, done), model=state.first), reason=reason)


def _best_alternative(run: Run, outcome: Outcome[Network, Fitted], train: Train) -> Outcome[Network, Fitted]:
    state = outcome.state
    if state.history[-1].ended:
        _tidy(run, state)
        return outcome
    number = state.number + 1
    run.progress.begin_round(number)
    outcome, probe = with_last_boundary(run, outcome, state.base)
    state, scoring = outcome.state, outcome.final_scoring
    made = alternatives.alternatives(run, state, probe, train)
    best = alternatives.best(made)
    run.folder.write_json(run.folder.path("alternatives.json"), [one.as_record(one is best) for one in made])
    metrics = {**state.history[-1].metrics, **(scoring.metrics if scoring else {}), **best.metrics}
    said = f"delivered: {best.name}: "
    done = commit_without_removal(run, number, state.live, best.model, metrics, ended=outcome.reason, said=said)
    state = replace(state, history=(*state.history, done), model=best.model)
    _tidy(run, state)
    return replace(outcome, state=state)


def _tidy(run: Run, state: State[Network, Fitted]) -> None:
    """Keep nothing of the alternatives that are not delivered."""
    alternatives.forget(run)
    run.folder.keep_only_features(feature_network(state.model, state.base).backbone)


def _boundary_as_head(run: Run, outcome: Outcome[Network, Fitted]) -> Outcome[Network, Fitted]:
    state, scope = outcome.state, run.config.refine.scope
    last = state.history[-1]
    if last.ended or not policy.boundary_may_become_head(scope, state.number):
        return outcome
    number = state.number + 1
    run.progress.begin_round(number)
    outcome, probe = with_last_boundary(run, outcome, state.model)
    state, scoring = outcome.state, outcome.final_scoring
    before, after = last.metrics["validation_accuracy"], probe.ensemble.accuracy
    if not policy.boundary_becomes_head(scope, state.number, before, after, state.validation_samples):
        return outcome
    with run.progress.step("refine"):
        model = with_boundary_as_head(run, state.model, probe)
    metrics = {**last.metrics, **(scoring.metrics if scoring else {}), **evaluate(run, state, model)}
    said = "the boundary as the new head, nothing removed: "
    done = commit_without_removal(run, number, state.live, model, metrics, ended=outcome.reason, said=said)
    return replace(outcome, state=replace(state, history=(*state.history, done), model=model))


def base_network(run: Run, state: State[Network, Fitted]) -> Network:
    """The network that later runs of a job start from, and whose features they need of new images alone."""
    last = state.history[-1]
    if run.config.refine.keeps_backbone:
        # where a trained network is delivered, too: a boundary on its layers is no network to start from
        return state.base
    if state.model.digest == state.first.digest:
        return state.first
    # a round that only put the boundary on
    return read_checkpoint(run, last.number - 1) if last.ended else state.model
