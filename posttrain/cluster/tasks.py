"""Short tasks over blocks, beside workers that hold the cluster's CPUs while they wait for the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from posttrain.cluster.reading import raise_cause
from posttrain.errors import StepError

LOST = (WorkerCrashedError, OutOfMemoryError)
"""What Ray raises for a task whose process was ended."""


def results(
    task: Any,
    calls: Iterable[tuple[Any, ...]],
    *,
    instead: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Iterator[Any]:
    """What the remote function gives for each call's arguments, in their order.

    As many run at a time as the cluster has CPUs, though none is reserved: workers may hold them all, and a task
    that asked for one would wait for ever. A call whose process dies is made again, three times at most; then `instead`
    says what to call in its place. Raises what a call raised, posttrain's own errors unwrapped; StepError where its
    process died each time.
    """
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    unreserved = task.options(num_cpus=0, scheduling_strategy="SPREAD", max_retries=3)
    pending: deque[tuple[Any, tuple[Any, ...]]] = deque()
    following = iter(calls)
    try:
        while True:
            while len(pending) < at_once and (call := next(following, None)) is not None:
                pending.append((unreserved.remote(*call), call))
            if not pending:
                return
            reference, call = pending.popleft()
            try:
                found = ray.get(reference)
            except LOST:
                if instead is None:
                    raise
                found = ray.get(unreserved.remote(*instead(call)))
            yield found
    except LOST as error:
        raise ended(error) from error
    except Exception as error:
        raise_cause(error)


def ended(error: Exception) -> StepError:
    """What to say of a task whose process was ended each time."""
    why = "for want of memory" if isinstance(error, OutOfMemoryError) else "by a crash, or by somebody"
    return StepError(
        f"a task's worker process was ended {why}, and again each time that it was tried anew; "
        "give the workers more memory, then start the same command again to go on"
    )
