"""`posttrain tune`: many recipes of cleaning the same data with the same model; the best one as a run file.

Read from top to bottom: draw the recipes, read the data, embed them once for all, let the trials run, choose. A trial
(`posttrain.search.trial`) is `posttrain clean` up to its results, in a run folder of its own and without the test set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue
from rich.console import Console

from posttrain.config import RunFile, Search, Tracking, dump, without_credentials, without_marks, without_secrets, yaml
from posttrain.errors import StepError
from posttrain.report.progress import StepLog
from posttrain.report.search import print_search
from posttrain.runs.clean import claim, crew, finished_already, first_model, join_ray, open_outbox, read, tell_remarks
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.cluster.workers import Network
    from posttrain.runs.inputs import Inputs
    from posttrain.runs.steps import CleaningRun
    from posttrain.schema import Round
    from posttrain.search.trial import Trial
    from posttrain.store.outbox import Outbox


def tune(config: RunFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The summary of the search in `run.path`, begun, gone on with, or finished already.

    Progress goes to standard error; the table of trials to standard output unless `quiet`. Raises PosttrainError.
    """
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    ledger = Ledger(RunFolder(config.run.path), "search")
    summary = finished_already(ledger, config, progress)
    if summary is None:
        with ExitStack() as stack:
            summary, outbox = _searched(config, ledger, progress, stack, began, verbose=verbose)
        summary["undelivered"] = outbox.undelivered()
    if not quiet:
        print_search(Console(), summary)
    return summary


def _searched(
    config: RunFile, ledger: Ledger, progress: StepLog, stack: ExitStack, began: float, *, verbose: bool
) -> tuple[dict[str, Any], Outbox]:
    """The summary, and what MLflow is told through."""
    folder, search = ledger.folder, config.search
    held = stack.enter_context(lock.run_lock(folder))
    with progress.step("check the inputs"):
        from posttrain.runs.inputs import prepare

        inputs = prepare(config)
        values = _values(config, folder)
        trials = _trials(config, inputs, values)
    tell_remarks(inputs, progress)
    address = join_ray(config, progress, stack, verbose=verbose)
    import torch

    from posttrain.cluster import tuning
    from posttrain.runs import leakage
    from posttrain.runs.steps import CleaningRun
    from posttrain.search import trial as trials_of

    workers, train_workers = crew(config, on_cluster=address is not None)
    cpus, gpus = config.ray.cpus_per_worker, workers.gpus_per_worker
    tuning.refuse_too_small(cpus, gpus, on_cluster=address is not None, say=progress.say, stack=stack)
    splits, fingerprint = read(config, inputs, progress)
    leaks = leakage.find(config, splits, inputs.spec.image.shape, fingerprint, ledger, progress)
    claim(ledger, config, fingerprint)
    # from here on there is no test set to look at
    splits.pop("test", None)
    seen = {name: digest for name, digest in fingerprint.items() if name != "test"}
    if not train_workers:
        workers.start()
    with progress.step("open MLflow"):
        told = _Telling(stack.enter_context(open_outbox(config, inputs, folder, fingerprint, progress)))

    def driver() -> CleaningRun:
        run = CleaningRun(config, inputs, splits, folder, workers, train_workers, None, progress)
        run.leave_out(leaks)
        return run

    first = first_model(driver())
    trials = embedded_once(trials, first, driver)
    workers.release()
    folder.write_json(folder.path("trials.json"), values)
    ended = [trial for trial in trials if trial.ended()]
    if any(trial.ledger.rounds() for trial in trials):
        progress.say(f"{config.run.path}: going on; {len(ended)} of {len(trials)} trials are at their end already")
    for trial in trials:
        told.catch_up(trial)

    def on_report(number: int, figures: Mapping[str, Any]) -> None:
        if not figures[tuning.FINAL]:
            progress.say(_line(number, figures, search.metric))
        told.catch_up(trials[number])

    def on_end(number: int, *, stopped: bool) -> None:
        trial = trials[number]
        if stopped:
            rounds = trial.ledger.rounds()[-1].number
            trial.end("stopped", f"stopped after round {rounds}: others were better")
        end = trial.ended()
        progress.say(f"trial {number}: {'failed: ' if end and end['how'] == 'failed' else ''}{end and end['why']}")
        told.catch_up(trial)

    threads = torch.get_num_threads()
    with progress.step("search"):
        failed = tuning.search(
            trials_of.work,
            trials_of.Handed(
                trials, splits, seen, leaks, first.weights, cpus, gpus, threads, 1 if train_workers else threads
            ),
            [trial.number for trial in trials if trial not in ended],
            {trial.number: [trials_of.reported(done) for done in trial.ledger.rounds()] for trial in trials},
            tuning.Halving(
                search.metric,
                search.metric == "validation_accuracy",
                search.grace_rounds,
                search.reduction_factor,
                max(trial.config.removal.max_rounds for trial in trials),
                frozenset({0}),
            ),
            cpus=cpus,
            gpus=gpus,
            at_once=search.max_concurrent_trials,
            folder=folder,
            on_report=on_report,
            on_end=on_end,
            verbose=verbose,
        )
    if failed:
        number, error = next(iter(failed.items()))
        raise StepError(f"trial {number} failed ({error}); start the same command again to go on")
    held.assert_held()
    return _finish(config, ledger, trials, values, first, fingerprint, told, progress, began), told.search


# -- the recipes ---------------------------------------------------------------------------------------


def _values(config: RunFile, folder: RunFolder) -> list[dict[str, JsonValue]]:
    """By trial, the values of the keys that it varies."""
    path = folder.path("trials.json")
    if folder.exists(path):
        return folder.read_json(path)
    from posttrain.cluster import tuning

    return tuning.draw(config.search.space, config.search.trials, config.run.seed)


def _trials(config: RunFile, inputs: Inputs, values: Sequence[Mapping[str, JsonValue]]) -> list[Trial]:
    from posttrain.cluster.reading import FolderSource
    from posttrain.runs.inputs import for_recipe
    from posttrain.search.trial import Trial

    folder = RunFolder(config.run.path)
    # without the data, and without true labels to measure by: no trial may know of them
    blind = replace(inputs, sources={"train": FolderSource("")}, noise=None, weights=None)
    trials = []
    for number, own in enumerate(values):
        run = config.run.model_copy(update={"path": folder.absolute.beneath("trials", f"{number:04d}").location})
        # credentials of the tracking server stay here
        apart = {"run": run, "tracking": Tracking(), "search": Search()}
        recipe = config.with_values(own).model_copy(update=apart)
        trials.append(Trial(number, recipe, for_recipe(blind, recipe)))
    return trials


def embedded_once(trials: Sequence[Trial], first: Network, driver: Callable[[], CleaningRun]) -> list[Trial]:
    """The trials with the features of the untouched backbone, which lie in the search's folder.

    One pass over the images keeps every layer that any recipe tries. Only another `probe.max_features` makes
    other features.
    """
    stores = {}
    for width in dict.fromkeys(trial.inputs.spec.width for trial in trials):
        specs = [trial.inputs.spec for trial in trials if trial.inputs.spec.width == width]
        head = specs[0].head
        layers = dict.fromkeys(layer for spec in specs for layer in spec.layers if layer != head)
        spec = replace(specs[0], layers=(*layers, head))
        # a run of its own: what cannot be read is quarantined in every store
        run = driver()
        backbone = run.embedded(run.network(first.weights, spec), ("train", "validation"))
        stores[width] = (spec, run.folder.path("features", backbone))
    placed = []
    for trial in trials:
        spec, features = stores[trial.inputs.spec.width]
        placed.append(replace(trial, inputs=replace(trial.inputs, spec=spec), features=features))
    return placed


# -- telling of them -----------------------------------------------------------------------------------


class _Telling:
    """MLflow's picture of the search: a run per trial beneath the search's own, the rounds beneath these."""

    def __init__(self, search: Outbox) -> None:
        self.search = search
        self._trials: dict[int, Outbox] = {}
        self._rounds: dict[int, int] = {}
        self._ended: set[int] = set()

    def catch_up(self, trial: Trial) -> None:
        """Tell of all that the trial's folder holds and MLflow does not know yet."""
        from posttrain.runs.steps import figures_of

        history, number, config = trial.ledger.rounds(), trial.number, trial.config
        end = trial.ended()
        if not history and not end:
            return
        if number not in self._trials:
            varied = {name: dict(getattr(config, name)) for name in ("probe", "removal", "refine")}
            self._trials[number] = self.search.nested(
                f"trial {number:04d}", params=varied, tags={"posttrain.trial": str(number)}
            )
        told = self._trials[number]
        for done in history[self._rounds.get(number, 0) :]:
            told.log_round(done.number, params={}, metrics=figures_of(done), figures={}, artifacts=[])
        self._rounds[number] = len(history)
        if end and number not in self._ended:
            self._ended.add(number)
            told.log_tags({"posttrain.ended": f"{end['how']}: {end['why']}"})
            told.finish("FAILED" if end["how"] == "failed" else "FINISHED")


def _line(number: int, figures: Mapping[str, Any], metric: str) -> str:
    parts = [f"trial {number}, round {figures['round']}: live {figures['live']:,}"]
    if figures["round"]:
        relabelled = f" and relabelled {figures['relabelled']:,}" if figures["relabelled"] else ""
        parts.append(f"removed {figures['removed']:,}{relabelled} of {figures['candidates']:,} candidates")
    parts.append(f"validation accuracy {100 * figures['validation_accuracy']:.1f} %")
    if metric == "validation_loss":
        parts.append(f"validation loss {figures['validation_loss']:.4f}")
    return ", ".join(parts)


# -- the end -------------------------------------------------------------------------------------------


def _finish(
    config: RunFile,
    ledger: Ledger,
    trials: Sequence[Trial],
    values: Sequence[Mapping[str, JsonValue]],
    first: Network,
    fingerprint: dict[str, str],
    told: _Telling,
    progress: StepLog,
    began: float,
) -> dict[str, Any]:
    """Write the best recipe as a run file; return the search's summary, which is written last."""
    for trial in trials:
        told.catch_up(trial)
    ends = [trial.ended() or {} for trial in trials]
    histories = [trial.ledger.rounds() for trial in trials]
    finished = [number for number, end in enumerate(ends) if end["how"] == "finished"]
    if not finished:
        raise StepError(f"no trial ran to its end; trial 0: {ends[0]['why']}")
    metric = config.search.metric
    best = min(finished, key=lambda number: (*_rank(histories[number], metric), number))
    path = _write_best(config, trials[best], values[best], ledger.folder, first, fingerprint)
    varied = list(config.search.space)
    files = {"best run file": path, "trials": ledger.folder.path("trials")}
    last = histories[best][-1].metrics
    told.search.log_metrics({"best_trial": best, **{name: last[name] for name in sorted(_METRICS)}})
    if ledger.folder.is_local:
        told.search.log_artifact(ledger.folder.local / "best.yaml")
    summary = {
        "search": without_credentials(config.run.path),
        "metric": metric,
        "best": best,
        "trials": [
            {
                "number": trial.number,
                "values": {key: _value(trial.config, key) for key in varied},
                "rounds": history[-1].number if history else 0,
                "live": history[-1].live if history else None,
                "removed": sum(done.removed for done in history),
                "relabelled": sum(done.relabelled for done in history),
                **{name: history[-1].metrics[name] if history else None for name in sorted(_METRICS)},
                "how": end["how"],
                "ended": end["why"],
            }
            for trial, history, end in zip(trials, histories, ends, strict=True)
        ],
        "seconds": round(time.perf_counter() - began, 1),
        "steps": {name: round(seconds, 2) for name, seconds in progress.seconds.items()},
        "files": files,
    }
    told.search.finish()
    ledger.finish(summary)
    return summary


_METRICS = {"validation_accuracy", "validation_loss"}


def _rank(history: Sequence[Round], metric: str) -> tuple[float, float, int]:
    """Lower is better: by the metric after the last round, by the loss, by how many samples were dealt with."""
    last = history[-1].metrics
    first = -last[metric] if metric == "validation_accuracy" else last[metric]
    return first, last["validation_loss"], sum(done.removed + done.relabelled for done in history)


def _value(config: RunFile, key: str) -> JsonValue:
    section, _, name = key.partition(".")
    return config.model_dump(mode="json")[section][name]


def _write_best(
    config: RunFile,
    trial: Trial,
    values: Mapping[str, JsonValue],
    folder: RunFolder,
    first: Network,
    fingerprint: dict[str, str],
) -> str:
    """`best.yaml`: the run file with the trial's values, which `posttrain clean` takes as it is; its path."""
    run_path = folder.absolute.beneath("best").location
    recipe = config.with_values(values)
    rays = recipe.ray
    if recipe.refine.scope != "head" and (rays.train_workers or 0) > 1:
        # as in the trial: several would share out the batches in another way
        rays = rays.model_copy(update={"train_workers": 1})
    recipe = recipe.model_copy(
        update={"run": config.run.model_copy(update={"path": run_path}), "search": Search(), "ray": rays}
    )
    search = without_credentials(config.run.path)
    said = f"# Written by posttrain tune: the best recipe of {search}, trial {trial.number}.\n"
    record = yaml.load(dump(recipe), where="the recipe")
    del record["search"]
    if without_secrets(record) != record:
        record = without_marks(without_secrets(record))
        said += "# Users, passwords and keys of its URIs are left out: add them, or leave them to the environment\n"
        said += "# (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and the like).\n"
    if config.model.weights is None:
        # trained once for all trials: the run goes on from there
        best = Ledger(RunFolder(run_path))
        if best.started() is None:
            best.start(recipe, fingerprint)
        best.folder.write_bytes(best.folder.path("pretrained", "model.safetensors"), first.weights)
    path = folder.path("best.yaml")
    folder.write_bytes(path, (said + yaml.dump(record)).encode())
    return path
