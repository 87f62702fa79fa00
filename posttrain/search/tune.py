"""`posttrain tune`: many recipes of cleaning the same data with the same model; the best one as a run file.

Reads from top to bottom: sample the recipes, read the data, embed them once for all, run the trials, choose. A trial
(`posttrain.search.trial`) is `posttrain clean` up to its results, in a run folder of its own and without the test set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain.config import RunFile, without_credentials
from posttrain.errors import StepError
from posttrain.report.progress import StepLog
from posttrain.report.search import print_search
from posttrain.runs.open import finished_already, init_folder, join_ray, make_workers, say_remarks
from posttrain.runs.read import read
from posttrain.runs.tracking import open_outbox
from posttrain.search.recipes import make_trials, with_shared_features, write_values
from posttrain.search.result import METRICS, best_of, result_of, write_best
from posttrain.search.tracking import SearchTracking, round_sentence
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.cluster.network import Network
    from posttrain.cluster.partitioning import Split
    from posttrain.cluster.tuning import PerTrial
    from posttrain.cluster.workers import Workers
    from posttrain.runs.inputs import Inputs
    from posttrain.runs.leakage import Leaks
    from posttrain.search.trial import Trial


def tune(config: RunFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The summary of the search in `run.path`, begun, gone on with, or finished already.

    Progress goes to standard error; the table of trials to standard output unless `quiet`. Raises PosttrainError.
    """
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    ledger = Ledger(RunFolder(config.run.path), "search")
    summary = finished_already(ledger, config, progress)
    if summary is None:
        with lock.run_lock(ledger.folder) as held, _opened(config, ledger, progress, verbose=verbose) as search:
            from posttrain.runs.begin import first_model
            from posttrain.runs.context import Run

            # a run in the search's own folder, for what is done once for all trials
            run = Run(
                config,
                search.inputs,
                search.splits,
                search.leaks,
                ledger,
                search.workers,
                search.train_workers,
                None,
                progress,
            )
            first = first_model(run)
            trials = with_shared_features(search.trials, first, run)
            search.workers.release()
            write_values(ledger.folder, trials)
            _run_trials(config, search, trials, first, progress, verbose=verbose)
            held.assert_held()
            summary = _finish(config, search, trials, first, progress, began)
            ledger.finish(summary)
        summary["undelivered"] = search.tracking.search.undelivered()
    if not quiet:
        print_search(Console(), summary)
    return summary


@dataclass(frozen=True)
class _Open:
    """A search with its data read and MLflow open."""

    trials: list[Trial]
    inputs: Inputs
    splits: dict[str, Split]
    """Without the test set: from here on there is none to look at."""
    digests: dict[str, str]
    """Of the data, by split."""
    leaks: Leaks
    workers: Workers
    train_workers: int
    per_trial: PerTrial
    tracking: SearchTracking


@contextmanager
def _opened(config: RunFile, ledger: Ledger, progress: StepLog, *, verbose: bool) -> Iterator[_Open]:
    with ExitStack() as stack:
        with progress.step("check the inputs"):
            from posttrain.runs.inputs import prepare

            inputs = prepare(config)
            trials = make_trials(config, inputs)
        say_remarks(inputs, progress)
        on_cluster = join_ray(config, progress, stack, verbose=verbose) is not None
        from posttrain.cluster import tuning
        from posttrain.runs import leakage

        workers, train_workers = make_workers(config, progress, on_cluster=on_cluster)
        per_trial = tuning.PerTrial(config.ray.cpus_per_worker, workers.gpus_per_worker)
        tuning.refuse_too_small(per_trial, on_cluster=on_cluster, say=progress.say, stack=stack)
        splits, digests = read(config, inputs, progress)
        leaks = leakage.find(config, splits, inputs.spec.image.shape, digests, ledger, progress)
        init_folder(ledger, config, digests)
        leakage.record(leaks, ledger)
        splits.pop("test", None)
        if not train_workers:
            workers.start()
        with progress.step("open MLflow"):
            outbox = stack.enter_context(open_outbox(config, inputs, ledger.folder, digests, progress))
        tracking = SearchTracking(outbox)
        yield _Open(trials, inputs, splits, digests, leaks, workers, train_workers, per_trial, tracking)


def _run_trials(
    config: RunFile, search: _Open, trials: Sequence[Trial], first: Network, progress: StepLog, *, verbose: bool
) -> None:
    """Run all trials that are not at their end. Raises StepError where one was lost."""
    import torch

    from posttrain.cluster import tuning
    from posttrain.search.trial import Shared, reported, run_trial

    ended = [trial.number for trial in trials if trial.ended()]
    if any(trial.ledger.rounds() for trial in trials):
        progress.say(f"{config.run.path}: going on; {len(ended)} of {len(trials)} trials are at their end already")
    for trial in trials:
        search.tracking.catch_up(trial)
    threads = torch.get_num_threads()
    digests = {name: digest for name, digest in search.digests.items() if name != "test"}
    shared = Shared(
        trials,
        search.splits,
        digests,
        search.leaks,
        first.weights,
        search.per_trial,
        threads,
        training_threads=1 if search.train_workers else threads,
    )
    halving = tuning.Halving(
        metric=config.search.metric,
        highest_is_best=config.search.metric == "validation_accuracy",
        grace=config.search.grace_rounds,
        reduction=config.search.reduction_factor,
        longest=max(trial.config.removal.max_rounds for trial in trials),
        kept=frozenset({0}),
    )
    schedule = tuning.Schedule(
        [trial.number for trial in trials if trial.number not in ended],
        {trial.number: [reported(done) for done in trial.ledger.rounds()] for trial in trials},
        halving,
        config.search.max_concurrent_trials,
    )
    listener = _Listener(trials, search.tracking, progress, config.search.metric)
    with progress.step("search"):
        failed = tuning.search(
            run_trial,
            shared,
            schedule,
            search.per_trial,
            folder=RunFolder(config.run.path),
            listener=listener,
            verbose=verbose,
        )
    if failed:
        number, error = next(iter(failed.items()))
        raise StepError(f"trial {number} failed ({error}); start the same command again to go on")


@dataclass(frozen=True)
class _Listener:
    """Says what becomes of the trials, writes down the end of those that are stopped, and tells MLflow."""

    trials: Sequence[Trial]
    tracking: SearchTracking
    progress: StepLog
    metric: str

    def on_report(self, number: int, figures: Mapping[str, Any]) -> None:
        from posttrain.cluster.tuning import FINAL

        if not figures[FINAL]:
            self.progress.say(round_sentence(number, figures, self.metric))
        self.tracking.catch_up(self.trials[number])

    def on_end(self, number: int, *, stopped: bool) -> None:
        trial = self.trials[number]
        if stopped:
            rounds = trial.ledger.rounds()[-1].number
            trial.end("stopped", f"stopped after round {rounds}: others were better")
        end = trial.ended()
        self.progress.say(f"trial {number}: {'failed: ' if end and end['how'] == 'failed' else ''}{end and end['why']}")
        self.tracking.catch_up(trial)


def _finish(
    config: RunFile, search: _Open, trials: Sequence[Trial], first: Network, progress: StepLog, began: float
) -> dict[str, Any]:
    """Write the best recipe as a run file, and tell MLflow; the search's summary."""
    for trial in trials:
        search.tracking.catch_up(trial)
    results = [result_of(trial) for trial in trials]
    best = best_of(results, config.search.metric)
    folder = RunFolder(config.run.path)
    files = {
        "best run file": write_best(config, best.trial, search.digests, first.weights),
        "trials": folder.path("trials"),
    }
    outbox, number, last = search.tracking.search, best.trial.number, best.history[-1].metrics
    outbox.log_metrics({"best_trial": number, **{name: last[name] for name in METRICS}})
    if folder.is_local:
        outbox.log_artifact(folder.local / "best.yaml")
    outbox.finish()
    return {
        "search": without_credentials(config.run.path),
        "metric": config.search.metric,
        "best": number,
        "trials": [result.summary(list(config.search.space)) for result in results],
        "seconds": round(time.perf_counter() - began, 1),
        "steps": {name: round(seconds, 2) for name, seconds in progress.seconds.items()},
        "files": files,
    }
