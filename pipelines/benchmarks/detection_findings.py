"""What the detection benchmark finds on a case: how each method ranks its samples; kept in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.benchmarks import findings
from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.hardware import hardware
from posttrain.config import Removal

DEFAULT: str = Removal().score
AFTER_FOLDS = ("confident_learning", "self_confidence")
"""The baselines that need out-of-sample predictions, thus `cases.FOLDS` more networks."""
BINS = 15

Kind = Literal["ours", "peer"]


@dataclass(frozen=True)
class Ranking:
    """How one method ranks a case's samples. The three figures of quality are None where no label is wrong."""

    kind: Kind
    method: str
    average_precision: float | None
    auroc: float | None
    precision_at_noise: float | None
    """Precision among as many of the most suspect samples as there are wrong labels."""
    seconds: float
    passes: float
    """Over the training images, see `baselines.Measured`."""
    hardware: str
    threads: int
    alongside: bool = False
    """Whether all that `seconds` counts is known to have been done in the run that took those of the default score."""


@dataclass(frozen=True)
class Removed:
    """What a method would take out by itself, all at once."""

    share: float
    precision: float | None
    """None where nothing is taken out."""
    recall: float | None
    """None where no label is wrong."""


@dataclass(frozen=True)
class Tried:
    """A probe that was fitted, and what it is worth on held-out labels, as noisy as the rest."""

    layer: str
    l2: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Finding:
    """Everything that was measured on a case."""

    case: Case
    samples: int
    noise_rate: float
    estimate: float
    low: float
    high: float
    """The noise rate as posttrain estimates it, with its interval."""
    removed: Removed
    cleanlab_removed: Removed | None
    suggested_accuracy: float | None
    """Share of the wrongly labelled samples whose suggested label is the true one."""
    cleanlab_suggested_accuracy: float | None
    removed_suggested_accuracy: float | None
    removed_confidence: float | None
    """The same over what posttrain would remove, and its mean confidence there."""
    calibration_error: float | None
    """`calibration_error` of the confidence in the suggestions, over what posttrain would remove."""
    layers: tuple[str, ...]
    l2_values: tuple[float, ...]
    tried: tuple[Tried, ...]
    last_layer: str
    last_layer_auroc: float | None
    """Of the default score of a probe on the last layer alone."""
    train_accuracy: float
    """Share of the given labels that the network reproduces."""
    test_accuracy: float
    boundary_test_accuracy: float
    rankings: tuple[Ranking, ...]

    def of(self, kind: Kind, method: str) -> Ranking | None:
        """The method's ranking, None where it was not measured."""
        return next((r for r in self.rankings if (r.kind, r.method) == (kind, method)), None)


def ranking(
    kind: Kind,
    method: str,
    scores: np.ndarray,
    wrong: np.ndarray,
    *,
    seconds: float,
    passes: float,
    alongside: bool = False,
) -> Ranking:
    """The figures of scores [n], larger is more suspect, against which labels are wrong: bool [n].

    Raises ValueError for scores that are not finite or not one for each sample.
    """
    if scores.shape != wrong.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"{method}: {scores.shape} scores for {len(wrong)} samples, "
            f"{int((~np.isfinite(scores)).sum())} of them not finite; a rank needs one number for each sample"
        )
    quality: tuple[float | None, float | None, float | None] = (None, None, None)
    if wrong.any():
        first = np.argsort(-scores, kind="stable")[: int(wrong.sum())]
        quality = (
            float(average_precision_score(wrong, scores)),
            float(roc_auc_score(wrong, scores)),
            float(wrong[first].mean()),
        )
    return Ranking(kind, method, *quality, seconds, passes, hardware(), torch.get_num_threads(), alongside)


def removed(taken: np.ndarray, wrong: np.ndarray) -> Removed:
    """Share, precision and recall of what is taken out: bool [n], against which labels are wrong: bool [n]."""
    precision = float(wrong[taken].mean()) if taken.any() else None
    return Removed(float(taken.mean()), precision, float(taken[wrong].mean()) if wrong.any() else None)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Expected calibration error in 15 bins of equal width (Guo et al. 2017); None without samples.

    sum over bins of |mean confidence - share that is right|, weighted by the bin's share of the samples.
    """
    if not len(confidence):
        return None
    bins = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def kept(case: Case, folder: Path) -> Finding | None:
    """The case's finding from the folder, None where there is none."""
    return findings.kept(Finding, findings.file("detection", case, folder))


def keep(found: Finding, folder: Path) -> None:
    """The case's finding goes into the folder."""
    findings.keep(found, findings.file("detection", found.case, folder))


def table(found: Iterable[Finding]) -> pa.Table:
    """One row for each case and method; what is of the case stands in each of its rows."""
    rows: list[dict[str, Any]] = []
    for finding in found:
        whole = asdict(finding)
        case, rankings = whole.pop("case"), whole.pop("rankings")
        for name in ("removed", "cleanlab_removed"):
            own = whole.pop(name) or {}
            whole |= {f"{name}_{figure}": own.get(figure) for figure in ("share", "precision", "recall")}
        rows += [{**case, **entry, **whole} for entry in rankings]
    return pa.Table.from_pylist(rows)
