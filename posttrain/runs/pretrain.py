"""`posttrain pretrain`: train the run file's network on the given labels, for `posttrain clean` to start from."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from posttrain.config import RunFile, without_credentials
from posttrain.errors import ConfigError
from posttrain.report.progress import StepLog
from posttrain.report.visible import visible
from posttrain.runs.open import finished_already, opened
from posttrain.runs.tracking import undelivered
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger


def pretrain(config: RunFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Where the trained weights lie, and how long it took. Training done already is not done again.

    `posttrain clean` with the same run file starts from them, with the validation set that was split off here.
    """
    if config.model.weights is not None:
        raise ConfigError(
            f"model.weights = {config.model.weights} is given: there is nothing to pre-train; leave it out to train"
        )
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    path = RunFolder(config.run.path).path("pretrained", "model.safetensors")
    finished = finished_already(Ledger(RunFolder(config.run.path)), config, progress)
    if finished is None:
        with opened(config, progress, verbose=verbose) as run:
            from posttrain.runs.begin import first_model

            first_model(run)
        left = undelivered(run.tracking)
    else:
        left = finished["undelivered"]
    summary = {
        "run": without_credentials(config.run.path),
        "weights": path,
        "seconds": round(time.perf_counter() - began, 1),
        "undelivered": left,
    }
    if not quiet:
        Console().print(
            f"pre-trained weights: {visible(path)}\nnext: posttrain clean with the same run file",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return summary
