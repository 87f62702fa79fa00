"""posttrain together with every other method for learning with noisy labels.

    python -m pipelines.benchmarks.synergy --folder runs/synergy

For each method: the network that it trains on all labels, posttrain after it, other removals of as many samples with as
many further steps, and the method from scratch on what posttrain kept and on the right labels. So that the whole grid
takes less than two hours on two cores, the network is a small one on the features of a frozen, pre-trained network.
Each case is kept in the folder as soon as it is there: the same command goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from pipelines.benchmarks import cases, findings
from pipelines.benchmarks.baselines import confident_learning, cross_validated
from pipelines.benchmarks.cases import DATASETS, FEATURES, Case, Data
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import (
    CleaningInMemory,
    Mode,
    Model,
    boundary_accuracies,
    boundary_logits,
    network_accuracies,
    start,
    taken,
)
from pipelines.benchmarks.refinement import at_random, by_loss
from pipelines.benchmarks.synergy_report import (
    AUTO,
    AVERAGE,
    BEST,
    BOUNDARY,
    CLEANLAB,
    HEAD,
    LAST,
    LEFT,
    NETWORK,
    OFFERED,
    RANDOM,
    REMOVAL,
    RIGHT,
    SCRATCH,
    SCRATCH_OTHERS,
    SMALL_LOSS,
    report,
)
from pipelines.benchmarks.training import Average, refining, round_seed, steps_of_epoch, trained_on
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.held_out import corrected_loss
from posttrain.influence.noise_model import noise_left
from posttrain.influence.probe import in_memory
from posttrain.influence.score_round import score_round
from posttrain.methods import METHODS, NEEDS_NOISE, Method
from posttrain.vision.losses import Noise
from posttrain.vision.weights import to_bytes

NOISES = ("human aggre", "human random1", "symmetric 40", "instance 40", "clean")


@dataclass
class Finding:
    """What was measured of a case, as it is written down."""

    noise: str
    method: str
    seed: int
    wrong: float
    """Share of wrong labels."""
    estimated: float = 0.0
    """The same, as posttrain estimates it in its first round; 0 where it sees no sign of any."""
    fitted: float = 0.0
    """Share of the given labels that the network has after its last epoch."""
    best_epoch: int = 0
    """By accuracy on the validation labels, from 1 on."""
    rounds: int = 0
    """Of posttrain, `network`."""
    steps: int = 0
    """That these took."""
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """By variant: accuracy on the test labels, and on the validation labels; of what posttrain offers, the corrected
    loss on these, too."""
    removed: dict[str, tuple[float, float | None, float | None]] = field(default_factory=dict)
    """By variant: share of the samples, precision, recall."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the processor."""


@dataclass(frozen=True)
class Seen:
    """The noise of all labels, as a run sees it through a network that cross-entropy trained."""

    rate: float
    joint: Tensor = field(repr=False)
    samples: int

    def left(self, acted_on: int, samples: int) -> Noise:
        """The noise of so many samples, once others, all taken for wrong, are out."""
        return Noise(*noise_left(self.joint, self.rate, self.samples, acted_on=acted_on, left=samples))


@dataclass
class Shared:
    """What the methods have in common: the data of a kind of noise and a seed, and what is known of them."""

    case: Case
    """With the network that cross-entropy trains."""

    @cached_property
    def data(self) -> Data:
        return cases.load(self.case)

    @cached_property
    def cleanlab(self) -> tuple[np.ndarray, float]:
        """(bool [n]: what cleanlab finds on what the network takes, by its own cut; seconds)."""
        part, began = self.data.train, time.process_time()
        features = part.pixels.flatten(1).double()
        # a feature that never varies stays 0
        standardised = (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)
        probabilities = cross_validated(standardised.numpy(), part.given)
        return confident_learning(probabilities, part.given)[1], time.process_time() - began

    @cached_property
    def seen(self) -> Seen:
        """As `runs.begin` does before it trains by a method that needs it."""
        plain = _training(self.case)
        weights, _ = trained_on(self.case, self.data.train, None, seed=self.case.seed, settings=plain)
        begin = start(self.case, self.data, weights)
        model = score_round(begin.features.train, begin.features.validation, begin.boundary, seed=0).noise_model
        return Seen(model.remaining_noise_rate, model.confident_joint, len(self.data.train))


@lru_cache(maxsize=1)
def _shared(dataset: str, noise: str, seed: int) -> Shared:
    return Shared(Case(dataset, noise, "cross_entropy", seed))


class BestEpoch:
    """The weights of the epoch with the highest accuracy on the validation labels; of equal ones the first."""

    def __init__(self, case: Case, data: Data, steps: int) -> None:
        """`steps`: of an epoch."""
        self._case, self._data, self._steps = case, data, steps
        self._taken, self._best = 0, (-1.0, 0, b"")

    def watch(self, model: nn.Module) -> None:
        """Before each step."""
        if self._taken and self._taken % self._steps == 0:
            self._note(to_bytes(model))
        self._taken += 1

    def finished(self, weights: bytes) -> tuple[bytes, int]:
        """(weights, epoch from 1 on), once those after the last step are seen, too."""
        self._note(weights)
        return self._best[2], self._best[1]

    def _note(self, weights: bytes) -> None:
        accuracy = cases.accuracy(self._case, cases.loaded(self._case, weights), self._data.validation)
        if accuracy > self._best[0]:
            self._best = accuracy, self._taken // self._steps, weights


def measured(case: Case) -> Finding:
    """All that is measured of a case, whose network is called by its method."""
    shared = _shared(case.dataset, case.noise, case.seed)
    data, method = shared.data, cast(Method, case.network)
    wrong = data.train.given != data.train.true
    found = Finding(case.noise, method, case.seed, float(wrong.mean()))

    def left(acted_on: int, samples: int) -> Noise | None:
        return shared.seen.left(acted_on, samples) if method in NEEDS_NOISE else None

    weights = _on_all(case, data, left(0, len(wrong)), found)
    (head, of_head), (network, of_network) = _with_posttrain(case, data, weights, found)
    flagged, seconds = shared.cleanlab
    found.seconds[CLEANLAB] = seconds
    everything, count = np.ones(len(wrong), bool), int((~network.kept).sum())
    gone = {CLEANLAB: flagged}
    for name, ranking in ((RANDOM, at_random(case, data)), (SMALL_LOSS, by_loss(case, data))):
        scores = ranking(1, weights, everything)
        gone[name] = taken(data.train, everything, scores, classes=data.classes, at_most=count)[1]
    for name, out in gone.items():
        # what goes at random is as often right as what stays
        acted_on = 0 if name == RANDOM else int(out.sum())
        noise = left(acted_on, len(wrong) if name == RANDOM else int((~out).sum()))
        found.rows[name] = _accuracies(case, data, _refined(case, data, weights, ~out, network.steps, noise))
        found.rows[SCRATCH_OTHERS[name]] = _from_scratch(case, data, ~out, noise)
    for name, out in {HEAD: ~head.kept, NETWORK: ~network.kept, **gone}.items():
        found.removed[name] = _removed(out, wrong)
    kept = int(head.kept.sum())
    again = _scratch_network(case, data, head.kept, left(len(wrong) - kept, kept))
    found.rows[SCRATCH] = _accuracies(case, data, again)
    networks = {LAST: weights, NETWORK: of_network.weights, SCRATCH: again}
    _choose(case, data, networks, head, of_head.boundary or head.start.boundary, found)
    unit = Noise(0.0, torch.eye(data.classes, dtype=torch.float64))
    found.rows[RIGHT] = _from_scratch(case, data, ~wrong, unit)
    return found


def _on_all(case: Case, data: Data, noise: Noise | None, found: Finding) -> bytes:
    """The network that the method trains on all labels, last epoch; what is known of it goes into the finding."""
    began = time.process_time()
    average = Average(case, to_bytes(cases.network(case, case.seed)))
    settings = _training(case)
    epochs = BestEpoch(case, data, steps_of_epoch(len(data.train), settings.batch_size))

    def watch(model: nn.Module) -> None:
        average.watch(model)
        epochs.watch(model)

    weights, _ = trained_on(case, data.train, None, seed=case.seed, settings=settings, watch=watch, noise=noise)
    best, found.best_epoch = epochs.finished(weights)
    variants = {LAST: weights, AVERAGE: average.finished(weights), BEST: best}
    found.seconds["training"] = time.process_time() - began
    found.rows |= {name: _accuracies(case, data, own) for name, own in variants.items()}
    found.fitted = cases.accuracy(case, cases.loaded(case, weights), data.train)
    return weights


def _with_posttrain(
    case: Case, data: Data, weights: bytes, found: Finding
) -> tuple[tuple[CleaningInMemory, Model], tuple[CleaningInMemory, Model]]:
    """posttrain's rounds from the network on, with `head` and with `network`, and what is left after the last."""
    began = time.process_time()
    begin = start(case, data, weights)
    embedding = time.process_time() - began
    found.rows[BOUNDARY] = _row(boundary_accuracies(begin.boundary, begin.test))
    modes: dict[Mode, str] = {"head": HEAD, "network": NETWORK}
    runs: list[tuple[CleaningInMemory, Model]] = []
    for mode, name in modes.items():
        began = time.process_time()
        run = CleaningInMemory(case, data, mode, begin, REMOVAL, cast(Method, case.network))
        last = run.clean().state
        concluded = run.concluded(last, mode)
        found.seconds[name] = embedding + time.process_time() - began
        found.rows[name] = _row(concluded.history[-1].metrics)
        runs.append((run, (last if mode == "head" else concluded).model))
    head, (network, _) = runs
    found.estimated = network.estimates[0].rate
    found.rounds, found.steps = len(network.steps), sum(network.steps)
    return head, runs[1]


def _refined(case: Case, data: Data, weights: bytes, kept: np.ndarray, rounds: list[int], noise: Noise | None) -> bytes:
    """The network trained on by the method on what is kept, in rounds of so many steps."""
    settings, part = refining(case.dataset, cast(Method, case.network)), data.train.rows(kept)
    for number, steps in enumerate(rounds, start=1):
        seed = round_seed(case, number)
        weights, _ = trained_on(case, part, weights, seed=seed, settings=settings, steps=steps, noise=noise)
    return weights


def _choose(
    case: Case, data: Data, networks: dict[str, bytes], head: CleaningInMemory, left: ProbeEnsemble, found: Finding
) -> None:
    """The row of what has the lowest corrected loss on the validation labels, as `runs.alternatives` chooses."""
    labels, transition = torch.from_numpy(data.validation.given.astype(np.int64)), head.validation_transition()
    validation = head.start.features.validation
    logits = {name: cases.logits(case, cases.loaded(case, own), data.validation) for name, own in networks.items()}
    found.rows[LEFT] = _row(boundary_accuracies(left, head.start.test))
    for name, boundary in ((BOUNDARY, head.start.boundary), (LEFT, left)):
        logits[name] = boundary_logits(boundary, validation)
    for name, own in logits.items():
        part = in_memory(own.float(), labels, 2048)
        found.rows[name]["loss"] = corrected_loss(part, torch.eye(data.classes), transition).mean
    found.rows[AUTO] = min((found.rows[name] for name in OFFERED), key=lambda row: row["loss"])


def _from_scratch(case: Case, data: Data, kept: np.ndarray, noise: Noise | None) -> dict[str, float]:
    return _accuracies(case, data, _scratch_network(case, data, kept, noise))


def _scratch_network(case: Case, data: Data, kept: np.ndarray, noise: Noise | None) -> bytes:
    """The method on the kept samples, in as many steps as on all."""
    settings = _training(case)
    steps = settings.epochs * steps_of_epoch(len(data.train), settings.batch_size)
    part = data.train.rows(kept)
    return trained_on(case, part, None, seed=case.seed, settings=settings, steps=steps, noise=noise)[0]


def _training(case: Case) -> cases.Training:
    return DATASETS[case.dataset].training[case.network]


def _accuracies(case: Case, data: Data, weights: bytes) -> dict[str, float]:
    return _row(network_accuracies(case, data, weights))


def _row(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"{name}_accuracy"] for name in ("test", "validation")}


def _removed(gone: np.ndarray, wrong: np.ndarray) -> tuple[float, float | None, float | None]:
    """Share of the samples, precision, recall; None where there is nothing to divide by."""
    hit, removed, all_wrong = (int(mask.sum()) for mask in (gone & wrong, gone, wrong))
    return float(gone.mean()), hit / removed if removed else None, hit / all_wrong if all_wrong else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/synergy"), help="the findings")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "synergy.md")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware(), flush=True)
    with threadpool_limits(limits=options.threads):
        wanted = cases.cases(list(FEATURES), options.noises, options.methods, options.seeds)
        kept = findings.measured(wanted, options.folder, measured)
    text = report(kept, "python -m pipelines.benchmarks.synergy", hardware())
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
