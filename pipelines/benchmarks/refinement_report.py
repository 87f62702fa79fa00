"""Is the model better afterwards? What the refinement benchmark found, in tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student

from pipelines.benchmarks.in_memory import REMOVAL, Mode
from pipelines.benchmarks.refinement_findings import (
    ABLATIONS,
    CHOSEN,
    CLEANLAB,
    CONTROLS,
    EMA,
    MODES,
    NEW_HEAD,
    NO_REMOVAL,
    OURS,
    ROWS,
    SCRATCH,
    THEN_BOUNDARY,
    UNTOUCHED,
    Finding,
    precision,
    recall,
)
from pipelines.benchmarks.tables import document, grouped, head, markdown, percent
from pipelines.benchmarks.training import DECAY, REFINE
from posttrain.config import Removal

Setting = tuple[str, str, str]
"""(data set, noise, network): what the seeds of a mean share."""
Variant = Mode | Literal["best"]
VARIANTS: dict[Variant, str] = {**OURS, "best": "posttrain, the best of them"}


@dataclass(frozen=True)
class Comparison:
    """posttrain and the best control on one setting, by seed."""

    setting: Setting
    ours: tuple[float, ...]
    controls: tuple[tuple[str, float], ...]
    """Which one was the best, and its test accuracy."""

    @property
    def differences(self) -> list[float]:
        return [own - control for own, (_, control) in zip(self.ours, self.controls, strict=True)]

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def error(self) -> float | None:
        """Standard error of the mean difference; None of one seed."""
        seeds = len(self.differences)
        return statistics.stdev(self.differences) / seeds**0.5 if seeds > 1 else None

    @property
    def above(self) -> bool:
        """Whether the difference is larger than two standard errors; never of one seed."""
        return self.error is not None and self.difference > 2 * self.error

    @property
    def below(self) -> bool:
        return self.error is not None and self.difference < -2 * self.error


def compared(findings: Sequence[Finding], variant: Variant) -> list[Comparison]:
    """Each setting's comparison of a mode, or of the best of them, with the best control.

    The best mode is chosen by validation accuracy, the best control by test accuracy, in each seed.
    """
    found: list[Comparison] = []
    for setting, group in _by_setting(findings).items():
        ours = [f.ours(f.best if variant == "best" else variant).test_accuracy for f in group]
        controls = [
            max(((row.name, row.test_accuracy) for row in map(f.row, CONTROLS) if row is not None), key=lambda c: c[1])
            for f in group
        ]
        found.append(Comparison(setting, tuple(ours), tuple(controls)))
    return found


def report(findings: Sequence[Finding], command: str) -> str:
    """All tables in Markdown."""
    sections = [
        _head(findings, command),
        _verdict(findings),
        _differences(findings),
        _due_to_removal(findings),
        _clean(findings),
        _accuracies(findings),
        _removals(findings),
    ]
    return document(sections)


def _head(findings: Sequence[Finding], command: str) -> list[str]:
    with_cleanlab = sum(f.row(CLEANLAB) is not None for f in findings)
    return [
        *head(
            "Is the model better afterwards?",
            command,
            [f.case for f in findings],
            noisy=len(_noisy(findings)),
            machines=[(f.hardware, f.threads) for f in findings],
            note=f"; cleanlab's removal was measured on {with_cleanlab}",
        ),
        f"- posttrain's defaults but for removal.budget = {REMOVAL.budget:g} (not {Removal().budget:g}) and "
        f"removal.max_rounds = {REMOVAL.max_rounds} (not {Removal().max_rounds})",
        f"- refining the network, each round: {REFINE.epochs} epochs of {REFINE.optimizer}, learning rate "
        f"{REFINE.learning_rate:g}, momentum {REFINE.momentum:g}, weight decay {REFINE.weight_decay:g}, batch "
        f"{REFINE.batch_size}, augmentation {REFINE.augment} (digits: crop), {REFINE.schedule} schedule",
        "",
        "Test accuracy in percent, mean ± standard deviation over seeds; the test labels are right. All rows of a case",
        "start from the same trained network. posttrain's modes are its refine.scope: a new head (the boundary), the",
        "whole network, or both (the network, and in the end the boundary as its head, unless the validation accuracy",
        "falls). The rows of the whole network take the same number of gradient steps, round by round with the same",
        "seeds; where posttrain stopped before its first round they take none, and are the network as it came. EMA:",
        f"moving average of weights and batch-norm statistics, decay {DECAY:g} a step. Then the boundary: drawn by all",
        "samples on what `no removal, same steps` gave, it becomes the head by the rule of posttrain, both.",
        *(_SCRATCH if any(f.row(SCRATCH) is not None for f in findings) else []),
        "A number in brackets: so many seeds were measured, fewer than of the other rows.",
    ]


_SCRATCH = (
    "From scratch: as many steps as the case's network took, by the same settings without its early stop, so that",
    "a falling learning rate falls to its end.",
)


def _verdict(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    lines = [
        "## Verdict",
        "",
        "On the settings (data set, noise, network) with wrong labels. The best control is picked by test accuracy in",
        "every seed, which favours the controls; the best of posttrain's modes by validation accuracy, on labels as",
        f"noisy as the rest. Controls: {', '.join(CONTROLS)}.",
        _on_two_errors(noisy),
    ]
    for variant, name in VARIANTS.items():
        found = compared(noisy, variant)
        known = [c for c in found if c.error is not None]
        above, rest = [c for c in known if c.above], [c for c in known if not c.above]
        unknown = f" Of {len(found) - len(known)} settings there is one seed alone." if len(known) < len(found) else ""
        lines += [
            "",
            f"**{name}**: above the best control by more than 2 standard errors on {len(above)} of {len(known)} "
            f"settings, not on {len(rest)}; below it by more than that on {sum(c.below for c in rest)}.{unknown}"
            + (" Not above:" if rest else ""),
            *([""] if rest else []),
            *(f"- {', '.join(c.setting)}: {_difference(c)}{' (below)' if c.below else ''}" for c in rest),
        ]
    return lines


def _on_two_errors(findings: Sequence[Finding]) -> str:
    fewest = min(len(group) for group in _by_setting(findings).values())
    if fewest < 2:
        return "Of one seed there is no standard error, and nothing is called above."
    # of normal differences
    wanted = float(student.ppf(0.975, fewest - 1))
    return f"Of {fewest} seeds, a 95 % interval would ask for {wanted:.1f} standard errors: 2 are weak evidence."


def _differences(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    parts = {variant: compared(noisy, variant) for variant in VARIANTS}
    lines: list[list[str]] = []
    for own in zip(*parts.values(), strict=True):
        best = Counter(name for name, _ in own[-1].controls).most_common()
        lines.append(
            [
                *own[0].setting,
                str(len(own[0].ours)),
                *(f"**{_difference(c)}**" if c.above else _difference(c) for c in own),
                ", ".join(f"{name} {number}" for name, number in best),
            ]
        )
    columns = ["data set", "noise", "network", "seeds", *VARIANTS.values(), "best of all controls (seeds)"]
    return [
        "## posttrain minus the best control",
        "",
        "Points of test accuracy, mean over seeds ± standard error of the paired differences; bold: above by more than",
        "2 standard errors.",
        "",
        *markdown(columns, lines),
    ]


def _due_to_removal(findings: Sequence[Finding]) -> list[str]:
    noisy = _noisy(findings)
    if not noisy:
        return []
    lines: list[list[str]] = []
    for setting, group in _by_setting(noisy).items():
        cells = []
        for mode, without in ABLATIONS.items():
            pairs = [(f.ours(mode), row) for f in group if (row := f.row(without)) is not None]
            cells.append(percent([own.test_accuracy - row.test_accuracy for own, row in pairs], signed=True))
        lines.append([*setting, str(len(group)), *cells])
    columns = ["data set", "noise", "network", "seeds", *(f"{OURS[m]} minus {ABLATIONS[m]}" for m in MODES)]
    return [
        "## What is due to the removal",
        "",
        "Points of test accuracy against the same without removing anything, mean ± standard deviation over seeds.",
        "",
        *markdown(columns, lines),
    ]


def _clean(findings: Sequence[Finding]) -> list[str]:
    clean = [f for f in findings if not f.wrong]
    if not clean:
        return []
    names = (*OURS.values(), NEW_HEAD, CHOSEN, NO_REMOVAL, EMA, THEN_BOUNDARY)
    lines: list[list[str]] = []
    for (dataset, _, network), group in _by_setting(clean).items():
        cells = [percent([row.test_accuracy if (row := f.row(UNTOUCHED)) else None for f in group])]
        cells += [percent([_gain(f, name) for f in group], signed=True) for name in names]
        cells += [percent([1 - f.ours(mode).samples / f.samples for f in group]) for mode in ("head", "network")]
        lines.append([dataset, network, str(len(group)), *cells])
    columns = ["data set", "network", "seeds", UNTOUCHED, *names, "removed, head", "removed, network"]
    return [
        "## Clean data",
        "",
        "The network as it came: test accuracy. Then the difference to it, in points, and the share removed, in",
        "percent: everything that is removed here is wrongly removed.",
        "",
        *markdown(columns, lines),
    ]


def _gain(finding: Finding, name: str) -> float | None:
    row, before = finding.row(name), finding.row(UNTOUCHED)
    return None if row is None or before is None else row.test_accuracy - before.test_accuracy


def _accuracies(findings: Sequence[Finding]) -> list[str]:
    parts: dict[tuple[str, str], dict[str, list[Finding]]] = {}
    for (dataset, noise, network), group in _by_setting(findings).items():
        parts.setdefault((dataset, network), {})[noise] = group
    lines = ["## Test accuracy"]
    for (dataset, network), by_noise in parts.items():
        seeds = " or ".join(map(str, sorted({len(group) for group in by_noise.values()})))
        lines += ["", f"### {dataset}, {network} (seeds: {seeds})", ""]
        lines += markdown(["", *by_noise], _accuracy_rows(list(by_noise.values())))
    return lines


def _accuracy_rows(groups: Sequence[Sequence[Finding]]) -> list[list[str]]:
    """A cell for each group, of the rows that any of them has."""
    found: list[list[str]] = []
    for name in ROWS:
        cells = [
            _by_seed([(f.case.seed, row.test_accuracy if (row := f.row(name)) else None) for f in g]) for g in groups
        ]
        found += [[name, *cells]] if any(cells) else []
    return found


def _removals(findings: Sequence[Finding]) -> list[str]:
    lines: list[list[str]] = []
    # both removes what the network does
    modes: dict[Mode, Mode] = {"head": "head", "network": "both"}
    for setting, group in _by_setting(findings).items():
        for mode, last in modes.items():
            own = [(f, f.ours(mode)) for f in group]
            cleanings = [f.cleanings[mode] for f in group]
            first = [c.estimates[0] for c in cleanings]
            low, high = (100 * statistics.mean(ends) for ends in ([e.low for e in first], [e.high for e in first]))
            reasons = Counter(_shortened(c.reason) for c in cleanings).most_common()
            lines.append(
                [
                    *setting,
                    mode,
                    percent([f.wrong / f.samples for f in group]),
                    f"{percent([e.rate for e in first])} ({low:.1f} to {high:.1f})",
                    percent([c.estimates[-1].rate for c in cleanings]),
                    ", ".join(str(len(c.removed)) for c in cleanings),
                    percent([1 - row.samples / f.samples for f, row in own]),
                    percent([precision(f, row) for f, row in own if f.wrong]),
                    percent([recall(f, row) for f, row in own]),
                    ", ".join(f"{reason} {number}" for reason, number in reasons),
                    str(sum(f.cleanings[last].new_boundary for f in group)),
                ]
            )
    columns = ["data set", "noise", "network", "mode", "wrong labels", "estimate, first round (95 % interval)"]
    columns += ["estimate, last", "rounds by seed", "removed", "precision", "recall", "stopped by (seeds)"]
    columns += ["boundary as the head in the end (seeds)"]
    return [
        "## What posttrain removed",
        "",
        "Percent. The estimates are of the share of wrong labels among the validation samples, which stay as they are;",
        "the interval's ends are means over seeds. Stopped by: no sign of wrong labels; the estimate, once as many are",
        f"out as labels are estimated to be wrong; nothing left that looks wrong; rounds, after {REMOVAL.max_rounds};",
        "the validation accuracy, once it falls; floors of the classes. The boundary becomes the head in the end:",
        "where nothing was removed, of head and both if it is clearly better; else of both where the validation",
        "accuracy does not fall.",
        "",
        *markdown(columns, lines),
    ]


def _shortened(reason: str) -> str:
    words = {
        "max_rounds": "rounds",
        "nothing is removed": "no sign",
        # as it is called in stored findings
        "no sample goes": "no sign",
        "were removed or relabelled": "the estimate",
        "no longer looks wrong": "nothing left",
        "class floors": "floors",
        "validation accuracy": "validation",
    }
    return next((short for phrase, short in words.items() if phrase in reason), reason)


def _difference(comparison: Comparison) -> str:
    error = "" if comparison.error is None else f" ± {100 * comparison.error:.1f}"
    return f"{100 * comparison.difference:+.1f}{error}"


def _by_setting(findings: Iterable[Finding]) -> dict[Setting, list[Finding]]:
    """In the order of the benchmark's lists, seeds ascending."""
    by_seed = sorted(findings, key=lambda f: f.case.seed)
    found = grouped(by_seed, "dataset", "network", "noise")
    return {(dataset, noise, network): group for (dataset, network, noise), group in found.items()}


def _noisy(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.wrong]


def _by_seed(values: Sequence[tuple[int, float | None]]) -> str:
    """`percent` of each seed's mean; in brackets the number of values, where some are not known."""
    known: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None:
            known.setdefault(seed, []).append(value)
    text = percent([statistics.mean(own) for own in known.values()])
    number = sum(map(len, known.values()))
    return text + (f" ({number})" if number and number < len(values) else "")
