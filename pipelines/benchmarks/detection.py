"""Which samples have a wrong label? posttrain's scores beside published ones, on the same networks.

`python -m pipelines.benchmarks.detection --seeds 0 1 2` takes every case of `cases`, trains its network, ranks its
training samples by every score of posttrain and by every peer of `baselines`, one after the other in one process, and
compares the ranks with the true labels, which no method sees. What is finished stays in `--folder`, one file
for each case: started again, it goes on with what is missing. `--report` only writes the tables of what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.benchmarks import baselines, cases, command
from pipelines.benchmarks.baselines import PEERS, Context
from pipelines.benchmarks.cases import NOISES, Case, Data, OutOfSample
from pipelines.benchmarks.detection_findings import (
    AFTER_FOLDS,
    DEFAULT,
    Finding,
    Tried,
    calibration_error,
    keep,
    kept,
    ranking,
    removed,
    table,
)
from pipelines.benchmarks.detection_report import report
from pipelines.benchmarks.first_round import FirstRound, first_round
from posttrain.vision import models

Folds = Literal["train", "kept", "none"]
"""Out-of-sample predictions: trained where they are not there, only where they are there, not at all."""


def measure(case: Case, folder: Path, folds: Folds = "train") -> Finding:
    """What is to be known of the case, from its file in the folder as far as it is there; kept there."""
    found = kept(case, folder)
    methods = wanted(case, folder, folds)
    if found is not None:
        methods = [method for method in methods if found.of("peer", method) is None]
        if not methods:
            return found
    data = cases.load(case)
    trained = cases.trained(case, data, folder)
    both = found is None
    if found is None:
        found = _of_ours(case, data, trained.weights, first_round(case, data, trained.weights))
    probabilities = None
    # an empty one fails where a peer asks for it all the same
    out_of_sample = OutOfSample(np.empty((0, data.classes)), 0.0, fresh=False)
    if any(method in AFTER_FOLDS for method in methods):
        out_of_sample = cases.out_of_sample(case, data, folder)
        probabilities = out_of_sample.probabilities
    context = Context(case, data, trained, out_of_sample)
    wrong = data.train.given != data.train.true
    rankings, flagged = list(found.rankings), None
    for method in methods:
        measured = PEERS[method](context)
        rankings.append(
            ranking(
                "peer",
                method,
                measured.scores,
                wrong,
                seconds=measured.seconds,
                passes=measured.passes,
                alongside=both and (method not in AFTER_FOLDS or out_of_sample.fresh),
            )
        )
        flagged = measured.flagged if method == "confident_learning" else flagged
    changes: dict[str, Any] = {"rankings": tuple(rankings)}
    if flagged is not None:
        changes["cleanlab_removed"] = removed(flagged, wrong)
    if probabilities is not None:
        changes["cleanlab_suggested_accuracy"] = _share(baselines.suggested(probabilities) == data.train.true, wrong)
    found = replace(found, **changes)
    keep(found, folder)
    return found


def _of_ours(case: Case, data: Data, weights: bytes, found: FirstRound) -> Finding:
    model = cases.loaded(case, weights)
    wrong = data.train.given != data.train.true
    right = found.suggested == data.train.true
    head = models.find_head(model, classes=data.classes)
    cost: dict[str, Any] = {"seconds": found.seconds, "passes": found.passes, "alongside": True}
    return Finding(
        case=case,
        samples=len(data.train),
        noise_rate=float(wrong.mean()),
        estimate=found.noise.rate,
        low=found.noise.low,
        high=found.noise.high,
        removed=removed(found.selected, wrong),
        cleanlab_removed=None,
        suggested_accuracy=_share(right, wrong),
        cleanlab_suggested_accuracy=None,
        removed_suggested_accuracy=_share(right, found.selected),
        removed_confidence=float(found.confidence[found.selected].mean()) if found.selected.any() else None,
        calibration_error=calibration_error(found.confidence[found.selected], right[found.selected]),
        layers=found.layers,
        l2_values=found.l2_values,
        tried=tuple(Tried(*entry) for entry in found.table),
        last_layer=head,
        last_layer_auroc=ranking("ours", DEFAULT, found.last_layer, wrong, **cost).auroc,
        train_accuracy=cases.accuracy(case, model, data.train),
        test_accuracy=cases.accuracy(case, model, data.test),
        boundary_test_accuracy=found.boundary_test_accuracy,
        rankings=tuple(ranking("ours", name, scores, wrong, **cost) for name, scores in found.scores.items()),
    )


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
    return float(right[among].mean()) if among.any() else None


def wanted(case: Case, folder: Path, folds: Folds) -> list[str]:
    """The baselines to measure on a case."""
    there = folds == "train" or (folds == "kept" and (folder / "out_of_sample" / f"{case.key}.pt").exists())
    return [method for method in PEERS if there or method not in AFTER_FOLDS]


# -- the command -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, NOISES, seeds=[0, 1, 2])
    cleanlab = parser.add_mutually_exclusive_group()
    cleanlab.add_argument("--without-cleanlab", action="store_true", help="no networks for out-of-sample predictions")
    cleanlab.add_argument("--only-kept", action="store_true", help="cleanlab only where its predictions are kept")
    options = parser.parse_args(arguments)
    folds: Folds = "none" if options.without_cleanlab else "kept" if options.only_kept else "train"
    command.run(
        "detection",
        parser,
        options,
        measure=partial(measure, folder=options.folder, folds=folds),
        kept=lambda case: kept(case, options.folder),
        report=report,
        table=table,
        flags=("without-cleanlab", "only-kept"),
    )


if __name__ == "__main__":
    main()
