"""Commit: make a round last, then tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain.cluster import measuring
from posttrain.cluster.network import Network
from posttrain.live import Live, Removal
from posttrain.report.figures import ScoreHistogram
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.networks import network_of_round, write_checkpoint
from posttrain.runs.select import Choice
from posttrain.schema import Round
from posttrain.store.scores import delete_score_shards


def commit(run: Run, state: State[Network, Any], selected: Choice, done: Round) -> Round:
    """The round with its timings, on the disk; `state` has its live samples and its model."""
    with run.progress.step("commit"):
        write_checkpoint(run, done.number, state.model)
        found = {"acted_on_self_confidence": selected.self_confidence, **_measured(run, state.live)}
        done = replace(done, metrics={**done.metrics, **found})
    done = replace(done, seconds=run.progress.seconds_of_round())
    run.ledger.commit(done)
    delete_score_shards(run.folder, done.number)
    # the next round's features are those of the new backbone: the old ones are not asked for again
    run.folder.keep_only_features(network_of_round(run, state).backbone)
    tell_round(run, done, selected.histogram)
    run.progress.say(round_sentence(done))
    return done


def commit_without_removal(
    run: Run, number: int, live: Live, model: Network, metrics: Mapping[str, float], *, ended: str = "", said: str = ""
) -> Round:
    """A round that changed no more than the model, on the disk; `said` begins the line on it."""
    write_checkpoint(run, number, model)
    done = Round(number, live.count, 0, 0, 0, dict(metrics), run.progress.seconds_of_round(), ended)
    run.ledger.commit(done)
    tell_round(run, done)
    run.progress.say(f"{said}{round_sentence(done)}")
    return done


def _measured(run: Run, live: Live) -> dict[str, float]:
    """How what all runs removed or relabelled compares with labels known to be right, where there are such."""
    from posttrain.data.normalise import true_labels_are_known

    if not true_labels_are_known(run.inputs.sources, run.inputs.noise):
        return {}
    run.workers.make_room()
    found = measuring.detection(run.splits["train"], acted_on_so_far(live))
    metrics = {
        "removal_precision": found.precision,
        "removal_recall": found.recall,
        "relabel_accuracy": found.relabel_accuracy,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def acted_on_so_far(live: Live) -> Removal:
    """What was removed and relabelled by this run and previous ones of the same job."""
    return Removal(live.removed | live.previously_removed, live.relabelled)


def tell_round(run: Run, done: Round, histogram: ScoreHistogram | None = None) -> None:
    """Tell of the round; one that MLflow has already stays there as it is."""
    if run.tracking is None:
        return
    if callable(run.tracking):
        run.tracking(done)
        return
    settings = run.config.removal
    names = ("removed.parquet", "relabelled.parquet", "probes.json", "round.json")
    artifacts = []
    if run.folder.is_local:
        there = run.folder.local / "rounds" / f"{done.number:04d}"
        # a selection that came to nothing may lie there, too
        counted = {"removed.parquet": done.removed, "relabelled.parquet": done.relabelled}
        artifacts = [there / name for name in names if counted.get(name, 1) and (there / name).exists()]
    run.tracking.log_round(
        done.number,
        params={"score": settings.score, "budget": settings.budget, "scope": run.config.refine.scope},
        metrics=done.figures,
        figures={} if histogram is None else {"scores.png": histogram.png()},
        artifacts=artifacts,
    )


def counts_sentence(number: int, figures: Mapping[str, Any]) -> str:
    """A line on a round's counts and validation accuracy, which are among its `Round.figures`."""
    parts = [f"round {number}: live {figures['live']:,}"]
    if figures["candidates"]:
        relabelled = f" and relabelled {figures['relabelled']:,}" if figures["relabelled"] else ""
        parts.append(f"removed {figures['removed']:,}{relabelled} of {figures['candidates']:,} candidates")
    parts.append(f"validation accuracy {100 * figures['validation_accuracy']:.1f} %")
    return ", ".join(parts)


def round_sentence(done: Round) -> str:
    """A line on a round."""
    parts = [counts_sentence(done.number, done.figures)]
    if "test_accuracy" in done.metrics:
        parts.append(f"test accuracy {100 * done.metrics['test_accuracy']:.1f} %")
    return ", ".join(parts)
