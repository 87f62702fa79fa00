"""The table at the end of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.report.summary import print_undelivered
from posttrain.report.visible import visible


def print_search(console: Console, summary: Mapping[str, Any]) -> None:
    """Print every trial with its values and its result; the best one is marked."""
    table = Table(title=Text(visible(f"posttrain tune  {summary['search']}")), title_justify="left", box=None)
    trials = summary["trials"]
    keys = list(trials[0]["values"])
    names = [key.rpartition(".")[2] for key in keys]
    table.add_column("trial", justify="right")
    for key, name in zip(keys, names, strict=True):
        table.add_column(name if names.count(name) == 1 else key, justify="right")
    for name in ("rounds", "removed", summary["metric"].replace("_", " ")):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    for trial in trials:
        best = trial["number"] == summary["best"]
        metric = trial[summary["metric"]]
        table.add_row(
            str(trial["number"]),
            *(Text(visible(_value(trial["values"][key]))) for key in keys),
            str(trial["rounds"]),
            f"{trial['removed']:,}",
            "" if metric is None else _metric(summary["metric"], metric),
            Text(visible(("best; " if best else "") + _briefly(trial))),
            style="bold" if best else None,
        )
    if not console.is_terminal:
        # a pipe or a log file has no width of its own; the 80 columns that rich takes would break the rows
        console.width = max(console.width, 180)
    console.print(table)
    default = next(trial for trial in trials if trial["number"] == 0)[summary["metric"]]
    found = next(trial for trial in trials if trial["number"] == summary["best"])[summary["metric"]]
    compared = "" if default is None else f"; the run file as it is: {_metric(summary['metric'], default)}"
    for line in (
        f"trial {summary['best']} is the best: {summary['metric'].replace('_', ' ')} "
        f"{_metric(summary['metric'], found)}{compared}",
        f"run file of the best {summary['files']['best run file']}",
        f"next                 posttrain clean {summary['files']['best run file']}",
    ):
        console.print(visible(f"  {line}"), markup=False, highlight=False, soft_wrap=True)
    print_undelivered(console, summary)


def _briefly(trial: Mapping[str, Any]) -> str:
    return "failed" if trial["how"] == "failed" else trial["ended"].partition(":")[0]


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4f}"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
