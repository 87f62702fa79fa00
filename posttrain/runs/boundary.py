"""The boundary of a run: which probes draw it for which backbone, fitted and measured by the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from posttrain.cluster.reading import Split
from posttrain.cluster.workers import View, Workers
from posttrain.config import Probe as ProbeSection
from posttrain.influence import ensemble
from posttrain.influence.ensemble import ProbeEnsemble
from posttrain.influence.probe import Reduce, Standardizer
from posttrain.influence.score_round import LeaveOneOutPass, ScoringPlan
from posttrain.schema import Excluded, Relabelled, excluded_digest, relabelled_digest
from posttrain.store.folder import RunFolder

Members = tuple[tuple[str, float], ...]
"""(layer, l2) of each probe that draws a boundary."""


@dataclass(frozen=True)
class Live:
    """The samples that take part, with their present labels."""

    excluded: Excluded
    relabelled: Relabelled

    @property
    def digest(self) -> str:
        """Tells one set of live samples and labels from another."""
        return excluded_digest(self.excluded) + relabelled_digest(self.relabelled)


@dataclass
class StoredSamples:
    """`ensemble.Samples` over the feature store of one split; every view is made once."""

    workers: Workers
    folder: RunFolder
    backbone: str
    split: Split
    live: Live
    views: dict[tuple[object, ...], View] = field(default_factory=dict)
    number: int | None = None
    """The round whose score shards are kept."""

    def view(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...] | None) -> View:
        # the standardizers themselves are kept by the views, so that no id is given twice
        key = (layers, None if standardizers is None else tuple(map(id, standardizers)))
        if key not in self.views:
            partitions = tuple(partition.index for partition in self.split.partitions)
            self.views[key] = View(
                self.folder,
                self.backbone,
                self.split.name,
                partitions,
                self.live.excluded,
                self.live.relabelled,
                layers,
                standardizers,
            )
        return self.views[key]

    def raw(self, layers: tuple[str, ...]) -> Reduce:
        return self.workers.reducer(self.view(layers, None))

    def standardised(self, layers: tuple[str, ...], standardizers: tuple[Standardizer, ...]) -> Reduce:
        return self.workers.reducer(self.view(layers, standardizers))

    def leave_one_out(self, plan: ScoringPlan) -> LeaveOneOutPass[pa.Table]:
        view = self.view(plan.ensemble.layers, plan.ensemble.standardizers)
        return self.workers.leave_one_out(view, plan, self.number)


@dataclass(frozen=True)
class Drawn:
    """A boundary with the samples that it was fitted and measured on."""

    boundary: ProbeEnsemble
    live: StoredSamples
    held_out: StoredSamples


@dataclass(frozen=True)
class Choice:
    """Which probes draw the boundary on a backbone, and the table behind it."""

    backbone: str
    members: Members
    tried: tuple[tuple[str, float, float, float], ...]
    """(layer, l2, held-out cross-entropy, held-out accuracy)."""

    @staticmethod
    def read(record: dict[str, object]) -> Choice:
        members, tried = record["members"], record["tried"]
        assert isinstance(members, list) and isinstance(tried, list)
        return Choice(str(record["backbone"]), tuple((layer, l2) for layer, l2 in members), tuple(map(tuple, tried)))

    def candidates(self) -> list[tuple[str, float]]:
        """(layer, l2) of each layer's best."""
        best: dict[str, tuple[float, float]] = {}
        for layer, l2, loss, _ in self.tried:
            if layer not in best or loss < best[layer][1]:
                best[layer] = (l2, loss)
        return [(layer, l2) for layer, (l2, _) in best.items()]


@dataclass
class Boundaries:
    """Draws boundaries, and keeps to a choice as long as the backbone stays."""

    workers: Workers
    folder: RunFolder
    splits: dict[str, Split]
    classes: int
    settings: ProbeSection
    layers: tuple[str, ...]
    """Those to try."""
    choices: list[Choice] = field(default_factory=list)
    _drawn: dict[tuple[str, str, Members], Drawn] = field(default_factory=dict, init=False)
    """The last two, by backbone, digest of the live samples, and members."""

    def recall(self, rounds: Sequence[int]) -> None:
        """Take up the choices that these rounds made."""
        for number in rounds:
            path = self._path(number)
            if self.folder.exists(path):
                self.choices.append(Choice.read(self.folder.read_json(path)))

    def draw(self, backbone: str, live: Live, *, number: int) -> Drawn:
        """The boundary on the live samples; for a new backbone its members are chosen, and kept in round `number`.

        Of the first backbone all layers and l2_values are tried, of a refined one every layer with the l2
        that was best for it before.
        """
        choice = self.chosen(backbone)
        if choice is not None:
            return self.of(backbone, choice.members, live)
        candidates = (
            self.choices[-1].candidates()
            if self.choices
            else [(layer, l2) for layer in self.layers for l2 in self.settings.l2]
        )
        samples, held_out = self.samples(backbone, live), self.held_out(backbone)
        boundary = ensemble.choose(samples, held_out, candidates=candidates, classes=self.classes)
        tried = tuple((fit.layer, fit.l2, fit.loss, fit.accuracy) for fit in boundary.tried)
        choice = Choice(backbone, boundary.members, tried)
        self.folder.write_json(self._path(number), asdict(choice))
        self.choices.append(choice)
        return self._keep(boundary, samples, held_out)

    def of(self, backbone: str, members: Sequence[tuple[str, float]], live: Live) -> Drawn:
        """The boundary of these members on the live samples."""
        found = self._drawn.get((backbone, live.digest, tuple(members)))
        if found is not None:
            return found
        samples, held_out = self.samples(backbone, live), self.held_out(backbone)
        # from zero: a run that goes on after an interruption has no former boundary to start from
        boundary = ensemble.refit(samples, held_out, members, classes=self.classes)
        return self._keep(boundary, samples, held_out)

    def samples(self, backbone: str, live: Live) -> StoredSamples:
        """The live training samples with their features."""
        return StoredSamples(self.workers, self.folder, backbone, self.splits["train"], live)

    def held_out(self, backbone: str) -> StoredSamples:
        """The validation samples with their features."""
        # nothing to leave out: what was quarantined of them is in no shard
        return StoredSamples(self.workers, self.folder, backbone, self.splits["validation"], Live({}, {}))

    def chosen(self, backbone: str) -> Choice | None:
        """The choice made for this backbone."""
        return next((choice for choice in self.choices if choice.backbone == backbone), None)

    def as_record(self) -> dict[str, object] | None:
        """The latest choice, for the summary: its members, and what was tried."""
        if not self.choices:
            return None
        last = self.choices[-1]
        return {
            "members": [{"layer": layer, "l2": l2} for layer, l2 in last.members],
            "tried": [
                {"layer": layer, "l2": l2, "validation_loss": loss, "validation_accuracy": accuracy}
                for layer, l2, loss, accuracy in last.tried
            ],
        }

    def _keep(self, boundary: ProbeEnsemble, samples: StoredSamples, held_out: StoredSamples) -> Drawn:
        drawn = Drawn(boundary, samples, held_out)
        # two serve: the boundary after a removal is the next round's
        self._drawn = dict(list(self._drawn.items())[-1:])
        self._drawn[samples.backbone, samples.live.digest, boundary.members] = drawn
        return drawn

    def _path(self, number: int) -> str:
        return self.folder.round(number, "probes.json")
