"""Finish: write what a run leaves behind, and its summary last."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import yaml

from posttrain.cluster.workers import Network
from posttrain.cluster.writing import write_cleaned
from posttrain.config import without_credentials
from posttrain.errors import StepError
from posttrain.rounds import Outcome
from posttrain.runs.context import Run
from posttrain.runs.fit import Fitted, chosen_in
from posttrain.runs.networks import recipe
from posttrain.runs.noise_report import noise_summary
from posttrain.runs.tracking import log_model
from posttrain.store import results
from posttrain.store.outbox import Outbox
from posttrain.store.scores import forget_scores
from posttrain.store.tracking import Tracking


def finish(run: Run, outcome: Outcome[Network, Fitted], began: float) -> dict[str, Any]:
    """Write what the run leaves behind; return its summary, which is written last."""
    folder, state = run.folder, outcome.state
    # the latest scores; a round that removed nothing has some, one that only changed the head has none
    scored = next((n for n in range(state.number + 1, 0, -1) if folder.exists(folder.round(n, "scores.parquet"))), 0)
    if not scored:
        raise StepError("no round has scored the samples: removal.max_rounds has to be at least 1")
    files = _write_results(run, outcome, scored)
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
    # those of the last look, which was no round
    forget_scores(folder, scored)
    folder.clear_half_written()
    if isinstance(tracking, Outbox):
        # before the summary: a run that has one is finished, and nobody goes on with it
        tracking.finish()
    run.ledger.finish(summary)
    return summary


def _write_results(run: Run, outcome: Outcome[Network, Fitted], scored: int) -> dict[str, str]:
    """Write model, tables and cleaned data set; the path of each by what it is. `scored`: the last scored round."""
    folder, state, classes = run.folder, outcome.state, run.inputs.classes
    numbers = [done.number for done in state.history if done.removed or done.relabelled]
    last_scores = folder.round(scored, "scores.parquet")
    with run.progress.step("results") as tell:
        folder.write_bytes(folder.path("model.safetensors"), state.model.weights)
        _write_model(run, state.model)
        removed = results.write_acted_on(folder, "removed", numbers or [scored], classes)
        relabelled = any(done.relabelled for done in state.history)
        if relabelled:
            results.write_acted_on(folder, "relabelled", numbers, classes)
        # what previous runs relabelled is no issue of this one
        by_this_run = replace(state.live, relabelled=run.ledger.removal(state.history).relabelled)
        results.write_issues(folder, numbers, last_scores, by_this_run, classes)
        kept = state.live.count
        files: dict[str, str] = {}
        if run.config.results.cleaned in ("both", "parquet"):
            run.workers.make_room()
            data = run.config.data
            kept = write_cleaned(
                run.splits["train"],
                state.live,
                folder,
                columns=(data.id, data.image, data.label),
                classes=classes,
                progress=tell,
            )
            files["clean data set"] = folder.path("cleaned")
        if run.config.results.cleaned in ("both", "manifest"):
            kept = results.write_manifest(folder, last_scores, state.live)
            files["its ids"] = folder.path("manifest.parquet")
    previously = len(state.live.previously_removed)
    check_counts(run.splits["train"].rows, kept, removed, _quarantined(outcome), previously)
    files |= {
        "what was removed": folder.path("removed.parquet"),
        "issues": folder.path("issues.csv"),
        "refined weights": folder.path("model.safetensors"),
        "how to build the model": folder.path("model.yaml"),
    }
    return {**files, "what was relabelled": folder.path("relabelled.parquet")} if relabelled else files


def _quarantined(outcome: Outcome[Network, Fitted]) -> int:
    """Quarantined samples; those that a previous run had removed count as removed."""
    live = outcome.state.live
    return len(live.quarantined - live.previously_removed)


def _summary(run: Run, outcome: Outcome[Network, Fitted]) -> dict[str, Any]:
    state, look = outcome.state, outcome.last_look
    first, last = state.history[0].metrics, state.history[-1].metrics
    choices = [look.probe.choice] if look else chosen_in(run, state.history)[-1:]
    return {
        "run": without_credentials(run.config.run.path),
        "rounds": state.number,
        "ended": outcome.reason,
        "live": state.live.count,
        "removed": sum(done.removed for done in state.history),
        "relabelled": sum(done.relabelled for done in state.history),
        "quarantined": _quarantined(outcome),
        "leakage": run.leaks.counts(),
        "noise": noise_summary([*(done.metrics for done in state.history), *([look.metrics] if look else [])]),
        "boundary": choices[0].as_record() if choices else None,
        **{
            f"{split}_accuracy_{when}": metrics.get(f"{split}_accuracy")
            for split in ("validation", "test")
            for when, metrics in (("before", first), ("after", last))
        },
        "test_accuracy_refit": first.get("refit_test_accuracy"),
        "test_accuracy_boundary": first.get("boundary_test_accuracy"),
        **{name: last.get(name) for name in ("removal_precision", "removal_recall", "relabel_accuracy")},
    }


def _write_model(run: Run, model: Network) -> None:
    """`model.yaml`: the section `model` of a run file that takes the refined model."""
    spec = model.spec
    section = {
        **recipe(spec),
        "weights": run.folder.path("model.safetensors"),
        "channels": spec.image.channels,
        "image_size": list(spec.image.size),
        "mean": list(spec.image.mean),
        "std": list(spec.image.std),
    }
    text = "# Written by posttrain: this section of a run file takes the refined model.\n"
    run.folder.write_bytes(
        run.folder.path("model.yaml"), (text + yaml.safe_dump({"model": section}, sort_keys=False)).encode()
    )


def check_counts(samples: int, kept: int, removed: int, quarantined: int, previously_removed: int = 0) -> None:
    """Every input sample is in exactly one of kept, removed (by this run or a previous one of its job), quarantined."""
    if kept + removed + quarantined + previously_removed != samples:
        previous = f" + {previously_removed} removed by previous runs" if previously_removed else ""
        raise StepError(
            f"the counts do not add up: {kept} kept + {removed} removed{previous} + {quarantined} quarantined is not "
            f"{samples}; the run folder is left as it is, please report this with its rounds/*/round.json"
        )


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
    tracking.log_metrics({"rounds": outcome.state.number, **leaks}, step=outcome.state.number)
    return (
        f"mlflow ui --backend-store-uri {tracking.uri}"
        if tracking.uri.startswith("sqlite:")
        else without_credentials(tracking.uri)
    )
