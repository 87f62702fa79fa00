"""Refine: the model without the samples of the round: a new head on it, or the whole network fine-tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from posttrain.cluster import training
from posttrain.cluster.network import Network, load_network
from posttrain.config import Training as TrainingSection
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.fit import Fitted, refitted
from posttrain.runs.networks import network_of
from posttrain.runs.select import Choice
from posttrain.vision import models
from posttrain.vision.losses import Noise
from posttrain.vision.probed_network import with_probe
from posttrain.vision.weights import to_bytes


class Train(Protocol):
    """Trains a network as `train` does."""

    def __call__(
        self,
        run: Run,
        model: Network,
        settings: TrainingSection,
        live: Live,
        *,
        name: str,
        seed: int,
        max_steps: int | None = None,
        noise: Noise | None = None,
    ) -> Network: ...


def train(
    run: Run,
    model: Network,
    settings: TrainingSection,
    live: Live,
    *,
    name: str,
    seed: int,
    max_steps: int | None = None,
    noise: Noise | None = None,
) -> Network:
    """The network trained on the live samples, through Ray Train.

    `name` is that of the step; `noise` is what is known of the live labels, where the method needs it.
    """
    run.workers.make_room()
    if run.train_workers:
        # Ray Train waits for ever for CPUs and GPUs that the scoring workers hold
        run.workers.release()
    gpus = run.config.ray.gpus_per_train_worker
    with run.progress.step(name) as tell:
        trained = training.train(
            model,
            run.splits["train"],
            live,
            training.Training(**settings.model_dump(exclude={"scope"}), max_steps=max_steps),
            seed=seed,
            workers=run.train_workers,
            gpus_per_worker=run.workers.gpus_to_train(max(1, run.train_workers)) if gpus is None else gpus,
            folder=run.folder,
            run_name=f"{name}-{seed}",
            progress=tell,
            noise=noise,
        )
    epochs, steps = f"epoch{'s' * (trained.epochs != 1)}", f"step{'s' * (trained.steps != 1)}"
    run.progress.say(
        f"  {name}: {trained.epochs} {epochs}, {trained.steps} {steps}{f' on {trained.gpu}' if trained.gpu else ''}, "
        f"accuracy on the given labels {100 * trained.train_accuracy:.1f} %"
    )
    if trained.part is not None:
        run.progress.say(
            f"  {name}: memory did not suffice for a whole step; its samples went through {trained.part} at a time"
        )
    return network_of(run, trained.weights, model.spec)


def refine(
    run: Run,
    state: State[Network, Fitted],
    backbone: str,
    fitted: Fitted,
    selected: Choice,
    live: Live,
    *,
    train: Train = train,
) -> tuple[Network, Fitted | None]:
    """The model on what is live after the removal, and the ensemble, where it was fitted on that anew."""
    settings = run.config.refining
    if settings.keeps_backbone:
        with run.progress.step("refine"):
            assert state.base.backbone == backbone
            again = refitted(run, fitted.choice, fitted.ensemble.members, live)
            return with_boundary_as_head(run, state.base, again), again
    seed = run.config.run.seed + 1000 * (state.number + 1)
    return train(run, state.model, settings, live, name="refine", seed=seed, noise=selected.noise), None


def with_boundary_as_head(run: Run, network: Network, fitted: Fitted) -> Network:
    """The network with the ensemble's boundary as its head.

    Where a member's layer comes before the last one, it is the network up to the last of the members' layers.
    """
    boundary, spec = fitted.ensemble, network.spec
    weight, bias = (part.float() for part in boundary.fold())
    model = load_network(network)
    if boundary.layers == (spec.head,):
        models.replace_head(model, spec.head, weight, bias)
        return network_of(run, to_bytes(model), spec)
    factory, arguments, probed = with_probe(
        model,
        spec.head,
        boundary.layers,
        spec.width,
        weight,
        bias,
        factory=spec.factory,
        arguments=spec.arguments,
        size=(spec.image.channels, *spec.image.size),
    )
    spec = replace(spec, factory=factory, arguments=arguments, head="probe", layers=("probe",))
    return network_of(run, to_bytes(probed), spec)
