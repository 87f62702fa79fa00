"""A search's trials side by side, through Ray Tune: the only module that knows it.

A trial is a plain function in a process of its own, which is kept for the next trial. Tune decides where and when a
trial runs, and by asynchronous successive halving which trials are stopped. The results of a trial are in its run
folder alone: Tune's own state is deleted, and a search goes on by running the trials whose folders show no end.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import ray
from pyarrow import fs
from pydantic import JsonValue
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from posttrain.cluster.failures import raise_cause
from posttrain.config import Distribution
from posttrain.errors import ConfigError
from posttrain.schema import stream_seed
from posttrain.store.folder import RunFolder

_GROWS_WITHIN_S = 600.0
"""How long a cluster may take until it has a node that carries a trial."""

_ENVIRONMENT = {
    # paths in the run file, and modules next to it, are relative to where the command was started
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # else Tune writes log files of its own on every result
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ctrl-C ends this command like any other, instead of the trials one by one
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

# even at verbosity 0 Tune writes a lot to the console
_QUIET = {"RAY_AIR_NEW_OUTPUT": "0"}

ROUND, FINAL = "round", "final"


Report = Callable[[Mapping[str, Any]], None]
"""Called by a trial with a round's figures: `round`, `final` and the metric among them. It does not return where that
round is to be the trial's last."""


class Listener(Protocol):
    """What the search calls in its own process, with the number of a trial; what it raises ends the search."""

    def on_report(self, number: int, figures: Mapping[str, Any]) -> None:
        """A trial has reported a round."""
        ...

    def on_end(self, number: int, *, stopped: bool) -> None:
        """A trial is at its end: its own, or because it was stopped."""
        ...


@dataclass(frozen=True)
class PerTrial:
    """The resources of one node that a trial needs."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Halving:
    """When a trial is stopped: at rounds `grace`, `grace * reduction`, ... all but the best one in `reduction` are."""

    metric: str
    highest_is_best: bool
    grace: int
    reduction: float
    longest: int
    """Rounds that the longest trial may take."""
    kept: frozenset[int]
    """Trials that are never stopped."""


@dataclass(frozen=True)
class Schedule:
    """Which trials run, and which of them are stopped early."""

    numbers: Sequence[int]
    """The trials to run."""
    previous_reports: Mapping[int, Sequence[Mapping[str, Any]]]
    """Of earlier, interrupted searches, by trial: the figures of every round it reported."""
    halving: Halving
    at_once: int | None
    """Most trials side by side. None: as many as the resources carry."""


def sample_values(space: Mapping[str, Distribution], trials: int, seed: int) -> list[dict[str, JsonValue]]:
    """By trial, the value of each key; trial 0 has none of its own.

    A value depends on the seed, the trial's number, the key and its distribution: not on how many trials there are.
    """
    return [
        {
            key: _sampled(distribution, np.random.default_rng(stream_seed(f"search {key}", seed, number)))
            for key, distribution in (space.items() if number else ())
        }
        for number in range(trials)
    ]


def _sampled(distribution: Distribution, generator: np.random.Generator) -> JsonValue:
    if distribution.choice is not None:
        # by their positions: NumPy would turn the values into its own types
        return distribution.choice[tune.randint(0, len(distribution.choice)).sample(random_state=generator)]
    if distribution.integers is not None:
        low, high = distribution.integers
        return tune.randint(low, high + 1).sample(random_state=generator)
    low, high = distribution.uniform or distribution.loguniform or (0.0, 0.0)
    domain = tune.uniform(low, high) if distribution.uniform else tune.loguniform(low, high)
    # four digits: people read it in a run file
    return min(max(float(f"{domain.sample(random_state=generator):.4g}"), low), high)


def refuse_too_small(wanted: PerTrial, *, on_cluster: bool, say: Callable[[str], None], stack: ExitStack) -> None:
    """Raises ConfigError where no node has what one trial takes.

    A cluster is asked for such a node, and waited for; `stack` takes the request back.
    """
    named = f"{wanted.cpus:g} CPUs" + (f" and {wanted.gpus:g} GPUs" if wanted.gpus else "")
    deadline = time.monotonic() + (_GROWS_WITHIN_S if on_cluster else 0)
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= wanted.cpus and node.get("GPU", 0) >= wanted.gpus for node in nodes):
            return
        if time.monotonic() >= deadline:
            most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise ConfigError(
                f"a trial takes {named} of one node, and there is none that has them (there are {most}); "
                "lower ray.cpus_per_worker or ray.gpus_per_worker, or raise ray.num_cpus"
            )
        if deadline - time.monotonic() > _GROWS_WITHIN_S - 1:
            say(f"no node of the cluster has the {named} that a trial takes: waiting for one")
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[{"CPU": wanted.cpus, **({"GPU": wanted.gpus} if wanted.gpus else {})}])
            # else the cluster would keep that node for ever; the trials request what they need themselves
            stack.callback(request_resources, bundles=[])
        time.sleep(2)


def search(
    run_trial: Callable[[int, Any, Report], None],
    shared: Any,
    schedule: Schedule,
    per_trial: PerTrial,
    *,
    folder: RunFolder,
    listener: Listener,
    verbose: bool,
) -> dict[int, str]:
    """Runs the trials; returns the errors of those that failed, by number.

    `run_trial(number, shared, report)` is a trial, in another process; `shared` travels once for all.
    """
    scratch = folder.path("tune")
    _delete(folder, scratch)
    if not schedule.numbers:
        # all were at their end when the search was interrupted
        return {}
    reported = {
        number: max(r[ROUND] for r in reports) for number, reports in schedule.previous_reports.items() if reports
    }
    trainable = tune.with_resources(
        tune.with_parameters(_trial, run_trial=run_trial, shared=shared, reported=reported),
        {"cpu": per_trial.cpus, "gpu": per_trial.gpus},
    )
    callback = _Callback(listener)
    with _environment(verbose):
        try:
            results = _tuner(trainable, schedule, folder, callback, verbose=verbose).fit()
        except Exception as error:
            raise_cause(error)
    callback.raise_error()
    failed = {r.config["number"]: str(r.error).strip().splitlines()[-1] for r in results if r.error and r.config}
    if not failed:
        _delete(folder, scratch)
    return failed


def _tuner(trainable: Any, schedule: Schedule, folder: RunFolder, callback: _Callback, *, verbose: bool) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(list(schedule.numbers))},
        tune_config=tune.TuneConfig(
            scheduler=Scheduler(schedule.halving, schedule.previous_reports),
            max_concurrent_trials=schedule.at_once,
            # a new process would import torch first
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.path(),
            storage_filesystem=folder.files,
            # of processes that are lost; an error in the trial itself is its result
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[callback],
            verbose=int(verbose),
        ),
    )


def _trial(config: dict[str, Any], *, run_trial: Any, shared: Any, reported: Mapping[int, int]) -> None:
    number = config["number"]
    last = reported.get(number, -1)
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            last = max(last, json.loads(Path(path, "round.json").read_text()))

    def report(figures: Mapping[str, Any]) -> None:
        # a trial that goes on reports all its rounds again
        if figures[ROUND] > last or figures[FINAL]:
            with tempfile.TemporaryDirectory() as path:
                Path(path, "round.json").write_text(json.dumps(figures[ROUND]))
                tune.report(dict(figures), checkpoint=tune.Checkpoint.from_directory(path))

    run_trial(number, shared, report)


def _name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"


class Scheduler(ASHAScheduler):
    """Tune's ASHA with trials by their numbers, and with what they reported before the search was interrupted."""

    def __init__(self, rule: Halving, previous_reports: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        super().__init__(
            time_attr=ROUND,
            metric=rule.metric,
            mode="max" if rule.highest_is_best else "min",
            # a trial ends by itself: its last round may be followed by one that puts the boundary on as the new head,
            # and by one that takes the model back
            max_t=max(rule.longest, rule.grace) + 3,
            grace_period=rule.grace,
            reduction_factor=rule.reduction,
        )
        self._kept = rule.kept
        for number, reports in previous_reports.items():
            trial = SimpleNamespace(config={"number": number})
            self.on_trial_add(None, trial)
            for figures in reports:
                self.on_trial_result(None, trial, dict(figures))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[FINAL]:
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, _numbered(trial), result)
        return TrialScheduler.CONTINUE if trial.config["number"] in self._kept else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=_name(trial))


class _Callback(tune.Callback):
    """Calls the listener; keeps what it raises, since Tune would take it for an error of the trial."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._stopped: set[int] = set()
        self._error: Exception | None = None

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        number = trial.config["number"]
        self._call(self._listener.on_report, number, result)
        # only a decision of the scheduler has it done already; its process waits meanwhile
        if result.get("done"):
            self._stopped.add(number)
            self._call(self._listener.on_end, number, stopped=True)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if number not in self._stopped:
            self._call(self._listener.on_end, number, stopped=False)

    def _call(self, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if self._error is None:
            try:
                function(*arguments, **options)
            except Exception as error:
                self._error = error

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self.raise_error()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles it with its own state, which is never read again
        return {}


@contextmanager
def _environment(verbose: bool) -> Iterator[None]:
    wanted = _ENVIRONMENT if verbose else {**_ENVIRONMENT, **_QUIET}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _delete(folder: RunFolder, path: str) -> None:
    if folder.files.get_file_info(path).type == fs.FileType.Directory:
        folder.files.delete_dir(path)
