"""What a start of the job says at its end: as JSON, in MLflow, and on the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain.config import without_credentials
from posttrain.jobs.gate import BatchCounts, ClassCounts
from posttrain.jobs.job_folder import State
from posttrain.report.visible import visible

if TYPE_CHECKING:
    from posttrain.jobs.attempt import Attempt

EXIT_CODES = {"promoted": 0, "nothing new": 0, "not promoted": 10, "alarm": 11}

_OF_RECORD = ("measured_on", "embedded", "rounds", "live", "removed", "previously_removed", "relabelled", "quarantined")


def summarise(name: str, outcome: str, reason: str, state: State) -> dict[str, Any]:
    """What `--json` prints of a start without a run; `name` is that of the job."""
    return {
        "job": name,
        "outcome": outcome,
        "exit_code": EXIT_CODES[outcome],
        "reason": reason,
        "champion": state.champion,
        "version": None,
        "run": None,
        "held_back": list(state.held_back),
    }


def summarise_run(
    name: str, record: Mapping[str, Any], state: State, attempt: Attempt, version: str | None
) -> dict[str, Any]:
    """What `--json` prints of a run, by its decision.json; what is not known is null."""
    new_data = BatchCounts(**record["new_data"])
    return {
        **summarise(name, record["verdict"], record["reason"], state),
        "version": version,
        "run": without_credentials(attempt.folder.location),
        "champion_accuracy": _accuracy(record["champion"]),
        "challenger_accuracy": _accuracy(record["challenger"]),
        "new_samples": new_data.samples,
        "suspect_share": new_data.suspect_share,
        **{key: record[key] for key in _OF_RECORD},
    }


def challenger_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The same figures as metrics of the run in MLflow."""
    new_data = BatchCounts(**record["new_data"])
    return {
        "gate_champion_accuracy": _accuracy(record["champion"]),
        "gate_challenger_accuracy": _accuracy(record["challenger"]),
        "gate_new_samples": new_data.samples,
        "gate_suspect_share": new_data.suspect_share,
        **{f"embedded_{split}": c["new"] + c["for_new_weights"] for split, c in record["embedded"].items()},
    }


def _accuracy(counts: Mapping[str, Any] | None) -> float | None:
    return ClassCounts(**counts).accuracy if counts else None


def embedded_sentences(embedded: Mapping[str, Mapping[str, int]]) -> list[str]:
    """How much of each split had to be embedded."""
    lines = []
    for split, count in embedded.items():
        line = f"{split}: embedded {count['new']:,} new of {count['of']:,} images"
        if count["for_new_weights"]:
            line += f", and {count['for_new_weights']:,} for the network's new weights"
        lines.append(line)
    return lines


def print_summary(summary: Mapping[str, Any]) -> None:
    """The summary on standard output."""
    console = Console()

    def say(text: str) -> None:
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    say(f"{summary['job']}: {summary['outcome']}: {summary['reason']}")
    if summary["run"] is None:
        return
    previously = f", {summary['previously_removed']:,} by previous runs" if summary["previously_removed"] else ""
    relabelled = f", relabelled {summary['relabelled']:,}" if summary["relabelled"] else ""
    say(
        f"  live {summary['live']:,}, removed {summary['removed']:,}{previously}{relabelled}, quarantined "
        f"{summary['quarantined']:,}"
    )
    for line in embedded_sentences(summary["embedded"]):
        say(f"  {line}")
    if summary["version"]:
        say(f"  registered as version {summary['version']} of {summary['job']}")
    say(f"  champion: {'version ' + summary['champion'] if summary['champion'] else 'none yet'}")
    if summary["outcome"] == "alarm":
        _say_way_out(summary["held_back"], say)
    say(f"  run: {summary['run']}")


def _say_way_out(held_back: Sequence[str], say: Callable[[str], None]) -> None:
    """What to do after an alarm: one about older samples holds nothing back."""
    if not held_back:
        say("  look at data.validation and the model, or raise gate.alarm_older_share")
        return
    files = "1 training file" if len(held_back) == 1 else f"{len(held_back):,} training files"
    say(f"  held back until changed, or let in by posttrain retrain --accept: {files}")
    for path in held_back[:5]:
        say(f"    {path}")
