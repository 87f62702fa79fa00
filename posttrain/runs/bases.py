"""The base: the network whose features the rounds use, in a run that does not train its backbone.

With `refine.scope: auto` it is at first the model as it came, or the network with its initial weights. Once the rounds
find nothing more, the network is trained again on what they left. It has not seen what they removed: where a boundary
on it does better on the validation labels, the rounds go on with its features, and may find what they could not see
before. That is a round of its own, which removes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain import policy
from posttrain.cluster.network import Network
from posttrain.errors import FeaturelessError, RecipeError
from posttrain.influence.held_out import no_worse
from posttrain.live import Live
from posttrain.rounds import FinalScoring, Outcome, State
from posttrain.runs import alternatives
from posttrain.runs.alternatives import AGAIN, BOUNDARY, LOSS, ON_AGAIN
from posttrain.runs.commit import commit_without_removal
from posttrain.runs.context import Run
from posttrain.runs.embed import features_of
from posttrain.runs.fit import Fitted, chosen, chosen_in, fitted, keep_choice, refitted
from posttrain.runs.networks import initial_network, network_of
from posttrain.runs.refine import Train
from posttrain.schema import Round
from posttrain.store.scores import delete_score_shards


def first_base(run: Run, model: Network, probe: Fitted, live: Live, splits: Sequence[str]) -> tuple[Network, Fitted]:
    """The model, or with the scope `auto` the network of its initial weights, unless the boundary on that is worse.

    A network that has memorised wrong labels bends its own features towards them, and those of its initial weights have
    seen none of them. Worse: its loss on the validation labels is higher by more than one standard error.
    """
    initial = initial_network(run, model)
    if initial is None:
        return model, probe
    try:
        backbone, _ = features_of(run, initial, live, splits, may_quarantine=False)
        with run.progress.step("fit"):
            other = chosen(run, backbone, live)
    except (RecipeError, FeaturelessError) as error:
        run.progress.say(f"the rounds take the features of the model as it came; initial weights: {error}")
        return model, probe
    losses = [one.held_out_loss for one in (other, probe)]
    taken = no_worse(*losses)
    source = "initial weights" if taken else "model as it came"
    run.progress.say(
        f"the rounds take the features of the {source}; validation loss of a boundary: initial weights "
        f"{losses[0].mean:.3f}, model as it came {losses[1].mean:.3f}"
    )
    if not taken:
        return model, probe
    keep_choice(run, 0, other.choice)
    return initial, other


def base_after(run: Run, committed: Sequence[Round], first: Network) -> Network:
    """The base after these rounds of a run whose first model this is."""
    for done in reversed(committed):
        path = _path(run, done.number)
        if run.folder.exists(path):
            return network_of(run, run.folder.read_bytes(path))
    initial = initial_network(run, first)
    is_base = initial is not None and chosen_in(run, committed[:1])[0].backbone == initial.backbone
    return initial if initial is not None and is_base else first


def with_last_boundary(
    run: Run, outcome: Outcome[Network, Fitted], network: Network
) -> tuple[Outcome[Network, Fitted], Fitted]:
    """The boundary on a network's features, fitted on what the rounds left; the outcome with it."""
    state, scoring = outcome.state, outcome.final_scoring
    backbone, live = features_of(run, network, state.live, ("train", "validation"))
    state = replace(state, live=live)
    known = scoring.probe if scoring else state.probe
    with run.progress.step("fit"):
        probe = fitted(run, backbone, live, state.history, state.number + 1, known=known)
    return replace(outcome, state=state, final_scoring=FinalScoring(probe, scoring.metrics if scoring else {})), probe


def next_base(run: Run, outcome: Outcome[Network, Fitted], train: Train) -> State[Network, Fitted] | None:
    """The state in which the rounds go on, with the network trained again as their base; None where they do not.

    They do not where the present base has found nothing to remove, or `removal.max_rounds` leaves no round for another.
    """
    state, config = outcome.state, run.config
    number = state.number + 1
    if run.inputs.initial_weights is None or config.refine.scope != "auto" or number >= config.removal.max_rounds:
        return None
    if state.history[-1].ended or not policy.acted_on(policy.of_base(state.history)):
        return None
    run.progress.begin_round(number)
    outcome, boundary = with_last_boundary(run, outcome, state.base)
    state = outcome.state
    made = {
        one.name: one
        for one in alternatives.alternatives(run, state, boundary, train, only=(BOUNDARY, AGAIN, ON_AGAIN))
    }
    if ON_AGAIN not in made or made[ON_AGAIN].metrics[LOSS] >= made[BOUNDARY].metrics[LOSS]:
        return None
    network, choice = made[AGAIN].model, made[ON_AGAIN].choice
    assert choice is not None, "a boundary on a network has one"
    features_of(run, network, state.live, ("train", "validation"), may_quarantine=False)
    with run.progress.step("fit"):
        probe = refitted(run, choice, choice.members, state.live)
    run.folder.write_bytes(_path(run, number), network.weights)
    keep_choice(run, number, choice)
    state = replace(state, base=network, model=made[ON_AGAIN].model, probe=probe)
    # what the rounds measured of what is gone stays true
    measured = {k: v for k, v in state.history[-1].metrics.items() if k.startswith(("removal_", "relabel_"))}
    said = "the rounds go on with the features of the network trained again: "
    done = commit_without_removal(run, number, state.live, state.model, measured | made[ON_AGAIN].metrics, said=said)
    # of the final scoring on the base before
    delete_score_shards(run.folder, number)
    run.folder.keep_only_features(network.backbone)
    alternatives.forget(run)
    return replace(state, history=(*state.history, done))


def _path(run: Run, number: int) -> str:
    return run.folder.round(number, "base.safetensors")
