"""The samples of a run as the mathematics asks for them: sums over the feature store."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from posttrain.cluster.partitioning import Split
from posttrain.cluster.views import View
from posttrain.cluster.workers import Workers
from posttrain.influence.probe import Reduce, Standardizer
from posttrain.influence.score_round import LeaveOneOutPass, ScoringPlan
from posttrain.live import Live
from posttrain.runs.context import Run
from posttrain.store.folder import RunFolder


@dataclass(frozen=True)
class StoredSamples:
    """`score_round.LiveSamples`, or validation samples, over the feature store of one split."""

    workers: Workers
    folder: RunFolder
    backbone: str
    split: Split
    live: Live
    views: dict[tuple[object, ...], View] = field(default_factory=dict)
    """Each view is made once: the workers keep its features by its key."""
    round_scored: int | None = None
    """The round whose score shards are kept, so that a run that was killed while it scored goes on with the rest."""

    def view(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...] | None) -> View:
        # the standardizers themselves are kept by the views, so that no id is given twice
        key = (layers, None if standardizers is None else tuple(map(id, standardizers)))
        if key not in self.views:
            partitions = tuple(partition.index for partition in self.split.partitions)
            self.views[key] = View(
                self.folder, self.backbone, self.split.name, partitions, self.live, layers, standardizers
            )
        return self.views[key]

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        return self.workers.reducer(self.view(layers, None))

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        return self.workers.reducer(self.view(layers, standardizers))

    def leave_one_out(self, plan: ScoringPlan) -> LeaveOneOutPass[pa.Table]:
        view = self.view(plan.ensemble.layers, plan.ensemble.standardizers)
        return self.workers.leave_one_out(view, plan, self.round_scored)


def stored(run: Run, backbone: str, split: str, live: Live | None = None) -> StoredSamples:
    """A split's samples with their features; of a held-out one, all that are in the store."""
    # what is left out of a held-out set is in none of its shards
    live = live or Live(run.splits[split].rows)
    return StoredSamples(run.workers, run.folder, backbone, run.splits[split], live)
