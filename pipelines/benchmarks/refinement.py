"""Is the model better afterwards? Test accuracy before and after posttrain, beside its controls.

`python -m pipelines.benchmarks.refinement --seeds 0 1 2` takes cases of `cases` and starts everything from the
same trained network: posttrain's rounds by the loop of a real run (`posttrain.rounds.clean`), with each `refine.scope`,
as many gradient steps without its removal, and training from scratch on what was kept. What is finished stays in
`--folder`, one file for each case: started again, it goes on with what is missing. `--report` only writes the tables
of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.benchmarks import baselines, cases, command
from pipelines.benchmarks.cases import DATASETS, NOISES, Case, Data
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import (
    CleaningInMemory,
    Mode,
    Model,
    Start,
    boundary_accuracies,
    network_accuracies,
    rows,
    start,
    taken,
)
from pipelines.benchmarks.refinement_findings import (
    BY_LOSS,
    CHOSEN,
    CLEANLAB,
    EMA,
    NEW_HEAD,
    NO_REMOVAL,
    ORACLE,
    OURS,
    RANDOM,
    RIGHT,
    SCRATCH,
    SCRATCH_BY_LOSS,
    SCRATCH_CLEANLAB,
    SCRATCH_OURS,
    THEN_BOUNDARY,
    UNTOUCHED,
    Cleaning,
    Finding,
    Row,
    keep,
    kept,
    settings,
    table,
)
from pipelines.benchmarks.refinement_report import report
from pipelines.benchmarks.training import Average, refining, round_seed, steps_of_epoch, trained_on
from posttrain import rounds
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.schema import Round, stream_seed, uniform

DEFAULT_NOISES = ("clean", "symmetric 40", "pair 40", "instance 40", "human random1")


# -- one case ----------------------------------------------------------------------------------------------


def measure(case: Case, folder: Path, *, cleanlab: bool = False, scratch: bool = True) -> Finding:
    """What is to be known of the case, from its file in the folder as far as it is there; kept there.

    cleanlab's rows are measured where its out-of-sample predictions are in the folder; with `cleanlab` everywhere.
    Without `scratch` a new finding has no rows from scratch; with it, one that has none is measured again as a whole,
    since what was kept is not in it.
    Raises ValueError where the file was measured with other settings.
    """
    found = kept(case, folder)
    if found is not None and scratch and found.row(SCRATCH) is None:
        found = None
    wanted = cleanlab or (folder / "out_of_sample" / f"{case.key}.pt").exists()
    needed = [RIGHT, CLEANLAB] if wanted else [RIGHT]
    if found is not None and all(found.row(name) is not None for name in needed):
        return found
    data = cases.load(case)
    trained = cases.trained(case, data, folder)
    # what the network of the case took itself
    own = trained.epochs * steps_of_epoch(len(data.train), DATASETS[case.dataset].training[case.network].batch_size)
    if found is None:
        found = _measured(case, data, trained.weights, own, scratch=scratch)
        keep(found, folder)
    if found.row(RIGHT) is None:
        found = replace(found, rows=(*found.rows, _of_right_labels(data, start(case, data, trained.weights))))
        keep(found, folder)
    if wanted and found.row(CLEANLAB) is None:
        plan, rest = found.cleanings["network"], ~flagged(case, data, folder)
        added = [_after_cleanlab(case, data, trained.weights, plan, rest)]
        if found.row(SCRATCH) is not None:
            accuracies, steps = _from_scratch(case, data, rest, own)
            added.append(replace(added[0], name=SCRATCH_CLEANLAB, steps=steps, **accuracies))
        found = replace(found, rows=(*found.rows, *added))
        keep(found, folder)
    return found


def _measured(case: Case, data: Data, weights: bytes, own_steps: int, *, scratch: bool) -> Finding:
    begin = start(case, data, weights)
    wrong = data.train.given != data.train.true
    everything = np.ones(len(wrong), bool)
    measured: list[Row] = []

    def note(name: str, accuracies: dict[str, float], kept: np.ndarray, steps: int) -> None:
        measured.append(Row(name, **accuracies, steps=steps, samples=int(kept.sum()), wrong=int(wrong[kept].sum())))

    note(UNTOUCHED, begin.accuracies, everything, 0)
    note(NEW_HEAD, boundary_accuracies(begin.head, begin.test), everything, 0)
    note(CHOSEN, boundary_accuracies(begin.boundary, begin.test), everything, 0)
    measured.append(_of_right_labels(data, begin))
    cleanings: dict[Mode, Cleaning] = {}
    head, network = (CleaningInMemory(case, data, mode, begin) for mode in ("head", "network"))
    outcomes: dict[Mode, rounds.Outcome[Model, ProbeEnsemble]] = {"head": head.clean(), "network": network.clean()}
    # the same rounds: only what follows them differs
    outcomes["both"] = outcomes["network"]
    for mode, outcome in outcomes.items():
        run = head if mode == "head" else network
        state = run.concluded(outcome.state, mode)
        cleanings[mode] = _cleaning(run, outcome, state)
        metrics = {name: state.history[-1].metrics[name] for name in begin.accuracies}
        note(OURS[mode], metrics, run.kept, sum(run.steps))
    kept_by = {SCRATCH: everything, SCRATCH_OURS: network.kept, ORACLE: ~wrong}
    for name, accuracies, left, steps in _controls(case, data, begin, cleanings["network"]):
        note(name, accuracies, left, steps)
        if name == BY_LOSS:
            kept_by[SCRATCH_BY_LOSS] = left
    done: dict[bytes, tuple[dict[str, float], int]] = {}
    for name, left in kept_by.items() if scratch else ():
        if left.tobytes() not in done:
            done[left.tobytes()] = _from_scratch(case, data, left, own_steps)
        accuracies, steps = done[left.tobytes()]
        note(name, accuracies, left, steps)
    return Finding(
        case,
        len(data.train),
        int(wrong.sum()),
        cleanings,
        tuple(measured),
        hardware(),
        torch.get_num_threads(),
        settings(case.dataset),
    )


def _of_right_labels(data: Data, begin: Start) -> Row:
    """The chosen boundary, drawn by the samples with a right label: what a removal without an error would give."""
    right = data.train.given == data.train.true
    drawn = ensemble.refit(
        rows(begin.features.train, right), begin.features.validation, begin.boundary.members, classes=data.classes
    )
    return Row(RIGHT, **boundary_accuracies(drawn, begin.test), steps=0, samples=int(right.sum()), wrong=0)


def _controls(
    case: Case, data: Data, begin: Start, plan: Cleaning
) -> Iterator[tuple[str, dict[str, float], np.ndarray, int]]:
    """(row, accuracies, kept samples [n], steps) of each control that trains the network as posttrain's plan did."""
    everything = np.ones(len(data.train), bool)
    average = Average(case, begin.weights)
    after, _, steps = refined(case, data, begin.weights, plan, watch=average.watch)
    accuracies = network_accuracies(case, data, after)
    yield NO_REMOVAL, accuracies, everything, steps
    yield EMA, network_accuracies(case, data, average.finished(after)), everything, steps
    trained = tuple(Round(number, len(everything), 0, 0, 0, accuracies) for number in range(1 + len(plan.steps)))
    control = CleaningInMemory(case, data, "both", begin)
    first = Model(begin.weights)
    state = control.concluded(
        State(trained, Live(len(everything)), Model(after), first, first, len(data.validation)), "both"
    )
    yield THEN_BOUNDARY, state.history[-1].metrics, everything, steps
    for name, ranking in ((RANDOM, at_random(case, data)), (BY_LOSS, by_loss(case, data))):
        after, kept, steps = refined(case, data, begin.weights, plan, ranking=ranking)
        yield name, network_accuracies(case, data, after), kept, steps


def _cleaning(
    run: CleaningInMemory, outcome: rounds.Outcome[Model, ProbeEnsemble], last: State[Model, ProbeEnsemble]
) -> Cleaning:
    history = outcome.state.history[1:]
    return Cleaning(
        outcome.reason,
        last.number > outcome.state.number,
        tuple(done.removed for done in history),
        tuple(run.steps),
        tuple(done.metrics["test_accuracy"] for done in history),
        tuple(run.estimates),
    )


def _after_cleanlab(case: Case, data: Data, weights: bytes, plan: Cleaning, kept: np.ndarray) -> Row:
    wrong = int((data.train.given != data.train.true)[kept].sum())
    after, _, steps = refined(case, data, weights, plan, kept=kept)
    return Row(CLEANLAB, **network_accuracies(case, data, after), steps=steps, samples=int(kept.sum()), wrong=wrong)


def _from_scratch(case: Case, data: Data, kept: np.ndarray, steps: int) -> tuple[dict[str, float], int]:
    training = cases.with_settings(DATASETS[case.dataset].training[case.network], until_train_accuracy=None)
    part = data.train.rows(kept)
    weights, done = trained_on(case, part, None, seed=case.seed, settings=training, steps=steps)
    return network_accuracies(case, data, weights), done


def flagged(case: Case, data: Data, folder: Path) -> np.ndarray:
    """bool [n]: what cleanlab's `find_label_issues` would remove."""
    probabilities = cases.out_of_sample(case, data, folder).probabilities
    return baselines.confident_learning(probabilities, data.train.given)[1]


# -- the controls ------------------------------------------------------------------------------------------

Ranking = Callable[[int, bytes, np.ndarray], np.ndarray]
"""(round, weights, kept [n]) -> scores, float32 [kept], larger goes first."""


def refined(
    case: Case,
    data: Data,
    weights: bytes,
    plan: Cleaning,
    *,
    kept: np.ndarray | None = None,
    ranking: Ranking | None = None,
    watch: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[bytes, np.ndarray, int]:
    """(weights, kept samples [n], steps) after as many steps in each round as posttrain took in its `plan`.

    With a ranking as many samples go in each round, too; without one, nothing goes but what is not in `kept`.
    """
    kept = np.ones(len(data.train), bool) if kept is None else kept
    total = 0
    for number, (steps, removed) in enumerate(zip(plan.steps, plan.removed, strict=True), start=1):
        if ranking is not None:
            ranks = ranking(number, weights, kept)
            kept = kept & ~taken(data.train, kept, ranks, classes=data.classes, at_most=removed)[1]
        part = data.train.rows(kept)
        seed, settings = round_seed(case, number), refining(case.dataset)
        weights, done = trained_on(case, part, weights, seed=seed, settings=settings, steps=steps, watch=watch)
        total += done
    return weights, kept, total


def by_loss(case: Case, data: Data) -> Ranking:
    """The network's own cross-entropy."""

    def ranking(number: int, weights: bytes, kept: np.ndarray) -> np.ndarray:
        part = data.train.rows(kept)
        logits = cases.logits(case, cases.loaded(case, weights), part)
        return cross_entropy(logits, torch.from_numpy(part.given), reduction="none").numpy()

    return ranking


def at_random(case: Case, data: Data) -> Ranking:
    """Numbers that know nothing of the samples."""

    def ranking(number: int, weights: bytes, kept: np.ndarray) -> np.ndarray:
        draw = uniform(data.train.ids[kept], stream_seed("random removal", case.seed, number))
        return draw.astype(np.float32)

    return ranking


# -- the command -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, NOISES, default=DEFAULT_NOISES, seeds=[0, 1, 2])
    parser.add_argument("--cleanlab", action="store_true", help="train cleanlab's networks where they are not there")
    parser.add_argument("--without-scratch", action="store_true", help="leave out the training from scratch")
    options = parser.parse_args(arguments)
    command.run(
        "refinement",
        parser,
        options,
        measure=partial(measure, folder=options.folder, cleanlab=options.cleanlab, scratch=not options.without_scratch),
        kept=lambda case: kept(case, options.folder),
        report=report,
        table=table,
        flags=("cleanlab", "without-scratch"),
    )


if __name__ == "__main__":
    main()
