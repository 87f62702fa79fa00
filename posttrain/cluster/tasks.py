"""Short tasks over blocks, beside workers that hold the cluster's CPUs while they wait for the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from posttrain.cluster.reading import explain


def results(task: Any, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """What the remote function gives for each call's arguments, in their order.

    As many run at a time as the cluster has CPUs, though none is reserved: workers may hold them all, and a task
    that asked for one would wait for ever. Raises what a call raised, posttrain's own errors unwrapped.
    """
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    unreserved = task.options(num_cpus=0, scheduling_strategy="SPREAD")
    pending: deque[Any] = deque()
    following = iter(calls)
    try:
        while True:
            while len(pending) < at_once and (call := next(following, None)) is not None:
                pending.append(unreserved.remote(*call))
            if not pending:
                return
            yield ray.get(pending.popleft())
    except Exception as error:
        explain(error)
