"""Which samples have a wrong label? posttrain's scores beside published ones, on the same networks.

`python -m pipelines.benchmarks.detection --seeds 0 1 2` takes every case of `cases`, trains its network, ranks its
training samples by every score of posttrain and by every peer of `peers`, one after the other in one process, and
compares the ranks with the true labels, which no method sees. What is finished stays in `--folder`, one file
for each case: started again, it goes on with what is missing. `--report` only writes the tables of what is there,
`--readme` prints the short one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from threadpoolctl import threadpool_limits

from pipelines.benchmarks import cases, peers
from pipelines.benchmarks.cases import DATASETS, NETWORKS, NOISES, Case, Data, OutOfSample
from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.ours import Ours, ours
from pipelines.benchmarks.peers import PEERS, Context
from posttrain.config import Removal
from posttrain.vision import models

DEFAULT: str = Removal().score
AFTER_FOLDS = ("confident_learning", "self_confidence")
"""The peers that need out-of-sample predictions, thus `cases.FOLDS` more networks."""
BINS = 15

Folds = Literal["train", "kept", "none"]
"""Out-of-sample predictions: trained where they are not there, only where they are there, not at all."""
Kind = Literal["ours", "peer"]


# -- one case ----------------------------------------------------------------------------------------------


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
    """Over the training images, see `peers.Measured`."""
    hardware: str
    threads: int


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
    damping: float
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
    dampings: tuple[float, ...]
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
    kind: Kind, method: str, scores: np.ndarray, wrong: np.ndarray, *, seconds: float, passes: float
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
    return Ranking(kind, method, *quality, seconds, passes, hardware(), torch.get_num_threads())


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
    if found is None:
        found = _of_ours(case, data, trained.weights, ours(case, data, trained.weights))
    probabilities = None
    # an empty one fails where a peer asks for it all the same
    out_of_sample = OutOfSample(np.empty((0, data.classes)), 0.0)
    if any(method in AFTER_FOLDS for method in methods):
        out_of_sample = cases.out_of_sample(case, data, folder)
        probabilities = out_of_sample.probabilities
    context = Context(case, data, trained, out_of_sample)
    wrong = data.train.given != data.train.true
    rankings, flagged = list(found.rankings), None
    for method in methods:
        measured = PEERS[method](context)
        rankings.append(
            ranking("peer", method, measured.scores, wrong, seconds=measured.seconds, passes=measured.passes)
        )
        flagged = measured.flagged if method == "confident_learning" else flagged
    changes: dict[str, Any] = {"rankings": tuple(rankings)}
    if flagged is not None:
        changes["cleanlab_removed"] = removed(flagged, wrong)
    if probabilities is not None:
        changes["cleanlab_suggested_accuracy"] = _share(peers.suggested(probabilities) == data.train.true, wrong)
    found = replace(found, **changes)
    _keep(found, folder)
    return found


def _of_ours(case: Case, data: Data, weights: bytes, found: Ours) -> Finding:
    model = cases.loaded(case, weights)
    wrong = data.train.given != data.train.true
    right = found.suggested == data.train.true
    head = models.find_head(model, classes=data.classes)
    cost = {"seconds": found.seconds, "passes": found.passes}
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
        dampings=found.dampings,
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


# -- the files ---------------------------------------------------------------------------------------------


def wanted(case: Case, folder: Path, folds: Folds) -> list[str]:
    """The peers to measure on a case."""
    there = folds == "train" or (folds == "kept" and (folder / "out_of_sample" / f"{case.key}.pt").exists())
    return [method for method in PEERS if there or method not in AFTER_FOLDS]


def kept(case: Case, folder: Path) -> Finding | None:
    """The case's finding from the folder, None where there is none."""
    path = _path(case, folder)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    own = content["cleanlab_removed"]
    return Finding(
        **{
            **content,
            "case": Case(**content["case"]),
            "removed": Removed(**content["removed"]),
            "cleanlab_removed": Removed(**own) if own else None,
            "layers": tuple(content["layers"]),
            "dampings": tuple(content["dampings"]),
            "tried": tuple(Tried(**entry) for entry in content["tried"]),
            "rankings": tuple(Ranking(**entry) for entry in content["rankings"]),
        }
    )


def _keep(found: Finding, folder: Path) -> None:
    path = _path(found.case, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(found), indent=1, allow_nan=False))
    os.replace(aside, path)


def _path(case: Case, folder: Path) -> Path:
    return folder / "detection" / f"{case.key}.json"


def table(findings: Iterable[Finding]) -> pa.Table:
    """One row for each case and method; what is of the case stands in each of its rows."""
    rows: list[dict[str, Any]] = []
    for found in findings:
        whole = asdict(found)
        case, rankings = whole.pop("case"), whole.pop("rankings")
        for name in ("removed", "cleanlab_removed"):
            own = whole.pop(name) or {}
            whole |= {f"{name}_{figure}": own.get(figure) for figure in ("share", "precision", "recall")}
        rows += [{**case, **entry, **whole} for entry in rankings]
    return pa.Table.from_pylist(rows)


# -- the report --------------------------------------------------------------------------------------------

Method = tuple[Kind, str]

DEFAULT_METHOD: Method = ("ours", DEFAULT)
QUALITY = ("average_precision", "auroc", "precision_at_noise")
ACCURACIES = ("train_accuracy", "test_accuracy", "boundary_test_accuracy")
SHOWN: dict[Method, str] = {
    DEFAULT_METHOD: f"posttrain `{DEFAULT}` (default)",
    ("peer", "confident_learning"): "cleanlab, confident learning",
    ("peer", "self_confidence"): "cleanlab, self-confidence",
    ("peer", "tracin"): "captum, TracInCPFast",
    ("peer", "ekfac"): "kronfluence, EK-FAC of the last layer",
    ("peer", "aum"): "AUM",
    ("peer", "knn"): "nearest neighbours",
    ("peer", "random"): "random",
}


def shown(method: Method) -> str:
    """What the tables call a method."""
    return SHOWN.get(method, f"posttrain `{method[1]}`" if method[0] == "ours" else method[1])


@dataclass(frozen=True)
class Defeat:
    """A peer that finds more than the default score on one setting; figures over the seeds that both have."""

    dataset: str
    noise: str
    network: str
    method: Method
    peer: tuple[float, ...]
    default: tuple[float, ...]
    """Average precision by seed."""

    @property
    def differences(self) -> list[float]:
        return [peer - default for peer, default in zip(self.peer, self.default, strict=True)]

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the difference over seeds; None of one seed."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def clear(self) -> bool:
        """Whether the difference is larger than its spread; of one seed any difference counts."""
        return self.difference > (self.spread or 0.0)


def defeats(findings: Sequence[Finding]) -> list[Defeat]:
    """The peers that have a higher mean average precision than the default score, the largest difference first."""
    found: list[Defeat] = []
    for (dataset, noise, network), group in _by(findings, "dataset", "noise", "network").items():
        for name in PEERS:
            method: Method = ("peer", name)
            both = _side_by_side(group, method)
            if both:
                peer, default = zip(*both, strict=True)
                found.append(Defeat(dataset, noise, network, method, peer, default))
    return sorted((d for d in found if d.difference > 0), key=lambda d: -d.difference)


def report(findings: Sequence[Finding], command: str) -> str:
    """All tables in Markdown."""
    ranked = _methods(findings)
    sections = [
        _head(findings, command),
        _verdict(findings, ranked),
        _overall(findings, ranked),
        _by_noise(findings, ranked),
        _defeats(findings),
        _noise_rates(findings),
        _removals(findings),
        _layers(findings),
        _suggestions(findings),
    ]
    return "\n".join("\n".join(section) + "\n" for section in sections if section)


def short(findings: Sequence[Finding]) -> str:
    """The README's table."""
    lines = ["| | " + "".join(f"{network} | " for network in NETWORKS) + "seconds |", "|---|" + "---|" * 3]
    noisy = _noisy(findings)
    for method in _methods(findings):
        cells = [_percent([f for f in noisy if f.case.network == n], _ranked_as(method)) for n in NETWORKS]
        lines.append(f"| {shown(method)} | {' | '.join(cells)} | {_seconds(_of(findings, method))} |")
    return "\n".join(lines)


def _head(findings: Sequence[Finding], command: str) -> list[str]:
    sizes = [
        f"{name} ({DATASETS[name].train} / {DATASETS[name].validation} / {DATASETS[name].test})"
        for name in DATASETS
        if any(f.case.dataset == name for f in findings)
    ]
    machines = sorted({f"{r.hardware}; {r.threads} thread(s)" for f in findings for r in f.rankings})
    seeds = sorted({f.case.seed for f in findings})
    return [
        "# Which samples have a wrong label?",
        "",
        f"`{command}`",
        "",
        f"- data sets (training / validation / test images): {', '.join(sizes)}",
        f"- seeds: {', '.join(map(str, seeds))} (the sample, the wrong labels and the network depend on them)",
        f"- cases: {len(findings)}, of which {len(_noisy(findings))} with wrong labels",
        *(f"- measured on: {machine}" for machine in machines),
        "",
        "Quality in percent, mean over cases ± standard deviation over seeds. Seconds are wall seconds on top of the",
        "trained network, the methods of a case one after the other in one process, but for what was added later.",
        f"Those of cleanlab hold the training of its {cases.FOLDS} networks, as it took when they were trained; AUM",
        "and TracIn need a training that was watched, which is not counted. A number in brackets: so many cases were",
        "measured, while others in the table have more; such a mean is over other cases, and never bold.",
    ]


def _verdict(findings: Sequence[Finding], ranked: Sequence[Method]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    lines = ["## The default score", ""]
    ahead: list[str] = []
    for method in ranked:
        both = _side_by_side(noisy, method)
        if not both:
            continue
        peer, own = (100 * statistics.mean(values) for values in zip(*both, strict=True))
        if not _complete(noisy, method):
            lines.append(f"- On the {len(both)} cases with {shown(method)}: {own:.1f} against {peer:.1f}.")
        elif method == DEFAULT_METHOD:
            lines.insert(2, f"- Mean average precision over all noisy cases: {own:.1f}.")
        elif peer > own:
            ahead.append(f"{shown(method)} ({peer:.1f})")
    lines.insert(3, f"- Measured on all of them, with a higher one: {', '.join(ahead) or 'none'}.")
    clear = [d for d in defeats(findings) if d.clear]
    lines.append(f"- Beaten by a peer by more than the spread over seeds: {len(clear)} times (listed below).")
    for name in AFTER_FOLDS:
        shares = [
            100 * own.seconds / peer.seconds
            for f in findings
            if (peer := f.of("peer", name)) is not None and (own := f.of(*DEFAULT_METHOD)) is not None and peer.seconds
        ]
        if shares:
            lines.append(
                f"- Its seconds as a share of those of {shown(('peer', name))}: "
                f"median {statistics.median(shares):.1f} %, at most {max(shares):.1f} % ({len(shares)} cases)."
            )
    return lines


def _overall(findings: Sequence[Finding], ranked: Sequence[Method]) -> list[str]:
    noisy = _noisy(findings)
    rows: list[list[str]] = []
    for method in ranked:
        ratios = [
            r.seconds / default.seconds
            for f in findings
            if (r := f.of(*method)) is not None and (default := f.of(*DEFAULT_METHOD)) is not None
        ]
        rows.append(
            [
                shown(method),
                *(_percent(noisy, _ranked_as(method, figure)) for figure in QUALITY),
                _seconds(_of(findings, method)),
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(r.passes for r in _of(findings, method)):.1f}",
                f"{len(_of(noisy, method))} of {len(noisy)}",
            ]
        )
    columns = ["", "average precision", "AUROC", "precision at the noise rate"]
    columns += ["seconds (median)", "of the default's (median)", "passes (median)", "noisy cases"]
    return ["## All noisy cases together", "", *_lines(columns, _bold(rows, range(1, 4)))]


def _by_noise(findings: Sequence[Finding], ranked: Sequence[Method]) -> list[str]:
    lines = ["## Average precision by kind of noise"]
    for (network, dataset), group in _by(_noisy(findings), "network", "dataset").items():
        kinds = [kind for kind in NOISES if any(f.case.noise == kind for f in group)]
        rows: list[list[str]] = []
        for method in ranked:
            parts = [[f for f in group if f.case.noise == kind] for kind in kinds]
            rows.append([shown(method), *(_percent(part, _ranked_as(method)) for part in [*parts, group])])
        columns = ["", *kinds, "mean"]
        lines += ["", f"### {dataset}, {network}", "", *_lines(columns, _bold(rows, range(1, len(columns))))]
    return lines


def _defeats(findings: Sequence[Finding]) -> list[str]:
    ahead = defeats(findings)
    clear = [d for d in ahead if d.clear]
    rows = [
        [
            d.dataset,
            d.noise,
            d.network,
            shown(d.method),
            *(", ".join(f"{100 * value:.1f}" for value in values) for values in (d.peer, d.default)),
            f"{100 * d.difference:.1f}" + ("" if d.spread is None else f" ± {100 * d.spread:.1f}"),
        ]
        for d in clear
    ]
    columns = ["data set", "noise", "network", "peer", "its average precision", "the default's", "difference"]
    return [
        "## Where a peer beats the default score",
        "",
        "By more than the spread: the mean of the differences, seed by seed, is larger than their standard deviation.",
        "Of one seed there is no spread, and any difference counts. Average precision of each seed. Within the spread,",
        f"a peer is ahead {len(ahead) - len(clear)} times more.",
        "",
        *(_lines(columns, rows) if rows else ["Nowhere."]),
    ]


def _noise_rates(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in _by(findings, "dataset", "noise", "network").items():
        inside = sum(f.low <= f.noise_rate <= f.high for f in group)
        low, high = (100 * statistics.mean(getattr(f, end) for f in group) for end in ("low", "high"))
        rows.append(
            [
                *setting,
                _percent(group, attrgetter("noise_rate")),
                _percent(group, attrgetter("estimate")),
                f"{low:.1f} to {high:.1f}",
                f"{inside} of {len(group)}",
                f"{100 * statistics.mean(abs(f.estimate - f.noise_rate) for f in group):.1f}",
            ]
        )
    columns = ["data set", "noise", "network", "wrong labels", "estimate", "95 % interval", "truth inside", "off by"]
    return [
        "## The noise rate",
        "",
        "Percent; the interval's ends and what the estimate is off by are means over seeds.",
        "",
        *_lines(columns, rows),
    ]


def _removals(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in _by(findings, "dataset", "noise", "network").items():
        cells: list[str] = []
        for whose in ("removed", "cleanlab_removed"):
            measured = [f for f in group if getattr(f, whose) is not None]
            for figure in ("share", "precision", "recall"):
                # of clean data every precision is 0
                known = [] if figure == "precision" and not _noisy(group) else measured
                cells.append(_percent(known, attrgetter(f"{whose}.{figure}")))
        rows.append([*setting, _percent(group, attrgetter("noise_rate")), *cells])
    columns = ["data set", "noise", "network", "wrong labels", "removed", "precision", "recall"]
    columns += [f"cleanlab's {name}" for name in ("removed", "precision", "recall")]
    return [
        "## What would be removed",
        "",
        "Percent. posttrain: one round without a budget; cleanlab: what `find_label_issues` flags. Of clean data, all",
        "that is removed is wrongly removed. Precision is over the seeds where anything is removed.",
        "",
        *_lines(columns, rows),
    ]


def _layers(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in _by(findings, "dataset", "network").items():
        noisy = _noisy(group)
        rows.append(
            [
                *setting,
                ", ".join(f"{n} {count}" for n, count in Counter(n for f in group for n in f.layers).most_common()),
                ", ".join(f"{n} {count}" for n, count in Counter(_best(f).layer for f in group).most_common()),
                _percent(group, lambda f: _best(f).accuracy),
                _percent(group, lambda f: _best(f, f.last_layer).accuracy),
                _percent(noisy, _ranked_as(DEFAULT_METHOD, "auroc")),
                _percent(noisy, attrgetter("last_layer_auroc")),
                *(_percent(group, attrgetter(name)) for name in ACCURACIES),
            ]
        )
    columns = ["data set", "network", "layers in the committee (cases)", "best layer alone (cases)"]
    columns += ["its held-out accuracy", "the last layer's", "AUROC of the default", "of the last layer alone"]
    columns += ["network, given labels", "network, test", "boundary, test"]
    return [
        "## Layers",
        "",
        "Percent. The held-out labels are as noisy as the rest; the test labels are right. AUROC over the noisy cases,",
        "everything else over all of them.",
        "",
        *_lines(columns, rows),
    ]


def _suggestions(findings: Sequence[Finding]) -> list[str]:
    names = ("suggested_accuracy", "cleanlab_suggested_accuracy")
    names += ("removed_suggested_accuracy", "removed_confidence", "calibration_error")
    rows = [
        [*setting, *(_percent(group, attrgetter(name)) for name in names)]
        for setting, group in _by(_noisy(findings), "dataset", "noise", "network").items()
    ]
    columns = ["data set", "noise", "network", "wrong labels put right, posttrain", "cleanlab"]
    columns += ["removed: right", "removed: confidence", "removed: calibration error"]
    return [
        "## Suggested labels",
        "",
        "Percent. Wrong labels put right: of the wrongly labelled samples, those whose suggested label is the true one",
        "(cleanlab: the most probable class out of sample). Removed: over what posttrain would remove, how often its",
        f"suggestion is right, its mean confidence, and the expected calibration error in {BINS} bins.",
        "",
        *_lines(columns, rows),
    ]


def _methods(findings: Sequence[Finding]) -> list[Method]:
    """All that were measured, the best mean average precision first; those that were not measured everywhere last."""
    noisy = _noisy(findings)
    found: dict[Method, list[float]] = {}
    for ranking in (r for f in findings for r in f.rankings):
        values = found.setdefault((ranking.kind, ranking.method), [])
        values += [] if ranking.average_precision is None else [ranking.average_precision]
    return sorted(found, key=lambda m: (not _complete(noisy, m), -statistics.mean(found[m] or [0.0])))


def _by(findings: Iterable[Finding], *names: str) -> dict[tuple[str, ...], list[Finding]]:
    """Findings grouped by attributes of their case, in the order of the benchmark's lists."""
    orders: dict[str, Sequence[str]] = {"dataset": list(DATASETS), "noise": NOISES, "network": NETWORKS}
    found: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        found.setdefault(tuple(getattr(finding.case, name) for name in names), []).append(finding)
    return dict(
        sorted(found.items(), key=lambda item: [orders[n].index(v) for n, v in zip(names, item[0], strict=True)])
    )


def _noisy(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.noise_rate > 0]


def _of(findings: Iterable[Finding], method: Method) -> list[Ranking]:
    return [r for f in findings if (r := f.of(*method)) is not None]


def _side_by_side(findings: Iterable[Finding], method: Method) -> list[tuple[float, float]]:
    """Average precision of the method and of the default score, of the cases where both are known."""
    pairs = [(_ranked_as(method)(f), _ranked_as(DEFAULT_METHOD)(f)) for f in findings]
    return [(own, default) for own, default in pairs if own is not None and default is not None]


def _complete(findings: Sequence[Finding], method: Method) -> bool:
    return len(_of(findings, method)) == len(findings)


def _best(found: Finding, layer: str | None = None) -> Tried:
    return min((t for t in found.tried if layer in (None, t.layer)), key=lambda t: t.loss)


def _percent(findings: Sequence[Finding], of: Callable[[Finding], float | None]) -> str:
    """Mean over the cases in percent, and the standard deviation over seeds of each seed's mean.

    Followed by the number of cases of which it is known, where that is not all of them.
    """
    known = [(f.case.seed, 100 * value) for f in findings if (value := of(f)) is not None]
    if not known:
        return ""
    seeds = [statistics.mean(v for own, v in known if own == seed) for seed in {seed for seed, _ in known}]
    deviation = f" ± {statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
    number = f" ({len(known)})" if len(known) < len(findings) else ""
    return f"{statistics.mean(value for _, value in known):.1f}{deviation}{number}"


def _ranked_as(method: Method, figure: str = "average_precision") -> Callable[[Finding], float | None]:
    """The figure of a finding's ranking by the method."""
    return lambda found: getattr(found.of(*method), figure, None)


def _seconds(rankings: Sequence[Ranking]) -> str:
    return f"{statistics.median(r.seconds for r in rankings):.2f}"


def _bold(rows: list[list[str]], columns: Iterable[int]) -> list[list[str]]:
    """The rows with the highest mean of each column in bold, all that print the same; those in brackets never."""
    for column in columns:
        means = [float(row[column].split()[0]) for row in rows if row[column] and not row[column].endswith(")")]
        for row in rows:
            cell = row[column]
            if means and cell and not cell.endswith(")") and float(cell.split()[0]) == max(means):
                row[column] = f"**{cell}**"
    return rows


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


# -- the command -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/detection"), help="networks and findings")
    parser.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"), help="the tables")
    cleanlab = parser.add_mutually_exclusive_group()
    cleanlab.add_argument("--without-cleanlab", action="store_true", help="no networks for out-of-sample predictions")
    cleanlab.add_argument("--only-kept", action="store_true", help="cleanlab only where its predictions are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables of what is there")
    parser.add_argument("--readme", action="store_true", help="measure nothing, print the README's table")
    options = parser.parse_args(arguments)
    chosen = list(cases.cases(options.datasets, options.noises, options.networks, options.seeds))
    if not (options.report or options.readme):
        torch.set_num_threads(options.threads)
        folds: Folds = "none" if options.without_cleanlab else "kept" if options.only_kept else "train"
        with threadpool_limits(limits=options.threads):
            for number, case in enumerate(chosen, start=1):
                print(f"[{number}/{len(chosen)}] {case}", file=sys.stderr)
                measure(case, options.folder, folds)
    findings = [found for case in chosen if (found := kept(case, options.folder)) is not None]
    if not findings:
        parser.error(f"{options.folder} holds nothing of these {len(chosen)} cases; measure them first")
    if options.readme:
        print(short(findings))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(findings), options.out / "detection.parquet")
    text = report(findings, _command(options))
    options.out.joinpath("detection.md").write_text(text)
    print(text)


def _command(options: argparse.Namespace) -> str:
    """What was asked for, without the folders, which are of one machine."""
    parts = ["python", "-m", "pipelines.benchmarks.detection"]
    for name, whole in (("datasets", DATASETS), ("noises", NOISES), ("networks", NETWORKS)):
        given = getattr(options, name)
        parts += [] if given == list(whole) else [f"--{name}", *given]
    parts += ["--seeds", *(str(seed) for seed in options.seeds)]
    parts += [f"--{name.replace('_', '-')}" for name in ("without_cleanlab", "only_kept") if getattr(options, name)]
    return shlex.join([*parts, *(["--threads", str(options.threads)] if options.threads != 1 else [])])


if __name__ == "__main__":
    main()
