"""What the champion's run, and those before it, removed and relabelled, as far as the samples are still the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.jobs.job_folder import JobFolder

if TYPE_CHECKING:
    from posttrain.cluster.partitioning import Split
    from posttrain.runs.context import PreviousRuns
    from posttrain.store.registry import Version

ACTED_ON = "acted_on.parquet"
"""In a run's folder: all samples that this run or one before it removed or relabelled."""


def of_champion(
    job: JobFolder,
    finished: Sequence[str],
    champion: Version | None,
    train: Split,
    digests: Mapping[str, str],
    say: Callable[[str], None],
) -> PreviousRuns:
    """What the runs up to the champion's found out about these training samples; nothing without such a champion.

    `finished`: names of the job's finished runs, the latest first, whose features are used again. `digests`: of the
    data of today, by split.
    """
    from posttrain.cluster import matching
    from posttrain.runs.context import PreviousRuns
    from posttrain.store.registry import RUN

    nothing = PreviousRuns(folders=[job.run(name) for name in finished])
    name = champion.tags.get(RUN) if champion else None
    if name is None:
        return nothing
    folder = job.run(name)
    path = folder.path(ACTED_ON)
    if not folder.exists(path):
        say(f"  {path} is gone: what the champion's runs removed takes part again")
        return nothing
    known = matching.found_again(train, folder.read_table(path))
    decision = folder.read_json(folder.path("decision.json"))
    same_validation_set = decision["data"].get("validation") == digests["validation"]
    noise = decision["validation_noise"] if same_validation_set else 0.0
    return replace(nothing, removal=known.removal, self_confidence=known.self_confidence, validation_noise=noise)
