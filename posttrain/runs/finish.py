"""Finish: write what a run leaves behind, and its summary last."""

from __future__ import annotations

import time
from typing import Any

from posttrain import policy
from posttrain.cluster.network import Network
from posttrain.config import without_credentials
from posttrain.errors import StepError
from posttrain.rounds import Outcome
from posttrain.runs.context import Run
from posttrain.runs.fit import Fitted, chosen_in
from posttrain.runs.noise_report import noise_summary
from posttrain.runs.result_files import quarantined, write_results
from posttrain.runs.tracking import log_model
from posttrain.store.outbox import Outbox
from posttrain.store.scores import delete_score_shards
from posttrain.store.tracking import Tracking


def finish(run: Run, outcome: Outcome[Network, Fitted], began: float) -> dict[str, Any]:
    """Write what the run leaves behind; return its summary, which is written last."""
    folder, state = run.folder, outcome.state
    # the latest scores; a round that removed nothing has some, one that only changed the head has none
    scored = next((n for n in range(state.number + 1, 0, -1) if folder.exists(folder.round(n, "scores.parquet"))), 0)
    if not scored:
        raise StepError("no round has scored the samples: removal.max_rounds has to be at least 1")
    files = write_results(run, outcome.state, scored)
    tracking = run.tracking
    if isinstance(tracking, Tracking | Outbox):
        with run.progress.step("log the model"):
            files["MLflow"] = _log_results(run, tracking, outcome)
    summary = {
        **_summary(run, outcome),
        "seconds": round(time.perf_counter() - began, 1),
        "steps": {name: round(seconds, 2) for name, seconds in run.progress.seconds.items()},
        "files": files,
    }
    # those of the final scoring, which was no round
    delete_score_shards(folder, scored)
    folder.clear_half_written()
    if isinstance(tracking, Outbox):
        # before the summary: a run that has one is finished, and nobody goes on with it
        tracking.finish()
    run.ledger.finish(summary)
    return summary


def _summary(run: Run, outcome: Outcome[Network, Fitted]) -> dict[str, Any]:
    state, scoring = outcome.state, outcome.final_scoring
    first, last = state.history[0].metrics, state.history[-1].metrics
    choices = [scoring.probe.choice] if scoring else chosen_in(run, state.history)[-1:]
    return {
        "run": without_credentials(run.config.run.path),
        "rounds": policy.rounds_that_acted(state.history),
        "ended": outcome.reason,
        "live": state.live.count,
        "removed": sum(done.removed for done in state.history),
        "relabelled": sum(done.relabelled for done in state.history),
        "quarantined": quarantined(state.live),
        "leakage": run.leaks.counts(),
        "noise": noise_summary([*(done.metrics for done in state.history), *([scoring.metrics] if scoring else [])]),
        "boundary": choices[0].as_record() if choices else None,
        "bases": sum(map(policy.changed_features, state.history)),
        "alternatives": _alternatives(run),
        **{
            f"{split}_accuracy_{when}": metrics.get(f"{split}_accuracy")
            for split in ("validation", "test")
            for when, metrics in (("before", first), ("after", last))
        },
        "test_accuracy_refit": first.get("refit_test_accuracy"),
        "test_accuracy_boundary": first.get("boundary_test_accuracy"),
        **{name: last.get(name) for name in ("removal_precision", "removal_recall", "relabel_accuracy")},
    }


def _alternatives(run: Run) -> list[dict[str, Any]]:
    """What could have been delivered, where `refine.scope` is auto."""
    path = run.folder.path("alternatives.json")
    return run.folder.read_json(path) if run.folder.exists(path) else []


def _log_results(run: Run, tracking: Tracking | Outbox, outcome: Outcome[Network, Fitted]) -> str:
    """Artifacts and the final model in MLflow; where to look at them."""
    if run.folder.is_local:
        for name in (
            "run.yaml",
            "model.yaml",
            "removed.parquet",
            "relabelled.parquet",
            "issues.csv",
            "leakage.parquet",
        ):
            if (run.folder.local / name).exists():
                tracking.log_artifact(run.folder.local / name)
        if run.config.tracking.log_model:
            log_model(tracking, outcome.state.model, run.folder.local / "model.safetensors")
    leaks = {f"leaked_{name}": float(count["samples"]) for name, count in (run.leaks.counts() or {}).items()}
    rounds = policy.rounds_that_acted(outcome.state.history)
    tracking.log_metrics({"rounds": rounds, **leaks}, step=outcome.state.number)
    return (
        f"mlflow ui --backend-store-uri {tracking.uri}"
        if tracking.uri.startswith("sqlite:")
        else without_credentials(tracking.uri)
    )
