"""A trial of `posttrain tune`: the rounds of `posttrain clean` in one process, which tells Ray Tune of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console

from posttrain import rounds
from posttrain.cluster.partitioning import Split
from posttrain.cluster.tuning import FINAL, ROUND, Report
from posttrain.cluster.workers import Network, Workers, computing_threads
from posttrain.config import RunFile
from posttrain.errors import RecipeError, SingularCurvatureError
from posttrain.report.progress import StepLog
from posttrain.runs.clean import begun, limits
from posttrain.runs.inputs import Inputs
from posttrain.runs.leakage import Leaks
from posttrain.runs.steps import CleaningRun, figures_of
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


@dataclass
class _Run(CleaningRun):
    report: Callable[[Round], None] = lambda done: None
    training_threads: int = 1

    def tell_round(self, done: Round, figures: dict[str, bytes]) -> None:
        self.report(done)

    def train(self, *arguments: Any, **settings: Any) -> Network:
        with computing_threads(self.training_threads):
            return super().train(*arguments, **settings)


def work(number: int, handed: Handed, report: Report) -> None:
    """Carry a trial through to its end, from its last committed round on; every committed round is reported."""
    trial = handed.trials[number]
    folder, ledger = trial.folder, trial.ledger
    if ledger.started() is None:
        ledger.start(trial.config, handed.fingerprint)
    with computing_threads(handed.threads):
        run = _Run(
            trial.config,
            trial.inputs,
            handed.splits,
            folder,
            Workers(count=0, cpus=handed.cpus, gpus=handed.gpus, on_cluster=True),
            0,
            None,
            StepLog(Console(quiet=True)),
            report=lambda done: report(reported(done)),
            training_threads=handed.training_threads,
        )
        run.leave_out(handed.leaks)
        try:
            state = begun(run) or run.begin(run.network(handed.weights))
            outcome = run.concluded(rounds.clean(state, run.as_steps(), limits(trial.config)))
        except (RecipeError, SingularCurvatureError) as error:
            # a recipe with which it cannot be done is a result: others may do better. A full disk is none
            trial.end("failed", str(error))
            return
    trial.end("finished", outcome.reason)
    report({**reported(outcome.state.history[-1]), FINAL: True})


def reported(done: Round) -> Mapping[str, Any]:
    """A round's figures as Ray Tune is told them."""
    return {**figures_of(done), ROUND: done.number, FINAL: False}
