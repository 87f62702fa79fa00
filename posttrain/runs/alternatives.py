"""Alternatives: the models that a run with `refine.scope: auto` can leave behind, compared on held-out labels.

The rounds put a new head on the network, which costs little. Where the weights are known that its own training began
with, the network is also trained on what they leave, from where it is and from these weights, and each of the two gets
a boundary of its own. What is left still has some wrong labels: where the run file names plain cross-entropy, the
network is trained with generalised cross-entropy, which they bend less. Each alternative is written down as soon as it
is there, so that a run that was killed goes on with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain import policy
from posttrain.cluster.network import Network
from posttrain.influence import noise_matrix
from posttrain.influence.noise_model import noise_left
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.embed import features_of
from posttrain.runs.evaluate import evaluate, held_out_loss
from posttrain.runs.fit import Fitted, chosen, refitted
from posttrain.runs.networks import network_from, network_of, recipe
from posttrain.runs.refine import train, with_boundary_as_head
from posttrain.runs.score import prior_of
from posttrain.vision.losses import Noise

LOSS = "validation_corrected_loss"


@dataclass(frozen=True)
class Alternative:
    """A model, and how well it does on the held-out sets."""

    name: str
    model: Network
    metrics: dict[str, float]
    """As `evaluate` gives them, and `LOSS`: `influence.held_out` on the validation labels."""
    seconds: float
    """That it took to make it."""

    def as_record(self, delivered: bool) -> dict[str, Any]:
        return {"name": self.name, "delivered": delivered, "seconds": round(self.seconds, 1), **self.metrics}


def alternatives(run: Run, state: State[Network, Fitted], boundary: Fitted) -> list[Alternative]:
    """All that can be delivered after the last round; `boundary` is fitted on what is left."""
    transition, left = _noise(run, state)
    made: list[Alternative] = []
    for name, make in _makers(run, state, boundary, left, made):
        run.progress.say(f"alternative: {name}")
        made.append(_kept(run, name) or _keep(run, state, name, make, transition))
    return made


def _makers(
    run: Run, state: State[Network, Fitted], boundary: Fitted, left: Noise, made: Sequence[Alternative]
) -> Iterator[tuple[str, Callable[[], Network]]]:
    """The alternatives by name, those that change less first."""
    config = run.config
    yield "the model as it came", lambda: state.first
    if policy.acted_on(state.history):
        whole = run.live_at_start().quarantine(state.live.quarantined)

        def on_all() -> Network:
            again = refitted(run, boundary.choice, boundary.ensemble.members, whole)
            return with_boundary_as_head(run, state.base, again)

        yield "the boundary, nothing removed", on_all
    yield "the boundary on what is left", lambda: with_boundary_as_head(run, state.base, boundary)
    seed = config.run.seed + 1000 * (state.number + 1)

    def trained(start: Network, section: str) -> Network:
        settings = config.refining if section == "refine" else config.pretrain
        if settings.method == "cross_entropy":
            settings = settings.model_copy(update={"method": "gce"})
        return train(run, start, settings, state.live, name=section, seed=seed, noise=left)

    def with_boundary() -> Network:
        """The last alternative with a boundary fitted on its own features."""
        network = made[-1].model
        backbone, live = features_of(run, network, state.live, ("train", "validation"))
        with run.progress.step("fit"):
            return with_boundary_as_head(run, network, chosen(run, backbone, live, state.number + 1))

    initial = run.inputs.initial_weights
    if initial is None:
        run.progress.say(
            "no network is trained: the weights that its training began with (model.initial_weights) are not known"
        )
        return
    yield "the network refined on what is left", lambda: trained(state.first, "refine")
    yield "a boundary on the network refined", with_boundary
    yield "the network trained again on what is left", lambda: trained(network_of(run, initial), "pretrain")
    yield "a boundary on the network trained again", with_boundary


def _noise(run: Run, state: State[Network, Fitted]) -> tuple[Tensor, Noise]:
    """T of the validation labels, and the noise of the labels that are left."""
    prior, classes = prior_of(run, state.history), len(run.inputs.classes)
    unit = torch.eye(classes, dtype=torch.float64)
    joint = prior.confident_joint
    if joint is None:
        return unit, Noise(0.0, unit)
    rate = next(done.metrics["live_noise"] for done in state.history if "live_noise" in done.metrics)
    acted_on, first = policy.acted_on(state.history), state.history[0].live
    left = noise_left(joint, rate, first, acted_on=acted_on, left=state.live.count)
    return noise_matrix.estimate(joint, prior.validation_noise_rate), Noise(*left)


def _keep(
    run: Run, state: State[Network, Fitted], name: str, make: Callable[[], Network], transition: Tensor
) -> Alternative:
    began = time.perf_counter()
    model = make()
    seconds = time.perf_counter() - began
    metrics = evaluate(run, state, model)
    metrics[LOSS] = held_out_loss(run, state, model, transition)
    run.folder.write_bytes(_path(run, name, "safetensors"), model.weights)
    record = {"recipe": recipe(model.spec), "metrics": metrics, "seconds": seconds}
    run.folder.write_json(_path(run, name, "json"), record)
    return Alternative(name, model, metrics, seconds)


def _kept(run: Run, name: str) -> Alternative | None:
    """What an earlier start wrote down."""
    path = _path(run, name, "json")
    if not run.folder.exists(path):
        return None
    record = run.folder.read_json(path)
    model = network_from(run, run.folder.read_bytes(_path(run, name, "safetensors")), record["recipe"])
    return Alternative(name, model, record["metrics"], record["seconds"])


def best(made: Sequence[Alternative]) -> Alternative:
    """The one with the lowest loss on the validation labels; of equal ones the first, which changes less."""
    return min(made, key=lambda one: one.metrics[LOSS])


def forget(run: Run) -> None:
    """Delete what was kept, once the best one is delivered."""
    run.folder.delete_folder(run.folder.path("alternatives"))


def _path(run: Run, name: str, ending: str) -> str:
    return run.folder.path("alternatives", f"{name.replace(' ', '_').replace(',', '')}.{ending}")
