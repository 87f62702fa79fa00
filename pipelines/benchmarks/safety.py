"""Does a run stop in time, and do no harm? The default settings on clean, noisy and awkward data.

`python -m pipelines.benchmarks.safety --seeds 0` runs posttrain's rounds (`refine.scope: head`, in memory, by the loop
of a real run) on true labels, on 5 to 60 % wrong ones, on class sizes of 100 to 1, on two classes that look alike, and
with one class labelled at random. What is finished stays in `--folder`: started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import HARD, NETWORKS, Case
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.in_memory import CleaningInMemory, boundary_accuracies, start
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
    """Of wrong labels, as estimated in the last round."""
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

    @property
    def truth(self) -> float:
        """The share of wrong labels."""
        return self.wrong / self.samples


def measured(case: Case, folder: Path) -> Found:
    """The finding on a case, from the folder where it is there."""
    path = folder / "safety" / f"{case.key}.json"
    if path.exists():
        return Found(**json.loads(path.read_text()))
    data = cases.load(case)
    begin = start(case, data, cases.trained(case, data, folder).weights)
    run = CleaningInMemory(case, data, "head", begin, removal=Removal())
    outcome = run.clean()
    state = run.last_boundary(outcome.state, "head")
    wrong = data.train.given != data.train.true
    before, after = (np.bincount(data.train.given[mask], minlength=data.classes) for mask in (wrong >= 0, run.kept))
    estimate = run.estimates[-1]
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
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(found), indent=1))
    os.replace(aside, path)
    return found


def report(found: Sequence[Found], command: str) -> list[str]:
    """The table in Markdown."""
    lines = [
        "# Stop and safety",
        "",
        f"`{command}`; {hardware()}",
        "",
        "posttrain with its default settings and `refine.scope: head`. *Estimate*: the share of wrong labels, as",
        "the run saw it in its last round, with its 95 % interval; *no sign*: not more than a clean set shows.",
        "*Boundary*: test accuracy of the chosen boundary with nothing removed. *Smallest class*: the smallest",
        "share that a class keeps.",
        "",
        f"| {' | '.join(HEADER)} |",
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
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def short(found: Sequence[Found]) -> list[str]:
    """The README's table: one line per data set and kind of labels, with the values of each network and seed."""
    lines = ["| data set, labels | wrong | estimate | removed | precision |", "|---|---|---|---|---|"]
    for key in dict.fromkeys((one.dataset, one.noise) for one in found):
        mine = [one for one in found if (one.dataset, one.noise) == key]
        sign = [one for one in mine if one.found]
        rates = ", ".join(percent(one.rate) if one.found else "no sign" for one in mine)
        gone = [one for one in sign if one.removed]
        precision = ", ".join(percent(one.removed_wrong / one.removed) for one in gone)
        removed = ", ".join(percent(one.removed / one.samples) for one in mine)
        truth = percent(float(np.mean([one.truth for one in mine])))
        lines.append(f"| {key[0]}, {key[1]} | {truth} | {rates} | {removed} | {precision} |")
    return lines


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(cases.DATASETS), choices=list(cases.DATASETS))
    parser.add_argument("--noises", nargs="+", default=list(NOISES), choices=list(NOISES))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/detection"), help="a folder for all networks")
    parser.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the table of what is there")
    parser.add_argument("--readme", action="store_true", help="only print the short table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for case in cases.cases(options.datasets, options.noises, options.networks, options.seeds):
        there = (options.folder / "safety" / f"{case.key}.json").exists()
        if there or not (options.report or options.readme):
            found.append(measured(case, options.folder))
            print(case, flush=True)
    if options.readme:
        print("\n".join(short(found)))
        return
    seeds = " ".join(map(str, options.seeds))
    options.out.joinpath("safety.md").write_text(
        "\n".join(report(found, f"python -m pipelines.benchmarks.safety --seeds {seeds}")) + "\n"
    )


if __name__ == "__main__":
    main()
