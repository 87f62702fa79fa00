"""A real pre-trained network: EfficientNet-Lite0, overfitted to noisy labels, or frozen with a fitted head.

    python -m pipelines.benchmarks.real --folder runs/real

Overfitted: fine-tuned from the pre-trained weights on all given labels until it fits them. Frozen: as pre-trained, with
a head fitted on all given labels. posttrain cleans in at most four rounds of 10 %; each control gets the
same features, and each training the same recipe, seed and steps. A finding is kept as soon as it is there: the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict
from torch import Tensor

from pipelines.benchmarks import cases
from pipelines.benchmarks.baselines import confident_learning, self_confidence
from pipelines.benchmarks.cases import DATASETS, PRETRAINED, Case, Data
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import CleaningInMemory, Start, rows, start
from pipelines.benchmarks.real_report import report
from pipelines.benchmarks.training import steps_of_epoch
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.held_out import corrected_loss
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
    "pair 40",
    "clean",
    "symmetric 20",
    "instance 20",
    "pair 20",
)
STATES = ("overfitted", "frozen")
EMA = 0.99
NEIGHBOURS = 50


@dataclass
class Finding:
    """What was measured of a case, as it is written down."""

    case: str
    wrong: float
    """Share of wrong labels."""
    rate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """As posttrain estimates it, with its interval."""
    removed: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By method: share of the samples, precision, recall."""
    ranking: dict[str, float] = field(default_factory=dict)
    """Average precision by method."""
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model: test accuracy, and what else is known of it."""
    delivered: str = ""


def measured(case: Case) -> Finding:
    """All that is measured of a case."""
    data = cases.load(case)
    wrong = data.train.given != data.train.true
    found = Finding(str(case), float(wrong.mean()))
    initial = to_bytes(cases.network(case, case.seed))
    weights, aum, average = _network(case, data, initial)
    began = time.perf_counter()
    begin = start(case, data, weights)
    run = CleaningInMemory(case, data, "head", begin)
    run.clean()
    seconds = time.perf_counter() - began
    found.rate = (run.estimates[0].rate, run.estimates[0].low, run.estimates[0].high)
    _note_removed(found, "posttrain", ~run.kept, wrong)
    suspicion, flagged = dict(_rankings(case, data, begin, aum)), _cleanlab(begin)
    suspicion |= flagged[0]
    _note_removed(found, "cleanlab", flagged[1], wrong)
    if wrong.any():
        found.ranking = {name: float(average_precision_score(wrong, score)) for name, score in suspicion.items()}
    transition = run.validation_transition()
    _boundaries(case, data, begin, run, flagged[1], transition, found, seconds)
    if average is not None:
        found.rows["trained again, all, ema"] = _accuracy(case, data, average, transition)
        _train_again(case, data, initial, run.kept, flagged[1], transition, found)
    offered = [name for name in found.rows if name in _OFFERED]
    found.delivered = min(offered, key=lambda name: found.rows[name]["loss"])
    return found


def _train_again(
    case: Case,
    data: Data,
    initial: bytes,
    left: np.ndarray,
    flagged: np.ndarray,
    transition: Tensor,
    found: Finding,
) -> None:
    """The network trained again from its pre-trained weights: on what posttrain and the controls keep."""
    wrong = data.train.given != data.train.true
    kept = {"posttrain": left, "cleanlab": ~flagged, "right labels alone": ~wrong}
    kept["random removal"] = _at_random(case, left)
    for name, mask in kept.items():
        _trained_again(case, data, initial, mask, f"trained again, {name}", transition, found)
    everything = np.ones(len(wrong), bool)
    _trained_again(case, data, initial, everything, "trained again, all, gce", transition, found, method="gce")


_OFFERED = (
    "as it came",
    "boundary, nothing removed",
    "boundary, posttrain",
    "trained again, posttrain",
    "trained again, posttrain, ema",
)
"""What is chosen from, those that change less first: as by `refine.scope: auto`, with `pretrain.ema` and without, and
without the network refined from where it is."""


def _network(case: Case, data: Data, initial: bytes) -> tuple[bytes, np.ndarray | None, bytes | None]:
    """The network that comes to posttrain, the margins seen while it was trained, and the average of its weights."""
    if case.network == "frozen":
        model = cases.loaded(case, initial)
        begin = start(case, data, initial)
        head = find_head(model, classes=data.classes)
        weight, bias = begin.head.fold()
        layer = head_of(model, head)
        with torch.no_grad():
            layer.weight.copy_(weight.float())
            layer.bias.copy_(bias.float())
        return to_bytes(model), None, None
    trained, average = _training(case, data, initial, np.ones(len(data.train), bool), watch=True)
    return trained.weights, trained.aum, average


def _training(
    case: Case, data: Data, initial: bytes, kept: np.ndarray, *, watch: bool = False, **changes: Any
) -> tuple[cases.Trained, bytes]:
    """Training from the pre-trained weights on the kept samples, in as many steps as on all; and its moving average."""
    settings = DATASETS[case.dataset].training["overfitted"]
    steps = settings.epochs * steps_of_epoch(len(data.train), settings.batch_size)
    part = data.train.rows(kept)
    epochs = -(-steps // steps_of_epoch(len(part), settings.batch_size))
    settings = cases.with_settings(settings, epochs=epochs, max_steps=steps, **changes)
    average = cases.averaged(case, initial, EMA)
    trained = cases.train(
        case,
        part,
        seed=case.seed,
        weights=initial,
        settings=settings,
        watch=watch,
        after_step=average.update_parameters,
    )
    average.update_parameters(cases.loaded(case, trained.weights))
    return trained, to_bytes(average.module)


def _trained_again(
    case: Case,
    data: Data,
    initial: bytes,
    kept: np.ndarray,
    name: str,
    transition: Tensor,
    found: Finding,
    **changes: Any,
) -> None:
    began = time.perf_counter()
    trained, average = _training(case, data, initial, kept, **changes)
    seconds = time.perf_counter() - began
    for label, weights in ((name, trained.weights), (f"{name}, ema", average)):
        found.rows[label] = _accuracy(case, data, weights, transition) | {"seconds": seconds}


def _accuracy(case: Case, data: Data, weights: bytes, transition: Tensor) -> dict[str, float]:
    """Test accuracy, and accuracy and corrected loss on the validation labels, of a network."""
    model = cases.loaded(case, weights)
    logits = cases.logits(case, model, data.validation)
    return {
        "test": cases.accuracy(case, model, data.test),
        "validation": float((logits.argmax(dim=1).numpy() == data.validation.given).mean()),
        "loss": _loss(logits, data, transition),
    }


def _loss(logits: Tensor, data: Data, transition: Tensor) -> float:
    unit = torch.eye(data.classes)
    labels = torch.from_numpy(data.validation.given.astype(np.int64))
    return corrected_loss(in_memory(logits.float(), labels, 2048), unit, transition)


def _boundaries(
    case: Case,
    data: Data,
    begin: Start,
    run: CleaningInMemory,
    flagged: np.ndarray,
    transition: Tensor,
    found: Finding,
    seconds: float,
) -> None:
    train, validation, members = begin.features.train, begin.features.validation, begin.boundary.members
    found.rows["as it came"] = _accuracy(case, data, begin.weights, transition)
    right = data.train.given == data.train.true

    def refitted(kept: np.ndarray) -> ProbeEnsemble:
        return ensemble.refit(rows(train, kept), validation, members, classes=data.classes)

    drawn = {
        "new head": begin.head,
        "boundary, nothing removed": begin.boundary,
        "boundary, posttrain": refitted(run.kept),
        "boundary, random removal": refitted(_at_random(case, run.kept)),
        "boundary, cleanlab": refitted(~flagged),
        "boundary, right labels alone": refitted(right),
    }
    for name, boundary in drawn.items():
        found.rows[name] = _of_logits(begin, data, transition, lambda part, b=boundary: _logits(b, part))
    found.rows["boundary, posttrain"]["seconds"] = seconds
    weights = _gce_boundary(begin, data)
    parts = begin.boundary

    def robust(part: InMemory) -> Tensor:
        return part.side_by_side(parts.layers, parts.standardizers) @ weights.T

    found.rows["boundary, gce"] = _of_logits(begin, data, transition, robust)


def _logits(boundary: ProbeEnsemble, part: InMemory) -> Tensor:
    return part.side_by_side(boundary.layers, boundary.standardizers) @ boundary.weights.float().T


def _of_logits(begin: Start, data: Data, transition: Tensor, logits: Callable[[InMemory], Tensor]) -> dict[str, float]:
    of_validation, of_test = logits(begin.features.validation), logits(begin.test)
    given = begin.features.validation.labels
    return {
        "test": float((of_test.argmax(dim=1) == begin.test.labels).double().mean()),
        "validation": float((of_validation.argmax(dim=1) == given).double().mean()),
        "loss": _loss(of_validation, data, transition),
    }


def _gce_boundary(begin: Start, data: Data) -> Tensor:
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


def _rankings(case: Case, data: Data, begin: Start, aum: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """Suspicion [n] by posttrain's first round and by the controls on the same features."""
    scored = score_round(begin.features.train, begin.features.validation, begin.boundary, seed=0)
    tables = list(scored.tables)
    yield "posttrain", np.concatenate([table["mislabel_odds"] for table in tables])
    given = torch.from_numpy(data.train.given.astype(np.int64))
    logits = cases.logits(case, cases.loaded(case, begin.weights), data.train)
    yield "loss", torch.nn.functional.cross_entropy(logits, given, reduction="none").numpy()
    if aum is not None:
        yield "AUM", -aum
    own = begin.features.train.side_by_side(begin.head.layers, begin.head.standardizers)[:, :-1]
    own = torch.nn.functional.normalize(own)
    nearest = (own @ own.T).fill_diagonal_(-2).topk(NEIGHBOURS, dim=1).indices
    agreeing = (given[nearest] == given[:, None]).double()
    yield f"{NEIGHBOURS} nearest neighbours", 1 - agreeing.mean(dim=1).numpy()
    # SimiFeat (Zhu et al. 2022) takes the votes of 10 neighbours
    yield "SimiFeat, 10 votes", 1 - agreeing[:, :10].mean(dim=1).numpy()


def _cleanlab(begin: Start) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As a user of cleanlab would: cross-validated logistic regression on what goes into the head, and its own cut."""
    train = begin.features.train
    own = train.side_by_side(begin.head.layers, begin.head.standardizers)[:, :-1].numpy()
    given = train.labels.numpy()
    model = LogisticRegression(C=1 / (len(given) * 0.01), max_iter=300)
    probabilities: Any = cross_val_predict(model, own, given, cv=5, method="predict_proba")
    return {"cleanlab, self-confidence": self_confidence(probabilities, given)}, confident_learning(
        probabilities, given
    )[1]


def _note_removed(found: Finding, name: str, gone: np.ndarray, wrong: np.ndarray) -> None:
    hit = int((gone & wrong).sum())
    found.removed[name] = (
        float(gone.mean()),
        hit / max(1, int(gone.sum())),
        hit / max(1, int(wrong.sum())),
    )


def _at_random(case: Case, kept: np.ndarray) -> np.ndarray:
    order = np.random.default_rng([case.seed, 3]).permutation(len(kept))
    mask = np.zeros(len(kept), bool)
    mask[order[: int(kept.sum())]] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=list(PRETRAINED), default=list(PRETRAINED))
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="the findings")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "real.md")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(hardware(), flush=True)
    for case in cases.cases(options.datasets, options.noises, options.states, options.seeds):
        path = options.folder / f"{case.key}.json"
        if not path.exists():
            began = time.perf_counter()
            found = measured(case)
            path.with_suffix(".tmp").write_text(json.dumps(found.__dict__, indent=1))
            path.with_suffix(".tmp").replace(path)
            print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
    kept = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    text = report(kept, "python -m pipelines.benchmarks.real", hardware())
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
