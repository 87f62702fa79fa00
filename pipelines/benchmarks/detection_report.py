"""Which samples have a wrong label? What the detection benchmark found, in tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from pipelines.benchmarks import cases
from pipelines.benchmarks.baselines import PEERS
from pipelines.benchmarks.cases import NOISES
from pipelines.benchmarks.detection_findings import AFTER_FOLDS, BINS, DEFAULT, Finding, Kind, Ranking, Tried
from pipelines.benchmarks.tables import document, fewer, grouped, head, markdown, with_spread

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
    """The baselines that have a higher mean average precision than the default score, the largest difference first."""
    found: list[Defeat] = []
    for (dataset, noise, network), group in grouped(findings, "dataset", "noise", "network").items():
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
    return document(sections)


def _head(findings: Sequence[Finding], command: str) -> list[str]:
    return [
        *head(
            "Which samples have a wrong label?",
            command,
            [f.case for f in findings],
            noisy=len(_noisy(findings)),
            machines=[(r.hardware, r.threads) for f in findings for r in f.rankings],
        ),
        "",
        "Quality in percent, mean over cases ± standard deviation over seeds. Seconds are wall seconds on top of the",
        "trained network, the methods of a case one after the other in one process, but for what was added later.",
        "Shares of seconds are of the cases alone where one run took both, cleanlab's networks included. Its seconds",
        f"hold the training of those {cases.FOLDS}; AUM and TracIn need a training that was watched, which is not",
        "counted. A number in brackets: so many cases were measured, while others in the table have more; such a mean",
        "is over other cases, and never bold.",
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
        shares = [100 * own / peer for own, peer in _timed_together(findings, ("peer", name)) if peer]
        if shares:
            lines.append(
                f"- Its seconds as a share of those of {shown(('peer', name))}, one after the other in one run: "
                f"median {statistics.median(shares):.1f} %, at most {max(shares):.1f} % "
                f"({len(shares)} of {len(findings)} cases)."
            )
    return lines


def _overall(findings: Sequence[Finding], ranked: Sequence[Method]) -> list[str]:
    noisy = _noisy(findings)
    rows: list[list[str]] = []
    for method in ranked:
        ratios = [seconds / own for own, seconds in _timed_together(findings, method)]
        rows.append(
            [
                shown(method),
                *(_percent(noisy, _ranked_as(method, figure)) for figure in QUALITY),
                _seconds(_of(findings, method)),
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{statistics.median(r.passes for r in _of(findings, method)):.1f}",
                f"{len(_of(noisy, method))} of {len(noisy)}",
            ]
        )
    columns = ["", "average precision", "AUROC", "precision at the noise rate"]
    columns += ["seconds (median)", "of the default's (median)", "passes (median)", "noisy cases"]
    return ["## All noisy cases together", "", *markdown(columns, _bold(rows, range(1, 4)))]


def _by_noise(findings: Sequence[Finding], ranked: Sequence[Method]) -> list[str]:
    lines = ["## Average precision by kind of noise"]
    for (network, dataset), group in grouped(_noisy(findings), "network", "dataset").items():
        kinds = [kind for kind in NOISES if any(f.case.noise == kind for f in group)]
        rows: list[list[str]] = []
        for method in ranked:
            parts = [[f for f in group if f.case.noise == kind] for kind in kinds]
            rows.append([shown(method), *(_percent(part, _ranked_as(method)) for part in [*parts, group])])
        columns = ["", *kinds, "mean"]
        lines += ["", f"### {dataset}, {network}", "", *markdown(columns, _bold(rows, range(1, len(columns))))]
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
        *(markdown(columns, rows) if rows else ["Nowhere."]),
    ]


def _noise_rates(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in grouped(findings, "dataset", "noise", "network").items():
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
        *markdown(columns, rows),
    ]


def _removals(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in grouped(findings, "dataset", "noise", "network").items():
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
        *markdown(columns, rows),
    ]


def _layers(findings: Sequence[Finding]) -> list[str]:
    rows: list[list[str]] = []
    for setting, group in grouped(findings, "dataset", "network").items():
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
    columns = ["data set", "network", "layers in the ensemble (cases)", "best layer alone (cases)"]
    columns += ["its held-out accuracy", "the last layer's", "AUROC of the default", "of the last layer alone"]
    columns += ["network, given labels", "network, test", "boundary, test"]
    return [
        "## Layers",
        "",
        "Percent. The held-out labels are as noisy as the rest; the test labels are right. AUROC over the noisy cases,",
        "everything else over all of them.",
        "",
        *markdown(columns, rows),
    ]


def _suggestions(findings: Sequence[Finding]) -> list[str]:
    names = ("suggested_accuracy", "cleanlab_suggested_accuracy")
    names += ("removed_suggested_accuracy", "removed_confidence", "calibration_error")
    rows = [
        [*setting, *(_percent(group, attrgetter(name)) for name in names)]
        for setting, group in grouped(_noisy(findings), "dataset", "noise", "network").items()
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
        *markdown(columns, rows),
    ]


def _methods(findings: Sequence[Finding]) -> list[Method]:
    """All that were measured, the best mean average precision first; those that were not measured everywhere last."""
    noisy = _noisy(findings)
    found: dict[Method, list[float]] = {}
    for ranking in (r for f in findings for r in f.rankings):
        values = found.setdefault((ranking.kind, ranking.method), [])
        values += [] if ranking.average_precision is None else [ranking.average_precision]
    return sorted(found, key=lambda m: (not _complete(noisy, m), -statistics.mean(found[m] or [0.0])))


def _noisy(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.noise_rate > 0]


def _of(findings: Iterable[Finding], method: Method) -> list[Ranking]:
    return [r for f in findings if (r := f.of(*method)) is not None]


def _side_by_side(findings: Iterable[Finding], method: Method) -> list[tuple[float, float]]:
    """Average precision of the method and of the default score, of the cases where both are known."""
    pairs = [(_ranked_as(method)(f), _ranked_as(DEFAULT_METHOD)(f)) for f in findings]
    return [(own, default) for own, default in pairs if own is not None and default is not None]


def _timed_together(findings: Iterable[Finding], method: Method) -> list[tuple[float, float]]:
    """(the default's seconds, the method's) of the cases where one run took both: of two they do not compare."""
    pairs = [(f.of(*DEFAULT_METHOD), f.of(*method)) for f in findings]
    return [(own.seconds, other.seconds) for own, other in pairs if own and other and other.alongside]


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
    return with_spread(statistics.mean(value for _, value in known), seeds) + fewer(known, findings)


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
