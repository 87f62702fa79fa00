"""What the champion's run, and those before it, removed and relabelled, as far as the samples are still the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from posttrain.jobs.job_folder import JobFolder
from posttrain.live import Removal
from posttrain.schema import NO_SUPPORT

if TYPE_CHECKING:
    from posttrain.cluster.reading import Split
    from posttrain.store.registry import Version

ACTED_ON = "acted_on.parquet"
"""In a run's folder: all samples that this run or one before it removed or relabelled."""


@dataclass(frozen=True)
class PreviousRuns:
    """What a run takes over from those before it; nothing, without a champion of this job."""

    removal: Removal
    self_confidence: pa.Table
    """{partition, row, self_confidence} of all of them."""
    validation_noise: float
    """Share of wrong labels in the same validation set; 0 where it is not known."""


def of_champion(
    job: JobFolder,
    champion: Version | None,
    train: Split,
    digests: Mapping[str, str],
    say: Callable[[str], None],
) -> PreviousRuns:
    """What the runs up to the champion's found out about these training samples.

    `digests`: of the data of today, by split.
    """
    from posttrain.cluster import matching
    from posttrain.store.registry import RUN

    nothing = PreviousRuns(Removal(), NO_SUPPORT, 0.0)
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
    return PreviousRuns(known.removal, known.support, noise)
