"""A trial of `posttrain tune`: the rounds of `posttrain clean` in one process, which reports each to Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import JsonValue
from rich.console import Console

from posttrain.cluster.devices import torch_threads
from posttrain.cluster.network import Network
from posttrain.cluster.partitioning import Split
from posttrain.cluster.tuning import FINAL, ROUND, PerTrial, Report
from posttrain.cluster.workers import Workers
from posttrain.config import RunFile
from posttrain.errors import RecipeError, SingularCurvatureError
from posttrain.report.progress import StepLog
from posttrain.runs import leakage, refine
from posttrain.runs.begin import begin_or_resume
from posttrain.runs.clean import cleaned
from posttrain.runs.context import Run
from posttrain.runs.inputs import Inputs
from posttrain.runs.leakage import Leaks
from posttrain.schema import Round
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger


@dataclass(frozen=True)
class Trial:
    """One recipe and its run folder."""

    number: int
    values: Mapping[str, JsonValue]
    """Of the keys that the search varies; trial 0 has none of its own."""
    config: RunFile
    """With these values, and with the trial's folder as `run.path`."""
    inputs: Inputs
    features: str | None = None
    """Path of the features of the untouched backbone, which all trials read."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run.path, self.features)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    def ended(self) -> dict[str, str] | None:
        """{how, why} of its end; None before."""
        path = self.folder.path("trial.json")
        return self.folder.read_json(path) if self.folder.exists(path) else None

    def end(self, how: Literal["finished", "stopped", "failed"], why: str) -> None:
        """Write down that it has ended."""
        # nobody asks for the features of its fine-tuned networks any more
        self.folder.keep_only_features("")
        # of a trial that was stopped before it had chosen among them
        self.folder.delete_folder(self.folder.path("alternatives"))
        self.folder.write_json(self.folder.path("trial.json"), {"how": how, "why": why})


@dataclass(frozen=True)
class Shared:
    """What all trials are given."""

    trials: Sequence[Trial]
    splits: dict[str, Split]
    digests: dict[str, str]
    """Of the data, by split."""
    leaks: Leaks
    weights: bytes = field(repr=False)
    """Of the network to clean with."""
    per_trial: PerTrial
    threads: int
    """Threads of torch where `posttrain clean` computes in its driver."""
    training_threads: int
    """Threads of torch where it trains."""


def run_trial(number: int, shared: Shared, report: Report) -> None:
    """Carry a trial through to its end, from its last committed round on; every committed round is reported."""
    trial = shared.trials[number]
    ledger = trial.ledger
    if ledger.started() is None:
        ledger.start(trial.config, shared.digests)
    leakage.record(shared.leaks, ledger)

    def train(*arguments: Any, **settings: Any) -> Network:
        with torch_threads(shared.training_threads):
            return refine.train(*arguments, **settings)

    with torch_threads(shared.threads):
        run = Run(
            trial.config,
            # the network to clean with is the same for all trials
            replace(trial.inputs, weights=shared.weights),
            shared.splits,
            shared.leaks,
            ledger,
            Workers(count=0, cpus=shared.per_trial.cpus, gpus=shared.per_trial.gpus, on_cluster=True),
            0,
            lambda done: report(reported(done)),
            StepLog(Console(quiet=True)),
        )
        try:
            outcome = cleaned(run, begin_or_resume(run), train=train)
        except (RecipeError, SingularCurvatureError) as error:
            # that a recipe does not work is a result, as others may; a full disk is none
            trial.end("failed", str(error))
            return
    trial.end("finished", outcome.reason)
    report({**reported(outcome.state.history[-1]), FINAL: True})


def reported(done: Round) -> Mapping[str, Any]:
    """What Ray Tune is told of a round."""
    return {**done.figures, ROUND: done.number, FINAL: False}
