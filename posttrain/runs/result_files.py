"""The files that a run leaves behind: model, tables, the cleaned data set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from posttrain.cluster.network import Network
from posttrain.cluster.writing import write_cleaned
from posttrain.config import yaml
from posttrain.errors import StepError
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.networks import recipe
from posttrain.store import results


def write_results(run: Run, state: State[Network, Any], scored: int) -> dict[str, str]:
    """Write model, tables and cleaned data set; the path of each by what it is. `scored`: the last scored round."""
    folder, classes = run.folder, run.inputs.classes
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
    check_counts(run.splits["train"].rows, kept, removed, quarantined(state.live), previously)
    files |= {
        "what was removed": folder.path("removed.parquet"),
        "issues": folder.path("issues.csv"),
        "refined weights": folder.path("model.safetensors"),
        "how to build the model": folder.path("model.yaml"),
    }
    return {**files, "what was relabelled": folder.path("relabelled.parquet")} if relabelled else files


def quarantined(live: Live) -> int:
    """Quarantined samples; those that a previous run had removed count as removed."""
    return len(live.quarantined - live.previously_removed)


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
        "background": list(spec.image.background),
    }
    text = "# Written by posttrain: this section of a run file takes the refined model.\n"
    run.folder.write_bytes(run.folder.path("model.yaml"), (text + yaml.dump({"model": section})).encode())


def check_counts(samples: int, kept: int, removed: int, quarantined: int, previously_removed: int = 0) -> None:
    """Every input sample is in exactly one of kept, removed (by this run or a previous one of its job), quarantined."""
    if kept + removed + quarantined + previously_removed != samples:
        previous = f" + {previously_removed} removed by previous runs" if previously_removed else ""
        raise StepError(
            f"the counts do not add up: {kept} kept + {removed} removed{previous} + {quarantined} quarantined is not "
            f"{samples}; the run folder is left as it is, please report this with its rounds/*/round.json"
        )
