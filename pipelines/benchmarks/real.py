"""A real pre-trained network: EfficientNet-Lite0, overfitted to noisy labels, or frozen with a fitted head.

    python -m pipelines.benchmarks.real --folder runs/real

Overfitted: fine-tuned from the pre-trained weights on all given labels until it fits them. Frozen: as pre-trained, with
a head fitted on all given labels. posttrain does what `refine.scope: auto` does, in rounds of 10 %, but for the network
refined from where it is; each control gets the same features, and each training the same recipe, seed and steps. What
takes long is kept in the folder as soon as it is there: the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from pipelines.benchmarks import cases, findings
from pipelines.benchmarks.baselines import confident_learning, cross_validated, self_confidence
from pipelines.benchmarks.cases import DATASETS, PRETRAINED, Case, Data
from pipelines.benchmarks.first_round import embedded
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import PROBE, CleaningInMemory, Start, boundary_logits, rows, start
from pipelines.benchmarks.real_report import AGAIN, BOUNDARY, EMA, report
from pipelines.benchmarks.training import steps_of_epoch
from posttrain import policy
from posttrain.config import Removal
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.held_out import HeldOutLoss, corrected_loss, no_worse
from posttrain.influence.in_memory import InMemory
from posttrain.influence.probe import in_memory
from posttrain.influence.score_round import score_round
from posttrain.vision.losses import generalised_cross_entropy
from posttrain.vision.models import find_head, head_of
from posttrain.vision.weights import to_bytes

NOISES = (
    "human random1",
    "symmetric 40",
    "human aggre",
    "instance 40",
    "clean",
    "pair 40",
    "symmetric 20",
    "instance 20",
    "pair 20",
)
STATES = ("overfitted", "frozen")
DECAY = 0.99
"""Of the moving average of weights, by step."""
NEIGHBOURS = 50
REMOVAL = Removal(budget=0.1, max_rounds=8)


@dataclass
class Finding:
    """What was measured of a case, as it is written down."""

    case: str
    wrong: float
    """Share of wrong labels."""
    base: str = ""
    """Whose features the rounds take first: those of the network as it came, or of its initial weights."""
    trained_bases: int = 0
    """How often they go on with those of the network trained again."""
    rate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """As posttrain estimates it, with its interval."""
    removed: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By method: share of the samples, precision, recall."""
    ranking: dict[str, float] = field(default_factory=dict)
    """Average precision by method."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model: test accuracy, and what else is known of it."""


@dataclass(frozen=True)
class Network:
    """A network that was trained from the pre-trained weights."""

    weights: bytes = field(repr=False)
    average: bytes = field(repr=False)
    """The moving average of its weights."""
    aum: np.ndarray
    seconds: float


def measured(case: Case, folder: Path) -> Finding:
    """All that is measured of a case."""
    data = cases.load(case)
    wrong = data.train.given != data.train.true
    initial = to_bytes(cases.network(case, case.seed))
    everything = np.ones(len(wrong), bool)
    plain = trained(case, data, initial, everything, "cross_entropy", folder)
    pretrained = start(case, data, initial)
    own = pretrained
    if case.network == "overfitted":
        own = start(case, data, plain.weights)
    weights = own.weights if case.network == "overfitted" else _with_head(case, data, pretrained)
    began = time.perf_counter()
    # as `runs.begin` chooses the base of the rounds
    unit = torch.eye(data.classes, dtype=torch.float64)
    own_loss, initial_loss = (_boundary_loss(one, unit) for one in (own, pretrained))
    base = pretrained if no_worse(initial_loss, own_loss) else own
    run = CleaningInMemory(case, data, "head", base, REMOVAL)
    run.clean()
    runs = [run]
    while (following := _going_on(case, data, initial, runs[-1], folder)) is not None:
        following.clean()
        runs.append(following)
    run, last = runs[0], runs[-1]
    seconds = time.perf_counter() - began
    suspicion, flagged = _cleanlab(pretrained)
    estimate = run.estimates[0]
    found = Finding(str(case), float(wrong.mean()), "as it came" if base is own else "initial weights")
    found.rate = estimate.rate, estimate.low, estimate.high
    found.trained_bases = len(runs) - 1
    for name, gone in (("posttrain", ~last.kept), ("posttrain, first features", ~run.kept), ("cleanlab", flagged)):
        hit = int((gone & wrong).sum())
        found.removed[name] = float(gone.mean()), hit / max(1, int(gone.sum())), hit / max(1, int(wrong.sum()))
    aum = plain.aum if case.network == "overfitted" else None
    rankings = {**dict(_rankings(case, data, base, pretrained, weights, aum)), "cleanlab, self-confidence": suspicion}
    if wrong.any():
        found.ranking = {name: float(average_precision_score(wrong, score)) for name, score in rankings.items()}
    transition = run.validation_transition()
    found.rows["as it came"] = _accuracy(case, data, weights, transition)
    if case.network == "overfitted":
        found.rows[f"as it came{EMA}"] = _accuracy(case, data, plain.average, transition)
    kept = {
        "posttrain": last.kept,
        "nothing removed": everything,
        "random removal": _at_random(case, last.kept),
        "cleanlab": ~flagged,
        "right labels alone": ~wrong,
    }
    _boundaries(data, base, last.start, kept, transition, found)
    found.rows["boundary, posttrain"]["seconds"] = seconds
    for name, left in kept.items():
        network = trained(case, data, initial, left, "gce", folder)
        row = AGAIN + name
        found.rows[row] = _accuracy(case, data, network.weights, transition) | {"seconds": network.seconds}
        found.rows[row + EMA] = _accuracy(case, data, network.average, transition)
        found.rows[row + BOUNDARY] = _boundary_on(case, data, base, network.weights, left, transition)
    return found


def _going_on(case: Case, data: Data, initial: bytes, run: CleaningInMemory, folder: Path) -> CleaningInMemory | None:
    """The rounds with the network trained again on what is left, as `runs.bases.next_base` decides."""
    if len(run.history) >= REMOVAL.max_rounds or not policy.acted_on(policy.of_base(run.history)):
        return None
    again = start(case, data, trained(case, data, initial, run.kept, "gce", folder).weights, run.kept)
    left = replace(run.start, boundary=_drawn_again(data, run.start, run.kept))
    losses = [_boundary_loss(one, run.validation_transition()).mean for one in (again, left)]
    return run.going_on(again) if losses[0] < losses[1] else None


def trained(case: Case, data: Data, initial: bytes, kept: np.ndarray, method: str, folder: Path) -> Network:
    """The network trained from the pre-trained weights on the kept samples, in as many steps as on all.

    Kept in the folder: the states of a network share it.
    """
    digest = hashlib.sha256(f"{case.dataset}, {case.noise}, {case.seed}, {method}".encode() + kept.tobytes())
    path = folder / "networks" / f"{digest.hexdigest()[:16]}.pt"
    if not path.exists():
        settings = DATASETS[case.dataset].training["overfitted"]
        steps = settings.epochs * steps_of_epoch(len(kept), settings.batch_size)
        part = data.train.rows(kept)
        epochs = -(-steps // steps_of_epoch(len(part), settings.batch_size))
        settings = cases.with_settings(settings, epochs=epochs, max_steps=steps, method=method)
        average = cases.averaged(case, initial, DECAY)
        result = cases.train(
            case,
            part,
            seed=case.seed,
            weights=initial,
            settings=settings,
            watch=True,
            after_step=average.update_parameters,
        )
        average.update_parameters(cases.loaded(case, result.weights))
        assert result.aum is not None
        found = (result.weights, to_bytes(average.module), torch.from_numpy(result.aum), result.seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    weights, average, aum, seconds = torch.load(path, weights_only=True)
    return Network(weights, average, aum.numpy(), seconds)


def _with_head(case: Case, data: Data, begin: Start) -> bytes:
    """The pre-trained network with the fitted head."""
    model = cases.loaded(case, begin.weights)
    weight, bias = begin.head.fold()
    layer = head_of(model, find_head(model, classes=data.classes))
    with torch.no_grad():
        layer.weight.copy_(weight.float())
        layer.bias.copy_(bias.float())
    return to_bytes(model)


def _accuracy(case: Case, data: Data, weights: bytes, transition: Tensor) -> dict[str, Any]:
    """Test accuracy, and accuracy and corrected loss on the validation labels, of a network."""
    model = cases.loaded(case, weights)
    logits = cases.logits(case, model, data.validation)
    return {
        "test": cases.accuracy(case, model, data.test),
        "validation": float((logits.argmax(dim=1).numpy() == data.validation.given).mean()),
        "loss": _loss(logits, torch.from_numpy(data.validation.given.astype(np.int64)), transition),
    }


def _loss(logits: Tensor, labels: Tensor, transition: Tensor) -> dict[str, Any]:
    """The fields of a `HeldOutLoss`."""
    return asdict(corrected_loss(in_memory(logits.float(), labels, 2048), torch.eye(logits.shape[1]), transition))


def _boundary_loss(begin: Start, transition: Tensor) -> HeldOutLoss:
    boundary = begin.boundary
    reduce = begin.features.validation.standardised(boundary.layers, boundary.standardizers)
    return corrected_loss(reduce, boundary.weights, transition)


def _drawn_again(data: Data, begin: Start, kept: np.ndarray) -> ProbeEnsemble:
    """The boundary of these features, by the kept samples."""
    train = rows(begin.features.train, kept)
    return ensemble.refit(train, begin.features.validation, begin.boundary.members, classes=data.classes)


def _boundaries(
    data: Data, base: Start, last: Start, kept: dict[str, np.ndarray], transition: Tensor, found: Finding
) -> None:
    """The boundaries on the features that the rounds begin with, and for posttrain on those that they end with."""
    found.rows["new head"] = _of_boundary(base.head, base.features.validation, base.test, transition)
    for name, left in kept.items():
        begin = last if name == "posttrain" else base
        again = _drawn_again(data, begin, left)
        found.rows[f"boundary, {name}"] = _of_boundary(again, begin.features.validation, begin.test, transition)
    weights, parts = _gce_boundary(base), base.boundary

    def robust(part: InMemory) -> Tensor:
        return part.side_by_side(parts.layers, parts.standardizers) @ weights.T

    found.rows["boundary, gce"] = _of_logits(robust, base.features.validation, base.test, transition)


def _boundary_on(
    case: Case, data: Data, base: Start, weights: bytes, kept: np.ndarray, transition: Tensor
) -> dict[str, Any]:
    """A boundary chosen and drawn on a trained network's own features, by the kept samples."""
    model = cases.loaded(case, weights)
    train, validation, test = (
        embedded(case, model, base.layers, part, PROBE.max_features)
        for part in (data.train, data.validation, data.test)
    )
    candidates = [(name, l2) for name in base.layers for l2 in PROBE.l2]
    boundary = ensemble.choose(rows(train, kept), validation, candidates=candidates, classes=data.classes)
    return _of_boundary(boundary, validation, test, transition)


def _of_boundary(boundary: ProbeEnsemble, validation: InMemory, test: InMemory, transition: Tensor) -> dict[str, Any]:
    return _of_logits(partial(boundary_logits, boundary), validation, test, transition)


def _of_logits(
    logits: Callable[[InMemory], Tensor], validation: InMemory, test: InMemory, transition: Tensor
) -> dict[str, Any]:
    of_validation, of_test = logits(validation), logits(test)
    return {
        "test": float((of_test.argmax(dim=1) == test.labels).double().mean()),
        "validation": float((of_validation.argmax(dim=1) == validation.labels).double().mean()),
        "loss": _loss(of_validation, validation.labels, transition),
    }


def _gce_boundary(begin: Start) -> Tensor:
    """A linear head on the boundary's features by generalised cross-entropy; L2 by validation accuracy."""
    boundary, train, validation = begin.boundary, begin.features.train, begin.features.validation
    own = train.side_by_side(boundary.layers, boundary.standardizers)
    held_out = validation.side_by_side(boundary.layers, boundary.standardizers)
    best: tuple[float, Tensor] | None = None
    for l2 in (0.03, 0.01, 0.003, 0.001):
        weights = boundary.weights.float().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure(weights: Tensor = weights, l2: float = l2, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = generalised_cross_entropy(own @ weights.T, train.labels, q=0.7) + l2 / 2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        accuracy = float(((held_out @ weights.T).argmax(dim=1) == validation.labels).double().mean())
        if best is None or accuracy > best[0]:
            best = accuracy, weights.detach()
    assert best is not None
    return best[1]


def _rankings(
    case: Case, data: Data, base: Start, pretrained: Start, weights: bytes, aum: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Suspicion [n] by posttrain's first round, by the network as it came, and among neighbours as pre-trained."""
    scored = score_round(base.features.train, base.features.validation, base.boundary, seed=0)
    yield "posttrain", np.concatenate([table["mislabel_odds"] for table in scored.tables])
    given = torch.from_numpy(data.train.given.astype(np.int64))
    logits = cases.logits(case, cases.loaded(case, weights), data.train)
    yield "loss", torch.nn.functional.cross_entropy(logits, given, reduction="none").numpy()
    if aum is not None:
        yield "AUM", -aum
    own = torch.nn.functional.normalize(_head_features(pretrained))
    nearest = (own @ own.T).fill_diagonal_(-2).topk(NEIGHBOURS, dim=1).indices
    agreeing = (given[nearest] == given[:, None]).double()
    yield f"{NEIGHBOURS} nearest neighbours", 1 - agreeing.mean(dim=1).numpy()
    # SimiFeat (Zhu et al. 2022) takes the votes of 10 neighbours
    yield "SimiFeat, 10 votes", 1 - agreeing[:, :10].mean(dim=1).numpy()


def _cleanlab(begin: Start) -> tuple[np.ndarray, np.ndarray]:
    """As a user of cleanlab would: cross-validated logistic regression on what goes into the head; and its own cut."""
    given = begin.features.train.labels.numpy()
    probabilities = cross_validated(_head_features(begin).numpy(), given)
    return self_confidence(probabilities, given), confident_learning(probabilities, given)[1]


def _head_features(begin: Start) -> Tensor:
    return begin.features.train.side_by_side(begin.head.layers, begin.head.standardizers)[:, :-1]


def _at_random(case: Case, kept: np.ndarray) -> np.ndarray:
    order = np.random.default_rng([case.seed, 3]).permutation(len(kept))
    mask = np.zeros(len(kept), bool)
    mask[order[: int(kept.sum())]] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=list(PRETRAINED), default=["cifar10n-lite0-top"])
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="the findings, and the networks")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "real.md")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware(), flush=True)
    wanted = cases.cases(options.datasets, options.noises, options.states, options.seeds)
    kept = findings.measured(wanted, options.folder, partial(measured, folder=options.folder))
    text = report(kept, "python -m pipelines.benchmarks.real", hardware())
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
