"""What does not change while a run goes on; what does is `posttrain.rounds.State`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from posttrain.cluster.partitioning import Split
from posttrain.cluster.workers import Workers
from posttrain.config import RunFile
from posttrain.live import Live, Removal, Rows
from posttrain.report.progress import StepLog
from posttrain.runs.inputs import Inputs
from posttrain.schema import NO_SELF_CONFIDENCE, Round
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.runs.leakage import Leaks
    from posttrain.store.outbox import Outbox
    from posttrain.store.tracking import Tracking


@dataclass(frozen=True)
class PreviousRuns:
    """What previous runs of the same job found out; of a run that is not part of a job, nothing."""

    removal: Removal = field(default_factory=Removal)
    """What they removed and relabelled, as far as these samples are still what they were."""
    self_confidence: pa.Table = field(default_factory=lambda: NO_SELF_CONFIDENCE)
    """{partition, row, self_confidence} of all of it. The noise estimate counts these samples along: without them it
    would be too low, for the live set is cleaner than the data as they came."""
    validation_noise: float = 0.0
    """Share of wrong labels in the same validation set; 0 where it is not known."""
    folders: Sequence[RunFolder] | None = None
    """Runs whose features are used again, the latest first. None: this run is not part of a job."""


@dataclass(frozen=True)
class Run:
    """The settings, data and machinery of a run."""

    config: RunFile
    inputs: Inputs
    splits: dict[str, Split]
    leaks: Leaks
    ledger: Ledger
    workers: Workers
    train_workers: int
    """Training processes; 0: the driver trains."""
    tracking: Tracking | Outbox | Callable[[Round], None] | None
    """MLflow, which is told of everything, or a function that is told of every round."""
    progress: StepLog
    previous: PreviousRuns = field(default_factory=PreviousRuns)

    @property
    def folder(self) -> RunFolder:
        return self.ledger.folder

    def live_at_start(self) -> Live:
        """The training samples that take part before the first round."""
        removal = self.previous.removal
        return Live(
            self.splits["train"].rows,
            previously_removed=removal.removed,
            quarantined=self.left_out("train"),
            relabelled=removal.relabelled,
        )

    def left_out(self, split: str) -> Rows:
        """The samples of a split that the leakage guard leaves out."""
        return self.leaks.excluded().get(split, Rows())
