"""Alternatives: the models that a run with `refine.scope: auto` can leave behind, compared on held-out labels.

The rounds put a new head on the network, which costs little. Where the weights are known that its own training began
with, the network is also trained on what they leave, from where it is and from these weights, and each of the two gets
a boundary of its own. What is left still has some wrong labels: where the run file names plain cross-entropy, the
network is trained with generalised cross-entropy, which they bend less. Each alternative is written down as soon as it
is there, so that a run that was killed goes on with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain import policy
from posttrain.cluster.network import Network
from posttrain.errors import FeaturelessError, RecipeError
from posttrain.influence import noise_matrix
from posttrain.influence.noise_model import noise_left
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.embed import features_of
from posttrain.runs.evaluate import evaluate, held_out_loss
from posttrain.runs.fit import Choice, Fitted, chosen, chosen_in, refitted
from posttrain.runs.networks import initial_network, network_from, network_of, recipe
from posttrain.runs.refine import Train, with_boundary_as_head
from posttrain.runs.score import first_finding
from posttrain.vision.losses import Noise

LOSS = "validation_corrected_loss"
BOUNDARY = "the boundary on what is left"
AGAIN = "the network trained again on what is left"
ON_AGAIN = "a boundary on the network trained again"


@dataclass(frozen=True)
class Alternative:
    """A model, and how well it does on the held-out sets."""

    name: str
    model: Network
    metrics: dict[str, float]
    """As `evaluate` gives them, and `LOSS`: `influence.held_out` on the validation labels."""
    seconds: float
    """That it took to make it."""
    choice: Choice | None = None
    """Of a boundary on a network that was trained: its probes."""

    def as_record(self, delivered: bool) -> dict[str, Any]:
        return {"name": self.name, "delivered": delivered, "seconds": round(self.seconds, 1), **self.metrics}


@dataclass(frozen=True)
class _Maker:
    """How an alternative is made."""

    name: str
    make: Callable[[], Network] | None = None
    of: str | None = None
    """Without `make`: the alternative on whose network a boundary is fitted."""
    seconds: float = 0.0
    """That it took before."""


def alternatives(
    run: Run, state: State[Network, Fitted], boundary: Fitted, train: Train, only: Container[str] | None = None
) -> list[Alternative]:
    """All that can be delivered after the last round, or `only` these; `boundary` is fitted on what is left.

    A network that cannot be trained by its settings, or that cannot take every sample, is left out.
    """
    transition, left = _noise(run, state)
    made: dict[str, Alternative] = {}
    for maker in _makers(run, state, boundary, left, train):
        name, of = maker.name, made.get(maker.of or "")
        if (only is not None and name not in only) or (maker.make is None and of is None):
            continue
        run.progress.say(f"alternative: {name}")
        try:
            made[name] = _kept(run, state, name) or _keep(run, state, maker, of, transition)
        except (RecipeError, FeaturelessError) as error:
            # as often as it is tried
            run.folder.write_json(_path(run, state, name, "json"), {"left_out": str(error)})
            run.progress.say(f"  left out: {error}")
    return list(made.values())


def _makers(run: Run, state: State[Network, Fitted], boundary: Fitted, left: Noise, train: Train) -> Iterator[_Maker]:
    """The alternatives, those that change less first."""
    config = run.config
    yield _Maker("the model as it came", lambda: state.first)
    if policy.acted_on(state.history):

        def on_all() -> Network:
            # of round 0, whose features have nothing of what was removed since
            choice, whole = chosen_in(run, state.history[:1])[0], run.live_at_start().quarantine(state.live.quarantined)
            bases = (state.base, state.first, initial_network(run, state.first))
            base = next(one for one in bases if one is not None and one.backbone == choice.backbone)
            features_of(run, base, whole, ("train", "validation"), may_quarantine=False)
            return with_boundary_as_head(run, base, refitted(run, choice, choice.members, whole))

        yield _Maker("the boundary, nothing removed", on_all)
    yield _Maker(BOUNDARY, lambda: with_boundary_as_head(run, state.base, boundary))
    initial = run.inputs.initial_weights
    if initial is None:
        run.progress.say(
            "no network is trained: the weights that its training began with (model.initial_weights) are not known"
        )
        return
    seed = config.run.seed + 1000 * (state.number + 1)

    def trained(start: Network, section: str) -> Network:
        settings = config.refining if section == "refine" else config.pretrain
        if settings.method == "cross_entropy":
            settings = settings.model_copy(update={"method": "gce"})
            run.progress.say(f"  {section}.method = gce in place of cross_entropy: wrong labels bend it less")
        return train(run, start, settings, state.live, name=section, seed=seed, noise=left)

    yield _Maker("the network refined on what is left", lambda: trained(state.first, "refine"))
    yield _Maker("a boundary on the network refined", of="the network refined on what is left")
    last = state.history[-1]
    if policy.changed_features(last):
        # the rounds found nothing more with the network trained on just what is left: its boundary is theirs
        yield _Maker(AGAIN, lambda: state.base, seconds=last.seconds.get("pretrain", 0.0))
        return
    yield _Maker(AGAIN, lambda: trained(network_of(run, initial), "pretrain"))
    yield _Maker(ON_AGAIN, of=AGAIN)


def _noise(run: Run, state: State[Network, Fitted]) -> tuple[Tensor, Noise]:
    """T of the validation labels, and the noise of the labels that are left."""
    unit = torch.eye(len(run.inputs.classes), dtype=torch.float64)
    # as the last features saw it that showed any
    history = state.history
    while (found := first_finding(run, of := policy.of_base(history))) is None:
        history = history[: -len(of)]
        if not history:
            return unit, Noise(0.0, unit)
    done, joint = found
    # the rate is that of all samples before any was removed, in previous runs of the job, too
    before, previous = run.previous.removal, len(run.previous.removal.removed)
    left = noise_left(
        joint,
        done.metrics["live_noise"],
        state.history[0].live + previous,
        acted_on=policy.acted_on(state.history) + previous + len(before.relabelled),
        left=state.live.count,
    )
    return noise_matrix.estimate(joint, done.metrics["validation_noise"]), Noise(*left)


def _keep(
    run: Run, state: State[Network, Fitted], maker: _Maker, of: Alternative | None, transition: Tensor
) -> Alternative:
    name, choice, began = maker.name, None, time.perf_counter()
    if maker.make is not None:
        model = maker.make()
    else:
        assert of is not None, "it is left out where that is"
        backbone, live = features_of(run, of.model, state.live, ("train", "validation"), may_quarantine=False)
        with run.progress.step("fit"):
            boundary = chosen(run, backbone, live)
            model, choice = with_boundary_as_head(run, of.model, boundary), boundary.choice
    seconds = maker.seconds + time.perf_counter() - began
    metrics = evaluate(run, state, model, may_quarantine=False)
    metrics[LOSS] = held_out_loss(run, state, model, transition)
    run.folder.write_bytes(_path(run, state, name, "safetensors"), model.weights)
    record = {"recipe": recipe(model.spec), "metrics": metrics, "seconds": seconds}
    record["choice"] = asdict(choice) if choice else None
    run.folder.write_json(_path(run, state, name, "json"), record)
    return Alternative(name, model, metrics, seconds, choice)


def _kept(run: Run, state: State[Network, Fitted], name: str) -> Alternative | None:
    """What an earlier start wrote down, or the rounds when they looked for another base. Raises RecipeError."""
    path = _path(run, state, name, "json")
    if not run.folder.exists(path):
        return None
    record = run.folder.read_json(path)
    if "left_out" in record:
        raise RecipeError(record["left_out"])
    model = network_from(run, run.folder.read_bytes(_path(run, state, name, "safetensors")), record["recipe"])
    choice = Choice.read(record["choice"]) if record["choice"] else None
    return Alternative(name, model, record["metrics"], record["seconds"], choice)


def best(made: Sequence[Alternative]) -> Alternative:
    """The one with the lowest loss on the validation labels; of equal ones the first, which changes less."""
    return min(made, key=lambda one: one.metrics[LOSS])


def forget(run: Run) -> None:
    """Delete what was kept, once the best one is delivered."""
    run.folder.delete_folder(run.folder.path("alternatives"))


def _path(run: Run, state: State[Network, Fitted], name: str, ending: str) -> str:
    folder = run.folder.path("alternatives", f"{state.number:04d}")
    return f"{folder}/{name.replace(' ', '_').replace(',', '')}.{ending}"
