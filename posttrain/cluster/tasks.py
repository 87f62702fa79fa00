"""Short tasks over blocks, beside workers that hold the cluster's CPUs while they wait for the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from posttrain.cluster.failures import PROCESS_LOST, process_lost, raise_cause


def results(
    task: Any,
    calls: Iterable[tuple[Any, ...]],
    *,
    on_crash: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Iterator[Any]:
    """What the remote function gives for each call's arguments, in their order.

    As many run at a time as the cluster has CPUs, though none is reserved: workers may hold them all, and a task
    that asked for one would wait for ever. A call whose process is lost is made again, three times at most; then
    `on_crash` says what to call instead. Raises what a call raised, posttrain's own errors unwrapped; StepError where
    its process was lost each time.
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
            except PROCESS_LOST:
                if on_crash is None:
                    raise
                found = ray.get(unreserved.remote(*on_crash(call)))
            yield found
    except PROCESS_LOST as error:
        raise process_lost(error) from error
    except Exception as error:
        raise_cause(error)
