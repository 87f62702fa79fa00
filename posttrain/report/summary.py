"""The table at the end of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.report.visible import visible

_WIDEST = 10_000
"""Columns of a table that is not to be broken."""


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the result of a run; figures that are not known are left out."""
    table = Table(
        title=Text(visible(f"posttrain  {summary['run']}")), title_justify="left", show_header=False, box=None
    )
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    selected = "removed or relabelled" if summary["relabelled"] else "removed"
    rows: list[tuple[str, str | None, str]] = [
        ("rounds", f"{summary['rounds']}", ""),
        ("live", f"{summary['live']:,}", "samples kept: the clean data set"),
        ("removed", f"{summary['removed']:,}", _share(summary)),
        ("relabelled", f"{summary['relabelled']:,}" if summary["relabelled"] else None, "kept, with another label"),
        ("quarantined", f"{summary['quarantined']:,}", "unusable; see quarantine.parquet"),
        ("leakage", *_leakage(summary)),
        (
            "validation accuracy",
            _change(summary["validation_accuracy_before"], summary["validation_accuracy_after"]),
            "on the given labels: wrong ones among them lower it",
        ),
        ("test accuracy", _change(summary["test_accuracy_before"], summary["test_accuracy_after"]), "before and after"),
        *_controls(summary),
        *_alternatives(summary),
        ("removal precision", _percent(summary["removal_precision"]), f"share of the {selected} whose label was wrong"),
        ("removal recall", _percent(summary["removal_recall"]), f"share of the wrong labels that were {selected}"),
        ("relabel accuracy", _percent(summary["relabel_accuracy"]), "share of the relabelled whose label is right now"),
        ("wrong labels", *_noise(summary)),
        ("decision boundary", *_boundary(summary)),
        ("seconds", f"{summary['seconds']:.1f}", _longest(summary["steps"])),
    ]
    for name, value, remark in rows:
        if value is not None:
            table.add_row(name, value, Text(visible(remark)))
    if console.is_terminal:
        console.print(table)
    else:
        # a pipe or a log file has no width of its own: rich would take 80 columns, break the remarks and pad the lines
        text = io.StringIO()
        Console(file=text, width=_WIDEST).print(table)
        for line in text.getvalue().splitlines():
            console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
    console.print(visible(f"  ended because {summary['ended']}"), markup=False, highlight=False, soft_wrap=True)
    print_undelivered(console, summary)
    width = max(map(len, summary["files"]), default=0)
    for name, what in summary["files"].items():
        console.print(visible(f"  {name:<{width}}  {what}"), markup=False, highlight=False, soft_wrap=True)


def print_undelivered(console: Console, summary: Mapping[str, Any]) -> None:
    """Print a line about what MLflow has not accepted, if there is any."""
    if left := summary["undelivered"]:
        console.print(
            f"  MLflow at {left['server']} has not accepted {left['messages']} messages ({left['why']}); they are kept "
            "in the run folder's outbox/: start the same command again to deliver them",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _leakage(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    found = summary["leakage"]
    if not found:
        return None, ""
    each = ", ".join(f"{name} {of['samples']:,} ({of['identical']:,} identical)" for name, of in found.items())
    return (
        f"{sum(of['samples'] for of in found.values()):,}",
        f"validation or test images that are also in the training set: {each}",
    )


_BOUNDARY = "the boundary on what is left"
"""The alternative that differs from the control in nothing but the removal, as long as the base stays."""


def _controls(summary: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """The same change of test accuracy with nothing removed: what the removal has to be compared with."""
    before, after = summary["test_accuracy_before"], summary["test_accuracy_after"]
    boundary, head = summary["test_accuracy_boundary"], summary["test_accuracy_refit"]
    if after is None or boundary is None:
        return []
    # what is delivered may be a network that was trained: the removal itself shows where all else is the same
    removed = next((one["test_accuracy"] for one in _offered(summary) if one["name"] == _BOUNDARY), after)
    gain = f"{100 * (removed - boundary):+.1f} points"
    if summary.get("bases"):
        gain = f"control: the boundary of round 0, all samples kept; removal and training again together: {gain}"
    else:
        gain = f"control: same boundary, all samples kept; the removal itself: {gain}"
    return [
        ("  nothing removed", _change(before, boundary), gain),
        ("  new head alone", _change(before, head), "control: a new head on the same features, all samples kept"),
    ]


def _offered(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    # runs that finished before there were any have none
    return summary.get("alternatives", [])


def _alternatives(summary: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """What could have been delivered, by the corrected loss on the validation labels, which decides."""
    rows: list[tuple[str, str | None, str]] = []
    for one in _offered(summary):
        test = one.get("test_accuracy")
        remark = ("delivered; " if one["delivered"] else "") + f"{one['seconds']:.0f} s"
        remark += f", test {100 * test:.1f} %" if test is not None else ""
        rows.append((f"  {one['name']}", f"{one['validation_corrected_loss']:.3f}", remark))
    if not rows:
        return []
    return [
        ("validation loss", "", "corrected for label noise; the lowest is delivered"),
        *rows,
    ]


def _noise(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    noise = summary["noise"]
    if noise is None:
        return None, ""
    if not noise.get("known", True):
        return "not known", "these labels allow no estimate"
    if not noise["found"]:
        return "no sign", f"at most {100 * noise['high']:.0f} % among the most confident predictions"
    return (
        f"{100 * noise['rate']:.0f} %",
        f"estimated: between {100 * noise['low']:.0f} and {100 * noise['high']:.0f} %",
    )


def _boundary(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    boundary = summary["boundary"]
    if boundary is None:
        return None, ""
    members = boundary["members"]
    tried = len({row["layer"] for row in boundary["tried"]})
    named = ", ".join(f"{member['layer']} ({member['l2']:g})" for member in members)
    of_rounds = "of the rounds; " if _offered(summary) else ""
    return f"{len(members)} of {tried} layers", f"{of_rounds}layer (L2 penalty): {named}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _change(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{100 * before:.1f} % -> {100 * after:.1f} %"


def _share(summary: Mapping[str, Any]) -> str:
    total = summary["live"] + summary["removed"]
    return f"{100 * summary['removed'] / total:.1f} % of {total:,}" if total else ""


def _longest(steps: Mapping[str, float]) -> str:
    longest = sorted(steps.items(), key=lambda item: -item[1])[:4]
    return "longest steps: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
