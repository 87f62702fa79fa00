"""`posttrain clean`: a noisy data set and a model in, a clean data set and a better model out.

Read from top to bottom: open the run, begin it or go on, go round (`posttrain.rounds`), conclude, write the results.
Each step of a round is a module beside this one.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain import rounds
from posttrain.config import RunFile
from posttrain.report.progress import StepLog
from posttrain.report.summary import print_summary
from posttrain.runs.open import finished_already, opened
from posttrain.runs.tracking import undelivered
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.cluster.network import Network
    from posttrain.runs.context import Run
    from posttrain.runs.fit import Fitted
    from posttrain.runs.refine import Train
    from posttrain.runs.score import Scored
    from posttrain.runs.select import Choice, Quota


def clean(config: RunFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The summary of the run in `run.path`, begun, gone on with, or finished already.

    Progress goes to standard error; the summary table to standard output unless `quiet`. Raises PosttrainError.
    """
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    summary = finished_already(Ledger(RunFolder(config.run.path)), config, progress)
    if summary is None:
        with opened(config, progress, verbose=verbose) as run:
            from posttrain.runs.begin import begin_or_resume
            from posttrain.runs.finish import finish

            outcome = cleaned(run, begin_or_resume(run))
            summary = finish(run, outcome, began)
        summary["undelivered"] = undelivered(run.tracking)
    if not quiet:
        print_summary(Console(), summary)
    return summary


def cleaned(
    run: Run, state: rounds.State[Network, Fitted], *, train: Train | None = None
) -> rounds.Outcome[Network, Fitted]:
    """All rounds from this state on, and the model that the run leaves behind; `train` in place of `refine.train`."""
    from posttrain.runs import refine
    from posttrain.runs.bases import next_base
    from posttrain.runs.conclude import conclude

    train = train or refine.train
    steps, limits = steps_of(run, train=train), rounds.Limits.of(run.config.removal)
    outcome = rounds.clean(state, steps, limits)
    run.progress.say(f"stopped: {outcome.reason}")
    while (following := next_base(run, outcome, train)) is not None:
        outcome = rounds.clean(following, steps, limits)
        run.progress.say(f"stopped: {outcome.reason}")
    return conclude(run, outcome, train=train)


def steps_of(
    run: Run, *, train: Train | None = None, quota: Quota = None
) -> rounds.Steps[str, Fitted, Scored, Choice, Network]:
    """The steps of a round of this run; `quota` as `select` takes it."""
    from posttrain.runs import commit, embed, evaluate, fit, refine, score, select

    return rounds.Steps(
        embed=partial(embed.embed, run),
        fit=partial(fit.fit, run),
        score=partial(score.score, run),
        select=partial(select.select, run, quota=quota),
        refine=partial(refine.refine, run, train=train or refine.train),
        evaluate=partial(evaluate.evaluate, run),
        commit=partial(commit.commit, run),
    )
