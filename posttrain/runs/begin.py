"""Begin: round 0, the model as it came; or the state after the last committed round, where a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.cluster.network import Network
from posttrain.influence.score_round import PreviousRemovals
from posttrain.live import Live
from posttrain.methods import NEEDS_NOISE
from posttrain.rounds import REFERENCE, State
from posttrain.runs.bases import base_after, first_base
from posttrain.runs.commit import commit_without_removal, tell_round
from posttrain.runs.context import Run
from posttrain.runs.embed import features_of
from posttrain.runs.evaluate import evaluate, of_boundary
from posttrain.runs.fit import Fitted, fitted, refitted
from posttrain.runs.networks import network_of, read_checkpoint
from posttrain.runs.quarantine import quarantined_before, readable_validation_samples
from posttrain.runs.refine import train
from posttrain.runs.score import round_scores
from posttrain.schema import Round
from posttrain.vision.losses import Noise


def begin_or_resume(run: Run) -> State[Network, Fitted]:
    """The state to go on from."""
    committed = run.ledger.rounds()
    if not committed:
        return begin(run, first_model(run))
    run.progress.say(f"{run.config.run.path}: going on after round {committed[-1].number}")
    return resume(run, committed)


def first_model(run: Run) -> Network:
    """The model to clean with: the given weights, or the network trained on the given labels first."""
    if run.inputs.weights is not None:
        return network_of(run, run.inputs.weights)
    path = run.folder.path("pretrained", "model.safetensors")
    if run.folder.exists(path):
        run.progress.say(f"pre-trained already: {path}")
        return network_of(run, run.folder.read_bytes(path))
    run.progress.say("no model.weights given: training the network on the given labels first")
    assert run.inputs.initial_weights is not None, "without weights, those that the factory draws are known"
    network = network_of(run, run.inputs.initial_weights)
    live, seed = run.live_at_start(), run.config.run.seed
    noise = _noise_seen_first(run, network) if run.config.pretrain.method in NEEDS_NOISE else None
    model = train(run, network, run.config.pretrain, live, name="pretrain", seed=seed, noise=noise)
    run.folder.write_bytes(path, model.weights)
    return model


def _noise_seen_first(run: Run, network: Network) -> Noise:
    """The label noise by the network once trained with cross-entropy, as Patrini et al. (2017) estimate T first."""
    settings, live = run.config.pretrain, run.live_at_start()
    plain = settings.model_copy(update={"method": "cross_entropy", "method_arguments": {}})
    run.progress.say(f"pretrain.method = {settings.method} needs an estimate of the label noise: cross-entropy first")
    model = train(run, network, plain, live, name="pretrain", seed=run.config.run.seed)
    backbone, live = features_of(run, model, live, ("train", "validation"))
    with run.progress.step("fit"):
        probe = fitted(run, backbone, live, (), 0)
    found = round_scores(run, probe, seed=0, previous=PreviousRemovals()).noise_model
    return Noise(found.remaining_noise_rate, found.transition)


def begin(run: Run, model: Network) -> State[Network, Fitted]:
    """The state after round 0: everything is embedded once, and what cannot be read is quarantined."""
    run.progress.begin_round(0)
    splits = [name for name in ("train", "validation", "test") if name in run.splits]
    backbone, live = features_of(run, model, run.live_at_start(), splits)
    with run.progress.step("fit"):
        probe = fitted(run, backbone, live, (), 0)
    base, probe = first_base(run, model, probe, live, splits)
    state = State((), live, model, model, base, readable_validation_samples(run), probe)
    metrics = evaluate(run, state, model)
    with run.progress.step("fit"):
        metrics |= _without_removal(run, probe, live)
    if run.config.refine.keeps_backbone:
        metrics[REFERENCE] = metrics["boundary_validation_accuracy"]
    done = commit_without_removal(run, 0, live, model, metrics)
    return replace(state, history=(done,))


def _without_removal(run: Run, probe: Fitted, live: Live) -> dict[str, float]:
    """What a removal has to be compared with: a new head, and the chosen boundary, with nothing removed."""
    head, l2_values = run.inputs.spec.head, run.config.probe.l2
    of_head = [one for one in probe.choice.best_of_layers() if one[0] == head]
    member = of_head[0] if of_head else (head, l2_values[len(l2_values) // 2])
    refit = refitted(run, probe.choice, (member,), live)
    metrics: dict[str, float] = {}
    for name, boundary in (("refit", refit.ensemble), ("boundary", probe.ensemble)):
        found = of_boundary(run, probe.choice.backbone, boundary)
        metrics |= {f"{name}_{key}": value for key, value in found.items() if key.endswith("accuracy")}
    return metrics


def resume(run: Run, committed: Sequence[Round]) -> State[Network, Fitted]:
    """The state after the last of the committed rounds; MLflow is told of those that it does not have."""
    live = run.live_at_start().quarantine(quarantined_before(run)).without(run.ledger.removal(committed))
    for done in committed:
        tell_round(run, done)
    first, last = (read_checkpoint(run, number) for number in (0, committed[-1].number))
    base = base_after(run, committed, first)
    return State(tuple(committed), live, last, first, base, readable_validation_samples(run))
