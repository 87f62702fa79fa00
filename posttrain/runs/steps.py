"""The steps of a round, as functions on a run: what `posttrain.rounds.clean` is handed.

A `CleaningRun` holds what lasts through the rounds: the data in partitions, the pool of workers, the run folder and
the tracking. Each method is one step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from posttrain import policy
from posttrain.cluster import measuring, training
from posttrain.cluster.reading import Split
from posttrain.cluster.workers import Network, Verdict, View, Workers, load_network, scores_key
from posttrain.config import RunFile
from posttrain.config import Training as TrainingSection
from posttrain.errors import DataError, PosttrainError, StepError
from posttrain.influence import calibration, curvature, probe
from posttrain.influence.calibration import NoiseEstimate
from posttrain.influence.ensemble import validation_sums, with_transition
from posttrain.influence.probe import Standardizer
from posttrain.influence.selection import Selection, select
from posttrain.report.progress import StepLog
from posttrain.rounds import REFERENCE, Cut, Outcome, State, Steps
from posttrain.runs.boundary import Boundaries, Drawn, Live
from posttrain.runs.inputs import Inputs
from posttrain.schema import (
    LABEL,
    NO_SUPPORT,
    PARTITION,
    ROW,
    SAMPLE_ID,
    SUPPORT,
    Excluded,
    ModelSpec,
    Relabelled,
    Round,
    excluded_rows,
    merged,
    relabelled_rows,
    stream_seed,
)
from posttrain.store.features import ShardSummary, quarantine_table, read_shard
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger
from posttrain.store.results import reason
from posttrain.store.scores import ScoreShards, delete_score_shards
from posttrain.vision import layers, models

if TYPE_CHECKING:
    from posttrain.runs.leakage import Leaks
    from posttrain.store.outbox import Outbox
    from posttrain.store.tracking import Tracking

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)

_BINS = 60


@dataclass(frozen=True)
class Scored:
    """The scores of a round, in `scores.parquet`."""

    path: str
    class_counts: np.ndarray
    """Live samples of each class."""
    noise: NoiseEstimate


@dataclass(frozen=True)
class Removal:
    """What a round takes out, in `removed.parquet`, and what it relabels, in `relabelled.parquet`."""

    selection: Selection
    scored: int
    excluded: Excluded
    """Of this round alone."""
    relabelled: Relabelled
    """Of this round alone."""
    support: float
    """Sum of the given labels' probabilities of all that is taken."""
    noise: NoiseEstimate
    exhausted: bool
    figures: dict[str, bytes]


@dataclass(frozen=True)
class Before:
    """What former runs of the same job knew: without it, what they left would look better than its labels are."""

    support: pa.Table
    """{partition, row, self_confidence} of all that they removed or relabelled."""
    held_out_rate: float
    """Share of wrong labels in the same validation set; 0 where it is not known."""


@dataclass
class CleaningRun:
    """One run of `posttrain clean`, as its steps see it."""

    config: RunFile
    inputs: Inputs
    splits: dict[str, Split]
    folder: RunFolder
    workers: Workers
    train_workers: int
    tracking: Tracking | Outbox | None
    progress: StepLog
    removed: Excluded = field(default_factory=dict)
    relabelled: Relabelled = field(default_factory=dict)
    quarantined: Excluded = field(default_factory=dict)
    quota: Sequence[int] | None = None
    """Samples to remove in each round instead of the budget: for controls."""
    _first: Network | None = None
    """The network as it came. With `refine.scope: head` it is the backbone of all rounds."""
    _found: dict[str, float] = field(default_factory=dict)
    """What the steps of the round found out, for its metrics."""
    _at_once: int | None = None
    """Images that were last said to be embedded at a time, for want of memory."""
    _gpus_told: bool = False
    """Whether it was said which GPUs embed."""
    earlier: Live = field(default_factory=lambda: Live({}, {}))
    """What former runs of the same job removed and relabelled; see `take_over`."""
    before: Before = field(default_factory=lambda: Before(NO_SUPPORT, 0.0))
    """What they knew of that."""
    former: Sequence[RunFolder] | None = None
    """Runs whose features are taken up, the latest first. None: this run is not one of a job."""
    left_out: dict[str, Excluded] = field(default_factory=dict)
    """By held-out set, the samples that take no part since they are training samples, too; see `leave_out`."""
    leaks: dict[str, dict[str, int]] | None = None
    """By held-out set, how many images are training images, too (`Leaks.counts`)."""
    assert_held: Callable[[], None] = lambda: None
    """Raises where another process has taken the run folder over; called before a round is made last."""
    noise: dict[str, float | None] | None = None
    """The first estimate of the share of wrong labels, thus of the data as they came; see `told_of`."""

    def __post_init__(self) -> None:
        self.boundaries = Boundaries(
            self.workers,
            self.folder,
            self.splits,
            len(self.inputs.classes),
            self.config.probe,
            self.inputs.layers,
        )
        self.workers.tell_losses(lambda text: self.progress.say(f"  {text}"))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @property
    def excluded(self) -> Excluded:
        """What takes no part in training and scoring: removed, now or by a former run, or quarantined."""
        return merged(merged(self.quarantined, self.removed), self.earlier.excluded)

    @property
    def first(self) -> Network:
        """The network as it came."""
        assert self._first is not None, "there is none before round 0"
        return self._first

    @property
    def live(self) -> Live:
        return Live(self.excluded, self.relabelled)

    # -- the steps -------------------------------------------------------------------------------------

    def embed(self, state: State[Network]) -> str:
        """The feature store of the model's backbone, by its fingerprint; written where it is not there."""
        self.progress.begin_round(state.number + 1)
        return self.embedded(self._backbone(state.model), ("train", "validation"))

    def fit(self, state: State[Network], backbone: str) -> Drawn:
        """The boundary on the live samples."""
        with self.progress.step("fit"):
            return self.boundaries.draw(backbone, self.live, number=state.number + 1)

    def score(self, state: State[Network], backbone: str, drawn: Drawn) -> Scored:
        """Every score of every live sample, streamed to the round's `scores.parquet`."""
        boundary, probes = drawn.boundary, self.config.probe
        classes = len(self.inputs.classes)
        kinds: list[curvature.Kind] = []
        curvatures = []
        with self.progress.step("curvature"):
            for layer, standardizer, fitted in zip(
                boundary.layers, boundary.standardizers, boundary.probes, strict=True
            ):
                fits = fitted.weights.numel() <= probes.exact_limit
                kind = ("exact" if fits else "ekfac") if probes.curvature == "auto" else probes.curvature
                reduce = self.boundaries.samples(backbone, self.live).standardised((layer,), (standardizer,))
                curvatures.append(curvature.measure(reduce, fitted, kind))
                kinds.append(kind)
        verdict = Verdict(boundary, tuple(curvatures), stream_seed("control", self.config.run.seed, state.number))
        with self.progress.step("calibrate"):
            held_out = self.workers.reducer(drawn.held_out)
            of_held_out, temperature = validation_sums(held_out, boundary.weights)
            # under their new labels, those that were relabelled would look like memory
            relabelled = {partition: rows for partition, (rows, _) in self.relabelled.items()}
            as_given = drawn.live
            if relabelled:
                excluded = merged(as_given.excluded, relabelled)
                as_given = replace(as_given, excluded=excluded, key=f"{as_given.key} as given")
            of_live = self.workers.calibration_sums(as_given, verdict, temperature)
            support = sum(done.metrics.get("taken_support", 0.0) for done in state.history)
            support += pc.sum(self.before.support[SUPPORT]).as_py() or 0.0
            prior = self._prior(state)
            noise_model = calibration.estimate(
                of_held_out,
                of_live,
                temperature,
                removed=policy.acted_on(state.history) + self.before.support.num_rows,
                removed_support=support,
                prior=prior,
            )
            noise_model = with_transition(
                noise_model,
                held_out,
                boundary.weights,
                lambda by: self.workers.posterior_sums(as_given, replace(verdict, noise_model=by)),
                prior,
            )
            if prior.votes is None and noise_model.prior.votes is not None:
                self.ledger.keep_votes(state.number + 1, noise_model.prior.votes.numpy())
        verdict = replace(verdict, noise_model=noise_model)
        path = self.folder.round(state.number + 1, "scores.parquet")
        counts = np.zeros(classes, np.int64)
        kept = ScoreShards(self.folder, state.number + 1, scores_key(drawn.live, verdict))
        with self.progress.step("score") as tell:

            def tables() -> Iterator[pa.Table]:
                nonlocal counts
                for table in self.workers.score(drawn.live, verdict, kept):
                    yield table
                    counts += np.bincount(table[LABEL].to_numpy(), minlength=classes)
                    tell(int(counts.sum()), boundary.probes[0].count)
                if not counts.any():
                    raise StepError("no sample is left to score; the run folder's quarantine.parquet says why")
                if np.count_nonzero(counts) == 1:
                    raise DataError(
                        f"data.train = {self.config.data.train}: only one class "
                        f"({self.inputs.classes[int(counts.argmax())]}) is left, and at least two are needed; "
                        "quarantine.parquet in the run folder says what was left out, and why: mend that, and name "
                        "another run.path"
                    )

            self.folder.write_row_groups(path, tables())
        noise = noise_model.noise
        self._found = {
            "probe_validation_loss": boundary.loss,
            "probe_validation_accuracy": boundary.accuracy,
            "curvature_is_exact": float(all(kind == "exact" for kind in kinds)),
            **{f"probe_l2_{layer.replace('.', '_')}": l2 for layer, l2 in boundary.members},
            "temperature": noise_model.temperature,
            "memorisation": noise_model.offset,
            "noise_rate": noise.rate,
            "noise_low": noise.low,
            "noise_high": noise.high,
            "noise_found": float(noise.found),
            "noise_known": float(noise.doubt is None),
            "noise_most": noise.most,
            "noise_of_held_out": float(noise.source == "held-out"),
            "live_noise": noise_model.live_rate,
            "held_out_noise": noise_model.held_out_rate,
        }
        if self.noise is None:
            self.noise = told_of(noise.rate, noise.low, noise.high, found=noise.found, known=noise.doubt is None)
        return Scored(path, counts, noise)

    def select(self, state: State[Network], scored: Scored) -> Removal:
        """The round's cut: its rows in `removed.parquet`, and in `relabelled.parquet` those that only change labels."""
        settings = self.config.removal
        number = state.number + 1
        in_all = self._in_all(state, scored.noise)
        with self.progress.step("select") as tell:
            selection = select(
                lambda: self._candidates(scored.path),
                classes=len(self.inputs.classes),
                at_most=min(self._at_most(number, int(scored.class_counts.sum())), in_all),
                caps=policy.caps(scored.class_counts, self.splits["train"].class_counts, settings.class_floor),
                threshold=-np.inf,
            )
            edges = self._edges(scored.path)
            kept, gone = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
            parts = []
            for table, (ids, labels, scores) in zip(
                self.folder.row_groups(scored.path), self._candidates(scored.path), strict=True
            ):
                mask = selection.taken(ids, labels, scores)
                values = table[settings.score].to_numpy()
                kept += np.histogram(values[~mask], edges)[0]
                gone += np.histogram(values[mask], edges)[0]
                parts.append(table.filter(pa.array(mask)))
            taken = pa.concat_tables(parts)
            if taken.num_rows != selection.total:
                raise StepError(f"{selection.total} samples were selected but {taken.num_rows} found again")
            taken = taken.append_column("round", pa.array(np.full(taken.num_rows, number), pa.int32()))
            change = np.zeros(taken.num_rows, bool)
            if settings.action == "relabel":
                change = taken["confidence"].to_numpy() >= settings.relabel_above
            removed, relabelled = taken.filter(pa.array(~change)), taken.filter(pa.array(change))
            for name, table in (("removed", removed), ("relabelled", relabelled)):
                if name == "removed" or table.num_rows:
                    why = reason(table, settings.score, number, self.inputs.classes)
                    self.folder.write_table(
                        self.folder.round(number, f"{name}.parquet"), table.append_column("reason", why)
                    )
            tell(selection.total, selection.total)
        figures: dict[str, bytes] = {}
        if self.tracking is not None:
            from posttrain.report.figures import score_histogram

            lowest = pc.min(taken[settings.score]).as_py() if taken.num_rows else None
            figures["scores.png"] = score_histogram(edges, kept, gone, score=settings.score, threshold=lowest)
        return Removal(
            selection,
            int(scored.class_counts.sum()),
            excluded_rows(removed[PARTITION].to_numpy(), removed[ROW].to_numpy()),
            relabelled_rows(
                relabelled[PARTITION].to_numpy(), relabelled[ROW].to_numpy(), relabelled["suggested_label"].to_numpy()
            ),
            float(pc.sum(taken["self_confidence"]).as_py() or 0.0),
            scored.noise,
            in_all == 0,
            figures,
        )

    def count(self, removal: Removal) -> Cut:
        """How many samples were scored, how many are candidates, and what becomes of them."""
        relabelled = sum(len(rows) for rows, _ in removal.relabelled.values())
        return Cut(
            removal.scored,
            removal.selection.candidates,
            removal.selection.total - relabelled,
            relabelled,
            in_words(removal.noise),
            removal.exhausted,
            None if self.config.removal.max_share == "estimated" else self.config.removal.max_share,
        )

    def refine(self, state: State[Network], backbone: str, removal: Removal, drawn: Drawn) -> Network:
        """The model without the samples of this round: a new head, or the whole network trained on."""
        live = self._after(removal)
        settings = self.config.refining
        if settings.scope == "head":
            with self.progress.step("refine"):
                assert self.first.backbone == backbone
                return self.redrawn(self.first, drawn.boundary.members, live)
        return self.train(
            state.model,
            settings,
            live,
            name="refine",
            seed=self.config.run.seed + 1000 * (state.number + 1),
        )

    def evaluate(self, state: State[Network], model: Network) -> dict[str, float]:
        """Accuracy and cross-entropy on what was never trained on and never cleaned."""
        splits = [name for name in ("validation", "test") if name in self.splits]
        first = self._backbone(model)
        backbone = self.embedded(first, splits)
        with self.progress.step("evaluate") as tell:
            # a new head sits on layers of the first network, whose features are there
            layers = (model.spec.head,) if model.spec == first.spec else tuple(model.spec.arguments["layers"])
            head = models.head_of(load_network(model), model.spec.head)
            bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
            metrics = self._measured(backbone, layers, head.weight.detach(), bias)
            total = sum(self.splits[name].rows for name in splits)
            tell(total, total)
        return metrics

    def commit(self, state: State[Network], removal: Removal, model: Network, done: Round) -> Round:
        """Make the round last, then tell MLflow."""
        with self.progress.step("commit"):
            self._write_checkpoint(done.number, model)
            live = self._after(removal)
            self.removed = merged(self.removed, removal.excluded)
            self.relabelled = live.relabelled
            metrics = {**done.metrics, **self._found, "taken_support": removal.support}
            if self._true_labels_known():
                self.workers.make_room()
                removed = merged(self.earlier.excluded, self.removed)
                found = measuring.detection(self.splits["train"], removed, self.relabelled)
                metrics |= _known(
                    removal_precision=found.precision,
                    removal_recall=found.recall,
                    relabel_accuracy=found.relabel_accuracy,
                )
        done = replace(done, metrics=metrics, seconds=self.progress.seconds_of_round())
        self.assert_held()
        self.ledger.commit(done)
        delete_score_shards(self.folder, done.number)
        # the next round's features are those of the new backbone: the old ones are not asked for again
        self.folder.keep_only_features(self._backbone(model).backbone)
        self.tell_round(done, removal.figures)
        self.progress.say(self._line(done))
        return done

    def redrawn(self, network: Network, members: Sequence[tuple[str, float]], live: Live) -> Network:
        """The network with the boundary of these members on the live samples as its head.

        Where a member sits before the last layer, it is the network up to the last of the members' layers.
        """
        boundary = self.boundaries.of(network.backbone, members, live).boundary
        weight, bias = (part.float() for part in boundary.fold())
        model, spec = load_network(network), network.spec
        if boundary.layers == (spec.head,):
            models.replace_head(model, spec.head, weight, bias)
            return self.network(models.to_bytes(model), spec)
        factory, arguments, probed = layers.as_probed(
            model,
            spec.head,
            boundary.layers,
            spec.width,
            weight,
            bias,
            factory=spec.factory,
            arguments=spec.arguments,
            size=(spec.image.channels, *spec.image.size),
        )
        spec = replace(spec, factory=factory, arguments=arguments, head="probe", layers=("probe",))
        return self.network(models.to_bytes(probed), spec)

    def as_steps(self) -> Steps[str, Drawn, Scored, Removal, Network]:
        """The steps as `posttrain.rounds.clean` takes them."""
        return Steps(self.embed, self.fit, self.score, self.select, self.count, self.refine, self.evaluate, self.commit)

    def concluded(self, outcome: Outcome[Network]) -> Outcome[Network]:
        """After the last round, where `policy` says so: the boundary as the new head, or the model as it came.

        Either is a round of its own.
        """
        state = self._last_boundary(outcome.state, outcome.reason)
        first, last = state.history[0].metrics, state.history[-1].metrics
        accuracies = first["validation_accuracy"], last["validation_accuracy"]
        if not policy.first_is_taken_back(*accuracies, state.validation_samples):
            return replace(outcome, state=state)
        reason = (
            f"{outcome.reason}; the model stays as it came: of the validation set it has "
            f"{100 * accuracies[0]:.1f} % right, and what became of it {100 * accuracies[1]:.1f} %"
        )
        number = state.number + 1
        self.progress.begin_round(number)
        # measured in round 0, on the same samples
        metrics = last | {name: first[name] for name in first if name.startswith(("validation_", "test_"))}
        self._write_checkpoint(number, self.first)
        done = Round(number, self._live(), 0, 0, 0, metrics, self.progress.seconds_of_round(), reason)
        self.assert_held()
        self.ledger.commit(done)
        self.tell_round(done, {})
        self.progress.say(f"the model as it came: {self._line(done)}")
        return Outcome(replace(state, history=(*state.history, done), model=self.first), reason)

    def _last_boundary(self, state: State[Network], reason: str) -> State[Network]:
        """The boundary as the new head, where `policy` says so."""
        scope, last = self.config.refine.scope, state.history[-1]
        if last.ended or not policy.boundary_is_due(scope, state.number):
            return state
        number = state.number + 1
        self.progress.begin_round(number)
        backbone = self.embedded(state.model, ("train", "validation"))
        with self.progress.step("fit"):
            drawn = self.boundaries.draw(backbone, self.live, number=number)
        before, after = last.metrics["validation_accuracy"], drawn.boundary.accuracy
        if not policy.boundary_is_taken(scope, state.number, before, after, state.validation_samples):
            return state
        with self.progress.step("refine"):
            model = self.redrawn(state.model, drawn.boundary.members, self.live)
        metrics = {**last.metrics, **self._found, **self.evaluate(state, model)}
        self._write_checkpoint(number, model)
        done = Round(number, self._live(), 0, 0, 0, metrics, self.progress.seconds_of_round(), reason)
        self.assert_held()
        self.ledger.commit(done)
        self.tell_round(done, {})
        self.progress.say(f"the boundary as the new head, nothing removed: {self._line(done)}")
        return replace(state, history=(*state.history, done), model=model)

    def leave_out(self, leaks: Leaks) -> None:
        """Take out what the leakage guard excludes, and write down what it found; before the first step."""
        path = self.folder.path("quarantine.parquet")
        excluded = leaks.excluded()
        self.leaks = leaks.counts()
        self.quarantined = merged(self.quarantined, excluded.pop("train", {}))
        self.left_out = excluded
        if self.ledger.rounds():
            return  # written already
        if (table := leaks.table()) is not None:
            self.folder.write_table(self.folder.path("leakage.parquet"), table)
        rows = leaks.quarantined()
        if rows.num_rows:
            self.folder.write_table(path, rows)

    # -- as one of the runs of a job -------------------------------------------------------------------

    def take_over(self, earlier: Live, former: Sequence[RunFolder], before: Before) -> None:
        """Start where former runs left off: with what they took out and relabelled, and with their features."""
        self.earlier, self.former, self.relabelled, self.before = earlier, former, earlier.relabelled, before

    def through_backbones(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By split and backbone, the first one first: images that went through it, and those that were asked for."""
        path = self.folder.path("embedded.json")
        if not self.folder.exists(path):
            return {}
        return {
            split: {backbone: (new, of) for backbone, (new, of) in counts.items()}
            for split, counts in self.folder.read_json(path).items()
        }

    def _note_embedded(self, backbone: str, split: str, new: int, asked: int) -> None:
        counts = self.through_backbones()
        # the first time counts: afterwards the shards are there
        if backbone not in counts.setdefault(split, {}):
            counts[split][backbone] = (new, asked)
            self.folder.write_json(self.folder.path("embedded.json"), counts)

    def by_class(self, model: Network, on: Network | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Held-out samples of each class, and how many of them the model gets right.

        On the test set, where there is one, else on the validation set; `on`: a network whose features are in the
        store, where those serve. Else the held-out images go through the model.
        """
        name = "test" if "test" in self.splits else "validation"
        on = on or self._backbone(model)
        names = head_layers(model, on)
        if names is None:
            on = model = replace(model, spec=replace(model.spec, layers=(model.spec.head,)))
            names = (model.spec.head,)
        backbone = self.embedded(on, [name])
        head = models.head_of(load_network(model), model.spec.head)
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
        reduce, weights = self._on_raw_features(backbone, name, names, head.weight.detach(), bias)
        samples, correct = reduce(probe.class_hits, weights)
        return tuple(map(int, samples.tolist())), tuple(map(int, correct.tolist()))

    def base_of(self, state: State[Network]) -> Network:
        """The network whose features the model's head sees: a later run needs no others of the same images."""
        if self.config.refine.scope == "head" or state.model.key == self.first.key:
            return self.first
        last = state.history[-1]
        # a round that only put the boundary on
        return self._read_checkpoint(last.number - 1) if last.ended else state.model

    # -- before the first round ------------------------------------------------------------------------

    def begin(self, model: Network) -> State[Network]:
        """Round 0: the model as it came, everything embedded once and what cannot be read quarantined."""
        self._first = model
        self._write_checkpoint(0, model)
        self.progress.begin_round(0)
        backbone = self.embedded(model, [name for name in ("train", "validation", "test") if name in self.splits])
        metrics = self.evaluate(State((), model, self._validation_samples), model)
        with self.progress.step("fit"):
            metrics |= self._without_removal(backbone)
        if self.config.refine.scope == "head":
            metrics[REFERENCE] = metrics["boundary_validation_accuracy"]
        done = Round(0, self._live(), 0, 0, 0, metrics, self.progress.seconds_of_round())
        self.assert_held()
        self.ledger.commit(done)
        self.tell_round(done, {})
        self.progress.say(self._line(done))
        return State((done,), model, self._validation_samples)

    def resume(self, rounds: tuple[Round, ...]) -> State[Network]:
        """The state after the last committed round."""
        path = self.folder.path("quarantine.parquet")
        if self.folder.exists(path):
            table = self.folder.read_table(path)
            table = table.filter(pc.equal(table["split"], "train"))
            self.quarantined = excluded_rows(table[PARTITION].to_numpy(), table[ROW].to_numpy())
        self.removed = self.ledger.excluded(rounds)
        for partition, (rows, new) in self.ledger.relabelled(rounds).items():
            self.relabelled = relabelled_rows(np.full(len(rows), partition), rows, new, self.relabelled)
        self.boundaries.recall([done.number for done in rounds])
        self._first = self._read_checkpoint(0)
        for done in rounds:
            self.tell_round(done, {})
            if self.noise is None and "noise_rate" in done.metrics:
                found, known = (bool(done.metrics.get(f"noise_{name}", 1.0)) for name in ("found", "known"))
                rate, low, high = (done.metrics[f"noise_{name}"] for name in ("rate", "low", "high"))
                self.noise = told_of(rate, low, high, found=found, known=known)
        return State(rounds, self._read_checkpoint(rounds[-1].number), self._validation_samples)

    def network(self, weights: bytes, spec: ModelSpec | None = None) -> Network:
        """A network with these weights: the run's own, or that of another recipe."""
        spec = spec or self.inputs.spec
        model = models.build(spec.factory, classes=spec.classes, arguments=spec.arguments)
        models.load_bytes(model, weights)
        return Network(spec, weights, models.fingerprint(model), self.config.ray.precision)

    def _write_checkpoint(self, number: int, model: Network) -> None:
        self.folder.write_bytes(self.folder.checkpoint(number), model.weights)
        self.folder.write_json(self.folder.round(number, "checkpoint", "model.json"), recipe(model.spec))

    def _read_checkpoint(self, number: int) -> Network:
        weights = self.folder.read_bytes(self.folder.checkpoint(number))
        kept = self.folder.read_json(self.folder.round(number, "checkpoint", "model.json"))
        spec = self.inputs.spec
        if kept["head"] != spec.head or kept["factory"] != spec.factory:
            spec = replace(spec, **kept, layers=(kept["head"],))
        return self.network(weights, spec)

    def train(
        self,
        model: Network,
        settings: TrainingSection,
        live: Live,
        *,
        name: str,
        seed: int,
        max_steps: int | None = None,
    ) -> Network:
        """The network trained on the training samples that are not excluded, through Ray Train."""
        self.workers.make_room()
        if self.train_workers:
            # Ray Train waits for ever for CPUs and GPUs that the scoring workers hold
            self.workers.release()
        with self.progress.step(name) as tell:
            trained = training.train(
                model,
                self.splits["train"],
                live.excluded,
                live.relabelled,
                training.Training(**settings.model_dump(exclude={"scope"}), max_steps=max_steps),
                seed=seed,
                workers=self.train_workers,
                gpus_per_worker=self._gpus_per_train_worker(),
                folder=self.folder,
                run_name=f"{name}-{seed}",
                progress=tell,
            )
        where = f" on {trained.gpu}" if trained.gpu else ""
        self.progress.say(
            f"  {name}: {_counted(trained.epochs, 'epoch')}, {_counted(trained.steps, 'step')}{where}, "
            f"accuracy on the given labels {100 * trained.train_accuracy:.1f} %"
        )
        if trained.part is not None:
            self.progress.say(
                f"  {name}: memory did not suffice for a whole step; its samples went through {trained.part} at a time"
            )
        return self.network(trained.weights, model.spec)

    def _gpus_per_train_worker(self) -> float:
        given = self.config.ray.gpus_per_train_worker
        return self.workers.gpus_to_train(max(1, self.train_workers)) if given is None else given

    # -- what the steps share --------------------------------------------------------------------------

    def embedded(self, model: Network, splits: Iterable[str]) -> str:
        """The feature store of the network's backbone, with these splits in it, by its fingerprint."""
        backbone = model.backbone
        summaries: dict[str, list[ShardSummary]] = {}
        for name in splits:
            split = self.splits[name]
            excluded = self.excluded if name == "train" else self.left_out.get(name, {})
            with self.progress.step("embed" if name == "train" else f"embed {name}") as tell:
                summaries[name] = self.workers.embed(
                    model,
                    split.partitions,
                    self.folder,
                    backbone=backbone,
                    split=name,
                    excluded=excluded,
                    progress=tell,
                    former=self.former or (),
                )
            if self.former is not None:
                asked = split.rows - sum(len(rows) for rows in excluded.values())
                self._note_embedded(backbone, name, sum(found.embedded for found in summaries[name]), asked)
        if any(shard.embedded for found in summaries.values() for shard in found):
            self._tell_gpus()
        at_once = self.workers.reduced_batch()
        if at_once is not None and at_once != self._at_once:
            self._at_once = at_once
            self.progress.say(f"  embed: memory did not suffice; going on with {at_once} images at a time")
        self._quarantine(summaries)
        return backbone

    def _tell_gpus(self) -> None:
        if self._gpus_told or not self.workers.gpus_per_worker:
            return
        found = self.workers.gpus()
        self._gpus_told = bool(found)
        if names := sorted({name for name in found if name}):
            self.progress.say(f"  embed: on {', '.join(names)}")
        if None in found:
            self.progress.say("  embed: without a GPU, although Ray sees one: is this a torch for the CPU?")

    def _quarantine(self, summaries: dict[str, list[ShardSummary]]) -> None:
        path = self.folder.path("quarantine.parquet")
        tables = []
        for name, found in summaries.items():
            table = quarantine_table(found)
            if table.num_rows:
                tables.append(table.append_column("split", pa.array([name] * table.num_rows)))
            if table.num_rows and name == "train":
                self.quarantined = excluded_rows(table[PARTITION].to_numpy(), table[ROW].to_numpy(), self.quarantined)
        before = self.folder.read_table(path) if self.folder.exists(path) else None
        if before is None or tables:
            known = set() if before is None else _keys(before)
            new = [t.filter(pa.array([key not in known for key in _keys_in_order(t)])) for t in tables]
            empty = quarantine_table([]).append_column("split", pa.array([], pa.string()))
            parts = [part for part in (before, *new) if part is not None and part.num_rows]
            self.folder.write_table(path, pa.concat_tables(parts) if parts else empty)
            count = sum(t.num_rows for t in new)
            if count:
                first = next(t for t in new if t.num_rows)
                self.progress.say(
                    f"  not readable, and in quarantine.parquet: {_counted(count, 'sample')}, the first: "
                    f"{first['file'][0].as_py()} (sample_id {first[SAMPLE_ID][0].as_py()}): "
                    f"{first['reason'][0].as_py()}"
                )
        for name in ("validation", "test"):
            if name in summaries and not any(found.count for found in summaries[name]):
                raise PosttrainError(
                    f"not one {name} sample can be read; quarantine.parquet in the run folder gives the reasons: "
                    f"is data.{name} right?"
                )
        if self._live() <= 0:
            raise PosttrainError(
                "not one training sample can be read; quarantine.parquet in the run folder gives the reasons: "
                "are data.image and data.image_shape right?"
            )

    def _backbone(self, model: Network) -> Network:
        """The network whose features are used: with a new head alone, the first one in all rounds."""
        return model if self.config.refine.scope != "head" or self._first is None else self._first

    def _after(self, removal: Removal) -> Live:
        """The live samples once the removal is made."""
        labels = dict(self.relabelled)
        for partition, (rows, new) in removal.relabelled.items():
            labels = relabelled_rows(np.full(len(rows), partition), rows, new, labels)
        return Live(merged(self.excluded, removal.excluded), labels)

    def _without_removal(self, backbone: str) -> dict[str, float]:
        """What a removal has to be compared with: a new head, and the chosen boundary, with nothing removed.

        The boundary is chosen here for round 1, too.
        """
        drawn = self.boundaries.draw(backbone, self.live, number=0)
        of_head = [c for c in self.boundaries.choices[-1].candidates() if c[0] == self.inputs.spec.head]
        l2 = of_head[0][1] if of_head else self.config.probe.l2[len(self.config.probe.l2) // 2]
        head = self.boundaries.of(backbone, [(self.inputs.spec.head, l2)], self.live)
        metrics: dict[str, float] = {}
        for name, boundary in (("refit", head.boundary), ("boundary", drawn.boundary)):
            weight, bias = boundary.fold()
            found = self._measured(backbone, boundary.layers, weight.float(), bias.float())
            metrics |= {f"{name}_{key}": value for key, value in found.items() if key.endswith("accuracy")}
        return metrics

    def _measured(
        self, backbone: str, names: tuple[str, ...], weight: torch.Tensor, bias: torch.Tensor
    ) -> dict[str, float]:
        """Accuracy and cross-entropy of a linear head on raw features of these layers, on both held-out sets."""
        metrics: dict[str, float] = {}
        for name in ("validation", "test"):
            if name not in self.splits:
                continue
            reduce, weights = self._on_raw_features(backbone, name, names, weight, bias)
            count, loss, correct, _ = reduce(probe.loss_gradient, weights)
            metrics |= {f"{name}_accuracy": float(correct / count), f"{name}_loss": float(loss / count)}
        return metrics

    def _on_raw_features(
        self, backbone: str, split: str, names: tuple[str, ...], weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[probe.Reduce, torch.Tensor]:
        """Sums over a split's raw features of these layers, and the weights of a linear head as they take it."""
        # one block of columns and its 1 per layer: the bias goes with the first
        sizes = self._widths(backbone, split, names)
        parts = []
        for at, own in enumerate(weight.split(sizes, dim=1)):
            parts += [own, (bias if at == 0 else torch.zeros_like(bias))[:, None]]
        standardizers = tuple(Standardizer(torch.zeros(size).double(), torch.ones(size).double()) for size in sizes)
        partitions = tuple(partition.index for partition in self.splits[split].partitions)
        view = View(self.folder, backbone, split, partitions, {}, {}, names, standardizers)
        return self.workers.reducer(view), torch.cat(parts, dim=1)

    def _widths(self, backbone: str, split: str, names: tuple[str, ...]) -> list[int]:
        partition = self.splits[split].partitions[0].index
        shard = read_shard(self.folder, self.folder.features(backbone, split, partition), names)
        return [matrix.shape[1] for matrix in shard.features.values()]

    def _prior(self, state: State[Network]) -> calibration.Prior:
        """What the first round that found wrong labels saw of them."""
        for done in state.history[1:]:
            votes = self.ledger.votes(done.number)
            if votes is not None:
                rate, held_out_rate = (done.metrics[name] for name in ("live_noise", "held_out_noise"))
                held = done.metrics["noise_of_held_out"]
                return calibration.Prior(torch.tensor(votes), rate if held else None, held_out_rate)
        return calibration.Prior(held_out_rate=self.before.held_out_rate)

    def _in_all(self, state: State[Network], noise: NoiseEstimate) -> int:
        """Samples that may still be dealt with in this and all later rounds."""
        settings = self.config.removal
        if self.quota is not None:
            return self.splits["train"].rows
        # the validation labels stay as noisy as they are: a later, lower estimate is chance
        most = max([noise.most, *(done.metrics.get("noise_most", 0.0) for done in state.history)])
        share = most if settings.max_share == "estimated" else settings.max_share
        removed_before = sum(len(rows) for rows in self.earlier.excluded.values())
        relabelled_before = self.before.support.num_rows - removed_before
        return policy.allowance(
            state.history, share, removed_before=removed_before, relabelled_before=relabelled_before
        )

    def _candidates(self, path: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, labels, score) with a score of -inf for what does not look wrong."""
        settings = self.config.removal
        columns = list(dict.fromkeys([SAMPLE_ID, PARTITION, ROW, LABEL, settings.score, "mislabel_odds"]))
        for table in self.folder.row_groups(path, columns):
            scores = table[settings.score].to_numpy().copy()
            # a control takes as many as it is told, by its own score alone
            if settings.score != "random" and self.quota is None:
                scores[table["mislabel_odds"].to_numpy() <= settings.min_log_odds] = -np.inf
            # what has been relabelled once is let be: it would go back and forth
            if table.num_rows and (changed := self.relabelled.get(table[PARTITION][0].as_py())) is not None:
                scores[np.isin(table[ROW].to_numpy(), changed[0])] = -np.inf
            yield table[SAMPLE_ID].to_numpy(), table[LABEL].to_numpy(), scores

    def _edges(self, path: str) -> np.ndarray:
        low, high = np.inf, -np.inf
        for table in self.folder.row_groups(path, [self.config.removal.score]):
            bounds = pc.min_max(table[0])
            if table.num_rows:
                low, high = min(low, bounds["min"].as_py()), max(high, bounds["max"].as_py())
        return np.linspace(low, high if high > low else low + 1, _BINS + 1)

    def _at_most(self, number: int, live: int) -> int:
        if self.quota is not None:
            return self.quota[number - 1]
        return policy.in_one_round(live, self.config.removal.budget)

    def _live(self) -> int:
        return self.splits["train"].rows - sum(len(rows) for rows in self.excluded.values())

    @property
    def _validation_samples(self) -> int:
        """Those that can be read."""
        table = self.folder.read_table(self.folder.path("quarantine.parquet"), ["split"])
        return self.splits["validation"].rows - (pc.sum(pc.equal(table["split"], "validation")).as_py() or 0)

    def _true_labels_known(self) -> bool:
        from posttrain.cluster.reading import true_labels_are_known

        return true_labels_are_known(self.inputs.sources, self.inputs.noise)

    def tell_round(self, done: Round, figures: dict[str, bytes]) -> None:
        """The round in MLflow; one that MLflow has already stays as it is."""
        if self.tracking is None:
            return
        settings = self.config.removal
        names = ("removed.parquet", "relabelled.parquet", "probes.json", "round.json")
        artifacts = []
        if self.folder.is_local:
            there = self.folder.local / "rounds" / f"{done.number:04d}"
            # a selection that came to nothing may lie there, too
            counted = {"removed.parquet": done.removed, "relabelled.parquet": done.relabelled}
            artifacts = [there / name for name in names if counted.get(name, 1) and (there / name).exists()]
        self.tracking.log_round(
            done.number,
            params={"score": settings.score, "budget": settings.budget, "scope": self.config.refine.scope},
            metrics=figures_of(done),
            figures=figures,
            artifacts=artifacts,
        )

    def _line(self, done: Round) -> str:
        parts = [f"round {done.number}: live {done.live:,}"]
        if done.number:
            relabelled = f" and relabelled {done.relabelled:,}" if done.relabelled else ""
            parts.append(f"removed {done.removed:,}{relabelled} of {done.candidates:,} candidates")
        parts.append(f"validation accuracy {100 * done.metrics['validation_accuracy']:.1f} %")
        if "test_accuracy" in done.metrics:
            parts.append(f"test accuracy {100 * done.metrics['test_accuracy']:.1f} %")
        return ", ".join(parts)


def told_of(rate: float, low: float, high: float, *, found: bool, known: bool) -> dict[str, float | None]:
    """What the summary says of the share of wrong labels: its interval, whether it is more than a clean set shows.

    Not `known`: the validation labels say nothing, and no figure stands for it.
    """
    if not known:
        return {"rate": None, "low": None, "high": None, "found": False, "known": False}
    return {"rate": rate, "low": low, "high": high, "found": found, "known": True}


def in_words(noise: NoiseEstimate) -> str:
    """The estimate of the share of wrong labels, as a clause."""
    if noise.doubt is not None:
        return {
            "few": f"fewer than {calibration.LEAST_CONFIDENT} validation samples tell nothing of the labels; name a larger "
            "data.validation, or raise data.validation_share (better 500 samples)",
            "chance": "the boundary agrees with the validation labels no more often than by chance: do they mean the "
            "same classes as those of data.train, and has the model learnt anything?",
        }[noise.doubt]
    interval = f"{100 * noise.rate:.0f} %, between {100 * noise.low:.0f} and {100 * noise.high:.0f} %"
    if noise.source == "comparison":
        return f"the live labels are contradicted more often than the held-out ones ({interval})"
    seen = (
        f"of the {noise.counted} {noise.source} samples that the others are surest of, "
        f"{noise.disagreeing} have another label"
    )
    return f"{seen} ({interval})" if noise.found else f"{seen}, no more than in a clean set"


def figures_of(done: Round) -> dict[str, float]:
    """What a round came to, by name: counts, metrics, and the seconds of each step."""
    return {
        "live": done.live,
        "candidates": done.candidates,
        "removed": done.removed,
        "relabelled": done.relabelled,
        **done.metrics,
        **{f"seconds_{name.replace(' ', '_')}": value for name, value in done.seconds.items()},
    }


def head_layers(model: Network, on: Network) -> tuple[str, ...] | None:
    """The layers of another network whose features the model's head takes, if it is that network with a new head."""
    if model.backbone == on.backbone:
        return (model.spec.head,)
    if model.spec.factory != layers.FACTORY:
        return None
    arguments = model.spec.arguments
    names = tuple(arguments["layers"])
    if arguments["width"] != on.spec.width or arguments["network"] != on.spec.factory or set(names) - {*on.spec.layers}:
        return None
    own, given = load_network(model), load_network(on).state_dict()
    assert isinstance(own, layers.Probed), f"{layers.FACTORY} builds nothing else"
    kept = own.network.state_dict()
    same = all(key in given and torch.equal(given[key], tensor) for key, tensor in kept.items())
    return names if same else None


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def recipe(spec: ModelSpec) -> dict[str, Any]:
    """What builds the model anew: factory, arguments, head."""
    return {"factory": spec.factory, "arguments": spec.arguments, "head": spec.head}


def _known(**metrics: float | None) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _keys_in_order(table: pa.Table) -> list[str]:
    return [
        json.dumps(key)
        for key in zip(table["split"].to_pylist(), table[PARTITION].to_pylist(), table[ROW].to_pylist(), strict=True)
    ]


def _keys(table: pa.Table) -> set[str]:
    return set(_keys_in_order(table))


def average_precisions(folder: RunFolder, split: Split) -> dict[str, float]:
    """Average precision of every score of the first round against the labels known to be right (measuring)."""
    from sklearn.metrics import average_precision_score

    from posttrain.influence.scores import SCORES

    wrong = measuring.wrong_rows(split)
    table: Any = folder.read_table(folder.round(1, "scores.parquet"), [PARTITION, ROW, *SCORES])
    truth = np.array(
        [wrong[b][r] for b, r in zip(table[PARTITION].to_pylist(), table[ROW].to_pylist(), strict=True)], bool
    )
    if not truth.any():
        return {}
    return {name: float(average_precision_score(truth, table[name].to_numpy())) for name in SCORES}
