"""`posttrain rollback`: the version before the champion becomes the champion again.

The intent is written first, as two aliases cannot be moved at once: the next start of either command of the job
carries out a rollback that was killed half way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain.config import JobFile
from posttrain.errors import InputError
from posttrain.jobs.job_folder import JobFolder
from posttrain.jobs.opening import open_job, open_registry, retryable_outages
from posttrain.store import lock

if TYPE_CHECKING:
    from posttrain.store.registry import Registry


def rollback(config: JobFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Make the previous version the champion again; which is champion now. Raises InputError where there is none."""
    with retryable_outages():
        job = open_job(config)
        if not job.state().runs:
            raise InputError(f"{config.run.path}: the job has not run yet, so that there is no version to go back to")
        with lock.job_lock(job.folder, lease_s=config.job.lock_lease_s, wait_s=config.job.lock_wait_s) as held:
            registry = open_registry(config, job)
            if not is_pending(job):
                _write_intent(config.job.name, job, registry, held.assert_held)
            done = complete(job, registry, held.assert_held)
    if not quiet:
        Console().print(
            f"{config.job.name}: version {done['champion']} is champion again, version {done['previous']} is previous",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return {"job": config.job.name, "outcome": "rolled back", "exit_code": 0, **done}


def _write_intent(name: str, job: JobFolder, registry: Registry, assert_held: Callable[[], None]) -> None:
    from posttrain.store.registry import CHAMPION, PREVIOUS

    champion, previous = registry.version(CHAMPION), registry.version(PREVIOUS)
    if champion is None or previous is None or champion.number == previous.number:
        raise InputError(f"{name} has no previous version to go back to")
    assert_held()
    job.folder.write_json(_intent(job), {"champion": previous.number, "previous": champion.number})


def _intent(job: JobFolder) -> str:
    return job.folder.path("rollback.json")


def is_pending(job: JobFolder) -> bool:
    """Whether a rollback was begun and not ended."""
    return job.folder.exists(_intent(job))


def complete(job: JobFolder, registry: Registry, assert_held: Callable[[], None]) -> dict[str, str]:
    """Carry out the pending rollback; which version is champion then, and which previous."""
    from posttrain.store.registry import CHAMPION, PREVIOUS

    wanted = job.folder.read_json(_intent(job))
    assert_held()
    registry.point(CHAMPION, wanted["champion"])
    registry.point(PREVIOUS, wanted["previous"])
    job.write_state(replace(job.state(), champion=wanted["champion"]))
    job.folder.files.delete_file(_intent(job))
    return wanted
