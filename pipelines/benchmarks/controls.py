"""Does the removal help, or only the further training? A run beside its controls.

`python -m pipelines.benchmarks.controls RUNFILE --seeds 0 1 2` does, for each seed, from the same first weights:

- `posttrain`: the run file as it is
- `random removal`: as many samples leave in each round, drawn at random, and the same training follows
- `no removal`: nothing leaves; as many training steps on all samples
- `removal by loss`: as many candidates, ranked by the loss

and prints the test accuracy before and after, the average precision of every score in the first round and where the
time went. Everything stays in `--folder`; started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.tables import percent
from posttrain import rounds
from posttrain.cluster import measuring
from posttrain.cluster.partitioning import Split
from posttrain.config import RunFile, load
from posttrain.report.progress import StepLog
from posttrain.runs.begin import begin_or_resume
from posttrain.runs.clean import steps_of as steps_of_round
from posttrain.runs.conclude import conclude
from posttrain.runs.context import Run
from posttrain.runs.embed import embed
from posttrain.runs.evaluate import evaluate
from posttrain.runs.finish import finish
from posttrain.runs.fit import fitted, refitted
from posttrain.runs.open import opened
from posttrain.runs.refine import train, with_boundary_as_head
from posttrain.schema import PARTITION, ROW, Round
from posttrain.store.folder import RunFolder

CONTROLS = {"posttrain": "mislabel_odds", "random removal": "random", "removal by loss": "loss", "no removal": None}


def measured(
    config: RunFile, name: str, first: Path | None, steps: list[int], quota: list[int] | None
) -> dict[str, Any]:
    """One run: accuracies, seconds by step.

    `steps`: training steps of each round, for `no removal`; `quota`: samples to remove in each, for the others.
    """
    path = Path(config.run.path) / "measured.json"
    if path.exists():
        return json.loads(path.read_text())
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    progress.say(f"--- {name}, seed {config.run.seed}")
    with opened(config, progress, verbose=False) as run:
        if first is not None:
            run.folder.write_bytes(run.folder.path("pretrained", "model.safetensors"), first.read_bytes())
        state = begin_or_resume(run)
        if CONTROLS[name] is None:
            found = without_removal(run, state, steps)
        else:
            limits = rounds.Limits.of(config.removal)
            if quota is not None:
                # the controls go as far as the run that they are compared with
                limits = rounds.Limits(max_rounds=len(quota), minimum=0.0, patience=len(quota))
            outcome = rounds.clean(state, steps_of_round(run, quota=quota), limits)
            summary = finish(run, conclude(run, outcome), began)
            found = {key: summary[key] for key in summary if key not in ("files", "run")}
            found["history"] = [[r.live, r.removed, r.metrics] for r in outcome.state.history]
            found["average_precision"] = average_precisions(run.folder, run.splits["train"])
    path.write_text(json.dumps(found, indent=2))
    return found


def average_precisions(folder: RunFolder, split: Split) -> dict[str, float]:
    """Average precision of every score of the first round against the labels known to be right (measuring)."""
    from sklearn.metrics import average_precision_score

    from posttrain.influence.scores import SCORES

    wrong = measuring.wrong_rows(split)
    table: Any = folder.read_table(folder.round(1, "scores.parquet"), [PARTITION, ROW, *SCORES])
    truth = np.array(
        [wrong[b][r] for b, r in zip(table[PARTITION].to_pylist(), table[ROW].to_pylist(), strict=True)], bool
    )
    if not truth.any():
        return {}
    return {name: float(average_precision_score(truth, table[name].to_numpy())) for name in SCORES}


def without_removal(run: Run, state: rounds.State[Any, Any], budget: Sequence[int]) -> dict[str, Any]:
    """As many rounds of training on all samples, each of as many steps."""
    for number, steps in enumerate(budget, start=1):
        if not run.config.refine.keeps_backbone:
            seed = run.config.run.seed + 1000 * number
            model = train(run, state.model, run.config.refining, state.live, name="refine", seed=seed, max_steps=steps)
        else:
            backbone, live = embed(run, state)
            probe = fitted(run, backbone, live, state.history, number, known=state.probe)
            again = refitted(run, probe.choice, probe.ensemble.members, live)
            model = with_boundary_as_head(run, state.base, again)
        done = Round(number, state.live.count, 0, 0, 0, evaluate(run, state, model))
        state = replace(state, history=(*state.history, done), model=model)
    state = conclude(run, rounds.Outcome(state, "as many rounds as with removals")).state
    return {
        "test_accuracy_before": state.history[0].metrics["test_accuracy"],
        "test_accuracy_after": state.history[-1].metrics["test_accuracy"],
        "history": [done.metrics for done in state.history],
    }


def steps_of(config: RunFile, ours: dict[str, Any]) -> list[int]:
    """Training steps of each round of `posttrain`."""
    return [config.refine.epochs * -(-live // config.refine.batch_size) for live, removed, _ in ours["history"][1:]]


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Test accuracy before and after, mean and standard deviation over seeds."""
    lines = ["| | test accuracy before | after | precision | recall |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        cells = [
            spread([run.get(key) for run in runs])
            for key in ("test_accuracy_before", "test_accuracy_after", "removal_precision", "removal_recall")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation in percent; empty where a value is not known."""
    return "" if None in values else percent(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runfile", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/controls"), help="a folder for all runs")
    parser.add_argument("--only", nargs="+", choices=list(CONTROLS), default=list(CONTROLS))
    parser.add_argument(
        "--weights", type=Path, help="first weights for all runs, instead of pre-training for each seed"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTROLS if name in options.only}
    for seed in options.seeds:
        first: Path | None = options.weights
        steps: list[int] = []
        quota: list[int] | None = None
        for name in found:
            folder = options.folder / f"{name.replace(' ', '_')}-{seed}"
            score = CONTROLS[name] or "mislabel_odds"
            config = load(
                options.runfile,
                [*options.overrides, f"run.path={folder}", f"run.seed={seed}", f"removal.score={score}"],
            )
            if config.data.noise is not None:
                config = load(
                    options.runfile,
                    [
                        *options.overrides,
                        f"run.path={folder}",
                        f"run.seed={seed}",
                        f"removal.score={score}",
                        f"data.noise.seed={seed}",
                    ],
                )
            result = measured(config, name, first, steps, quota)
            if name == "posttrain":
                first = folder / "pretrained" / "model.safetensors"
                steps = steps_of(config, result)
                quota = [removed for _, removed, _ in result["history"][1:]]
            found[name].append(result)
    lines = [f"{options.runfile or 'digits'}, seeds {options.seeds}; {hardware()}", "", *table(found), ""]
    ours = found.get("posttrain", [])
    if ours and all(run["average_precision"] for run in ours):
        lines += ["| score | average precision in the first round |", "|---|---|"]
        for score in ours[0]["average_precision"]:
            lines.append(f"| {score} | {spread([run['average_precision'][score] for run in ours])} |")
        lines.append("")
    if ours:
        lines += ["| step | seconds of the whole run |", "|---|---|"]
        names = list(dict.fromkeys(step for run in ours for step in run["steps"]))
        for step in names:
            lines.append(f"| {step} | {statistics.mean(run['steps'].get(step, 0.0) for run in ours):.1f} |")
    print("\n".join(lines))
    options.folder.joinpath("table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
