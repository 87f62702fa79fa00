"""The cause of a failure, out of the errors that Ray wraps around it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NoReturn

import ray.exceptions
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from posttrain import errors
from posttrain.errors import PosttrainError, StepError

PROCESS_LOST = (WorkerCrashedError, OutOfMemoryError)
"""What Ray raises for a task whose process was ended."""


def raise_cause(error: BaseException) -> NoReturn:
    """Raise posttrain's own error out of those that Ray wraps around it; else `error` as it is.

    What a disk or an object store refuses becomes a StepError.
    """
    found = unwrapped(error)
    if found is error:
        raise error
    raise found from None


def unwrapped(error: BaseException) -> BaseException:
    """The error that `raise_cause` raises."""
    causes = list(cause_chain(error))
    for cause in causes:
        if isinstance(cause, PosttrainError):
            return cause
    # of an exception that a function of its own raised, Ray Data keeps the text alone
    match = re.search(r"^posttrain\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if match is not None and issubclass(kind := getattr(errors, match[1], Exception), PosttrainError):
        return kind(match[2])
    for cause in causes:
        # Ray's own errors may be OSErrors as well, with the whole trace as their text
        if isinstance(cause, OSError) and not isinstance(cause, ray.exceptions.RayError | ConnectionError):
            why = " ".join(str(cause).split())
            return StepError(f"{why}; mend it and start the same command again to go on")
    return error


def cause_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and all that it was raised from or while handling."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        cause = queue.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        queue += [getattr(cause, "cause", None), cause.__cause__, cause.__context__]


def process_lost(error: Exception) -> StepError:
    """The error to raise for a task whose process was ended at every attempt."""
    why = "for want of memory" if isinstance(error, OutOfMemoryError) else "by a crash, or by somebody"
    return StepError(
        f"a task's worker process was ended {why}, and again each time that it was tried anew; "
        "give the workers more memory, then start the same command again to go on"
    )


def loss_reason(error: Exception) -> str:
    """Why a process was lost, as far as Ray knows it: a clause."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "out of memory"
    if "node has died" in text or "node died" in text:
        return "its node was lost"
    return "killed, crashed, or out of memory"
