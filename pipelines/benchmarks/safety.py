"""Does a run stop in time, and do no harm? The default settings on clean, noisy and awkward data.

`python -m pipelines.benchmarks.safety --seeds 0` runs posttrain's rounds (`refine.scope: head`, in memory, by the loop
of a real run) on true labels, on 5 to 60 % wrong ones, on class sizes of 100 to 1, on two classes that look alike, and
with one class labelled at random. What is finished stays in `--folder`: started again, it goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.benchmarks import cases, command, findings
from pipelines.benchmarks.cases import HARD, Case
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import CleaningInMemory, boundary_accuracies, start
from pipelines.benchmarks.tables import document, row
from posttrain.config import Removal

NOISES = ("clean", "symmetric 5", "symmetric 20", "symmetric 40", "symmetric 60", *HARD)

HEADER = (
    "data set",
    "labels",
    "network",
    "seed",
    "wrong",
    "estimate",
    "removed",
    "precision",
    "recall",
    "smallest class",
    "test before",
    "boundary",
    "test after",
    "rounds",
)


@dataclass(frozen=True)
class Found:
    """What a run with the default settings did on a case."""

    dataset: str
    noise: str
    network: str
    seed: int
    samples: int
    wrong: int
    rate: float
    """Of wrong labels, as estimated in the first round."""
    low: float
    high: float
    found: bool
    removed: int
    removed_wrong: int
    smallest_class: float
    """Smallest share of its given labels that a class keeps."""
    test_before: float
    test_boundary: float
    """Of the chosen boundary with nothing removed."""
    test_after: float
    rounds: int
    reason: str
    hardware: str = "hardware not noted"

    @property
    def truth(self) -> float:
        """The share of wrong labels."""
        return self.wrong / self.samples


def kept(case: Case, folder: Path) -> Found | None:
    """The finding on a case from the folder, None where there is none."""
    return findings.kept(Found, findings.file("safety", case, folder))


def measured(case: Case, folder: Path) -> Found:
    """The finding on a case, from the folder where it is there; kept there."""
    there = kept(case, folder)
    if there is not None:
        return there
    data = cases.load(case)
    begin = start(case, data, cases.trained(case, data, folder).weights)
    run = CleaningInMemory(case, data, "head", begin, removal=Removal())
    outcome = run.clean()
    state = run.concluded(outcome.state, "head")
    wrong = data.train.given != data.train.true
    before, after = (np.bincount(data.train.given[mask], minlength=data.classes) for mask in (wrong >= 0, run.kept))
    estimate = run.estimates[0]
    metrics = state.history[-1].metrics
    found = Found(
        case.dataset,
        case.noise,
        case.network,
        case.seed,
        len(wrong),
        int(wrong.sum()),
        estimate.rate,
        estimate.low,
        estimate.high,
        estimate.found,
        int((~run.kept).sum()),
        int(wrong[~run.kept].sum()),
        float((after[before > 0] / before[before > 0]).min()),
        begin.accuracies["test_accuracy"],
        boundary_accuracies(begin.boundary, begin.test)["test_accuracy"],
        metrics["test_accuracy"],
        sum(1 for done in outcome.state.history if done.removed),
        outcome.reason,
        hardware(),
    )
    findings.keep(found, findings.file("safety", case, folder))
    return found


def report(found: Sequence[Found], command: str) -> str:
    """The table in Markdown."""
    lines = [
        "# Stop and safety",
        "",
        f"`{command}`; {'; '.join(sorted({one.hardware for one in found}))}",
        "",
        "posttrain with its default settings and `refine.scope: head`. *Estimate*: the share of wrong labels, as",
        "the run saw it in its first round, with its 95 % interval; *no sign*: not more than a clean set shows.",
        "*Boundary*: test accuracy of the chosen boundary with nothing removed. *Smallest class*: the smallest",
        "share that a class keeps.",
        "",
        row(HEADER),
        f"|{'---|' * len(HEADER)}",
    ]
    for one in found:
        estimate = f"{percent(one.rate)} ({percent(one.low)} to {percent(one.high)})" if one.found else "no sign"
        cells: list[Any] = [
            one.dataset,
            one.noise,
            one.network,
            one.seed,
            percent(one.truth),
            estimate,
            percent(one.removed / one.samples),
            percent(one.removed_wrong / one.removed) if one.removed else "",
            percent(one.removed_wrong / one.wrong) if one.wrong else "",
            percent(one.smallest_class),
            percent(one.test_before),
            percent(one.test_boundary),
            percent(one.test_after),
            one.rounds,
        ]
        lines.append(row(cells))
    return document([lines])


def table(found: Iterable[Found]) -> pa.Table:
    """One row for each case."""
    return pa.Table.from_pylist([asdict(one) for one in found])


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, NOISES, seeds=[0])
    options = parser.parse_args(arguments)
    command.run(
        "safety",
        parser,
        options,
        measure=partial(measured, folder=options.folder),
        kept=lambda case: kept(case, options.folder),
        report=report,
        table=table,
    )


if __name__ == "__main__":
    main()
