"""`posttrain retrain`: one start of a job that keeps a registered model up to date.

Reads from top to bottom: is there anything new? Then lock the job, clean everything with the champion's network and
with what previous runs found out, compare the result with the champion, and promote it, leave it, or raise an alarm.
A start that was interrupted goes on where it was, and ends as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console

from posttrain.config import JobFile
from posttrain.errors import DataError
from posttrain.jobs import rollback
from posttrain.jobs.attempt import find_attempt
from posttrain.jobs.inventory import Inventory, new_files_sentence, nothing_new_sentence, take_inventory
from posttrain.jobs.job_folder import JobFolder
from posttrain.jobs.opening import open_job, open_registry, retryable_outages
from posttrain.jobs.promotion import conclude
from posttrain.jobs.summary import print_summary, summarise
from posttrain.report.progress import StepLog
from posttrain.store import lock


def retrain(config: JobFile, *, accept: bool = False, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The summary of this start of the job, with its exit code. Raises PosttrainError.

    `accept`: let the files in that are held back. Progress goes to standard error, the outcome to standard output
    unless `quiet`.
    """
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    with retryable_outages():
        job = open_job(config)
        inventory = take_inventory(config.data, job)
        if inventory.new or (accept and inventory.state.held_back) or rollback.is_pending(job):
            with lock.job_lock(job.folder, lease_s=config.job.lock_lease_s, wait_s=config.job.lock_wait_s) as held:
                # before the files are listed again: another start may have changed what the job knows
                if accept:
                    _accept_held_back(job, held.assert_held)
                summary = _retrain_locked(config, job, progress, assert_held=held.assert_held, verbose=verbose)
        else:
            summary = _nothing_new(config, inventory)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    if not quiet:
        print_summary(summary)
    return summary


def _accept_held_back(job: JobFolder, assert_held: Callable[[], None]) -> None:
    """Let the files in that are held back; written down, for a start that goes on without --accept."""
    state = job.state()
    if state.held_back:
        assert_held()
        accepted = tuple(sorted({*state.accepted, *state.held_back}))
        job.write_state(replace(state, held_back=(), accepted=accepted))


def _nothing_new(config: JobFile, inventory: Inventory) -> dict[str, Any]:
    return summarise(config.job.name, "nothing new", nothing_new_sentence(inventory), inventory.state)


def _retrain_locked(
    config: JobFile, job: JobFolder, progress: StepLog, *, assert_held: Callable[[], None], verbose: bool
) -> dict[str, Any]:
    if rollback.is_pending(job):
        progress.say("a rollback was begun and not ended: carrying it out")
        rollback.complete(job, open_registry(config, job), assert_held)
    # again: another start of the job may just have taken the files in
    inventory = take_inventory(config.data, job)
    if not inventory.new:
        return _nothing_new(config, inventory)
    if not any(file.split == "train" for file in inventory.files):
        raise DataError(
            f"all {len(inventory.held_back)} training files are held back since an alarm; correct them, or let them "
            "in by --accept"
        )
    registry = open_registry(config, job)
    attempt = find_attempt(config, job, registry, inventory)
    if attempt.folder.exists(attempt.decision_path()):
        progress.say(f"{attempt.folder.location}: decided already; going on from there")
    else:
        progress.say(new_files_sentence(inventory))
        # a start that was killed may have left no more than half a file
        job.folder.clear_half_written()
        from posttrain.jobs.challenger import make_challenger

        record = make_challenger(
            config, job, registry, inventory, attempt, progress, assert_held=assert_held, verbose=verbose
        )
        assert_held()
        attempt.folder.write_json(attempt.decision_path(), record)
    return conclude(config, job, registry, inventory, attempt, assert_held)
