"""A trial of `posttrain tune`: the rounds of `posttrain clean` in one process, which tells Ray Tune of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.console import Console

from posttrain.cluster.reading import Split
from posttrain.cluster.tuning import FINAL, ROUND, Report
from posttrain.cluster.workers import Network, Workers, computing_threads
from posttrain.config import RunFile
from posttrain.errors import RecipeError, SingularCurvatureError
from posttrain.report.progress import StepLog
from posttrain.runs import leakage, refine
from posttrain.runs.clean import cleaned
from posttrain.runs.context import Run
from posttrain.runs.inputs import Inputs
from posttrain.runs.leakage import Leaks
from posttrain.runs.noise_report import round_metrics
from posttrain.schema import Round
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger


@dataclass(frozen=True)
class Trial:
    """One recipe and its run folder."""

    number: int
    config: RunFile
    """With the trial's values, and with its own folder as `run.path`."""
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
        """How and why it came to its end; None before."""
        path = self.folder.path("trial.json")
        return self.folder.read_json(path) if self.folder.exists(path) else None

    def end(self, how: Literal["finished", "stopped", "failed"], why: str) -> None:
        """Make its end last."""
        # those of a refined network are nobody's any more
        self.folder.keep_only_features("")
        self.folder.write_json(self.folder.path("trial.json"), {"how": how, "why": why})


@dataclass(frozen=True)
class Handed:
    """What is handed to all trials."""

    trials: Sequence[Trial]
    splits: dict[str, Split]
    fingerprint: dict[str, str]
    leaks: Leaks
    weights: bytes = field(repr=False)
    """Of the network to clean with."""
    cpus: float
    gpus: float
    threads: int
    """torch's, in the driver that `posttrain clean` has."""
    training_threads: int
    """torch's, in the process that trains there."""


def work(number: int, handed: Handed, report: Report) -> None:
    """Carry a trial through to its end, from its last committed round on; every committed round is reported."""
    trial = handed.trials[number]
    ledger = trial.ledger
    if ledger.started() is None:
        ledger.start(trial.config, handed.fingerprint)
    leakage.record(handed.leaks, ledger)

    def train(*arguments: Any, **settings: Any) -> Network:
        with computing_threads(handed.training_threads):
            return refine.train(*arguments, **settings)

    with computing_threads(handed.threads):
        run = Run(
            trial.config,
            # the network to clean with is the same for all trials
            replace(trial.inputs, weights=handed.weights),
            handed.splits,
            handed.leaks,
            ledger,
            Workers(count=0, cpus=handed.cpus, gpus=handed.gpus, on_cluster=True),
            0,
            lambda done: report(reported(done)),
            StepLog(Console(quiet=True)),
        )
        try:
            outcome = cleaned(run, train=train)
        except (RecipeError, SingularCurvatureError) as error:
            # a recipe with which it cannot be done is a result: others may do better. A full disk is none
            trial.end("failed", str(error))
            return
    trial.end("finished", outcome.reason)
    report({**reported(outcome.state.history[-1]), FINAL: True})


def reported(done: Round) -> Mapping[str, Any]:
    """A round's figures as Ray Tune is told them."""
    return {**round_metrics(done), ROUND: done.number, FINAL: False}
